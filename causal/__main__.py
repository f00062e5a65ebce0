"""The causal model of the 19 metadata fields, and what it is for: patients, cohorts, counterfactual radiographs.

    python -m causal graph --out out/graph.png
    python -m causal fit data/nih --out runs/causal
    python -m causal check runs/causal data/nih
    python -m causal sample runs/causal --n 1000 --do cardiomegaly=positive --out out/patients.csv
    python -m causal counterfactual runs/causal data/nih --do age=80 --out out/older.csv
    python -m causal cohort --balance sex,age --n 1000 --out out/cohort.csv
    python -m causal edit out/images/0000.png --given sex=male --set pleural_effusion=positive
    python -m causal edit-all data/nih --from sex=male --set sex=female --out out/women

`python -m causal COMMAND --help` explains the options of a command.
"""
import argparse
from pathlib import Path

import torch

from causal import cohort, edit_command, mechanisms, patients
from causal.graph import (DETERMINED, GRAPH, check_graph, draw_graph,
                          print_graph, read_graph)
from common import cli, hub
from common.cli import InputError
from radiographs.index import COLUMNS, index_records, index_row, read_index

SEED = cli.integer(0, 2 ** 61)


def graph_command(args):
    graph = read_graph(args.graph) if args.graph else GRAPH
    print_graph(graph)
    if args.json:
        cli.write_json(args.json, graph)
    if args.out:
        draw_graph(graph, args.out)


def without(graph, names):
    """The graph without some variables and their arrows."""
    return {name: [parent for parent in parents if parent not in names]
            for name, parents in graph.items() if name not in names}


def fit_command(args):
    graph = read_graph(args.graph) if args.graph else GRAPH
    for name in args.without:
        if name not in graph:
            raise InputError(f"--without {name}: not in the graph; its variables are {', '.join(graph)}")
    graph = without(graph, args.without)
    classes, splits, datasets, closed = patients.read_classes(args.indices, args.open_world)
    for folder in closed:
        print(f"{folder}: no row has a negative finding beside a positive one, so findings that a row does not mention "
              "are read as negative (--open-world leaves them unknown)")
    train, valid = (torch.tensor([split == part for split in splits]) for part in ("train", "valid"))
    if not train.any():
        raise InputError(f"{', '.join(map(str, args.indices))}: no row in the split train")

    config = mechanisms.CausalConfig(graph, {}, tuple(datasets), closed_world=len(closed) == len(args.indices))
    config.source, config.rows = [path.name for path in args.indices], int(train.sum())
    names = [name for name in check_graph(graph) if name != DETERMINED]
    config.shares = patients.count_shares(classes[train], config, names)
    unknown = [name for name in names if name not in config.shares]
    if unknown:
        print(f"no training row knows {', '.join(unknown)}: left out of the model")
        config.graph = without(graph, unknown)
        names = [name for name in check_graph(config.graph) if name != DETERMINED]
    if not names:
        raise InputError(f"{', '.join(map(str, args.indices))}: no training row knows a variable of the graph")
    classes = classes[:, [patients.CLASS_COLUMNS.index(name) for name in names]]
    with cli.locked(args.out):
        model = mechanisms.fit(classes[train], config, args.steps, seed=args.seed, progress=True)
        hub.save_model(model, args.out, torch.float32)
    if valid.any():
        print_held_out(model, classes[valid], args.seed)
    print(f"{cli.count(config.rows, 'training row')}, {cli.count(args.steps, 'step')}, seed {args.seed}: the model is "
          f"in {args.out}")


def print_held_out(model, classes, seed):
    """The calibration on held-out classes (N, M), each at a random place in its interval; a value that training never
    held counts as unknown."""
    inside = torch.rand(classes.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for i, name in enumerate(model.names):
        held = torch.tensor(model.config.shares[name]) > 0
        classes[~held[classes[:, i].long()], i] = -1
    print(f"{cli.count(len(classes), 'held-out row')} (valid)")
    patients.print_calibration(patients.calibration(model, torch.where(classes < 0, torch.nan, classes + inside)))


def check_command(args):
    model = patients.load(args.model)
    records = [record for record in index_records(args.index) if record["split"] == "test"]
    if not records:
        raise InputError(f"{args.index}: no row in the split test")
    if model.config.closed_world:
        records = [patients.close_world(record) for record in records]
    known = [patients.covered_part(model, record) for record in records]
    places = patients.to_places(model, known, range(len(known)))
    print(f"{cli.count(len(records), 'row')} (test)")
    if not_covered := patients.list_not_covered(model, records):
        print(f"counted as unknown, because the model was not fitted on it: {not_covered}")
    patients.print_calibration(patients.calibration(model, places))
    for name, (equal, total, years) in patients.check(model, places).items():
        print(f"{name}: {equal:,} of {total:,} discrete values come back, ages within {years:.1e} years")


def sample_command(args):
    model = patients.load(args.model)
    records = patients.sample(model, args.n, patients.parse_do(args.do, model), args.seed)
    records = [{"path": f"images/{i}.png", "patient": f"synthetic-{i}", "split": "train"} | record
               for i, record in enumerate(records, args.seed)]
    cli.write_csv(args.out, COLUMNS, map(index_row, records))
    print(f"{cli.count(len(records), 'row')} in {args.out}")


def counterfactual_command(args):
    model = patients.load(args.model)
    do, records = patients.parse_do(args.do, model), read_index(args.rows)
    if not_covered := patients.list_not_covered(model, records):
        print(f"counted as unknown and left as it is, because the model was not fitted on it: {not_covered}")
    records = patients.counterfactual(model, records, do, args.seed)
    cli.write_csv(args.out, COLUMNS, map(index_row, records))
    print(f"{cli.count(len(records), 'row')} in {args.out}")


def add_fit_arguments(parser):
    parser.add_argument("indices", nargs="+", type=Path, metavar="INDEX", help="a prepared source, or a table like its "
                        "index.csv")
    parser.add_argument("--out", type=cli.new_path, required=True, help="folder of the model")
    parser.add_argument("--graph", type=Path, help="a graph of your own, as JSON; see python -m causal graph --json")
    parser.add_argument("--without", nargs="+", default=[], metavar="FIELD", help="leave these variables out")
    parser.add_argument("--open-world", action="store_true", help="leave findings that a row does not mention unknown, "
                        "even where the table only lists what was found")
    parser.add_argument("--steps", type=cli.integer(1, 10 ** 7), default=8000, help="training steps (default: 8000)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the initial weights and the order of rows (default: "
                        "0)")


def add_do_arguments(parser):
    parser.add_argument("--do", action="append", default=[], metavar="FIELD=VALUE", help="set a field by intervention")
    parser.add_argument("--seed", type=SEED, default=0, help="of the first row; each further row has the next one")
    parser.add_argument("--out", type=cli.new_path, required=True, help="a table like index.csv")


def build_parser():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, function, text, description=None):
        command = commands.add_parser(name, help=text, description=description or f"{text[0].upper()}{text[1:]}.",
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(function=function)
        return command

    command = add("graph", graph_command, "print the graph, write it as JSON, plot it")
    command.add_argument("--graph", type=Path, help="a graph of your own, as JSON; without it the paper's")
    command.add_argument("--json", type=cli.new_path, help="write it here, to be changed and given to fit --graph")
    command.add_argument("--out", type=cli.new_path, help="plot it here, as PNG")
    add_fit_arguments(add("fit", fit_command, "learn the mechanisms from the split train of one or several indices"))
    command = add("check", check_command, "calibration, composition and reversibility on the split test")
    command.add_argument("model", type=Path, help="the folder of a causal model, such as weights/demo/causal")
    command.add_argument("index", type=Path, help="a prepared source, or a table like its index.csv")
    command = add("sample", sample_command, "sample whole patients")
    command.add_argument("model", type=Path, help="the folder of a causal model, such as weights/demo/causal")
    command.add_argument("--n", type=cli.integer(1, 10 ** 7), default=1000, help="how many (default: 1000)")
    add_do_arguments(command)
    command = add("counterfactual", counterfactual_command, "change the rows of a table by intervention")
    command.add_argument("model", type=Path, help="the folder of a causal model, such as weights/demo/causal")
    command.add_argument("rows", type=Path, help="a prepared source, or a table like its index.csv")
    add_do_arguments(command)
    command = add("cohort", cohort.cohort_command, "a table of metadata for sample.py --metadata", cohort.__doc__)
    cohort.add_arguments(command)
    command = add("edit", edit_command.edit_command, "the same radiograph, had one thing been different",
                  edit_command.__doc__)
    edit_command.add_arguments(command)
    command = add("edit-all", edit_command.edit_all_command, "edit held-out images, for python -m diagnosis stress",
                  edit_command.EDIT_ALL)
    edit_command.add_all_arguments(command)
    return parser


def main():
    args = build_parser().parse_args()
    if args.command in ("fit", "check", "sample", "counterfactual"):
        torch.set_num_threads(1)                                     # small matrices: a second thread only waits
    args.function(args)


if __name__ == "__main__":
    cli.run(main)
