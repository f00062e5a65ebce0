"""Counterfactual editing: the same radiograph, had one thing been different.

    1  encode      x = a draw from the VAE's posterior of the image, at t = 1: what the transformer was trained on
    2  abduct      follow dx/dt = v(x, t, factual metadata) back to t = 1 - depth: the noise that explains this image
    3  act         set what is asked; its descendants follow from the causal model
    4  predict     follow v(x, t) = v(x, t, rest) + w (v(x, t, all) - v(x, t, rest)) forward to t = 1, and decode

`all` is the counterfactual metadata, `rest` the same without the changed fields. So only what changes is amplified by w; what
stays has weight 1, as it had on the way back (factored guidance, arXiv 2506.14399). With nothing changed and guidance off the
way forward is the way back, and the reconstruction comes out: to the solver's error, which falls with the steps.

Inpainting: outside the mask every step is set back to the path that the image itself took on the way to noise, and the final
picture to the original's pixels.

    python -m causal edit IMAGE --given sex=male --given age=55 --set pleural_effusion=positive
    python -m causal edit IMAGE --infer --sweep age=20:80:10
    python -m causal edit IMAGE --set cardiomegaly=positive --mask heart.png
"""
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin

import flow
import sample
from causal import patients
from common import cli
from common.cli import InputError
from diagnosis import classifier
from radiographs import dicom, fields, pixels

AGE_ERROR = 12.3  # years, the embedded classifier's mean error on 159 held-out images: benchmarks/results/fidelity-demo.txt


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


def encode(model, decoder, images, seed=0):
    """(x, t): where the flow's path through each image ends, and when: (N, C, h, w) and a number up to 1.

    Not the clean image itself. The transformer knows draws from the VAE's posterior and, where it predicts data, nothing
    beyond t = 0.95 (flow.to_velocity); a picture without their noise lies off every path, and followed back it stays a
    picture where noise should come out, whose outlines then resist the change. Every image gets the same draw.
    """
    def normal(shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(images.device)
    if decoder:
        mean, logvar = decoder.encode(images)                        # N C h w
        images = mean + (0.5 * logvar).exp() * normal(mean.shape[1:])
    t = 0.95 if model.config.prediction == "data" else 1.0
    return (1 - t) * normal(images.shape[1:]) + t * images, t


@torch.no_grad()
def edit(model, decoder, images, factual, counterfactual, guidance=2.0, steps=12, solver="heun", depth=1.0, mask=None, seed=None):
    """Images (N, 1, H, W) in [-1, 1] with their records, as the records `counterfactual` would have them: (N, 1, H, W).

    The defaults are measured (benchmarks/results/editing-demo.txt): 12 steps of Heun bring an unchanged image back to a third of
    the VAE's own error, 25 of Euler, at the same cost, to nearly three times that error. Guidance 1, 2 and 4 turn the judge's
    answer in 41, 51 and 61 % of the images, and change pixels by 16, 22 and 33 grey levels: 2 is in between. Depth 0.75 turns
    23 %, 0.5 only 4 %: what is asked for is decided near the noise.

    depth in (0, 1]: how far back towards noise; less keeps more of the image and changes less. mask (1, 1, H, W) in {0, 1}:
    1 where the image may change. With a seed the noise inside the mask is drawn anew, not the image's own.
    """
    cfg = model.config
    x, end = encode(model, decoder, images)                          # N C h w
    times = end * (1 - depth * (1 - flow.time_grid(steps, cfg.shift)))
    rest = [{f: v for f, v in new.items() if old.get(f) == v} for old, new in zip(factual, counterfactual)]
    seen = conditions(model, factual)
    back = follow(flow.classifier_free_guidance(model, seen, seen, 1, cfg.prediction), x, times.flip(0), solver)[::-1]
    forward = flow.classifier_free_guidance(model, conditions(model, counterfactual), conditions(model, rest), guidance, cfg.prediction)
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
    if end < 1:
        x = flow.integrate(forward, x, (end, 1.0), "euler")[0]       # one step: the predicted data
    result = (decoder.decode(x) if decoder else x).clamp(-1, 1)      # N 1 H W
    return result if mask is None else torch.where(mask > 0, result, images)


def act(record, do, folder):
    """The counterfactual record: what is set, and what follows from it by the causal model in `folder` (None: nothing
    does). A value that the causal model does not know stays as it is."""
    if folder is None:
        return record | do
    model = patients.load(folder)
    known, cause = ({f: v for f, v in r.items() if f in model.names and patients.covers(model, f, v)} for r in (record, do))
    return record | patients.counterfactual(model, [known], cause)[0] | do


def infer(record, image, covered):
    """The record with what the embedded classifier sees where it says nothing, printing each value and its probability,
    calibrated on held-out images; for an age the mean error on such images."""
    judge = classifier.load(classifier.DEMO)
    years, logits = judge(image.to(next(judge.parameters()).device))
    found = {"age": (round(years.item(), 1), None)}
    for field, values, x in zip(fields.CODED, judge.values.values(), logits):
        if len(judge.config.covered.get(field, ())) > 1:
            chance, index = x[0].softmax(0).max(0)
            found[field] = values[index], chance.item()
    for field, (value, chance) in found.items():
        if field not in record and not fields.why_not_covered(field, value, covered):
            print(f"inferred {field}={value}" + (f", probability {chance:.2f}" if chance else f", wrong by {AGE_ERROR} years on average"))
            record = record | {field: value}
    return record


# ---------------------------------------------------------------------------------------------------------
# Files

def read_mask(path, size):
    """A mask image as (1, 1, size, size) in {0, 1}: white from half up. It must be as large as the prepared image."""
    try:
        array = pixels.read_picture(path)                       # H W in [0, 1]
    except pixels.Rejected as reason:
        raise InputError(f"{path}: {reason}") from None
    if array.shape != (size, size):
        raise InputError(f"{path}: a mask of {array.shape[1]}x{array.shape[0]} pixels; the image is edited at {size}x{size}")
    return torch.from_numpy(array >= 0.5).float()[None, None]


def difference(a, b):
    """b - a of images (1, H, W) as an RGB picture: red where b is brighter, blue where it is darker, full at a quarter of the
    range from black to white."""
    change = ((b - a)[0] * 2).clamp(-1, 1).numpy()                   # H W
    red, blue = np.where(change > 0, 1, 1 + change), np.where(change < 0, 1, 1 - change)
    return Image.fromarray((np.stack([red, 1 - np.abs(change), blue], -1) * 255).round().astype(np.uint8))


def save(picture, path, text):
    """As PNG with text fields, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    for item in text.items():
        info.add_text(*item)
    picture.save(f"{path}.tmp", "PNG", pnginfo=info)
    os.replace(f"{path}.tmp", path)


def sheet(pictures):
    """{caption: picture}, all of one size, side by side above their captions."""
    width, height = next(iter(pictures.values())).size
    whole = Image.new("RGB", (len(pictures) * width, height + 14))
    for i, (caption, picture) in enumerate(pictures.items()):
        whole.paste(picture, (i * width, 0))
        ImageDraw.Draw(whole).text((i * width + 3, height + 1), caption)
    return whole


def parse(items, flag, model):
    """["FIELD=VALUE", ...] as a record that the weights cover."""
    record = {}
    for item in items:
        if "=" not in item:
            raise InputError(f"{flag} {item}: not of the form FIELD=VALUE, such as sex=male")
        field, text = item.split("=", 1)
        if (value := fields.parse_value(field, text, model.config.datasets)) is not None:
            record[field] = value
    fields.check_covered(record, model.config.covered)
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


def add_arguments(parser):
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
    parser.add_argument("--steps", type=cli.positive, default=12)
    parser.add_argument("--solver", choices=("euler", "heun"), default="heun")
    parser.add_argument("--depth", type=float, default=1.0, help="how far back towards noise, above 0 to 1")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--mask", type=Path, help="an image, white where the picture may change")
    region.add_argument("--keep", type=Path, help="an image, white where the picture must stay")
    parser.add_argument("--seed", type=int, help="with a mask: draw the inside anew")
    parser.add_argument("--dicom", action="store_true", help="write the edit as DICOM too, without a trace of the original's patient")
    parser.add_argument("--out", type=Path, default=Path("out/edit"))


def edit_command(args):
    if not 0 < args.depth <= 1:
        raise InputError(f"--depth {args.depth} is not above 0 and at most 1")

    model, decoder = sample.load_weights(args.weights)
    device, size = cli.pick_device()[0], size_of(model, decoder)
    try:
        array = pixels.read_radiograph(args.image, size)
    except pixels.Rejected as reason:
        raise InputError(f"{args.image}: {reason}") from None
    image = torch.from_numpy(array.astype(np.float32) / 127.5 - 1)[None, None]              # 1 1 H W
    given = parse(args.given, "--given", model)
    wishes = parse_sweep(args.sweep, model) if args.sweep else [parse(args.set, "--set", model)]
    mask = read_mask(args.mask or args.keep, size) if args.mask or args.keep else None
    mask = 1 - mask if args.keep else mask
    if mask is not None and not mask.any():
        raise InputError(f"{args.mask or args.keep}: {'black' if args.mask else 'white'} all over, so nothing may change")
    given = infer(given, image, model.config.covered) if args.infer else given
    records = fields.only_covered([act(given, wish, args.causal) for wish in wishes], model.config.covered)
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
    def picture(image):
        return Image.fromarray(pixels.to_bytes(image))

    args.out.mkdir(parents=True, exist_ok=True)
    how = sample.provenance(args.weights, steps=args.steps, solver=args.solver, guidance=args.guidance, depth=args.depth)
    text = sample.text_fields(how)
    if args.sweep:
        strip = {f"age {record['age']:g}": picture(e) for record, e in zip(records, edited)}
        first, *more = strip.values()
        save(sheet(strip), args.out / "strip.png", text)
        first.save(args.out / "sweep.gif", save_all=True, append_images=more, duration=400, loop=0, comment="Synthetic: RadiT")
    else:
        change = difference(same, edited[0])
        pixels.save_image(image[0], args.out / "original.png")
        pixels.save_image(same, args.out / "reconstruction.png", text)
        pixels.save_image(edited[0], args.out / "edit.png", text | {"Metadata": json.dumps(records[0])})
        save(change, args.out / "difference.png", text)
        save(sheet({"original": picture(image[0]), "reconstruction": picture(same), "edit": picture(edited[0]),
                    "red up, blue down": change}), args.out / "sheet.png", text)
    for i, (e, record, wish) in enumerate(zip(edited, records, wishes)):
        if args.dicom:
            words = ", ".join(f"{key} {value}" for key, value in how.items() if key not in ("weights", "fingerprint"))
            wished = ", ".join(f"{field} {value}" for field, value in wish.items()) or "nothing changed"
            dicom.write(args.out / (f"age-{wish['age']:g}.dcm" if args.sweep else "edit.dcm"), e, record, f"{how['weights']} {how['fingerprint']}",
                        args.seed or 0, words, f"Synthetic: a radiograph as RadiT would have it with {wished}")
    print(f"written to {args.out}")
