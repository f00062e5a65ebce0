"""Counterfactual stress testing: would a diagnostic model hold on patients that it is not tested on?

A model is tested on images of one group (men, say) and will be used on another (women). Real images of the other
group are missing, so the tested images are edited: the same patients, had they been women, and nothing else changed
(python -m causal edit-all). What the model does on the edits predicts what it will do on real images of the other
group.

    moved      the mean change of its probabilities, edited against unchanged
    predicted  AUROC on the edits - AUROC on the same images unchanged (after the same steps, so that the editing's own
               blur does not count)
    real       AUROC on real images of the other group - AUROC on the original images
    error      the mean of |predicted - real| over findings and models: is the prediction good?
    ranking    of two models, how often the one that is better on the edits is better on the other group, over findings

Compared with changes that know nothing of the group: brighter, darker, more and less contrast, each image by as many
grey levels (root mean square) as its edit changes it; and with predicting no change at all. A stress test is worth
its cost if its error is below those.

Intervals (95 %) are from a bootstrap over patients, of both groups. Findings with fewer than FEW patients with and
without it in either group are left out. Prevalence does not matter to an AUROC; a difference between the groups that
the edited field does not cause (who is imaged, and why) is in `real` and in no edit.

Source: Stammel et al. 2026 (arXiv 2605.10894), who found edits to predict real drops better than brightness and
contrast.
"""
import itertools
from pathlib import Path

import numpy as np
import torch

import data
from common import cli
from common.cli import InputError, count
from diagnosis import classifier
from diagnosis.classifier import FEW, auroc, images_by_patient, resample
from radiographs import fields

PLAIN = ("brighter", "darker", "more contrast", "less contrast")
REPEATS = 500  # of the bootstrap


# ---------------------------------------------------------------------------------------------------------
# Plain changes of a given size

def change_plainly(images, kind, amount):
    """Images (N, 1, H, W) in [-1, 1] made brighter or darker by `amount` (N,), or with 1 + amount times their
    contrast, or 1 / (1 + amount) times."""
    amount = amount.view(-1, 1, 1, 1)
    if kind == "brighter":
        return (images + amount).clamp(-1, 1)
    if kind == "darker":
        return (images - amount).clamp(-1, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    factor = 1 + amount if kind == "more contrast" else 1 / (1 + amount)
    return (mean + (images - mean) * factor).clamp(-1, 1)


def size_of_change(a, b):
    """The root mean square of the difference of images (N, 1, H, W): (N,)."""
    return (a - b).square().mean((1, 2, 3)).sqrt()


def change_by(images, kind, size):
    """The images changed by `size` (N,) root mean square each, or as nearly as that kind of change can: by bisection,
    as the size rises with the amount."""
    low, high = torch.zeros(len(images)), torch.full((len(images),), 100.0)
    for _ in range(50):
        middle = (low + high) / 2
        too_small = size_of_change(change_plainly(images, kind, middle), images) < size
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    return change_plainly(images, kind, (low + high) / 2)


# ---------------------------------------------------------------------------------------------------------
# Measures, on answers: answers[condition] is (models, findings, images), probabilities of positive

def areas(answers, labels, rows):
    """AUROC of each model and finding on the images `rows`: (models, findings); NaN where a class is empty.
    labels (findings, images): 1 positive, 0 negative, -1 unknown."""
    result = np.full(answers.shape[:2], np.nan)
    for j, label in enumerate(labels):
        known = rows[label[rows] >= 0]
        positive = label[known] == 1
        for i in range(len(answers)):
            result[i, j] = auroc(answers[i, j, known], positive)
    return result


def measure(answers, labels, other_answers, other_labels, rows, other_rows):
    """The measures of one bootstrap sample, `rows` of the tested group and `other_rows` of the other: a dict of arrays.

    "real", and for each condition but the original and the unchanged one "predicted" (models, findings), "error" and
    "ranking" (a number each; ranking NaN with one model)."""
    found = {name: areas(values, labels, rows) for name, values in answers.items()}
    other = areas(other_answers, other_labels, other_rows)
    real, result = other - found["original"], {}
    base = {name: "unchanged" if name == "edited" else "original" for name in answers}
    for name in ("edited", *PLAIN):
        predicted = found[name] - found[base[name]]
        result[name] = {"predicted": predicted, "error": np.nanmean(np.abs(predicted - real)),
                        "ranking": agreement(found[name], other)}
    result["no change"] = {"predicted": np.zeros_like(real), "error": np.nanmean(np.abs(real)),
                           "ranking": agreement(found["original"], other)}
    return result, real


def agreement(a, b):
    """Of all pairs of models (rows) and findings (columns), the share in which the same model is better by `a` as by
    `b`, ties counting half; NaN with one model."""
    shares = []
    for i, j in itertools.combinations(range(len(a)), 2):
        product = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        shares += list((product[np.isfinite(product)] + 1) / 2)
    return float(np.mean(shares)) if shares else np.nan


def measure_with_intervals(answers, labels, patients, other_answers, other_labels, other_patients, repeats=REPEATS):
    """`measure` on all images, and the 95 % interval of every number: ({condition: {measure: value}}, real, and the
    same two with [low, high] in place of each value)."""
    every = [np.arange(len(patients)), np.arange(len(other_patients))]
    result, real = measure(answers, labels, other_answers, other_labels, *every)
    rng, samples = np.random.default_rng(0), []
    images_of, other_images_of = images_by_patient(patients), images_by_patient(other_patients)
    for _ in range(repeats):
        rows = resample(images_of, rng), resample(other_images_of, rng)
        samples.append(measure(answers, labels, other_answers, other_labels, *rows))

    def interval(values):
        values = np.stack(values)
        if np.isnan(values).all():
            return np.full((2, *values.shape[1:]), np.nan)
        return np.nanpercentile(values, [2.5, 97.5], axis=0)
    intervals = {name: {key: interval([sample[name][key] for sample, _ in samples]) for key in row}
                 for name, row in result.items()}
    return result, real, intervals, interval([real for _, real in samples])


# ---------------------------------------------------------------------------------------------------------
# From folders to a report

def read_edits(folder):
    """The edits.json of a folder of python -m causal edit-all, checked."""
    about = cli.read_json(Path(folder) / "edits.json") if (Path(folder) / "edits.json").is_file() else {}
    change = about.get("change")
    if not isinstance(change, dict) or len(change) != 1 or not {"conditions", "split", "names"} <= set(about):
        raise InputError(f"{folder}: no edits.json of python -m causal edit-all in it")
    if not all((Path(folder) / name / "index.csv").is_file() for name in ("unchanged", "edited")):
        raise InputError(f"{folder}: unfinished; the same python -m causal edit-all continues")
    return about


def in_group(record, conditions):
    """Whether a record has the values of `conditions`, ages to the band of fields.AGE_BANDS."""
    return all(field in record and fields.groups_of(record, [field]) == fields.groups_of(conditions, [field])
               for field in conditions)


def labels_of(records, findings):
    """(findings, images): 1 positive, 0 negative, -1 unknown."""
    codes = {"positive": 1, "negative": 0}
    return np.array([[codes.get(record.get(finding), -1) for record in records] for finding in findings])


def enough(labels, patients):
    """Which findings (rows) at least FEW patients have, and at least FEW have not: (findings,) bool."""
    return np.array([all(len(set(patients[label == value])) >= FEW for value in (0, 1)) for label in labels], bool)


def ask(models, images, findings):
    """The probability that each model gives to each finding in images (N, 1, H, W): (models, findings, N)."""
    rows = []
    for model in models:
        _, probabilities = classifier.predict(model, list(images))
        rows.append(np.stack([probabilities[finding][:, 1] for finding in findings]))
    return np.stack(rows)


def stress(models, edits, folders):
    """The report on classifiers {name: model}: what their answers do on the edits of the folder `edits` and on real
    images of the other group, taken from the same split of the prepared sources `folders`. A dict, ready for JSON."""
    about = read_edits(edits)
    change, conditions = about["change"], about["conditions"]
    edited, unchanged = (data.Radiographs([Path(edits) / name], None) for name in ("edited", "unchanged"))
    real = data.Radiographs(folders, about["split"])
    where = {(record["patient"], Path(record["path"]).name): i for i, record in enumerate(real.records)}
    keys = [(record["patient"], name) for record, name in zip(edited.records, about["names"])]
    if len(edited) != len(about["names"]) or any(key not in where for key in keys):
        raise InputError(f"{edits}: its images are not of {', '.join(map(str, folders))}, split {about['split']}")
    other = [i for i, record in enumerate(real.records) if in_group(record, {**conditions, **change})]
    text = " and ".join(fields.groups_of(conditions | change, conditions | change))
    if not other:
        raise InputError(f"{', '.join(map(str, folders))}: no real image of the split {about['split']} with {text}")
    tested = [where[key] for key in keys]
    records, other_records = ([real.records[i] for i in rows] for rows in (tested, other))
    patients, other_patients = (np.array([r["patient"] for r in part]) for part in (records, other_records))

    taught = [{field for field, _, _ in classifier.questions(model.config)} for model in models.values()]
    findings = [finding for finding in fields.FINDINGS
                if finding not in change and all(finding in answered for answered in taught)]
    labels, other_labels = labels_of(records, findings), labels_of(other_records, findings)
    kept = enough(labels, patients) & enough(other_labels, other_patients)
    findings = [finding for finding, keep in zip(findings, kept) if keep]
    if not findings:
        raise InputError(f"{edits}: no finding with {FEW} patients with and without it among the {len(records)} edited "
                         f"images and the {len(other)} real ones with {text}; edit more (--n), or take a larger split")

    images = {"original": torch.stack([real[i] for i in tested]), "unchanged": torch.stack(list(unchanged)),
              "edited": torch.stack(list(edited))}                   # N 1 H W each
    size = size_of_change(images["edited"], images["unchanged"])
    for kind in PLAIN:
        images[kind] = change_by(images["original"], kind, size)
    judges = list(models.values())
    answers = {name: ask(judges, batch, findings) for name, batch in images.items()}
    other_answers = ask(judges, torch.stack([real[i] for i in other]), findings)
    result, real_change, intervals, real_interval = measure_with_intervals(
        answers, labels[kept], patients, other_answers, other_labels[kept], other_patients)
    rows = []
    for name, row in result.items():
        base = "unchanged" if name == "edited" else "original"
        moved = 0.0 if name == "no change" else float(np.abs(answers[name] - answers[base]).mean())
        levels = 0.0 if name == "no change" else float(size_of_change(images[name], images[base]).mean() * 127.5)
        rows.append({"change": name, "rms": levels, "moved": moved,
                     **{key: float(row[key]) for key in ("error", "ranking")},
                     **{f"{key}_interval": intervals[name][key].tolist() for key in ("error", "ranking")},
                     "predicted": row["predicted"].tolist(),
                     "predicted_interval": np.moveaxis(intervals[name]["predicted"], 0, -1).tolist()})
    return {"change": change, "conditions": conditions, "split": about["split"], "images": len(records),
            "other_images": len(other), "models": list(models), "findings": findings, "rows": rows,
            "real": real_change.tolist(), "real_interval": np.moveaxis(real_interval, 0, -1).tolist()}


def print_report(report):
    field, value = next(iter(report["change"].items()))
    print(f"{report['images']} edited images, {report['other_images']} real ones of the other group ({field}={value}), "
          f"{count(len(report['findings']), 'finding')}, {count(len(report['models']), 'model')}, "
          f"split {report['split']}")
    print(f"{'change':16}{'RMS':>7}{'moved':>8}{'error':>8}{'95 % interval':>18}{'ranking':>9}{'95 % interval':>18}")
    for row in report["rows"]:
        text = f"{row['change']:16}{row['rms']:7.1f}{row['moved']:8.3f}"
        for key, width in (("error", 8), ("ranking", 9)):
            low, high = row[f"{key}_interval"]
            span = f"{low:.3f} to {high:.3f}" if np.isfinite(low) else ""
            text += f"{row[key]:{width}.3f}{span:>18}" if np.isfinite(row[key]) else f"{'-':>{width}}{'':18}"
        print(text)
    print()
    for number, model in enumerate(report["models"], 1):
        print(f"model {number}: {model}")
    print(f"{'finding':28}{'model':8}{'real':>8}{'95 % interval':>20}{'edited':>9}{'95 % interval':>20}")
    edited = report["rows"][0]
    for i in range(len(report["models"])):
        for j, finding in enumerate(report["findings"]):
            text = f"{finding:28}{i + 1:<8}"
            for change, interval, width in ((report["real"], report["real_interval"], 8),
                                            (edited["predicted"], edited["predicted_interval"], 9)):
                low, high = interval[i][j]
                text += f"{change[i][j]:{width}.3f}{f'{low:.3f} to {high:.3f}':>20}"
            print(text)
