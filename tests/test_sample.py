import csv
import json
import shutil
import sys
import threading
import weakref

import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO_SIDE, ROOT
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import flow
import radit
import sample
import vae
from common import cli, hub
from radiographs import fields, pixels
from radiographs.index import read_index

DEMO = ROOT / "weights/demo"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small VAE and RadiT with random weights, as sample.py loads them."""
    folder = tmp_path_factory.mktemp("weights") / "random"
    torch.manual_seed(0)
    hub.save_model(vae.RadVAE(vae.VAEConfig(1, 2, (8, 8), 1, 4)), folder / "vae")
    covered = {"sex": {"female": 5, "male": 4}, "view": {"PA": 9}, "pneumonia": {"positive": 2}, "dataset": {"own": 9},
               "age": [20, 80]}
    config = radit.RadiTConfig(channels=8, grid=(8, 8), width=128, depth=2, heads=2, datasets=(*fields.DATASETS, "own"),
                               covered=covered, examples=[{"age": 30.0, "sex": "male"}, {"view": "PA"}], shift=2.0,
                               vae=hub.fingerprint(folder / "vae"))
    model = radit.RadiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hub.save_model(model, folder / "radit")
    return folder


def test_a_seed_gives_one_image_at_any_batch_size_and_position(weights):
    model, decoder = sample.load_weights(weights)
    records = [{"age": 20.0 + i, "sex": "female"} for i in range(7)]
    seeds = [3, 1, 4, 159, 26, 5, 35]
    together, evaluations = sample.generate(model, decoder, records, seeds, steps=4, solver="euler", batch=7,
                                            bf16=False)
    assert evaluations == 4 and together.shape == (7, 1, 32, 32)
    for batch in (1, 3):
        apart, _ = sample.generate(model, decoder, records, seeds, steps=4, solver="euler", batch=batch, bf16=False)
        assert torch.allclose(apart, together, atol=1e-4)
    backwards, _ = sample.generate(model, decoder, records[::-1], seeds[::-1], steps=4, solver="euler", batch=2,
                                   bf16=False)
    assert torch.allclose(backwards.flip(0), together, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01
    assert sample.generate(model, decoder, records, seeds, steps=4)[1] == 8  # the default, Heun, takes two a step


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("interval", [(0, 1), (0.1, 0.8), (0.999, 0.9999)])
def test_an_image_costs_the_passes_that_are_reported(weights, solver, interval):
    model, decoder = sample.load_weights(weights)
    ran = []
    model.register_forward_hook(lambda module, inputs, output: ran.append(len(output)))
    requests = [{"sex": "male"}] * 5, list(range(5))
    images, _ = sample.generate(model, decoder, *requests, steps=7, guidance=3.0, solver=solver, batch=2,
                                interval=interval)
    assert sum(ran) == 5 * flow.count_network_calls(flow.time_grid(7, 2.0), solver, 3.0, interval)
    unguided, _ = sample.generate(model, decoder, *requests, steps=7, guidance=1.0, solver=solver, batch=2)
    assert torch.equal(images, unguided) == (interval[0] == 0.999)   # no step lies there


def test_bfloat16_gives_nearly_the_same_image(weights):
    model, decoder = sample.load_weights(weights)
    exact, rounded = (sample.generate(model, decoder, [{}] * 3, [0, 1, 2], steps=4, bf16=bf16)[0]
                      for bf16 in (False, True))
    assert exact.dtype == rounded.dtype == torch.float32
    difference = (exact - rounded).square().mean().sqrt()
    assert 1e-4 < difference < 0.05 * exact.std()                    # bfloat16 keeps 8 bits; not the same, but near


class Peak(TorchDispatchMode):
    """The most bytes that what is computed inside it holds at one time."""
    def __init__(self, model):
        super().__init__()
        self.most, self.live = 0, {}                                 # storage -> bytes
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage._cdata in self.weights:
                continue
            if storage._cdata not in self.live:                      # no view of another tensor
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return result


def test_the_batch_that_fits_is_estimated_from_what_a_forward_pass_holds(monkeypatch):
    """768 tokens: attention is fused, as on a GPU."""
    cfg = radit.RadiTConfig(channels=4, grid=(24, 32), width=128, depth=2, heads=2)
    model = radit.RadiT(cfg).eval().requires_grad_(False)
    with Peak(model) as peak:
        model(torch.randn(4, 4, 24, 32), torch.rand(4), torch.full((4,), 50.0), torch.ones(4, 18, dtype=torch.long))
    gpu, memory = torch.device("cuda"), 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    for batch in (1, 2, 8, 64):
        memory = 2 * batch * 2 * peak.most / 4                       # half of it holds two branches of `batch` images
        assert sample.fitting_batch(cfg, gpu) in (batch, max(batch // 2, 1))
    memory = 0
    assert sample.fitting_batch(cfg, gpu) == 1
    memory = 1e15
    assert sample.fitting_batch(cfg, gpu) == 64
    assert sample.fitting_batch(cfg, torch.device("cpu")) == sample.fitting_batch(cfg, torch.device("mps")) == 16


def test_the_command_writes_pictures_table_and_provenance(weights, tmp_path, command):
    status, output, errors = command("sample.py", "--weights", weights, "--n", 3, "--steps", 2, "--seed", 40,
                                     "--age", 44, "--sex", "F", "--set", "pneumonia=positive",
                                     "--out", tmp_path / "out")
    assert status == 0, errors
    assert "4/4" in errors and "3 images" in output                  # the progress bar, and the summary
    rows = list(csv.DictReader(open(tmp_path / "out/metadata.csv")))
    assert [(r["file"], r["seed"]) for r in rows] == [(f"images/000{i}.png", str(40 + i)) for i in range(3)]
    asked = {k: v for k, v in rows[0].items() if v and k not in ("file", "seed")}
    assert asked == {"age": "44.0", "sex": "female", "pneumonia": "positive"}
    image = Image.open(tmp_path / "out/images/0001.png")
    assert image.mode == "L" and image.size == (32, 32)
    assert image.text["Synthetic"] == "yes" and image.text["Seed"] == "41" and image.text["Weights"] == "random"
    assert json.loads(image.text["Metadata"]) == {"age": 44.0, "sex": "female", "pneumonia": "positive"}
    assert image.text["Fingerprint"] == hub.fingerprint(weights / "radit") and image.text["Guidance"] == "3.0"
    assert image.text["Steps"] == "2" and image.text["Solver"] == "heun"
    assert Image.open(tmp_path / "out/grid.png").size == (64, 64)


def test_with_nothing_asked_each_image_takes_an_example(weights, tmp_path, command):
    assert command("sample.py", "--weights", weights, "--n", 3, "--steps", 1, "--out", tmp_path)[0] == 0
    rows = list(csv.DictReader(open(tmp_path / "metadata.csv")))
    assert [r["age"] for r in rows] == ["30.0", "", "30.0"] and [r["view"] for r in rows] == ["", "PA", ""]


def test_a_table_is_sampled_row_by_row_and_the_folder_is_a_prepared_source(weights, tmp_path, command):
    cli.write_csv(tmp_path / "table.csv", ["age", "sex"], [[31, "male"], [32, "female"], [33, "male"]])
    status, output, errors = command("sample.py", "--weights", weights, "--metadata", tmp_path / "table.csv",
                                     "--steps", 1, "--view", "PA", "--out", tmp_path / "out")
    assert status == 0, errors
    found = read_index(tmp_path / "out")
    assert [(r["age"], r["sex"]) for r in found] == [(31, "male"), (32, "female"), (33, "male")]
    assert all(r["view"] == "PA" and r["split"] == "train" for r in found)
    assert len(data.Radiographs([tmp_path / "out"], "train")) == 3 and len({r["patient"] for r in found}) == 3


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "-1"], "--steps: '-1' is not a whole number from 1 to 1,000"),
    (["--n", "0"], "'0' is not a whole number"),
    (["--n", "99999999999999999999"], "from 1 to 1,000,000"), (["--batch", "99999999999999999999"], "from 1 to 4,096"),
    (["--seed", "-1"], "--seed: '-1' is not a whole number from 0"), (["--seed", str(2 ** 63)], "not a whole number"),
    (["--steps", "many"], "--steps: 'many' is not a whole number"), (["--solver", "rk4"], "'euler', 'heun'"),
    (["--guidance", "nan"], "--guidance: 'nan' is not a number from 0 to 100"),
    (["--guidance", "1e38"], "from 0 to 100"), (["--guidance=-1"], "'-1' is not a number from 0 to 100"),
    (["--guidance", "1", "--guidance-interval", "0", ".5"], "--guidance 1 is off"),
    (["--sex", ""], "--sex is empty"), (["--out", ""], "an empty path"), (["--set", "sex="], "no value for sex"),
    (["--set", ""], "not of the form FIELD=VALUE"), (["--sex", "male", "--set", "sex=female"], "sex is given twice"),
    (["--metadata", ""], "no such file"),
    (["--set", "colour=red"], "unknown field 'colour'; the fields are dataset, age"),
    (["--set", "pneumonia"], "not of the form FIELD=VALUE"),
    (["--view", "oblique"], "unknown value 'oblique' for view; accepted: AP, PA, LATERAL"),
    (["--dataset", "elsewhere"], "accepted: MIMIC-CXR"),
    (["--view", "LATERAL"], "view=LATERAL was not covered by the training data of these weights; covered: PA"),
    (["--race", "white"], "says nothing of race"), (["--age", "90"], "age 90 was not covered"),
    (["--weights", "nowhere"], "nowhere: no such folder here"),
    (["--out", "file/out"], "file/out: a file is in the place of this folder"),
    (["--weights", ""], "no radit/ in it"), (["--out", "file"], "file: a file is in the place of this folder; name a "),
    (["--weights", "{weights}/radit"], "no radit/ in it; name {weights}, which holds it"),
    (["--weights", "{weights}/radlt"], "radlt: no such folder here"),
    (["--metadata", "file"], "accepted is a CSV with the columns of a metadata.csv"),
    (["--dataset", "nih"], "accepted: MIMIC-CXR"), (["--dataset", "nih"], "source nih is the data set ChestX-ray14")])
def test_bad_input_is_one_line_and_nothing_is_written(weights, tmp_path, command, arguments, message):
    (tmp_path / "file").write_text("a file, where the output should go\n\nand no table\n")
    arguments, message = [text.format(weights=weights) for text in arguments], message.format(weights=weights)
    status, _, errors = command("sample.py", "--weights", weights, "--n", 1, "--steps", 1, *arguments, cwd=tmp_path)
    assert status == 2 and message in errors.splitlines()[-1]
    assert len(errors.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_broken_weights_are_refused(weights, tmp_path, command):
    def attempt():
        status, _, errors = command("sample.py", "--weights", tmp_path / "w", "--n", 1, "--steps", 1,
                                    "--out", tmp_path / "out")
        assert status == 2 and len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()
        return errors

    shutil.copytree(weights, tmp_path / "w")
    file = tmp_path / "w/radit/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in attempt()
    file.unlink()
    assert "no model.safetensors" in attempt()
    shutil.copy(weights / "radit/model.safetensors", file)
    torch.manual_seed(1)
    hub.save_model(vae.RadVAE(vae.VAEConfig(1, 2, (8, 8), 1, 4)), tmp_path / "w/vae")
    assert "is not the VAE whose latents" in attempt()


def test_weights_that_do_not_fit_together_are_refused(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "w")
    config = json.loads((tmp_path / "w/radit/config.json").read_text())
    (tmp_path / "w/radit/config.json").write_text(json.dumps(config | {"vae": ""}))
    with pytest.raises(cli.InputError, match="made for 8 channels but names no VAE"):
        sample.load_weights(tmp_path / "w")


def test_an_image_that_is_not_finite_is_an_error_that_names_its_seed(weights):
    model, decoder = sample.load_weights(weights)
    decoder.decode = lambda x: torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, x[:, :1])
    with pytest.raises(cli.RunError, match="the image of seed 7 is not finite: guidance 3 is too strong, or "):
        sample.generate(model, decoder, [{}] * 3, [6, 7, 8], steps=1, guidance=3.0)


def test_without_a_folder_each_command_gets_a_new_one(weights, tmp_path, command):
    for number, n in ((1, 1), (2, 2)):
        status, output, _ = command("sample.py", "--weights", weights, "--n", n, "--steps", 1, cwd=tmp_path)
        assert status == 0 and f"{cli.count(n, 'image')} in out/sample-{number}," in output
        assert len(list((tmp_path / f"out/sample-{number}/images").iterdir())) == n


def test_unknown_can_be_asked_for(weights, tmp_path, monkeypatch):
    row, = main(monkeypatch, weights, tmp_path / "a", "--n", 1, "--view", "unknown")
    assert not any(value for field, value in row.items() if field not in ("file", "seed"))


def test_options_that_do_not_go_together(weights, tmp_path, monkeypatch):
    cli.write_csv(tmp_path / "table.csv", ["age"], [[30], [40]])
    with pytest.raises(cli.InputError, match="--n 3: .*table.csv has 2 rows"):
        main(monkeypatch, weights, tmp_path / "a", "--metadata", tmp_path / "table.csv", "--n", 3)
    with cli.locked(tmp_path / "busy"), pytest.raises(cli.InputError, match="another command is filling this folder"):
        main(monkeypatch, weights, tmp_path / "busy", "--n", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--weights", str(weights)])
    with pytest.raises(cli.InputError, match="--out is needed"):
        sample.main()
    assert not (tmp_path / "a").exists() and not list((tmp_path / "busy").iterdir())


def test_each_tile_of_the_grid_says_what_was_asked():
    assert sample.caption({"dataset": "own", "age": 60.0, "sex": "female", "view": "PA", "pneumonia": "negative",
                           "edema": "positive", "pleural_effusion": "positive"}) == (
        "own, 60 years, female, PA, edema, pleural effusion")
    assert sample.caption({}) == "nothing asked"
    images = torch.rand(3, 1, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = ["60 years, female, PA, " + "enlarged cardiomediastinum, " * 3, "AP", "AP"]
    plain, captioned = pixels.grid(images), pixels.grid(images, captions=texts)
    assert captioned.shape[2] == plain.shape[2] and captioned.shape[1] > plain.shape[1]
    height = captioned.shape[1] // 2                                 # of a tile with its caption
    assert torch.equal(captioned[:, :128], plain[:, :128])
    assert torch.equal(captioned[:, height:height + 128, :128], images[2])
    strips = captioned[0, 128:height, :128], captioned[0, 128:height, 128:], captioned[0, height + 128:, :128]
    assert all((strip > 0).any() for strip in strips)
    assert torch.equal(strips[1], strips[2]) and (strips[0] > 0).sum() > 5 * (strips[1] > 0).sum()
    assert pixels.grid(images[..., :64, :64], captions=texts).shape == (1, 128, 128)  # too narrow for words


def test_only_covered_values_pass():
    covered = {"sex": {"male": 3}, "age": [20, 80]}
    assert fields.why_not_covered("sex", "male", covered) is None
    assert fields.why_not_covered("age", 80.0, covered) is None
    assert "sex=female was not covered" in fields.why_not_covered("sex", "female", covered)
    assert "age 19 was not covered" in fields.why_not_covered("age", 19.0, covered)
    assert "says nothing of view" in fields.why_not_covered("view", "PA", covered)


# --- cohorts: long runs ---------------------------------------------------------------------------------

SETTINGS = {"weights": "random", "fingerprint": "f" * 16, "steps": 2, "solver": "euler", "guidance": 2.0,
       "interval": [0, 1], "precision": "float32"}
RECORDS, SEEDS = [{"age": 20.0 + i} for i in range(10)], list(range(5, 15))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_run_continues_to_the_same_bytes(weights, tmp_path, monkeypatch):
    model, decoder = sample.load_weights(weights)
    assert sample.sample_folder(tmp_path / "a", model, decoder, RECORDS, SEEDS, SETTINGS, 4, as_dicom=True) == (10, 2)
    expected = contents(tmp_path / "a")
    assert {"images/0009.png", "dicom/0009.dcm", "index.csv", "metadata.csv", "grid.png"} < set(expected)
    assert len(expected) == 24
    generate, calls = sample.generate, []

    def stopped(*arguments, **options):
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(sample, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample.sample_folder(tmp_path / "b", model, decoder, RECORDS, SEEDS, SETTINGS, 4, as_dicom=True)
    assert len(list((tmp_path / "b/images").iterdir())) == 4 and not (tmp_path / "b/index.csv").exists()
    (tmp_path / "b/images/0002.png").unlink()                        # stopped in the midst of a batch
    assert sample.sample_folder(tmp_path / "b", model, decoder, RECORDS, SEEDS, SETTINGS, 4, as_dicom=True) == (7, 2)
    assert calls[2:] == [SEEDS[:4], SEEDS[4:8], SEEDS[8:]]           # whole batches, at the same places
    assert contents(tmp_path / "b") == expected
    again = sample.sample_folder(tmp_path / "b", model, decoder, RECORDS, SEEDS, SETTINGS, 4, as_dicom=True)
    assert again == (0, 2) and len(calls) == 5


def test_two_processes_give_the_images_of_one(weights, tmp_path):
    """As torchrun would start them, each with its rank; the second starts first and waits for the first."""
    models = [sample.load_weights(weights) for _ in range(2)]
    sample.sample_folder(tmp_path / "one", *models[0], RECORDS, SEEDS, SETTINGS, 3)
    arguments = (tmp_path / "two", *models[1], RECORDS, SEEDS, SETTINGS, 3, False, 1, 2)
    second = threading.Thread(target=sample.sample_folder, args=arguments)
    second.start()
    sample.sample_folder(tmp_path / "two", *models[0], RECORDS, SEEDS, SETTINGS, 3, False, 0, 2)
    second.join()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_pictures_of_another_command_are_never_mixed_in(weights, tmp_path):
    model, decoder = sample.load_weights(weights)
    sample.sample_folder(tmp_path / "a", model, decoder, RECORDS, SEEDS, SETTINGS)
    before = contents(tmp_path / "a")
    for records, seeds, settings, key in ((RECORDS[:5], SEEDS[:5], SETTINGS, "images = 10, not 5"),
                                          (RECORDS[::-1], SEEDS, SETTINGS, "other metadata or seeds"),
                                          (RECORDS, SEEDS, SETTINGS | {"steps": 3}, "steps = 2, not 3")):
        with pytest.raises(cli.InputError, match=key):
            sample.sample_folder(tmp_path / "a", model, decoder, records, seeds, settings)
    assert contents(tmp_path / "a") == before
    (tmp_path / "a/sample.json").unlink()
    with pytest.raises(cli.InputError, match="images that this command did not write"):
        sample.sample_folder(tmp_path / "a", model, decoder, RECORDS, SEEDS, SETTINGS)


def main(monkeypatch, weights, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--weights", str(weights), "--steps", "1", "--out", str(out),
                                      *map(str, arguments)])
    sample.main()
    return list(csv.DictReader(open(out / "metadata.csv")))


def test_a_sample_s_own_table_draws_the_same_sample(weights, tmp_path, monkeypatch):
    rows = main(monkeypatch, weights, tmp_path / "a", "--n", 5, "--seed", 9)
    assert main(monkeypatch, weights, tmp_path / "b", "--metadata", tmp_path / "a/metadata.csv") == rows
    for name in ("images/0000.png", "images/0004.png", "index.csv", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(main(monkeypatch, weights, tmp_path / "c", "--metadata", tmp_path / "a/index.csv", "--n", 3)) == 3


def test_wishes_that_contradict_each_other_go_through_the_label_policy(tmp_path, monkeypatch):
    covered = {field: {"negative": 1, "positive": 1} for field in ("no_finding", "pneumonia")}
    config = radit.RadiTConfig(covered=covered)
    note = "no_finding=positive contradicts pneumonia=positive, so no_finding becomes negative"
    (tmp_path / "t.csv").write_text("seed,pneumonia\n7,positive\n")
    for more, n in ((["--set", "pneumonia=positive", "--n", "2"], 2), (["--metadata", str(tmp_path / "t.csv")], 1)):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--set", "no_finding=positive", *more])
        records, _, notes = sample.requested_images(sample.parse_arguments(), config)
        assert records == [{"no_finding": "negative", "pneumonia": "positive"}] * n and note in notes


def test_what_was_never_trained_together_is_said(monkeypatch):
    """Kermany's images are of children, and say no age."""
    model = hub.load_model(radit.RadiT, radit.RadiTConfig, sample.DEMO / "radit")
    for more, notes in ((["--age", "60"], ["3 images: no training image had dataset=kermany and age=60-79 together"]),
                        (["--view", "AP"], [])):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--n", "3", "--dataset", "kermany", *more])
        assert sample.requested_images(sample.parse_arguments(), model.config)[2] == notes


def test_what_decides_a_picture_is_said(weights, tmp_path, monkeypatch, capsys):
    main(monkeypatch, weights, tmp_path / "a", "--n", 2, "--steps", 4, "--solver", "euler",
         "--guidance-interval", 0.1, 0.8, "--bf16")
    # shift 2 takes 0, 1/4, 1/2, 3/4 to 0, 1/7, 1/3, 3/5: three of four are guided
    assert "4 velocity evaluations and 7 network calls each" in capsys.readouterr().out
    text = Image.open(tmp_path / "a/images/0001.png").text
    assert text["Interval"] == "[0.1, 0.8]" and text["Precision"] == "bfloat16" and text["Steps"] == "4"
    with pytest.raises(cli.InputError, match="precision = bfloat16, not float32"):
        main(monkeypatch, weights, tmp_path / "a", "--n", 2, "--steps", 4, "--solver", "euler",
             "--guidance-interval", 0.1, 0.8, "--no-bf16")
    message = "--guidance-interval .*: not two times from 0 to 1, the lower one first"
    with pytest.raises(cli.InputError, match=message):
        main(monkeypatch, weights, tmp_path / "b", "--guidance-interval", 0.8, 0.1)
    capsys.readouterr()
    for interval in (("nan", 1), (0, 1.5), ("١", 1)):
        with pytest.raises(SystemExit):
            main(monkeypatch, weights, tmp_path / "b", "--guidance-interval", *interval)
        assert "is not a number from 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_dicom_files_lie_beside_the_pngs(weights, tmp_path, monkeypatch):
    main(monkeypatch, weights, tmp_path / "a", "--n", 2, "--age", 44, "--sex", "male", "--view", "PA", "--dicom")
    ds = pydicom.dcmread(tmp_path / "a/dicom/0001.dcm")
    assert (ds.PatientSex, ds.ViewPosition, int(ds.PatientAge[:3])) == ("M", "PA", 44)
    assert np.array_equal(ds.pixel_array, np.asarray(Image.open(tmp_path / "a/images/0001.png")))
    assert hub.fingerprint(weights / "radit") in ds.DerivationDescription and "steps 1" in ds.DerivationDescription


# --- the embedded weights -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo():
    return sample.load_weights(DEMO)


def test_demo_weights_fit_in_60_megabytes_and_say_what_they_cover():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 60e6
    config = json.loads((DEMO / "radit/config.json").read_text())
    assert config["covered"]["view"].keys() == {"AP", "PA"} and config["grid"] == [16, 16]
    assert len(config["examples"]) == 64


def test_demo_draws_chests_not_noise(demo):
    """Lungs are darker than what is between and below them, left and right alike, and no two pictures are alike."""
    model, decoder = demo
    records = [{"dataset": "ChestX-ray14", "view": "PA"}] * 8
    images, _ = sample.generate(model, decoder, records, range(8), steps=8)
    assert images.shape[2:] == (DEMO_SIDE, DEMO_SIDE)
    mean = F.adaptive_avg_pool2d(images.mean(0), 128)[0]
    right, left = mean[40:70, 30:50].mean(), mean[40:70, 80:100].mean()
    middle, below = mean[50:80, 60:70].mean(), mean[95:115, 45:85].mean()
    assert max(left, right) < min(middle, below) - 0.2
    flat = images.flatten(1)
    distances = torch.cdist(flat, flat) / DEMO_SIDE + 1e9 * torch.eye(8)  # root mean square
    assert distances.min() > 0.08
    grain = (images[..., 1:] - images[..., :-1]).abs().mean()        # noise would be near 1
    assert grain < 0.1


@pytest.mark.parametrize("field, values", [("view", ("AP", "PA")), ("age", (20.0, 70.0)), ("sex", ("female", "male"))])
def test_demo_metadata_steers_and_the_seed_holds(demo, field, values):
    """Two values of one field change the picture, and less than another seed does."""
    model, decoder = demo
    records = [[{"dataset": "ChestX-ray14", field: value}] * 4 for value in values]
    a, b = (sample.generate(model, decoder, asked, range(4), steps=5)[0] for asked in records)
    changed = (a - b).square().mean((1, 2, 3)).sqrt().mean()
    other_seed = (a - a.roll(1, 0)).square().mean((1, 2, 3)).sqrt().mean()
    assert 0.01 < changed < 0.8 * other_seed


def test_demo_knows_its_data_sets(demo):
    """Most radiographs of children with pneumonia are wider than high, so prepared they lie between black bands;
    ChestX-ray14's are square."""
    model, decoder = demo
    asked = {"dataset": "kermany", "pneumonia": "positive"}, {"dataset": "ChestX-ray14"}
    images = [sample.generate(model, decoder, [record] * 5, range(5), steps=5)[0] for record in asked]
    # The share of black in the top rows.
    children, adults = ((part[:, :, :DEMO_SIDE // 16] < -0.8).float().mean() for part in images)
    assert children > adults + 0.25


def test_demo_vae_reconstructs():
    """A smooth phantom in the embedded VAE: what comes out is what went in, to 20 dB."""
    decoder = sample.load_weights(DEMO)[1]
    y, x = np.mgrid[0:DEMO_SIDE, 0:DEMO_SIDE] / (DEMO_SIDE - 1) - 0.5
    image = np.where(np.abs(x) < 0.4, 0.5, -1.0)
    for side in (-1, 1):
        image = np.where(((x - side * 0.2) / 0.15) ** 2 + ((y + 0.05) / 0.3) ** 2 < 1, -0.6, image)
    image = torch.from_numpy(image).float()[None, None]
    assert vae.psnr(image, decoder.decode(decoder.encode(image)[0])).item() > 20
