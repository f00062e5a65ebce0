"""The causal model of the 19 metadata fields, and what it is for: patients, cohorts, counterfactual radiographs.

    python -m causal graph --out graph.png
    python -m causal fit PREPARED... --out MODEL [--graph MINE.json] [--without race] [--closed-world]
    python -m causal sample MODEL -n 1000 --do cardiomegaly=positive --out patients.csv
    python -m causal counterfactual MODEL ROWS.csv --do age=80 --out older.csv
    python -m causal check MODEL PREPARED
    python -m causal cohort --balance sex,age --n 1000 --out cohort.csv
    python -m causal edit IMAGE --given sex=male --set pleural_effusion=positive
"""
import argparse
from pathlib import Path

import torch

from causal import cohort, edit, mechanisms, patients
from causal.graph import (DETERMINED, GRAPH, check_graph, draw_graph,
                          print_graph, read_graph)
from causal.mechanisms import CausalConfig
from common import cli, hub
from common.cli import InputError
from radiographs.index import COLUMNS, index_records, index_row, read_index


def fit_command(args):
    graph = read_graph(args.graph) if args.graph else GRAPH
    for name in args.without:
        if name not in graph:
            raise InputError(f"--without {name}: not in the graph; its variables are {', '.join(graph)}")
    graph = {name: [p for p in graph[name] if p not in args.without] for name in graph if name not in args.without}
    classes, splits, datasets = patients.read_classes(args.indices, args.closed_world)
    train, valid = (torch.tensor([split == part for split in splits]) for part in ("train", "valid"))
    names = [name for name in check_graph(graph) if name != DETERMINED]
    config = CausalConfig(graph, {}, datasets, args.closed_world)
    config.source, config.rows = [path.name for path in args.indices], int(train.sum())
    config.shares = patients.count_shares(classes[train], config, names)
    classes = classes[:, [patients.CLASS_COLUMNS.index(name) for name in names]]
    model = mechanisms.fit(classes[train], config, args.steps, seed=args.seed, progress=True)
    hub.save_model(model, args.out, torch.float32)
    if valid.any():
        for i, name in enumerate(names):                             # a value that training never held is unknown
            held = torch.tensor(config.shares[name]) > 0
            classes[~held[classes[:, i].long()], i] = -1
        held = classes[valid] + torch.rand(int(valid.sum()), len(names), generator=torch.Generator().manual_seed(args.seed))
        print(f"{len(held):,} held-out rows (valid)")
        patients.print_calibration(patients.calibration(model, torch.where(classes[valid] < 0, torch.nan, held.double())))
    print(f"{config.rows:,} training rows, {args.steps} steps, seed {args.seed}: the model is in {args.out}")


def check_command(args):
    model = patients.load(args.model)
    records = [record for record in index_records(args.index) if record["split"] == "test"]
    if model.config.closed_world:
        records = [patients.close_world(record) for record in records]
    if not records:
        raise InputError(f"{args.index}: no row in the split test")
    said = [{name: record[name] for name in model.names if name in record} for record in records]
    kept = [{name: value for name, value in record.items() if patients.covers(model, name, value)} for record in said]
    places = patients.to_places(model, kept, range(len(kept)))
    print(f"{len(kept):,} rows (test), {sum(map(len, said)) - sum(map(len, kept))} values left out that training never held")
    patients.print_calibration(patients.calibration(model, places))
    result = patients.check(model, places)
    for name in ("composition", "reversibility"):
        equal, total, years = result[name]
        print(f"{name}: {equal:,} of {total:,} discrete values come back, ages within {years:.1e} years")
    print("effectiveness: {:,} of {:,} rows show the value that was set".format(*result["effectiveness"]))


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("graph", help="print the graph, write it as JSON, draw it")
    p.add_argument("--graph", type=Path, help="a graph of your own, as JSON; without it the paper's")
    p.add_argument("--json", type=Path, help="write it here, to be changed and given to fit --graph")
    p.add_argument("--out", type=Path, help="draw it here, as PNG")
    p = commands.add_parser("fit", help="learn the mechanisms from the split train of one or several indices")
    p.add_argument("indices", nargs="+", type=Path, metavar="INDEX", help="prepared source, or a table like its index.csv")
    p.add_argument("--out", type=Path, required=True, help="folder of the model")
    p.add_argument("--graph", type=Path, help="a graph of your own, as JSON")
    p.add_argument("--without", nargs="+", default=[], metavar="FIELD", help="leave out what no row knows")
    p.add_argument("--closed-world", action="store_true", help="unmentioned findings are negative")
    p.add_argument("--steps", type=cli.positive, default=8000)
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("check", help="calibration, composition, effectiveness, reversibility on the split test")
    p.add_argument("model", type=Path)
    p.add_argument("index", type=Path)
    for name, text in (("sample", "draw whole patients"), ("counterfactual", "change the rows of a table by intervention")):
        p = commands.add_parser(name, help=text)
        p.add_argument("model", type=Path)
        if name == "sample":
            p.add_argument("-n", type=cli.positive, default=1000, help="how many")
        else:
            p.add_argument("rows", type=Path, help="a prepared source, or a table like its index.csv")
        p.add_argument("--do", action="append", default=[], metavar="FIELD=VALUE", help="set a field by intervention")
        p.add_argument("--seed", type=int, default=0, help="of the first row; the next has the next")
        p.add_argument("--out", type=Path, required=True, help="a table like index.csv")
    cohort.add_arguments(commands.add_parser("cohort", help="a table of whom to draw, for sample.py --metadata"))
    edit.add_arguments(commands.add_parser("edit", help="the same radiograph, had one thing been different",
                                           description=edit.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    args = parser.parse_args()

    if args.command == "edit":
        return edit.edit_command(args)

    torch.set_num_threads(1)                                         # the matrices are small: a second thread only waits
    if args.command == "graph":
        graph = read_graph(args.graph) if args.graph else GRAPH
        print_graph(graph)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            cli.write_json(args.json, graph)
        if args.out:
            draw_graph(graph, args.out)
    elif args.command == "fit":
        fit_command(args)
    elif args.command == "check":
        check_command(args)
    elif args.command == "cohort":
        cohort.cohort_command(args)
    else:
        model = patients.load(args.model)
        do = patients.parse_do(args.do, model)
        if args.command == "counterfactual":
            records = patients.counterfactual(model, read_index(args.rows), do, args.seed)
        else:
            records = [{"path": f"images/{i}.png", "patient": f"synthetic-{i}", "split": "train"} | record
                       for i, record in enumerate(patients.sample(model, args.n, do, args.seed), args.seed)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        cli.write_csv(args.out, COLUMNS, map(index_row, records))
        print(f"{len(records):,} rows in {args.out}")


if __name__ == "__main__":
    cli.run(main)
