"""The diagnostic model, and what it says of real and of synthetic radiographs.

    python -m diagnosis fit PREPARED... --out RUN                small and from scratch, or --encoder DIR: Rad-DINO
    python -m diagnosis evaluate PREPARED...                     AUROC, calibration, age error, each with an interval
    python -m diagnosis robustness PREPARED... --by sex age      the same in subgroups: is it worse in one of them?
    python -m diagnosis stress EDITS --data PREPARED...          edited images: what will it do in another group?
    python -m diagnosis control OUT                              do sampled images show what was asked?
    python -m diagnosis check OUT [--redraw]                     which of them do not? Make those anew
    python -m diagnosis utility PREPARED... --synthetic OUT      train on real, synthetic, both; test on real

Examples, on the embedded model:

    python -m diagnosis evaluate data/nih data/hospital --json out/evaluate.json
    python -m diagnosis check out/sample-1 --redraw

Not a medical device.
"""
import argparse
from pathlib import Path

import data
import sample
from common import cli
from common.cli import InputError
from diagnosis import check, classifier, resnet, stress
from encoders import raddino
from radiographs import fields
from radiographs.index import SPLITS
from training.options import TrainConfig

MODEL = "a classifier: a folder that fit wrote, or its name on the Hub"


def training_settings(args):
    """TrainConfig, and the EncoderConfig of a model from scratch. Refuses data without one of the splits."""
    images = [data.Radiographs(args.data, split) for split in SPLITS]  # the test comes after hours of training
    side = images[0][0].shape[-1]
    if args.width % 64:
        raise InputError(f"--width {args.width} is not a multiple of 64")
    if side % args.patch:
        raise InputError(f"--patch {args.patch} does not divide {side} pixels")
    cfg = TrainConfig(images=args.images, cooldown=args.images // 3, batch=args.batch, lr=args.lr, seed=args.seed,
                      save_every=256)
    return cfg, raddino.EncoderConfig(args.width, args.depth, args.width // 64, args.patch, side, channels=1)


def fit_command(args):
    cfg, config = training_settings(args)
    encoder = raddino.load_encoder(args.encoder) if args.encoder else None
    model = classifier.fit(args.data, args.out, cfg, encoder, config)
    test = classifier.Labelled(args.data, "test", model.config.datasets)
    report_tables({"test": classifier.measure(test, classifier.predict(model, test), model.config)}, args.json)


def utility_command(args):
    cfg, config = training_settings(args)
    data.Radiographs([*args.data, *args.synthetic], "train")         # of one size
    data.Radiographs(args.synthetic, "train")
    if args.resnet:
        config = resnet.ResNetConfig()
    report_tables(classifier.utility(args.data, args.synthetic, args.out, cfg, config), args.json)


def evaluate_command(args):
    model = classifier.load(args.model)
    dataset = classifier.Labelled(args.data, args.split, model.config.datasets)
    results = classifier.measure(dataset, classifier.predict(model, dataset), model.config)
    report_tables({args.command: results}, args.json)


def robustness_command(args):
    model = classifier.load(args.model)
    dataset = classifier.Labelled(args.data, args.split, model.config.datasets)
    report_tables(classifier.robustness(model, dataset, args.by), args.json)


def check_command(args):
    if args.out and not args.redraw:
        raise InputError("--out is the folder that --redraw writes; give --redraw too")
    out = args.out or args.folder.with_name(f"{args.folder.name}-checked") if args.redraw else None
    report = check.check(args.folder, args.model, args.weights, out)
    check.print_report(report, args.folder, out)
    write_report(report, args.json)


def stress_command(args):
    models = {}
    for folder in args.model or [classifier.DEMO]:
        if str(folder) in models:
            raise InputError(f"--model {folder} is given twice")
        models[str(folder)] = classifier.load(folder)
    reports = {}
    for folder in args.edits:
        reports[str(folder)] = stress.stress(models, folder, args.data)
        print(f"{folder}:")
        stress.print_report(reports[str(folder)])
    write_report(reports, args.json)


def report_tables(report, json_path):
    """Prints {title: rows of classifier.measure}, and writes it."""
    for title, results in report.items():
        classifier.print_table(results, title)
        for r in results:
            if r.get("worse"):
                print(f"  {title}: {r['field']} {r['value']} is worse here than over all images")
    write_report(report, json_path)


def write_report(report, json_path):
    if json_path:
        cli.write_json(json_path, report)


def add_training_arguments(parser):
    parser.add_argument("--out", type=cli.new_path, required=True, help="the run's folder; the same command continues "
                        "it")
    parser.add_argument("--images", type=cli.positive, default=131_072, help="how many to see in training")
    parser.add_argument("--batch", type=cli.integer(1, 65_536), default=32, help="images in each step")
    parser.add_argument("--lr", type=cli.number(1e-12, 1), default=5e-4, help="AdamW's learning rate after the warm-up")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 61), default=0, help="of the initial weights and the order "
                        "of images")
    parser.add_argument("--width", type=cli.integer(64, 4096), default=192, help="of a model from scratch, a multiple "
                        "of 64")
    parser.add_argument("--depth", type=cli.integer(1, 64), default=6, help="blocks of a model from scratch")
    parser.add_argument("--patch", type=cli.integer(1, 64), default=8, help="side of a token in pixels")


def build_parser():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, function, text, sources=True):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.",
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(function=function)
        if sources:
            command.add_argument("data", nargs="+", type=Path, help="prepared sources")
        command.add_argument("--json", type=cli.new_path, help="write the same figures to this file")
        return command

    command = add("fit", fit_command, "train a diagnostic model and test it")
    command.add_argument("--encoder", type=Path, help="start from this encoder: Rad-DINO, or another classifier's")
    add_training_arguments(command)
    command = add("utility", utility_command, "train on real, synthetic and both; test on real")
    command.add_argument("--synthetic", nargs="+", type=Path, required=True, help="prepared sources, split train")
    command.add_argument("--resnet", action="store_true", help="a ResNet-50 of torchvision at 224 pixels, as "
                         "CheXGenBench has it, for a GPU; without it a small transformer")
    add_training_arguments(command)
    for name, function, text in (("evaluate", evaluate_command, "how well the model reads held-out images"),
                                 ("robustness", robustness_command, "the same in subgroups"),
                                 ("control", evaluate_command, "whether sampled images show what was asked")):
        command = add(name, function, text)
        command.add_argument("--model", type=Path, default=classifier.DEMO, help=MODEL)
        command.set_defaults(split=None)
        if name != "control":
            command.add_argument("--split", choices=SPLITS, default="test", help="which images")
    commands.choices["robustness"].add_argument("--by", nargs="+", choices=fields.GROUPS, help="kinds of subgroups",
                                                default=["sex", "age", "view", "dataset"])
    command = add("check", check_command, "which sampled images the model contradicts; make those anew", sources=False)
    command.add_argument("folder", type=Path, help="a folder of sample.py")
    command.add_argument("--redraw", action="store_true", help="write all images to a new folder, the contradicted "
                         "ones made anew with other seeds")
    command.add_argument("--out", type=cli.new_path, help="of --redraw: the new folder; FOLDER-checked, if not given")
    command.add_argument("--weights", type=Path, default=sample.DEMO, help="of --redraw: those that filled the folder")
    command.add_argument("--model", type=Path, default=classifier.DEMO, help=MODEL)
    command = add("stress", stress_command, "what edited images say of the model's use in another group", sources=False)
    command.add_argument("edits", nargs="+", type=Path, help="folders of python -m causal edit-all")
    command.add_argument("--data", nargs="+", type=Path, required=True, help="the prepared sources that were edited")
    command.add_argument("--model", action="append", type=Path, help="a classifier; more than one are ranked "
                         "(default: the demo's)")
    return parser


def main():
    args = build_parser().parse_args()
    args.function(args)


if __name__ == "__main__":
    cli.run(main)
