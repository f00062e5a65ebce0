"""Stress tests: sizes of plain changes, and answers whose drop in the other group is known."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from common import cli, hub
from diagnosis import classifier, stress
from encoders.raddino import EncoderConfig
from radiographs.index import COLUMNS, index_row


@pytest.mark.parametrize("kind", stress.PLAIN)
def test_a_plain_change_has_the_size_asked_for(kind):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 16, 16, generator=rng) * 0.2
    size = torch.tensor([0.01, 0.05, 0.1, 0.15])
    changed = stress.change_by(images, kind, size)
    assert ((changed - images) ** 2).mean((1, 2, 3)).sqrt().tolist() == pytest.approx(size.tolist(), rel=1e-3)
    if kind in ("brighter", "darker"):                               # nothing is clipped: by the same amount everywhere
        expected = size * (1 if kind == "brighter" else -1)
        assert torch.allclose(changed[:2], images[:2] + expected[:2].view(-1, 1, 1, 1), atol=1e-4)
    else:                                                            # the mean stays, the deviation changes by the size
        factor = (changed[0] - images[0].mean()).std() / images[0].std()
        assert factor.item() == pytest.approx(
            1 + (1 if kind == "more contrast" else -1) * 0.01 / images[0].std().item(), abs=0.01)
    far = stress.change_by(images, kind, torch.full((4,), 9.0))      # more than any change can: as far as it goes
    assert far.isfinite().all() and far.abs().max() <= 1


def world(n=400, models=3, seed=0):
    """Answers of models on a finding that half of all have. Scores are normal, shifted by d where it is there, so that
    the AUROC is Phi(d / sqrt 2). In the other group d is less, and the more so the better the model is; so it is on the
    edits."""
    rng = np.random.default_rng(seed)
    labels, d = (rng.random((1, n)) < 0.5).astype(int), np.array([1.3, 1.5, 1.7])[:models]
    other_d = np.array([1.3, 0.9, 0.5])[:models]
    base, other_base = rng.normal(size=(models, 1, n)), rng.normal(size=(models, 1, n))
    answers = {"original": base + d[:, None, None] * labels, "unchanged": base + d[:, None, None] * labels,
               "edited": base + other_d[:, None, None] * labels}
    answers |= {kind: answers["original"] + 1 for kind in stress.PLAIN}                      # a shift changes no order
    other = other_base + other_d[:, None, None] * labels
    return (answers, labels, np.arange(n), other, labels.copy(), np.arange(n),
            norm.cdf([other_d / 2 ** 0.5, d / 2 ** 0.5]))


def test_the_drop_is_predicted_by_edits_that_are_right_and_not_by_plain_changes():
    *what, (other_area, area) = world(n=1500)
    result, real, intervals, real_interval = stress.measure_with_intervals(*what, repeats=60)
    expected = other_area - area                                     # in closed form
    assert real[:, 0] == pytest.approx(expected, abs=0.06)
    assert result["edited"]["predicted"][:, 0] == pytest.approx(expected, abs=0.06)
    assert result["edited"]["error"] < 0.05 < result["brighter"]["error"] == pytest.approx(result["no change"]["error"])
    assert result["edited"]["ranking"] == 1 and result["brighter"]["ranking"] == result["no change"]["ranking"] == 0
    low, high = real_interval[0][:, 0], real_interval[1][:, 0]
    assert (low - 0.02 <= expected).all() and (expected <= high + 0.02).all() and (high - low < 0.12).all()
    assert intervals["edited"]["error"][0] <= intervals["edited"]["error"][1] < intervals["no change"]["error"][0]


def test_intervals_count_patients():
    answers, labels, patients, other, other_labels, other_patients, _ = world(n=200, models=1)
    widths = []
    for copies in (1, 4):                                            # the same images, one or four of each patient
        many = [{name: np.repeat(values, copies, 2) for name, values in answers.items()}, np.repeat(labels, copies, 1),
                np.repeat(patients, copies), np.repeat(other, copies, 2), np.repeat(other_labels, copies, 1),
                np.repeat(other_patients, copies)]
        low, high = stress.measure_with_intervals(*many, repeats=100)[3]
        widths.append(float((high - low)[0, 0]))
    assert widths[1] == pytest.approx(widths[0], rel=0.3)           # four copies say no more than one


def test_agreement_by_hand():
    a, b = np.array([[0.9, 0.8], [0.7, 0.8]]), np.array([[0.6, 0.9], [0.5, 0.7]])
    assert stress.agreement(a, b) == 0.75                            # the first pair is in order, the second tied in a
    assert stress.agreement(-a, b) == 0.25 and np.isnan(stress.agreement(a[:1], b[:1]))


def test_findings_with_few_patients_are_left_out():
    labels = np.array([[1] * 10 + [0] * 30, [1] * 9 + [0] * 31, [1] * 40, [-1] * 40])
    assert stress.enough(labels, np.arange(40)).tolist() == [True, False, False, False]
    assert stress.enough(labels[:1], np.repeat(np.arange(20), 2)).tolist() == [False]        # five patients with it


def write_source(root, records, level):
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, record in enumerate(records):
        picture = (rng.normal(100, 20, (32, 32)) + level).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / f"images/{i:05}.png")
        record |= {"path": f"images/{i:05}.png", "split": "test"}
    cli.write_csv(root / "index.csv", COLUMNS, map(index_row, records))


@pytest.fixture
def edits(tmp_path):
    """A source of 24 men and 24 women, half of each with an edema, and the men edited."""
    def people(sex, first):
        return [{"patient": f"P{first + i}", "sex": sex, "edema": "positive" if i % 2 else "negative"}
                for i in range(24)]
    write_source(tmp_path / "real", people("male", 0) + people("female", 24), 0)
    write_source(tmp_path / "edits/unchanged", people("male", 0), 0)
    write_source(tmp_path / "edits/edited", [r | {"sex": "female"} for r in people("male", 0)], 20)
    about = {"conditions": {"sex": "male"}, "change": {"sex": "female"}, "split": "test",
             "names": [f"{i:05}.png" for i in range(24)]}
    cli.write_json(tmp_path / "edits/edits.json", about)
    config = EncoderConfig(64, 1, 1, 8, 32, channels=1)
    covered = {"edema": {"negative": 1, "positive": 1}, "pneumonia": {"negative": 1, "positive": 1}}
    for seed in range(2):
        torch.manual_seed(seed)
        model = classifier.Classifier(classifier.ClassifierConfig(config, ("own",), covered))
        hub.save_model(model, tmp_path / f"model{seed}")
    return tmp_path


def test_the_command_reports_every_change(edits, command, monkeypatch):
    monkeypatch.setattr(stress, "REPEATS", 20)
    status, output, errors = command("diagnosis", "stress", edits / "edits", "--data", edits / "real",
                                     "--model", edits / "model0", "--model", edits / "model1",
                                     "--json", edits / "r.json")
    assert status == 0, errors
    assert "24 edited images, 24 real ones of the other group (sex=female), 1 finding, 2 models" in output
    assert f"model 1: {edits / 'model0'}\nmodel 2: {edits / 'model1'}\n" in output  # the whole paths, once
    report = json.loads((edits / "r.json").read_text())[str(edits / "edits")]
    assert report["findings"] == ["edema"]                           # of pneumonia nothing is known
    rows = {row["change"]: row for row in report["rows"]}
    assert list(rows) == ["edited", *stress.PLAIN, "no change"]
    assert rows["edited"]["rms"] == pytest.approx(20, abs=0.5) == rows["brighter"]["rms"] \
        and rows["no change"]["moved"] == 0
    assert np.shape(report["real"]) == (2, 1) and np.shape(report["real_interval"]) == (2, 1, 2)
    assert 0 <= rows["edited"]["ranking"] <= 1 and rows["edited"]["moved"] > 0


def test_bad_input_is_one_line(edits, command):
    for arguments, message in ((["edits/edited", "--data", "real"], "no edits.json of python -m causal edit-all"),
                               (["edits", "--data", "edits/unchanged"],
                                "no real image of the split test with sex=female"),
                               (["edits", "--data", "real", "--model", "model0", "--model", "model0"], "given twice")):
        status, _, errors = command("diagnosis", "stress", *arguments, cwd=edits)
        assert status == 2 and message in errors and len(errors.splitlines()) == 1
