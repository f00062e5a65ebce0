"""The diagnostic model: its measures beside scikit-learn, unknown labels, and what it learns of images whose truth is
known."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import data
from common import cli, hub
from diagnosis import classifier
from diagnosis.resnet import ResNetConfig
from encoders.raddino import Encoder, EncoderConfig, load_encoder
from radiographs import fields
from radiographs.index import COLUMNS, index_row, read_index, stable_split
from training.options import TrainConfig

SMALL = EncoderConfig(width=64, depth=2, heads=1, patch=8, image_size=32, channels=1)


def write_source(root, count, seed, unknown=0.0, split=None):
    """Pictures that show what their row says: a bright left half is an effusion, a bright bottom is a man, brightness
    is age. A share of the labels is unknown."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        effusion, male, age = rng.random() < 0.4, rng.random() < 0.5, rng.uniform(20, 80)
        picture = rng.normal(60 + age, 10, (32, 32))
        picture[8:16, :16] += 60 * effusion
        picture[20:] += 50 * male
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / f"images/{i}.png")
        record = {"path": f"images/{i}.png", "patient": f"{seed}-{i // 2}", "dataset": "own", "age": age,
                  "sex": "male" if male else "female", "pleural_effusion": "positive" if effusion else "negative"}
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
    cfg = TrainConfig(images=4096, cooldown=1024, batch=16, lr=2e-3, warmup=256, ema=(1000,), save_every=1000)
    classifier.fit([source], out, cfg, config=SMALL)
    return out / "weights/classifier"


def test_auroc_beside_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="the peer scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for _ in range(5):
        positive, scores = rng.random(50) < 0.3, rng.integers(0, 8, 50) / 8  # with ties
        assert classifier.auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)
    assert math.isnan(classifier.auroc(scores, np.ones(50, bool)))


def test_calibration_error_beside_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration", reason="the peer scikit-learn is not installed")
    rng = np.random.default_rng(0)
    probability = rng.random(2000)
    positive = rng.random(2000) < probability ** 2
    share, mean = calibration.calibration_curve(positive, probability, n_bins=10)
    counts = np.histogram(probability, 10, (0, 1))[0]
    assert classifier.calibration_error(probability, positive) == pytest.approx(
        (counts * np.abs(share - mean)).sum() / 2000, abs=1e-12)


def test_aurocs_by_hand_and_by_scipy():
    """Of 2 positives and 3 negatives 4 of 6 pairs are in order and one is tied; and Mann and Whitney's U of scipy."""
    assert classifier.auroc(np.array([3, 1, 1, 0, 2]),
                            np.array([True, True, False, False, False])) == pytest.approx(4.5 / 6)
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 5, 40), rng.random(40) < 0.4
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert classifier.auroc(scores, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))


@pytest.mark.parametrize("area, m, n", [(0.8, 4, 100), (0.5, 20, 20), (0.99, 1, 30), (1.0, 3, 50), (0.0, 5, 9)])
def test_newcombes_interval_solves_his_equation(area, m, n):
    """Method 5 in its other form: V = A (1 - A) / (m n) [(2 N - 1) - (3 N - 3) / ((2 - A) (1 + A))], N = (m + n) / 2.
    Its ends lie 1.96 standard errors from the estimate, found on a grid."""
    grid, half = np.linspace(0, 1, 200_001), (m + n) / 2
    variance = grid * (1 - grid) / (m * n) * ((2 * half - 1) - (3 * half - 3) / ((2 - grid) * (1 + grid)))
    inside = grid[(area - grid) ** 2 <= stats.norm.ppf(0.975) ** 2 * variance + 1e-15]
    assert classifier.auroc_interval(area, m, n) == pytest.approx([inside.min(), inside.max()], abs=2e-5)


def test_wilsons_interval_beside_scipy():
    for right, n in ((5, 5), (0, 7), (30, 40)):
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert classifier.share_interval(right / n, n) == pytest.approx([expected.low, expected.high], abs=1e-6)


@pytest.mark.parametrize("positives, images, least", [(2, 1, 0.94), (4, 1, 0.94), (10, 1, 0.94), (30, 4, 0.93)])
def test_the_interval_holds_the_truth_as_often_as_it_says(positives, images, least):
    """Scores of positives are shifted by 1: the true AUROC is Phi(1 / sqrt 2). With four images a patient, nearly
    alike, an interval that counted images would be half as wide and far too sure. (A bootstrap holds .56 with two
    positives.)"""
    truth, held, count = stats.norm.cdf(1 / math.sqrt(2)), 0, 1500
    rng = np.random.default_rng(0)
    for _ in range(count):
        positive = np.arange(positives + 30) < positives
        scores = rng.normal(0, 1, len(positive)) + positive
        area = classifier.auroc(np.repeat(scores, images), np.repeat(positive, images))
        low, high = classifier.auroc_interval(area, positives, 30)
        held += low <= truth <= high
    assert least <= held / count <= 0.99


def test_intervals_count_patients(source, fitted):
    """The same images under one patient each or under four: the second interval is wider, and the first that of its
    count."""
    model = hub.load_model(classifier.Classifier, classifier.ClassifierConfig, fitted)
    dataset = classifier.Labelled([source], None, model.config.datasets)
    predicted, rows = classifier.predict(model, dataset), {}
    for images in (1, 4):
        for i, record in enumerate(dataset.images.records):
            record["patient"] = str(i // images)
        rows[images] = {(r["field"], r["value"]): r for r in classifier.measure(dataset, predicted, model.config)}
    for key in (("sex", "male"), ("sex", "(any)")):
        alone, four = rows[1][key], rows[4][key]
        assert four["interval"][1] - four["interval"][0] > alone["interval"][1] - alone["interval"][0]
    sex = rows[1]["sex", "male"]
    assert sex["interval"] == pytest.approx(
        classifier.auroc_interval(sex["auroc"], sex["positives"], sex["n"] - sex["positives"]))


def test_the_bootstrap_of_a_mean_is_students_interval():
    values = np.random.default_rng(0).normal(3, 2, 200)
    low, high = classifier.bootstrap_interval(lambda i: values[i].mean(), np.arange(200).astype(str))
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert [low, high] == pytest.approx(expected, abs=0.06)


def test_no_flag_on_few_positives(monkeypatch):
    """Ten women in whom all is wrong, of whom one is ill: too few to say so; with ten of twenty it is said."""
    for ill, few in ((1, True), (10, False)):
        records = [{"patient": str(i), "sex": "female" if i < 20 else "male"} for i in range(220)]
        labels = np.array([i < ill if i < 20 else i % 2 == 0 for i in range(220)])
        chance = np.where(labels, 0.9, 0.1)
        chance[:20] = 1 - chance[:20]
        age, codes = fields.encode_metadata([{"edema": "positive" if label else "negative"} for label in labels])
        images = type("Images", (), {"records": records})
        dataset = type("Data", (), {"images": images, "age": age, "codes": codes, "__len__": lambda self: 220})()
        config = classifier.ClassifierConfig(SMALL, ("own",), {"edema": {"negative": 1, "positive": 1}})
        answers = np.full(220, math.nan), {"edema": np.stack([1 - chance, chance], 1)}
        monkeypatch.setattr(classifier, "predict", lambda model, dataset: answers)
        model = type("Model", (), {"config": config})
        women = classifier.robustness(model, dataset, ["sex"])["sex=female"][0]
        assert women["auroc"] == 0 and women["few"] == few and women["worse"] == (not few)


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
    held_out, column = (classifier.Labelled([source], "valid", model.config.datasets),
                        fields.CODED.index("pleural_effusion"))
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
    status, output, errors = command("diagnosis", "robustness", root, "--model", fitted, "--by", "sex",
                                     "--json", tmp_path / "r.json")
    assert status == 0, errors
    table = json.loads((tmp_path / "r.json").read_text())
    effusion = {group: next(r for r in rows if r["field"] == "pleural_effusion") for group, rows in table.items()}
    assert set(table) == {"all", "sex=female", "sex=male"}
    assert effusion["sex=female"]["n"] + effusion["sex=male"]["n"] == effusion["all"]["n"] == 160
    assert effusion["sex=female"]["worse"] and not effusion["sex=male"]["worse"]
    assert "sex=female: pleural_effusion positive is worse here than over all images" in output


@pytest.mark.slow
def test_utility_tells_useful_synthetic_data_from_useless(source, tmp_path, command):
    useful = write_source(tmp_path / "useful", 120, 2, split="train")
    status, output, errors = command("diagnosis", "utility", source, "--synthetic", useful, "--out", tmp_path / "u",
                                     "--images", 2048, "--lr", 2e-3, "--width", 64, "--depth", 1,
                                     "--json", tmp_path / "u.json")
    assert status == 0, errors
    table = json.loads((tmp_path / "u.json").read_text())
    sex = {regime: next(r for r in rows if r["field"] == "sex" and "auroc" in r) for regime, rows in table.items()}
    assert list(table) == ["real", "synthetic", "both"] and len({r["n"] for r in sex.values()}) == 1
    assert sex["synthetic"]["auroc"] > 0.8


def test_an_encoder_can_be_the_start(fitted, source, tmp_path):
    encoder = load_encoder(fitted)
    cfg = TrainConfig(images=16, batch=16, lr=0.0, warmup=0, ema=(1,), save_every=1)
    model = classifier.fit([source], tmp_path / "run", cfg, encoder=encoder)
    for a, b in zip(model.encoder.state_dict().values(), encoder.state_dict().values()):
        torch.testing.assert_close(a, b)
    assert isinstance(model.encoder, Encoder) and not torch.equal(model.head.weight, torch.zeros(1))


def test_a_resnet_is_torchvisions(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    config = classifier.ClassifierConfig(ResNetConfig(18, 64), ("own",), {"sex": {"female": 1, "male": 1}})
    model, theirs = classifier.Classifier(config).eval(), models.resnet18(num_classes=1000).eval()
    theirs.load_state_dict(model.encoder.body.state_dict(), strict=False)
    theirs.fc = model.head                                           # on ImageNet's mean and standard deviation
    images = torch.rand(2, 1, 64, 64) * 2 - 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = theirs(((images + 1) / 2).repeat(1, 3, 1, 1).sub(mean).div(std))
    age, logits = model(images)
    torch.testing.assert_close(age, 50 + 20 * expected[:, 0])
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 1:])
    hub.save_model(model, tmp_path, torch.float32)
    again = hub.load_model(classifier.Classifier, classifier.ClassifierConfig, tmp_path)
    torch.testing.assert_close(again(images)[0], age)


def test_without_torchvision_a_resnet_is_refused(source, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    status, _, errors = command("diagnosis", "utility", source, "--synthetic", source, "--resnet",
                                "--out", tmp_path / "out")
    assert status == 2 and "a ResNet needs the package torchvision" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("arguments, message", [
    (["--width", "100"], "--width 100 is not a multiple of 64"),
    (["--patch", "7"], "--patch 7 does not divide 32 pixels"),
    (["--encoder", "nowhere"], "nowhere")])
def test_bad_arguments(source, tmp_path, command, arguments, message):
    status, _, errors = command("diagnosis", "fit", source, "--out", tmp_path / "out", *arguments)
    assert status == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors


def test_data_without_a_split_are_refused_before_the_training(source, tmp_path, command, monkeypatch):
    monkeypatch.setattr(classifier, "fit", pytest.fail)
    few = write_source(tmp_path / "few", 4, 0, split="valid")
    header, *rows = (few / "index.csv").read_text().splitlines()
    for split in ("test", "valid", "train"):
        others = [other for other in ("test", "valid", "train") if other != split]
        lines = [row.replace("valid", others[i % 2]) for i, row in enumerate(rows)]
        (few / "index.csv").write_text("\n".join([header, *lines]))
        for more in (["fit"], ["utility", "--synthetic", source]):
            status, _, errors = command("diagnosis", more[0], few, *more[1:], "--out", tmp_path / "out")
            assert status == 2 and errors.endswith(f"no image in the split {split}{data.SPLIT_HELP}\n"), errors
    status, _, errors = command("diagnosis", "utility", source, "--synthetic", few, "--out", tmp_path / "out")
    assert status == 2 and errors.endswith(f"no image in the split train{data.SPLIT_HELP}\n")
    assert not (tmp_path / "out").exists()
