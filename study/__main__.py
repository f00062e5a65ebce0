"""The blind real-or-synthetic reader study: plan it, build its page, score what the readers send back.

    python -m study build --real data/nih --synthetic out/sample --pairs 50 --seed 7 --out out/study.html
    python -m study score results/*.json --key out/study.key.json
"""
import argparse
from pathlib import Path

from common import cli
from study import build, score


def margin(text):
    """An argparse type: a number between 0 and 1/2."""
    number = cli.number(0, 0.5)(text)
    if number in (0, 0.5):
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 0.5")
    return number


def add_build(commands):
    parser = commands.add_parser("build", help="write the page for the readers and, beside it, the key")
    parser.add_argument("--real", nargs="+", type=cli.new_path, required=True, metavar="DIR",
                        help="prepared sources, of which the split test is taken, or any folders of images")
    parser.add_argument("--synthetic", nargs="+", type=cli.new_path, required=True, metavar="DIR",
                        help="folders that sample.py wrote, or any folders of images")
    parser.add_argument("--design", choices=("pairs", "single"), default="pairs",
                        help="two images side by side, or one image and a rating")
    parser.add_argument("--pairs", type=cli.integer(1, 100_000), default=50,
                        help="as many real images as synthetic ones; 50 if not given")
    parser.add_argument("--presentations", type=cli.integer(1, score.MAX_PRESENTATIONS),
                        help="how often each reader answers everything: 2 by default, 1 for a quiz")
    parser.add_argument("--margin", type=margin, default=0.1, help="accuracy within this of 1/2 will count as chance")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 62), default=0, help="decides which images are chosen")
    parser.add_argument("--quiz", action="store_true",
                        help="a game that tells each answer; its page holds the answers")
    parser.add_argument("--out", type=cli.new_path, default=Path("out/study.html"),
                        help="the page; out/study.html if not given. The key lies beside it, as NAME.key.json")


def add_score(commands):
    parser = commands.add_parser("score", help="the readers' results to a table, a figure and JSON")
    parser.add_argument("results", nargs="+", type=cli.new_path, help="the files that the readers sent back")
    parser.add_argument("--key", type=cli.new_path, required=True, help="the .key.json of the study")
    parser.add_argument("--out", type=cli.new_path, default=Path("out/score"),
                        help="name without suffix: .txt, .png and .json are written; out/score if not given")


def add_power(commands):
    parser = commands.add_parser("power", help="what a planned study could show")
    parser.add_argument("--readers", type=cli.integer(1, 1_000), default=3, help="how many readers; 3 if not given")
    parser.add_argument("--pairs", type=cli.integer(2, 100_000), default=50,
                        help="pairs of a real and a synthetic image; 50 if not given")
    parser.add_argument("--margin", type=margin, default=0.1,
                        help="accuracy within this of 1/2 counts as chance; 0.1 if not given")
    parser.add_argument("--design", choices=("pairs", "single"), default="pairs",
                        help="two images side by side, or one image and a rating; pairs if not given")


def add_example(commands):
    parser = commands.add_parser("example", help="the table and the figure for simulated readers")
    parser.add_argument("--out", type=cli.new_path, default=Path("out/example"),
                        help="name without suffix; out/example if not given")


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_build, add_score, add_power, add_example):
        add(commands)
    args = parser.parse_args()
    if args.command == "build":
        build.build(args.real, args.synthetic, args.out, args.design, args.pairs, args.presentations, args.margin,
                    args.quiz, args.seed)
    elif args.command == "score":
        key = score.read_key(args.key)
        score.report(score.read_results(args.results, key), key, args.out)
    elif args.command == "power":
        build.print_power(args.readers, args.pairs, args.margin, args.design)
    else:
        score.report(*score.simulate(), args.out)


if __name__ == "__main__":
    cli.run(main)
