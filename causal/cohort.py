"""A table of metadata for sample.py --metadata: one row for each image that is to be sampled.

    --like      the metadata of real rows, in an order that depends on the seed
    --balance   each combination of the values of some fields equally often; all other fields from the causal model,
                under these values as interventions: p(rest | do(values))
    neither     whole patients of the causal model, under the interventions --do

Row i depends on seed + i alone wherever it is random. What the weights were never trained on is refused where it is
asked for, left out of a balance, and unknown where it only follows: a value as well as a pair of values that no
training image held together, such as a data set of children and an age of 80.

    python -m causal cohort --balance sex,age --n 1000 --out out/cohort.csv
    python -m causal cohort --like data/nih --split test --n 200 --set view=PA --out out/like.csv
"""
import itertools
import math
import random
from pathlib import Path

import sample
from causal import patients
from common import cli, hub
from common.cli import InputError
from radiographs import fields
from radiographs.index import SPLITS, read_index


def records_like(folders, splits, count, seed):
    """The metadata of `count` rows of real indices, in an order that depends on the seed; all are used before any
    twice."""
    rows = [record for folder in folders for record in read_index(folder) if not splits or record["split"] in splits]
    if not rows:
        raise InputError(f"{', '.join(map(str, folders))}: no row in the split {' or '.join(splits)}")
    order = []
    for repeat in range(math.ceil(count / len(rows))):
        order += random.Random(seed + repeat).sample(range(len(rows)), len(rows))
    return [{field: rows[i][field] for field in fields.FIELDS if field in rows[i]} for i in order[:count]]


def choices(field, covered, model):
    """The values of a field to balance over, and in words those that the weights or the causal model (or None) do not
    cover. Of age the values are pairs of whole years, AGE_BANDS as far as they are covered."""
    in_model = model is not None and field in model.names
    kept, left_out = [], []
    if field == "age":
        low, high = math.ceil(covered["age"][0]), math.floor(covered["age"][1])
        if in_model:
            youngest, oldest = patients.covered(model, "age")
            low, high = max(low, youngest), min(high, oldest)
        for first, last in fields.AGE_BANDS:
            if max(first, low) <= min(last, high):
                kept.append((max(first, low), min(last, high)))
            else:
                left_out.append(f"age={first}-{last}")
        return kept, left_out
    for value in covered["dataset"] if field == "dataset" else fields.VALUES[field]:
        if value in covered[field] and (not in_model or patients.covers(model, field, value)):
            kept.append(value)
        else:
            left_out.append(f"{field}={value}")
    return kept, left_out


def check_balance(names, covered, model):
    """Refuses fields that cannot be balanced."""
    text = ",".join(names)
    for name in names:
        if name not in fields.FIELDS:
            raise InputError(f"--balance: unknown field {name!r}; the fields are {', '.join(fields.FIELDS)}")
        if names.count(name) > 1:
            raise InputError(f"--balance {text}: {name} is named twice")
        if name not in covered:
            raise InputError(f"--balance {name}: the training data of these weights says nothing of it; covered: "
                             f"{', '.join(covered)}")
    if model and "no_finding" in names:
        raise InputError("--balance no_finding: it follows from the findings of the causal model; balance one of those")


def combinations(names, covered, pairs, model):
    """All combinations of the values of the fields `names`, as tuples, and in words those left out: values that are not
    covered, and pairs of values that the training data never held together (fields.count_pairs)."""
    kept, left_out = zip(*(choices(name, covered, model) for name in names))
    cells, left_out = [], list(itertools.chain(*left_out))
    for cell in itertools.product(*kept):
        record = {name: value[0] if name == "age" else value for name, value in zip(names, cell)}
        if apart := fields.never_together(record, pairs):
            left_out.append(" with ".join(apart))
        else:
            cells.append(cell)
    if not cells:
        raise InputError(f"--balance {','.join(names)}: no combination is covered by both the weights and the causal "
                         "model")
    return cells, list(dict.fromkeys(left_out))


def balanced(names, n, seed, covered, model=None, pairs={}):
    """n records in which every combination of the values of the fields `names` comes equally often, to within one:
    record i shows combination i modulo their number. Ages are whole years, each of a band as likely. All other fields
    come from the causal `model` under these values as interventions; without a model they are unknown.

    Returns the records, the combinations, and in words the values left out (see combinations). Raises InputError for
    fields that cannot be balanced."""
    check_balance(names, covered, model)
    cells, left_out = combinations(names, covered, pairs, model)
    requests = [dict(zip(names, cells[i % len(cells)])) for i in range(n)]
    for i, request in enumerate(requests):
        if "age" in request:
            request["age"] = float(random.Random(seed + i).randint(*request["age"]))
    if model is None:
        return requests, cells, left_out
    do = [{name: request[name] for name in names if name in model.names} for request in requests]
    sampled = patients.sample(model, n, do, seed)
    return [patient | request for patient, request in zip(sampled, requests)], cells, left_out


def only_together(record, first, pairs):
    """The record without values that the training data never held together with those before them; the fields `first`
    come first, and are kept."""
    kept = {field: record[field] for field in first if field in record}
    for field, value in record.items():
        if not fields.never_together(kept | {field: value}, pairs):
            kept[field] = value
    return {field: kept[field] for field in fields.FIELDS if field in kept}


def add_arguments(parser):
    parser.add_argument("--weights", type=Path, default=sample.DEMO, help="the weights that will be sampled: the table "
                        "asks for nothing that they do not cover (default: the demo's)")
    parser.add_argument("--n", type=cli.integer(1, 10 ** 7), default=16, help="how many rows (default: 16)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--like", nargs="+", type=Path, help="the metadata of rows of these prepared sources")
    kind.add_argument("--balance", metavar="FIELD,FIELD", help="each combination of the values of these fields equally "
                      "often; ages in bands")
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="of --like; all, if not given")
    parser.add_argument("--causal", type=Path, metavar="MODEL", help="the causal model (default: causal/ beside the "
                        "weights)")
    parser.add_argument("--do", action="append", default=[], metavar="FIELD=VALUE", help="set a field by intervention: "
                        "what it causes follows; not with --like or --balance")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set a field in every row; "
                        "nothing follows from it")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 61), default=0,
                        help="of the first row; each further row has the next one")
    parser.add_argument("--out", type=cli.new_path, required=True, help="the table")


def check_options(args):
    """Refuses options that would be ignored."""
    if args.split and not args.like:
        raise InputError("--split chooses rows of --like; give --like too")
    if args.do and (args.like or args.balance is not None):
        raise InputError("--do sets fields of the causal model's patients; with --like or --balance use --set")
    if args.causal and args.like:
        raise InputError("--causal: --like takes real rows and no causal model; give one of the two")


def choose_records(args, cfg, given):
    """The records that the options ask for, before --set, and notes for the user."""
    folder = args.causal or args.weights / "causal"
    model = patients.load(folder) if args.causal or hub.find(folder, "config.json") else None
    pairs = cfg.pairs
    if args.like:
        return records_like(args.like, args.split, args.n, args.seed), []
    if args.balance is not None:
        names = args.balance.split(",")
        if twice := given.keys() & set(names):
            raise InputError(f"--balance {args.balance} sets {', '.join(twice)} itself; --set takes other fields only")
        records, cells, left_out = balanced(names, args.n, args.seed, cfg.covered, model, pairs)
        fewest, most = args.n // len(cells), math.ceil(args.n / len(cells))
        rows = cli.count(most, "row") if fewest == most else f"{fewest} or {cli.count(most, 'row')}"
        notes = [f"{cli.count(len(cells), 'combination')} of {', '.join(names)}, {rows} each"]
        if left_out:
            notes.append(f"left out, because the weights or the causal model do not cover them: {', '.join(left_out)}")
        if model is None:
            notes.append("no causal model beside the weights, so all other fields are unknown")
    elif model:
        do = patients.parse_do(args.do, model)
        fields.check_covered(do, cfg.covered)
        names, notes = list(do), []
        records = patients.sample(model, args.n, do, args.seed)
    else:
        raise InputError(f"{args.weights}: no causal model beside these weights; name one by --causal, or give --like "
                         "or --balance")
    together = [only_together(record, names, pairs) for record in records]
    if left_out := fields.list_left_out(records, together):
        notes.append(f"left unknown, because no training image had it together with the rest of its row: {left_out}")
    return together, notes


def cohort_command(args):
    """Writes the table: the seed of each image and the fields that it is to show."""
    check_options(args)
    cfg = sample.load_weights(args.weights)[0].config
    given = fields.parse_items(args.set, "--set", cfg.datasets)
    fields.check_covered(given, cfg.covered)
    records, notes = choose_records(args, cfg, given)
    records, changed = zip(*(fields.resolve_request(record | given) for record in records))
    notes += sorted(set(itertools.chain(*changed)))[:5]
    covered = fields.only_covered(records, cfg.covered)
    if left_out := fields.list_left_out(records, covered):
        notes.append(f"left unknown, because these weights were not trained on it: {left_out}")
    for note in notes:
        print(note)
    rows = []
    for seed, record in enumerate(covered, args.seed):
        rows.append([seed, *(record.get(field, "") for field in fields.FIELDS)])
    cli.write_csv(args.out, ["seed", *fields.FIELDS], rows)
    print(f"{cli.count(len(covered), 'row')} in {args.out}")
