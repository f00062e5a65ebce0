"""The diagnostic model, and what it says of real and of synthetic radiographs.

    python -m diagnosis fit PREPARED... --out RUN                  small and from scratch, or --encoder DIR: Rad-DINO
    python -m diagnosis evaluate PREPARED...                       AUROC, calibration, age error, each with an interval
    python -m diagnosis robustness PREPARED... --by sex age        the same in subgroups: does it break on one?
    python -m diagnosis control OUT                                do generated images show what was asked?
    python -m diagnosis utility PREPARED... --synthetic OUT        train on real, synthetic, both; test on real

Source: the encoder is Rad-DINO's architecture; temperatures as in Guo et al. 2017. Not a medical device.
"""
import argparse
from pathlib import Path

import data
from common import cli
from common.cli import InputError
from diagnosis import classifier
from encoders import raddino
from radiographs import fields
from radiographs.index import SPLITS
from train import TrainConfig


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("fit", "evaluate", "robustness", "control", "utility"):
        p = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("data", nargs="+", type=Path, help="prepared sources")
        if name in ("fit", "utility"):
            p.add_argument("--out", type=Path, required=True, help="the run's folder; the same command continues it")
            p.add_argument("--images", type=cli.positive, default=131_072, help="how many to see in training")
            p.add_argument("--batch", type=cli.positive, default=32)
            p.add_argument("--lr", type=float, default=5e-4)
            p.add_argument("--seed", type=int, default=0)
            p.add_argument("--width", type=cli.positive, default=192, help="of a model from scratch, a multiple of 64")
            p.add_argument("--depth", type=cli.positive, default=6)
            p.add_argument("--patch", type=cli.positive, default=8, help="pixels a token on each side")
        else:
            p.add_argument("--model", type=Path, default=classifier.DEMO)
        p.add_argument("--json", type=Path, help="the same figures as a file")
    commands.choices["fit"].add_argument("--encoder", type=Path, help="start from this encoder: Rad-DINO, or another classifier's")
    for name in ("evaluate", "robustness"):
        commands.choices[name].add_argument("--split", choices=SPLITS, default="test")
    commands.choices["robustness"].add_argument("--by", nargs="+", choices=fields.GROUPS, default=["sex", "age", "view", "dataset"])
    commands.choices["utility"].add_argument("--synthetic", nargs="+", type=Path, required=True, help="prepared sources, split train")
    args = parser.parse_args()

    if args.command in ("fit", "utility"):
        cfg = TrainConfig(images=args.images, cooldown=args.images // 3, batch=args.batch, lr=args.lr, seed=args.seed,
                                save_every=256)
        side = data.Radiographs(args.data)[0].shape[-1]
        if args.width % 64 or side % args.patch:
            raise InputError(f"--width {args.width} is not a multiple of 64, or --patch {args.patch} does not divide {side} pixels")
        config = raddino.EncoderConfig(args.width, args.depth, args.width // 64, args.patch, side, channels=1)
    if args.command == "fit":
        model = classifier.fit(args.data, args.out, cfg, args.encoder and raddino.load_encoder(args.encoder), config)
        test = classifier.Labelled(args.data, "test", model.config.datasets)
        report = {"test": classifier.measure(test, classifier.predict(model, test), model.config)}
    elif args.command == "utility":
        report = classifier.utility(args.data, args.synthetic, args.out, cfg, config)
    else:
        model = classifier.load(args.model)
        dataset = classifier.Labelled(args.data, getattr(args, "split", None), model.config.datasets)
        if args.command == "robustness":
            report = classifier.robustness(model, dataset, args.by)
        else:
            report = {args.command: classifier.measure(dataset, classifier.predict(model, dataset), model.config)}
    for title, results in report.items():
        classifier.print_table(results, title)
        for r in results:
            if r.get("worse"):
                print(f"  {title}: {r['field']} {r['value']} is worse here than over all images")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_json(args.json, report)


if __name__ == "__main__":
    cli.run(main)
