"""The one reader of tables: CSV as data sets, spreadsheets and hospitals write it, one row at a time.

Accepted are .csv, .tsv and .txt, also compressed with gzip; commas, semicolons (European Excel) or tabs; UTF-8 with or
without a byte order mark, UTF-16, and Windows-1252 (the "CSV" of Excel on a western Windows). The first line names
the columns; a column without a name is left out. Everything else is an InputError that names the file and the line,
and never quotes a cell, which may hold a patient's data.
"""
import csv
import gzip
import io
import zlib
from pathlib import Path

from common.cli import InputError, count

MAX_LINE = 2 ** 24  # characters; a longer line is refused, so that no file can fill the memory


class Row(dict):
    """Column -> text of its cell. `line` is where the row begins in the file `path`, whose first line is 1."""
    path, line = None, 0

    def __missing__(self, column):
        raise InputError(f"{self.path}: no column {column!r}; there are {', '.join(self)}")


def read_table(path):
    """The rows of a table as Row, one at a time. Raises InputError."""
    path = Path(path)
    first = first_line(path)
    separator = "\t" if ".tsv" in path.suffixes else max(",;\t", key=first.count)
    reader = csv.reader(read_lines(path), delimiter=separator, strict=True)
    header, line = None, 1
    try:
        for cells in reader:
            if cells and header is None:
                header = column_names(cells)
            elif cells:  # a blank line has none
                row = Row(zip(header, checked(cells, header)))
                row.pop("", None)
                row.path, row.line = path, line
                yield row
            line = reader.line_num + 1
    except (csv.Error, Malformed) as error:
        text = str(error).replace("unexpected end of data", "a quotation mark that is never closed")
        raise InputError(f"{path}, line {line}: {text}") from None


class Malformed(ValueError):
    """What is wrong with one row; read_table adds path and line."""


def column_names(cells):
    """The names of the first line; a column without one has an empty text."""
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise Malformed(f"two columns are called {twice[0]!r}")
    return names


def checked(cells, header):
    """The cells of a row. Every column with a name must have one, and cells beyond the first line's must be empty."""
    missing, extra = header[len(cells):], cells[len(header):]
    if any(missing) or any(cell.strip() for cell in extra):
        raise Malformed(f"{count(len(cells), 'cell')}, where the first line names {len(header)}")
    return cells


def first_line(path):
    """The first line of a table that is not blank."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise InputError(f"{path}: an Excel workbook or a zip archive, not a table; save it as CSV, or unpack it")
    for line in read_lines(path):
        if line.lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
            raise InputError(f"{path}: a web page, not a table; downloads without logging in often save one")
        if line.strip():
            return line
    raise InputError(f"{path}: empty, where a first line of column names is expected")


def read_lines(path):
    """The lines of a text file, decoded. The first line that is not ASCII decides for the whole file: UTF-8 if it is
    valid UTF-8, otherwise Windows-1252."""
    with open(path, "rb") as file:
        start = file.read(2)
    with (gzip.open if start == b"\x1f\x8b" else open)(path, "rb") as file:
        encoding, number = None, 0
        try:
            start = file.read(1000)
            file.seek(0)
            utf16 = utf16_of(start)
            # Bytes that are not UTF-8 come as lone surrogates (PEP 383), which can be turned back into bytes.
            text = io.TextIOWrapper(file, utf16 or "utf-8-sig", "strict" if utf16 else "surrogateescape", newline="")
            while line := text.readline(MAX_LINE):
                number += 1
                if not line.isascii() and not utf16:
                    raw = line.encode("utf-8", "surrogateescape")
                    encoding = encoding or ("utf-8" if is_utf8(raw) else "cp1252")
                    line = raw.decode(encoding)
                if "\0" in line or len(line) == MAX_LINE:
                    raise InputError(f"{path}, line {number}: no text; a table of text is expected")
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise InputError(f"{path}: a compressed file that is damaged or cut short after line {number}; "
                             "download it again") from None
        except UnicodeError:
            name = utf16 or encoding
            raise InputError(f"{path}, line {number}: characters that are not {name}; save it as UTF-8") from None


def utf16_of(start):
    """The kind of UTF-16, seen by a file's byte order mark or by the zero bytes between ASCII characters; else None."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for encoding, zeros, others in (("utf-16-le", start[1::2], start[::2]), ("utf-16-be", start[::2], start[1::2])):
        if zeros and not any(zeros) and all(others):
            return encoding


def is_utf8(raw):
    try:
        raw.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False
