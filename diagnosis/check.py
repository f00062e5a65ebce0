"""Does each sampled image show what it was asked to show? What the classifier contradicts is listed, and made anew on
request.

A field contradicts an image if the classifier, whose probabilities are calibrated, gives at least SURE to other
values than the one that was asked for; an age, if the predicted one is further off than three times the classifier's
mean error. The classifier is a fallible judge: it contradicts real images too, and only the excess over those says
something of the weights.

Images that are chosen by a classifier are no longer a sample of the model: they please that classifier, and a metric of
them says nothing of the weights. So the redrawn images go to a folder of their own, whose files say so.

Source: the quality control of RoentGen-v2 (Moroianu et al. 2025), which keeps images whose sex, race and age its
classifiers confirm.
"""
import argparse
from pathlib import Path

import numpy as np

import data
import flow
import sample
from common import cli, hub
from common.cli import InputError, count
from common.tables import read_table
from diagnosis import classifier
from radiographs import fields

SURE = 0.8           # the calibrated probability from which an answer contradicts
TRIES = 8            # how often an image is made anew at most
SEED_STEP = 2 ** 32  # further seeds of an image: its own plus multiples of this, far from those of its neighbours


def contradictions(record, years, probabilities, config):
    """The fields of a record that the classifier's answers for one image contradict: [(field, what it sees)].

    years: the predicted age; probabilities: {field: (values,)}. Fields that the classifier was not taught are left
    out."""
    found = []
    taught = dict.fromkeys(field for field, _, _ in classifier.questions(config))
    for field in taught:
        values = config.datasets if field == "dataset" else fields.VALUES[field]
        if record.get(field) in values and 1 - probabilities[field][values.index(record[field])] >= SURE:
            found.append((field, values[int(np.argmax(probabilities[field]))]))
    if "age" in record and config.age_error and abs(years - record["age"]) > 3 * config.age_error:
        found.append(("age", f"{years:.0f}"))
    return found


def contradictions_of(model, images, records):
    """The contradictions of each image (1, H, W) with its record: a list for each."""
    years, probabilities = classifier.predict(model, images)
    rows = []
    for i, record in enumerate(records):
        answers = {field: chances[i] for field, chances in probabilities.items()}
        rows.append(contradictions(record, float(years[i]), answers, model.config))
    return rows


def summary(records, found, config):
    """{field: {"asked": images that were asked for the field, "contradicted": of these}} for the fields that can be
    checked."""
    table = {}
    for field in dict.fromkeys([field for field, _, _ in classifier.questions(config)] + ["age"]):
        asked = sum(field in record for record in records)
        if asked:
            contradicted = sum(field == name for row in found for name, _ in row)
            table[field] = {"asked": asked, "contradicted": contradicted}
    return table


def read_sample(folder):
    """The settings of a folder that sample.py has filled, its images, records and seeds."""
    if not (folder / "sample.json").is_file() or not (folder / "metadata.csv").is_file():
        raise InputError(f"{folder}: no sample.json or no metadata.csv, so this is not a finished folder of sample.py")
    settings, images = cli.read_json(folder / "sample.json"), data.Radiographs([folder], None)
    kinds = {"steps": (int,), "guidance": (int, float), "solver": (str,), "interval": (list,), "precision": (str,)}
    for key in kinds:
        value = settings.get(key)
        if type(value) not in kinds[key] or (key == "solver" and value not in flow.SOLVERS):
            raise InputError(f"{folder / 'sample.json'}: damaged, since sample.py writes another value of {key}")
    seeds = []
    for row in read_table(folder / "metadata.csv"):
        try:
            seeds.append(cli.integer(0, 2 ** 62)(row.get("seed", "")))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{folder / 'metadata.csv'}, line {row.line}: seed {error}") from None
    if len(seeds) != len(images):
        raise InputError(f"{folder}: {len(images)} images in index.csv, {len(seeds)} rows in metadata.csv")
    records = [{field: record[field] for field in fields.FIELDS if field in record} for record in images.records]
    return settings, images, records, seeds


def load_sampler(folder, weights):
    """A function (records, seeds) -> images (N, 1, H, W) with the weights and the settings that filled the folder."""
    settings = cli.read_json(folder / "sample.json")
    model, vae = sample.load_weights(weights)
    if hub.fingerprint(weights / "radit") != settings.get("fingerprint"):
        raise InputError(f"--weights {weights}: not the weights that filled {folder}, which are called "
                         f"{settings.get('weights')}, fingerprint {settings.get('fingerprint')}")
    device, _ = cli.pick_device()
    model, vae = model.to(device), vae.to(device) if vae else None

    def make(records, seeds):
        images, _ = sample.generate(model, vae, records, seeds, steps=settings["steps"], guidance=settings["guidance"],
                                    solver=settings["solver"], interval=settings["interval"],
                                    bf16=settings["precision"] == "bfloat16")
        return images
    return make


def redraw(judge, make, images, records, seeds, found):
    """Makes the contradicted images anew, each with up to TRIES other seeds, until the classifier contradicts no
    longer.

    images: a list of (1, H, W), changed in place like `seeds` and `found`; an image that never passes stays as it was.
    Returns how many images were made."""
    made, pending = 0, [i for i, row in enumerate(found) if row]
    for attempt in range(1, TRIES + 1):
        new_seeds = [(seeds[i] + attempt * SEED_STEP) % 2 ** 62 for i in pending]
        if not pending:
            break
        new = make([records[i] for i in pending], new_seeds)
        made += len(pending)
        rows = contradictions_of(judge, list(new), [records[i] for i in pending])
        still = []
        for i, image, seed, row in zip(pending, new, new_seeds, rows):
            if row:
                still.append(i)
            else:
                images[i], seeds[i], found[i] = image, seed, []
        pending = still
    return made


def write_checked(out, images, records, seeds, settings):
    """A folder like one of sample.py, every file of which says that its images were selected."""
    names = [f"{i:0{max(4, len(str(len(images) - 1)))}}" for i in range(len(images))]
    with cli.locked(out):
        cli.refuse_filled(out)
        (out / "images").mkdir()
        for name, image, record, seed in zip(names, images, records, seeds):
            sample.write_image(out, name, image, record, seed, settings)
        sample.write_tables(out, names, records, seeds, settings)
        cli.write_json(out / "selected.json", settings | {"images": len(images)})


def check(folder, model_folder, weights, out):
    """Reports the contradictions in a sample's folder; with `out`, makes those images anew there. Returns the
    report."""
    if out:
        cli.refuse_filled(out)                                       # before the work, and again when it is locked
    settings, dataset, records, seeds = read_sample(folder)
    judge = classifier.load(model_folder)
    make = load_sampler(folder, weights) if out else None            # before the work, so that errors come first
    images = [dataset[i] for i in range(len(dataset))]
    found = contradictions_of(judge, images, records)
    report = {"images": len(images), "contradicted": sum(map(bool, found)),
              "fields": summary(records, found, judge.config),
              "contradictions": {Path(record["path"]).name: dict(row)
                                 for record, row in zip(dataset.records, found) if row}}
    if out:
        seeds = list(seeds)
        report["made_anew"] = redraw(judge, make, images, records, seeds, found)
        report["still_contradicted"] = sum(map(bool, found))
        keep = ("weights", "fingerprint", "steps", "solver", "guidance", "interval", "precision")
        selected = f"images that the classifier {hub.fingerprint(model_folder)} contradicted were made anew"
        write_checked(out, images, records, seeds, {key: settings[key] for key in keep} | {"selected": selected})
    return report


def print_report(report, folder, out):
    print(f"{folder}: the classifier contradicts {report['contradicted']:,} of {count(report['images'], 'image')}")
    print(f"{'field':30}{'asked':>8}{'contradicted':>14}")
    for field, counts in report["fields"].items():
        print(f"{field:30}{counts['asked']:8,}{counts['contradicted']:14,}")
    for path, row in list(report["contradictions"].items())[:20]:
        print(f"  {path}: " + ", ".join(f"{field} looks like {seen}" for field, seen in row.items()))
    if len(report["contradictions"]) > 20:
        print(f"  and {len(report['contradictions']) - 20:,} more; --json lists all")
    if out:
        print(f"{out}: {count(report['made_anew'], 'image')} made anew, {report['still_contradicted']:,} still "
              f"contradicted after {TRIES} tries and left as they were. A selection: metrics of it say nothing of the "
              "weights.")
