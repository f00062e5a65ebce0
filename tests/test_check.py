"""Contradictions between images and what they were asked to show: by hand, and on a folder of sample.py whose images
lie."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common import hub
from diagnosis import check, classifier
from encoders.raddino import EncoderConfig
from radiographs import fields, pixels

COVERED = {"sex": {"female": 1, "male": 1}, "edema": {"negative": 1, "positive": 1}, "view": {"PA": 3}, "age": [20, 80]}
CONFIG = classifier.ClassifierConfig(EncoderConfig(64, 1, 1, 8, 32, channels=1), ("own",), COVERED, age_error=5.0)


@pytest.mark.parametrize("record, found", [
    ({"sex": "male"}, [("sex", "female")]), ({"sex": "female"}, []), ({"edema": "negative"}, []), ({}, []),
    ({"view": "AP"}, []), ({"age": 64.0}, []), ({"age": 66.0, "sex": "male"}, [("sex", "female"), ("age", "50")])])
def test_a_sure_answer_contradicts_and_others_do_not(record, found):
    """Seen: a woman of 50 (probability .85; mean error 5 years), edema at .7. It was taught nothing of views."""
    seen = {"sex": np.array([0.85, 0.15]), "edema": np.array([0.3, 0.7]), "view": np.array([0, 1, 0])}
    assert check.contradictions(record, 50.2, seen, CONFIG) == found


class Bright:
    """A judge by rule: a picture above mid-grey is a man, one below a woman."""
    def __init__(self):
        self.config, self.values = CONFIG, {"sex": fields.VALUES["sex"]}

    def predict(self, images):
        male = np.array([float(image.mean() > 0) for image in images])
        half = np.full((len(images), 2), 0.5)
        return np.full(len(images), 50.0), {"sex": np.stack([1 - male, male], 1), "edema": half, "view": half}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six samples of women, of which the odd ones show men."""
    monkeypatch.setattr(classifier, "load", lambda folder: Bright())
    monkeypatch.setattr(classifier, "predict", lambda model, images: model.predict(list(images)))
    monkeypatch.setattr(hub, "fingerprint", lambda place: "f" * 16)
    settings = {"weights": "w", "fingerprint": "f" * 16, "steps": 3, "solver": "euler", "guidance": 2.0,
                "interval": [0, 1], "precision": "float32"}
    names, records = [f"{i:04}" for i in range(6)], [{"sex": "female", "age": 50.0}] * 6
    (tmp_path / "s/images").mkdir(parents=True)
    for i, name in enumerate(names):
        sample.write_image(tmp_path / "s", name, torch.full((1, 32, 32), 0.5 if i % 2 else -0.5), records[i], 10 + i,
                           settings)
    sample.write_tables(tmp_path / "s", names, records, list(range(10, 16)), settings)
    (tmp_path / "s/sample.json").write_text(json.dumps(settings | {"images": 6}))
    return tmp_path / "s"


def test_contradictions_are_listed(folder, tmp_path, command):
    status, output, errors = command("diagnosis", "check", folder, "--json", tmp_path / "r.json")
    assert status == 0, errors
    assert "contradicts 3 of 6 images" in output and "sex looks like male" in output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["fields"] == {"sex": {"asked": 6, "contradicted": 3}, "age": {"asked": 6, "contradicted": 0}}
    assert sorted(report["contradictions"]) == ["0001.png", "0003.png", "0005.png"]
    assert len(list(folder.parent.iterdir())) == 2                   # nothing else was written


def test_contradicted_images_are_made_anew_in_a_folder_that_says_so(folder, monkeypatch, command):
    """The weights make a man at the first other seed of image 1 and a woman at the second; of image 5 always a man."""
    asked = []

    def generate(model, vae, records, seeds, **settings):
        assert settings == {"steps": 3, "guidance": 2.0, "solver": "euler", "interval": [0, 1], "bf16": False}
        asked.append(seeds)
        attempt = len(asked)
        levels = {11: 0.5 if attempt == 1 else -0.5, 13: -0.25, 15: 0.5}
        return torch.stack([torch.full((1, 32, 32), levels[seed % check.SEED_STEP]) for seed in seeds]), 3

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "load_weights", lambda folder: (torch.nn.Identity(), None))
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    status, output, errors = command("diagnosis", "check", folder, "--redraw")
    assert status == 0, errors
    out = folder.with_name("s-checked")
    assert f"{3 + 2 + 6} images made anew, 1 still contradicted after 8 tries" in output
    # No seed twice, none of a neighbour.
    assert len(set(sum(asked, []))) == 11 and not set(sum(asked, [])) & set(range(100))
    levels = [pixels.load_image(out / f"images/{i:04}.png").mean().item() for i in range(6)]
    assert levels == pytest.approx([-0.5, -0.5, -0.5, -0.25, -0.5, 0.5], abs=0.01)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.png")}     # the sample stays as it was
    assert "made anew" in Image.open(out / "images/0000.png").text["Selected"]
    seeds = [row.split(",")[1] for row in (out / "metadata.csv").read_text().split()[1:]]
    assert seeds[0] == "10" and int(seeds[1]) == 11 + 2 * check.SEED_STEP and seeds[5] == "15"
    assert command("diagnosis", "check", folder, "--redraw")[0] == 2                         # nothing is written over


@pytest.mark.parametrize("name, old, new, message", [
    ("metadata.csv", ",11,", ",x,", "metadata.csv, line 3: seed 'x' is not a whole number"),
    ("sample.json", '"steps": 3', '"steps": "x"', "damaged, since sample.py writes another value of steps"),
    ("sample.json", '"interval"', '"other"', "another value of interval")])
def test_damaged_tables_of_a_sample_are_named(folder, command, name, old, new, message):
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace(old, new, 1))
    assert old in text
    status, _, errors = command("diagnosis", "check", folder)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1


def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, command):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sample, "load_weights", lambda folder: (None, None))
    for arguments, message in (([tmp_path / "empty"], "no sample.json"),
                               ([folder, "--out", tmp_path / "x"], "give --redraw too")):
        status, _, errors = command("diagnosis", "check", *arguments)
        assert status == 2 and message in errors and len(errors.splitlines()) == 1
    monkeypatch.setattr(hub, "fingerprint", lambda place: "0" * 16)
    status, _, errors = command("diagnosis", "check", folder, "--redraw")
    assert status == 2 and "not the weights that filled" in errors and len(errors.splitlines()) == 1
