"""What the plan computes, beside what is really there: saved tensors, optimizer state, shards, files."""
import argparse
import copy
import re

import phantom
import pytest
import torch
from conftest import ROOT
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

import data
import radit
import vae
from autoencoder import latents
from common import cli
from radiographs import fields
from training import __main__ as command_line
from training import parallel, plan

# 576 tokens: fused attention, as on a GPU
SMALL = radit.RadiTConfig(channels=4, grid=(24, 24), width=256, depth=2, heads=4)


def compiled_or_recomputed(model, kept):
    for block in model.blocks:
        if "compiled" in kept:
            block.compile(fullgraph=True, backend="aot_eager_decomp_partition")  # what inductor keeps, without its code
        if kept == "eager, recomputed":
            block.forward = (lambda forward: lambda *x: recompute(forward, *x, use_reentrant=False))(block.forward)
    return model


def budget(kept):
    """A context with the memory budget that parallel.set_up sets."""
    return torch._functorch.config.patch(
        activation_memory_budget=parallel.BUDGET if kept == "compiled, recomputed" else 1.0)


def saved_bytes(cfg, images, kept, bf16):
    """Bytes of the storages that autograd keeps between forward and backward, without parameters and their copies."""
    model = compiled_or_recomputed(radit.RadiT(cfg), kept)
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    storages, alive = {}, []

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:                        # not a parameter, nor its copy in bfloat16
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)                                     # or its address might be used again
        return tensor

    age, codes = fields.encode_metadata([{"age": 50.0}] * images)
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(torch.randn(images, cfg.channels, *cfg.grid), torch.rand(images), age, codes)
    return sum(storages.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kept", [pytest.param(kept, marks=pytest.mark.slow if "compiled" in kept else ())
                                  for kept in plan.KEPT])
def test_activations_are_those_that_autograd_keeps(kept, bf16):
    torch._dynamo.reset()
    expected = plan.activations(SMALL, 3, kept, bf16)
    if "recomputed" in kept:  # autograd never keeps the block that is computed again
        expected -= 3 * plan.kept_by_block(SMALL, kept.split(",")[0], bf16)
    with budget(kept):
        found = saved_bytes(SMALL, 3, kept, bf16)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_operations_are_those_that_torch_counts():
    """Backward's within the memory budget, less those of the default."""
    flops = []
    for kept in ("compiled", "compiled, recomputed"):
        torch._dynamo.reset()
        model = compiled_or_recomputed(radit.RadiT(SMALL), kept)
        age, codes = fields.encode_metadata([{"age": 50.0}] * 3)
        with budget(kept), torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(3, 4, 24, 24), torch.rand(3), age, codes)
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == pytest.approx(3 * plan.recomputed_flops(SMALL, "compiled, recomputed"), rel=0.02)


def test_state_is_what_an_optimizer_holds():
    model = radit.RadiT(SMALL)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    age, codes = fields.encode_metadata([{"age": 50.0}])
    model(torch.randn(1, 4, 24, 24), torch.rand(1), age, codes).sum().backward()
    optimizer.step()

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    planned = plan.state(SMALL, 1, fsdp=False)
    assert planned["weights, float32"] == size(model.parameters())
    assert planned["2 EMAs, float32"] == 2 * size(average.parameters())
    assert planned["gradients, float32"] == size(p.grad for p in model.parameters())
    assert planned["copies to compute with"] == size(p.bfloat16() for p in model.parameters())
    assert planned["AdamW's moments, float32"] == size(m for s in optimizer.state.values()
                                                       for m in (s["exp_avg"], s["exp_avg_sq"]))


def test_shards_are_those_of_fully_shard():
    """torch's own splitting among four processes, of which three are make-believe."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (4,))
        model = radit.RadiT(SMALL)
        blocks = sum(p.nbytes for p in model.blocks[0].parameters())
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        held = sum(p.to_local().nbytes for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    planned, alone = plan.state(SMALL, 4, fsdp=True), plan.state(SMALL, 1, fsdp=True)
    assert planned["weights, float32"] == pytest.approx(held, rel=0.01)  # rows that four does not divide are padded
    whole = 4 * radit.count_parameters(SMALL)
    # two blocks in bfloat16, the rest in float32
    assert planned["copies to compute with"] == blocks + (whole - 2 * blocks)
    assert alone["gradients, float32"] - planned["gradients, float32"] == whole * 3 / 4


def test_latents_on_disk(tmp_path):
    """One shard of a small VAE's latents."""
    phantom.write_source(tmp_path / "phantom", 6)
    torch.manual_seed(0)
    model = vae.RadVAE(vae.VAEConfig(1, 2, (8, 8), 1, 4))
    model.fingerprint = "small"
    latents.encode([tmp_path / "phantom"], model, tmp_path / "latents")
    count = len(data.Radiographs([tmp_path / "phantom"]))
    header = 200                                                     # of safetensors, at most
    size = (tmp_path / "latents/00000.safetensors").stat().st_size
    assert 0 <= size - count * plan.latent_bytes(radit.RadiTConfig(channels=8, grid=(8, 8))) <= header


def test_time_and_steps_by_hand():
    """The paper's XL: 1.6e12 tokens are 1.5625e9 images of 1,024; at 1e15 FLOP/s on 64 GPUs."""
    p = plan.Plan(radit.RadiTConfig(width=1536, depth=31, heads=12), 1.6e12, 64, 1000, 1, peak=2e15, utilisation=0.5,
                  decoder=0)
    assert p.images == 1_562_500_000 and p.steps == 1_562_500
    assert p.flops == 3 * radit.count_flops(p.cfg) * 1_562_500_000
    assert p.gpu_hours("compiled") == pytest.approx(p.flops / 1e15 / 3600)
    assert p.gpu_hours("eager, recomputed") == pytest.approx(p.gpu_hours("compiled") * 4 / 3)
    # out D x D and up D x 2 H, two operations each, in 31 blocks
    again = 31 * 2 * 1024 * (1536 ** 2 + 2 * 1536 * 4096) * 1_562_500_000
    assert p.gpu_hours("compiled, recomputed") == pytest.approx((p.flops + again) / 1e15 / 3600)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["training", "plan", *arguments])
    command_line.main()


def test_the_command_builds_no_weights(monkeypatch, capsys):
    monkeypatch.setattr(radit.RadiT, "__init__", None)
    run(monkeypatch, "--size", "XL", "--tokens", "1.6e12", "--gpus", "64")
    output = capsys.readouterr().out
    assert "1,562,500,000 of 1,024 tokens" in output and "fits" in output and "not measured" in output
    assert f"{radit.count_parameters(radit.RadiTConfig(width=1536, depth=31, heads=12)):,}" in output


@pytest.mark.parametrize("batch, gpus, more, said", [
    (1024, 64, [], "fits: DDP, compiled (no option needed)"), (1024, 8, [], "fits: DDP, compiled (--accumulate 8)"),
    (64, 1, ["--memory", "16"], "does not fit, whatever --accumulate"),
    (64, 64, ["--memory", "16"], "fits: FSDP, compiled (--fsdp)"),
    (1024, 64, ["--memory", "4.5"], "fits: FSDP, compiled (--fsdp --accumulate 16)"),
    (64, 64, ["--memory", "3"], "fits: FSDP, compiled (--fsdp --recompute)")])
def test_what_fits(monkeypatch, capsys, batch, gpus, more, said):
    run(monkeypatch, "--batch", str(batch), "--gpus", str(gpus), *more)
    assert said in capsys.readouterr().out


def test_an_advice_followed_needs_no_other(monkeypatch, capsys):
    run(monkeypatch, "--gpus", "8", "--accumulate", "8")
    assert "fits: DDP, compiled (--accumulate 8)" in capsys.readouterr().out


ROWS = re.findall(r"\| `(--size .*?)` \| (.*) \|", (ROOT / "training/README.md").read_text())


@pytest.mark.parametrize("options, figures", ROWS)
def test_the_table_in_the_readme_is_what_the_plan_says(options, figures):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    p = plan.make(parser.parse_args(options.split()))
    hours = p.gpu_hours("compiled")
    memory = p.memory(False, "compiled") / 1e9
    assert figures == f"{p.images:,} | {p.steps:,} | {memory:.1f} | {hours:,.1f} | {hours / p.gpus / 24:.1f}"
    assert plan.advice(p, 80e9).startswith("fits: DDP, compiled")


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "many"], "many"), (["--tokens", "-1"], "'-1' is not a number from 1 to 1e+18"),
    (["--tokens", "nan"], "'nan' is not a number"), (["--utilisation", "40"], "'40' is not a number from 0.001 to 1"),
    (["--gpus", "0"], "'0' is not a whole number from 1 to"),
    (["--gpus", "7"], "--batch 1024 cannot be split evenly among 7 GPUs x 1 parts"),
    (["--side", "500"], "--side 500 is not a multiple of 16 pixels"), (["--size", "M"], "'XL'")])
def test_bad_values_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["training", "plan", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.run(command_line.main)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and len(errors.splitlines()) == 1 and message in errors
