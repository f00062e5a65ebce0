"""index.csv: one row an image, in the columns of the CXR7-1M master CSV, and back to records.

A record is a dict of field -> value (fields.py) with `path`, `patient` and `split`; what is unknown is absent.
"""
import functools
import hashlib
import os
from pathlib import Path

from common.cli import InputError
from common.tables import read_table
from radiographs.fields import (FIELDS, FINDINGS, LABELS, check_covered,
                                drop_unknown, parse_value)

COLUMNS = ("Dataset_name", "ImagePath", "PatientID", "Age", "Sex_name", "Race_name", "View_name", "Split", *LABELS)
SPLITS = ("train", "valid", "test")


def stable_split(patient, valid=0.1, test=0.1):
    """train, valid or test by a hash of the patient: the same on every machine, no patient in two splits."""
    u = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2 ** 64
    return "test" if u < test else "valid" if u < test + valid else "train"


def index_records(root):
    """The rows of ROOT/index.csv, one at a time: dicts of the known fields and path, patient, split. Names of new data
    sets pass. ROOT may also be a table of that form itself, such as the master CSV of CXR7-1M, beside its images.

    Raises InputError for a missing file or column, a value outside the vocabulary, a path that leaves ROOT.
    """
    root = Path(root)
    table, root = (root, root.parent) if root.is_file() else (root / "index.csv", root)
    if not table.exists():
        what = "no index.csv in it, so this is not a prepared source" if root.is_dir() else "no such folder"
        raise InputError(f"{root}: {what} (python data.py prepare makes prepared sources)")
    inside = root.resolve()

    @functools.cache
    def stays_inside(place):  # resolving looks at each folder of a path: once for a folder, not for each of its images
        return Path(place).resolve().is_relative_to(inside)

    for row in read_table(table):
        if missing := [column for column in COLUMNS if column not in row]:
            raise InputError(f"{table}, line {row.line}: no column {missing[0]!r}: not a prepared source, a folder "
                             "with index.csv (see python data.py prepare)")
        try:
            yield index_record(row, inside, stays_inside)
        except InputError as error:
            raise InputError(f"{table}, line {row.line}: {error}") from None


def index_record(row, root, stays_inside):
    """One row as a record."""
    place = os.path.join(root, row["ImagePath"])
    folder, name = os.path.split(place)
    if not stays_inside(place if name in ("", ".", "..") or os.path.islink(place) else folder):
        raise InputError(f"ImagePath {row['ImagePath']!r} leaves {root}")
    if row["Split"] not in SPLITS:
        raise InputError(f"unknown Split {row['Split']!r}; accepted: {', '.join(SPLITS)}")
    record = {"dataset": row["Dataset_name"] or None, "age": parse_value("age", row["Age"]),
              "sex": parse_value("sex", row["Sex_name"]), "race": parse_value("race", row["Race_name"]),
              "view": parse_value("view", row["View_name"]), "path": row["ImagePath"], "patient": row["PatientID"],
              "split": row["Split"], "prompt": row.get("Prompt")}    # the last of text-to-image benchmarks, if there
    codes = {"0": None, "": None, "1": "negative", "2": "positive"}
    for field, label in FINDINGS.items():
        code = row[label].removesuffix(".0")                         # pandas writes whole numbers so beside blanks
        if code not in codes:
            raise InputError(f"unknown code {row[label]!r} for {label}; accepted: 0 unknown, 1 negative, 2 positive")
        record[field] = codes[code]
    return drop_unknown(record)


def read_index(root):
    """All rows of ROOT/index.csv; see index_records."""
    if records := list(index_records(root)):
        return records
    raise InputError(f"{root}: the index has no rows")


def index_row(record):
    """A record as a row of index.csv."""
    label = {None: "0", "negative": "1", "positive": "2"}
    age = f"{record['age']:g}" if "age" in record else ""
    return [record.get("dataset", ""), record["path"], record["patient"], age,
            *(record.get(field, "Unknown").capitalize() for field in ("sex", "race")),
            record.get("view", "Unknown"), record["split"], *(label[record.get(field)] for field in FINDINGS)]


def read_rows(path, datasets, covered):
    """The rows of a CSV as records and their seeds, None where none is given. Its columns are those of an index, or
    names of fields, with `file` and `seed` as in the metadata.csv of a sample. Raises InputError naming row and
    column."""
    if not path.is_file():
        raise InputError(f"--metadata {path}: no such file")
    try:
        rows = list(read_table(path))
    except InputError as error:
        raise InputError(f"--metadata {error}; accepted is a CSV with the columns of a metadata.csv or an "
                         "index.csv") from None
    if not rows:
        raise InputError(f"{path}: no rows; the first line names columns, every other describes an image")
    if "ImagePath" in rows[0]:
        records, seeds = [{field: row[field] for field in FIELDS if field in row} for row in index_records(path)], None
    elif strange := set(rows[0]) - {"file", "seed", *FIELDS}:
        raise InputError(f"{path}: unknown column {', '.join(sorted(strange))}; accepted: seed, {', '.join(FIELDS)}, "
                         "or the columns of an index.csv")
    else:
        records, seeds = [], []
        for row in rows:
            record = {}
            for field in row.keys() & set(FIELDS):
                try:
                    record[field] = parse_value(field, row[field], datasets)
                except InputError as error:
                    raise InputError(f"{path}, line {row.line}, column {field}: {error}") from None
            seed = row.get("seed", "").strip()
            if seed and not (seed.isdecimal() and int(seed) < 2 ** 62):
                raise InputError(f"{path}, line {row.line}, column seed: {seed!r} is not a whole number from 0 to 2^62")
            records.append(drop_unknown({field: record[field] for field in FIELDS if field in record}))
            seeds.append(int(seed) if seed else None)
    for row, record in zip(rows, records):
        try:
            check_covered(record, covered)
        except InputError as error:
            raise InputError(f"{path}, line {row.line}: {error}") from None
    return records, seeds or [None] * len(records)
