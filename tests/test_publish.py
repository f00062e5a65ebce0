"""Publishing: what a repository on the Hub holds afterwards, and what is refused."""
import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml

import radit
import sample
import vae
from baselines import radunet
from common import hub
from conftest import ROOT
from radiographs import fields
from share import publish

README = (ROOT / "share/README.md").read_text()
REPORT = {"protocol": {"encoder": "microsoft/rad-dino", "k": 5, "warnings": ["few images"]},
          "results": [{"group": "all", "real": 50, "synthetic": 60, "FDD": {"value": 9.12789, "standard_error": 0.5},
                       "KDD": {"value": 0.05, "standard_error": None}},
                      {"group": "sex=male", "real": 2, "synthetic": 3}],
          "memorisation": {"synthetic": {"least": 0.1, "below": 0.02}}}


ROWS = [{"sex": ["female", "male"][i % 2], "dataset": "own", "age": 20.0 + i,
         "pneumonia": ["negative", "positive"][i % 3 % 2]}
        for i in range(64)]  # of training patients


@pytest.fixture
def run(tmp_path):
    """A run of train.py as publish.py meets it: weights/ beside files that are not to be published."""
    torch.manual_seed(0)
    hub.save_model(vae.RadVAE(vae.VAEConfig(1, 2, (8, 8), 1, 4)), tmp_path / "runs/radit/weights/vae")
    covered = {"sex": {"female": 1500, "male": 4}, "dataset": {"own": 1504}, "age": [20, 80.5],
               "no_finding": {"negative": 500, "positive": 4}, "pneumonia": {"negative": 300, "positive": 200}}
    config = radit.RadiTConfig(channels=8, grid=(8, 8), width=128, depth=2, heads=2, datasets=(*fields.DATASETS, "own"),
                               covered=covered, examples=ROWS, vae=hub.fingerprint(tmp_path / "runs/radit/weights/vae"))
    hub.save_model(radit.RadiT(config), tmp_path / "runs/radit/weights/radit")
    (tmp_path / "runs/radit/checkpoint.safetensors").write_text("secret")
    (tmp_path / "runs/radit/weights/radit/notes.txt").write_text("secret")
    (tmp_path / "runs/radit/weights/radit/rows.json").write_text("secret")
    return tmp_path / "runs/radit"


@pytest.fixture
def here(hub_server, monkeypatch):
    """This process asks the loopback server too, and uploads large files by LFS: Xet's protocol needs another
    server."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub_server[0].server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")


@pytest.fixture
def push(command, here):
    """Runs the command; returns its output, or where it fails its status and its one line."""
    def call(*arguments):
        status, output, errors = command("share", "push", *arguments)
        if status == 0:
            return output
        assert output == "" and len(errors.splitlines()) == 1, errors
        return status, errors
    return call


@pytest.mark.slow
def test_the_readme_s_commands_push_and_load_by_name(run, tmp_path, push, command):
    (tmp_path / "metrics.json").write_text(json.dumps(REPORT))
    pushing, sampling = (line.split()[1:] for line in README.splitlines() if line.startswith("    python ")
                         and "ORG/NAME" in line)
    status, output, errors = command("share", *pushing[2:], cwd=tmp_path)
    assert status == 0 and "/ORG/NAME/commit/" in output.splitlines()[-1], errors
    served = tmp_path / "served/ORG/NAME"
    assert sorted(str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()) == [
        "README.md", "radit/config.json", "radit/model.safetensors", "vae/config.json", "vae/model.safetensors"]
    _, header, text = (served / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-4.0" and "synthetic" in yaml.safe_load(header)["tags"]
    for part in ("| sex | female 1,500; male 4 |", "| age | 20 to 80.5 years |", "encoder microsoft/rad-dino; k 5",
                 "Warning: few images", "| all | 50 | 60 | 9.128 ± 0.5 | 0.05 |",
                 "| sex=male | 2 | 3 | too few | too few |",
                 "| synthetic | 0.1 | 0.02 |", "Not a medical device", "--weights ORG/NAME"):
        assert part in text, part
    status, _, errors = command.subprocess(*sampling, "--n", 1, "--steps", 1, "--out", tmp_path / "out")
    assert status == 0, errors
    again = json.loads((tmp_path / "out/sample.json").read_text())
    assert (again["weights"], again["fingerprint"]) == ("ORG/NAME@main", hub.fingerprint(run / "weights/radit"))
    push(run / "weights", "ORG/NAME")  # again: the repository is there, the card is made anew
    assert "Not measured." in (served / "README.md").read_text()


def test_no_row_of_the_training_data_is_published(run, tmp_path, push):
    """The config's examples are rows of an index here, as those of older trainings are; none of them leaves."""
    before = (run / "weights/radit/config.json").read_text()
    output = push(run, "org/safe")
    assert "the 64 examples of metadata in config.json" in output and "are replaced" in output
    served = tmp_path / "served/org/safe"
    published = json.loads((served / "radit/config.json").read_text())
    assert len(published["examples"]) == 64 and not [row for row in published["examples"] if row in ROWS]
    assert (run / "weights/radit/config.json").read_text() == before != (served / "radit/config.json").read_text()
    changed = {name for name, value in json.loads(before).items() if published[name] != value}
    assert changed == {"examples"}
    assert "are synthetic, not those of patients" in (served / "README.md").read_text()
    model, _ = sample.load_weights(served)                           # and it loads, with examples that can be sampled
    for example in model.config.examples:
        fields.check_covered(example, model.config.covered)
        assert fields.resolve_request(example) == (example, [])      # nothing in it contradicts anything else
    for path in served.rglob("*.*"):
        assert b"secret" not in path.read_bytes()


def test_the_demo_weights_leave_without_their_training_rows(tmp_path, push):
    model, _ = sample.load_weights(sample.DEMO)
    files = publish.files_of(sample.DEMO, model)
    assert {name.split("/")[0] for name in files} == {"radit", "vae", "causal", "classifier"}
    published = json.loads(files["radit/config.json"])["examples"]
    assert published and not [row for row in published if row in model.config.examples]
    assert {path.suffix for path in files.values() if not isinstance(path, bytes)} == {".json", ".safetensors"}


def test_examples_have_the_counts_frequencies_and_belong_to_nobody():
    covered = {"dataset": {"own": 1000}, "sex": {"female": 600, "male": 200}, "view": {"PA": 500}, "age": [20.0, 60.0],
               "edema": {"positive": 100}}
    records = publish.examples_of(covered, {}, count=20_000)
    shares = {name: np.mean([name in (f"{field}={value}" for field, value in record.items()) for record in records])
              for name in ("dataset=own", "sex=female", "sex=male", "view=PA", "edema=positive")}
    assert shares == pytest.approx({"dataset=own": 1, "sex=female": 0.6, "sex=male": 0.2, "view=PA": 0.5,
                                    "edema=positive": 0.1}, abs=0.02)
    ages = np.array([record["age"] for record in records])
    assert ages.min() >= 20 and ages.max() <= 60 and (ages % 1 == 0.5).all()
    assert ages.mean() == pytest.approx(40, abs=0.5)
    together = np.mean([record.get("sex") == "female" and record.get("view") == "PA" for record in records])
    assert together == pytest.approx(0.3, abs=0.02)                  # each on its own
    assert publish.examples_of(covered, {}) == publish.examples_of(covered, {})
    assert publish.examples_of({}, {}, count=2) == [{}, {}]


def test_examples_hold_no_two_values_that_no_training_image_held_together():
    rows = [{"dataset": "kermany", "view": "AP", "age": 3.0}, {"dataset": "own", "view": "PA", "age": 70.0}] * 50
    covered, pairs = fields.coverage(rows), fields.count_pairs(rows)
    records = publish.examples_of(covered, pairs, count=500)
    assert not any(fields.never_together(record, pairs) for record in records)
    assert any(fields.never_together(record, pairs) for record in publish.examples_of(covered, {}, count=500))
    assert {record["dataset"] for record in records if "dataset" in record} == {"kermany", "own"}


def test_the_baseline_and_adapters_are_published_too(run, tmp_path, push):
    config = radunet.RadUNetConfig(channels=1, grid=(32, 32), patch=8, width=64, multiples=(1, 2), blocks=1,
                                   attending=1, datasets=("own",), covered={"sex": {"female": 2, "male": 2}},
                                   examples=ROWS[:2])
    hub.save_model(radunet.RadUNet(config), tmp_path / "runs/unet/weights/radunet")
    push(tmp_path / "runs/unet", "org/unet")
    served = tmp_path / "served/org/unet"
    published = json.loads((served / "radunet/config.json").read_text())["examples"]
    assert published and not [row for row in published if row in ROWS]
    assert "A RadUNet of" in (served / "README.md").read_text()
    model, _ = sample.load_weights(run / "weights")
    for part in ("radit", "vae"):
        (run / "weights" / part / "lora.safetensors").write_text("adapters")
    assert {"radit/lora.safetensors", "vae/lora.safetensors"} <= set(publish.files_of(run / "weights", model))


def test_a_card_beside_the_weights_is_kept(run, tmp_path, push):
    (run / "weights/README.md").write_text("# Mine\n\n![grid](grid.png)\n")
    (run / "weights/grid.png").write_bytes(b"png")
    (run / "weights/patient.png").write_bytes(b"secret")             # lies there, but the README does not show it
    push(run, "org/b")
    card = (tmp_path / "served/org/b/README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and card.endswith("# Mine\n\n![grid](grid.png)\n")
    assert (tmp_path / "served/org/b/grid.png").read_bytes() == b"png"
    assert not (tmp_path / "served/org/b/patient.png").exists()
    (run / "weights/README.md").write_text("---\nlicense: mit\n---\n# All mine\n")
    push(run, "org/b")
    assert (tmp_path / "served/org/b/README.md").read_text() == "---\nlicense: mit\n---\n# All mine\n"
    status, error = push(run, "org/b", "--license", "mit")
    assert status == 2 and "has a header of its own and takes the card's place" in error


def test_what_cannot_be_published_is_one_line(run, tmp_path, hub_server, push, monkeypatch):
    def refused(message, *arguments, status=2):
        found = push(*arguments)
        assert found[0] == status and message in found[1], found
        return True

    for name in ("name", "", "a/b/c", "org/na me", "org/"):
        assert refused("not of the form ORG/NAME", run, name)
    assert refused("nothing to publish", tmp_path / "nowhere", "org/a") and refused("an empty path", "", "org/a")
    for content in (b'{"results": []}', b"{}", b'{"protocol": 1, "results": 2}', b"[]", b"", b"\xff", b"[" * 100_000,
                    b"9" * 9999):
        (tmp_path / "metrics.json").write_bytes(content)
        assert refused("metrics", run, "org/a", "--metrics", tmp_path / "metrics.json")
    assert refused("metrics.json: No such file", run, "org/a", "--metrics", tmp_path / "none/metrics.json")
    for licence in ("", "MIT\nother: x", "cc by"):
        assert refused("is not a licence's name", run, "org/a", "--license", licence)
    monkeypatch.delenv("HF_TOKEN")
    assert refused("org/a: not published", run, "org/a", status=1) and not (tmp_path / "served/org/a").exists()
    broken, requests = shutil.copytree(run / "weights", tmp_path / "broken"), len(hub_server[1])
    (broken / "README.md").write_bytes(b"\xff\xfe")
    assert refused("README.md: not UTF-8 text", broken, "org/a")
    (broken / "vae/model.safetensors").write_bytes(b"")
    assert refused("truncated", broken, "org/a") and len(hub_server[1]) == requests
    hub_server[0].shutdown()
    hub_server[0].server_close()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert refused("org/a: not published", run, "org/a", status=1)
