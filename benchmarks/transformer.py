"""RadiT beside diffusers' DiTTransformer2DModel: same width, depth, heads, tokens, batch and dtype, in one run.

    pip install diffusers transformers
    python benchmarks/transformer.py [--size XS] [--grid 16] [--batch 16]

Times one forward pass, and one forward and backward pass. Each variant runs in its own process, so that its peak
memory is its own; the processes take turns over several rounds and the best round counts, so that a busy machine
does not favour one of them. Compilation is warmed up before the clock starts. A ratio above 1: RadiT is faster.
"""
import argparse
import importlib.util
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import radit
from parallel import pick_device

VARIANTS = ("RadiT eager", "RadiT compiled", "DiT eager", "DiT compiled")


def build(name, args):
    """The model, and call(model, x, t) that runs it on a batch."""
    width, depth, heads = radit.SIZES[args.size]
    if name.startswith("RadiT"):
        model = radit.RadiT(radit.RadiTConfig(channels=32, grid=(args.grid, args.grid), width=width, depth=depth, heads=heads))
        age, codes = torch.full((args.batch,), 50.0), torch.ones(args.batch, 18, dtype=torch.long)
        if name.endswith("compiled"):
            for block in model.blocks:
                block.compile(fullgraph=True)
        return model, lambda model, x, t: model(x, t, age.to(x.device), codes.to(x.device))
    from diffusers import DiTTransformer2DModel
    model = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=32, num_layers=depth,
                                  sample_size=args.grid, patch_size=1, num_embeds_ada_norm=1000, norm_type="ada_norm_zero")
    if name.endswith("compiled"):
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)
    labels = torch.ones(args.batch, dtype=torch.long)
    return model, lambda model, x, t: model(x, (t * 1000).long(), labels.to(x.device)).sample


def measure(name, args, queue):
    """Puts (seconds forward, seconds forward and backward, peak MiB above the start, parameters) into the queue."""
    device, bf16 = pick_device()
    torch.manual_seed(0)
    model, call = build(name, args)
    model.to(device)
    x, t = torch.randn(args.batch, 32, args.grid, args.grid, device=device), torch.rand(args.batch, device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def forward():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            call(model, x, t)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = call(model, x, t).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    seconds = []
    for work in (forward, step):
        times = []
        for i in range(args.warmup + args.steps):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds.append(sorted(times[args.warmup:])[args.steps // 2])  # the median
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 20
    else:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    queue.put((*seconds, peak, sum(p.numel() for p in model.parameters())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=radit.SIZES, default="XS")
    parser.add_argument("--grid", type=int, default=8, help="tokens on each side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not importlib.util.find_spec("diffusers"):
        parser.error("diffusers, which this compares with, is not installed")
    device, bf16 = pick_device()
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {hardware}, {'bfloat16 autocast' if bf16 else 'float32'}, size {args.size}, "
          f"{args.grid ** 2} tokens, batch {args.batch}, median of {args.steps} steps, best of {args.rounds} rounds")
    context, best = multiprocessing.get_context("spawn"), {}
    for _ in range(args.rounds):
        for name in VARIANTS:
            queue = context.Queue()
            process = context.Process(target=measure, args=(name, args, queue))
            process.start()
            result = queue.get()
            process.join()
            best[name] = tuple(map(min, zip(result, best.get(name, result))))
    print(f"{'':16}{'forward':>12}{'fwd + bwd':>12}{'peak memory':>14}{'parameters':>14}")
    for name in VARIANTS:
        forward, step, peak, parameters = best[name]
        print(f"{name:16}{forward * 1e3:9.1f} ms{step * 1e3:9.1f} ms{peak:10.0f} MiB{parameters / 1e6:12.1f} M")
    for ours, theirs, what in (("RadiT compiled", "DiT eager", "each as it comes (train.py compiles, diffusers does not)"),
                               ("RadiT eager", "DiT eager", "eager against eager"),
                               ("RadiT compiled", "DiT compiled", "compiled against compiled")):
        ratios = [best[theirs][i] / best[ours][i] for i in (0, 1)]
        print(f"{what}: forward {ratios[0]:.2f}, forward and backward {ratios[1]:.2f} times as fast, "
              f"{best[ours][2] / best[theirs][2]:.2f} of the memory")


if __name__ == "__main__":
    main()
