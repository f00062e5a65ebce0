"""One index of radiographs and their 19 metadata fields, from seven sources or any folder.

The paper (arXiv 2606.19460, CXR7-1M) harmonises seven public chest X-ray data sets into one index of 1.2M rows. This file
does the same for a download of any of them.

    source (radiographs/sources.py) --prepare-->
                                     PREPARED/index.csv     one row an image, columns as in the CXR7-1M master CSV
                                     PREPARED/images/*.png  grey, aspect ratio kept, centred on black, never flipped
                                     PREPARED/rejected.csv  path and reason of every image that was not taken

    python data.py prepare nih ROOT OUT --size 256
    python data.py prepare folder ROOT OUT          (DICOM, PNG or JPEG; an index.csv in ROOT is used if there)
    python data.py stats PREPARED... --out stats.png
"""
import csv
import hmac
import itertools
import json
import multiprocessing
import os
import secrets
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from common.cli import InputError, Parser, positive, run, write_csv, write_json
from common.tables import read_table
from radiographs import sources, tags
from radiographs.fields import (FIELDS, FINDINGS, LABELS, VALUES, drop_unknown,
                                resolve_labels)
from radiographs.index import (COLUMNS, index_records, index_row, read_index,
                               stable_split)
from radiographs.pixels import (Rejected, is_synthetic, load_image,
                                read_radiograph)

# ---------------------------------------------------------------------------------------------------------
# Preparing: a stream of (file, record) to images and rows, in the stream's order, in chunks that can be continued

def folder(root):
    """Any tree of DICOM, PNG or JPEG. An index.csv in the index's own columns says what is known; else DICOM tags."""
    if (root / "index.csv").exists():
        for record in index_records(root):
            path = root / record.pop("path")
            yield path if path.is_file() else None, record | {"name": str(path.relative_to(root))}
        return
    for path in sources.walk(root):
        relative = str(path.relative_to(root))
        yield path, {"name": relative, "patient": relative, "dataset": root.resolve().name} | tags.dicom_tags(path)


SOURCES = {"mimic": sources.mimic, "chexpert": sources.chexpert, "padchest": sources.padchest, "nih": sources.nih,
           "rexgradient": sources.rexgradient, "brax": sources.brax, "vindr": sources.vindr, "folder": folder}
CHUNK = 1024  # images between two marks from which an interrupted run continues


def pseudonymiser(out):
    """text -> 16 hex digits by a key that lies beside OUT, not in it: who gets the prepared folder cannot turn an
    identifier back by trying all of them. The same key makes the same names when a folder is prepared again."""
    path = out.with_name(out.name + ".key")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    key = bytes.fromhex(path.read_text())
    return lambda text: hmac.new(key, text.encode(), "sha256").hexdigest()[:16]


def read_labels(path):
    """Image name -> labels, from a CSV with the 14 labels in CheXpert's coding and the column "name", as the source spells
    it: of the prepared image without suffix, for `folder` the path below the root."""
    rows = list(read_table(path))
    missing = {"name", *LABELS} - set(rows[0] if rows else ())
    if missing:
        raise InputError(f"{path}: no column {', '.join(sorted(missing))}; needed are name and the 14 labels")
    for row in rows:
        for label in LABELS:
            if row[label].strip().removesuffix(".0") not in ("1", "0", "-1", ""):
                raise InputError(f"{path}, line {row.line}: {label} is {row[label]!r}; "
                                 "accepted: 1 positive, 0 negative, -1 or blank unknown")
    return {row["name"]: drop_unknown(sources.chexpert_labels(row)) for row in rows}


def unlisted_files(root, claimed, kinds):
    """The files at or below root of the kinds that a source's tables name, which no row names; 8 bytes of memory a row."""
    claimed = np.sort(np.frombuffer(claimed, np.int64))
    for path in sources.walk(root):
        if path.suffix in kinds:
            i = np.searchsorted(claimed, hash(str(path)))
            if i == len(claimed) or claimed[i] != hash(str(path)):
                yield path


def records_of(source, root, out, labels=None, metadata_only=False):
    """The stream (file or None, record), labels settled, with a split for everybody and no identifier of a hospital.
    Last come the images that no row of a table names, as reject_reason."""
    hashed, claimed, kinds = None, array("q"), set()
    try:
        for file, record in SOURCES[source](root):
            record |= (labels or {}).get(record["name"], {})
            if source == "folder":
                hashed = hashed or pseudonymiser(out)
                record["name"], record["patient"] = hashed(record["name"]), hashed(record["patient"])
            if Path(record["name"]).name != record["name"]:
                raise InputError(f"{root}: the image name {record['name']!r} is not a plain file name")
            # A source with an official test set and no validation set gives a tenth of the other patients to the latter.
            share = {"valid": 0.1, "test": 0} if record.pop("official", False) else {}
            record["path"] = f"images/{record.pop('name')}.png"
            if source != "folder" or labels:  # an index in the project's own columns is taken as it says
                record = resolve_labels(record)
            if file:
                claimed.append(hash(str(file)))
                kinds.add(file.suffix)
            yield file, {"split": stable_split(record["patient"], **share)} | record
        if not metadata_only and (source != "folder" or (root / "index.csv").exists()):
            yield from ((file, {"path": file.name, "reject_reason": "no row of the tables names it, or another file of this name was taken"})
                        for file in unlisted_files(root, claimed, kinds))
    except InputError:
        raise
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{root}: a table is not as {source} publishes it: {type(error).__name__} {error}") from error


def prepare_one(job):
    """Reads, resizes and writes one image; returns None or the reason why not, and whether it says that it is synthetic,
    which the prepared PNG then says too."""
    file, record, out, size, bits = job
    target = out / record["path"]
    try:
        if "reject_reason" in record:
            raise Rejected(record["reject_reason"])
        array, synthetic = read_radiograph(file, size, bits), is_synthetic(file)
    except Rejected as reason:
        return str(reason), False
    info = PngInfo()
    if synthetic:
        info.add_text("Synthetic", "yes")
    Image.fromarray(array).save(f"{target}.tmp", "PNG", pnginfo=info)
    os.replace(f"{target}.tmp", target)
    return None, synthetic


def prepare(source, root, out, size=512, bits=8, workers=1, metadata_only=False, labels=None):
    """Turns a source into OUT/index.csv, OUT/images and OUT/rejected.csv; returns the counts taken, rejected, missing,
    and synthetic: how many of those taken say that they are, if any.

    Rows are written in the source's order, whatever the number of workers. After every chunk OUT/progress.json says how
    far the two tables reach; the same command after an interruption cuts them there and goes on.
    """
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{out} lies inside {root}, whose images it would become; name a folder outside")
    if root.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} lies around {root} and would be written over; name a folder outside")
    about = {"source": source, "size": size, "bits": bits, "metadata_only": metadata_only}
    before = json.loads((out / "prepared.json").read_text()) if (out / "prepared.json").exists() else about
    for key in about:
        if before.get(key) != about[key]:
            raise InputError(f"{out} was prepared with {key} = {before.get(key)}, not {about[key]}; "
                             "name another folder, or delete it")
    labels = read_labels(labels) if labels else None
    total = sum(1 for _ in records_of(source, root, out, labels, metadata_only))
    if not total:
        raise InputError(f"{root}: no images found for the source {source}")
    if labels:
        found = sum(record["name"] in labels for _, record in SOURCES[source](root))
        first = next(iter(SOURCES[source](root)))[1]["name"]
        if not found:
            raise InputError(f"no name in the table of labels is an image's; the first image's name is {first!r}")
        print(f"labels: {len(labels)} names, of which {found} are images of {root}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    settings = about | {"root": str(root.resolve()), "rows": total}
    mark, state = out / "progress.json", {"settings": settings, "taken": 0, "rejected": 0, "missing": 0, "synthetic": 0, "ends": [0, 0]}
    if mark.exists() and json.loads(mark.read_text())["settings"] == settings:
        state = json.loads(mark.read_text())
    counts, synthetic = Counter({key: state[key] for key in ("taken", "rejected", "missing")}), state.get("synthetic", 0)
    beside = out.with_name(out.name + ".rejected.csv")
    parts = [out / "index.csv.part", Path(f"{beside if source == 'folder' else out / 'rejected.csv'}.part")]
    for path, end in zip(parts, state["ends"]):
        path.touch()
        os.truncate(path, end)
    with open(parts[0], "a", newline="") as index, open(parts[1], "a", newline="") as rejects, \
            multiprocessing.Pool(workers) as pool, tqdm(total=total, initial=counts.total(), unit="image") as bar:
        rows, reasons = csv.writer(index), csv.writer(rejects)
        if not counts.total():
            rows.writerow(COLUMNS)
            reasons.writerow(["path", "reason"])
        stream = itertools.islice(records_of(source, root, out, labels, metadata_only), counts.total(), None)
        while chunk := list(itertools.islice(stream, CHUNK)):
            present = [] if metadata_only else [(file, record, out, size, bits) for file, record in chunk if file]
            results = pool.imap(prepare_one, present, chunksize=8)
            for file, record in chunk:
                reason, made_up = next(results) if file and not metadata_only else (record.get("reject_reason"), False)
                synthetic += made_up
                if file is None and not metadata_only:
                    counts["missing"] += 1
                elif reason:
                    counts["rejected"] += 1
                    reasons.writerow([str(file.relative_to(root)) if file else record["path"], reason])
                else:
                    counts["taken"] += 1
                    rows.writerow(index_row(record))
                bar.update()
            index.flush()
            rejects.flush()
            write_json(mark, {"settings": settings, **counts, "synthetic": synthetic, "ends": [index.tell(), rejects.tell()]})
    for path in parts:
        os.replace(path, path.with_suffix(""))
    if source == "folder":
        name = pseudonymiser(out)
        rows = ([f"images/{name(row['path'])}.png", row["reason"]] for row in read_table(beside))
        write_csv(out / "rejected.csv", ["path", "reason"], rows)
    write_json(out / "prepared.json", about)
    mark.unlink()
    if synthetic:
        counts["synthetic"] = synthetic
    return counts


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


# ---------------------------------------------------------------------------------------------------------
# What there is

def statistics(folders):
    """(field, value) -> Counter of data sets, over the rows of prepared sources; ages in decades."""
    table = {}
    for record in itertools.chain.from_iterable(map(index_records, folders)):
        for field in FIELDS:
            value = record.get(field, "unknown")
            if field == "age" and value != "unknown":
                value = f"{int(value) // 10 * 10}-{int(value) // 10 * 10 + 9}"
            table.setdefault((field, value), Counter())[record.get("dataset", "unknown")] += 1
    order = {value: i for values in VALUES.values() for i, value in enumerate(values)}

    def rank(key):  # in the order of the fields and of their values, ages by number, unknown last
        field, value = key
        age = int(value.split("-")[0]) if field == "age" and value != "unknown" else 0
        return FIELDS.index(field), value == "unknown", order.get(value, 99), age, value

    return {key: table[key] for key in sorted(table, key=rank)}


def print_statistics(table):
    datasets = sorted({name for counts in table.values() for name in counts})
    print(f"{'field':28}{'value':16}{'all':>10}" + "".join(f"{name:>16}" for name in datasets))
    for (field, value), counts in table.items():
        print(f"{field:28}{value:16}{counts.total():10,}" + "".join(f"{counts[name]:16,}" for name in datasets))


def draw_statistics(table, path):
    """One panel a field, one bar a value, stacked by data set."""
    datasets = sorted({name for counts in table.values() for name in counts})
    figure = Figure(figsize=(20, 12), layout="constrained")
    for axes, field in zip(figure.subplots(4, 5).flat, FIELDS):
        values = {value: counts for (name, value), counts in table.items() if name == field}
        base = [0] * len(values)
        for dataset in datasets:
            heights = [counts[dataset] for counts in values.values()]
            axes.bar(list(values), heights, bottom=base, label=dataset)
            base = [a + b for a, b in zip(base, heights)]
        axes.set_title(FINDINGS.get(field, field))
        axes.tick_params("x", rotation=0 if len(values) < 4 else 60)
    axes = figure.axes[-1]
    axes.axis("off")
    axes.legend(*figure.axes[0].get_legend_handles_labels(), loc="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.tmp", format="png", dpi=80)
    os.replace(f"{path}.tmp", path)


def main():
    parser = Parser(description="Prepare radiographs and their metadata.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="turn a source into index.csv, images/ and rejected.csv")
    p.add_argument("source", choices=SOURCES)
    p.add_argument("root", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--size", type=positive, default=512, help="side of the square output in pixels")
    p.add_argument("--bits", type=int, default=8, choices=(8, 16))
    p.add_argument("--workers", type=positive, default=os.cpu_count())
    p.add_argument("--metadata-only", action="store_true", help="the index of every row of the tables, without any image")
    p.add_argument("--labels", type=Path, help="a CSV of labels by image name, for a source that has reports only")
    p = commands.add_parser("stats", help="count every value of every field, by data set")
    p.add_argument("prepared", nargs="+", type=Path)
    p.add_argument("--out", type=Path, default=Path("out/stats.png"), help="the same as a picture, %(default)s if not given")
    args = parser.parse_args()
    if args.command == "stats":
        table = statistics(args.prepared)
        print_statistics(table)
        return draw_statistics(table, args.out)
    counts = prepare(args.source, args.root, args.out, args.size, args.bits, args.workers,
                     args.metadata_only, args.labels)
    what, reasons = "rows" if args.metadata_only else "images", "." if args.source == "folder" else "/"
    print(f"{counts['taken']} {what} in {args.out}/index.csv, {counts['rejected']} rejected (see {args.out}{reasons}rejected.csv), "
          f"{counts['missing']} in the tables but not there")
    if counts["synthetic"]:
        print(f"warning: {counts['synthetic']} of these images say that they are synthetic. The index does not tell them from real ones, "
              "only the text field Synthetic of their PNGs does: prepare them apart from real images", file=sys.stderr)


if __name__ == "__main__":
    run(main)
