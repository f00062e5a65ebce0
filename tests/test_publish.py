import json
import shutil

import huggingface_hub.constants
import pytest
import torch
import yaml

import radit
import sample
import vae
from common import hub
from common.cli import InputError
from radiographs import fields
from share import publish

REPORT = {"protocol": {"encoder": "microsoft/rad-dino", "k": 5, "warnings": ["few images"]},
          "results": [{"group": "all", "real": 50, "synthetic": 60, "FDD": {"value": 9.12789, "standard_error": 0.5},
                       "KDD": {"value": 0.05, "standard_error": None}},
                      {"group": "sex=male", "real": 2, "synthetic": 3}],
          "memorisation": {"synthetic": {"least": 0.1, "below": 0.02}}}


@pytest.fixture
def run(tmp_path):
    """A run of train.py as publish.py meets it: weights/ beside what is nobody's business."""
    torch.manual_seed(0)
    hub.save_model(vae.RadVAE(vae.VAEConfig(1, 2, (8, 8), 1, 4)), tmp_path / "run/weights/vae")
    covered = {"sex": {"female": 1500, "male": 4}, "dataset": {"own": 1504}, "age": [20, 80.5]}
    config = radit.RadiTConfig(channels=8, grid=(8, 8), width=128, depth=2, heads=2, datasets=(*fields.DATASETS, "own"), covered=covered,
                               examples=[], shift=1.0, vae=hub.fingerprint(tmp_path / "run/weights/vae"))
    hub.save_model(radit.RadiT(config), tmp_path / "run/weights/radit")
    (tmp_path / "run/checkpoint.safetensors").write_text("secret")
    (tmp_path / "run/weights/radit/notes.txt").write_text("secret")
    return tmp_path / "run"


@pytest.fixture
def here(hub_server, monkeypatch):
    """This process asks the loopback server too, and uploads large files by LFS: the Xet protocol needs a server of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub_server[0].server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")


def test_what_was_pushed_is_loaded_by_its_name(run, tmp_path, hub_server, here, command, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(REPORT))
    publish.main([str(run), "org/pushed", "--metrics", str(tmp_path / "metrics.json"), "--license", "cc-by-4.0"], sample.load_weights)
    assert "/org/pushed/commit/" in capsys.readouterr().out
    served = tmp_path / "served/org/pushed"
    assert sorted(str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()) == [
        "README.md", "radit/config.json", "radit/model.safetensors", "vae/config.json", "vae/model.safetensors"]
    _, header, text = (served / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-4.0" and "synthetic" in yaml.safe_load(header)["tags"]
    for part in ("| sex | female 1,500; male 4 |", "| age | 20 to 80.5 years |", "encoder microsoft/rad-dino; k 5", "Warning: few images",
                 "| all | 50 | 60 | 9.128 ± 0.5 | 0.05 |", "| sex=male | 2 | 3 | too few | too few |", "| synthetic | 0.1 | 0.02 |",
                 "Not a medical device", "--weights org/pushed"):
        assert part in text, part
    status, _, errors = command("sample.py", "--weights", "org/pushed", "--n", 1, "--steps", 1, "--out", tmp_path / "out")
    assert status == 0, errors
    again = json.loads((tmp_path / "out/sample.json").read_text())
    assert (again["weights"], again["fingerprint"]) == ("org/pushed", hub.fingerprint(run / "weights/radit"))
    publish.main([str(run / "weights"), "org/pushed"], sample.load_weights)  # again: the repository is there, the card is made anew
    assert "Not measured." in (served / "README.md").read_text()


def test_a_card_beside_the_weights_is_kept(run, tmp_path, here):
    (run / "weights/README.md").write_text("# Mine\n\n![grid](grid.png)\n")
    (run / "weights/grid.png").write_bytes(b"png")
    publish.main([str(run), "org/b"], sample.load_weights)
    card = (tmp_path / "served/org/b/README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and card.endswith("# Mine\n\n![grid](grid.png)\n")
    assert (tmp_path / "served/org/b/grid.png").read_bytes() == b"png"
    (run / "weights/README.md").write_text("---\nlicense: mit\n---\n# All mine\n")
    publish.main([str(run), "org/b"], sample.load_weights)
    assert (tmp_path / "served/org/b/README.md").read_text() == "---\nlicense: mit\n---\n# All mine\n"


def test_what_cannot_be_published_is_one_line(run, tmp_path, hub_server, here, monkeypatch):
    def attempt(*arguments):
        with pytest.raises(InputError) as caught:
            publish.main(list(map(str, arguments)), sample.load_weights)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not of the form ORG/NAME" in attempt(run, "name")
    assert "nothing to publish" in attempt(tmp_path / "nowhere", "org/a")
    (tmp_path / "metrics.json").write_text('{"results": []}')
    assert "--metrics: not a file of metrics.py --json" in attempt(run, "org/a", "--metrics", tmp_path / "metrics.json")
    monkeypatch.delenv("HF_TOKEN")
    assert "org/a: not published" in attempt(run, "org/a") and not (tmp_path / "served/org/a").exists()
    broken = shutil.copytree(run / "weights", tmp_path / "broken")
    (broken / "vae/model.safetensors").write_bytes(b"")
    requests = len(hub_server[1])
    assert "truncated" in attempt(broken, "org/a") and len(hub_server[1]) == requests
    hub_server[0].shutdown()
    hub_server[0].server_close()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "org/a: not published" in attempt(run, "org/a")
