"""What a training would cost, and its EMA as weights.

    python -m training plan --size XL --tokens 1.6e12 --gpus 64
    python -m training export RUN OUT
"""
import argparse
from pathlib import Path

from autoencoder.load import copy_vae
from common import cli
from training import checkpoint, plan


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan.add_arguments(commands.add_parser("plan", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                           help="what a training of RadiT would cost; nothing is built"))
    p = commands.add_parser("export", help="write the EMA of a run as weights that sample.py reads")
    p.add_argument("run", type=Path, help="the folder of a run of yours: its checkpoints are unpickled")
    p.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "plan":
        return plan.show(args)
    about = checkpoint.export(args.run, args.out)
    if about["config"].get("vae"):
        copy_vae(args.run / "weights" / "vae", args.out / "vae")
    print(f"{args.out}: the EMA of {args.run} after {about['images']:,} images")


if __name__ == "__main__":
    cli.run(main)
