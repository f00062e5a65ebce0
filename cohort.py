"""Whom to draw: the metadata of many images, from a table, a real index, the causal model, or in equal numbers a subgroup.

    read_rows      one image a row of a CSV, in the columns of an index or named as the fields are
    records_like   rows of real indices, in an order that depends on the seed
    patients       whole patients of the causal model, under interventions
    balanced       as many of each combination of values; the findings of each from the causal model, p(rest | do(values))

Every function gives a list of records, dicts of field -> value without what is unknown. Row i depends on seed + i alone where
it is drawn. What the weights were never trained on is refused where somebody asks for it, and unknown where it only follows.
"""
import csv
import itertools
import math
import random

import causal
import data
import fields
import sources
from cli import InputError


def read_rows(path, datasets, covered):
    """The rows of a CSV as records and their seeds, None where none is given. Its columns are those of an index, or names of
    fields, with `file` and `seed` as in the metadata.csv of a sample. Raises InputError naming row and column."""
    if not path.is_file():
        raise InputError(f"--metadata {path}: no such file")
    try:
        rows = list(sources.read_table(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table: {error}") from None
    if not rows:
        raise InputError(f"{path}: no rows; the first line names columns, every other describes an image")
    if "ImagePath" in rows[0]:
        records, seeds = [{field: row[field] for field in fields.FIELDS if field in row} for row in data.index_records(path)], None
    elif strange := set(rows[0]) - {None, "file", "seed", *fields.FIELDS}:
        raise InputError(f"{path}: unknown column {', '.join(sorted(map(str, strange)))}; accepted: seed, {', '.join(fields.FIELDS)}, "
                         "or the columns of an index.csv")
    else:
        records, seeds = [], []
        for number, row in enumerate(rows, start=2):
            if None in row or None in row.values():
                raise InputError(f"{path}, line {number}: not as many cells as the first line has columns")
            record = {}
            for field in row.keys() & set(fields.FIELDS):
                try:
                    record[field] = fields.parse_value(field, row[field], datasets)
                except InputError as error:
                    raise InputError(f"{path}, line {number}, column {field}: {error}") from None
            seed = row.get("seed", "").strip()
            if seed and not (seed.isdecimal() and int(seed) < 2 ** 62):
                raise InputError(f"{path}, line {number}, column seed: {seed!r} is not a whole number from 0 to 2^62")
            records.append(fields.spelled({field: record[field] for field in fields.FIELDS if field in record}))
            seeds.append(int(seed) if seed else None)
    for number, record in enumerate(records, start=2):
        try:
            fields.check_covered(record, covered)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return records, seeds or [None] * len(records)


def records_like(folders, splits, count, seed):
    """The metadata of `count` rows of real indices, in an order that depends on the seed; all are used before any twice."""
    rows = [record for folder in folders for record in data.read_index(folder) if not splits or record["split"] in splits]
    if not rows:
        raise InputError(f"{', '.join(map(str, folders))}: no row in the split {' or '.join(splits)}")
    order = [i for n in range(-(-count // len(rows))) for i in random.Random(seed + n).sample(range(len(rows)), len(rows))]
    return [{field: rows[i][field] for field in fields.FIELDS if field in rows[i]} for i in order[:count]]


def patients(model, do, n, seed, covered):
    """n records from a causal model under the interventions `do` ("FIELD=VALUE", ...)."""
    do = causal.parse_do(do, model)
    fields.check_covered(do, covered)
    return causal.sample(model, n, do, seed)


def choices(field, covered, model):
    """The values of a field to balance over, and in words those that the weights or the causal model (or None) do not cover.
    Of age the values are pairs of whole years, AGE_BANDS as far as they are covered."""
    known = model and field in model.names
    if field == "age":
        low, high = (math.ceil(covered["age"][0]), math.floor(covered["age"][1]))
        if known:
            low, high = max(low, causal.covered(model, "age")[0]), min(high, causal.covered(model, "age")[1])
        bands = [(max(first, low), min(last, high)) for first, last in fields.AGE_BANDS]
        return ([band for band in bands if band[0] <= band[1]],
                [f"age={first}-{last}" for (first, last), band in zip(fields.AGE_BANDS, bands) if band[0] > band[1]])
    values = tuple(covered["dataset"]) if field == "dataset" else fields.VALUES[field]
    kept = [value for value in values if value in covered[field] and (not known or causal.covers(model, field, value))]
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
        records = [drawn | wish for drawn, wish in zip(causal.sample(model, n, do, seed), wishes)]
    return records, cells, list(itertools.chain(*left_out))
