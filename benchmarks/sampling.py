"""Images a second from noise to pixels: sample.generate beside diffusers' DiTPipeline of the same shape, in one run.

    pip install diffusers transformers
    python benchmarks/sampling.py [--size XS] [--steps 10]            a CPU: 128x128, the demo's widths
    python benchmarks/sampling.py --size XL                           a GPU: 512x512, FLUX.2's decoder, 25 steps

Width, depth, heads, tokens, steps, guidance, batch and the decoder's widths are the same; weights are random, which
cost what trained ones do. Decoding counts, and so does bringing the images to the CPU. The peer is the pipeline as
diffusers runs it, with its own DDIM scheduler: DiTTransformer2DModel, in bfloat16 where that is faster, both branches
of guidance in one batch, and AutoencoderKL. Ours is what sample.py runs by default, and with its blocks compiled; the
interval is that of guidance. On a CPU it is CPU time of one thread, which other programs disturb least; on a GPU wall
time. All take turns over several rounds: median and range. A ratio above 1: ours is faster.
"""
import argparse
import copy
import importlib.util
import shutil
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from transformer import now, ratio

import radit
import sample
import vae
from common import cli


def ours(size, shape, device, bf16):
    """RadiT and its VAE as sample.py prepares them, with random weights."""
    width, depth, heads = radit.SIZES[size]
    grid, decoder = shape["side"] // 16, vae.RadVAE(shape["vae"])
    cfg = radit.RadiTConfig(channels=4 * shape["vae"].latent_channels, grid=(grid, grid), width=width, depth=depth,
                            heads=heads)
    model = radit.RadiT(cfg).eval().requires_grad_(False).to(device)
    if bf16:
        sample.store_bf16(model)
    return model, decoder.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def theirs(size, shape, device, bf16):
    """diffusers' pipeline: patches of 2x2 latent cells are the tokens, as RadiT's VAE patchifies them."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    (width, depth, heads), cfg = radit.SIZES[size], shape["vae"]
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels, num_layers=depth, sample_size=shape["side"] // 8, patch_size=2,
        num_embeds_ada_norm=1000)
    decoder = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=cfg.latent_channels, block_out_channels=cfg.widths,
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
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = ({"side": 128, "vae": vae.VAEConfig(1, 8, (16, 32, 64, 128), 1, 8)} if args.size == "XS" else  # the demo's
             {"side": 512, "vae": vae.VAEConfig()})                  # FLUX.2's widths
    model, decoder = ours(args.size, shape, device, bf16)
    peer = theirs(args.size, shape, device, bf16)
    records, seeds = [{"view": "PA"}] * args.batch, list(range(args.batch))
    latent = torch.randn(args.batch, model.config.channels, *model.config.grid, device=device)

    def generate(net, interval=(0, 1)):
        sample.generate(net, decoder, records, seeds, steps=args.steps, solver="euler", guidance=2.0, batch=args.batch,
                        interval=interval)

    @torch.no_grad()
    def decode():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            decoder.decode(latent).float().cpu()

    variants = {
        "RadiT": lambda: generate(model), "RadiT, guided for t in 0.1 to 0.8": lambda: generate(model, (0.1, 0.8)),
        "RadiT, decoding alone": decode,
        "DiTPipeline": lambda: peer(class_labels=[1] * args.batch, guidance_scale=2.0, output_type="np",
                                    num_inference_steps=args.steps)}
    if shutil.which("g++"):
        compiled = copy.deepcopy(model)
        for block in compiled.blocks:
            block.compile(fullgraph=True)
        variants["RadiT, compiled"] = lambda: generate(compiled)
    times = {name: [] for name in variants}
    for turn in range(args.rounds + 1):                              # the first warms up and compiles
        for name, work in variants.items():
            start = now(device)
            work()
            if turn:
                times[name].append(now(device) - start)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU time of one thread"
    print(f"torch {torch.__version__}, {hardware}, {'bfloat16' if bf16 else 'float32'}, size {args.size}, "
          f"{shape['side']}x{shape['side']} pixels, {model.config.tokens} tokens, {args.steps} steps, guidance 2, "
          f"batch {args.batch}; {args.rounds} rounds: median, range")
    for name, rounds in times.items():
        text = f"{name:36}{args.batch / statistics.median(rounds):9.3f} images/s"
        if name != "DiTPipeline" and "alone" not in name:
            text += f", {ratio(times['DiTPipeline'], rounds)} times as fast as DiTPipeline"
        print(text)
    if device.type != "cuda":
        print("On a GPU, with XL at 512x512: not measured.")


if __name__ == "__main__":
    cli.run(main)
