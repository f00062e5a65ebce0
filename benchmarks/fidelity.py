"""How good are weights trained on few images? Every measure of this project, beside what it gives for real images and
for images that are wrong in known ways, in one run.

    python benchmarks/fidelity.py --data PREPARED... [--weights weights/demo] [--encoder weights/demo/classifier]
    [--seed 0]

The held-out real images (splits valid and test) are halved by patient. Half A is the reference. Against it, each N =
|B|: half B itself, the best that can be had; synthetic images with B's metadata; B as the VAE returns it; B blurred;
the mean training image of each of B's data sets and views, which is typical and no radiograph. Then control: what the
classifier sees in the synthetic images of what was asked for, beside what it sees in B. Then memorisation.
"""
import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import flow
import metrics
import sample
from common import cli, hub
from diagnosis import classifier
from encoders import raddino
from radiographs import fields


@torch.no_grad()
def features(images, encoder):
    """(N, 1, H, W) in [-1, 1], seen as the bytes of a file."""
    pixels = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    ready = (raddino.preprocess(Image.fromarray(x), encoder.config) for x in pixels)
    return torch.cat([encoder(x[None])[0] for x in tqdm(ready, total=len(pixels), unit="image", leave=False)])


def blurred(images, sigma=2.0):
    offsets = torch.arange(-6, 7) / sigma
    window = torch.exp(-offsets ** 2 / 2)
    window = window / window.sum()
    padded = F.pad(images, (6, 6, 6, 6), mode="reflect")
    return F.conv2d(F.conv2d(padded, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def halves(folders, seed):
    """The held-out real images (splits valid and test): their records, images (N, 1, H, W), and the rows of halves A
    and B. No patient is in both."""
    splits = [data.Radiographs(folders, split) for split in ("valid", "test")]
    records = [record for split in splits for record in split.records]
    images = torch.stack([image for split in splits for image in split])
    patients = sorted({record["patient"] for record in records})
    first = set(np.random.default_rng(seed).permutation(patients)[:len(patients) // 2])
    a, b = ([i for i, record in enumerate(records) if (record["patient"] in first) == side] for side in (True, False))
    return records, images, a, b


def mean_images(training, records):
    """For each record the mean training image of its data set and view: (N, 1, H, W)."""
    groups = {}
    for record, image in zip(training.records, training):
        groups.setdefault((record["dataset"], record.get("view")), []).append(image)
    means = {group: torch.stack(members).mean(0) for group, members in groups.items()}
    return torch.stack([means[record["dataset"], record.get("view")] for record in records])


def known(record):
    return {field: value for field, value in record.items() if field in fields.FIELDS}


@torch.no_grad()
def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="the sources the weights were trained on")
    parser.add_argument("--weights", type=Path, default=sample.DEMO)
    parser.add_argument("--encoder", type=Path, default=classifier.DEMO)
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 62), default=0)
    args = parser.parse_args()
    model, decoder = sample.load_weights(args.weights)
    encoder, judge = raddino.load_encoder(args.encoder), classifier.load(classifier.DEMO)
    training = data.Radiographs(args.data, "train")
    records, images, a, b = halves(args.data, args.seed)
    asked = fields.only_covered([known(records[i]) for i in b], model.config.covered)
    seeds = list(range(args.seed, args.seed + len(b)))
    evaluations = math.ceil(len(b) / 16) * sample.STEPS * flow.SOLVERS[sample.SOLVER]
    with tqdm(desc="sampling", unit="evaluation", total=evaluations) as bar:
        synthetic, _ = sample.generate(model, decoder, asked, seeds, report=bar.update)
    candidates = {"real, the other half": images[b], "synthetic": synthetic}
    if decoder:
        returned = [decoder.decode(decoder.encode(x)[0]) for x in images[b].split(16)]
        candidates["real, through the VAE"] = torch.cat(returned)
    candidates["real, blurred (sigma 2 pixels)"] = blurred(images[b])
    candidates["mean image of data set and view"] = mean_images(training, [records[i] for i in b])

    reference = features(images[a], encoder)
    print(f"weights {os.path.relpath(args.weights)} ({hub.fingerprint(args.weights / 'radit')}), encoder "
          f"{os.path.relpath(args.encoder)} ({hub.fingerprint(args.encoder)}), "
          f"reference N {len(a)}, candidates N {len(b)}, {images.shape[-1]}x{images.shape[-1]} pixels, k 5, "
          f"seed {args.seed}, {sample.STEPS} {sample.SOLVER} steps, guidance {sample.GUIDANCE:g}")
    print(f"{'':34}" + "".join(f"{name:>19}" for name in metrics.MEASURES))
    for name, pictures in candidates.items():
        row = metrics.compare(reference, features(pictures, encoder), seed=args.seed)
        print(f"{name:34}" + "".join(f"{metrics.format_value(*row[measure]):>19}" for measure in metrics.MEASURES))

    with tempfile.TemporaryDirectory() as folder:
        settings = sample.provenance(args.weights, steps=sample.STEPS, solver=sample.SOLVER, guidance=sample.GUIDANCE)
        names = [f"{i:04}" for i in range(len(b))]
        (Path(folder) / "images").mkdir()
        for item in zip(names, synthetic, asked, seeds):
            sample.write_image(Path(folder), *item, settings)
        sample.write_tables(Path(folder), names, asked, seeds, settings)
        shown = classifier.Labelled([folder], None, judge.config.datasets)
        seen_in_synthetic = classifier.measure(shown, classifier.predict(judge, shown), judge.config)
    held_out = classifier.Labelled(args.data, None, judge.config.datasets)
    row_of = {record["path"]: i for i, record in enumerate(held_out.images.records)}
    rows = np.array([row_of[records[i]["path"]] for i in b])
    seen_in_real = classifier.measure(held_out, classifier.predict(judge, held_out), judge.config, rows)
    print(f"\nControl: what {classifier.DEMO.name} ({hub.fingerprint(classifier.DEMO)}) sees of what was asked; "
          f"AUROC, accuracy or mean error in years, with the 95 % interval")
    print(f"{'':40}{'asked':>8}{'positive':>10}{'real, half B':>28}{'synthetic':>28}")
    for r, s in zip(seen_in_real, seen_in_synthetic):
        cells = []
        for row in (r, s):
            value = row.get("auroc", row.get("accuracy", row.get("mae")))
            span = " ({:.3f} to {:.3f})".format(*row["interval"]) if "interval" in row else ""
            cells.append(f"{value:.3f}{span}" if span else "one class only")
        print(f"{r['field'] + ' ' + r['value']:40}{r['n']:8}{r.get('positives', ''):>10}{cells[0]:>28}{cells[1]:>28}")

    seen = features(torch.stack(list(training)), encoder)
    table = metrics.memorisation(features(images, encoder), features(synthetic, encoder), seen)
    metrics.print_memorisation(table, len(seen), 0)  # data.py keeps a patient in one split, so none is left out


if __name__ == "__main__":
    cli.run(main)
