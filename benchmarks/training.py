"""Whole training steps of RadiT beside diffusers' DiT of the same shape: images/s, FLOP/s as a share of what the
device's matrix products reach in the same run, peak memory; compiled and not, with --recompute and without, and with
--fp8 where float8 works.

    pip install diffusers transformers
    python benchmarks/training.py --size XL --grid 32 --batch 16 [--channels 128] [--steps 10] [--rounds 3]

A step is loss, backward, clipping, fused AdamW and the EMA in float32, on data that lie ready. RadiT's blocks are
treated as train.py treats them (parallel.Layout). The FLOPs of a training image are three times its forward pass's, by
structure (radit.count_flops; for DiT torch's counter): what --recompute computes twice counts once. The matrix rate is
that of square products in the dtype of the training: the best on a CPU; on a GPU, which slows down when it is hot, over
two seconds of products without a pause. On a CPU all times are CPU time of one thread. The variants take turns in
processes of their own; the table gives the median of the rounds and their range.
"""
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from transformer import arguments, build, conditions, now, peak_memory, ratio, seconds, spread, take_turns

import flow
from common import cli
from training import float8, parallel

VARIANTS = ("RadiT compiled", "RadiT compiled, recompute", "RadiT compiled, fp8", "RadiT eager",
            "RadiT eager, recompute", "DiT compiled", "DiT eager")
MATRIX = "matrix products"


def matrix_seconds(device, bf16):
    """Seconds a FLOP of square matrix products, the least of several sizes."""
    best = float("inf")
    for side in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        a @ b
        times, start = [], now(device)
        while sum(times) < (2 if device.type == "cuda" else 1):
            a @ b
            times.append(now(device) - start - sum(times))
        each = sum(times) / len(times) if device.type == "cuda" else min(times)
        best = min(best, each / (2 * side ** 3))
    return best


def measure(name, args, queue):
    """Puts (seconds a step, FLOPs of a training image, peak MiB) into the queue; for MATRIX (seconds a FLOP,)."""
    device, bf16 = cli.pick_device()
    torch.set_num_threads(1)
    if name == MATRIX:
        return queue.put((matrix_seconds(device, bf16),))
    torch.manual_seed(0)
    model, call, flops = build(name.split()[0], args, args.channels)
    blocks = model.blocks if "RadiT" in name else model.transformer_blocks
    parallel.set_up(model, 0, bf16, parallel.Layout(compiled=blocks if "compiled" in name else (),
                                                    recomputed=blocks if "recompute" in name else (),
                                                    float8=blocks if "fp8" in name else ()))
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    x = torch.randn(args.batch, args.channels, args.grid, args.grid, device=device)
    rng = torch.Generator(device).manual_seed(0)

    def step():
        noise, t = torch.randn(x.shape, generator=rng, device=device), flow.sample_times(len(x), 1.0, rng)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = flow.flow_loss(lambda x, t: call(model, x, t), x, noise, t)[0].mean()
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
    variants = VARIANTS
    try:
        float8.check(compiled=True)
    except cli.InputError as why:
        print(f"without RadiT compiled, fp8: {why}")
        variants = [name for name in VARIANTS if "fp8" not in name]
    results = take_turns(measure, (MATRIX, *variants), args)
    rate = 1 / statistics.median(seconds for seconds, in results.pop(MATRIX))
    print(f"matrix products: {rate / 1e12:.4g} TFLOP/s\n"
          f"{'':32}{'images/s':>26}{'model TFLOP/s':>16}{'of that rate':>14}{'peak memory':>14}")
    for name, rounds in results.items():
        flops = statistics.median(args.batch * flops / median for median, flops, _ in rounds)
        print(f"{name:32}{spread([args.batch / median for median, *_ in rounds], digits=2):>26}{flops / 1e12:16.4g}"
              f"{flops / rate:14.1%}{max(peak for *_, peak in rounds):10.0f} MiB")
    for ours, theirs in (("RadiT compiled", "DiT compiled"), ("RadiT compiled, fp8", "DiT compiled"),
                         ("RadiT eager", "DiT eager")):
        if ours in results and theirs in results:
            pair = [[median for median, *_ in results[name]] for name in (theirs, ours)]
            print(f"{ours} is {ratio(*pair)} times as fast as {theirs}")
    if cli.pick_device()[0].type == "cpu":
        print("Peak memory is of the whole process, torch included. A GPU's figures: not measured.")


if __name__ == "__main__":
    cli.run(main)
