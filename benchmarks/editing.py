"""Does an edit do what it should, and no more? Held-out real radiographs, edited in several ways, all in one run.

    python benchmarks/editing.py --data PREPARED... [--weights weights/demo] [--each 16] [--steps 6] [--seed 0]

composition     nothing is changed: how far is the result from the original, beside the VAE's own reconstruction?
effectiveness   the embedded classifier's probability of the value asked for, before, after, and in real images that
                have it; `flipped`: of the images in which it saw another value, the share in which it sees this one;
                for age, years
minimality      how far its other answers move (total variation of each field's probabilities, averaged; years for
                age), and how far the pixels do: all of them, and those outside the region where the change belongs.
                Regions are boxes, the same for every image, generous, in shares of its side: the heart's, and for an
                effusion the lower half of the thorax. A view, an age, a sex has none.
reversibility   there and back again: how far from the first reconstruction? On the first half of the images.

RMS is in grey levels of 0 to 255. "Before" is the VAE's reconstruction, so that the VAE's blur does not count as a
change. The judge was trained on the training images of the same data: it knows the same confounders as the weights
(sick people lie, AP; the children's set has the pneumonia), and a change that fools it need not convince a
radiologist.
"""
import argparse
import itertools
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import flow
import sample
from causal import edit
from common import cli, hub
from diagnosis import classifier
from encoders import perceptual
from radiographs import fields

# name: (data set, whom it suits, field, new value)
EDITS = {"age under 46 to 75": ("ChestX-ray14", lambda r: 20 <= r.get("age", 0) < 46, "age", 75.0),
         "age over 54 to 25": ("ChestX-ray14", lambda r: r.get("age", 0) > 54, "age", 25.0),
         "men to women": ("ChestX-ray14", lambda r: r.get("sex") == "male", "sex", "female"),
         "PA to AP": ("ChestX-ray14", lambda r: r.get("view") == "PA", "view", "AP"),
         "pneumonia, children": ("kermany", lambda r: r.get("pneumonia") == "negative", "pneumonia", "positive"),
         "pleural effusion": ("ChestX-ray14", lambda r: r.get("pleural_effusion") == "negative",
                              "pleural_effusion", "positive"),
         "cardiomegaly": ("ChestX-ray14", lambda r: r.get("cardiomegaly") == "negative", "cardiomegaly", "positive")}
REGIONS = {"cardiomegaly": (.4, .85, .25, .9), "pleural effusion": (.5, 1, 0, 1)}  # top, bottom, left, right


@torch.no_grad()
def plain(model, decoder, images, factual, counterfactual, guidance, depth=1.0, steps=6, seed=None):
    """The baselines: guidance that amplifies every field, from the image's own noise; with a seed from fresh noise at
    1 - depth (SDEdit, Meng et al. 2022)."""
    x, end = edit.encode(model, decoder, images)                     # N C h w
    times = end * (1 - depth * (1 - flow.time_grid(steps, model.config.shift)))
    seen = edit.conditions(model, factual)
    if seed is None:
        x = edit.follow(flow.classifier_free_guidance(model, seen, seen, 1, model.config.prediction),
                        x, times.flip(0), "heun")[-1]
    else:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        x = (1 - times[0]) * noise + times[0] * x
    nothing = edit.conditions(model, [{}] * len(images))
    forward = flow.classifier_free_guidance(model, edit.conditions(model, counterfactual), nothing, guidance,
                                            model.config.prediction)
    x = edit.follow(forward, x.float(), times, "heun")[-1]
    if end < 1:
        x = flow.integrate(forward, x, (end, 1.0), "euler")[0]
    return (decoder.decode(x) if decoder else x).clamp(-1, 1)        # N 1 H W


def certain(decoder):
    """The same VAE, but of its posterior the mean only."""
    def encode(images):
        mean = decoder.encode(images)[0]
        return mean, torch.full_like(mean, -np.inf)
    return SimpleNamespace(encode=encode, decode=decoder.decode)


def methods(steps, seed):
    """name -> function(model, decoder, images, factual, counterfactual) -> images; the most telling first."""
    def factored(w, depth=1.0):
        return lambda *what: edit.edit(*what, guidance=w, steps=steps, depth=depth)
    def from_mean(model, decoder, *what):
        return edit.edit(model, certain(decoder) if decoder else None, *what, guidance=2, steps=steps)
    def amplified(w, depth=1.0, seed=None):
        return lambda *what: plain(*what, w, depth, steps, seed)
    return {"factored, guidance 2": factored(2), "factored, guidance 4": factored(4),
            "factored, guidance 1": factored(1), "all amplified, guidance 2": amplified(2),
            "SDEdit, depth 0.7": amplified(2, .7, seed),
            "SDEdit, depth 0.5": amplified(2, .5, seed), "factored, 2, depth 0.5": factored(2, .5),
            "factored, guidance 3": factored(3), "factored, 2, depth 0.75": factored(2, .75),
            "factored, 2, from VAE's mean": from_mean,
            "SDEdit, depth 0.3": amplified(2, .3, seed)}


def in_parts(method, model, decoder, images, factual, counterfactual, batch=16):
    parts = [slice(i, i + batch) for i in range(0, len(images), batch)]
    return torch.cat([method(model, decoder, images[p], factual[p], counterfactual[p]) for p in parts])


def rms(a, b, region=None):
    """Of the differences of images (N, 1, H, W) in [-1, 1], in grey levels: (N,); only where `region` (H, W) is 1."""
    square = ((a - b) * 127.5).square()[:, 0].flatten(1)             # N H*W
    return (square if region is None else square[:, region.flatten() > 0]).mean(1).sqrt()


@torch.no_grad()
def ask(judge, images):
    """Predicted age (N,) and {field: probabilities (N, values)}, of the fields whose values the judge can tell
    apart."""
    return classifier.predict(judge, list(images))


def of_target(answer, judge, field, value):
    """The probability of the value (N,), and whether it is the likeliest; for age the predicted years, and nothing."""
    if field == "age":
        return answer[0], None
    index = judge.values[field].index(value)
    return answer[1][field][:, index], answer[1][field].argmax(1) == index


def choose(records, dataset, suits, count, seed):
    """Indices of `count` fitting records, of as many patients."""
    order, taken = random.Random(seed).sample(range(len(records)), len(records)), {}
    for i in order:
        if records[i].get("dataset") == dataset and suits(records[i]):
            taken.setdefault(records[i]["patient"], i)
    if len(taken) < count:
        raise cli.InputError(f"{len(taken)} held-out patients fit, fewer than --each {count}")
    return list(taken.values())[:count]


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True,
                        help="the prepared sources the weights were trained on")
    parser.add_argument("--weights", type=Path, default=sample.DEMO)
    parser.add_argument("--each", type=cli.positive, default=16, help="images of each edit")
    parser.add_argument("--steps", type=cli.positive, default=6, help="of Heun, in the second part")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, decoder = sample.load_weights(args.weights)
    judge = classifier.load(classifier.DEMO)
    device = next(judge.parameters()).device
    model, decoder = model.to(device), decoder.to(device) if decoder else None
    splits = [data.Radiographs(args.data, split) for split in ("valid", "test")]
    records = [record for split in splits for record in split.records]
    images = torch.stack([image for split in splits for image in split]).to(device)          # N 1 H W
    known = [{f: r[f] for f in fields.FIELDS if f in r} for r in records]
    known = fields.only_covered(known, model.config.covered)
    print(f"weights {os.path.relpath(args.weights)} ({hub.fingerprint(args.weights / 'radit')}), "
          f"judge {hub.fingerprint(classifier.DEMO)}, {len(images)} held-out images, {device.type}, "
          f"{torch.get_num_threads()} thread(s), seed {args.seed}", flush=True)

    def reconstruct(x):
        with torch.no_grad():
            return torch.cat([decoder.decode(decoder.encode(part)[0]).clamp(-1, 1)
                              for part in x.split(16)]) if decoder else x

    def composition(name, evaluations, method, x, first, facts):
        again = method(model, decoder, x, facts, facts)
        with torch.no_grad():
            distance = perceptual.perceptual_loss(judge.encoder, x, again)
        print(f"{name:28}{evaluations:>12}{rms(again, x).mean():14.2f}{rms(again, first).mean():16.2f}"
              f"{distance.mean():20.5f}", flush=True)

    sets = [choose(records, name, lambda r: True, 4, args.seed) for name in ("ChestX-ray14", "kermany", "hannover")]
    rows = list(itertools.chain.from_iterable(sets))
    x, facts = images[rows], [known[i] for i in rows]
    first = reconstruct(x)
    print(f"\nNothing changed, guidance 1 (the baselines: 2); {len(rows)} images, 4 of each data set; "
          "evaluations of the velocity there and back")
    print(f"{'':28}{'evaluations':>12}{'RMS, original':>14}{'RMS, VAE':>16}{'perceptual distance':>20}")
    composition("the VAE alone", 0, lambda m, d, x, *_: reconstruct(x), x, first, facts)
    for solver, steps in (("euler", 10), ("euler", 25), ("heun", 3), ("heun", 6), ("heun", 12), ("heun", 25)):
        composition(f"{solver}, {steps} steps", 2 * steps * flow.SOLVERS[solver],
                    lambda *what: edit.edit(*what, guidance=1, steps=steps, solver=solver), x, first, facts)
    ways = methods(args.steps, args.seed)
    for name in ("all amplified, guidance 2", "SDEdit, depth 0.3", "SDEdit, depth 0.5", "SDEdit, depth 0.7",
                 "factored, 2, depth 0.5", "factored, 2, from VAE's mean"):
        composition(name, args.steps * (2 if "SDEdit" in name else 4), ways[name], x, first, facts)

    side, half, jobs = images.shape[-1], math.ceil(args.each / 2), {}
    for name, (dataset, suits, field, value) in EDITS.items():
        chosen = choose(records, dataset, suits, args.each, args.seed)
        same = [i for i, r in enumerate(records) if r.get("dataset") == dataset and field in r
                and (abs(r[field] - value) <= 10 if field == "age" else r[field] == value)]
        first, old = reconstruct(images[chosen]), [known[i] for i in chosen]
        # Labels that would contradict the change are settled as in training: no "no finding" beside a finding.
        new = fields.only_covered([fields.resolve_labels(record | {field: value}) for record in old],
                                  model.config.covered)
        real = of_target(ask(judge, images[same]), judge, field, value)[0].mean()
        jobs[name] = images[chosen], first, old, new, field, value, ask(judge, first), real
    print(f"\nEdits, {args.each} images each, {args.steps} Heun steps back and {args.steps} forward. "
          "Before, after, real: the probability of the value asked for, or the age in\n"
          "years; real: of held-out images that have the value. "
          "Means: over the edits; of the first four columns over those not of age.")
    print(f"{'':30}{'':22}" + "".join(f"{c:>9}" for c in (
        "before", "after", "real", "flipped", "others", "age", "RMS", "outside", "back")))
    for name, method in ways.items():
        rows = {}
        for what, (x, first, old, new, field, value, before, real) in jobs.items():
            edited = in_parts(method, model, decoder, x, old, new)
            after = ask(judge, edited)
            (p, saw), (q, sees) = (of_target(answer, judge, field, value) for answer in (before, after))
            flipped = np.nan if saw is None or saw.all() else sees[~saw].mean()
            told = [f for f, counts in judge.config.covered.items() if f != "age" and len(counts) > 1
                    and all(a.get(f) == b.get(f) for a, b in zip(old, new))]
            others = np.mean([np.abs(before[1][f] - after[1][f]).sum(1) / 2 for f in told])
            years = np.nan if field == "age" else np.abs(before[0] - after[0]).mean()
            outside = np.nan
            if what in REGIONS:
                region = torch.ones(side, side)
                top, bottom, left, right = (round(share * side) for share in REGIONS[what])
                region[top:bottom, left:right] = 0
                outside = rms(edited, first, region).mean().item()
            back = in_parts(method, model, decoder, edited[:half], new[:half], old[:half])
            rows[what] = (p.mean(), q.mean(), real, flipped, others, years, rms(edited, first).mean().item(), outside,
                          rms(back, first[:half]).mean().item())
            show(name, what, rows[what])
        every, coded = (np.array(part) for part in (
            list(rows.values()), [row for what, row in rows.items() if jobs[what][4] != "age"]))
        show(name, "mean", (*np.nanmean(coded[:, :4], 0), *np.nanmean(every[:, 4:], 0)))


def show(name, what, row):
    print(f"{name:30}{what:22}" + "".join(f"{value:9.2f}" if np.isfinite(value) else f"{'-':>9}" for value in row),
          flush=True)


if __name__ == "__main__":
    cli.run(main)
