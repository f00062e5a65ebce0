"""Can experts tell? The blind real-or-synthetic reader study: two folders of images become one page and its key.

    pairs    two images of the same view side by side, one real, one synthetic: choose the synthetic one
    single   one image at a time: rate it from 1, definitely real, to 6, definitely synthetic

Source: the reader study of arXiv 2606.19460 (three experts, two presentations of the same pairs; accuracy,
intra-rater and inter-rater kappa). Added here: intervals, and a test that can show equivalence to chance, within a
margin that is fixed when the page is built. The statistics are in agreement.py; the readers' answers are checked and
scored in score.py.

What keeps it blind. An image enters the page as its bare grey values, size x size bytes: no file format, and so no
header, no metadata, no compression and no length of its own. Its name is the hash of its pixels; images and pairs are
listed in the order of their names. The page is therefore the same, byte for byte, whichever of the two folders is the
synthetic one (a test swaps them): the answers are only in the key. Anyone who has the folders, or knows a public
image by heart, has the answers too.

build writes study.html, for the readers, and study.key.json, for the experimenter alone. Each reader opens the page
in a browser and sends back the one file that it offers at the end.
"""
import base64
import json
import random
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError

from common import cli
from common.cli import InputError
from common.tables import read_table
from radiographs import fields, pixels
from radiographs.folders import images_of
from study import agreement
from study.score import digest, read_key

PAGE = Path(__file__).parent / "page.html"
PRACTICE = 2   # additional pairs, shown first and not counted
# Grey levels below this become 0: real images are padded with 0, a decoder's black is only nearly 0, and a narrow
# window would show the difference.
BLACK = 8


# ---------------------------------------------------------------------------------------------------------
# The images

def read_real(folders):
    """Held-out images, one for each patient, as records with a path: of a folder with an index.csv those of the split
    test, of any other folder all."""
    records = []
    for folder in map(Path, folders):
        found = images_of(folder)
        if any("split" in record for record in found):
            found = [record for record in found if record["split"] == "test"]
            if not found:
                raise InputError(f"{folder}: no image of the split test; readers must see none used in training")
        else:
            print(f"note: {folder} has no index.csv, so whether a model was trained on these images is not known")
        records += found
    # The last image of each patient; an image whose patient is not known counts as its own.
    by_patient = {(record.get("dataset"), record.get("patient") or record["path"]): record for record in records}
    return list(by_patient.values())


def read_synthetic(folders):
    """All images of the folders, as records with a path. A metadata.csv with the columns file and view, as sample.py
    writes one beside its images, says which there are and of which view."""
    records = []
    for folder in map(Path, folders):
        table = folder / "metadata.csv"
        records += read_metadata(table) if table.exists() else images_of(folder)
    return records


def read_metadata(table):
    """The rows of a metadata.csv as records of path and, where it is known, view."""
    folder = table.parent
    for row in read_table(table):
        if not row.get("file") or row.get("view") is None:
            raise InputError(f"{table}, line {row.line}: no file or no view; both columns are needed")
        if not (folder / row["file"]).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{table}, line {row.line}: {row['file']!r} leaves {folder}")
        try:
            view = fields.parse_value("view", row["view"])
        except InputError as error:
            raise InputError(f"{table}, line {row.line}: {error}") from None
        yield fields.drop_unknown({"view": view, "path": folder / row["file"]})


def match(real, synthetic, n, seed):
    """n pairs (real, synthetic) of the same known view, chosen at random. Where one side says nothing of views, any
    real image is paired with any synthetic one. Folders of equal size, swapped, give the same pairs."""
    views = fields.VALUES["view"]
    if not all(any("view" in record for record in side) for side in (real, synthetic)):
        print("note: the views of one side are not known, so a pair may show two different views")
        views = (None,)
    pairs, counts = [], []
    for view in views:
        sides = [[record for record in side if view in (None, record.get("view"))] for side in (real, synthetic)]
        counts.append(f"{view or 'any view'} {len(sides[0])} real and {len(sides[1])} synthetic")
        for side in sides:
            random.Random(seed).shuffle(side)
        pairs += zip(*sides)
    if len(pairs) < n:
        raise InputError(f"{n} pairs are needed, {PRACTICE} of them for practice, and only {len(pairs)} can be matched "
                         f"by view: {', '.join(counts)}")
    return random.Random(seed).sample(pairs, n)


def read_pixels(pairs):
    """Every image as (size, size) uint8, size being the smallest side of all; and the sides found, by path."""
    paths = [record["path"] for pair in pairs for record in pair]
    sides = {path: longest_side(path) for path in paths}
    size = min(sides.values())
    arrays = {}
    for path in paths:
        try:
            image = pixels.read_radiograph(path, size)
        except pixels.Rejected as reason:
            raise InputError(f"{path}: {reason}") from None
        arrays[path] = np.where(image < BLACK, 0, image).astype(np.uint8)
    return arrays, sides


def longest_side(path):
    """Of an image file, in pixels."""
    try:
        if pixels.is_dicom(path):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            return max(header.Rows, header.Columns)
        with Image.open(path) as image:
            return max(image.size)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image") from None
    except OSError:
        raise
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise InputError(f"{path}: unreadable ({type(error).__name__})") from None


def check_sides(pairs):
    """Refuses sides given the wrong way round, which the marks of synthetic images show; says where there are no
    marks."""
    marked = [pixels.is_synthetic(synthetic["path"]) for _, synthetic in pairs]
    for real, _ in pairs:
        if pixels.is_synthetic(real["path"]):
            swapped = "" if any(marked) else "; are --real and --synthetic the wrong way round?"
            raise InputError(f"--real: {real['path']} says in its header that it is synthetic{swapped}")
    if not all(marked):
        print(f"note: of {cli.count(len(marked), 'image')} of --synthetic, {marked.count(False)} without a mark in the "
              "header that says so; make sure that they are synthetic")


# ---------------------------------------------------------------------------------------------------------
# The page and its key

def make_study(pairs, arrays, design, presentations, margin, quiz, seed):
    """What the page says (a dict), the images by name (bytes), and the key (a dict). Only the key knows the answers."""
    names, images = {}, {}
    for path in (record["path"] for pair in pairs for record in pair):
        names[path] = name = digest(arrays[path].tobytes())
        if name in images:
            raise InputError(f"{path}: the same picture as {next(other for other in names if names[other] == name)}")
        images[name] = arrays[path].tobytes()
    named = [[names[record["path"]] for record in pair] for pair in pairs]        # (real, synthetic), practice first
    practice, questions = ask(named[:PRACTICE], design), ask(named[PRACTICE:], design)
    study = {"design": design, "presentations": presentations, "margin": margin, "quiz": quiz,
             "size": len(next(iter(arrays.values()))), "practice": practice, "questions": questions}
    key = {"id": digest(study), "seed": seed, "study": study, "pairs": named[PRACTICE:],     # (real, synthetic) each
           "files": {names[path]: str(path) for path in names}}
    return study, images, key


def ask(named, design):
    """Pairs of names (real, synthetic) as questions, in an order that says nothing of which is which."""
    if design == "pairs":
        return sorted(map(sorted, named))
    return sorted([name] for pair in named for name in pair)


def write_page(path, study, images, key):
    """The template with the study in it. The page of a quiz also holds the names of the synthetic images, in base64."""
    content = {"id": key["id"], "study": study, "answers": None,
               "images": {name: base64.b64encode(images[name]).decode() for name in sorted(images)}}
    if study["quiz"]:
        content["answers"] = base64.b64encode(json.dumps([name for _, name in key["pairs"]]).encode()).decode()
    cli.write_text(path, PAGE.read_text(encoding="utf-8").replace("{{STUDY}}", json.dumps(content)))


def build(real, synthetic, out, design="pairs", pairs=50, presentations=None, margin=0.1, quiz=False, seed=0):
    """Writes the page OUT and beside it the key. real, synthetic: lists of folders; the rest is explained by
    `python -m study build --help`."""
    if not out.name.endswith(".html"):
        raise InputError(f"--out {out}: the page is a file that ends in .html")
    presentations = presentations or (1 if quiz else 2)
    if quiz and presentations > 1:
        raise InputError(f"--presentations {presentations}: a quiz tells the answers, so it is presented once")
    matched = match(read_real(real), read_synthetic(synthetic), pairs + PRACTICE, seed)
    arrays, sides = read_pixels(matched)
    check_sides(matched)
    study, images, key = make_study(matched, arrays, design, presentations, margin, quiz, seed)
    key_path = out.with_suffix(".key.json")
    with cli.locked(out.parent):                                     # the page and the key belong together
        if key_path.exists() and read_key(key_path)["id"] != key["id"]:
            raise InputError(f"{key_path} is the key of another study, whose results would be lost with it; "
                             "give another --out")
        cli.write_json(key_path, key)
        write_page(out, study, images, key)
    size, times = study["size"], cli.count(presentations, "presentation")
    print(f"{out}: {cli.count(len(study['questions']), 'question')} in {times}, images of {size}x{size}, "
          f"{out.stat().st_size / 1e6:.1f} MB; for the readers")
    print(f"{key_path}: the answers; not for readers" + (" (the page of a quiz holds them too)" if quiz else ""))
    if max(sides.values()) > size:
        print(f"note: sides of {size} to {max(sides.values())} pixels were all reduced to {size}; resampling leaves "
              "traces, so prepare and sample at one size")


# ---------------------------------------------------------------------------------------------------------
# Planning

def print_power(readers, pairs, margin, design):
    """A table of what a planned study of one presentation would show, for several true accuracies of its readers."""
    n = pairs * (2 if design == "single" else 1)
    kappas, together = (0, 0.2, 0.4), f"{cli.count(readers, 'reader')} together equivalent to chance,"
    print(f"The chance that a study of {pairs} pairs ({n} answers of each reader), margin {margin:g}, shows\n")
    print(f"{'':>14}{'one reader':>26}{together:>46}")
    print(f"{'true accuracy':>14}{'equivalent':>13}{'different':>13}"
          + "".join(f"{f'if their kappa is {kappa:g}':>24}" for kappa in kappas))
    for accuracy in (0.5, 0.52, 0.55, 0.6, 0.7):
        alone = agreement.power_alone(accuracy, n, margin)
        all_readers = [agreement.power_together(accuracy, n, margin, readers, kappa) for kappa in kappas]
        print(f"{accuracy:14.2f}" + "".join(f"{p:13.2f}" for p in alone) + "".join(f"{p:24.2f}" for p in all_readers))
    print(f"\nWhere the true accuracy is {0.5 + margin:g} or more, showing equivalence is an error. Equivalence is "
          "withheld where\na single reader differs from chance by Holm's test, which happens in at most 5 % of the "
          "studies of readers who all guess.")
