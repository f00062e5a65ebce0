import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT

from common import cli, hub
from common.cli import InputError
from radiographs import pixels
from radiographs.index import COLUMNS, index_row
from vae import RadVAE, VAEConfig

SMALL = VAEConfig(channels=1, latent_channels=2, widths=(4, 8), layers=1, groups=2)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    hub.save_model(RadVAE(SMALL), tmp_path / "model")
    return tmp_path / "model"


def load(folder):
    return hub.load_model(RadVAE, VAEConfig, folder)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip_is_bfloat16_on_disk_and_float32_in_memory(tmp_path):
    torch.manual_seed(0)
    model = RadVAE(SMALL)
    hub.save_model(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == SMALL and not list((tmp_path / "m").glob("*.tmp"))
    for name, tensor in model.state_dict().items():
        stored = again.state_dict()[name]
        assert stored.dtype == tensor.dtype
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(stored, expected), name
    size = sum(p.numel() for p in model.state_dict().values())
    assert 2 * size < (tmp_path / "m/model.safetensors").stat().st_size < 2 * size + 20_000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"no {name}"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(InputError, match="truncated"):
        load(folder)


def test_an_unknown_or_missing_key_is_named(folder):
    edit_config(folder, colour="blue")
    with pytest.raises(InputError, match="colour.*unknown or missing"):
        load(folder)
    edit_config(folder, colour=None, layers=None)
    with pytest.raises(InputError, match="layers.*unknown or missing"):
        load(folder)


def test_a_config_that_is_not_json_or_of_another_shape_is_refused(folder):
    edit_config(folder, widths=[8, 8])
    with pytest.raises(InputError, match="not of this architecture"):
        load(folder)
    (folder / "config.json").write_text("{half")
    with pytest.raises(InputError, match="config.json"):
        load(folder)


@dataclasses.dataclass
class Config:
    width: int = 2
    notes: list = dataclasses.field(default_factory=list)
    pairs: dict = dataclasses.field(default_factory=dict)


class Line(torch.nn.Linear):
    def __init__(self, config):
        super().__init__(config.width, config.width)
        self.config = config


def test_a_key_whose_default_is_empty_may_be_missing_and_no_other(tmp_path):
    """So that weights saved before a field existed are still loaded, and none is loaded as something else."""
    hub.save_model(Line(Config(2, [1], {"a": 1})), tmp_path)
    edit_config(tmp_path, notes=None, pairs=None)
    assert hub.load_model(Line, Config, tmp_path).config == Config(2, [], {})
    edit_config(tmp_path, width=None)
    with pytest.raises(InputError, match="'width'.*unknown or missing"):
        hub.load_model(Line, Config, tmp_path)


@pytest.mark.parametrize("width", [-1, 1.5, "2", [2], {}, True, 3, 10 ** 7])
def test_a_config_with_a_value_that_does_not_fit_is_refused_before_memory_is_taken(tmp_path, width):
    hub.save_model(Line(Config(2)), tmp_path)
    edit_config(tmp_path, width=width)                               # 10 ** 7 squared would take 400 TB
    with pytest.raises(InputError, match="config.json|not of this architecture"):
        hub.load_model(Line, Config, tmp_path)


def test_weights_that_are_not_finite_are_refused(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name].view(-1)[-1] = torch.nan
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
        load(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers_are_refused(folder, kind):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name] = tensors[name].to(kind)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} holds {kind}, where torch.float32 is expected"):
        load(folder)


def test_saved_files_have_the_mode_that_new_files_have(tmp_path):
    (tmp_path / "new").touch()
    hub.save_model(RadVAE(SMALL), tmp_path / "m")
    modes = {path.stat().st_mode for path in (tmp_path / "new", *(tmp_path / "m").iterdir())}
    assert len(modes) == 1


def test_the_fingerprint_follows_the_weights(folder, tmp_path):
    before = hub.fingerprint(folder)
    hub.save_model(load(folder), tmp_path / "copy")
    assert hub.fingerprint(tmp_path / "copy") == before
    torch.manual_seed(1)
    hub.save_model(RadVAE(SMALL), folder)
    assert hub.fingerprint(folder) != before


# --- the Hub: a server on this machine that answers as the real one does (loopback.py) -------------------------

def test_a_name_on_the_hub_is_taken_like_a_path_and_then_from_the_cache(tmp_path, hub_server, command):
    """A small FLUX.2 in diffusers' layout, in a folder vae/ as in black-forest-labs/FLUX.2-klein-4B."""
    server, requests, _ = hub_server
    torch.manual_seed(0)
    folder = tmp_path / "served/org/flux-small/vae"
    folder.mkdir(parents=True)
    model = RadVAE(VAEConfig(channels=3, latent_channels=2, widths=(4, 8), layers=1, groups=2))
    safetensors.torch.save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "_class_name": "AutoencoderKLFlux2", "in_channels": 3, "latent_channels": 2, "block_out_channels": [4, 8],
        "layers_per_block": 1, "norm_num_groups": 2}))
    root = tmp_path / "one"
    (root / "images").mkdir(parents=True)
    pixels.save_image(torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0)), root / "images/0.png")
    row = index_row({"path": "images/0.png", "patient": "p", "split": "test", "dataset": "own"})
    cli.write_csv(root / "index.csv", COLUMNS, [row])

    def evaluate(place):
        status, output, errors = command("autoencoder", "evaluate", root, "--vae", place)
        return status, output.partition(": ")[2], errors

    status, expected, errors = evaluate(folder.parent)
    assert status == 0 and "1 image of the split test" in expected and "nan" not in expected, errors
    status, output, errors = evaluate("org/flux-small")
    assert (status, output) == (0, expected), errors
    assert "GET vae/diffusion_pytorch_model.safetensors" in requests and "GET vae/config.json" in requests
    status, _, errors = evaluate("org/nothing")
    assert status == 2 and len(errors.splitlines()) == 1 and "org/nothing: no such folder here" in errors
    server.shutdown()
    server.server_close()
    assert evaluate("org/flux-small")[:2] == (0, expected)           # without a network
    status, _, errors = evaluate("org/other")
    assert status == 2 and len(errors.splitlines()) == 1
    assert "org/other: no such folder here, and not available" in errors


def test_a_mistake_in_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/vae").mkdir(parents=True)
    (tmp_path / "runs/vae/b").write_text("b")
    asked = []
    monkeypatch.setattr(hub.huggingface_hub, "file_exists", lambda *args, **at: asked.append((*args, at["revision"])))
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda *args, **at: "/".join(args))
    assert hub.find("runs/vae", "a", "b") == Path("runs/vae/b")
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for place in ("runs/vea", "nowhere", tmp_path / "vea", "../vea", "runs/vae", "run/vae/weights/vae",
                  "org/name/radit"):
        assert hub.find(place, "a") is None and not asked
    (tmp_path / "cache/models--org--name").mkdir(parents=True)       # downloaded before: now its folders can be named
    assert hub.find("org/name/radit", "a") == Path("org/name/radit/a") and asked == [("org/name", "radit/a", None)]
    assert hub.find("org/name@v1/radit", "a") and asked[1] == ("org/name", "radit/a", "v1")


LOAD = """
import sys, huggingface_hub.constants, vae
from common import cli, hub
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096     # of a broken download it keeps whole chunks, usually of 10 MiB
for place in sys.argv[1:]:
    try:
        model = hub.load_model(vae.RadVAE, vae.VAEConfig, place)
        print(hub.fingerprint(place), model.config.widths)
    except cli.InputError as error:
        print(error)
"""


def load_all(*places, **environment):
    """What loading each place from the Hub comes to, in a process of its own: HF_ENDPOINT is read when it starts."""
    done = subprocess.run([sys.executable, "-c", LOAD, *places], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_revisions_resumed_downloads_and_what_can_be_wrong(tmp_path, hub_server):
    _, requests, drops = hub_server
    root = tmp_path / "served/org"
    for seed, name in enumerate(("good", "good@v1", "cut", "missing", "wrong")):
        torch.manual_seed(seed)
        hub.save_model(RadVAE(SMALL), root / name)
    weights = root / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "missing/model.safetensors").unlink()
    edit_config(root / "wrong", colour="blue")
    drops["model.safetensors"] = 1                                   # the first download of the first model breaks off
    lines, errors = load_all("org/good", "org/good@v1", "org/good@v2", "org/cut", "org/missing", "org/wrong",
                             "org/none", TQDM_POSITION="-1")
    assert lines[:2] == [f"{hub.fingerprint(root / name)} (4, 8)" for name in ("good", "good@v1")] and len(lines) == 7
    half = (root / "good/model.safetensors").stat().st_size // 2
    assert f"GET model.safetensors bytes={half // 4096 * 4096}-" in requests
    assert "model.safetensors: 100%" in errors                       # the progress bar, here without a terminal
    assert "org/good@v2: no such folder here, and not available" in lines[2]
    assert "model.safetensors: truncated" in lines[3]
    assert lines[4] == "org/missing: no model.safetensors; a model is a folder with config.json and model.safetensors"
    assert "colour" in lines[5] and "unknown or missing" in lines[5] and "org/none: no such folder here" in lines[6]
    seen = len(requests)
    lines, _ = load_all("org/good", "org/good@v1", "org/other", HF_HUB_OFFLINE="1")
    assert lines[:2] == [f"{hub.fingerprint(root / name)} (4, 8)" for name in ("good", "good@v1")]
    assert len(requests) == seen
    assert "org/other: no such folder here" in lines[2] and "offline" in lines[2].lower() and len(lines) == 3
