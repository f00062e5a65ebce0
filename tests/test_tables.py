"""The one reader of tables, beside Python's csv and pandas' ways of writing, and on what downloads and spreadsheets
leave."""
import csv
import gzip
import io

import fuzz_tables
import pytest

from common.cli import InputError
from common.tables import read_table

TEXT = 'file,age,name\na.png,61,"Müller, Jö"\n\nb.png,,"two\nlines"\nc.png,7,é\n'
ROWS = [{"file": "a.png", "age": "61", "name": "Müller, Jö"}, {"file": "b.png", "age": "", "name": "two\nlines"},
        {"file": "c.png", "age": "7", "name": "é"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_table_is_read_whatever_wrote_it(tmp_path, encoding, ends, compressed):
    content = TEXT.replace("\n", ends).encode(encoding)
    for name in ("a.csv", "a.csv.gz"):  # the content tells whether it is compressed: browsers unpack and keep the name
        (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
        rows = list(read_table(tmp_path / name))
        assert [{k: v.replace("\r", "") for k, v in row.items()} for row in rows] == ROWS
        assert [row.line for row in rows] == [2, 4, 6]
    assert rows[0] == next(csv.DictReader(io.StringIO(TEXT)))


@pytest.mark.parametrize("name, separator", [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.txt", ",")])
def test_separators(tmp_path, name, separator):
    (tmp_path / name).write_text(f"file{separator}age\na.png{separator}5\n")
    assert list(read_table(tmp_path / name)) == [{"file": "a.png", "age": "5"}]


def test_a_comma_in_a_number_is_no_separator_beside_semicolons(tmp_path):
    (tmp_path / "a.csv").write_text("file;age\na.png;5,5\n")
    assert list(read_table(tmp_path / "a.csv")) == [{"file": "a.png", "age": "5,5"}]


def test_columns_without_a_name_are_left_out(tmp_path):
    (tmp_path / "pandas.csv").write_text(",file, age ,\n0,a.png,5,,,\n1,b.png,6\n2,c.png,7,note\n")  # rows are numbered
    assert list(read_table(tmp_path / "pandas.csv")) == [{"file": f"{x}.png", "age": str(n)} for x,
                                                         n in zip("abc", (5, 6, 7))]


CUT = gzip.compress("".join(f"secret{i},{i * 7919}\n" for i in range(5000)).encode(), mtime=0)[:-9000]


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"\n \n", "empty"), (b"\x1f\x8b", "cut short after line 0"),
    (CUT, "compressed file that is damaged or cut short"),
    (gzip.compress(b"a,b\nsecret,2\n", mtime=0)[:-1], "cut short"), (b"\x1f\x8bsecret", "damaged"),
    (b"<!DOCTYPE html>\n<title>secret</title>", "a web page, not a table"), (b"PK\x03\x04secret", "an Excel workbook"),
    (b"a,b\n1,2\nsecret\n", "line 3: 1 cell, where the first line names 2"), (b"a,b\n1,2,secret\n", "line 2: 3 cells"),
    (b"a,b\n1,2\n\0\0\0", "line 3: no text"), (b"a,b\n1,2\n" + b"s" * 200_000 + b",2",
                                               "line 3: field larger than field limit"),
    (b"a,b,a\n1,2,3", "line 1: two columns are called 'a'"), (b'a,b\n1,"secret\n2,3\n',
                                                              "line 2: a quotation mark that is never closed"),
    (b'a,b\n1,"secret"s\n', "line 2: ',' expected"), ("é,b\n".encode() + b"\xe9,2\n",
                                                      "line 2: characters that are not utf-8"),
    (b"\xe9,b\n\x81,2\n", "line 2: characters that are not cp1252"), ("a,b\n1,2".encode("utf-16")[:-1],
                                                                      "characters that are not utf-16")])
def test_what_is_no_table_is_refused_by_path_and_line_without_quoting_cells(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        list(read_table(tmp_path / "a.csv"))
    assert str(refused.value).startswith(str(tmp_path / "a.csv")) and "secret" not in str(refused.value)


def test_a_missing_table_and_a_folder_in_its_place(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            list(read_table(path))


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_damage_is_a_traceback(count):
    outcomes, faults = fuzz_tables.fuzz(count, seed=count)
    assert not faults
    assert sum(outcomes.values()) == count and {outcome for _, outcome in outcomes} == {"taken", "refused"}
