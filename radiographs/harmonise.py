"""What the tables of a source say of every image, in one vocabulary: records, before any image is read.

A record is a dict of field -> value (fields.py) with `name`, which identifies the image within its source, and what
else is known: `patient`, `split`. What a DICOM header adds is read with the image; `complete` joins the two.
"""
import hashlib
from collections import Counter
from pathlib import Path

from common.cli import InputError
from common.tables import read_table
from radiographs import sources
from radiographs.fields import LABELS, drop_unknown, resolve_labels
from radiographs.hospital import folder_records
from radiographs.index import stable_split
from radiographs.terms import chexpert_labels

SOURCES = {"mimic": sources.mimic, "chexpert": sources.chexpert, "padchest": sources.padchest, "nih": sources.nih,
           "rexgradient": sources.rexgradient, "brax": sources.brax, "vindr": sources.vindr, "folder": folder_records}
TAGGED = ("vindr", "folder")  # sources whose DICOM headers say what their tables do not


def harmonise(source, download, labels, table=None, coding=None):
    """(file or None, record) for every image of a source, labels resolved; `name` still identifies the image. Last come
    the image files that no row names and the folders that cannot be read, with a reject_reason."""
    names = set()
    pairs = folder_records(download, table, coding) if source == "folder" else SOURCES[source](download)
    try:
        for file, record in pairs:
            name = record["name"]
            if source != "folder" and Path(name).name != name:
                raise InputError(f"{download.root}: the image name {name!r} is not a plain file name")
            if file and name in names:
                record["reject_reason"] = "listed twice, or another image has this name"
            names.add(name)
            record |= labels.get(name, {})
            # An index in the project's own columns is taken as it says.
            harmonised = source == "folder" and not labels and table == download.root / "index.csv"
            yield file, record if harmonised else resolve_labels(record)
    except InputError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{download.root}: a table is not as {source} publishes it: "
                         f"{type(error).__name__} {error}") from error
    if source != "folder" or table:
        for file in download.unlisted():
            yield file, {"reject_reason": "no row of the tables names it, or another file of this name was taken"}
    for folder in download.unreadable:
        yield Path(folder), {"reject_reason": "a folder that cannot be read"}


def read_labels(path):
    """Image name -> labels, from a CSV with the 14 labels in CheXpert's coding and the column "name", as the source
    spells it: of the prepared image without suffix, for `folder` the path below the root."""
    labels = {}
    for row in read_table(path):
        if missing := sorted({"name", *LABELS} - set(row)):
            raise InputError(f"{path}: no column {', '.join(missing)}; needed are name and the 14 labels")
        for label in LABELS:
            if row[label].strip().removesuffix(".0") not in ("1", "0", "-1", ""):
                raise InputError(f"{path}, line {row.line}: {label} is {row[label]!r}; "
                                 "accepted: 1 positive, 0 negative, -1 or blank unknown")
        labels[row["name"]] = drop_unknown(chexpert_labels(row))
    if not labels:
        raise InputError(f"{path}: no rows; needed are name and the 14 labels")
    return labels


def survey(pairs, labels):
    """One pass over harmonised records before anything is written, so that a fault in a table costs no work. Returns
    how many there are, how many have a row, a file and labels of their own, the first name, and a checksum of all
    that is known, by which a continued run recognises its input."""
    counts, first, checksum = Counter(), None, hashlib.sha256()
    for file, record in pairs:
        counts["all"] += 1
        if "name" in record:
            first = first or record["name"]
            counts["rows"] += 1
            counts["files"] += file is not None
            counts["labelled"] += record["name"] in labels
        checksum.update(repr((str(file), sorted(record.items()))).encode("utf-8", "backslashreplace"))
    if labels and not counts["labelled"]:
        raise InputError(f"no name in the table of labels is an image's; the first image's name is {first!r}")
    return counts, checksum.hexdigest()[:16]


def complete(record, tags, pseudonym):
    """A harmonised record as the index holds it: with values that only the DICOM header has, with a split, and without
    a hospital's identifiers."""
    record = tags | record
    name = record.pop("name")
    patient = record.get("patient", name)
    if pseudonym:
        name, patient = pseudonym(name), pseudonym(patient)
    # A source with an official test set and no validation set gives a tenth of the other patients to the latter.
    share = {"valid": 0.1, "test": 0} if record.pop("official", False) else {}
    return {"split": stable_split(patient, **share)} | record | {"patient": patient, "path": f"images/{name}.png"}
