"""Radiographs and what is known of them: 19 metadata fields, one index, one way to read an image.

The paper (arXiv 2606.19460, CXR7-1M) harmonises seven public chest X-ray data sets into 19 fields:
dataset, age, sex, race, view and the 14 CheXpert labels. This file does the same for a folder of images.

    source folder --prepare--> PREPARED/index.csv     one row an image, columns as in the CXR7-1M master CSV
                               PREPARED/images/*.png  grey, aspect ratio kept, centred on black, never flipped
                               PREPARED/rejected.csv  path and reason of every image that was not taken

Conventions. Metadata in memory: a dict of field -> value in which an unknown field is absent. In tensors:
`age` (N,) float32 in years, NaN unknown; `codes` (N, 18) int64 for the other fields, 0 always unknown.
Images in memory: float32 (1, H, W) in [-1, 1], black is -1.

    python data.py prepare nih ROOT OUT --size 256
    python data.py prepare folder ROOT OUT          (DICOM, PNG or JPEG; an index.csv in ROOT is used if there)
"""
import argparse
import csv
import gzip
import hashlib
import math
import multiprocessing
import os
import re
import sys
from pathlib import Path

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydicom.pixels import apply_modality_lut, apply_voi
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------
# The 19 fields

DATASETS = ("MIMIC-CXR", "ReXGradient", "CheXpert-Plus", "PadChest", "ChestX-ray14", "BRAX", "VinDr-CXR")
LABELS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
          "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
          "Fracture", "Support Devices")  # CheXpert's order
FINDINGS = {label.lower().replace(" ", "_"): label for label in LABELS}  # field name -> column name

# Every field but age, with its values; code k in a tensor is values[k - 1], and 0 is unknown.
VALUES = {"dataset": DATASETS, "sex": ("female", "male"), "race": ("asian", "black", "white"),
          "view": ("AP", "PA", "LATERAL"), **{field: ("negative", "positive") for field in FINDINGS}}
FIELDS = ("dataset", "age", "sex", "race", "view", *FINDINGS)  # all 19, in the order of the model's embeddings
CODED = tuple(field for field in FIELDS if field != "age")      # the columns of `codes`
MAX_AGE = 120  # years; ChestX-ray14's first release holds ages up to 414, which are typing errors

COLUMNS = ("Dataset_name", "ImagePath", "PatientID", "Age", "Sex_name", "Race_name", "View_name", "Split", *LABELS)
SPLITS = ("train", "valid", "test")


class InputError(ValueError):
    """Something the user can mend: one line that names what is wrong and what is accepted."""


class Rejected(ValueError):
    """An image that cannot be used, and why. The run goes on."""


def run(main):
    """Calls main(); what a user can cause becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def positive(text):
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number


def parse_value(field, text, datasets=DATASETS):
    """The value of `field` as memory holds it, from what a person or a table wrote; None if it says unknown.

    Age: a float in years, 0 to 120. Other fields: one of VALUES[field] whatever the case ("F", "female").
    Raises InputError, naming what is accepted.
    """
    if field not in FIELDS:
        raise InputError(f"unknown field {field!r}; the fields are {', '.join(FIELDS)}")
    text = str(text).strip()
    if text.lower() in ("", "u", "unknown", "nan", "none"):
        return None
    if field == "age":
        try:
            age = float(text)
        except ValueError:
            age = math.nan
        if not 0 <= age <= MAX_AGE:
            raise InputError(f"age {text!r} is not a number of years from 0 to {MAX_AGE}")
        return age
    values = datasets if field == "dataset" else VALUES[field]
    for value in values:
        if text.lower() == value.lower() or (field == "sex" and text.lower() == value[0]):
            return value
    raise InputError(f"unknown value {text!r} for {field}; accepted: {', '.join(values)} or unknown")


def encode_metadata(records, datasets=DATASETS):
    """Dicts of field -> value to tensors: age (N,) float32 with NaN unknown, codes (N, 18) int64 with 0 unknown."""
    age = torch.tensor([record.get("age", math.nan) for record in records], dtype=torch.float32)
    codes = torch.zeros(len(records), len(CODED), dtype=torch.long)
    for row, record in enumerate(records):
        for column, field in enumerate(CODED):
            if field in record:
                codes[row, column] = 1 + (datasets if field == "dataset" else VALUES[field]).index(record[field])
    return age, codes


def coverage(records):
    """Which values the training data holds: {field: {value: count}}, and the least and greatest age."""
    covered = {}
    for field in CODED:
        values = [record[field] for record in records if field in record]
        if values:
            covered[field] = {value: values.count(value) for value in sorted(set(values))}
    ages = [record["age"] for record in records if "age" in record]
    return covered | ({"age": [min(ages), max(ages)]} if ages else {})


# ---------------------------------------------------------------------------------------------------------
# A radiograph as a radiologist sees it

def read_dicom(path):
    """(H, W) float64 in [0, 1] from a DICOM file: modality LUT, then VOI LUT or window, then MONOCHROME1 inverted."""
    ds = pydicom.dcmread(path)
    if str(ds.get("Modality", "")) not in ("CR", "DX", "DR", "RG", ""):
        raise Rejected(f"modality {ds.Modality}, not a radiograph")
    body = str(ds.get("BodyPartExamined", "")).upper()
    if body and not any(word in body for word in ("CHEST", "THORAX", "LUNG")):
        raise Rejected(f"body part {body}, not a chest")
    if ds.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise Rejected(f"photometric interpretation {ds.get('PhotometricInterpretation')}, not grey")
    if int(ds.get("NumberOfFrames", 1)) > 1:
        raise Rejected("more than one frame")
    pixels = apply_modality_lut(ds.pixel_array, ds).astype(np.float64)
    if "VOILUTSequence" in ds:
        pixels = apply_voi(pixels.astype(np.int64), ds) / (2.0 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif ds.get("WindowWidth") is not None:  # PS3.3 C.11.2.1.2; the first window where there are several
        center, width = (float(np.atleast_1d(ds[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth"))
        kind = ds.get("VOILUTFunction", "LINEAR")
        if kind == "SIGMOID":
            pixels = 1 / (1 + np.exp(-4 * (pixels - center) / width))
        elif kind == "LINEAR_EXACT":
            pixels = (pixels - center) / width + 0.5
        else:
            pixels = (pixels - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    else:  # the whole range of the stored bits, never the image's own minimum and maximum
        least = -(2.0 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0.0
        ends = apply_modality_lut(np.array([least, least + 2.0 ** ds.BitsStored - 1]), ds)
        pixels = (pixels - ends[0]) / (ends[1] - ends[0])
    pixels = pixels.clip(0, 1)
    return 1 - pixels if ds.PhotometricInterpretation == "MONOCHROME1" else pixels


def read_picture(path):
    """(H, W) float64 in [0, 1] from PNG, JPEG and their kind; 8 or 16 bits, palettes and opaque alpha are taken."""
    with Image.open(path) as image:
        if image.mode in ("I;16", "I;16B", "I"):
            return np.asarray(image).astype(np.float64) / 65535
        if image.mode in ("P", "PA", "LA", "RGBA", "CMYK", "YCbCr"):
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                raise Rejected("transparent pixels")
        array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")).astype(np.float64) / 255
    if array.ndim == 3:
        if np.abs(array - array.mean(-1, keepdims=True)).max() > 0.1:  # JPEG's colour conversion costs a few levels
            raise Rejected("colour image")
        array = array.mean(-1)
    return array


def read_radiograph(path, size, bits=8):
    """One image file as a (size, size) array of uint8 or uint16: grey, antialiased resize, centred on black.

    Raises Rejected with the reason for whatever is not a usable radiograph.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise Rejected("empty file")
        pixels = read_dicom(path) if is_dicom(path) else read_picture(path)
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except Exception as error:  # decoders raise whatever they like on a damaged file; all of it is the file's fault
        raise Rejected(f"unreadable: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if min(pixels.shape) < 64:
        raise Rejected(f"only {pixels.shape[1]}x{pixels.shape[0]} pixels")
    if pixels.max() - pixels.min() < 2 / 255:
        raise Rejected("constant image")
    height, width = pixels.shape
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = Image.fromarray(pixels.astype(np.float32)).resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top:top + height, left:left + width] = resized
    white = 2 ** bits - 1
    return (canvas.clip(0, 1) * white).round().astype(np.uint8 if bits == 8 else np.uint16)


def is_dicom(path):
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def load_image(path):
    """A prepared grey PNG as float32 (1, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        array = np.asarray(image)
    white = 65535 if array.dtype != np.uint8 else 255
    return torch.from_numpy(array.astype(np.float32) / white)[None] * 2 - 1


def save_image(image, path, text=None):
    """Writes a (1, H, W) float image in [-1, 1] as an 8-bit grey PNG, `text` (a dict) into its text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    array = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    Image.fromarray(array).save(f"{path}.tmp", "PNG", pnginfo=info)
    os.replace(f"{path}.tmp", path)


def jitter(images, generator):
    """Images (N, 1, H, W) as a slightly different exposure would show them: up to 12 % closer, moved by no more than
    that leaves room for, tilted by up to 3 degrees, brighter or darker by a gamma of up to 1.2. Never flipped."""
    zoom, tilt, x, y, gamma = (torch.rand(5, len(images), generator=generator) * 2 - 1)  # N each, in [-1, 1]
    zoom, tilt = 1.06 + 0.06 * zoom, math.radians(3) * tilt
    room = 1 - 1 / zoom                                              # half of what the zoom leaves out, in half images
    affine = torch.stack([torch.stack([tilt.cos() / zoom, -tilt.sin() / zoom, x * room], -1),
                          torch.stack([tilt.sin() / zoom, tilt.cos() / zoom, y * room], -1)], 1)  # N 2 3
    points = F.affine_grid(affine, images.shape, align_corners=False)
    moved = F.grid_sample(images, points, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
    return ((moved + 1) / 2) ** (1.2 ** gamma).view(-1, 1, 1, 1) * 2 - 1


def grid(images, columns=None):
    """Images (N, 1, H, W) side by side as one (1, rows * H, columns * W); empty places are black."""
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    empty = -torch.ones(rows * columns - len(images), *images.shape[1:], device=images.device)
    return rearrange(torch.cat([images, empty]), "(r c) 1 h w -> 1 (r h) (c w)", c=columns)


# ---------------------------------------------------------------------------------------------------------
# The sources: each yields (file, record); a record holds fields, "patient" and "split", and the image's new "name"

def stable_split(patient, valid=0.1, test=0.1):
    """train, valid or test by a hash of the patient: the same on every machine, no patient in two splits."""
    u = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2 ** 64
    return "test" if u < test else "valid" if u < test + valid else "train"


# ChestX-ray14's terms that have a CheXpert label. Infiltration is read as lung opacity (the term covers any ill-
# defined opacity); nodules and masses are lesions; emphysema, fibrosis and hernia have no CheXpert counterpart.
NIH_TERMS = {"No Finding": "No Finding", "Cardiomegaly": "Cardiomegaly", "Infiltration": "Lung Opacity",
             "Nodule": "Lung Lesion", "Mass": "Lung Lesion", "Edema": "Edema", "Consolidation": "Consolidation",
             "Pneumonia": "Pneumonia", "Atelectasis": "Atelectasis", "Pneumothorax": "Pneumothorax",
             "Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Other"}


def nih(root):
    """ChestX-ray14: Data_Entry_2017*.csv, the official test list by patient; what is not named stays unknown."""
    tables = sorted(root.glob("Data_Entry_2017*.csv*"))
    if not tables or not (root / "test_list.txt").exists():
        raise InputError(f"{root}: no Data_Entry_2017*.csv or no test_list.txt, so this is not ChestX-ray14")
    test = set((root / "test_list.txt").read_text().split())
    files = {path.name: path for path in sorted(root.rglob("images/*.png"), reverse=True)}
    for row in read_table(tables[-1]):
        name = row["Image Index"]
        if name not in files:
            continue  # somebody downloaded a part
        patient = "NIH" + row["Patient ID"].zfill(8)
        record = {"name": name, "patient": patient, "dataset": "ChestX-ray14", "view": row["View Position"],
                  "sex": {"F": "female", "M": "male"}[row["Patient Gender"]],
                  "split": "test" if name in test else stable_split(patient, valid=0.1, test=0)}
        if int(row["Patient Age"]) <= MAX_AGE:
            record["age"] = float(row["Patient Age"])
        for term in row["Finding Labels"].split("|"):
            if term in NIH_TERMS:
                record[NIH_TERMS[term].lower().replace(" ", "_")] = "positive"
        if record.get("no_finding") == "positive":  # read as "none of the findings"; devices were not looked for
            record |= {field: "negative" for field in FINDINGS if field not in ("no_finding", "support_devices")}
        else:
            record["no_finding"] = "negative"
        yield files[name], record


def folder(root):
    """Any tree of DICOM, PNG or JPEG. An index.csv in the index's own columns says what is known; else DICOM tags."""
    if (root / "index.csv").exists():
        for record in read_index(root):
            name = hashlib.sha256(record["path"].encode()).hexdigest()[:16] + ".png"
            yield root / record["path"], record | {"name": name}
        return
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        relative = str(path.relative_to(root))
        digest = hashlib.sha256(relative.encode()).hexdigest()[:16]
        record = {"name": digest + ".png", "patient": digest, "dataset": root.resolve().name}
        if path.stat().st_size and is_dicom(path):
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            sex, view, age = ds.get("PatientSex"), str(ds.get("ViewPosition", "")), str(ds.get("PatientAge", ""))
            record["patient"] = hashlib.sha256(str(ds.get("PatientID") or relative).encode()).hexdigest()[:16]
            record |= {"sex": {"F": "female", "M": "male"}.get(sex), "age": dicom_age(age),
                       "view": {"AP": "AP", "PA": "PA", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL"}.get(view)}
        yield path, {k: v for k, v in record.items() if v is not None} | {"split": stable_split(record["patient"])}


def dicom_age(text):
    """'057Y', '018M', '002W', '003D' or, as some write, '57', in years; None if blank or of another form."""
    if match := re.fullmatch(r"(\d{1,3})([YMWD]?)", text):
        years = int(match[1]) * {"": 1, "Y": 1, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}[match[2]]
        return years if years <= MAX_AGE else None


SOURCES = {"nih": nih, "folder": folder}


# ---------------------------------------------------------------------------------------------------------
# The index

def read_table(path):
    """The rows of a .csv or .csv.gz as dicts."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def read_index(root):
    """The rows of ROOT/index.csv: dicts of the known fields and path, patient, split. Names of new data sets pass.

    Raises InputError for a missing file or column, a value outside the vocabulary, a path that leaves ROOT.
    """
    root, records = Path(root), []
    table = root / "index.csv"
    if not table.exists():
        raise InputError(f"{root}: no index.csv, so this is not a prepared source (see python data.py prepare)")
    for number, row in enumerate(read_table(table), start=2):
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            raise InputError(f"{table}, line {number}: no column {missing[0]!r}; needed are {', '.join(COLUMNS)}")
        try:
            if not (root / row["ImagePath"]).resolve().is_relative_to(root.resolve()):
                raise InputError(f"ImagePath {row['ImagePath']!r} leaves {root}")
            if row["Split"] not in SPLITS:
                raise InputError(f"unknown Split {row['Split']!r}; accepted: {', '.join(SPLITS)}")
            codes = {"0": None, "1": "negative", "2": "positive"}
            record = {"dataset": row["Dataset_name"] or None, "age": parse_value("age", row["Age"]),
                      "sex": parse_value("sex", row["Sex_name"]), "race": parse_value("race", row["Race_name"]),
                      "view": parse_value("view", row["View_name"])}
            for field, label in FINDINGS.items():
                if row[label] not in codes:
                    raise InputError(f"unknown code {row[label]!r} for {label}; accepted: 0 unknown, 1 negative, 2 positive")
                record[field] = codes[row[label]]
        except InputError as error:
            raise InputError(f"{table}, line {number}: {error}") from None
        record |= {"path": row["ImagePath"], "patient": row["PatientID"], "split": row["Split"]}
        records.append({key: value for key, value in record.items() if value is not None})
    if not records:
        raise InputError(f"{table}: no rows")
    return records


def index_row(record):
    """A record as a row of index.csv."""
    label = {None: "0", "negative": "1", "positive": "2"}
    age = f"{record['age']:g}" if "age" in record else ""
    return [record.get("dataset", ""), record["path"], record["patient"], age,
            *(record.get(field, "Unknown").capitalize() for field in ("sex", "race")),
            record.get("view", "Unknown"), record["split"], *(label[record.get(field)] for field in FINDINGS)]


def write_csv(path, header, rows):
    """Writes to a temporary name, then renames: a reader finds the whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(temporary, path)


def prepare_one(job):
    """Reads, resizes and writes one image; returns (record, None) or (record, reason)."""
    file, record, out, size, bits = job
    target = out / "images" / record["name"]
    try:
        array = read_radiograph(file, size, bits)
    except Rejected as reason:
        return file, record, str(reason)
    Image.fromarray(array).save(f"{target}.tmp", "PNG")
    os.replace(f"{target}.tmp", target)
    return file, record, None


def prepare(source, root, out, size=512, bits=8, workers=1):
    """Turns a source into OUT/index.csv, OUT/images and OUT/rejected.csv; returns the numbers (taken, rejected)."""
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    jobs = [(file, record, out, size, bits) for file, record in SOURCES[source](root)]
    if not jobs:
        raise InputError(f"{root}: no images found for the source {source}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows, rejected = [], []
    with multiprocessing.Pool(workers) as pool:
        for file, record, reason in tqdm(pool.imap(prepare_one, jobs, chunksize=8), total=len(jobs), unit="image"):
            if reason:
                rejected.append([str(file.relative_to(root)), reason])
            else:
                rows.append(index_row(record | {"path": f"images/{record['name']}"}))
    write_csv(out / "rejected.csv", ["path", "reason"], rejected)
    write_csv(out / "index.csv", COLUMNS, rows)
    return len(rows), len(rejected)


class Radiographs(torch.utils.data.Dataset):
    """The images of prepared sources, as (1, H, W) float32 in [-1, 1]; `records` holds what is known of each."""

    def __init__(self, folders, split=None):
        self.records, sizes = [], {}
        for root in map(Path, folders):
            records = [record | {"path": root / record["path"]} for record in read_index(root)]
            with Image.open(records[0]["path"]) as first:
                sizes[str(root)] = first.size
            self.records += [record for record in records if split in (None, record["split"])]
        if len(set(sizes.values())) > 1:
            raise InputError("prepared at different sizes: " + ", ".join(f"{root} {w}x{h}" for root, (w, h) in sizes.items()))
        if not self.records:
            raise InputError(f"{', '.join(map(str, folders))}: no image in the split {split}")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return load_image(self.records[i]["path"])


def main():
    parser = argparse.ArgumentParser(description="Prepare radiographs and their metadata.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="turn a source into index.csv, images/ and rejected.csv")
    p.add_argument("source", choices=SOURCES)
    p.add_argument("root", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--size", type=positive, default=512, help="side of the square output in pixels")
    p.add_argument("--bits", type=int, default=8, choices=(8, 16))
    p.add_argument("--workers", type=positive, default=os.cpu_count())
    args = parser.parse_args()
    taken, rejected = prepare(args.source, args.root, args.out, args.size, args.bits, args.workers)
    print(f"{taken} images in {args.out}/index.csv, {rejected} rejected (see {args.out}/rejected.csv)")


if __name__ == "__main__":
    run(main)
