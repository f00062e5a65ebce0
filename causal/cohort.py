"""Whom to draw: the metadata of many images, from a table, a real index, the causal model, or in equal numbers a subgroup.

    records_like   rows of real indices, in an order that depends on the seed
    causal_patients  whole patients of the causal model, under interventions
    balanced       as many of each combination of values; the findings of each from the causal model, p(rest | do(values))

Every function gives a list of records, dicts of field -> value without what is unknown. Row i depends on seed + i alone where
it is drawn. What the weights were never trained on is refused where somebody asks for it, and unknown where it only follows.
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
    """The metadata of `count` rows of real indices, in an order that depends on the seed; all are used before any twice."""
    rows = [record for folder in folders for record in read_index(folder) if not splits or record["split"] in splits]
    if not rows:
        raise InputError(f"{', '.join(map(str, folders))}: no row in the split {' or '.join(splits)}")
    order = [i for n in range(-(-count // len(rows))) for i in random.Random(seed + n).sample(range(len(rows)), len(rows))]
    return [{field: rows[i][field] for field in fields.FIELDS if field in rows[i]} for i in order[:count]]


def causal_patients(model, do, n, seed, covered):
    """n records from a causal model under the interventions `do` ("FIELD=VALUE", ...)."""
    do = patients.parse_do(do, model)
    fields.check_covered(do, covered)
    return patients.sample(model, n, do, seed)


def choices(field, covered, model):
    """The values of a field to balance over, and in words those that the weights or the causal model (or None) do not cover.
    Of age the values are pairs of whole years, AGE_BANDS as far as they are covered."""
    known = model and field in model.names
    if field == "age":
        low, high = (math.ceil(covered["age"][0]), math.floor(covered["age"][1]))
        if known:
            low, high = max(low, patients.covered(model, "age")[0]), min(high, patients.covered(model, "age")[1])
        bands = [(max(first, low), min(last, high)) for first, last in fields.AGE_BANDS]
        return ([band for band in bands if band[0] <= band[1]],
                [f"age={first}-{last}" for (first, last), band in zip(fields.AGE_BANDS, bands) if band[0] > band[1]])
    values = tuple(covered["dataset"]) if field == "dataset" else fields.VALUES[field]
    kept = [value for value in values if value in covered[field] and (not known or patients.covers(model, field, value))]
    return kept, [f"{field}={value}" for value in values if value not in kept]


def balanced(names, n, seed, covered, model=None):
    """n records in which every combination of the values of the fields `names` comes as often, to within one: image i shows
    combination i modulo their number. Ages are whole years, each of a band as likely. All other fields are drawn from the
    causal `model` under these values as interventions; without a model they are unknown.

    Returns the records, the combinations, and in words the values left out because the weights or the model do not cover
    them. Raises InputError for fields that cannot be balanced."""
    for name in names:
        if name not in fields.FIELDS:
            raise InputError(f"--balance: unknown field {name!r}; the fields are {', '.join(fields.FIELDS)}")
        if name not in covered:
            raise InputError(f"--balance {name}: the training data of these weights says nothing of it; covered: {', '.join(covered)}")
    if model and "no_finding" in names:
        raise InputError("--balance no_finding: it follows from the findings of the causal model; balance one of those")
    kept, left_out = zip(*(choices(name, covered, model) for name in names))
    cells = list(itertools.product(*kept))
    if not cells:
        raise InputError(f"--balance {','.join(names)}: no combination is covered by both the weights and the causal model")
    wishes = [dict(zip(names, cells[i % len(cells)])) for i in range(n)]
    for i, wish in enumerate(wishes):
        if "age" in wish:
            wish["age"] = float(random.Random(seed + i).randint(*wish["age"]))
    records = wishes
    if model:
        do = [{name: wish[name] for name in names if name in model.names} for wish in wishes]
        records = [drawn | wish for drawn, wish in zip(patients.sample(model, n, do, seed), wishes)]
    return records, cells, list(itertools.chain(*left_out))


def add_arguments(parser):
    parser.add_argument("--weights", type=Path, default=sample.DEMO, help="for whom the table is: it asks for nothing that they do not cover")
    parser.add_argument("--n", type=cli.positive, default=16, help="how many rows")
    whom = parser.add_mutually_exclusive_group()
    whom.add_argument("--like", nargs="+", type=Path, help="the metadata of rows of these prepared sources")
    whom.add_argument("--balance", metavar="FIELD,FIELD", help="as many rows of each combination of these fields, age in bands")
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="of --like")
    parser.add_argument("--causal", type=Path, metavar="MODEL", help="the causal model; causal/ beside the weights, if not given")
    parser.add_argument("--do", action="append", default=[], metavar="FIELD=VALUE", help="without --like and --balance: intervene")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set a field in every row, whatever follows from it")
    parser.add_argument("--seed", type=int, default=0, help="of the first row; the next has the next")
    parser.add_argument("--out", type=Path, required=True, help="a table for sample.py --metadata")


def cohort_command(args):
    """Writes the table: the seed of each image and the fields it is asked to show."""
    cfg = sample.load_weights(args.weights)[0].config
    asked = fields.parse_items(args.set, "--set", cfg.datasets)
    fields.check_covered(asked, cfg.covered)
    place = args.causal or args.weights / "causal"
    model = patients.load(place) if args.causal or hub.find(place, "config.json") else None
    if args.like:
        records = records_like(args.like, args.split, args.n, args.seed)
    elif args.balance:
        names = args.balance.split(",")
        if twice := asked.keys() & set(names):
            raise InputError(f"--balance {args.balance} sets {', '.join(twice)} itself; --set takes other fields only")
        records, cells, left_out = balanced(names, args.n, args.seed, cfg.covered, model)
        print(f"{len(cells)} combinations of {', '.join(names)}, {args.n // len(cells)} or {-(-args.n // len(cells))} rows each"
              + (f"; not covered, so left out: {', '.join(left_out)}" if left_out else "")
              + ("" if model else "; no causal model beside the weights, so all other fields are unknown"))
    elif model:
        records = causal_patients(model, args.do, args.n, args.seed, cfg.covered)
    else:
        raise InputError(f"{args.weights}: no causal model beside these weights; name one by --causal, or give --like or --balance")
    wanted = [record | asked for record in records]
    records = fields.only_covered(wanted, cfg.covered)
    if wanted != records:
        print(f"{sum(map(len, wanted)) - sum(map(len, records))} of {sum(map(len, wanted))} values were not covered in the "
              f"training of these weights and stay unknown")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cli.write_csv(args.out, ["seed", *fields.FIELDS], ([seed, *(record.get(field, "") for field in fields.FIELDS)]
                                                       for seed, record in enumerate(records, args.seed)))
    print(f"{len(records):,} rows in {args.out}")
