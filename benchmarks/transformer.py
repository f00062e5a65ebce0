"""RadiT beside diffusers' DiTTransformer2DModel: same width, depth, heads, tokens, batch and dtype, in one run.

    pip install diffusers transformers
    python benchmarks/transformer.py [--size XS] [--grid 16] [--batch 16]

Times one forward pass, and one forward and backward pass. Each variant runs in its own process, so that its peak
memory is its own; the processes take turns over several rounds and the best round counts, so that a busy machine
does not favour one of them. Compilation is warmed up before the clock starts. A ratio above 1: RadiT is faster.
"""
import argparse
import functools
import importlib.util
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import radit
from common import cli
from common.cli import pick_device

VARIANTS = ("RadiT eager", "RadiT compiled", "DiT eager", "DiT compiled")


def build(name, args, channels=32):
    """The model on the CPU, call(model, x, t) that runs it on a batch, and the FLOPs of one image's forward pass. A
    name holds "RadiT" or "DiT", and perhaps "compiled" and "checkpointing" (a block's activations are computed again in
    backward)."""
    width, depth, heads = radit.SIZES[args.size]
    if name.startswith("RadiT"):
        config = radit.RadiTConfig(channels=channels, grid=(args.grid, args.grid), width=width, depth=depth, heads=heads)
        model = radit.RadiT(config)
        blocks, flops = model.blocks, radit.count_flops(config)

        def call(model, x, t):
            return model(x, t, torch.full_like(t, 50.0), torch.ones(len(x), 18, dtype=torch.long, device=x.device))
    else:
        from diffusers import DiTTransformer2DModel
        shape = dict(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, num_layers=depth,
                     sample_size=args.grid, patch_size=1, num_embeds_ada_norm=1000, norm_type="ada_norm_zero")
        model = DiTTransformer2DModel(**shape)
        blocks = model.transformer_blocks

        def call(model, x, t):
            return model(x, (t * 1000).long(), torch.ones(len(x), dtype=torch.long, device=x.device)).sample

        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(DiTTransformer2DModel(**shape), torch.empty(1, channels, args.grid, args.grid), torch.empty(1))
        flops = counter.get_total_flops()
    for block in blocks:
        if "compiled" in name:
            block.forward = torch.compile(block.forward, fullgraph=True)
        if "checkpointing" in name:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model, call, flops


def peak_memory(device):
    """MiB that this process needed at most: on a GPU by its allocator, on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(work, device, args):
    """The median time of args.steps calls, after args.warmup others."""
    times = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[args.warmup:])[args.steps // 2]


def take_turns(measure, names, args):
    """name -> the numbers that measure(name, args, queue) puts into the queue, of each the least of args.rounds rounds.
    Every run has a process of its own; one that fails (memory, say) is tried no more, and its name left out."""
    context, best, failed = multiprocessing.get_context("spawn"), {}, set()
    for name in list(names) * args.rounds:
        if name in failed:
            continue
        queue = context.Queue()
        process = context.Process(target=measure, args=(name, args, queue))
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(0.1)
        if queue.empty():
            print(f"{name}: failed with status {process.exitcode}, left out")
            failed.add(name)
            best.pop(name, None)
            continue
        result = queue.get()
        process.join()
        best[name] = tuple(map(min, zip(result, best.get(name, result))))
    return best


def conditions(args):
    device, bf16 = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (f"torch {torch.__version__}, {name}, {'bfloat16 autocast' if bf16 else 'float32'}, size {args.size}, "
            f"{args.grid ** 2} tokens, batch {args.batch}, median of {args.steps} steps, best of {args.rounds} rounds")


def arguments(description):
    """The parser that both benchmarks share."""
    parser = cli.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=radit.SIZES, default="XS")
    parser.add_argument("--grid", type=cli.positive, default=8, help="tokens on each side")
    parser.add_argument("--batch", type=cli.positive, default=64)
    parser.add_argument("--steps", type=cli.positive, default=10)
    parser.add_argument("--warmup", type=cli.positive, default=4)
    parser.add_argument("--rounds", type=cli.positive, default=3)
    if not importlib.util.find_spec("diffusers"):
        parser.error("diffusers, which this compares with, is not installed")
    return parser


def measure(name, args, queue):
    """Puts (seconds forward, seconds forward and backward, peak MiB above the start, parameters) into the queue."""
    device, bf16 = pick_device()
    torch.manual_seed(0)
    model, call, _ = build(name, args)
    model.to(device)
    x, t = torch.randn(args.batch, 32, args.grid, args.grid, device=device), torch.rand(args.batch, device=device)
    before = 0 if device.type == "cuda" else peak_memory(device)

    def forward():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            call(model, x, t)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = call(model, x, t).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    times = [seconds(work, device, args) for work in (forward, step)]
    queue.put((*times, peak_memory(device) - before, sum(p.numel() for p in model.parameters())))


def main():
    args = arguments(__doc__).parse_args()
    print(conditions(args))
    best = take_turns(measure, VARIANTS, args)
    if len(best) < len(VARIANTS):
        raise SystemExit("not all of them ran: nothing to compare")
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
