"""Images a second from noise to pixels: sample.generate beside diffusers' DiTPipeline of the same shape, in one run.

    pip install diffusers transformers
    python benchmarks/sampling.py [--size XS] [--steps 10]            a CPU: 128x128, the demo's widths
    python benchmarks/sampling.py --size XL                           a GPU: 512x512, FLUX.2's decoder, 25 steps

The same width, depth, heads, tokens, steps, guidance, batch and decoder widths; random weights, which cost what trained
ones do. Decoding counts, and so does bringing the images to the CPU. The peer is the pipeline as diffusers runs it,
with its own DDIM scheduler: DiTTransformer2DModel, in bfloat16 where that is faster, both branches of guidance in one
batch, and AutoencoderKL. Ours runs eager and with its blocks compiled; the interval is the guidance's. All take turns
over several rounds, and the best round of each counts, so that a busy machine does not favour one of them. A ratio
above 1: ours is faster.
"""
import argparse
import importlib.util
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import radit
import sample
import vae
from common import cli


def ours(size, shape, device):
    """RadiT and its VAE, with random weights."""
    width, depth, heads = radit.SIZES[size]
    grid, decoder = shape["side"] // 16, vae.RadVAE(shape["vae"])
    cfg = radit.RadiTConfig(channels=4 * shape["vae"].latent_channels, grid=(grid, grid), width=width, depth=depth, heads=heads)
    return radit.RadiT(cfg).eval().to(device), decoder.eval().to(device)


def theirs(size, shape, device, bf16):
    """diffusers' pipeline: patches of 2x2 latent cells are the tokens, as RadiT's VAE patchifies them."""
    from diffusers import (AutoencoderKL, DDIMScheduler, DiTPipeline,
                           DiTTransformer2DModel)
    (width, depth, heads), cfg = radit.SIZES[size], shape["vae"]
    transformer = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=cfg.latent_channels,
                                        out_channels=cfg.latent_channels, num_layers=depth, sample_size=shape["side"] // 8, patch_size=2, num_embeds_ada_norm=1000)
    decoder = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=cfg.latent_channels, block_out_channels=cfg.widths,
                            layers_per_block=cfg.layers, norm_num_groups=cfg.groups, sample_size=shape["side"],
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    pipeline = DiTPipeline(transformer, decoder, DDIMScheduler()).to(device)
    if bf16:
        pipeline.to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device, bf16 = cli.pick_device()
    parser.add_argument("--size", choices=radit.SIZES, default="XL" if device.type == "cuda" else "XS")
    parser.add_argument("--steps", type=cli.positive, default=25)
    parser.add_argument("--batch", type=cli.positive, default=16)
    parser.add_argument("--rounds", type=cli.positive, default=3)
    args = parser.parse_args()
    if not importlib.util.find_spec("diffusers"):
        parser.error("diffusers, which this compares with, is not installed")
    torch.manual_seed(0)
    shape = ({"side": 128, "vae": vae.VAEConfig(1, 8, (16, 32, 64, 128), 1, 8)} if args.size == "XS" else  # the demo's
             {"side": 512, "vae": vae.VAEConfig()})                  # FLUX.2's widths
    model, decoder = ours(args.size, shape, device)
    peer = theirs(args.size, shape, device, bf16)
    records, seeds = [{"view": "PA"}] * args.batch, list(range(args.batch))

    latent = torch.randn(args.batch, model.config.channels, *model.config.grid, device=device)

    def draw(interval=(0, 1)):
        sample.generate(model, decoder, records, seeds, steps=args.steps, batch=args.batch, interval=interval)

    @torch.no_grad()
    def decode():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            decoder.decode(latent).float().cpu()

    def pipeline():
        peer(class_labels=[1] * args.batch, guidance_scale=2.0, num_inference_steps=args.steps, output_type="np")

    variants = {"RadiT": draw, "RadiT, guided for t in 0.1 to 0.8": lambda: draw((0.1, 0.8)), "RadiT, decoding alone": decode,
                "DiTPipeline": pipeline}
    best = {}

    def measure(variants):
        for turn in range(args.rounds + 1):                          # the first warms up
            for name, work in variants.items():
                start = time.perf_counter()
                work()                                               # ends on the CPU, so nothing is left to wait for
                if turn:
                    best[name] = min(time.perf_counter() - start, best.get(name, float("inf")))

    measure(variants)
    if shutil.which("g++"):
        for block in model.blocks:
            block.compile(fullgraph=True)
        measure({"RadiT, compiled": draw, "DiTPipeline": pipeline})
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {hardware}, {'bfloat16' if bf16 else 'float32'}, size {args.size}, {shape['side']}x{shape['side']} pixels, "
          f"{model.config.tokens} tokens, {args.steps} steps, guidance 2, batch {args.batch}, best of {args.rounds} rounds")
    for name, seconds in best.items():
        print(f"{name:36}{args.batch / seconds:9.3f} images/s" + ("" if name == "DiTPipeline" or "alone" in name else
              f"{best['DiTPipeline'] / seconds:8.2f} times as fast as DiTPipeline"))
    if device.type != "cuda":
        print("On a GPU, with XL at 512x512: not measured.")


if __name__ == "__main__":
    cli.run(main)
