"""The harmonised loader: one index of radiographs and their 19 metadata fields, from seven sources or any folder.

The paper (arXiv 2606.19460, CXR7-1M) harmonises seven public chest X-ray data sets into one index of 1.2M rows. This
file does the same for a download of any of them.

    source (radiographs/sources.py) --prepare-->
        PREPARED/index.csv     one row an image, columns as in the CXR7-1M master CSV
        PREPARED/images/*.png  grey, aspect ratio kept, centred on black, never flipped
        PREPARED/rejected.csv  path and reason of every image that was not taken

    python data.py prepare nih ROOT OUT --size 256
    python data.py prepare folder ROOT OUT [--table FILE.csv]     (DICOM, PNG or JPEG)
    python data.py stats PREPARED... --out stats.png

How each source is laid out, and what a hospital's folder may hold: radiographs/README.md.
"""
import contextlib
import hashlib
import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from common.cli import (InputError, Parser, RunError, count, integer, locked, new_path, one_line, read_json, run,
                        whole_file, write_csv, write_json)
from common.tables import read_table
from common.workers import worker_pool
from radiographs.fields import FIELDS, FINDINGS, VALUES
from radiographs.files import ENDINGS, Download, printable
from radiographs.harmonise import SOURCES, TAGGED, complete, harmonise, read_labels, survey
from radiographs.hospital import CODINGS, pseudonymiser, unread_columns
from radiographs.index import COLUMNS, index_records, index_row, read_index
from radiographs.pixels import Rejected, is_synthetic, load_image, read_radiograph
from radiographs.progress import Progress
from radiographs.tags import dicom_tags

CHUNK = 1024  # images between two saves of the progress, from which an interrupted run continues
# What a small folder meets whose splits a hash of the patients drew.
SPLIT_HELP = "; it needs one: name the splits in a column `split` of the table that prepare reads"


# ---------------------------------------------------------------------------------------------------------
# Preparing: from records and image files to an index and images of one size

def prepare(source, root, out, size=512, bits=8, workers=1, metadata_only=False, labels=None, table=None, coding=None,
            used_bits=None):
    """Turns a source into OUT/index.csv, OUT/images and OUT/rejected.csv. Returns the counts of images "taken",
    "rejected", "missing" and, if there are any, "synthetic": how many of those taken are marked as synthetic in their
    file. Raises RunError if no image is taken.

    Rows are written in the source's order, whatever the number of workers. After an interruption the same command
    continues where it was (radiographs/progress.py).
    """
    root, out, table = Path(root), Path(out), Path(table) if table else None
    check_places(root, out)
    if source != "folder" and (table or coding):
        raise InputError("--table and --coding describe a hospital's folder, the source called folder")
    if source == "folder" and not table and (root / "index.csv").exists():
        table = root / "index.csv"
    if coding and not table:
        raise InputError("--coding says what numbers of a table mean; name the table with --table FILE.csv")
    settings = {"source": source, "size": size, "bits": bits, "used_bits": used_bits, "metadata_only": metadata_only,
                "coding": coding, "labels": file_checksum(labels), "table": file_checksum(table)}
    check_settings(out, settings)
    download, labels = Download(root), read_labels(labels) if labels else {}
    counts, checksum = survey(harmonise(source, download, labels, table, coding), labels)
    report(counts, source, download, labels, table, metadata_only)

    # The workers start before the folder is locked: a process started later would inherit the lock.
    with worker_pool(min(workers, counts["all"])) as work, locked(out):
        (out / "images").mkdir(exist_ok=True)
        pseudonym = pseudonymiser(out) if source == "folder" else None
        rejected = rejected_path(source, out)
        progress = Progress(out, {out / "index.csv": COLUMNS, rejected: ("path", "reason")},
                            settings | {"root": str(root.resolve()), "records": checksum})
        pairs = itertools.islice(harmonise(source, download, labels, table, coding), progress.done, None)
        with tqdm(total=counts["all"], initial=progress.done, unit="image") as bar:
            while chunk := list(itertools.islice(pairs, CHUNK)):
                for file, record, reason, synthetic in prepare_chunk(chunk, work, out, pseudonym, settings):
                    if file is None and not metadata_only:
                        progress.miss()
                    elif reason:
                        progress.reject(printable(os.path.relpath(file, root) if file else record["name"]), reason)
                    else:
                        progress.take(index_row(record), synthetic)
                    bar.update()
                progress.save()
        if source == "folder":
            rows = read_table(progress.parts[1])
            write_csv(out / "rejected.csv", ["path", "reason"],
                      ([f"images/{pseudonym(row['path'])}.png", row["reason"]] for row in rows))
        write_json(out / "prepared.json", settings)
        progress.finish()
    if not progress.counts["taken"]:
        raise RunError(f"no image was taken: {progress.counts['rejected']} rejected (see {rejected}), "
                       f"{progress.counts['missing']} in the tables but not there")
    counts = Counter(progress.counts)
    if not counts["synthetic"]:
        del counts["synthetic"]
    return counts


def rejected_path(source, out):
    """The table of rejected files. A hospital's lies beside OUT, not in it: OUT may be passed on, and the paths in the
    table may hold patients' names."""
    return out.with_name(out.name + ".rejected.csv") if source == "folder" else out / "rejected.csv"


def check_places(root, out):
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{out} lies inside {root}, so its images would be read as the source's; name a folder "
                         "outside")
    if root.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} lies around {root}, whose files could be overwritten; name a folder outside")


def file_checksum(path):
    """Sixteen hex digits that change with a table's content, not with its name; None for no table."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_settings(out, settings):
    """Refuses a folder that was prepared, or half prepared, with other settings: the two would mix."""
    before = settings
    if (out / "prepared.json").exists():
        before = read_json(out / "prepared.json")
    elif (out / "progress.json").exists():
        with contextlib.suppress(InputError):  # a damaged file counts as none
            saved = read_json(out / "progress.json").get("settings")
            before = saved if isinstance(saved, dict) else settings
    for key, value in settings.items():
        if before.get(key) != value:
            option = f"another --{key}" if key in ("labels", "table") else f"{key} = {before.get(key)}, not {value}"
            raise InputError(f"{out} was prepared with {option}; name another folder, or delete it")


def report(counts, source, download, labels, table, metadata_only):
    """Prints what was found, before the work begins; raises RunError if nothing was."""
    if labels:
        print(f"labels: {count(len(labels), 'name')}, {counts['labelled']} of them of images of {download.root}")
    if table:
        print(f"{table}: {count(counts['rows'], 'row')}, {counts['files']} of them with a file below {download.root}")
        unread, warnings = unread_columns(table)
        if unread:
            print(f"columns that are not read: {one_line(', '.join(unread))}")
        for warning in warnings:
            print(f"warning: {one_line(warning)}", file=sys.stderr)
    elif source == "folder":
        for file in download.files:
            if file.endswith((".csv", ".tsv")):
                print(f"{file} is not read; to use it for the images' metadata, give --table {file}")
    if counts["rows"] and (counts["files"] or metadata_only):
        return
    sought = f"; looked for {download.missed!r} and the like, ending in {', '.join(ENDINGS)}" if download.missed else ""
    raise RunError(f"{download.root}: no image found in it or below it{sought}")


def prepare_chunk(chunk, work, out, pseudonym, settings):
    """Prepares the images of (file, record) pairs, in parallel. Yields for each the file, the record as the index holds
    it, the reason why the image was rejected or None, and whether the file is marked as synthetic."""
    tagged, without_images = settings["source"] in TAGGED, settings["metadata_only"]
    jobs = []
    for file, record in chunk:
        job = None  # no file to read
        if file and "reject_reason" not in record and (tagged or not without_images):
            name = pseudonym(record["name"]) if pseudonym else record["name"]
            target = None if without_images else out / f"images/{name}.png"
            job = file, target, settings["size"], settings["bits"], settings["used_bits"], tagged
        jobs.append(job)
    results = work(prepare_image, [job for job in jobs if job])
    for (file, record), job in zip(chunk, jobs):
        reason, synthetic, found = next(results) if job else (record.get("reject_reason"), False, {})
        yield file, record if reason else complete(record, found, pseudonym), reason, synthetic


def prepare_image(job):
    """Reads, resizes and writes one image, or only reads its tags if target is None. Returns the reason why it was
    rejected or None, whether it is marked as synthetic (the prepared PNG then is as well), and its tags."""
    file, target, size, bits, used_bits, tagged = job
    found = dicom_tags(file) if tagged else {}
    if target is None or "reject_reason" in found:
        return found.pop("reject_reason", None), False, found
    try:
        array, synthetic = read_radiograph(file, size, bits, used_bits), is_synthetic(file)
    except Rejected as reason:
        return str(reason), False, {}
    info = PngInfo()
    if synthetic:
        info.add_text("Synthetic", "yes")
    with whole_file(target) as temporary:
        Image.fromarray(array).save(temporary, "PNG", pnginfo=info)
    return None, synthetic, found


class Radiographs(torch.utils.data.Dataset):
    """The images of prepared sources, as (1, H, W) float32 in [-1, 1]; `records` holds the metadata of each."""

    def __init__(self, folders, split=None):
        self.records, sizes = [], {}
        for root in map(Path, folders):
            records = [record | {"path": root / record["path"]} for record in read_index(root)]
            _, height, width = load_image(records[0]["path"]).shape
            sizes[str(root)] = width, height
            self.records += [record for record in records if split in (None, record["split"])]
        if len(set(sizes.values())) > 1:
            raise InputError("prepared at different sizes: "
                             + ", ".join(f"{root} {w}x{h}" for root, (w, h) in sizes.items()))
        if not self.records:
            raise InputError(f"{', '.join(map(str, folders))}: no image in the split {split}{SPLIT_HELP}")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return load_image(self.records[i]["path"])


# ---------------------------------------------------------------------------------------------------------
# Statistics

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


def plot_statistics(table, path):
    """One panel for each field, one bar for each value, stacked by data set."""
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
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def main():
    parser = Parser(description="Prepare radiographs and their metadata.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="turn a source into index.csv, images/ and rejected.csv")
    p.add_argument("source", choices=SOURCES, help="one of %(choices)s; folder is your own: any folder of "
                                                         "DICOM, PNG or JPEG")
    p.add_argument("root", type=new_path, help="the folder below which its archives were unpacked; for the source "
                                               "folder any folder, whose name becomes the data set's")
    p.add_argument("out", type=new_path, help="a new folder; the same command again continues what was interrupted")
    p.add_argument("--size", type=integer(8, 8192), default=512, help="pixels on each side; %(default)s")
    p.add_argument("--bits", type=integer(8, 16), default=8, choices=(8, 16),
                   help="bits of each output pixel, %(default)s")
    p.add_argument("--used-bits", type=integer(8, 16), help="how many bits of 16-bit files the source uses, such as 12")
    p.add_argument("--workers", type=integer(1, 1024), default=os.cpu_count(), help="processes; one for each core")
    p.add_argument("--metadata-only", action="store_true", help="an index of all rows of the tables, without images")
    p.add_argument("--labels", type=new_path, help="a CSV of labels by image name, for a source that has reports only")
    p.add_argument("--table", type=new_path,
                   help="for folder: a CSV of what is known of each file; ROOT/index.csv if not given and there")
    p.add_argument("--coding", choices=CODINGS, help="numbers of findings in that table: 01 no and yes; "
                                                     "012 unknown, negative and positive")
    p = commands.add_parser("stats", help="count every value of every field, by data set")
    p.add_argument("prepared", nargs="+", type=new_path, help="prepared sources")
    p.add_argument("--out", type=new_path, help="plot the counts into this PNG file")
    args = parser.parse_args()
    if args.command == "stats":
        table = statistics(args.prepared)
        print_statistics(table)
        if args.out:
            plot_statistics(table, args.out)
        return
    try:
        counts = prepare(args.source, args.root, args.out, args.size, args.bits, args.workers, args.metadata_only,
                         args.labels, args.table, args.coding, args.used_bits)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        raise
    taken = count(counts["taken"], "row" if args.metadata_only else "image")
    rejected = rejected_path(args.source, args.out)
    print(f"{taken} in {args.out}/index.csv, {counts['rejected']:,} rejected (see {rejected})")
    if counts["missing"]:
        print(f"{counts['missing']:,} more are in the tables and not below {args.root}, as after downloading a part")
    print(f"next: python data.py stats {args.out}")
    if counts["synthetic"]:
        print(f"warning: {counts['synthetic']} of these images say that they are synthetic. The index does not tell "
              "them from real ones, only the text field Synthetic of their PNGs does: prepare them apart from real "
              "images", file=sys.stderr)


if __name__ == "__main__":
    run(main)
