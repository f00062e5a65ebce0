"""Cached latents of prepared sources, and what an autoencoder loses.

    python -m autoencoder encode PREPARED... --vae VAE --out LATENTS
    python -m autoencoder evaluate PREPARED... --vae VAE             VAE: a folder, or black-forest-labs/FLUX.2-klein-4B
"""
import argparse
from pathlib import Path

import data
from autoencoder import latents
from autoencoder.load import load_vae
from common import cli
from encoders import raddino
from radiographs.index import SPLITS

EXAMPLES = {"encode": """
examples:
  python -m autoencoder encode data/nih --vae runs/vae/weights/vae --out runs/latents --versions 16
  torchrun --nproc_per_node=8 -m autoencoder encode data/* --vae black-forest-labs/FLUX.2-klein-4B --out runs/latents
""", "evaluate": """
examples:
  python -m autoencoder evaluate data/nih --vae runs/vae/weights/vae
  python -m autoencoder evaluate data/nih --vae runs/vae/weights/vae --encoder weights/demo/classifier --split valid
"""}


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("encode", "write mean and log-variance of every image as safetensors shards"),
                       ("evaluate", "print what is lost in reconstructed images")):
        p = commands.add_parser(name, help=text, epilog=EXAMPLES[name],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument("data", nargs="+", type=Path, help="prepared sources")
        p.add_argument("--vae", type=Path, required=True, help="a VAE's folder, or its name on the Hub")
    p = commands.choices["encode"]
    p.add_argument("--out", type=cli.new_path, required=True, help="a folder for the latents")
    p.add_argument("--versions", type=cli.integer(1, 10 ** 4), default=1,
                   help="latents of each training image: its own and those of slightly moved copies, for small data "
                        "sets")
    p = commands.choices["evaluate"]
    p.add_argument("--split", choices=SPLITS, default="test", help="which images; test if not given")
    p.add_argument("--encoder", type=Path, help="microsoft/rad-dino or weights/demo/classifier: print perceptual "
                                                "and Fréchet distance as well")
    args = parser.parse_args()
    if args.command == "encode":
        return latents.encode(args.data, load_vae(args.vae), args.out, args.versions)
    encoder = raddino.load_encoder(args.encoder) if args.encoder else None
    scores = latents.evaluate(load_vae(args.vae), data.Radiographs(args.data, args.split), encoder)
    decibel, similarity = scores["psnr"], scores["ssim"]
    several = len(decibel) > 1                                       # one image has no spread
    spread = f" (standard deviation {decibel.std(correction=0):.2f})" if several else ""
    print(f"{args.vae}: {cli.count(len(decibel), 'image')} of the split {args.split}: PSNR {decibel.mean():.2f} dB"
          + spread + f", SSIM {similarity.mean():.4f}" + (f" ({similarity.std(correction=0):.4f})" if several else ""))
    if encoder:
        distance = scores["perceptual"]
        print(f"through {args.encoder}: perceptual distance {distance.mean():.3g}"
              + (f" ({distance.std(correction=0):.2g}), Fréchet distance {scores['fdd']:.3g}" if several else ""))
    if not several:
        print("one image: a standard deviation or a Fréchet distance needs at least two")


if __name__ == "__main__":
    cli.run(main)
