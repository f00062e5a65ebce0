"""Features of image files: one row for each image, computed once and kept beside the images.

    records = images_of(PLACE)                     any folder of images, a prepared source, CheXGenBench's tables
    features = features_of(records, ...)           (N, D) float32: the encoder's CLS features

The cache is PLACE/features-*.safetensors, or below the user's cache folder where PLACE is read-only. An
image is known by the hash of its file's bytes, so a changed image is a new one; the name of the cache holds the hash
of everything else that decides a feature: the weights, how images are prepared, and READER.

CheXGenBench (arXiv 2505.10496) describes a set by a table: `img_savename` (synthetic) or `path` (real) names a file
below the table's folder, `annotated_prompt` or `prompt` is its prompt, `chexpert_labels` a dict of CheXpert's
labels. Its protocol squeezes every image to 299x299 bytes, whatever its aspect ratio, before the encoder's
processor.
"""
import ast
import hashlib
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

from common import cli
from common.cli import InputError
from common.tables import read_table
from encoders import raddino
from radiographs import folders, pixels
from radiographs.fields import FINDINGS

READER = 2  # raised by one whenever this project reads pixels differently, so that older caches are not used


def images_of(place, split=None):
    """A record with `path` for each image of `place`; with `split`, only of that split (needs an index.csv)."""
    place = Path(place)
    columns = columns_of(place) if place.is_file() else ()
    if "img_savename" in columns or "path" in columns:
        column = "img_savename" if "img_savename" in columns else "path"
        records = [benchmark_record(row, place, column) for row in read_table(place)]
    elif (place / "sample.json").exists() and not (place / "index.csv").exists():
        raise InputError(f"{place}: an unfinished sample without its index.csv; run the same sample.py command again")
    else:
        records = folders.images_of(place)
    if split:
        if not any("split" in record for record in records):
            raise InputError(f"{place}: no index.csv that says which image is in the split {split}")
        records = [record for record in records if record.get("split") == split]
    return records


def columns_of(table):
    return next(iter(read_table(table)), {}).keys()


def benchmark_record(row, table, column):
    """A row of one of CheXGenBench's tables as a record: path, prompt, findings."""
    record = {"path": table.parent / row[column]}
    if prompt := (row.get("annotated_prompt") or row.get("prompt") or "").strip():
        record["prompt"] = prompt
    labels = row.get("chexpert_labels", "").replace("nan", "None")
    try:
        labels = ast.literal_eval(labels) if labels else {}
        values = {field: labels.get(label) for field, label in FINDINGS.items()}
    except (ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
        raise InputError(f"{table}, line {row.line}: chexpert_labels is not a dict of CheXpert's labels") from None
    record |= {field: {0: "negative", 1: "positive"}[value] for field, value in values.items() if value in (0, 1)}
    return record


def deduplicated(records):
    """CheXGenBench: one image for each prompt, the first. Records without prompts stay as they are."""
    seen, result = set(), []
    for record in records:
        if record.get("prompt") not in seen:
            result.append(record)
        if "prompt" in record:
            seen.add(record["prompt"])
    return result


def labels_of_prompts(real, fake):
    """CheXGenBench's conditional sets: a synthetic image has the findings of the real image with its prompt."""
    by_prompt = {record["prompt"]: record for record in real if "prompt" in record}
    return [{key: value for key, value in by_prompt.get(record.get("prompt"), {}).items() if key in FINDINGS} | record
            for record in fake]


def training_images(records):
    """The records of the split train; all records, if no index names a split."""
    return [record for record in records if record.get("split", "train") == "train"]


def cache_of(place, encoder, fingerprint, squeezed):
    """Where the features of `place` are kept."""
    folder = (place if place.is_dir() else place.parent).resolve()
    recipe = f"{fingerprint} {encoder.config} {'299x299' if squeezed else 'aspect kept'} reader {READER}"
    name = f"features-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.safetensors"
    if os.access(folder, os.W_OK):
        return folder / name
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "radit" / hashlib.sha256(str(folder).encode()).hexdigest()[:16] / name


def read_cache(path):
    """{hash of a file's bytes: feature} of an earlier run; empty if there was none, or its file is damaged."""
    try:
        saved = safetensors.torch.load_file(path)
        names, features = saved["names"], saved["features"]
        if names.dtype == torch.uint8 and names.shape == (len(features), 16) and features.ndim == 2:
            return dict(zip(map(bytes, names.numpy()), features))
    except (OSError, KeyError, safetensors.SafetensorError):
        pass
    return {}


def write_cache(path, known):
    """Writes the cache. If that fails, on a full disk for example, it prints a warning and the run continues."""
    names = torch.from_numpy(np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16).copy())
    try:
        with cli.whole_file(path) as temporary:
            safetensors.torch.save_file({"names": names, "features": torch.stack(list(known.values()))}, temporary)
    except (OSError, InputError, safetensors.SafetensorError) as error:
        print(f"warning: the features are not kept for the next run: {error}")


def read_grey(path):
    """One image file as an 8-bit grey PIL image, read as everywhere in this project: 8 or 16 bits, or DICOM."""
    try:
        grey = pixels.read_dicom(path) if pixels.is_dicom(path) else pixels.read_picture(path)     # H W in [0, 1]
    except pixels.Rejected as reason:
        raise InputError(f"{path}: {reason}") from None
    return Image.fromarray((grey * 255).round().astype(np.uint8))


def load(path, config, squeezed=False):
    """One image file as the encoder takes it: (C, S, S)."""
    image = read_grey(path)
    if squeezed:
        image = image.resize((299, 299), Image.Resampling.BILINEAR)
    return raddino.preprocess(image, config)


@torch.no_grad()
def features_of(records, encoder, cache, squeezed=False, batch=16):
    """CLS features (N, D) float32 of the images of `records`, each of which gets `content`, the hash of its file's
    bytes. The whole cache is written every few thousand images. Raises InputError for an unreadable image, a
    feature that is not finite, and images that all look the same."""
    known, new = read_cache(cache), {}
    for record in records:
        if not record["path"].is_file():  # reading a named pipe would never end
            raise InputError(f"{record['path']}: no such file")
        with open(record["path"], "rb") as file:
            record["content"] = hashlib.file_digest(file, "sha256").digest()[:16]
        if record["content"] not in known:
            new[record["content"]] = record["path"]
    new, device = list(new.items()), next(encoder.parameters()).device
    for start in tqdm(range(0, len(new), batch), desc=str(cache.parent), unit="batch", disable=not new):
        part = new[start:start + batch]
        images = torch.stack([load(path, encoder.config, squeezed) for _, path in part])             # N C S S
        known |= zip([content for content, _ in part], encoder(images.to(device))[0].float().cpu())
        if start + batch >= len(new) or start // batch % 256 == 255:
            write_cache(cache, known)
    features = torch.stack([known[record["content"]] for record in records])                        # N D
    if not features.isfinite().all():
        first = (~features.isfinite().all(1)).nonzero()[0, 0]
        raise InputError(f"{records[first]['path']}: its features are not finite")
    if len(features) > 1 and (features == features[0]).all():
        raise InputError(f"{records[0]['path'].parent}: all {len(features)} images have the same features; are they "
                         "all the same image?")
    return features


def set_of(places, encoder, fingerprint, split=None, squeezed=False, choose=lambda records: records):
    """Records and features (N, D) of several places together; `choose` picks among the records of each."""
    records, features = [], []
    for place in map(Path, places):
        found = choose(images_of(place, split))
        if found:
            cache = cache_of(place, encoder, fingerprint, squeezed)
            features.append(features_of(found, encoder, cache, squeezed))
        records += found
    if len(records) < 2:
        where = ", ".join(map(str, places)) + (f", split {split}" if split else "")
        raise InputError(f"{where}: {cli.count(len(records), 'image')}; at least two are needed")
    return records, torch.cat(features)
