"""The causal model: patients drawn from an expert graph, changed by interventions, and what they would be otherwise.

    sample           noise for every variable, then every mechanism, parents first
    intervention     the mechanism of what is set is put aside: p(rest | do) is Pearl's truncated factorisation
    counterfactual   abduct a row's noise, set what is intervened on, follow every descendant with its own noise

graphs.py holds the graph of 19 variables, mechanisms.py the flows and what happens to discrete and to unknown values.
Source: arXiv 2606.19460; Monteiro et al. 2023 (composition, effectiveness, reversibility), Pearl 2009.

Determined. No Finding follows from its parents: negative if one is positive, positive if all are negative, else unknown.

    python causal.py graph --out graph.png
    python causal.py fit PREPARED... --out MODEL [--graph MINE.json] [--without race] [--closed-world]
    python causal.py sample MODEL -n 1000 --do cardiomegaly=positive --out patients.csv
    python causal.py counterfactual MODEL ROWS.csv --do age=80 --out older.csv
    python causal.py check MODEL PREPARED
"""
import itertools
from pathlib import Path

import torch

import cli
import data
import fields
import graphs
import hub
import mechanisms
from cli import InputError
from mechanisms import CHUNK, EDGE, YEARS, CausalConfig, CausalModel


# ---------------------------------------------------------------------------------------------------------
# Records in and out

def seeded(draw, count, seeds):
    """One row a seed, the same in any batch."""
    return torch.stack([draw(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds])


def covered(model, name):
    """The values of a variable that the training data held; of age the least and the greatest, in whole years."""
    values = range(YEARS) if name == "age" else model.config.values(name)
    held = [value for value, share in zip(values, model.config.shares[name]) if share]
    return (held[0], held[-1]) if name == "age" else held


def covers(model, name, value):
    held = covered(model, name)
    return held[0] - 0.5 <= value < held[1] + 0.5 if name == "age" else value in held


def check_value(model, name, value):
    """Refuses what the model can neither set nor abduct."""
    if name == graphs.DETERMINED:
        raise InputError("no_finding follows from the findings; intervene on those")
    if name not in model.names:
        raise InputError(f"{name} is no variable of this model; its variables are {', '.join(model.names)}")
    if not covers(model, name, value):
        values = " to ".join(map(str, covered(model, name))) if name == "age" else ", ".join(covered(model, name))
        raise InputError(f"{name}={value} was not covered by the data of this model; covered: {values}")


def to_places(model, records, seeds):
    """Records (dicts of field -> value) as places (N, M). Where in its interval a discrete value lies is drawn from seeds,
    one a record."""
    for record in records:
        for name in record.keys() & set(model.names):
            check_value(model, name, record[name])
    inside = seeded(torch.rand, len(model.names), (2 * seed for seed in seeds)) * (1 - 2 * EDGE) + EDGE
    places = torch.full_like(inside, torch.nan)
    for i, name in enumerate(model.names):
        for row, record in enumerate(records):
            if name in record:
                value = record[name]
                places[row, i] = value + 0.5 if name == "age" else model.config.values(name).index(value) + inside[row, i]
    return places


def to_records(model, places):
    """Places (N, M) as records with No Finding, unknown fields absent. Ages are in years, from 0."""
    records = []
    for row in places.tolist():
        record = {name: max(place - 0.5, 0.0) if name == "age" else model.config.values(name)[int(place)]
                  for name, place in zip(model.names, row) if place == place}
        records.append(record | graphs.determined(model.graph, record))
    return records


def to_do(model, do):
    for name, value in do.items():
        check_value(model, name, value)
    return {name: 0.5 + (value if name == "age" else model.config.values(name).index(value)) for name, value in do.items()}


def sample(model, n, do={}, seed=0):
    """n whole patients as records, patient i from seed + i alone; do: field -> value, set by intervention for all, or a list
    of n such dicts, one a patient, that set the same fields."""
    noise = seeded(torch.randn, len(model.names), (2 * (seed + i) + 1 for i in range(n)))
    if isinstance(do, dict):
        return to_records(model, model.predict(noise, to_do(model, do)))
    places = [to_do(model, one) for one in do]
    return to_records(model, model.predict(noise, {name: noise.new_tensor([one[name] for one in places]) for name in places[0]}))


def counterfactual(model, records, do, seed=0):
    """The records as they would be under do. Unknown stays unknown; fields outside the model pass through.
    No Finding changes only if a finding does. Record i is explained by seed + i; another seed, another explanation."""
    factual = to_places(model, records, [seed + i for i in range(len(records))])
    places = model.predict(model.abduct(factual), to_do(model, do), factual)
    result = []
    for old, new, same in zip(records, to_records(model, places), (places == factual).tolist()):
        new = old | {name: new[name] for name, stays in zip(model.names, same) if not stays and name in new}
        if any(old.get(name) != new.get(name) for name in model.graph.get(graphs.DETERMINED, ())):
            new.pop(graphs.DETERMINED, None)
            new |= graphs.determined(model.graph, new)
        result.append(new)
    return result


# ---------------------------------------------------------------------------------------------------------
# What there is to fit

COLUMNS = ("age", *fields.CODED)


def to_classes(records, datasets):
    """Records as (N, 19) int16, columns as COLUMNS: the number of each value, ages in whole years, -1 unknown."""
    age, codes = fields.encode_metadata(records, datasets)
    years = (age + 0.5).floor().nan_to_num(-1)                       # N
    return torch.cat([years[:, None], codes - 1], 1).short()


def read_classes(folders, closed_world=False):
    """The rows of indices as classes (N, 19), their splits, and the names of the data sets."""
    parts, splits, datasets = [], [], list(fields.DATASETS)
    records = itertools.chain.from_iterable(map(data.index_records, folders))
    while chunk := list(itertools.islice(records, CHUNK)):
        if closed_world:
            chunk = [close_world(record) for record in chunk]
        datasets += sorted({record["dataset"] for record in chunk if "dataset" in record} - set(datasets))
        parts.append(to_classes(chunk, datasets))
        splits += [record["split"] for record in chunk]
    if not parts:
        raise InputError(f"{', '.join(map(str, folders))}: the index has no rows")
    return torch.cat(parts), splits, datasets


def close_world(record):
    """The record with negatives for the findings that it does not mention, if it speaks of findings at all."""
    if not record.keys() & {graphs.DETERMINED, *graphs.FINDINGS}:
        return record
    return fields.settle({name: "negative" for name in graphs.FINDINGS} | record)


def count_shares(classes, config, names):
    """Variable -> share of each value. Raises InputError if no row knows the variable."""
    shares = {}
    for name in names:
        column = classes[:, COLUMNS.index(name)].long()
        count = torch.bincount(column[column >= 0], minlength=YEARS if name == "age" else len(config.values(name))).double()
        if not count.sum():
            raise InputError(f"no training row knows {name}: leave it out with --without {name}")
        if name == "age":                                            # a year between others that nobody has: half a person
            years = count.nonzero()
            count[years.min():years.max() + 1].clamp_(min=0.5)
        shares[name] = (count / count.sum()).tolist()
    return shares


# ---------------------------------------------------------------------------------------------------------
# Checking

def calibration(model, places):
    """Per variable (name, rows that know it, mean log-likelihood by its marginal, the same by its mechanism, greatest
    distance of the abducted noise's distribution function from that of N(0, 1))."""
    noise, likelihood, table = model.abduct(places), model.likelihood(places), []
    for i, name in enumerate(model.names):
        known = ~places[:, i].isnan()
        if n := int(known.sum()):
            share = torch.tensor(model.config.shares[name], dtype=torch.float64)[places[known, i].long()]
            u, k = torch.special.ndtr(noise[known, i]).sort().values, torch.arange(n)
            distance = torch.maximum((k + 1) / n - u, u - k / n).max().item()    # Kolmogorov-Smirnov
            table.append((name, n, share.clamp(1e-9).log().mean().item(), likelihood[known, i].mean().item(), distance))
    return table


def print_calibration(table):
    print(f"{'variable':28}{'rows':>9}   log p, marginal   mechanism   noise from N(0, 1)")
    for name, n, marginal, mechanism, distance in table:
        print(f"{name:28}{n:9,}{marginal:18.4f}{mechanism:12.4f}{distance:21.4f}")


def agreement(model, a, b, which):
    """Of the places `which` (N M): equal discrete values, all discrete values, greatest difference of ages in years."""
    age = torch.tensor([name == "age" for name in model.names])
    equal = (a.floor() == b.floor())[which & ~age]
    return int(equal.sum()), len(equal), max((a - b).abs()[which & age].tolist(), default=0.0)


def check(model, places):
    """{"composition", "reversibility": agreement(...), "effectiveness": (rows that show what was set, rows)}.

    Composition: abduct, set nothing, predict everything. Reversibility: set each value of each variable that is a parent
    (every tenth year), abduct anew from where that leads, set back, predict. Both keep the places inside the intervals."""
    noise, known = model.abduct(places), ~places.isnan()
    effective, back, before = [], [], []
    for i, name in enumerate(model.names):
        values = [k for k, share in enumerate(model.config.shares[name]) if share]
        for k in values[::10 if name == "age" else 1]:
            there = model.predict(noise, {name: k + 0.5}, places)
            effective.append(there[:, i].floor() == k)
            if rows := known[:, i].nonzero()[:, 0].tolist() if model.parent[:, i].any() else []:
                home = model.predict(model.abduct(there[rows]), {name: places[rows, i]}, there[rows])
                back.append(home), before.append(places[rows])
    effective = torch.cat(effective)
    back, before = (torch.cat(parts) if parts else places[:0] for parts in (back, before))
    return {"composition": agreement(model, model.predict(noise), places, known),
            "effectiveness": (int(effective.sum()), len(effective)),
            "reversibility": agreement(model, back, before, ~before.isnan())}


# ---------------------------------------------------------------------------------------------------------
# Commands

def load(folder):
    return hub.load_model(CausalModel, CausalConfig, folder).double()


def parse_do(items, model):
    """["age=80", ...] -> {"age": 80.0, ...}; raises InputError for what the model cannot set."""
    do = {}
    for item in items:
        if "=" not in item:
            raise InputError(f"--do {item}: not of the form FIELD=VALUE, such as cardiomegaly=positive")
        name, text = item.split("=", 1)
        do[name] = fields.parse_value(name, text, model.config.datasets)
        if do[name] is None:
            raise InputError(f"--do {item}: an intervention sets a value, and unknown is none")
        check_value(model, name, do[name])
    return do


def fit_command(args):
    graph = graphs.read_graph(args.graph) if args.graph else graphs.GRAPH
    for name in args.without:
        if name not in graph:
            raise InputError(f"--without {name}: not in the graph; its variables are {', '.join(graph)}")
    graph = {name: [p for p in graph[name] if p not in args.without] for name in graph if name not in args.without}
    classes, splits, datasets = read_classes(args.indices, args.closed_world)
    train, valid = (torch.tensor([split == part for split in splits]) for part in ("train", "valid"))
    names = [name for name in graphs.check_graph(graph) if name != graphs.DETERMINED]
    config = CausalConfig(graph, {}, datasets, args.closed_world)
    config.source, config.rows = [path.name for path in args.indices], int(train.sum())
    config.shares = count_shares(classes[train], config, names)
    classes = classes[:, [COLUMNS.index(name) for name in names]]
    model = mechanisms.fit(classes[train], config, args.steps, seed=args.seed, progress=True)
    hub.save_model(model, args.out, torch.float32)
    if valid.any():
        for i, name in enumerate(names):                             # a value that training never held is unknown
            held = torch.tensor(config.shares[name]) > 0
            classes[~held[classes[:, i].long()], i] = -1
        held = classes[valid] + torch.rand(int(valid.sum()), len(names), generator=torch.Generator().manual_seed(args.seed))
        print(f"{len(held):,} held-out rows (valid)")
        print_calibration(calibration(model, torch.where(classes[valid] < 0, torch.nan, held.double())))
    print(f"{config.rows:,} training rows, {args.steps} steps, seed {args.seed}: the model is in {args.out}")


def check_command(args):
    model = load(args.model)
    records = [record for record in data.index_records(args.index) if record["split"] == "test"]
    if model.config.closed_world:
        records = [close_world(record) for record in records]
    if not records:
        raise InputError(f"{args.index}: no row in the split test")
    said = [{name: record[name] for name in model.names if name in record} for record in records]
    kept = [{name: value for name, value in record.items() if covers(model, name, value)} for record in said]
    places = to_places(model, kept, range(len(kept)))
    print(f"{len(kept):,} rows (test), {sum(map(len, said)) - sum(map(len, kept))} values left out that training never held")
    print_calibration(calibration(model, places))
    result = check(model, places)
    for name in ("composition", "reversibility"):
        equal, total, years = result[name]
        print(f"{name}: {equal:,} of {total:,} discrete values come back, ages within {years:.1e} years")
    print("effectiveness: {:,} of {:,} rows show the value that was set".format(*result["effectiveness"]))


def main():
    parser = cli.Parser(description="The causal model of the 19 metadata fields.")
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
    args = parser.parse_args()

    torch.set_num_threads(1)                                         # the matrices are small: a second thread only waits
    if args.command == "graph":
        graph = graphs.read_graph(args.graph) if args.graph else graphs.GRAPH
        graphs.print_graph(graph)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            cli.write_json(args.json, graph)
        if args.out:
            graphs.draw_graph(graph, args.out)
    elif args.command == "fit":
        fit_command(args)
    elif args.command == "check":
        check_command(args)
    else:
        model = load(args.model)
        do = parse_do(args.do, model)
        if args.command == "counterfactual":
            records = counterfactual(model, data.read_index(args.rows), do, args.seed)
        else:
            records = [{"path": f"images/{i}.png", "patient": f"synthetic-{i}", "split": "train"} | record
                       for i, record in enumerate(sample(model, args.n, do, args.seed), args.seed)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        cli.write_csv(args.out, data.COLUMNS, map(data.index_row, records))
        print(f"{len(records):,} rows in {args.out}")


if __name__ == "__main__":
    cli.run(main)
