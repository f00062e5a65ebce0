"""Patients sampled from the causal model, changed by interventions, and what they would be otherwise.

    sample           noise for every variable, then every mechanism, parents first
    intervention     replaces the mechanism of what is set: p(rest | do) is Pearl's truncated factorisation
    counterfactual   abduct a row's noise, set what is intervened on, follow every descendant with its own noise

graph.py holds the graph of the 19 variables; mechanisms.py the flows, and what happens to discrete and to unknown
values. Sources: arXiv 2606.19460; Pearl 2009; Monteiro et al. 2023 (composition and reversibility).

No Finding has no mechanism. It is negative if one of its parents is positive, positive if all are negative, else
unknown.

The closed world. Tables made from lists of findings (ChestX-ray14) name what was found and nothing else: no row of
theirs says negative beside positive. Read as they are, only normal images would have negative findings. So in an
index without such a row the findings that a row does not mention are read as negative. A model that was fitted on
such indices alone reads the rows it is asked about in the same way.
"""
import itertools

import torch

from causal.graph import DETERMINED, FINDINGS, determined
from causal.mechanisms import CHUNK, EDGE, YEARS, CausalConfig, CausalModel
from common import hub
from common.cli import InputError
from radiographs import fields
from radiographs.index import index_records

# ---------------------------------------------------------------------------------------------------------
# Records in and out

def rows_from_seeds(distribution, count, seeds):
    """(len(seeds), count) random numbers of a distribution (torch.rand or torch.randn); a row depends on its seed
    alone."""
    return torch.stack([distribution(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                        for seed in seeds])


def covered(model, name):
    """The values of a variable that the training data held; of age the least and the greatest, in whole years."""
    values = range(YEARS) if name == "age" else model.config.values(name)
    held = [value for value, share in zip(values, model.config.shares[name]) if share]
    return (held[0], held[-1]) if name == "age" else held


def covers(model, name, value):
    held = covered(model, name)
    return held[0] - 0.5 <= value < held[1] + 0.5 if name == "age" else value in held


def covered_part(model, record):
    """The values of a record that the model can abduct: of its variables, and held by its training data."""
    return {name: record[name] for name in model.names if name in record and covers(model, name, record[name])}


def list_not_covered(model, records):
    """In words, the values of the model's variables that its training data never held; see fields.list_left_out."""
    mine = [{name: record[name] for name in model.names if name in record} for record in records]
    return fields.list_left_out(mine, [covered_part(model, record) for record in mine])


def check_value(model, name, value):
    """Refuses what the model can neither set nor abduct."""
    if name == DETERMINED:
        raise InputError("no_finding follows from the findings; intervene on those")
    if name not in model.names:
        raise InputError(f"{name} is no variable of this model; its variables are {', '.join(model.names)}")
    if not covers(model, name, value):
        held = covered(model, name)
        values = f"{held[0]} to {held[1]}" if name == "age" else ", ".join(held)
        raise InputError(f"{name}={value} was not covered by the data of this model; covered: {values}")


def to_places(model, records, seeds):
    """Records (dicts of field -> value) as places (N, M). Where in its interval a discrete value lies is random, from
    one seed a record."""
    for record in records:
        for name in record.keys() & set(model.names):
            check_value(model, name, record[name])
    inside = rows_from_seeds(torch.rand, len(model.names), (2 * seed for seed in seeds)) * (1 - 2 * EDGE) + EDGE
    places = torch.full_like(inside, torch.nan)
    for i, name in enumerate(model.names):
        for row, record in enumerate(records):
            if name in record:
                value = record[name]
                if name == "age":
                    places[row, i] = value + 0.5
                else:
                    places[row, i] = model.config.values(name).index(value) + inside[row, i]
    return places


def to_records(model, places):
    """Places (N, M) as records with No Finding, unknown fields absent. Ages are in years, from 0."""
    records = []
    for row in places.tolist():
        record = {name: max(place - 0.5, 0.0) if name == "age" else model.config.values(name)[int(place)]
                  for name, place in zip(model.names, row) if place == place}
        records.append(record | determined(model.graph, record))
    return records


def to_do(model, do):
    for name, value in do.items():
        check_value(model, name, value)
    return {name: 0.5 + (value if name == "age" else model.config.values(name).index(value))
            for name, value in do.items()}


def sample(model, n, do={}, seed=0):
    """n whole patients as records, patient i from seed + i alone. do: field -> value, set by intervention for all, or
    a list of n such dicts, one for each patient, that set the same fields."""
    noise = rows_from_seeds(torch.randn, len(model.names), (2 * (seed + i) + 1 for i in range(n)))
    if isinstance(do, dict):
        return to_records(model, model.predict(noise, to_do(model, do)))
    places = [to_do(model, one) for one in do]
    columns = {name: noise.new_tensor([one[name] for one in places]) for name in places[0]}
    return to_records(model, model.predict(noise, columns))


def counterfactual(model, records, do, seed=0):
    """The records as they would be under do. Record i is explained by seed + i: another seed, another explanation.

    What is unknown stays unknown. Fields outside the model, and values that its training data never held, count as
    unknown and are passed through. A model of a closed world closes the records first. A known No Finding changes
    only if a finding does and the findings then contradict it."""
    if model.config.closed_world:
        records = [close_world(record) for record in records]
    factual = to_places(model, [covered_part(model, record) for record in records],
                        [seed + i for i in range(len(records))])
    places = model.predict(model.abduct(factual), to_do(model, do), factual)
    result = []
    for old, new, same in zip(records, to_records(model, places), (places == factual).tolist()):
        new = old | {name: new[name] for name, stays in zip(model.names, same) if not stays and name in new}
        if any(old.get(name) != new.get(name) for name in model.graph.get(DETERMINED, ())):
            new |= determined(model.graph, new)
        result.append(new)
    return result


# ---------------------------------------------------------------------------------------------------------
# What there is to fit

CLASS_COLUMNS = ("age", *fields.CODED)


def to_classes(records, datasets):
    """Records as (N, 19) int16, columns as CLASS_COLUMNS: the number of each value, ages in whole years, -1 unknown."""
    age, codes = fields.encode_metadata(records, datasets)
    years = (age + 0.5).floor().nan_to_num(-1)                       # N
    return torch.cat([years[:, None], codes - 1], 1).short()


def read_classes(folders, open_world=False):
    """The rows of indices as classes (N, 19), their splits, the names of the data sets, and the indices that list
    findings only, whose world is closed unless `open_world`."""
    parts, splits, datasets = [], [], list(fields.DATASETS)
    closed = [] if open_world else [folder for folder in folders if lists_findings_only(index_records(folder))]
    for folder in folders:
        records = index_records(folder)
        while chunk := list(itertools.islice(records, CHUNK)):
            if folder in closed:
                chunk = [close_world(record) for record in chunk]
            datasets += sorted({record["dataset"] for record in chunk if "dataset" in record} - set(datasets))
            parts.append(to_classes(chunk, datasets))
            splits += [record["split"] for record in chunk]
    if not parts:
        raise InputError(f"{', '.join(map(str, folders))}: the index has no rows")
    return torch.cat(parts), splits, datasets, closed


def lists_findings_only(records):
    """Whether some record has a positive finding and none has a negative finding beside a positive one."""
    lists = False
    for record in records:
        values = {record.get(name) for name in FINDINGS}
        if {"negative", "positive"} <= values:
            return False
        lists |= "positive" in values
    return lists


def close_world(record):
    """The record with negatives for the findings that it does not mention, if it mentions any."""
    if not record.keys() & {DETERMINED, *FINDINGS}:
        return record
    return fields.resolve_labels({name: "negative" for name in FINDINGS} | record)


def count_shares(classes, config, names):
    """Variable -> share of each value. A variable that no row knows is absent."""
    shares = {}
    for name in names:
        column = classes[:, CLASS_COLUMNS.index(name)].long()
        values = YEARS if name == "age" else len(config.values(name))
        count = torch.bincount(column[column >= 0], minlength=values).double()
        if not count.sum():
            continue
        if name == "age":                                            # a year in between without a person counts 0.5
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
        print(f"{name:28}{n:9,}{marginal:18.4f}{mechanism:12.4f}" + (f"{distance:21.4f}" if n > 1 else f"{'-':>21}"))
    if any(n < 2 for _, n, *_ in table):
        print("-: how noise is distributed shows in two rows or more")


def agreement(model, a, b, which):
    """Of the places `which` (N M): equal discrete values, all discrete values, greatest difference of ages in years."""
    age = torch.tensor([name == "age" for name in model.names])
    equal = (a.floor() == b.floor())[which & ~age]
    return int(equal.sum()), len(equal), max((a - b).abs()[which & age].tolist(), default=0.0)


def check(model, places):
    """{"composition", "reversibility": agreement(...)}.

    Composition: abduct, set nothing, predict everything. Reversibility: set each value of each variable that is a
    parent (every tenth year), abduct anew from where that leads, set back, predict. Both keep the places inside the
    intervals. (Effectiveness needs no check: an intervention sets the value itself.)"""
    noise, known = model.abduct(places), ~places.isnan()
    back, before = [], []
    for i, name in enumerate(model.names):
        rows = known[:, i].nonzero()[:, 0].tolist()
        if not rows or not model.parent[:, i].any():
            continue
        values = [k for k, share in enumerate(model.config.shares[name]) if share]
        for k in values[::10 if name == "age" else 1]:
            there = model.predict(noise[rows], {name: k + 0.5}, places[rows])
            back.append(model.predict(model.abduct(there), {name: places[rows, i]}, there))
            before.append(places[rows])
    back, before = (torch.cat(parts) if parts else places[:0] for parts in (back, before))
    return {"composition": agreement(model, model.predict(noise), places, known),
            "reversibility": agreement(model, back, before, ~before.isnan())}


# ---------------------------------------------------------------------------------------------------------
# On disk and on the command line

def load(folder):
    return hub.load_model(CausalModel, CausalConfig, folder).double()


def parse_do(items, model):
    """["age=80", ...] -> {"age": 80.0, ...}; raises InputError for what the model cannot set."""
    do = {}
    for item in items:
        one = fields.parse_items([item], "--do", model.config.datasets)
        if not one:
            raise InputError(f"--do {item}: an intervention sets a value, and unknown is not a value")
        for name, value in one.items():
            check_value(model, name, value)
        do |= one
    return do
