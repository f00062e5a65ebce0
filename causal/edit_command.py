"""Edit a radiograph: the same one, had one thing been different. See causal/edit.py for the method.

    python -m causal edit xray.png --given sex=male --given age=55 --set pleural_effusion=positive
    python -m causal edit xray.png --infer --sweep age=20:80:10 --out out/ages
    python -m causal edit xray.png --set cardiomegaly=positive --mask heart.png

OUT then holds original.png, reconstruction.png (what the model makes of the unchanged image), edit.png,
difference.png and sheet.png with all of them; of a sweep strip.png and sweep.gif.
"""
import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pydicom
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import data
import flow
import sample
from causal import edit
from common import cli
from common.cli import InputError, RunError
from radiographs import dicom, fields, pixels
from radiographs.index import COLUMNS, SPLITS, index_row

SHOWN = 384  # pixels: how large each picture of a sheet is at least


# ---------------------------------------------------------------------------------------------------------
# Masks and pictures

def shape_of(path):
    """(height, width) in pixels of an image file."""
    if pixels.is_dicom(path):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        return int(ds.Rows), int(ds.Columns)
    with Image.open(path) as image:
        return image.height, image.width


def read_mask(path, size, original, keep=False):
    """A mask image as (1, 1, size, size) in {0, 1}, 1 where the picture may change: its white, from half up, or with
    `keep` its black. It is as large as the edited image or as the original file, whose shape (height, width) is given;
    then it is letterboxed as the original was, and the black bars stay as they are."""
    try:
        array = pixels.read_picture(path)                            # H W in [0, 1]
    except pixels.Rejected as reason:
        raise InputError(f"{path}: {reason}") from None
    if array.shape not in ((size, size), tuple(original)):
        raise InputError(f"{path}: a mask of {array.shape[1]}x{array.shape[0]} pixels; accepted: {size}x{size}, as the "
                         f"image is edited, or {original[1]}x{original[0]}, as it was")
    free = torch.from_numpy((array >= 0.5) != keep).float()          # H W
    scale = size / max(free.shape)
    height, width = (max(1, round(side * scale)) for side in free.shape)
    top, left = (size - height) // 2, (size - width) // 2
    mask = torch.zeros(1, 1, size, size)
    mask[..., top:top + height, left:left + width] = torch.nn.functional.interpolate(
        free[None, None], (height, width), mode="nearest-exact")
    if not mask.any():
        color = "white" if keep else "black"
        raise InputError(f"{path}: {color} all over, so nothing may change")
    return mask


def difference(a, b):
    """b - a of images (1, H, W) as an RGB picture: red where b is brighter, blue where it is darker, in full colour
    at a quarter of the range from black to white; white where they are equal."""
    change = ((b - a)[0] * 2).clamp(-1, 1).numpy()                   # H W
    red, blue = np.where(change > 0, 1, 1 + change), np.where(change < 0, 1, 1 - change)
    return Image.fromarray((np.stack([red, 1 - np.abs(change), blue], -1) * 255).round().astype(np.uint8))


def picture(image):
    """A (1, H, W) image in [-1, 1] as an 8-bit grey picture."""
    return Image.fromarray(pixels.to_bytes(image))


def save_png(picture, path, text):
    """A picture as PNG with text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with cli.whole_file(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def sheet(title, pictures, columns=6):
    """{caption: picture}, all of one size, enlarged to at least SHOWN pixels, side by side under their captions and a
    title, which is broken into lines."""
    side = max(SHOWN, *next(iter(pictures.values())).size)
    font, line, columns = ImageFont.load_default(size=18), 26, min(columns, len(pictures))
    lines, rows = [""], math.ceil(len(pictures) / columns)
    for word in title.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > columns * side - 12:
            lines.append(word)
        else:
            lines[-1] = longer
    whole = Image.new("RGB", (columns * side, line * len(lines) + rows * (line + side)))
    draw = ImageDraw.Draw(whole)
    for i, text in enumerate(lines):
        draw.text((6, line * i + 2), text, font=font)
    for i, (caption, item) in enumerate(pictures.items()):
        left, top = i % columns * side, line * len(lines) + i // columns * (line + side)
        draw.text((left + 6, top + 2), caption, font=font)
        whole.paste(item.resize((side, side), Image.Resampling.BICUBIC), (left, top + line))
    return whole


# ---------------------------------------------------------------------------------------------------------
# What is asked for

def parse_covered(items, flag, cfg):
    """["FIELD=VALUE", ...] as a record that the weights cover."""
    record = fields.parse_items(items, flag, cfg.datasets)
    fields.check_covered(record, cfg.covered)
    return record


def parse_sweep(text, cfg):
    """"age=20:90:10" as [{"age": 20.0}, ..., {"age": 90.0}]."""
    try:
        field, span = text.split("=")
        first, last, step = map(float, span.split(":"))
        ages = np.arange(first, last + step / 2, step).tolist() if field == "age" and 0 < step < np.inf else []
    except (ValueError, OverflowError, MemoryError):
        ages = []
    if not 2 <= len(ages) <= 100:
        raise InputError(f"--sweep {text[:60]}: accepted is age=FIRST:LAST:STEP in years, such as age=20:90:10, of 2 "
                         "to 100 pictures")
    return [parse_covered([f"age={age}"], "--sweep", cfg) for age in ages]


def describe(before, after):
    """What differs between two records, in words."""
    changes = [f"{field} {format_value(before.get(field, 'unknown'))} to {format_value(after.get(field, 'unknown'))}"
               for field in fields.FIELDS if before.get(field) != after.get(field)]
    return ", ".join(changes) or "nothing changes"


def format_value(value):
    return f"{value:g}" if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------
# python -m causal edit

def add_settings(parser):
    parser.add_argument("--weights", type=Path, default=sample.DEMO, help="a folder that holds radit/ and vae/, or its "
                        "name on the Hub (default: the demo's)")
    parser.add_argument("--guidance", type=cli.number(0, 100), default=2.0,
                        help="of what changes; 1 is off, 0 ignores the metadata (default: 2)")
    parser.add_argument("--steps", type=cli.integer(1, 1000), default=12, help="solver steps each way (default: 12)")


def add_arguments(parser):
    parser.add_argument("image", type=Path, help="a radiograph: DICOM, PNG or JPEG")
    parser.add_argument("--given", action="append", default=[], metavar="FIELD=VALUE", help="what is known of it")
    parser.add_argument("--infer", action="store_true", help="let the embedded classifier say what is not given, where "
                        f"it is sure: from a probability of {edit.SURE} up")
    change = parser.add_mutually_exclusive_group(required=True)
    change.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="what to change")
    change.add_argument("--sweep", metavar="age=FIRST:LAST:STEP", help="a strip of pictures and an animation")
    add_settings(parser)
    parser.add_argument("--causal", type=Path, default=sample.DEMO / "causal", help="the causal model from which the "
                        "descendants of what changes follow (default: the demo's)")
    parser.add_argument("--no-causal", dest="causal", action="store_const", const=None, help="change only what is set")
    parser.add_argument("--solver", choices=tuple(flow.SOLVERS), default="heun", help="(default: heun)")
    parser.add_argument("--depth", type=cli.number(0.01, 1), default=1.0, help="how far back towards noise, from 0.01 "
                        "to 1 (default: 1)")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--mask", type=Path, help="an image, white where the picture may change")
    region.add_argument("--keep", type=Path, help="an image, white where the picture must stay")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 61), help="with a mask: new noise inside it, from this seed")
    parser.add_argument("--dicom", action="store_true", help="write the edit as DICOM too; nothing of the original's "
                        "header is taken over")
    parser.add_argument("--out", type=cli.new_path, help="a new folder, out/edit-1 or the next, if not given")


def read_request(args, cfg, image):
    """What is known of the image, and the records that it should show instead; prints what was inferred and changed."""
    given, notes = fields.resolve_request(parse_covered(args.given, "--given", cfg))
    requests = parse_sweep(args.sweep, cfg) if args.sweep else [parse_covered(args.set, "--set", cfg)]
    if args.infer:
        given, lines = edit.infer(given, image, cfg.covered)
        notes += lines
    for request in requests:
        resolved, contradictions = fields.resolve_request(given | request)
        if request and not any(resolved.get(field) == value for field, value in request.items()):
            raise InputError(f"what is asked for cannot be shown together: {contradictions[0]}")
        notes += contradictions
    records = fields.only_covered([edit.act(given, request, args.causal) for request in requests], cfg.covered)
    for note in dict.fromkeys(notes):
        print(note)
    if not args.sweep and records[0] == given and args.seed is None:
        raise InputError(f"--set {' '.join(args.set)}: that is what is given or inferred already, so there is nothing "
                         "to change")
    for record in records:
        print(f"changed: {describe(given, record)}")
    return given, requests, records


def edit_command(args):
    if args.seed is not None and not (args.mask or args.keep):
        raise InputError("--seed makes the inside of a mask anew; give --mask or --keep too")
    if args.out:
        cli.refuse_filled(args.out)                                  # before the work, and again when it is locked
    model, vae = sample.load_weights(args.weights)
    size = edit.size_of(model, vae)
    try:
        array = pixels.read_radiograph(args.image, size)
    except pixels.Rejected as reason:
        raise InputError(f"{args.image}: {reason}") from None
    image = torch.from_numpy(array.astype(np.float32) / 127.5 - 1)[None, None]              # 1 1 H W
    mask = None
    if args.mask or args.keep:
        mask = read_mask(args.mask or args.keep, size, shape_of(args.image), keep=bool(args.keep))
    given, requests, records = read_request(args, model.config, image)

    device, _ = cli.pick_device()
    model, vae = model.to(device), vae.to(device) if vae else None
    x = image.to(device).expand(len(records), -1, -1, -1)            # N 1 H W
    edited = edit.edit(model, vae, x, [given] * len(records), records, args.guidance, args.steps, args.solver,
                       args.depth, mask if mask is None else mask.to(device), args.seed).cpu()
    check_finite(edited, args.guidance)
    with torch.no_grad():
        unchanged = (vae.decode(vae.encode(x[:1])[0]) if vae else x[:1]).clamp(-1, 1).cpu()
    if mask is not None:
        unchanged = torch.where(mask > 0, unchanged, image)          # outside it the edit has the original's pixels
    settings = sample.provenance(args.weights, steps=args.steps, solver=args.solver, guidance=args.guidance,
                                depth=args.depth)
    with cli.locked(args.out or cli.new_folder("edit")) as out:
        cli.refuse_filled(out)
        if args.sweep:
            write_sweep(out, image[0], edited, records, sample.text_fields(settings))
        else:
            write_edit(out, image[0], unchanged[0], edited[0], given, records[0], sample.text_fields(settings))
        if args.dicom:
            for request, record, result in zip(requests, records, edited):
                name = f"age-{request['age']:g}.dcm" if args.sweep else "edit.dcm"
                write_dicom(out / name, result, request, record, args.seed or 0, settings)
    print(f"written to {out}")


def check_finite(edited, guidance):
    if not edited.isfinite().all():
        raise RunError(f"the edit is not finite: guidance {guidance:g} is too strong, or the weights are damaged")


def write_edit(out, original, unchanged, edited, given, record, text):
    """Images (1, H, W) and the records before and after, as the files of one edit."""
    change = difference(unchanged, edited)
    save_png(picture(original), out / "original.png", {})
    save_png(picture(unchanged), out / "reconstruction.png", text)
    save_png(picture(edited), out / "edit.png", text | {"Metadata": json.dumps(record)})
    save_png(change, out / "difference.png", text)
    pictures = {"original": picture(original), "reconstruction": picture(unchanged), "edit": picture(edited),
                "difference: red brighter, blue darker": change}
    save_png(sheet(describe(given, record), pictures), out / "sheet.png", text)


def write_sweep(out, original, edited, records, text):
    """The original (1, H, W) and its edits (N, 1, H, W) side by side, and the edits as an animation."""
    frames = [picture(image) for image in edited]
    ages = {f"age {record['age']:g}": frame for record, frame in zip(records, frames)}
    save_png(sheet("the original, and as it would be at other ages", {"original": picture(original), **ages}),
             out / "strip.png", text)
    with cli.whole_file(out / "sweep.gif") as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=400, loop=0,
                       comment="Synthetic: RadiT")


def write_dicom(path, image, request, record, seed, settings):
    """An edited image (1, H, W) as DICOM, which says what was changed."""
    words = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("weights", "fingerprint"))
    changed = ", ".join(f"{field} {format_value(value)}" for field, value in request.items()) or "nothing changed"
    dicom.write(path, image, record, f"{settings['weights']} {settings['fingerprint']}", seed, words,
                f"Synthetic: a radiograph as RadiT would have it with {changed}")


# ---------------------------------------------------------------------------------------------------------
# python -m causal edit-all

EDIT_ALL = """Edit held-out radiographs for python -m diagnosis stress: one field changes and nothing else.

    python -m causal edit-all data/nih --from sex=male --set sex=female --n 64 --out out/women
    python -m causal edit-all data/nih --from dataset=ChestX-ray14 --from view=PA --set view=AP --out out/ap

OUT then holds two prepared sources, edited/ and unchanged/ (the same images after the same steps, with nothing
changed), and edits.json with the settings. The same command continues what was interrupted.
"""


def add_all_arguments(parser):
    parser.add_argument("data", nargs="+", type=Path, help="prepared sources")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    parser.add_argument("--from", dest="source", action="append", default=[], metavar="FIELD=VALUE", help="which "
                        "images: those with this value; an age stands for its band: 0-17, 18-39, 40-59, 60-79, 80-120")
    parser.add_argument("--set", required=True, metavar="FIELD=VALUE", help="what to change")
    parser.add_argument("--n", type=cli.integer(1, 10 ** 6), default=64, help="how many, of different patients where "
                        "there are as many (default: 64)")
    add_settings(parser)
    parser.add_argument("--batch", type=cli.integer(1, 4096), default=16, help="images at a time (default: 16)")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 61), default=0, help="of the choice of images")
    parser.add_argument("--out", type=cli.new_path, required=True, help="a folder for both sources and edits.json")


def same_group(record, conditions):
    """Whether a record has the values of `conditions`, ages to the band."""
    return all(field in record and fields.groups_of(record, [field]) == fields.groups_of(conditions, [field])
               for field in conditions)


def choose(records, conditions, change, n, seed):
    """Indices of up to n records with the values of `conditions` and another known value of what is to change; each
    patient comes once before any comes twice."""
    (field, value), = change.items()
    order = random.Random(seed).sample(range(len(records)), len(records))
    fitting = [i for i in order if same_group(records[i], conditions) and field in records[i]
               and not same_group(records[i], change)]
    seen, ranks = {}, []
    for i in fitting:
        seen[records[i]["patient"]] = seen.get(records[i]["patient"], -1) + 1
        ranks.append(seen[records[i]["patient"]])
    return [i for _, i in sorted(zip(ranks, fitting), key=lambda pair: pair[0])][:n]


def edit_all_command(args):
    model, vae = sample.load_weights(args.weights)
    cfg, size = model.config, edit.size_of(model, vae)
    change = parse_covered([args.set], "--set", cfg)
    if not change:
        raise InputError(f"--set {args.set}: unknown is not a value to change to")
    conditions = fields.parse_items(args.source, "--from", cfg.datasets)
    images = data.Radiographs(args.data, args.split)
    chosen = choose(images.records, conditions, change, args.n, args.seed)
    if not chosen:
        raise InputError(f"{', '.join(map(str, args.data))}: no image of the split {args.split} has "
                         f"{' and '.join(args.source) or 'a known value'} and not {args.set}")
    if images[0].shape[-1] != size:
        raise InputError(f"{args.data[0]}: images of {images[0].shape[-1]} pixels; these weights know {size} "
                         f"(python data.py prepare ... --size {size})")
    device, _ = cli.pick_device()
    model, vae = model.to(device), vae.to(device) if vae else None
    settings = sample.provenance(args.weights, steps=args.steps, solver="heun", guidance=args.guidance)
    records = [images.records[i] for i in chosen]
    about = {"conditions": conditions, "change": change, "split": args.split, "batch": args.batch,
             "names": [Path(record["path"]).name for record in records], "images": checksum(records), **settings}
    with cli.locked(args.out):
        open_edits(args.out, about)
        for name, what in (("unchanged", {}), ("edited", change)):
            for part in tqdm(missing_batches(args.out / name, len(chosen), args.batch), desc=name, unit="batch"):
                known = fields.only_covered([metadata(records[i]) for i in part], cfg.covered)
                x = torch.stack([images[chosen[i]] for i in part]).to(device)                # N 1 H W
                new = [record | what for record in known]
                result = edit.edit(model, vae, x, known, new, args.guidance, args.steps).cpu()
                check_finite(result, args.guidance)
                for i, image, record in zip(part, result, new):
                    text = sample.text_fields(settings, metadata=json.dumps(record))
                    pixels.save_image(image, args.out / name / f"images/{i:05}.png", text)
            rows = (index_row(record | what | {"path": f"images/{i:05}.png", "split": "test"})
                    for i, record in enumerate(records))
            cli.write_csv(args.out / name / "index.csv", COLUMNS, rows)
    print(f"{cli.count(len(chosen), 'image')} with {args.set}, and unchanged, in {args.out}")


def open_edits(out, about):
    """Writes OUT/edits.json. Refuses a folder that holds anything but these edits, since images that exist are not made
    again."""
    table = out / "edits.json"
    if not table.exists():
        cli.refuse_filled(out)
        cli.write_json(table, about)
    before = cli.read_json(table)
    for key in about:
        if before.get(key) != about[key]:
            raise InputError(f"{out} holds edits of another command, with other {key}; name another --out")


def missing_batches(folder, count, batch):
    """The batches, as ranges of numbers, of which FOLDER/images lacks an image. The division does not depend on which
    exist: images differ by rounding errors with the size of their batch."""
    parts = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [part for part in parts if not all((folder / f"images/{i:05}.png").exists() for i in part)]


def checksum(records):
    """Sixteen hex digits that change with the metadata or the file of an image."""
    digest = hashlib.sha256()
    for record in records:
        content = Path(record["path"]).read_bytes()
        digest.update(json.dumps([record["patient"], metadata(record)]).encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def metadata(record):
    """The fields of an index's record."""
    return {field: record[field] for field in fields.FIELDS if field in record}
