"""A hospital's own folder: DICOM, PNG or JPEG as they lie there, with a table of what is known, or without.

The table needs a column that names the file; any other field may follow under the name that `sample.py` or an index has
for it, and what is not given is unknown. Whatever the table does not say is taken from the DICOM header.
A finding is written as a word (positive, yes, true; negative, no, false) or as a number in one of two codings:

    01    0 negative, 1 positive; -1 (uncertain) and blank unknown
    012   0 unknown, 1 negative, 2 positive: this project's own, as in the master CSV of CXR7-1M

A 1 means the opposite in the other, so a table in which no 2 occurs is not guessed at.

Identifiers: file names and patients are replaced by a keyed hash, whose key lies beside the output, not in it.
"""
import difflib
import hmac
import os
import re
import secrets
from pathlib import Path

from common.cli import InputError, whole_file
from common.tables import read_table
from radiographs.fields import FINDINGS, UNKNOWN, drop_unknown, parse_value
from radiographs.files import printable
from radiographs.index import SPLITS
from radiographs.sources import race_of
from radiographs.tags import age_of, sex_of, view_of

# Names of columns, by their letters and digits in lower case: "Image Index", "image_index" and "ImageIndex" are one.
FILE_COLUMNS = ("file", "imagepath", "path", "filepath", "filename", "image", "imageindex", "imageid", "imagename",
                "img", "dicomid", "name")
COLUMNS = {"age": "age", "ageyears": "age", "patientage": "age", "sex": "sex", "sexname": "sex", "gender": "sex",
           "patientsex": "sex", "patientgender": "sex", "race": "race", "racename": "race", "view": "view",
           "viewname": "view", "viewposition": "view", "dataset": "dataset", "datasetname": "dataset",
           "patient": "patient", "patientid": "patient", "split": "split",
           **{field.replace("_", ""): field for field in FINDINGS}}
WORDS = {**dict.fromkeys(("yes", "y", "true", "pos", "present"), "positive"),
         **dict.fromkeys(("no", "n", "false", "neg", "absent"), "negative"), "uncertain": None, "equivocal": None}
CODINGS = {"01": {"": None, "-1": None, "0": "negative", "1": "positive"},
           "012": {"": None, "0": None, "1": "negative", "2": "positive"}}


def folder_records(download, table=None, coding=None):
    """(file, record) for every row of the table, or without one for every file at or below the root."""
    dataset = printable(download.root.resolve().name)
    if table is None:
        for file in download.files:
            relative = os.path.relpath(file, download.root)
            yield Path(file), {"name": relative, "dataset": dataset}
        return
    coding = coding or coding_of(table, download.root)
    columns = None
    for row in read_table(table):
        columns = columns or columns_of(row)
        try:
            path, record = read_row(row, columns, coding, download.root.resolve())
            file = find_file(download, path)
        except InputError as error:
            raise InputError(f"{table}, line {row.line}: {error}") from None
        name = os.path.relpath(file, download.root) if file else path
        yield file, {"name": name, "dataset": dataset} | record


def letters(column):
    return re.sub(r"[^a-z0-9]", "", column.lower())


def columns_of(row):
    """Column -> field, for the columns that are read; "file" for the one that names the file."""
    names = {column: letters(column) for column in row}
    files = sorted((FILE_COLUMNS.index(name), column) for column, name in names.items() if name in FILE_COLUMNS)
    if not files:
        raise InputError(f"{row.path}: no column that names the file; accepted: {', '.join(FILE_COLUMNS)}")
    columns = {column: COLUMNS[name] for column, name in names.items() if name in COLUMNS} | {files[0][1]: "file"}
    for field in set(columns.values()):
        if len(same := [column for column, known in columns.items() if known == field]) > 1:
            raise InputError(f"{row.path}: the columns {' and '.join(same)} both say {field}; rename or leave out one")
    return columns


def unread_columns(table):
    """The columns that are left aside, and a warning for each whose name is nearly an accepted one."""
    row = next(read_table(table), {})
    unread, warnings = [column for column in row if column not in columns_of(row)], []
    for column in unread:
        for near in difflib.get_close_matches(letters(column), COLUMNS, n=1, cutoff=0.8):
            warnings.append(f"{table}: the column {column!r} is not read; did you mean {COLUMNS[near]}? Accepted "
                            f"are {', '.join(dict.fromkeys(COLUMNS.values()))}")
    return unread, warnings


def read_row(row, columns, coding, root):
    """The path that a row names, and its record."""
    record, path = {}, ""
    for column, field in columns.items():
        text = row[column].strip()
        if field == "file":
            path = text.replace("\\", "/")
            if ".." in path.split("/") or os.path.isabs(path) and not Path(path).is_relative_to(root):
                raise InputError(f"{column} {path!r} leaves {root}")
        elif field in ("patient", "dataset"):
            record[field] = None if text.lower() in UNKNOWN else text
        elif field == "split":
            if text not in ("", *SPLITS):
                raise InputError(f"unknown Split {text!r}; accepted: {', '.join(SPLITS)}")
            record[field] = text or None
        elif field in FINDINGS:
            record[field] = finding_of(text, field, coding)
        else:
            record[field] = value_of(field, text)
    if not path:
        raise InputError("no file is named")
    return path, drop_unknown(record)


def value_of(field, text):
    """Age, sex, race or view as sample.py takes it, or as DICOM and the public data sets spell it ("057Y"). A race is a
    free description, so one that names none of the three is unknown, and so is DICOM's third sex, O (other)."""
    if field == "race":
        return race_of(text)
    if field == "sex" and text.upper() in ("O", "OTHER"):
        return None
    try:
        return parse_value(field, text)
    except InputError:
        value = {"age": age_of, "sex": sex_of, "view": view_of}[field](text)
        if value is None:
            raise
        return value


def finding_of(text, field, coding):
    """negative, positive or None, from a word or a code."""
    codes, code = CODINGS[coding], code_of(text)
    if code in codes:
        return codes[code]
    if code.lstrip("-").isdecimal():
        raise InputError(f"unknown code {text!r} for {FINDINGS[field]}; accepted by --coding {coding}: "
                         + ", ".join(f"{key} {value or 'unknown'}" for key, value in codes.items() if key))
    return WORDS[text.lower()] if text.lower() in WORDS else parse_value(field, text)


def coding_of(table, root):
    """The coding of a table's findings: this project's own where a 2 occurs, where this project wrote the table, or
    where no finding is a number; else it must be said."""
    if table.parent == root and any((root / name).exists() for name in ("prepared.json", "sample.json")):
        return "012"
    columns, codes = None, set()
    for row in read_table(table):
        columns = columns or columns_of(row)
        codes |= {code_of(row[column]) for column, field in columns.items() if field in FINDINGS}
    # An index in which every finding is 0 knows nothing of them; elsewhere 0 may well mean that there is none.
    asked = {"1", "-1"} if table == root / "index.csv" else {"0", "1", "-1"}
    if "2" not in codes and codes & asked:
        raise InputError(f"{table}: no finding is 2, so what {' and '.join(sorted(codes & {'0', '1', '-1'}))} mean is "
                         "not certain; say --coding 01 if 1 means positive and 0 negative, or --coding 012 if 0 means "
                         "unknown, 1 negative and 2 positive, as in this project's own tables")
    return "012"


def code_of(text):
    return text.strip().removesuffix(".0")  # pandas writes whole numbers so beside blanks


def find_file(download, path):
    """The file of a path below the root, or of the end of such a path if only one file has it; else None."""
    root = download.root.resolve()
    if Path(path).is_relative_to(root):
        path = os.path.relpath(path, root)
    files, exact = download.images(path), str(download.root / path)
    if exact in files:
        files = [exact]
    if len(files) > 1:
        raise InputError(f"{len(files)} files below {download.root} are called {path!r}; name the path below it")
    return download.take(files, path)


def pseudonymiser(out):
    """text -> 16 hex digits by a key that lies beside OUT, not in it: who gets the prepared folder cannot turn an
    identifier back by trying all of them. The same key makes the same names when a folder is prepared again."""
    path = out.with_name(out.name + ".key")
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32))
    text = path.read_text(errors="replace").strip()
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise InputError(f"{path}: not a key of 64 hexadecimal digits; put the right one back, or delete it and {out} "
                         "to begin anew with another key")
    key = bytes.fromhex(text)
    return lambda text: hmac.new(key, os.fsencode(text), "sha256").hexdigest()[:16]
