"""--fp8: which layers are converted, what is refused, and, where torchao is installed, its emulation on a CPU."""
import pytest
import torch

import radit
from common.cli import InputError
from training import float8


@pytest.mark.parametrize("installed, compiled, capability, dry_run, message", [
    (False, True, (9, 0), False, "pip install torchao"), (True, False, (9, 0), False, "--fp8 needs --compile"),
    (True, True, None, False, "8.9 or later, and there is no GPU here"), (True, True, None, True, None),
    (True, True, (8, 0), False, "8.9 or later, and this one has 8.0"), (True, True, (8, 0), True, "this one has 8.0"),
    (True, True, (8, 9), False, None), (True, True, (10, 0), False, None)])
def test_what_is_missing_is_named(monkeypatch, installed, compiled, capability, dry_run, message):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if message is None:
        return float8.check(compiled, dry_run)
    with pytest.raises(InputError, match=message):
        float8.check(compiled, dry_run)


def test_tokens_of_a_micro_batch():
    float8.check_tokens(1024)
    with pytest.raises(InputError, match="a multiple of 16 tokens at a time, not 36: change --batch or --accumulate"):
        float8.check_tokens(36)


@pytest.mark.parametrize("more, message", [
    (["--compile", "--fp8"], "--fp8 needs "), (["--fp8", "--init", "nowhere", "--lora-rank", "4"], "--lora-rank 4"),
    (["--fp8", "--model", "radunet"], "--model radunet: --fp8 works for RadiT only")])
def test_the_command_refuses_in_one_line(command, tmp_path, more, message):
    """Without a GPU, or without torchao."""
    if torch.cuda.is_available() and more[0] == "--compile":
        pytest.skip("a GPU is here")
    status, _, errors = command("train.py", "radit", "--data", "nowhere", "--pixels", "--out", tmp_path / "run", *more)
    assert status == 2 and message in errors.splitlines()[-1] and not (tmp_path / "run").exists()


def test_the_blocks_products_are_emulated():
    """Of 8 bits, 3 of them behind the point: the output is near that without, and not it; names stay, adaLN too."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    model = radit.RadiT(radit.RadiTConfig(channels=4, grid=(4, 4), width=64, depth=2, heads=2))
    for block in model.blocks:
        torch.nn.init.normal_(block.adaln.weight, std=0.1)           # zero at the start: the block would do nothing
    torch.nn.init.normal_(model.final.weight, std=0.1)
    names, inputs = list(model.state_dict()), (torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([40.0, 60.0]),
                                               torch.ones(2, 18, dtype=torch.long))
    expected = model(*inputs)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.blocks.parameters()]
    model.zero_grad()
    for block in model.blocks:
        float8.convert(block, emulate=True)
    found = model(*inputs)
    found.square().sum().backward()
    assert list(model.state_dict()) == names
    converted = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert converted == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out", "up", "down")]
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1
    for p, gradient in zip(model.blocks.parameters(), gradients):
        assert torch.cosine_similarity(p.grad.flatten(), gradient.flatten(), dim=0) > 0.95
