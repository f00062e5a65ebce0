"""RadiT beside diffusers' DiTTransformer2DModel: same width, depth, heads, tokens, batch and dtype, in one run.

    pip install diffusers transformers
    python benchmarks/transformer.py [--size XS] [--grid 16] [--batch 16]

Times one forward pass, and one forward and backward pass. On a CPU it is CPU time of one thread, which other programs
disturb least; on a GPU wall time. Each variant runs in a process of its own; the processes take turns over several
rounds, and the table gives the median of the rounds and their range. Compilation is over before the clock starts.
`kept` is what autograd keeps for the backward pass beside the parameters, counted from the tensors that it saves:
exact, and the same on any machine. A ratio above 1: RadiT is faster.
"""
import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from queue import Empty

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import radit
from common import cli
from common.cli import pick_device

VARIANTS = ("RadiT eager", "RadiT compiled", "DiT eager", "DiT compiled")


def build(name, args, channels=32):
    """The model on the CPU, call(model, x, t) that runs it on a batch, and the FLOPs of one image's forward pass. A
    name holds "RadiT" or "DiT", and perhaps "compiled"."""
    width, depth, heads = radit.SIZES[args.size]
    if name.startswith("RadiT"):
        config = radit.RadiTConfig(channels=channels, grid=(args.grid, args.grid), width=width, depth=depth,
                                   heads=heads)
        model = radit.RadiT(config)
        blocks, flops = model.blocks, radit.count_flops(config)

        def call(model, x, t):
            return model(x, t, torch.full_like(t, 50.0), torch.ones(len(x), 18, dtype=torch.long, device=x.device))
    else:
        from diffusers import DiTTransformer2DModel
        shape = dict(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
                     num_layers=depth, sample_size=args.grid, patch_size=1, num_embeds_ada_norm=1000,
                     norm_type="ada_norm_zero")
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
    return model, call, flops


def peak_memory(device):
    """MiB that this process needed at most: on a GPU by its allocator, on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now(device):
    """Seconds: of this process's work on a CPU; of wall time on a GPU, once it has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work, device, args):
    """The median time of args.steps calls, after args.warmup others."""
    times = []
    for _ in range(args.warmup + args.steps):
        start = now(device)
        work()
        times.append(now(device) - start)
    return statistics.median(times[args.warmup:])


def kept_bytes(work, model):
    """Bytes that autograd keeps for the backward pass of work(), beside the model's parameters: each storage once."""
    parameters, storages, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() in parameters:
            return tensor
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)                                         # or its address might be used again
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(storages.values())


def take_turns(measure, names, args):
    """name -> what measure(name, args, queue) put into the queue in each of args.rounds rounds, a list. Every run has a
    process of its own; a variant that fails (for lack of memory, say) is not tried again, and left out."""
    context, results, failed = multiprocessing.get_context("spawn"), {}, set()
    for name in list(names) * args.rounds:
        if name in failed:
            continue
        queue = context.Queue()
        process = context.Process(target=measure, args=(name, args, queue))
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(0.1)
        try:
            results.setdefault(name, []).append(queue.get(timeout=5))
        except Empty:
            print(f"{name}: failed with status {process.exitcode}, left out")
            failed.add(name)
            results.pop(name, None)
        process.join()
    return results


def spread(values, scale=1.0, digits=1):
    """"median (least to greatest)" of the rounds."""
    middle, low, high = (scale * f(values) for f in (statistics.median, min, max))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratio(theirs, ours):
    """How many times as fast ours is, in each round: the variants of one round ran next to each other."""
    return spread([a / b for a, b in zip(theirs, ours)], digits=2)


def conditions(args):
    device, bf16 = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU time of one thread"
    return (f"torch {torch.__version__}, {name}, {'bfloat16 autocast' if bf16 else 'float32'}, size {args.size}, "
            f"{args.grid ** 2} tokens, batch {args.batch}, median of {args.steps} steps; {args.rounds} rounds: median, "
            f"range")


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
    """Puts (seconds forward, seconds forward and backward, MiB kept, parameters) into the queue."""
    device, bf16 = pick_device()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, call, _ = build(name, args)
    model.to(device)
    x = torch.randn(args.batch, 32, args.grid, args.grid, device=device)
    t = torch.rand(args.batch, device=device)

    def loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return call(model, x, t).float().square().mean()

    def forward():
        with torch.no_grad():
            loss()

    def step():
        loss().backward()
        model.zero_grad(set_to_none=True)

    times = [seconds(work, device, args) for work in (forward, step)]
    queue.put((*times, kept_bytes(loss, model) / 2 ** 20, sum(p.numel() for p in model.parameters())))


def main():
    args = arguments(__doc__).parse_args()
    print(conditions(args))
    results = take_turns(measure, VARIANTS, args)
    if len(results) < len(VARIANTS):
        raise cli.RunError("not all variants ran: nothing to compare")
    columns = {name: list(zip(*rounds)) for name, rounds in results.items()}  # forward, step, kept, parameters
    print(f"{'':16}{'forward, ms':>26}{'forward and backward, ms':>30}{'kept, MiB':>12}{'parameters, M':>16}")
    for name, (forward, step, kept, parameters) in columns.items():
        print(f"{name:16}{spread(forward, 1e3):>26}{spread(step, 1e3):>30}{kept[0]:12.1f}{parameters[0] / 1e6:16.1f}")
    for ours, theirs, what in (("RadiT compiled", "DiT eager", "as they come (train.py compiles, diffusers does not)"),
                               ("RadiT eager", "DiT eager", "eager against eager"),
                               ("RadiT compiled", "DiT compiled", "compiled against compiled")):
        (forward, step, kept, _), (their_forward, their_step, their_kept, _) = columns[ours], columns[theirs]
        print(f"{what}: forward {ratio(their_forward, forward)}, forward and backward {ratio(their_step, step)} times "
              f"as fast, {kept[0] / their_kept[0]:.2f} of what is kept")


if __name__ == "__main__":
    cli.run(main)
