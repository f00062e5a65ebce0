"""Can experts tell? The blind real-or-synthetic reader study, as one page that asks and one command that counts.

    pairs    two images of the same view side by side, one real, one synthetic: pick the synthetic one
    single   one image at a time: from 1, definitely real, to 6, definitely synthetic

Source: the reader study of arXiv 2606.19460 (three experts, two presentations of the same pairs; accuracy, intra-rater
and inter-rater kappa). Here as well: intervals, and a test that can show equivalence to chance, within a margin that is
fixed when the page is built. The statistics are in agreement.py, what comes back from the readers in score.py.

What keeps it blind. An image enters the page as its bare grey values, size x size bytes: no file format, hence no header,
no metadata, no compression, no length of its own. Its name is the hash of its pixels; images and pairs are listed in the
order of their names. So the page is the same, byte for byte, whichever of the two folders was the synthetic one (a test
swaps them): the answers are only in the key. Whoever has the folders, or knows a public image by heart, has them too.

    python -m study build --real data/nih --synthetic out --pairs 50 --presentations 2 --seed 7 --out out/study.html
    python -m study score results/*.json --key out/study.key.json
    python -m study power --readers 3 --pairs 50 --margin 0.1
    python -m study example                                        (made-up readers, to see the table and the figure)

build writes study.html, for the readers, and study.key.json, for the experimenter alone. Each reader opens the page in a
browser and sends back the one file it offers at the end. score takes them all or, where one is not as it should be, none.
"""
import base64
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common import cli
from common.cli import InputError
from common.tables import read_table
from radiographs import fields, pixels
from radiographs.index import index_records
from study import agreement, score
from study.score import digest

PAGE = Path(__file__).parent / "page.html"
PRACTICE = 2   # more pairs, shown first and not counted
BLACK = 8      # grey levels below this become 0: preparation pads with 0, a decoder draws nearly 0; a narrow window shows it


# ---------------------------------------------------------------------------------------------------------
# Build: two folders to a page and its key

def read_real(folders):
    """Held-out images of prepared sources (see data.py): the split test, one a patient, as dicts of view and path."""
    held_out = ((root, record) for root in folders for record in index_records(root) if record["split"] == "test")
    by_patient = {(record.get("dataset"), record["patient"]): record | {"path": Path(root) / record["path"]}
                  for root, record in held_out}
    return list(by_patient.values())


def read_synthetic(folders):
    """What sample.py wrote, or any folder with a metadata.csv of columns file and view, as dicts of view and path."""
    records = []
    for root in map(Path, folders):
        table = root / "metadata.csv"
        if not table.exists():
            raise InputError(f"{root}: no metadata.csv, with columns file and view, such as python sample.py writes")
        for row in read_table(table):
            if not row.get("file") or row.get("view") is None:
                raise InputError(f"{table}, line {row.line}: no file or no view; needed are both columns")
            if not (root / row["file"]).resolve().is_relative_to(root.resolve()):
                raise InputError(f"{table}, line {row.line}: {row['file']!r} leaves {root}")
            try:
                records.append({"view": fields.parse_value("view", row["view"]), "path": root / row["file"]})
            except InputError as error:
                raise InputError(f"{table}, line {row.line}: {error}") from None
    return records


def match(real, synthetic, n, seed):
    """n pairs (real, synthetic) of the same known view, drawn at random. Folders of equal size, swapped, give the same."""
    pairs, counts = [], []
    for view in fields.VALUES["view"]:
        sides = [[record for record in side if record.get("view") == view] for side in (real, synthetic)]
        counts.append(f"{view} {len(sides[0])} real and {len(sides[1])} synthetic")
        for side in sides:
            random.Random(seed).shuffle(side)
        pairs += zip(*sides)
    if len(pairs) < n:
        raise InputError(f"{n} pairs are needed, {PRACTICE} of them to practise on, and only {len(pairs)} can be matched by "
                         f"view: {', '.join(counts)}")
    return random.Random(seed).sample(pairs, n)


def read_pixels(pairs):
    """Every image as (size, size) uint8, size being the smallest side of all; and the sizes found, by path."""
    paths = [record["path"] for pair in pairs for record in pair]
    sizes = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes[path] = max(image.size)
        except UnidentifiedImageError:
            raise InputError(f"{path}: not an image") from None
    size = min(sizes.values())
    arrays = {}
    for path in paths:
        try:
            image = pixels.read_radiograph(path, size)
        except pixels.Rejected as reason:
            raise InputError(f"{path}: {reason}") from None
        arrays[path] = np.where(image < BLACK, 0, image).astype(np.uint8)
    return arrays, sizes


def make_study(pairs, design, presentations, margin, quiz, seed):
    """What the page says (a dict), the images by name (bytes), and the key (a dict). Only the key knows the answers,
    unless it is a quiz."""
    arrays, sizes = read_pixels(pairs)
    names, images = {}, {}
    for path in (record["path"] for pair in pairs for record in pair):
        names[path] = name = digest(arrays[path].tobytes())
        if name in images:
            raise InputError(f"{path}: the same picture as {next(other for other in names if names[other] == name)}")
        images[name] = arrays[path].tobytes()
    named = [[names[record["path"]] for record in pair] for pair in pairs]        # (real, synthetic), practice first
    parts = [sorted(map(sorted, part)) if design == "pairs" else sorted([name] for pair in part for name in pair)
             for part in (named[:PRACTICE], named[PRACTICE:])]
    study = {"design": design, "presentations": presentations, "margin": margin, "quiz": quiz,
             "size": len(next(iter(arrays.values()))), "practice": parts[0], "questions": parts[1]}
    key = {"id": digest(study), "seed": seed, "study": study, "pairs": named[PRACTICE:],     # (real, synthetic) each
           "files": {names[path]: str(path) for path in names}}
    return study, images, key, sizes


def write_page(path, study, images, key):
    """The template with the study in it; a quiz also holds the names of the synthetic images, in base64."""
    content = {"id": key["id"], "study": study, "answers": None,
               "images": {name: base64.b64encode(images[name]).decode() for name in sorted(images)}}
    if study["quiz"]:
        content["answers"] = base64.b64encode(json.dumps([name for _, name in key["pairs"]]).encode()).decode()
    cli.write_text(path, PAGE.read_text(encoding="utf-8").replace("{{STUDY}}", json.dumps(content)))


def build(args):
    if not args.out.name.endswith(".html"):
        raise InputError(f"--out {args.out}: the page is a file that ends in .html")
    presentations = args.presentations or (1 if args.quiz else 2)
    if args.quiz and presentations > 1:
        raise InputError(f"--presentations {presentations}: a quiz gives the answers away, so it is played once")
    pairs = match(read_real(args.real), read_synthetic(args.synthetic), args.pairs + PRACTICE, args.seed)
    study, images, key, sizes = make_study(pairs, args.design, presentations, args.margin, args.quiz, args.seed)
    key_path = args.out.with_suffix(".key.json")
    if key_path.exists() and score.read_key(key_path)["id"] != key["id"]:
        raise InputError(f"{key_path} is the key of another study, whose results would be lost with it; give another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cli.write_json(key_path, key)
    write_page(args.out, study, images, key)
    size = study["size"]
    print(f"{args.out}: {len(study['questions'])} questions in each of {presentations} presentations, images of "
          f"{size}x{size}, {args.out.stat().st_size / 1e6:.1f} MB; for the readers")
    print(f"{key_path}: the answers; for nobody who reads" + (" (a quiz page holds them as well)" if args.quiz else ""))
    if max(sizes.values()) > size:
        print(f"note: sides of {size} to {max(sizes.values())} pixels were all brought to {size}; "
              "resampling leaves traces, so prepare and draw at one size")


# ---------------------------------------------------------------------------------------------------------
# Plan

def power(readers, pairs, margin, design):
    """A table of what a planned study of one presentation would show, for several abilities the readers may have."""
    n = pairs * (2 if design == "single" else 1)
    kappas = (0, 0.2, 0.4)
    print(f"The chance that a study of {pairs} pairs ({n} answers a reader), margin {margin:g}, shows\n")
    print(f"{'':>14}{'one reader':>26}{f'{readers} together equivalent to chance,':>46}")
    print(f"{'true accuracy':>14}{'equivalent':>13}{'different':>13}"
          + "".join(f"{f'if their kappa is {kappa:g}':>24}" for kappa in kappas))
    for accuracy in (0.5, 0.52, 0.55, 0.6, 0.7):
        alone = agreement.power_alone(accuracy, n, margin)
        both = [agreement.power_together(accuracy, n, margin, readers, kappa) for kappa in kappas]
        print(f"{accuracy:14.2f}" + "".join(f"{p:13.2f}" for p in alone) + "".join(f"{p:24.2f}" for p in both))
    print(f"\nWhere the true accuracy is {0.5 + margin:g} or more, showing equivalence is an error.")
