"""What a training would cost, and the weights of a run, exported for others.

    python -m training plan --size XL --tokens 1.6e12 --gpus 64
    python -m training export runs/radit weights/mine
"""
import argparse
from pathlib import Path

from common import cli
from training import checkpoint, plan
from training.options import Help

EXAMPLES = {"plan": """
examples:
  python -m training plan --size S --tokens 1e10 --gpus 1 --batch 256
  python -m training plan --size XL --tokens 1.6e12 --gpus 64
""", "export": """
examples:
  python -m training export runs/radit weights/mine
  python -m training export runs/radit weights/mine --ema 100000
"""}


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("plan", formatter_class=Help, epilog=EXAMPLES["plan"],
                            help="what a training of RadiT would cost; nothing is built")
    plan.add_arguments(p)
    p = commands.add_parser("export", formatter_class=Help, epilog=EXAMPLES["export"],
                            help="write averaged weights of a run as sample.py reads them")
    p.add_argument("run", type=Path, help="the folder of your own run: its checkpoints are unpickled")
    p.add_argument("out", type=cli.new_path, help="a folder for the weights")
    p.add_argument("--ema", type=cli.integer(1, 10 ** 12),
                   help="the average with that half-life, in images; if not given, that with the least held-out loss")
    args = parser.parse_args()
    if args.command == "plan":
        return plan.show(args)
    about = checkpoint.export(args.run, args.out, args.ema)
    print(f"{args.out}: {args.run} after {cli.count(about['images'], 'image')}, averaged with a half-life of "
          f"{cli.count(about['half_life'], 'image')}")


if __name__ == "__main__":
    cli.run(main)
