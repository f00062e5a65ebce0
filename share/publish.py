"""Weights on the Hugging Face Hub: what is uploaded, and the model card that says what they are.

    python -m share push WEIGHTS ORG/NAME [--metrics FILE.json] [--license cc-by-4.0]

WEIGHTS is a folder that holds radit/ and, for latents, vae/, or a run of train.py with such a folder weights/. It is loaded
first: what does not load is not published. One commit holds the models (radit, vae, causal, classifier, as far as they are
there) and README.md, the card: data with counts, measures with their protocol, intended use and limits. A README.md beside
the weights follows in it, with its pictures. The account is that of `hf auth login` or HF_TOKEN.
Source of the card's header: the Hub's documentation of model cards.
"""
import json
from pathlib import Path

import huggingface_hub

import sample
from common.cli import InputError

PARTS = ("radit", "vae", "causal", "classifier")


def table(header, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def data_section(covered):
    """What the training images held, from config.covered: how many of each value of each field."""
    rows = [(field, "; ".join(f"{value} {count:,}" for value, count in values.items()))
            for field, values in covered.items() if field != "age"]
    rows += [("age", "{:g} to {:g} years".format(*covered["age"]))] if "age" in covered else []
    return ("Training images by metadata; a value that is not listed was never seen and is refused by `sample.py`, and an image "
            "of which a field is unknown counts nowhere in its row.\n\n" + table(("field", "images"), rows))


def written(value):
    """A figure of metrics.py: a number, a list of them, or {"value", "standard_error"}."""
    if isinstance(value, list):
        return " to ".join(written(part) for part in value)
    if isinstance(value, dict):
        return " ± ".join(written(part) for part in value.values() if part is not None) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metrics_section(report):
    """The JSON of `metrics.py --json` as tables, under its own protocol. Raises InputError for another file."""
    try:
        protocol = "; ".join(f"{key} {value}" for key, value in report["protocol"].items() if key != "warnings")
        warnings = "".join(f" Warning: {note}." for note in report["protocol"]["warnings"])
        names = [name for name in report["results"][0] if name != "warning"]  # group, real, synthetic, FDD, KDD, ...
        text = table(names, [[written(row.get(name, "too few")) for name in names] for row in report["results"]])
        if copies := report.get("memorisation"):
            text += "\n\nDistance to the nearest training image; `below` is the share below what 1 % of held-out images lie below.\n\n"
            names = list(next(iter(copies.values())))
            text += table(("images", *names), [[who, *(written(row[name]) for name in names)] for who, row in copies.items()])
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration):
        raise InputError("--metrics: not a file of metrics.py --json") from None
    return f"Protocol: {protocol}. Compare only under the same one.{warnings}\n\n{text}"


def model_card(repository, model, licence, metrics=None, notes=""):
    """The README.md of a repository on the Hub: a YAML header and the sections named above."""
    config, size = model.config, sum(parameter.numel() for parameter in model.parameters())
    cells = f"{config.grid[0]}x{config.grid[1]} {'latent cells' if config.vae else 'pixels'}"
    return f"""---
license: {licence}
pipeline_tag: unconditional-image-generation
tags:
- medical
- radiology
- chest-x-ray
- synthetic
- rectified-flow
---

# {repository}

A RadiT of {size:,} parameters (width {config.width}, depth {config.depth}, {cells}) that draws synthetic chest radiographs as
asked by up to 19 metadata fields, after arXiv 2606.19460. Made by the code *RadiT, in the open*.

    python sample.py --weights {repository}

## Data

{data_section(config.covered)}

## Licence

{licence if licence != "other" else "Not stated by whoever published this"}. The terms of the training data hold too; the code's licence is Apache-2.0.

## Measures

{metrics_section(metrics) if metrics else "Not measured."}

## Intended use and limits

For research: to study generative models, to augment or stress-test other models, to teach. Not a medical device, not for
diagnosis or any clinical use: nothing here was validated for it, and a synthetic radiograph shows no patient. Every picture
is marked as synthetic; keep the marks. How common a finding is among the pictures says nothing of how common it is among
patients, errors of the training labels are learnt too, and groups that the table above shows to be rare or missing are drawn
worse or not at all. Whether training images were learnt by heart is to be checked before pictures are shared
(`benchmarks/memorisation.py`, `metrics.py --train`).
""" + (f"\n{notes}" if notes else "")


def push(folder, repository, model, licence="other", metrics=None):
    """Publishes `folder`, whose radit/ is `model`; returns the address of the commit. Raises InputError in one line."""
    readme = folder / "README.md"
    notes = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    card = notes if notes.startswith("---\n") else model_card(repository, model, licence, metrics, notes)  # a card of its own stays
    files = [file for part in PARTS for file in sorted((folder / part).glob("*")) if file.suffix in (".json", ".safetensors")]
    files += sorted(folder.glob("*.png")) if notes else []
    add = [huggingface_hub.CommitOperationAdd(str(file.relative_to(folder)), file) for file in files]
    add.append(huggingface_hub.CommitOperationAdd("README.md", card.encode()))
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        return api.create_commit(repository, add, commit_message="Weights and model card").commit_url
    except Exception as error:  # whatever its HTTP library raises, which changes from version to version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{repository}: not published: {reason[:300]}") from None


def add_arguments(parser):
    parser.add_argument("weights", type=Path, help="a folder that holds radit/ and vae/, or a run of train.py")
    parser.add_argument("repository", metavar="ORG/NAME")
    parser.add_argument("--metrics", type=Path, metavar="FILE.json", help="what metrics.py --json wrote, for the card")
    parser.add_argument("--license", default="other", help="the Hub's name of the weights' licence, such as cc-by-4.0")


def push_command(args):
    if args.repository.count("/") != 1 or not all(args.repository.split("/")):
        raise InputError(f"{args.repository}: not of the form ORG/NAME")
    folder = args.weights / "weights" if (args.weights / "weights/radit").is_dir() else args.weights
    if not (folder / "radit").is_dir():
        raise InputError(f"{args.weights}: no radit/ and no weights/radit/ in it, so there is nothing to publish")
    try:
        metrics = json.loads(args.metrics.read_text()) if args.metrics else None
    except ValueError:
        raise InputError(f"{args.metrics}: not a file of metrics.py --json") from None
    model, _ = sample.load_weights(folder)
    print(push(folder, args.repository, model, args.license, metrics))
