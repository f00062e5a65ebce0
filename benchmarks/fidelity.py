"""How good are weights trained on few images? Every measure here, beside what the same measure gives for real images and for
pictures that are wrong in known ways, in one run.

    python benchmarks/fidelity.py --data PREPARED... [--weights weights/demo] [--encoder weights/demo/classifier] [--seed 0]

The held-out real images (splits valid and test) are halved by patient. Half A is the reference. Against it, each N = |B|:
half B itself, the best that can be had; synthetic images asked for B's metadata; B as the VAE returns it; B blurred; the mean
training image of each of B's data sets and views, a picture that is typical and no radiograph. Then control: what the
classifier sees in the synthetic images of what was asked, beside what it sees in B. Then memorisation.
"""
import argparse
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
    """The held-out real images (splits valid and test): their records, images (N, 1, H, W), and the rows of halves A and B. No
    patient is in both."""
    splits = [data.Radiographs(folders, split) for split in ("valid", "test")]
    records = [record for split in splits for record in split.records]
    images = torch.stack([image for split in splits for image in split])
    patients = sorted({record["patient"] for record in records})
    first = set(np.random.default_rng(seed).permutation(patients)[:len(patients) // 2])
    a, b = ([i for i, record in enumerate(records) if (record["patient"] in first) == side] for side in (True, False))
    return records, images, a, b


def known(record):
    return {field: value for field, value in record.items() if field in fields.FIELDS}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="the prepared sources the weights were trained on")
    parser.add_argument("--weights", type=Path, default=sample.DEMO)
    parser.add_argument("--encoder", type=Path, default=classifier.DEMO)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, decoder = sample.load_weights(args.weights)
    encoder, judge = raddino.load_encoder(args.encoder), classifier.load(classifier.DEMO)
    training = data.Radiographs(args.data, "train")
    records, images, a, b = halves(args.data, args.seed)
    asked = fields.only_covered([known(records[i]) for i in b], model.config.covered)
    seeds = list(range(args.seed, args.seed + len(b)))
    with tqdm(desc="drawing", unit="step", total=-(-len(b) // 16) * 25) as bar:
        drawn, _ = sample.generate(model, decoder, asked, seeds, report=bar.update)
    sums = {}
    for record, image in zip(training.records, training):
        total = sums.setdefault((record["dataset"], record.get("view")), [0, 0])
        total[0], total[1] = total[0] + image, total[1] + 1
    means = torch.stack([(lambda s, n: s / n)(*sums[records[i]["dataset"], records[i].get("view")]) for i in b])
    candidates = {"real, the other half": images[b], "synthetic": drawn}
    if decoder:
        candidates["real, through the VAE"] = torch.cat([decoder.decode(decoder.encode(x)[0]) for x in images[b].split(16)])
    candidates |= {"real, blurred (sigma 2 pixels)": blurred(images[b]), "mean image of data set and view": means}

    reference = features(images[a], encoder)
    print(f"weights {os.path.relpath(args.weights)} ({hub.fingerprint(args.weights / 'radit')}), encoder {os.path.relpath(args.encoder)} ({hub.fingerprint(args.encoder)}), "
          f"reference N {len(a)}, candidates N {len(b)}, {images.shape[-1]}x{images.shape[-1]} pixels, k 5, seed {args.seed}, "
          f"25 Euler steps, guidance 2")
    print(f"{'':34}" + "".join(f"{m:>18}" for m in ("FDD", "KDD", "precision", "recall", "density", "coverage")))
    for name, pictures in candidates.items():
        row = metrics.compare(reference, features(pictures, encoder), 5, None, args.seed)
        print(f"{name:34}" + "".join(f"{'{:.3f} ± {:.3f}'.format(*value):>18}" for value in row.values()))

    with tempfile.TemporaryDirectory() as folder:
        how, names = sample.provenance(args.weights, steps=25, solver="euler", guidance=2.0), [f"{i:04}" for i in range(len(b))]
        (Path(folder) / "images").mkdir()
        for item in zip(names, drawn, asked, seeds):
            sample.write_image(Path(folder), *item, how)
        sample.write_tables(Path(folder), names, asked, seeds, how)
        shown = classifier.Labelled([folder], None, judge.config.datasets)
        synthetic = classifier.measure(shown, classifier.predict(judge, shown), judge.config)
    held_out = classifier.Labelled(args.data, None, judge.config.datasets)
    of = {record["path"]: i for i, record in enumerate(held_out.images.records)}
    real = classifier.measure(held_out, classifier.predict(judge, held_out), judge.config, np.array([of[records[i]["path"]] for i in b]))
    print(f"\nControl: what {classifier.DEMO.name} ({hub.fingerprint(classifier.DEMO)}) sees of what was asked; "
          f"AUROC, accuracy or mean error in years, with the 95 % interval")
    print(f"{'':40}{'asked':>8}{'positive':>10}{'real, half B':>28}{'synthetic':>28}")
    for r, s in zip(real, synthetic):
        cells = []
        for row in (r, s):
            value = row.get("auroc", row.get("accuracy", row.get("mae")))
            cells.append("{:.3f} ({:.3f} to {:.3f})".format(value, *row["interval"]) if "interval" in row else "one class only")
        print(f"{r['field'] + ' ' + r['value']:40}{r['n']:8}{r.get('positives', ''):>10}{cells[0]:>28}{cells[1]:>28}")

    seen = features(torch.stack(list(training)), encoder)
    print(f"\nDistance to the nearest of {len(seen)} training images, in the encoder's features")
    for who, row in metrics.memorisation(features(images, encoder), features(drawn, encoder), seen).items():
        print(f"{who:20}" + "".join(f"   {name} {value:.4f}" for name, value in row.items()))


if __name__ == "__main__":
    cli.run(main)
