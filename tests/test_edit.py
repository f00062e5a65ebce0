"""Editing: the equations by hand, the solver's order, masks, and phantoms whose truth is known."""
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import phantom
import pydicom
import pytest
import torch
from conftest import DEMO_SIDE, ROOT
from PIL import Image

import data
import radit
import sample
from causal import edit, edit_command
from common import cli
from diagnosis import stress
from radiographs import dicom, fields, pixels

SIZE = f"{DEMO_SIDE}x{DEMO_SIDE}"
OLD = {"age": 40.0, "sex": "male", "cardiomegaly": "negative"}
NEW = OLD | {"cardiomegaly": "positive"}


@pytest.fixture(scope="module")
def model():
    """Random weights whose velocity bends enough for the solver's error to show."""
    torch.manual_seed(0)
    net = radit.RadiT(radit.RadiTConfig(
        channels=1, grid=(8, 8), patch=2, width=64, depth=2, heads=1)).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(std=0.5 / (parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 5))
    return net


def small_images(n=2):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_there_and_back_errs_by_the_order_of_the_solver(model, solver, order):
    x, errors = small_images(), []
    for steps in (16, 32, 64) if solver == "euler" else (4, 8, 16):  # then Heun's error is that of float32
        back = edit.edit(model, None, x, [OLD] * 2, [OLD] * 2, guidance=1, steps=steps, solver=solver)
        errors.append((back - x).abs().max().item())
    assert errors[-1] < (0.05 if solver == "euler" else 0.002)
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine > 2 ** order * 0.75


def test_one_step_by_hand(model):
    """Back by the velocity of the factual metadata, forward by rest + w (all - rest), rest without what changes."""
    x, w = small_images(1), 3.0
    def v(x, t, record):
        age, codes = fields.encode_metadata([record])
        return model(x, torch.tensor([t]), age, codes)
    noise = x - v(x, 1.0, OLD)
    rest = v(noise, 0.0, {"age": 40.0, "sex": "male"})
    expected = noise + rest + w * (v(noise, 0.0, NEW) - rest)
    result = edit.edit(model, None, x, [OLD], [NEW], guidance=w, steps=1, solver="euler")
    torch.testing.assert_close(result, expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_what_is_followed_back_carries_the_noise_of_training(model):
    """A velocity model on pixels knows the clean image; a VAE's posterior has its variance; data prediction ends at
    0.95. The draw is the same for every image and in any batch, and standard normal."""
    x = torch.zeros(2, 1, 64, 64)
    clean, t = edit.encode(model, None, x)
    assert t == 1 and torch.equal(clean, x)
    vae = SimpleNamespace(encode=lambda x: (3 + x, torch.full_like(x, np.log(4.0))))
    drawn, t = edit.encode(model, vae, x)
    assert t == 1 and abs(drawn.mean() - 3) < 0.1 and abs(drawn.std() - 2) < 0.1 and torch.equal(drawn[0], drawn[1])
    noisy, t = edit.encode(SimpleNamespace(config=SimpleNamespace(prediction="data")), None, x + 1)
    assert t == 0.95 and abs(noisy.mean() - 0.95) < 0.01 and abs(noisy.std() - 0.05) < 0.005


def test_what_stays_is_not_amplified(model):
    """With nothing changed the weight has nothing to act on."""
    x = small_images()
    one, nine = (edit.edit(model, None, x, [OLD] * 2, [OLD] * 2, guidance=w, steps=4) for w in (1, 9))
    torch.testing.assert_close(one, nine, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(edit.edit(model, None, x, [OLD] * 2, [NEW] * 2, guidance=9, steps=4), one, atol=1e-2)


def test_less_depth_changes_less(model):
    x = small_images()
    changes = [(edit.edit(model, None, x, [OLD] * 2, [NEW] * 2, steps=16, depth=depth) - x).abs().mean()
               for depth in (0.1, 0.5, 1.0)]
    assert changes[0] < changes[1] < changes[2]


def test_outside_the_mask_every_pixel_stays(model):
    x, mask = small_images(), torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    result = edit.edit(model, None, x, [OLD] * 2, [NEW] * 2, steps=8, mask=mask)
    assert torch.equal(torch.where(mask > 0, 0, result), torch.where(mask > 0, 0, x)) \
        and not torch.allclose(result, x, atol=1e-2)
    # The same metadata and no new noise: the inside comes back too; with new noise it is another.
    same = edit.edit(model, None, x, [OLD] * 2, [OLD] * 2, guidance=1, steps=64, mask=mask)
    assert (same - x).abs().max() < 5e-3
    fresh = edit.edit(model, None, x, [OLD] * 2, [OLD] * 2, guidance=1, steps=64, mask=mask, seed=3)
    assert (fresh - x).abs().max() > 0.1


def test_descendants_follow_and_others_stay():
    record = {"age": 60.0, "sex": "male", "view": "PA", "dataset": "kermany", "pleural_effusion": "negative",
              "no_finding": "positive"}
    changed = edit.act(record, {"pleural_effusion": "positive"}, sample.DEMO / "causal")
    assert changed["pleural_effusion"] == "positive" and changed["no_finding"] == "negative"
    assert {f: changed[f] for f in ("age", "sex", "view", "dataset")} == {
        f: record[f] for f in ("age", "sex", "view", "dataset")}
    # Nothing follows, but a normal image it is no longer.
    alone = edit.act(record, {"pleural_effusion": "positive"}, None)
    assert alone == record | {"pleural_effusion": "positive", "no_finding": "negative"}


@pytest.mark.slow
@pytest.mark.parametrize("change, name", [
    ({"cardiomegaly": "positive"}, "heart"), ({"cardiomegaly": "negative"}, "heart"),
    ({"pleural_effusion": "positive"}, "fluid"), ({"pleural_effusion": "negative"}, "fluid"),
    ({"support_devices": "negative"}, "device"), ({"age": 15.0}, "body"), ({"age": 85.0}, "body")], ids=str)
def test_phantoms_change_as_the_rule_says_and_only_so(phantom_weights, change, name):
    """Held-out phantoms in which the value is another, edited with the default guidance. What is measured goes at least
    half the way to where the rule says; the rest stays near its own rule. Followed back from the clean picture at
    t = 1, as if data prediction knew it, bodies would not widen at all."""
    net, _ = sample.load_weights(phantom_weights)
    choose, noise, records = random.Random(99), np.random.default_rng(99), []
    while len(records) < 16:
        record = phantom.random_record(choose)
        if all(record[f] != v if f != "age" else abs(record[f] - v) > 30 for f, v in change.items()):
            records.append(record)
    images = torch.stack([torch.from_numpy(phantom.draw(r, noise)).float()[None] * 2 - 1 for r in records])
    new = [record | change for record in records]
    edited = edit.edit(net, None, images, records, new, steps=10)
    rule = {"body": np.array([0.28 + 0.002 * r["age"] for r in new]),
            "heart": np.array([0.55 if r["cardiomegaly"] == "positive" else 0.25 for r in new]),
            "fluid": np.array([0.16 - phantom.LEVEL if r["pleural_effusion"] == "positive" else 0 for r in new]),
            "device": np.array([float(r["support_devices"] == "positive") for r in new])}
    before, after = (error(batch, rule) for batch in (images, edited))
    assert after[name] < 0.5 * before[name]
    stays = {"body": 0.05, "heart": 0.12, "fluid": 0.06, "device": 0.3}
    assert all(after[other] < tolerance for other, tolerance in stays.items() if other != name), after


def error(images, rule):
    """The mean distance of each measured quantity from the rule's; of the device, how often it is wrongly there or
    not."""
    rows = [phantom.measure((x[0].numpy() + 1) / 2) for x in images]
    seen = {name: np.array([row[name] for row in rows]) for name in ("body", "heart", "fluid")}
    seen["device"] = np.array([float(max(row["left"], row["right"]) > 0.8) for row in rows])
    return {name: np.abs(seen[name] - rule[name]).mean() for name in rule}


@pytest.mark.parametrize("arguments, message", [
    (["{text}", "--set", "sex=female"], "not an image"), (["{image}", "--set", "race=white"], "says nothing of race"),
    (["{image}", "--set", "sex=female", "--mask", "{mask}"],
     f"a mask of 5x5 pixels; accepted: {SIZE}, as the image is edited, or 128x128, as it was"),
    (["{image}", "--given", "sex=female", "--set", "sex=female"], "nothing to change"),
    (["{image}", "--given", "sex=female", "--set", "sex=female", "--mask", "{half}"], "nothing to change"),
    (["{image}", "--given", "pneumonia=positive", "--set", "no_finding=positive", "--no-causal"],
     "contradicts pneumonia=positive"),
    (["{image}", "--set", "sex=unknown"], "nothing to change"),
    (["{image}", "--set", "sex"], "not of the form FIELD=VALUE"),
    (["{image}", "--sweep", "sex=1:2:1"], "accepted is age=FIRST:LAST:STEP"),
    (["{image}", "--sweep", "age=20:30:0"], "accepted is age=FIRST:LAST:STEP"),
    (["{image}", "--sweep", "age=20:30:nan"], "accepted is age=FIRST:LAST:STEP"),
    (["{image}", "--set", "sex=female", "--depth", "0"], "--depth: '0' is not a number from 0.01 to 1"),
    (["{image}", "--set", "sex=female", "--guidance", "nan"], "--guidance: 'nan' is not a number from 0 to 100"),
    (["{image}", "--set", "sex=female", "--guidance", "1e38"], "--guidance: '1e38' is not a number from 0 to 100"),
    (["{image}", "--set", "sex=female", "--seed", "3"], "--seed makes the inside of a mask anew"),
    (["{image}", "--set", "sex=female", "--steps", "99999999999999999999"], "is not a whole number from 1 to 1,000"),
    (["{image}", "--set", "sex=female", "--mask", "{text}"], "not an image"),
    (["{image}", "--set", "sex=female", "--mask", "{cut}"], "damaged or cut short"),
    (["{image}", "--set", "sex=female", "--keep", "{red}"], "colour image"),
    (["{image}", "--set", "sex=female", "--keep", "{white}"], "nothing may change")])
def test_bad_input_is_one_line(tmp_path, command, arguments, message):
    files = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "half", "red", "white", "cut")}
    files["text"] = tmp_path / "a.txt"
    files["text"].write_text("no radiograph")
    grey = np.linspace(0, 255, 128 * 128).reshape(128, 128).astype(np.uint8)
    Image.fromarray(grey).save(files["image"])
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(files["mask"])
    Image.fromarray(grey).save(files["half"])
    Image.new("RGB", (128, 128), "red").save(files["red"])
    Image.new("L", (128, 128), "white").save(files["white"])
    files["cut"].write_bytes(files["image"].read_bytes()[:200])
    status, output, errors = command("causal", "edit", *[a.format(**files) for a in arguments],
                                     "--out", tmp_path / "out")
    assert status == 2 and message in output + errors and not (tmp_path / "out").exists()
    assert len(errors.splitlines()) == 1


def test_a_mask_of_the_original_is_letterboxed_like_the_image(tmp_path):
    """A wide original, left half white: where the prepared picture is white, and only there, the mask is."""
    array = np.zeros((300, 500), np.uint8)
    array[:, :250] = 255
    Image.fromarray(array).save(tmp_path / "a.png")
    prepared = pixels.read_radiograph(tmp_path / "a.png", 64) > 127
    mask = edit_command.read_mask(tmp_path / "a.png", 64, edit_command.shape_of(tmp_path / "a.png"))
    assert np.array_equal(mask[0, 0].numpy() > 0, prepared) and 0.25 < prepared.mean() < 0.35
    keep = edit_command.read_mask(tmp_path / "a.png", 64, (300, 500), keep=True)[0, 0].numpy() > 0
    bars = np.zeros((64, 64), bool)
    bars[13:51] = True                                               # 64 x 300 / 500 rows show the image
    assert np.array_equal(keep, bars & ~prepared)                    # the black bars stay as they are
    dicom.write(tmp_path / "a.dcm", torch.zeros(1, 30, 50), {}, "demo", 0)
    assert edit_command.shape_of(tmp_path / "a.dcm") == (30, 50)


def test_what_is_equal_is_white_in_the_difference():
    a = torch.rand(1, 8, 8) * 2 - 1
    b = a.clone()
    b[0, :4] += 0.3
    shown = np.asarray(edit_command.difference(a, b))
    assert (shown[4:] == 255).all() and (shown[:4, :, 0] == 255).all() and (shown[:4, :, 1] < 255).all()


def test_a_sheet_shows_each_picture_at_384_pixels_under_the_change():
    small = {str(i): Image.new("L", (128, 128), 255) for i in range(4)}
    sheet = edit_command.sheet("sex male to female", small)
    assert sheet.size == (4 * 384, 26 + 26 + 384)
    array = np.asarray(sheet.convert("L"))
    # The title is above.
    assert (array[52:] == 255).all() and array[:26].max() > 128 and (array[:26] == 0).mean() > 0.5
    assert edit_command.sheet("x", {"a": Image.new("L", (512, 512))}).size[0] == 512
    assert edit_command.sheet(" ".join(["word"] * 300), small).size[1] > 26 + 26 + 384               # broken into lines
    assert edit_command.sheet("x", small, columns=2).size == (2 * 384, 26 + 2 * (26 + 384))


def test_a_classifiers_unsure_answers_stay_unknown(monkeypatch):
    """Probabilities by hand: .9 for PA, .7 for male, .95 for no finding, .85 for pneumonia, which contradicts it."""
    values = {field: ("own",) if field == "dataset" else fields.VALUES[field] for field in fields.CODED}
    chances = {"view": 0.9, "sex": 0.7, "no_finding": 0.95, "pneumonia": 0.85}
    logits = []
    for field in fields.CODED:
        p = torch.full((1, len(values[field])), 1e-6)
        if field in chances:
            p[:] = (1 - chances[field]) / (len(values[field]) - 1)
            p[0, 1] = chances[field]
        logits.append(p.log())
    config = SimpleNamespace(covered={field: {"a": 1, "b": 1} for field in chances}, age_error=12.3)
    judge = SimpleNamespace(values=values, config=config, parameters=lambda: iter([torch.zeros(1)]))
    monkeypatch.setattr(edit.classifier, "load", lambda folder: Judge(judge, torch.tensor([33.33]), logits))
    covered = {"view": {"PA": 1, "AP": 1}, "sex": {"male": 1}, "no_finding": {"positive": 1},
               "pneumonia": {"positive": 1}, "age": [0, 30]}
    record, lines = edit.infer({}, torch.zeros(1, 1, 8, 8), covered)
    assert record == {"view": "PA", "no_finding": "positive", "age": 30}     # as old as the weights know
    assert "sex stays unknown: male has the probability 0.70" in lines
    assert "pneumonia stays unknown: positive, probability 0.85, contradicts the rest" in lines
    assert "inferred view=PA, probability 0.90" in lines and "inferred age=30, wrong by 12.3 years on average" in lines
    assert edit.infer({"pneumonia": "positive", "view": "AP"}, torch.zeros(1, 1, 8, 8), covered)[0] == {
        "pneumonia": "positive", "view": "AP", "age": 30}            # what is given stands


class Judge:
    def __init__(self, about, years, logits):
        self.__dict__.update(about.__dict__, answer=(years, logits))

    def __call__(self, image):
        return self.answer


def test_the_command_writes_the_pictures(tmp_path, command):
    rng = np.random.default_rng(0)
    array = (phantom.draw(phantom.random_record(random.Random(0)), rng) * 255).astype(np.uint8)
    Image.fromarray(array).resize((128, 128)).save(tmp_path / "a.png")
    status, output, errors = command("causal", "edit", tmp_path / "a.png", "--given", "sex=male",
                                     "--given", "pneumonia=negative", "--infer", "--set", "pneumonia=positive",
                                     "--steps", 2, "--out", tmp_path / "out")
    assert status == 0, errors
    assert "inferred view=" in output and "inferred sex" not in output and "to positive" in output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "difference.png", "edit.png", "original.png", "reconstruction.png", "sheet.png"]
    assert Image.open(tmp_path / "out/sheet.png").size[0] == 4 * 384 \
        and Image.open(tmp_path / "out/edit.png").text["Synthetic"] == "yes"
    status, _, errors = command("causal", "edit", tmp_path / "a.png", "--set", "pneumonia=positive", "--steps", 1,
                                "--out", tmp_path / "out")
    assert status == 2 and errors.endswith("out: not empty; name a new folder with --out\n")
    a, b = (pixels.load_image(tmp_path / f"out/{name}.png") for name in ("reconstruction", "edit"))
    shown = np.asarray(Image.open(tmp_path / "out/difference.png")).astype(int)
    brighter, darker = ((b - a)[0] > 0.05).numpy(), ((b - a)[0] < -0.05).numpy()
    assert (shown[brighter][:, 0] > shown[brighter][:, 2]).all() \
        and (shown[darker][:, 2] > shown[darker][:, 0]).all() and brighter.any()


def test_outside_a_mask_the_difference_picture_is_white(tmp_path, command):
    array = (phantom.draw(phantom.random_record(random.Random(0)), np.random.default_rng(0)) * 255).astype(np.uint8)
    side = 2 * DEMO_SIDE
    Image.fromarray(array).resize((side, side)).save(tmp_path / "a.png")
    mask = np.zeros((side, side), np.uint8)
    mask[side * 2 // 5:side * 3 // 5, side // 4:side * 3 // 4] = 255  # drawn on the original, twice as large as edited
    Image.fromarray(mask).save(tmp_path / "m.png")
    status, _, errors = command("causal", "edit", tmp_path / "a.png", "--set", "pneumonia=positive",
                                "--mask", tmp_path / "m.png", "--steps", 1, "--out", tmp_path / "out")
    assert status == 0, errors
    outside = mask[::2, ::2] == 0
    original, edited = (np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in ("original", "edit"))
    assert np.array_equal(original[outside], edited[outside]) and not np.array_equal(original, edited)
    assert (np.asarray(Image.open(tmp_path / "out/difference.png"))[outside] == 255).all()


def test_a_patients_dicom_file_comes_back_as_a_synthetic_one_that_names_nobody(tmp_path, command):
    rng = np.random.default_rng(0)
    array = (phantom.draw(phantom.random_record(random.Random(0)), rng) * 255).astype(np.uint8)
    image = torch.from_numpy(np.array(Image.fromarray(array).resize((128, 128)))).float()[None] / 127.5 - 1
    dicom.write(tmp_path / "a.dcm", image, {"age": 30.0}, "demo", 0)
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    ds.PatientName, ds.PatientID, ds.AccessionNumber, ds.InstitutionName = (
        "Doe^Jane", "MRN4711", "ACC4711", "St. Elsewhere")
    ds.save_as(tmp_path / "a.dcm")
    status, output, errors = command("causal", "edit", tmp_path / "a.dcm", "--sweep", "age=20:60:20", "--no-causal",
                                     "--steps", 2, "--dicom", "--out", tmp_path / "sweep")
    assert status == 0, errors
    strip = Image.open(tmp_path / "sweep/strip.png")                 # the original and three ages
    assert strip.size[0] == 4 * 384 and Image.open(tmp_path / "sweep/sweep.gif").n_frames == 3
    shown = np.asarray(strip.convert("L"))[-384:, :384].astype(float)
    prepared = Image.fromarray(pixels.read_radiograph(tmp_path / "a.dcm", DEMO_SIDE)).resize(
        (384, 384), Image.Resampling.BICUBIC)
    assert np.abs(shown - np.asarray(prepared)).max() <= 1
    files = [(tmp_path / f"sweep/age-{age}.dcm").read_bytes() for age in (20, 40, 60)]
    assert not any(word in file
                   for word in (b"Doe^Jane", b"MRN4711", b"ACC4711", b"Elsewhere", ds.SOPInstanceUID.encode())
                   for file in files)
    old = pydicom.dcmread(tmp_path / "sweep/age-60.dcm")
    assert old.PatientAge == "060Y" and old[0x0008, 0x001C].value == "YES" \
        and "would have it with age 60" in old.DerivationDescription


def test_the_error_of_an_inferred_age_is_the_measured_one():
    text = (ROOT / "benchmarks/results/fidelity-demo.txt").read_text()
    measured = float(re.search(r"^age \(years\) +\d+ +([\d.]+)", text, re.M)[1])
    assert measured == pytest.approx(edit.classifier.load(edit.classifier.DEMO).config.age_error, abs=0.05)


def test_many_images_are_edited_for_the_stress_test(phantoms, tmp_path, monkeypatch, command):
    """With a model that adds one to a pixel where a woman is asked for: the unchanged images come back, the edited ones
    differ there, and both folders are prepared sources."""
    class Painter(torch.nn.Module):
        config = SimpleNamespace(channels=1, grid=(32, 32), prediction="velocity", shift=1.0,
                                 datasets=(*fields.DATASETS, "phantom"),
                                covered={"sex": {"male": 1, "female": 1}, "age": [0, 100], "dataset": {"phantom": 2}})

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, age, codes):
            v = torch.zeros_like(x)
            v[codes[:, fields.CODED.index("sex")] == 1, :, 3, 3] = 1
            return v
    monkeypatch.setattr(sample, "load_weights", lambda folder: (Painter(), None))
    arguments = ["--from", "sex=male", "--set", "sex=female", "--split", "valid", "--n", 5, "--steps", 1, "--batch", 2]
    status, output, errors = command("causal", "edit-all", phantoms, *arguments, "--out", tmp_path / "out")
    assert status == 0, errors
    edited, unchanged = (data.Radiographs([tmp_path / "out" / name], None) for name in ("edited", "unchanged"))
    about = json.loads((tmp_path / "out/edits.json").read_text())
    assert about["change"] == {"sex": "female"} and about["conditions"] == {"sex": "male"} and len(edited) == 5
    assert {r["sex"] for r in edited.records} == {"female"} and {r["sex"] for r in unchanged.records} == {"male"}
    for i, name in enumerate(about["names"]):
        assert torch.equal(unchanged[i], pixels.load_image(phantoms / "images" / name))
        where = (edited[i] != unchanged[i]).nonzero().tolist()
        assert where == [[0, 3, 3]]
    made = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "out/edited/images/00004.png").unlink()              # as if killed before the last image
    (tmp_path / "out/edited/index.csv").unlink()
    with pytest.raises(cli.InputError, match="unfinished; the same python -m causal edit-all continues"):
        stress.read_edits(tmp_path / "out")
    with cli.locked(tmp_path / "out"):
        status, _, errors = command("causal", "edit-all", phantoms, *arguments, "--out", tmp_path / "out")
        assert status == 2 and "another command is filling this folder" in errors
    status, output, errors = command("causal", "edit-all", phantoms, *arguments, "--out", tmp_path / "out")
    assert status == 0, errors
    assert made == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled/sample.json").touch()
    for more, out, message in ((["--steps", 2], "out", "edits of another command, with other steps"),
                               (["--batch", 3], "out", "with other batch"), (["--n", 4], "out", "with other names"),
                               ([], "filled", "not empty; name a new folder")):
        status, _, errors = command("causal", "edit-all", phantoms, *arguments, *more, "--out", tmp_path / out)
        assert status == 2 and message in errors and len(errors.splitlines()) == 1
    assert made == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for arguments, message in ((["--set", "sex=unknown"], "unknown is not a value"),
                               (["--from", "age=200", "--set", "sex=male"], "age"),
                               (["--from", "sex=male", "--set", "sex=male"], "no image of the split valid has")):
        status, _, errors = command("causal", "edit-all", phantoms, "--split", "valid", *arguments,
                                    "--out", tmp_path / "no")
        assert status == 2 and message in errors and not (tmp_path / "no").exists()
