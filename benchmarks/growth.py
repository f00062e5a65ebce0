"""How cost grows with work: seconds for several amounts of it, and the exponent p of seconds ~ amount^p.

    python benchmarks/growth.py [--images 50] [--rounds 3]

For preparing and encoding in images, for training and sampling in images and in tokens of an image, for the Frechet
distance and PRDC in images; amounts are 1, 2, 4 and 8 times the smallest. CPU time, the least of the rounds, which take
turns. The exponent is the slope of a straight line through log(seconds) against log(amount): 1 is in proportion; below
1 a part is paid once; attention and pairwise distances go towards 2. Models are small and have random weights: how the
cost grows is measured here, not how fast anything is.
"""
import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import flow
import metrics
import radit
import sample
import vae
from autoencoder import latents
from autoencoder.load import load_vae
from common import cli, hub

FACTORS = (1, 2, 4, 8)


def spent():
    """Seconds of CPU time so far, of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def exponent(amounts, seconds):
    """The least-squares slope of log(seconds) against log(amounts)."""
    x, y = np.log(amounts), np.log(seconds)
    return float(np.polyfit(x, y, 1)[0])


def prepare_work(folder, count):
    """Preparing `count` 8-bit PNGs of 512x512 to 64x64, by one worker process."""
    source = folder / f"source{count}"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (512, 512), dtype=np.uint8)).save(source / f"{i}.png")
    runs = iter(range(10 ** 6))
    return lambda: data.prepare("folder", source, folder / f"prepared{count}-{next(runs)}", size=64)


def encode_work(folder, count):
    """Encoding `count` prepared images with a small VAE; prepare_work has run before."""
    if not (folder / "vae").exists():
        hub.save_model(vae.RadVAE(vae.VAEConfig(1, 4, (8, 16), 1, 4)), folder / "vae")
    model, runs = load_vae(folder / "vae"), iter(range(10 ** 6))
    return lambda: latents.encode([folder / f"prepared{count}-0"], model, folder / f"latents{count}-{next(runs)}")


def network(side):
    """A RadiT of side x side tokens."""
    torch.manual_seed(0)
    return radit.RadiT(radit.RadiTConfig(channels=1, grid=(side, side), width=128, depth=2, heads=2))


def train_work(count, side):
    """Forward and backward pass of `count` images of side x side tokens, eight at a time."""
    model, rng = network(side), torch.Generator().manual_seed(0)
    batch = min(8, count)
    x, age = torch.randn(batch, 1, side, side), torch.full((batch,), 50.0)
    codes = torch.ones(batch, 18, dtype=torch.long)

    def work():
        for _ in range(count // batch):
            t = flow.sample_times(batch, 1.0, rng)
            flow.flow_loss(lambda x, t: model(x, t, age, codes), x, torch.randn_like(x), t)[0].mean().backward()
            model.zero_grad(set_to_none=True)
    return work


def sample_work(count, side):
    """Sampling `count` images of side x side tokens in four steps."""
    model = network(side).eval().requires_grad_(False)
    return lambda: sample.generate(model, None, [{}] * count, list(range(count)), steps=4, batch=8, bf16=False)


def distance_work(function, count):
    """A measure of two sets of `count` feature vectors of 192 dimensions."""
    a, b = torch.randn(2, count, 192, generator=torch.Generator().manual_seed(0))
    return lambda: function(a, b)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=cli.integer(1, 10 ** 5), default=50, help="the smallest amount")
    parser.add_argument("--rounds", type=cli.integer(1, 1000), default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        n, batches = args.images, 8 * max(1, args.images // 8)
        rows = {
            "prepare, images": [(n * f, prepare_work(folder, n * f)) for f in FACTORS],
            "encode, images": [(n * f, encode_work(folder, n * f)) for f in FACTORS],
            "train, images": [(batches * f, train_work(batches * f, 8)) for f in FACTORS],
            "train, tokens of an image": [(16 * f * f, train_work(8, 4 * f)) for f in FACTORS],
            "sample, images": [(batches * f, sample_work(batches * f, 8)) for f in FACTORS],
            "sample, tokens of an image": [(16 * f * f, sample_work(8, 4 * f)) for f in FACTORS],
            "Frechet distance, images": [(10 * n * f, distance_work(metrics.frechet_distances, 10 * n * f))
                                         for f in FACTORS],
            "PRDC, images": [(10 * n * f, distance_work(metrics.prdc, 10 * n * f)) for f in FACTORS]}
        print(f"torch {torch.__version__}, CPU time, least of {args.rounds} rounds\n"
              f"{'':30}{'exponent':>10}   seconds (amount)")
        for name, works in rows.items():
            best = [float("inf")] * len(works)
            for _ in range(args.rounds):
                for i, (_, work) in enumerate(works):
                    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
                            contextlib.redirect_stderr(nowhere):
                        start = spent()
                        work()
                        best[i] = min(best[i], max(spent() - start, 0.01))  # the system counts hundredths
            amounts = [amount for amount, _ in works]
            print(f"{name:30}{exponent(amounts, best):10.2f}   "
                  + ", ".join(f"{seconds:.3g} ({amount:,})" for seconds, amount in zip(best, amounts)), flush=True)


if __name__ == "__main__":
    cli.run(main)
