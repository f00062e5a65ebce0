import json

import pytest
import torch

import hub
from cli import InputError
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


def test_the_fingerprint_follows_the_weights(folder, tmp_path):
    before = hub.fingerprint(folder)
    hub.save_model(load(folder), tmp_path / "copy")
    assert hub.fingerprint(tmp_path / "copy") == before
    torch.manual_seed(1)
    hub.save_model(RadVAE(SMALL), folder)
    assert hub.fingerprint(folder) != before
