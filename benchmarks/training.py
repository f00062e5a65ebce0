"""Whole training steps of RadiT beside diffusers' DiT of the same shape: images/s, FLOP/s as a share of what the
device's matrix products reach in the same run, peak memory; compiled and not, with and without activation
checkpointing.

    pip install diffusers transformers
    python benchmarks/training.py --size XL --grid 32 --batch 16 [--channels 128] [--steps 10] [--rounds 3]

A step is loss, backward, clipping, fused AdamW and the EMA in float32, on data that lie ready. The FLOPs of a training
image are three times its forward pass's, by structure (radit.count_flops; for DiT torch's counter): what checkpointing
computes twice counts once. The matrix rate is the best of square products in the dtype of the training. Each variant
runs in its own process, in turns over several rounds, and the best round counts; compilation is over before the clock
starts.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from transformer import (arguments, build, conditions, peak_memory,
                         pick_device, seconds, take_turns)

import flow
from common import cli

VARIANTS = ("RadiT compiled", "RadiT compiled, checkpointing", "RadiT eager", "RadiT eager, checkpointing",
            "DiT compiled", "DiT eager")
MATRIX = "matrix products"


def matrix_seconds(device, bf16):
    """Seconds a FLOP of the fastest square matrix product, the best of several sizes and repetitions."""
    best = float("inf")
    for side in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for _ in range(12):
            start = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - start) / (2 * side ** 3))
    return best


def measure(name, args, queue):
    """Puts (seconds a step, FLOPs of a training image, peak MiB) into the queue; for MATRIX (seconds a FLOP,)."""
    device, bf16 = pick_device()
    if name == MATRIX:
        return queue.put((matrix_seconds(device, bf16),))
    torch.manual_seed(0)
    model, call, flops = build(name, args, args.channels)
    model.to(device)
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    x = torch.randn(args.batch, args.channels, args.grid, args.grid, device=device)
    rng = torch.Generator(device).manual_seed(0)

    def step():
        noise, t = torch.randn(x.shape, generator=rng, device=device), flow.sample_times(len(x), 1.0, rng)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = flow.flow_loss(lambda x, t: call(model, x, t), x, noise, t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.001)

    median = seconds(step, device, args)
    queue.put((median, 3 * flops, peak_memory(device)))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--channels", type=cli.positive, default=128, help="of a token; 128 are FLUX.2's latents")
    args = parser.parse_args()
    print(f"{conditions(args)}, {args.channels} channels")
    best = take_turns(measure, (MATRIX, *VARIANTS), args)
    rate = 1 / best[MATRIX][0]
    print(f"measured rate of matrix products: {rate / 1e12:.4g} TFLOP/s\n"
          f"{'':32}{'images/s':>10}{'model TFLOP/s':>16}{'of that rate':>14}{'peak memory':>14}")
    for name in [name for name in VARIANTS if name in best]:
        median, flops, peak = best[name]
        images = args.batch / median
        print(f"{name:32}{images:10.2f}{images * flops / 1e12:16.4g}{images * flops / rate:14.1%}{peak:10.0f} MiB")
    if pick_device()[0].type == "cpu":
        print("Peak memory is of the whole process, torch included. These are a CPU's figures: a GPU's are not measured.")


if __name__ == "__main__":
    cli.run(main)
