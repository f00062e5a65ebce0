"""Weights on the Hugging Face Hub: what is uploaded, and the model card that says what they are.

    python -m share push WEIGHTS ORG/NAME [--metrics FILE.json] [--license cc-by-4.0]

WEIGHTS is a folder that holds radit/ and, for latents, vae/, or a run of train.py with such a folder weights/. The
model is loaded first: what does not load is not published. One commit holds the models (radit, vae, causal,
classifier, as far as they are there), each as its configuration and its tensors and nothing else, and README.md, the
card: data with counts, measures with their protocol, intended use and limits. A README.md beside the weights is
appended to the card, with the images that it shows; one with a header of its own takes the card's place.

No patient's metadata leaves with the weights. radit/config.json holds examples of metadata to sample from, and whether
those are rows of the training data cannot be seen. They are therefore replaced by combinations made from the counts
of the values alone, which the card lists anyway.

Uploads use the account of `hf auth login` or of HF_TOKEN. Source of the card's header: the Hub's documentation of model
cards.
"""
import argparse
import dataclasses
import json
import math
import random
import re

import huggingface_hub

import sample
from autoencoder.load import FILES
from common import cli
from common.cli import InputError, RunError
from radiographs import fields
from radit import RadiT

MODEL, ADAPTERS = ("config.json", "model.safetensors"), ("lora.json", "lora.safetensors")
PARTS = {"radit": MODEL + ADAPTERS, "radunet": MODEL, "vae": ("config.json", *FILES, *ADAPTERS), "causal": MODEL,
         "classifier": MODEL}
EXAMPLES = 64


def examples_of(covered, pairs, count=EXAMPLES, seed=0):
    """`count` synthetic records: each field is chosen on its own, by how many training images held each value, or none;
    a value that no training image held together with those before it is left out.

    covered   {field: {value: count}} and age: [least, most], as in radit/config.json
    pairs     as fields.count_pairs makes it; {} in older weights, which do not say

    The age is anywhere between the least and the most, in the middle of a year, so that no record can be a row of an
    index whose ages are whole years.
    """
    rng = random.Random(seed)
    counts = {field: values for field, values in covered.items() if field != "age"}
    images = max((sum(values.values()) for values in counts.values()), default=0)
    records = []
    for _ in range(count):
        record = {}
        for field, values in counts.items():
            unknown = images - sum(values.values())
            record[field], = rng.choices([*values, None], [*values.values(), unknown])
        if "age" in covered:
            low, high = covered["age"]
            record["age"] = min(max(math.floor(rng.uniform(low, high)) + 0.5, low), high)
        records.append(only_together(fields.resolve_labels(fields.drop_unknown(record)), pairs))
    return fields.only_covered(records, covered)


def only_together(record, pairs):
    """The record without a value that no training image held together with those before it."""
    kept = {}
    for field, value in record.items():
        if not fields.never_together(kept | {field: value}, pairs):
            kept[field] = value
    return kept


# ---------------------------------------------------------------------------------------------------------
# The card

def format_table(header, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def data_section(covered):
    """What the training images held, from config.covered: how many of each value of each field."""
    rows = [(field, "; ".join(f"{value} {count:,}" for value, count in values.items()))
            for field, values in covered.items() if field != "age"]
    if "age" in covered:
        rows.append(("age", "{:g} to {:g} years".format(*covered["age"])))
    return f"""Training images by metadata. `sample.py` refuses a value that is not listed: no training image had it. An
image of which a field is unknown is not counted in that field's row.

{format_table(("field", "images"), rows)}

The examples of metadata in `radit/config.json` are synthetic, not those of patients: each of their fields was chosen on
its own, by these counts."""


def format_value(value):
    """A figure of metrics.py: a number, the two ends of an interval, or {"value", "standard_error"}."""
    if isinstance(value, list):
        return " to ".join(map(format_value, value))
    if isinstance(value, dict):
        return " ± ".join(format_value(part) for part in value.values() if part is not None) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metrics_section(report):
    """The JSON of `metrics.py --json` as tables, under its own protocol. Raises InputError for another file."""
    try:
        protocol = "; ".join(f"{key} {value}" for key, value in report["protocol"].items() if key != "warnings")
        warnings = "".join(f" Warning: {note}." for note in report["protocol"]["warnings"])
        names = [name for name in report["results"][0] if name != "warning"]  # group, real, synthetic, FDD, KDD, ...
        rows = [[format_value(row.get(name, "too few")) for name in names] for row in report["results"]]
        text = format_table(names, rows)
        if copies := report.get("memorisation"):
            names = list(next(iter(copies.values())))
            rows = [[images, *(format_value(row[name]) for name in names)] for images, row in copies.items()]
            text += ("\n\nDistance to the nearest training image; `below` is the share that lies nearer than 99 % of "
                     f"held-out images do.\n\n{format_table(('images', *names), rows)}")
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration):
        raise InputError("--metrics: not a file of metrics.py --json") from None
    return f"Protocol: {protocol}. Compare only under the same one.{warnings}\n\n{text}"


def model_card(repository, model, licence=None, metrics=None, notes=""):
    """The README.md of a repository on the Hub: a YAML header and the sections named above."""
    config, size = model.config, sum(parameter.numel() for parameter in model.parameters())
    grid = f"{config.grid[0]}x{config.grid[1]} {'latent cells' if config.vae else 'pixels'}"
    depth = f", depth {config.depth}" if isinstance(model, RadiT) else ""
    return f"""---
license: {licence or "other"}
pipeline_tag: unconditional-image-generation
tags:
- medical
- radiology
- chest-x-ray
- synthetic
- rectified-flow
---

# {repository}

A {type(model).__name__} of {size:,} parameters (width {config.width}{depth}, {grid}) that samples synthetic chest
radiographs from up to 19 metadata fields, after arXiv 2606.19460. Made with the code *RadiT, in the open*.

    python sample.py --weights {repository}

## Data

{data_section(config.covered)}

## Licence

{licence or "Not stated by the publisher"}. The terms of the training data apply too; the code's
licence is Apache-2.0.

## Measures

{"Not measured." if metrics is None else metrics_section(metrics)}

## Intended use and limits

For research: to study generative models, to augment or stress-test other models, to teach. Not a medical device, not
for diagnosis or any clinical use: nothing here was validated for it, and a synthetic radiograph shows no patient. Every
image is marked as synthetic; keep the marks. How common a finding is among the images says nothing about how common it
is among patients. Errors of the training labels are learnt too, and groups that the table above shows to be rare or
missing are imaged worse or not at all. Before images are shared, check whether training images were memorised
(`benchmarks/memorisation.py`, `metrics.py --train`).
""" + (f"\n{notes}" if notes else "")


# ---------------------------------------------------------------------------------------------------------
# Publishing

def read_notes(folder):
    """The README.md beside the weights, "" if there is none, and the images of the folder that it shows."""
    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    except UnicodeDecodeError:
        raise InputError(f"{readme}: not UTF-8 text") from None
    shown = re.findall(r"!\[[^\]]*\]\(([^()\s/]+\.png)\)", text)
    return text, [folder / name for name in dict.fromkeys(shown) if (folder / name).is_file()]


def part_of(folder):
    """The part that holds the model, as sample.load_weights takes it: radit, or the baseline; None if neither is
    there."""
    return next((part for part in ("radit", "radunet") if (folder / part / "config.json").is_file()), None)


def files_of(folder, model):
    """{path in the repository: a file or its bytes} of the models in `folder`, whose radit/ is `model`. Nothing else
    that lies there is published."""
    files = {f"{part}/{name}": folder / part / name
             for part, names in PARTS.items() for name in names if (folder / part / name).is_file()}
    examples = examples_of(model.config.covered, model.config.pairs)
    config = dataclasses.asdict(model.config) | {"examples": examples}
    files[f"{part_of(folder)}/config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def push(folder, repository, model, licence=None, metrics=None):
    """Publishes `folder`, whose radit/ is `model`; returns the address of the commit. Raises InputError or RunError."""
    notes, images = read_notes(folder)
    card = notes
    if not notes.startswith("---\n"):                                # the header of a whole card
        card = model_card(repository, model, licence, metrics, notes)
    elif licence or metrics is not None:
        raise InputError(f"{folder / 'README.md'} has a header of its own and takes the card's place, so --license and "
                         "--metrics would be lost; leave them out, or remove the header")
    files = files_of(folder, model) | {image.name: image for image in images} | {"README.md": card.encode()}
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repository, operations, commit_message="Weights and model card").commit_url
    except Exception as error:  # whatever its HTTP library raises, which changes from version to version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"{repository}: not published: {reason[:300]}") from None


def licence_name(text):
    """An argparse type: a name as the Hub has them."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a licence's name on the Hub, such as cc-by-4.0 or other")
    return text


def add_arguments(parser):
    parser.add_argument("weights", type=cli.new_path,
                        help="a folder that holds radit/ and vae/, or a run of train.py")
    parser.add_argument("repository", metavar="ORG/NAME", help="the repository on the Hub; made if it does not exist")
    parser.add_argument("--metrics", type=cli.new_path, metavar="FILE.json", help="written by metrics.py --json")
    parser.add_argument("--license", type=licence_name,
                        help="the Hub's name of the weights' licence, such as cc-by-4.0; other, if not given")


def push_command(args):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository, re.ASCII):
        raise InputError(f"{args.repository!r}: not of the form ORG/NAME, in letters, digits, '-', '_' and '.'")
    folder = args.weights / "weights" if part_of(args.weights / "weights") else args.weights
    if not part_of(folder):
        raise InputError(f"{args.weights}: no radit/ and no weights/radit/ in it, so there is nothing to publish")
    metrics = cli.read_json(args.metrics) if args.metrics else None
    model, _ = sample.load_weights(folder)
    address = push(folder, args.repository, model, args.license, metrics)
    if model.config.examples:
        print(f"the {len(model.config.examples)} examples of metadata in config.json, which can be rows of the "
              "training data, are replaced in what is published; your own file stays as it is")
    print(address)
