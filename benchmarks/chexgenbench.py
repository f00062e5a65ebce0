"""The CheXGenBench protocol whole (arXiv 2505.10496): fidelity, privacy and utility in one table, in the benchmark's
columns.

    python benchmarks/chexgenbench.py --real data/mimic --split test --synthetic out --train data/mimic --out out/bench
    python benchmarks/chexgenbench.py --real real.csv --synthetic prompt_INFO.csv --train train.csv --utility u.json
        --out b

writes OUT.json and OUT.md. REAL, SYNTHETIC and TRAIN are what metrics.py takes, the benchmark's own tables among them.

Fidelity: metrics.py --protocol chexgenbench, of all images and of each pathology. FID, KID and Inception Score in the
features of an Inception network are not measured here. Privacy: each synthetic image beside the training image of its
prompt, or the nearest one where there are no prompts; means and extremes over the images of one training image,
averaged. Latent distance: |difference| / sqrt(D) of features. Pixel distance: RMS of grey levels at 512x512 (the
benchmark's own code subtracts bytes, which wrap around: not comparable). Re-identification score: the probability
that two images are of one patient. The benchmark's network is a pickled ResNet-50 and is not loaded; in its place
stands the same last layer on the encoder's features f, sigmoid(w · |f - f'| + b), fitted here to pairs of training
images of half of the patients. How well it tells patients apart is measured on the other half (AUROC, .5 is chance:
then the score says nothing), and held-out real images show what no copy scores. Utility: the figures that `python -m
diagnosis utility --json FILE` wrote: mean AUROC over the labels, on real test images, of a classifier trained on real
images (original), synthetic ones, and both (mixed): a small transformer, or with --resnet the benchmark's ResNet-50.
"""
import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics
from common import cli, hub
from common.cli import InputError
from diagnosis.classifier import auroc
from encoders import raddino
from encoders.features import (deduplicated, labels_of_prompts, read_grey,
                               set_of, training_images)
from radiographs.fields import FINDINGS
from radiographs.index import SPLITS

NOT = "not measured"
COLUMNS = {"FDD": "FID (RadDino)", "KDD": "KID (RadDino)", "precision": "Precision", "recall": "Recall",
           "density": "Density", "coverage": "Coverage"}
FEWEST = 20  # patients with two training images, for a verifier and its test


# ---------------------------------------------------------------------------------------------------------
# Privacy

def pairs_of(patients, rng, most=10):
    """Pairs of rows of one patient, at most `most` each, and as many of two patients: (P, 2) rows, (P,) bool."""
    rows = {}
    for i, patient in enumerate(patients):
        rows.setdefault(patient, []).append(i)
    same = []
    for images in rows.values():
        pairs = list(itertools.combinations(images, 2))
        same += [pairs[i] for i in rng.permutation(len(pairs))[:most]]
    other = []
    while len(other) < len(same) and len(rows) > 1:
        i, j = rng.integers(len(patients), size=2)
        if patients[i] != patients[j]:
            other.append((i, j))
    return torch.tensor(same + other).reshape(-1, 2), torch.arange(len(same) + len(other)) < len(same)


class Verifier:
    """The probability that two images are of one patient: logistic regression on |f - f'|, which is divided by its
    mean of each feature first, with a penalty on the weights that keeps few pairs from deciding many of them."""

    def __init__(self, features, pairs, same, penalty=1e-2):
        self.scale = self.difference(features[pairs[:, 0]], features[pairs[:, 1]], 1).mean(0).clamp(min=1e-6)
        x, y = self.difference(features[pairs[:, 0]], features[pairs[:, 1]]), same.double()  # P D, P
        self.weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(x @ self.weights[1:] + self.weights[0], y)
            value = value + penalty * self.weights[1:].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weights = self.weights.detach()

    def difference(self, a, b, scale=None):
        return (a.double() - b.double()).abs() / (self.scale if scale is None else scale)

    def __call__(self, a, b):
        """Features a and b (N, D), row by row: (N,)."""
        return (self.difference(a, b) @ self.weights[1:] + self.weights[0]).sigmoid()


def fit_verifier(records, features, seed=0):
    """A Verifier of half of the patients, and its AUROC on the other half's pairs. Raises InputError for too few."""
    rng = np.random.default_rng(seed)
    known = [i for i, record in enumerate(records) if "patient" in record]
    patients = [records[i]["patient"] for i in known]
    twice = sorted({patient for patient in patients if patients.count(patient) > 1}) if known else []
    if len(twice) < FEWEST:
        raise InputError(f"{len(twice)} patients with two training images, fewer than {FEWEST}")
    first = set(rng.permutation(sorted(set(patients)))[::2])
    halves = [[i for i, patient in zip(known, patients) if (patient in first) == side] for side in (True, False)]
    found = [pairs_of([records[i]["patient"] for i in half], rng) for half in halves]
    if not all(same.any() and not same.all() for _, same in found):
        raise InputError("too few pairs of images of one patient in either half")
    verifier = Verifier(features[halves[0]], *found[0])
    pairs, same = found[1]
    scores = verifier(features[halves[1]][pairs[:, 0]], features[halves[1]][pairs[:, 1]])
    return verifier, float(auroc(scores.numpy(), same.numpy()))


def partners(records, features, training, z):
    """The row of the training image that each image is held against: of its prompt, or the nearest."""
    of_prompt = {record["prompt"]: i for i, record in reversed(list(enumerate(training))) if "prompt" in record}
    rows = [of_prompt.get(record.get("prompt")) for record in records]
    closest = metrics.nearest(features, z)[1].tolist()
    return [near if row is None else row for row, near in zip(rows, closest)]


def pixel_distance(path, other):
    """Root mean square difference of the grey levels, 0 to 255, of two files at 512x512."""
    a, b = (np.asarray(read_grey(p).resize((512, 512), Image.Resampling.BICUBIC), np.float64) for p in (path, other))
    return float(np.sqrt(np.square(a - b).mean()))


def privacy(records, features, training, z, verifier=None):
    """The benchmark's six columns, averaged over the training images that are held against something."""
    rows = partners(records, features, training, z)
    measured = {"latent_distance": ((features - z[rows]).double().square().mean(1).sqrt().tolist(), "Min", min),
                "pixel_distance": ([pixel_distance(record["path"], training[row]["path"])
                                    for record, row in zip(records, rows)], "Min", min)}
    if verifier:
        measured["reid_scores"] = (verifier(features, z[rows]).tolist(), "Max", max)
    result = {"images": len(records), "Mean_reid_scores": NOT, "Max_reid_scores": NOT}
    for name, (values, word, extreme) in measured.items():
        groups = {}
        for row, value in zip(rows, values):
            groups.setdefault(row, []).append(value)
        result[f"Mean_{name}"] = float(np.mean([np.mean(group) for group in groups.values()]))
        result[f"{word}_{name}"] = float(np.mean([extreme(group) for group in groups.values()]))
    return result


# ---------------------------------------------------------------------------------------------------------
# The tables

def fidelity(rows):
    """The rows of metrics.report in the benchmark's columns: all, and one for each pathology."""
    table = []
    for row in rows:
        pathology = "all" if row["group"] == "all" else FINDINGS[row["group"].removesuffix("=positive")]
        line = {"Pathology": pathology, "real": row["real"], "synthetic": row["synthetic"]}
        line |= {column: row[name]["value"] if name in row else NOT for name, column in COLUMNS.items()}
        table.append(line | {"FID": NOT, "KID": NOT, "Inception Score": NOT})
    return table


def utility(path):
    """auc_macro of each training set from the JSON of `python -m diagnosis utility`: the mean AUROC over the labels."""
    report, names = cli.read_json(path), {"real": "original", "synthetic": "synthetic", "both": "mixed"}
    try:
        table = []
        for regime, name in names.items():
            areas = {FINDINGS[row["field"]]: row["auroc"] for row in report[regime]
                     if row["field"] in FINDINGS and row.get("auroc") is not None}
            table.append({"training images": name, "auc_macro": float(np.mean(list(areas.values()))) if areas else NOT}
                         | {f"auc_{label}": area for label, area in areas.items()})
        return table
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{path}: not what python -m diagnosis utility --json writes") from None


def markdown(report):
    """The report as Markdown: a title, the protocol, a table for each part, or why it was not measured."""
    lines = ["# CheXGenBench", "", "; ".join(f"{key} {value}" for key, value in report["protocol"].items()
                                             if key != "warnings"), ""]
    lines += [f"Warning: {note}." for note in report["protocol"]["warnings"]] + [""]
    for part in ("fidelity", "privacy", "utility"):
        rows, header = report[part], []
        lines += [f"## {part.capitalize()}", ""]
        if isinstance(rows, str):
            lines += [rows, ""]
            continue
        for row in rows:
            header += [name for name in row if name not in header]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(cell(row.get(name, "")) for name in header) + " |" for row in rows] + [""]
    return "\n".join(lines)


def cell(value):
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs="+", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, help="of the real images")
    parser.add_argument("--synthetic", type=Path, required=True)
    parser.add_argument("--train", nargs="+", type=Path, default=[], help="what the model was trained on: privacy")
    parser.add_argument("--encoder", type=Path, default=Path("microsoft/rad-dino"), help="as in metrics.py")
    parser.add_argument("--utility", type=Path, metavar="FILE.json", help="of python -m diagnosis utility --json")
    parser.add_argument("--out", type=cli.new_path, required=True, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    used = utility(args.utility) if args.utility else NOT
    encoder, fingerprint = metrics.load_encoder(args.encoder), hub.fingerprint(args.encoder)
    real, x = set_of(args.real, encoder, fingerprint, args.split, True, deduplicated)
    everything, every = set_of([args.synthetic], encoder, fingerprint, None, True)
    fake = labels_of_prompts(real, deduplicated([record | {"row": i} for i, record in enumerate(everything)]))
    y = every[[record["row"] for record in fake]]
    notes = [note for note in [raddino.why_not_raddino(encoder, args.encoder)] if note]
    private = NOT
    if args.train:
        training, z = set_of(args.train, encoder, fingerprint, None, True, training_images)
        unseen, verifier = metrics.held_out(real, x, training, z), None
        try:
            verifier, area = fit_verifier(training, z)
            notes.append(f"AUROC of the re-identification on pairs of other patients: {area:.3f}")
        except InputError as error:
            notes.append(f"re-identification {NOT}: {error}")
        held = [real[i] for i in unseen]
        private = [{"who": "held-out real"} | privacy(held, x[unseen], training, z, verifier),
                   {"who": "synthetic"} | privacy(everything, every, training, z, verifier)]
        notes += metrics.warnings_of(real, everything, training)
    protocol = {"encoder": str(args.encoder), "encoder_hash": fingerprint, "real": len(real), "synthetic": len(fake),
                "resize": f"299x299, then {encoder.config.resize}", "k": 5, "warnings": notes}
    report = {"protocol": protocol, "fidelity": fidelity(metrics.report(real, x, fake, y, ["label"], equal=True)),
              "privacy": private, "utility": used}
    cli.write_json(Path(f"{args.out}.json"), report)
    cli.write_text(Path(f"{args.out}.md"), markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    cli.run(main)
