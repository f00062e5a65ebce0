"""The blind real-or-synthetic reader study: plan it, build its page, score what the readers send back.

    python -m study power --readers 3 --pairs 50 --margin 0.1
    python -m study build --real data/nih --synthetic out/sample --pairs 50 --presentations 2 --seed 7 --out out/study.html
    python -m study score results/*.json --key out/study.key.json
    python -m study example                                        (simulated readers, to see the table and the figure)
"""
import argparse
from pathlib import Path

from common import cli
from study import build, score


def below_half(text):
    """An argparse type."""
    number = float(text)
    if not 0 < number < 0.5:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 0.5")
    return number


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("build", help="write the page for the readers and, beside it, the key")
    p.add_argument("--real", nargs="+", type=Path, required=True, metavar="DIR", help="prepared sources; the split test")
    p.add_argument("--synthetic", nargs="+", type=Path, required=True, metavar="DIR", help="folders that sample.py wrote")
    p.add_argument("--design", choices=("pairs", "single"), default="pairs")
    p.add_argument("--pairs", type=cli.positive, default=50, help="as many real images as synthetic ones")
    p.add_argument("--presentations", type=cli.positive, help="how often each reader answers everything; 2, in a quiz 1")
    p.add_argument("--margin", type=below_half, default=0.1, help="accuracy within this of 1/2 will count as chance")
    p.add_argument("--seed", type=int, default=0, help="which images are drawn")
    p.add_argument("--quiz", action="store_true", help="a game that tells the answer each time; the page then holds it")
    p.add_argument("--out", type=Path, default=Path("out/study.html"))
    p = commands.add_parser("score", help="results to a table, a figure and JSON")
    p.add_argument("results", nargs="+", type=Path)
    p.add_argument("--key", type=Path, required=True, help="the .key.json of the study")
    p.add_argument("--out", type=Path, default=Path("out/score"), help="without suffix: .txt, .png and .json are written")
    p = commands.add_parser("power", help="what a planned study could show")
    p.add_argument("--readers", type=cli.positive, default=3)
    p.add_argument("--pairs", type=cli.positive, default=50)
    p.add_argument("--margin", type=below_half, default=0.1)
    p.add_argument("--design", choices=("pairs", "single"), default="pairs")
    p = commands.add_parser("example", help="the same from made-up readers")
    p.add_argument("--out", type=Path, default=Path("out/example"), help="without suffix")
    args = parser.parse_args()
    if args.command == "build":
        build.build(args)
    elif args.command == "score":
        key = score.read_key(args.key)
        score.report(score.read_results(args.results, key), key, args.out)
    elif args.command == "power":
        build.power(args.readers, args.pairs, args.margin, args.design)
    else:
        score.report(*score.made_up(), args.out)


if __name__ == "__main__":
    cli.run(main)
