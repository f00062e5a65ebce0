"""The distances of metrics.py beside torchmetrics, scipy's sqrtm and prdc, on the same random features, in one run.

    pip install torchmetrics prdc
    python benchmarks/metrics.py [--n 5000 50000] [--width 768] [--rounds 3]

Every measurement runs alone in a process of its own; peak memory is that process's, with the features and the
library. A peer whose own matrices would not fit into half of this machine's memory is not run, and the table says so.
PRDC is timed without its standard errors, which the peer does not have.
"""
import argparse
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics
from common import cli


def two_sets(n, width):
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=rng) / width ** 0.5
    return torch.randn(n, width, generator=rng) @ mix, torch.randn(n, width, generator=rng) @ mix * 1.05 + 0.02


def sqrtm(m, a, m2, b):
    """The usual route: a general matrix square root, the imaginary part thrown away."""
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    return float((m - m2).square().sum() + (a + b).trace() - 2 * root.trace())


def torchmetrics_fid(m, a, m2, b):
    return importlib.import_module("torchmetrics.image.fid")._compute_fid(m, a, m2, b).item()


def torchmetrics_mmd(x, y):
    return importlib.import_module("torchmetrics.image.kid").poly_mmd(x.double(), y.double()).item()


def peer_prdc(x, y):
    return list(importlib.import_module("prdc").compute_prdc(x.numpy(), y.numpy(), nearest_k=5).values())


def both_gaussians(x, y):
    return *metrics.mean_and_covariance(x), *metrics.mean_and_covariance(y)


def features(x, y):
    return x, y


def our_kernel_distance(x, y):
    return metrics.kernel_distance(x, y)[0]


def our_prdc(x, y):
    return metrics.shares(x, y, 5).tolist()


# measure: (what is made ready before the clock starts, {who: function}, matrices of N x N that the peer holds)
ROUTES = {
    "Fréchet": (both_gaussians,
                {"metrics.py": metrics.frechet, "scipy sqrtm": sqrtm, "torchmetrics": torchmetrics_fid}, 0),
    "kernel distance": (features, {"metrics.py": our_kernel_distance, "torchmetrics": torchmetrics_mmd}, 3),
    "PRDC": (features, {"metrics.py": our_prdc, "prdc": peer_prdc}, 3)}


def measure(job):
    name, who, n, width = job
    prepare, functions, _ = ROUTES[name]
    functions[who](*prepare(*two_sets(200, 64)))                     # imports and first-call costs
    ready = prepare(*two_sets(n, width))
    start = time.perf_counter()
    value = functions[who](*ready)
    seconds = time.perf_counter() - start
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return seconds, peak / 1024, value


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=cli.positive, nargs="+", default=[5000, 50000])
    parser.add_argument("--width", type=cli.positive, default=768)
    parser.add_argument("--rounds", type=cli.positive, default=3, help="the fastest counts; one above 10,000 images")
    args = parser.parse_args()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    context = multiprocessing.get_context("spawn")
    for n in args.n:
        for name, (_, functions, matrices) in ROUTES.items():
            need = matrices * 8 * n * n
            ours = None
            for who in functions:
                head = f"N {n:6,}  {name:21}{who:14}"
                if who != "metrics.py" and need > memory / 2:
                    print(f"{head}not run: its matrices take {need / 2**30:.0f} GiB", flush=True)
                    continue
                runs = []
                for _ in range(args.rounds if n <= 10_000 else 1):
                    with context.Pool(1) as pool:
                        runs.append(pool.map(measure, [(name, who, n, args.width)])[0])
                seconds, peak, value = min(runs)
                ours = ours or seconds
                value = ", ".join(f"{v:.6g}" for v in (value if isinstance(value, list) else [value]))
                print(f"{head}{seconds:9.2f} s, {peak:7.0f} MiB, {seconds / ours:6.2f} times ours; value {value}",
                      flush=True)


if __name__ == "__main__":
    cli.run(main)
