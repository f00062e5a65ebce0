"""Adapters on a small decoder, beside peft's."""
import copy
import json

import pytest
import safetensors.torch
import torch

from autoencoder import lora
from autoencoder.load import copy_vae, load_vae
from common import cli, hub
from vae import RadVAE, VAEConfig

TARGETS = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def base(tmp_path):
    """A base on disk with random weights and statistics: its folder."""
    torch.manual_seed(0)
    model = RadVAE(VAEConfig(3, 4, (8, 16), 1, 4))
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    hub.save_model(model, tmp_path / "base")
    return tmp_path / "base"


def adapted(folder, rank=4, alpha=8, seed=1):
    """The base with adapters that do something."""
    model = load_vae(folder)
    lora.add(model, rank, alpha)
    torch.manual_seed(seed)
    for adapter in lora.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_equals_peft(base):
    peft = pytest.importorskip("peft")
    model, z = adapted(base), torch.randn(2, 16, 4, 6)
    peer = load_vae(base)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), peer.decoder)
    theirs = {name: module for name, module in peer.decoder.named_modules() if hasattr(module, "lora_A")}
    ours = lora.adapters(model)
    assert ours.keys() == theirs.keys() and len(ours) == 20
    for name, adapter in ours.items():
        theirs[name].lora_A["default"].weight.copy_(adapter.A)       # raises if the shape is another
        theirs[name].lora_B["default"].weight.copy_(adapter.B.view_as(theirs[name].lora_B["default"].weight))
    plain = load_vae(base).decode(z)
    assert (model.decode(z) - plain).abs().mean() > 0.01             # the adapters matter
    assert torch.allclose(model.decode(z), peer.decode(z), atol=1e-5)
    lora.merge(model)
    for name, module in theirs.items():
        module.merge()
        assert torch.allclose(model.decoder.get_submodule(name).weight, module.weight, atol=1e-6), name
    assert torch.allclose(model.decode(z), peer.decode(z), atol=1e-5)


def test_training_starts_at_the_base_and_moves_only_the_adapters(base):
    model = load_vae(base)
    before, x, noise = bits(model), torch.randn(2, 1, 16, 16), torch.randn(2, 16, 4, 4)
    reconstruction = model(x, noise)[0]                              # in eval mode
    lora.add(model, rank=4, alpha=8)
    assert torch.equal(model.eval()(x, noise)[0], reconstruction)
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learnt) == sum(p.numel() for a in lora.adapters(model).values() for p in (a.A, a.B))
    average = copy.deepcopy(model)                                   # as the training loop does
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(5):
        loss = (model(x, noise)[0] - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(a.A.abs().max() > 0 and a.B.abs().max() > 0 for a in lora.adapters(model).values())
    assert torch.equal(average.eval()(x, noise)[0], reconstruction)  # the copy did not move
    after = {name.replace("parametrizations.weight.original", "weight"): tensor
             for name, tensor in bits(model).items()}
    assert all(torch.equal(after[name], before[name]) for name in before)  # encoder, statistics, frozen W


@torch.no_grad()
def test_merge_and_unmerge_are_exact(base):
    model, z = adapted(base), torch.randn(2, 16, 4, 4)
    original, state, image = bits(load_vae(base)), bits(model), model.decode(z)
    replaced = lora.merge(model)
    assert bits(model).keys() == original.keys()                     # ordinary layers, under their own names
    assert torch.equal(model.decode(z), image)
    assert not torch.equal(model.decoder.conv_in.weight, original["decoder.conv_in.weight"])
    with pytest.raises(cli.InputError, match="adapters already"):
        lora.add(model, 4, 8)
    lora.unmerge(model, replaced)
    assert all(torch.equal(tensor, state[name]) for name, tensor in bits(model).items())
    assert torch.equal(model.decode(z), image)
    assert torch.equal(model.decoder.conv_in.parametrizations.weight.original, original["decoder.conv_in.weight"])


@torch.no_grad()
def test_saved_adapters_load_onto_their_base(base, tmp_path):
    model, x = adapted(base, rank=2, alpha=3), torch.randn(2, 1, 16, 16)
    lora.save(model, tmp_path / "adapters")
    again = load_vae(base)
    lora.load(again, tmp_path / "adapters")
    for name, adapter in lora.adapters(model).items():
        other = lora.adapters(again)[name]
        assert (other.rank, other.alpha) == (2, 3) and torch.equal(other.A, adapter.A.bfloat16().float())
        assert torch.equal(other.B, adapter.B.bfloat16().float())
    # Beside the base they are part of the VAE, whose encoder and fingerprint stay those of the base.
    copy_vae(base, tmp_path / "both")
    lora.save(model, tmp_path / "both")
    copy_vae(tmp_path / "both", tmp_path / "copy")
    both, plain = load_vae(tmp_path / "copy"), load_vae(base)
    assert both.fingerprint == plain.fingerprint and torch.equal(both.encode(x)[0], plain.encode(x)[0])
    z = plain.encode(x)[0]
    assert torch.allclose(both.decode(z), again.decode(z), atol=1e-6)
    assert not torch.allclose(both.decode(z), plain.decode(z), atol=1e-2)


def test_another_base_or_damaged_adapters_are_refused(base, tmp_path):
    model, folder = adapted(base), tmp_path / "adapters"

    def refused(message, where=base):
        with pytest.raises(cli.InputError, match=message):
            lora.load(load_vae(where), folder)

    refused("two files")
    lora.save(model, folder)
    torch.manual_seed(5)
    hub.save_model(RadVAE(model.config), tmp_path / "other")
    refused("trained on the base .* and this one is", tmp_path / "other")
    about = json.loads((folder / "lora.json").read_text())
    tensors = safetensors.torch.load_file(folder / "lora.safetensors")
    for change in ({"rank": 0}, {"rank": "many"}, {"alpha": None}):
        (folder / "lora.json").write_text(json.dumps(about | change))
        refused("damaged")
    (folder / "lora.json").write_text(json.dumps(about))
    for change in ({"conv_in.A": tensors["conv_in.A"][:3]}, {"conv_in.C": tensors["conv_in.A"].clone()}):
        safetensors.torch.save_file(tensors | change, folder / "lora.safetensors")
        refused(f"{next(iter(change))} is missing, unknown or of another shape")
    del tensors["up_blocks.0.resnets.1.conv1.B"]
    safetensors.torch.save_file(tensors, folder / "lora.safetensors")
    refused("up_blocks.0.resnets.1.conv1.B is missing")
    (folder / "lora.safetensors").write_bytes(b"half")
    refused("damaged")


def test_adapters_of_flux2_are_a_few_megabytes():
    with torch.device("meta"):
        model = RadVAE(VAEConfig(channels=3))
        lora.add(model, rank=32, alpha=32)
    expected = 0
    for name, layer in model.decoder.named_modules():
        if name.split(".")[-1] in TARGETS or name.endswith("to_out.0"):
            out, *rest = layer.weight.shape
            expected += 32 * (out + torch.Size(rest).numel())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == expected and 2 * count < 10e6                    # bytes in bfloat16
