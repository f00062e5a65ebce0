"""The 19 metadata fields of a radiograph, their values, and the one policy for labels that do not agree.

The paper (arXiv 2606.19460, CXR7-1M) describes every image by dataset, age, sex, race, view and the 14 CheXpert labels.

Conventions. Metadata in memory: a dict of field -> value in which an unknown field is absent. In tensors: `age` (N,)
float32 in years, NaN unknown; `codes` (N, 18) int64 for the other fields, 0 always unknown. Unknown is also what
dropout and guidance use: there is one null a field.
"""
import collections
import itertools
import math

import torch

from common import check
from common.cli import InputError, count

LABELS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
          "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
          "Fracture", "Support Devices")  # CheXpert's order
UNKNOWN = ("", "u", "unknown", "nan", "none", "na", "n/a", "<na>", "null", "-", "?")  # as tables write it, in any case
MAX_AGE = 120  # years; ChestX-ray14's first release holds ages up to 414, which are typing errors


def field_of(label):
    return label.lower().replace(" ", "_")


def drop_unknown(record):
    """The record without what is unknown."""
    return {key: value for key, value in record.items() if value is not None}


DATASETS = ("MIMIC-CXR", "ReXGradient", "CheXpert-Plus", "PadChest", "ChestX-ray14", "BRAX", "VinDr-CXR")
SOURCES = dict(zip(("mimic", "rexgradient", "chexpert", "padchest", "nih", "brax", "vindr"), DATASETS))  # of data.py
FINDINGS = {field_of(label): label for label in LABELS}  # field name -> column name

# Every field but age, with its values; code k in a tensor is values[k - 1], and 0 is unknown.
VALUES = {"dataset": DATASETS, "sex": ("female", "male"), "race": ("asian", "black", "white"),
          "view": ("AP", "PA", "LATERAL"), **{field: ("negative", "positive") for field in FINDINGS}}
FIELDS = ("dataset", "age", "sex", "race", "view", *FINDINGS)  # all 19, in the order of the model's embeddings
CODED = tuple(field for field in FIELDS if field != "age")      # the columns of `codes`


def parse_value(field, text, datasets=DATASETS):
    """The value of `field` as memory holds it, from what a person or a table wrote; None if it says unknown.

    Age: a float in years, 0 to 120. Other fields: one of VALUES[field] whatever the case ("F", "female").
    Raises InputError, naming what is accepted.
    """
    if field not in FIELDS:
        raise InputError(f"unknown field {field!r}; the fields are {', '.join(FIELDS)}")
    text = str(text).strip()
    if text.lower() in UNKNOWN:
        return None
    if field == "age":
        try:
            age = float(text) if text.isascii() and "_" not in text else math.nan  # float() takes 1_0 and Arabic digits
        except ValueError:
            age = math.nan
        if not 0 <= age <= MAX_AGE:
            raise InputError(f"age {text!r} is not a number of years from 0 to {MAX_AGE}")
        return age
    values = datasets if field == "dataset" else VALUES[field]
    for value in values:
        if text.lower() == value.lower() or (field == "sex" and text.lower() == value[0]):
            return value
    hint = f" (the source {text} is the data set {SOURCES[text]})" if SOURCES.get(text) in values else ""
    raise InputError(f"unknown value {text!r} for {field}; accepted: {', '.join(values)} or unknown{hint}")


def parse_items(items, flag, datasets=DATASETS):
    """["FIELD=VALUE", ...], as the option `flag` gives them, as a record."""
    record = {}
    for item in items:
        if "=" not in item:
            raise InputError(f"{flag} {item}: not of the form FIELD=VALUE, such as pneumonia=positive")
        field, text = item.split("=", 1)
        if field in record:
            raise InputError(f"{flag} {item}: {field} is given twice")
        if not text.strip():
            raise InputError(f"{flag} {item}: no value for {field}; leave the option out, or give unknown")
        record[field] = parse_value(field, text, datasets)
    return drop_unknown(record)


def encode_metadata(records, datasets=DATASETS):
    """Dicts of field -> value to tensors: age (N,) float32 with NaN unknown, codes (N, 18) int64 with 0 unknown."""
    age = torch.tensor([record.get("age", math.nan) for record in records], dtype=torch.float32)
    codes = torch.zeros(len(records), len(CODED), dtype=torch.long)
    for row, record in enumerate(records):
        for column, field in enumerate(CODED):
            if field in record:
                codes[row, column] = 1 + (datasets if field == "dataset" else VALUES[field]).index(record[field])
    return age, codes


def coverage(records):
    """Which values the training data holds: {field: {value: count}}, and the least and greatest age."""
    covered = {}
    for field in CODED:
        values = [record[field] for record in records if field in record]
        if values:
            covered[field] = {value: values.count(value) for value in sorted(set(values))}
    ages = [record["age"] for record in records if "age" in record]
    return covered | ({"age": [min(ages), max(ages)]} if ages else {})


def check_config(config):
    """Checks what a model's config says of metadata: `datasets`, and `covered`, `pairs` and `examples` in the forms of
    coverage(), count_pairs() and records. Raises InputError."""
    check.names(config, "datasets")
    check.kind(config, dict, "covered", "pairs")
    check.kind(config, list, "examples")
    values = VALUES | {"dataset": config.datasets}

    def fits(field, value):
        if field == "age":
            return type(value) in (int, float) and 0 <= value <= MAX_AGE
        return value in values.get(field, ())

    def are_counts(item):
        return isinstance(item, dict) and all(type(number) is int and number > 0 for number in item.values())

    for field, item in config.covered.items():
        if field == "age":
            right = isinstance(item, list) and len(item) == 2 and all(fits("age", age) for age in item)
            right = right and item[0] <= item[1]
        else:
            right = are_counts(item) and all(fits(field, value) for value in item)
        if not right:
            check.refuse(config, "covered", "field to counts of its values, and age to [least, greatest], in years")
    if not all(map(are_counts, config.pairs.values())):
        check.refuse(config, "pairs", "value to counts of other values")
    if not all(isinstance(record, dict) and all(fits(*item) for item in record.items()) for record in config.examples):
        check.refuse(config, "examples", "a list of records, each field to value")


def why_not_covered(field, value, covered):
    """Why the weights cannot be asked for field = value: the training data never held it. None if they can."""
    if field not in covered:
        return f"the training data of these weights says nothing of {field}; covered: {', '.join(covered)}"
    if field == "age":
        low, high = covered["age"]
        if not low <= value <= high:
            return (f"age {value:g} was not covered by the training data of these weights; "
                    f"covered: {low:g} to {high:g}")
        return None
    if value not in covered[field]:
        return (f"{field}={value} was not covered by the training data of these weights; "
                f"covered: {', '.join(covered[field])}")
    return None


def check_covered(record, covered):
    """Refuses a field or value that the training data never held."""
    for item in record.items():
        if reason := why_not_covered(*item, covered):
            raise InputError(reason)


def only_covered(records, covered):
    """The records without what the training data never held, which the model can only be asked for as unknown."""
    return [{field: value for field, value in record.items() if not why_not_covered(field, value, covered)}
            for record in records]


def list_left_out(records, kept, most=5):
    """The values that the records hold and `kept`, the same records with less in them, does not: "race=white in 2 rows,
    age=90 in 1 row", the most frequent first, at most `most` of them; empty if nothing is left out."""
    left = collections.Counter()
    for record, part in zip(records, kept):
        left.update(f"{field}={value:g}" if field == "age" else f"{field}={value}"
                    for field, value in record.items() if field not in part)
    words = [f"{item} in {count(times, 'row')}" for item, times in left.most_common(most)]
    if len(left) > most:
        words.append(f"and {count(len(left) - most, 'other value')}")
    return ", ".join(words)


# A consolidated lung is opaque and a large heart widens the mediastinum: CheXpert's labels are a tree with two parents.
PARENTS = {"lung_opacity": ("edema", "consolidation", "pneumonia", "atelectasis"),
           "enlarged_cardiomediastinum": ("cardiomegaly",)}


def resolve_labels(record):
    """The one policy for labels that do not agree or are not said, applied to the records of every source's own tables.

    1. Uncertain and blank are unknown: the sources leave them out.
    2. A positive finding overrules No Finding, which becomes negative. Devices are no finding.
    3. A positive No Finding makes every finding that is still unknown negative; support devices stay as they are.
    4. A negative parent beside a positive child contradicts it and becomes unknown: readers who say consolidation often
       do not say opacity too. It does not become positive; a parent follows from its child only where a source's table
       says so.

    CXR7-1M itself does without 2 and 3: of its 601,540 images with No Finding it knows Atelectasis to be negative in
    1,875. An index made here therefore says more than the paper's.
    """
    findings = [field for field in FINDINGS if field not in ("no_finding", "support_devices")]
    if any(record.get(field) == "positive" for field in findings):
        record = record | {"no_finding": "negative"}
    elif record.get("no_finding") == "positive":
        record = {field: "negative" for field in findings} | record
    doubtful = [parent for parent, children in PARENTS.items() if record.get(parent) == "negative"
                and any(record.get(child) == "positive" for child in children)]
    return {field: value for field, value in record.items() if field not in doubtful}


def resolve_request(record):
    """A record as the model can be asked for it, and what was changed, in words: a request goes through the policy of
    resolve_labels, as the labels did from which the model learnt. Only what contradicts itself changes; what the
    request leaves unknown stays unknown."""
    resolved = {field: value for field, value in resolve_labels(record).items() if field in record}
    findings = [f"{field}=positive" for field in FINDINGS if record.get(field) == "positive"
                and field not in ("no_finding", "support_devices")]
    notes = [f"{field}={value} contradicts {', '.join(findings)}, so {field} becomes {resolved.get(field, 'unknown')}"
             for field, value in record.items() if resolved.get(field) != value]
    return resolved, notes


GROUPS = ("sex", "age", "race", "view", "dataset", "label")
AGE_BANDS = ((0, 17), (18, 39), (40, 59), (60, 79), (80, MAX_AGE))  # years, both ends included


def groups_of(record, kinds):
    """The subgroups that a record is in, as "kind=value": of sex, race, view or dataset; of age, in bands; of label,
    one for each positive finding."""
    groups = []
    for kind in kinds:
        if kind == "label":
            groups += [f"{field}=positive" for field in FINDINGS if record.get(field) == "positive"]
        elif kind == "age" and "age" in record:
            first, last = next(band for band in AGE_BANDS if record["age"] < band[1] + 1)
            groups.append(f"age={first}-{last}")
        elif kind in record:
            groups.append(f"{kind}={record[kind]}")
    return groups


def count_pairs(records):
    """How many records hold two values together, ages in bands: {"sex=female": {"view=PA": 12, ...}, ...}, the value
    of the field that comes first in FIELDS outside. A pair that no record holds is absent."""
    rows, pairs = collections.Counter(tuple(groups_of(record, FIELDS)) for record in records), {}
    for values, times in rows.items():
        for a, b in itertools.combinations(values, 2):
            together = pairs.setdefault(a, {})
            together[b] = together.get(b, 0) + times
    return pairs


def add_pairs(a, b):
    """The pairs of two sets of records together."""
    return {value: dict(collections.Counter(a.get(value, {})) + collections.Counter(b.get(value, {})))
            for value in {**a, **b}}


def never_together(record, pairs):
    """The first two values of a record that no training record held together, as ("dataset=kermany", "age=80-120");
    None if there are none. `pairs` is that of count_pairs; an empty one, of weights that do not hold it, says
    nothing."""
    for a, b in itertools.combinations(groups_of(record, FIELDS) if pairs else (), 2):
        if b not in pairs.get(a, {}):
            return a, b
