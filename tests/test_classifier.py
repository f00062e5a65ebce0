"""The diagnostic model: its measures beside scikit-learn, unknown labels, and what it learns of images whose truth is known."""
import json
import math

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
import torch
from PIL import Image

import train
from common import cli, hub
from diagnosis import classifier
from encoders.raddino import Encoder, EncoderConfig, load_encoder
from radiographs import fields
from radiographs.index import COLUMNS, index_row, read_index, stable_split

SMALL = EncoderConfig(width=64, depth=2, heads=1, patch=8, image_size=32, channels=1)


def write_source(root, count, seed, unknown=0.0, split=None):
    """Pictures that show what their row says: a bright left half is an effusion, a bright bottom is a man, brightness is
    age. A share of the labels is unknown."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        effusion, male, age = rng.random() < 0.4, rng.random() < 0.5, rng.uniform(20, 80)
        picture = rng.normal(60 + age, 10, (32, 32))
        picture[8:16, :16] += 60 * effusion
        picture[20:] += 50 * male
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / f"images/{i}.png")
        record = {"path": f"images/{i}.png", "patient": f"{seed}-{i // 2}", "dataset": "own", "age": age, "sex": "male" if male else "female",
                  "pleural_effusion": "positive" if effusion else "negative"}
        record = {k: v for k, v in record.items() if k in ("path", "patient", "dataset") or rng.random() >= unknown}
        records.append(record | {"split": split or stable_split(record["patient"], 0.2, 0.2)})
    cli.write_csv(root / "index.csv", COLUMNS, map(index_row, records))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "own", 240, 0, unknown=0.2)


@pytest.fixture(scope="module")
def fitted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    cfg = train.TrainConfig(images=4096, cooldown=1024, batch=16, lr=2e-3, warmup=256, ema=(1000,), save_every=1000)
    classifier.fit([source], out, cfg, config=SMALL)
    return out / "weights/classifier"


def test_auroc_beside_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(5):
        positive, scores = rng.random(50) < 0.3, rng.integers(0, 8, 50) / 8  # with ties
        assert classifier.auroc(scores, positive) == pytest.approx(sklearn.metrics.roc_auc_score(positive, scores), abs=1e-12)
    assert math.isnan(classifier.auroc(scores, np.ones(50, bool)))


def test_calibration_error_beside_scikit_learn():
    rng = np.random.default_rng(0)
    probability = rng.random(2000)
    positive = rng.random(2000) < probability ** 2
    share, mean = sklearn.calibration.calibration_curve(positive, probability, n_bins=10)
    counts = np.histogram(probability, 10, (0, 1))[0]
    assert classifier.calibration_error(probability, positive) == pytest.approx((counts * np.abs(share - mean)).sum() / 2000, abs=1e-12)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Scores of positives are shifted by 1: the true AUROC is Phi(1 / sqrt 2). Four images a patient, nearly alike, so that
    an interval over images would be half as wide and far too sure."""
    truth, held, count = 0.5 * (1 + math.erf(0.5)), 0, 120
    for seed in range(count):
        rng = np.random.default_rng(seed)
        patients = np.repeat(np.arange(60), 4)
        positive = np.repeat(np.arange(60) % 2 == 0, 4)
        scores = np.repeat(rng.normal(0, 1, 60), 4) + positive + rng.normal(0, 1e-3, 240)
        low, high = classifier.interval(lambda i: classifier.auroc(scores[i], positive[i]), patients, repeats=200, seed=seed)
        held += low <= truth <= high
    assert 0.88 <= held / count <= 0.99                              # 95 %, within three standard errors of the share


def test_unknown_labels_give_no_gradient():
    torch.manual_seed(0)
    model = classifier.Classifier(classifier.ClassifierConfig(SMALL, ("own",), {}))
    images = torch.randn(3, 1, 32, 32)
    age, codes = fields.encode_metadata([{"sex": "male"}, {}, {}])
    age_loss, entropy = classifier.ClassifierTask.terms(model, images, age, codes)
    assert age_loss == 0
    logits = model(images)[1][fields.CODED.index("sex")]
    assert entropy.item() == pytest.approx(-logits[0].log_softmax(0)[1].item() / 3, rel=1e-5)
    entropy.backward()
    first = 1 + sum(len(model.values[f]) for f in fields.CODED[:fields.CODED.index("sex")])
    known = model.head.weight.grad.abs().sum(1) > 0
    assert known[first:first + 2].all() and known.sum() == 2


def test_it_learns_what_the_pictures_show(fitted, source, command, tmp_path):
    status, output, errors = command("diagnosis", "evaluate", source, "--model", fitted, "--json", tmp_path / "r.json")
    assert status == 0, errors
    rows = {(r["field"], r["value"]): r for r in json.loads((tmp_path / "r.json").read_text())["evaluate"]}
    assert set(rows) == {("pleural_effusion", "positive"), ("sex", "male"), ("sex", "(any)"), ("age", "(years)")}
    for key in (("pleural_effusion", "positive"), ("sex", "male")):
        assert rows[key]["auroc"] > 0.9 and rows[key]["interval"][0] <= rows[key]["auroc"] <= rows[key]["interval"][1]
    assert rows["age", "(years)"]["mae"] < 10                        # 15 by guessing the middle
    test = [r for r in read_index(source) if r["split"] == "test"]
    assert rows["sex", "male"]["n"] == sum("sex" in r for r in test) < len(test)


def test_temperatures_make_the_held_out_answers_likeliest(fitted, source):
    """A third of the held-out labels is wrong, so that a sure model is too sure."""
    model = hub.load_model(classifier.Classifier, classifier.ClassifierConfig, fitted)
    held_out, column = classifier.Labelled([source], "valid", model.config.datasets), fields.CODED.index("pleural_effusion")
    code = held_out.codes[:, column]
    code[::3] = torch.where(code[::3] > 0, 3 - code[::3], 0)
    code = code.numpy()

    def likelihood():
        p = classifier.predict(model, held_out)[1]["pleural_effusion"]
        return np.log(p[code > 0, code[code > 0] - 1]).mean()

    before, sure = likelihood(), model.temperature[column].item()
    classifier.calibrate(model, held_out)
    calibrated, temperature = likelihood(), model.temperature[column].item()
    assert temperature > sure and calibrated > before
    for factor in (0.8, 1.25):
        model.temperature[column] = temperature * factor
        assert likelihood() < calibrated


def test_robustness_finds_the_subgroup_where_it_breaks(fitted, tmp_path, command):
    """Women's pictures are exchanged among them: on women the model does no better than chance, and says so."""
    root = write_source(tmp_path / "other", 160, 1, split="test")
    women = [root / r["path"] for r in read_index(root) if r["sex"] == "female"]
    pictures = [path.read_bytes() for path in women]
    for path, picture in zip(women, pictures[1:] + pictures[:1]):
        path.write_bytes(picture)
    status, output, errors = command("diagnosis", "robustness", root, "--model", fitted, "--by", "sex", "--json", tmp_path / "r.json")
    assert status == 0, errors
    table = json.loads((tmp_path / "r.json").read_text())
    effusion = {group: next(r for r in rows if r["field"] == "pleural_effusion") for group, rows in table.items()}
    assert set(table) == {"all", "sex=female", "sex=male"}
    assert effusion["sex=female"]["n"] + effusion["sex=male"]["n"] == effusion["all"]["n"] == 160
    assert effusion["sex=female"]["worse"] and not effusion["sex=male"]["worse"]
    assert "sex=female: pleural_effusion positive is worse here than over all images" in output


def test_utility_tells_useful_synthetic_data_from_useless(source, tmp_path, command):
    useful = write_source(tmp_path / "useful", 120, 2, split="train")
    status, output, errors = command("diagnosis", "utility", source, "--synthetic", useful, "--out", tmp_path / "u", "--images", 2048, "--lr",
                                     2e-3, "--width", 64, "--depth", 1, "--json", tmp_path / "u.json")
    assert status == 0, errors
    table = json.loads((tmp_path / "u.json").read_text())
    sex = {regime: next(r for r in rows if r["field"] == "sex" and "auroc" in r) for regime, rows in table.items()}
    assert list(table) == ["real", "synthetic", "both"] and len({r["n"] for r in sex.values()}) == 1
    assert sex["synthetic"]["auroc"] > 0.8


def test_an_encoder_can_be_the_start(fitted, source, tmp_path):
    encoder = load_encoder(fitted)
    cfg = train.TrainConfig(images=16, batch=16, lr=0.0, warmup=0, ema=(1,), save_every=1)
    model = classifier.fit([source], tmp_path / "run", cfg, encoder=encoder)
    for a, b in zip(model.encoder.state_dict().values(), encoder.state_dict().values()):
        torch.testing.assert_close(a, b)
    assert isinstance(model.encoder, Encoder) and not torch.equal(model.head.weight, torch.zeros(1))


@pytest.mark.parametrize("arguments, message", [
    (["--width", "100"], "--width 100 is not a multiple of 64"), (["--patch", "7"], "--patch 7 does not divide 32 pixels"),
    (["--encoder", "nowhere"], "nowhere")])
def test_bad_arguments(source, tmp_path, command, arguments, message):
    status, _, errors = command("diagnosis", "fit", source, "--out", tmp_path / "out", *arguments)
    assert status == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors
