"""Counterfactual editing: the same radiograph, had one thing been different.

    1  encode      z = the VAE's mean of the image, at t = 1
    2  abduct      follow dx/dt = v(x, t, factual metadata) back to t = 1 - depth: the noise that explains this image
    3  act         set what is asked; its descendants follow from the causal model
    4  predict     follow v(x, t) = v(x, t, rest) + w (v(x, t, all) - v(x, t, rest)) forward to t = 1, and decode

`all` is the counterfactual metadata, `rest` the same without the changed fields. So only what changes is amplified by w; what
stays has weight 1, as it had on the way back (factored guidance, arXiv 2506.14399). With nothing changed and guidance off the
way forward is the way back, and the reconstruction comes out: to the solver's error, which falls with the steps.

Inpainting: outside the mask every step is set back to the path that the image itself took on the way to noise, and the final
picture to the original's pixels.

    python edit.py IMAGE --given sex=male --given age=55 --set pleural_effusion=positive
    python edit.py IMAGE --infer --sweep age=20:80:10
    python edit.py IMAGE --set cardiomegaly=positive --mask heart.png
"""
import argparse
import itertools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import causal
import classifier
import cli
import fields
import flow
import parallel
import radiograph
import sample
from cli import InputError


def size_of(model, decoder):
    """The side in pixels of the images that the weights know."""
    return model.config.grid[0] * (2 ** len(decoder.config.widths) if decoder else 1)


def conditions(model, records):
    """Records as the network takes them: age (N,), codes (N, 18)."""
    device = next(model.parameters()).device
    return [x.to(device) for x in fields.encode_metadata(records, model.config.datasets)]


def follow(velocity, x, times, solver):
    """Every state on the way from times[0] to times[-1], both ends included: a list of (N, C, H, W)."""
    path = [x]
    for step in itertools.pairwise(times):
        path.append(flow.integrate(velocity, path[-1], step, solver)[0])
    return path


@torch.no_grad()
def edit(model, decoder, images, factual, counterfactual, guidance=2.0, steps=25, solver="heun", depth=1.0, mask=None, seed=None):
    """Images (N, 1, H, W) in [-1, 1] with their records, as the records `counterfactual` would have them: (N, 1, H, W).

    depth in (0, 1]: how far back towards noise; less keeps more of the image and changes less. mask (1, 1, H, W) in {0, 1}:
    1 where the image may change. With a seed the noise inside the mask is drawn anew, not the image's own.
    """
    cfg = model.config
    times = 1 - depth * (1 - flow.time_grid(steps, cfg.shift))       # from 1 - depth to 1
    x = decoder.encode(images)[0] if decoder else images             # N C h w
    rest = [{f: v for f, v in new.items() if old.get(f) == v} for old, new in zip(factual, counterfactual)]
    seen = conditions(model, factual)
    back = follow(flow.guided(model, seen, seen, 1, cfg.prediction), x, times.flip(0), solver)[::-1]
    forward = flow.guided(model, conditions(model, counterfactual), conditions(model, rest), guidance, cfg.prediction)
    x = back[0]                                                      # N C h w, the noise that explains the image
    if mask is None:
        x = follow(forward, x, times, solver)[-1]
    else:
        free = F.adaptive_max_pool2d(mask, x.shape[2:])              # 1 1 h w: a cell that touches the mask may change
        if seed is not None:
            fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
            x = torch.where(free > 0, (1 - float(times[0])) * fresh + float(times[0]) * back[-1], x)
        for t, s, own in zip(times[:-1], times[1:], back[1:]):
            x = torch.where(free > 0, flow.integrate(forward, x, (t, s), solver)[0], own)
    result = (decoder.decode(x) if decoder else x).clamp(-1, 1)      # N 1 H W
    return result if mask is None else torch.where(mask > 0, result, images)


def act(record, do, folder):
    """The counterfactual record: what is set, and what follows from it by the causal model in `folder` (None: nothing
    does). A value that the causal model does not know stays as it is."""
    if folder is None:
        return record | do
    model = causal.load(folder)
    known, cause = ({f: v for f, v in r.items() if f in model.names and causal.covers(model, f, v)} for r in (record, do))
    return record | causal.counterfactual(model, [known], cause)[0] | do


def infer(record, image, covered):
    """The record with what the embedded classifier sees where it says nothing, printing each value and its probability."""
    judge = classifier.load(classifier.DEMO)
    years, logits = judge(image.to(next(judge.parameters()).device))
    found = {"age": (round(years.item(), 1), None)}
    for field, values, x in zip(fields.CODED, judge.values.values(), logits):
        if len(judge.config.covered.get(field, ())) > 1:
            chance, index = x[0].softmax(0).max(0)
            found[field] = values[index], chance.item()
    for field, (value, chance) in found.items():
        if field not in record and not sample.uncovered(field, value, covered):
            print(f"inferred {field}={value}" + (f", probability {chance:.2f}" if chance else ", within about 13 years"))
            record = record | {field: value}
    return record


# ---------------------------------------------------------------------------------------------------------
# Files

def read_mask(path, size):
    """A mask image as (1, 1, size, size) in {0, 1}: white from half up. It must be as large as the prepared image."""
    with Image.open(path) as image:
        if image.size != (size, size):
            raise InputError(f"{path}: a mask of {image.size[0]}x{image.size[1]} pixels; the image is edited at {size}x{size}")
        return (torch.from_numpy(np.asarray(image.convert("L"), np.float32)) >= 128).float()[None, None]


def difference(a, b):
    """b - a of images (1, H, W) as an RGB picture: red where b is brighter, blue where it is darker, full at 0.5 of 2."""
    change = ((b - a)[0] * 2).clamp(-1, 1).numpy()                   # H W
    red, blue = np.where(change > 0, 1, 1 + change), np.where(change < 0, 1, 1 - change)
    return Image.fromarray((np.stack([red, 1 - np.abs(change), blue], -1) * 255).round().astype(np.uint8))


def picture(image):
    return Image.fromarray(((image[0].cpu() + 1) * 127.5).round().byte().numpy())


def sheet(pictures, path):
    """Pictures of one size side by side."""
    whole = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    for i, p in enumerate(pictures):
        whole.paste(p, (i * p.width, 0))
    whole.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


def parse(items, flag, model):
    """["FIELD=VALUE", ...] as a record that the weights cover."""
    record = {}
    for item in items:
        if "=" not in item:
            raise InputError(f"{flag} {item}: not of the form FIELD=VALUE, such as sex=male")
        field, text = item.split("=", 1)
        if (value := fields.parse_value(field, text, model.config.datasets)) is not None:
            record[field] = value
    sample.check_covered(record, model.config.covered)
    return record


def parse_sweep(text, model):
    """"age=20:90:10" as [{"age": 20.0}, ..., {"age": 90.0}]."""
    try:
        field, span = text.split("=")
        first, last, step = map(float, span.split(":"))
        values = np.arange(first, last + step / 2, step).tolist() if field == "age" and step > 0 else []
    except ValueError:
        values = []
    if not 2 <= len(values) <= 100:
        raise InputError(f"--sweep {text}: accepted is age=FIRST:LAST:STEP in years, such as age=20:90:10, of 2 to 100 pictures")
    return [parse([f"age={value}"], "--sweep", model) for value in values]


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="a radiograph: DICOM, PNG or JPEG")
    parser.add_argument("--given", action="append", default=[], metavar="FIELD=VALUE", help="what is known of it")
    parser.add_argument("--infer", action="store_true", help="let the embedded classifier say what is not given")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="what to change")
    what.add_argument("--sweep", metavar="age=FIRST:LAST:STEP", help="a strip and an animation")
    parser.add_argument("--weights", type=Path, default=sample.DEMO)
    parser.add_argument("--causal", type=Path, default=sample.DEMO / "causal", help="the causal model whose descendants follow")
    parser.add_argument("--no-causal", dest="causal", action="store_const", const=None, help="change nothing but what is set")
    parser.add_argument("--guidance", type=float, default=2.0, help="of what changes; 1 is off")
    parser.add_argument("--steps", type=cli.positive, default=25)
    parser.add_argument("--solver", choices=("euler", "heun"), default="heun")
    parser.add_argument("--depth", type=float, default=1.0, help="how far back towards noise, above 0 to 1")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--mask", type=Path, help="an image, white where the picture may change")
    region.add_argument("--keep", type=Path, help="an image, white where the picture must stay")
    parser.add_argument("--seed", type=int, help="with a mask: draw the inside anew")
    parser.add_argument("--out", type=Path, default=Path("out/edit"))
    args = parser.parse_args()
    if not 0 < args.depth <= 1:
        raise InputError(f"--depth {args.depth} is not above 0 and at most 1")

    model, decoder = sample.load_weights(args.weights)
    device, size = parallel.pick_device()[0], size_of(model, decoder)
    try:
        pixels = radiograph.read_radiograph(args.image, size)
    except radiograph.Rejected as reason:
        raise InputError(f"{args.image}: {reason}") from None
    image = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)[None, None]              # 1 1 H W
    given = parse(args.given, "--given", model)
    wishes = parse_sweep(args.sweep, model) if args.sweep else [parse(args.set, "--set", model)]
    mask = read_mask(args.mask or args.keep, size) if args.mask or args.keep else None
    mask = 1 - mask if args.keep else mask
    given = infer(given, image, model.config.covered) if args.infer else given
    records = sample.only_covered([act(given, wish, args.causal) for wish in wishes], model.config.covered)
    if not args.sweep and mask is None and records[0] == given:
        raise InputError(f"--set {' '.join(args.set)}: that is what is given or inferred already, so there is nothing to change")
    for record in records:
        print("changed: " + ", ".join(f"{f} {given.get(f, 'unknown')} to {v}" for f, v in record.items() if given.get(f) != v))

    model, decoder = model.to(device), decoder.to(device) if decoder else None
    x, n = image.to(device), len(records)
    edited = edit(model, decoder, x.expand(n, -1, -1, -1), [given] * n, records, args.guidance, args.steps, args.solver, args.depth,
                  mask if mask is None else mask.to(device), args.seed).cpu()
    with torch.no_grad():
        same = (decoder.decode(decoder.encode(x)[0]) if decoder else x).clamp(-1, 1).cpu()[0]
    args.out.mkdir(parents=True, exist_ok=True)
    text = {"Synthetic": "yes", "Software": "RadiT", "Weights": args.weights.name}
    if args.sweep:
        sheet([picture(e) for e in edited], args.out / "strip.png")
        frames = [picture(e) for e in edited]
        frames[0].save(args.out / "sweep.gif", save_all=True, append_images=frames[1:], duration=400, loop=0)
    else:
        radiograph.save_image(image[0], args.out / "original.png")
        radiograph.save_image(same, args.out / "reconstruction.png", text)
        radiograph.save_image(edited[0], args.out / "edit.png", text | {"Metadata": str(records[0])})
        change = difference(same, edited[0])
        change.save(args.out / "difference.png")
        sheet([picture(image[0]), picture(same), picture(edited[0]), change], args.out / "sheet.png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    cli.run(main)
