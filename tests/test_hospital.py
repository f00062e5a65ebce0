"""A hospital's own folder with its own table: columns, codings, files, splits and identifiers."""
import csv
import unicodedata

import pytest
from pictures import RAMP, picture, write_dicom

import data
from common.cli import InputError, RunError
from radiographs import fields, hospital
from radiographs.index import COLUMNS, read_index, stable_split


@pytest.fixture
def root(tmp_path):
    """Three pictures in two folders, and a DICOM file without an ending."""
    for folder in ("root/a", "root/b"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        picture(tmp_path / "root", RAMP, name=name)
    write_dicom(tmp_path / "root/b/IM0004", RAMP)
    return tmp_path / "root"


def prepare(root, text, name="table.csv", **options):
    """The index of the folder, prepared with a table of that text, by the age of each row."""
    table = root.parent / name
    table.write_text(text)
    counts = data.prepare("folder", root, root.parent / "out", size=64, table=table, **options)
    return counts, {record.get("age"): record for record in read_index(root.parent / "out")}


def test_a_table_in_the_words_of_sample_py(root, capsys):
    counts, records = prepare(root, "file,age,sex,view,edema,ward\na/1.png,30,F,PA,positive,7\n"
                                    "b/3.png,40,,,,8\nlost.png,50,,,,9\n")
    assert counts == {"taken": 2, "rejected": 1,
                      "missing": 1}       # a/2.png is in no row; IM0004 is another kind of file
    assert {k: v for k, v in records[30].items() if k not in ("path", "patient", "split")} == {
        "dataset": "root", "age": 30, "sex": "female", "view": "PA", "edema": "positive", "no_finding": "negative"}
    assert set(records[40]) == {"dataset", "age", "path", "patient", "split"}
    output = capsys.readouterr().out
    assert "3 rows, 2 of them with a file below" in output and "columns that are not read: ward" in output


def test_a_column_whose_name_is_nearly_a_field_s_is_a_warning(root, capsys):
    prepare(root, "file,Cardiomegly,ward\na/1.png,positive,7\n")
    warning, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "the column 'Cardiomegly' is not read; did you mean cardiomegaly? Accepted are age, sex" in warning


@pytest.mark.parametrize("text, path", [
    ("Filename;Age\nb\\3.png;30\n", "b/3.png"), ("path\tAge\n{root}/b/3.png\t30\n", "b/3.png"),
    ("name,age\n3.png,30\n", "b/3.png"),
    ("Image Index,AGE\n3.jpg,30\n", "b/3.png"), ("ImagePath,Age\ndownload/b/3,30\n", "b/3.png"),
    ("file,age\nIM0004,30\n", "b/IM0004"),
    ("file,age\nIM0004.dcm,30\n", "b/IM0004")])
def test_files_are_found_as_people_name_them(root, text, path):
    counts, records = prepare(root, text.replace("{root}", str(root)))
    assert counts["taken"] == 1
    rejected = {row["path"] for row in csv.DictReader(open(f"{root.parent}/out.rejected.csv"))}
    assert path not in rejected and (path == "b/IM0004" or rejected == {"a/1.png", "a/2.png"})


@pytest.mark.parametrize("header", ["Image Index,Patient Age,Patient Gender,View Position",
                                    "FilePath,age_years,Sex,view",
                                    "dicom_id,PatientAge,PatientSex,ViewPosition", "IMAGE_ID,AGE,gender,View_name"])
def test_columns_are_known_by_the_names_that_people_give_them(root, header):
    _, records = prepare(root, f"{header}\na/1.png,057Y,W,Postero-Anterior\n"
                               'a/2.png,"45,5",O,NA\nb/3.png,n/a,NULL,-\n')
    said = [{key: record[key] for key in ("age", "sex", "view") if key in record} for record in records.values()]
    assert said == [{"age": 57, "sex": "female", "view": "PA"}, {"age": 45.5}, {}]


def test_two_columns_that_say_the_same_are_named(root):
    with pytest.raises(InputError, match="table.csv: the columns Sex and Gender both say sex; rename or leave out one"):
        prepare(root, "file,Sex,Gender\na/1.png,F,M\n")


@pytest.mark.parametrize("yes, no", [("yes", "No"), ("TRUE", "False"), ("y", "n"), ("pos", "neg"),
                                     ("Positive", "negative")])
def test_findings_in_words(root, yes, no):
    _, records = prepare(root, f"file,age,edema,pleural-effusion\na/1.png,1,{yes},{no}\na/2.png,2,NA,uncertain\n")
    assert records[1]["edema"] == "positive" and records[1]["pleural_effusion"] == "negative"
    assert not {"edema", "pleural_effusion"} & records[2].keys()


def test_a_race_that_names_none_of_the_three_stops_no_run(root):
    _, records = prepare(root, "file,age,race\na/1.png,1,Hispanic\na/2.png,2,White or Caucasian\n"
                               "b/3.png,3,declined\n")
    assert [records[age].get("race") for age in (1, 2, 3)] == [None, "white", None]


@pytest.mark.parametrize("disk, table", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_one_character_or_two(root, disk, table):
    picture(root, RAMP, name=unicodedata.normalize(disk, "Müller.png"))
    assert prepare(root, "file,age\n" + unicodedata.normalize(table, "Müller.png") + ",3\n")[0]["taken"] == 1


def test_patients_that_are_not_known_are_not_one(root):
    _, records = prepare(root, "file,age,patient\na/1.png,1,NA\na/2.png,2,unknown\nb/3.png,3,\n")
    assert len({record["patient"] for record in records.values()}) == 3


def test_splits_follow_the_patient_or_the_table(root):
    _, records = prepare(root, "file,age,PatientID\na/1.png,1,Doe\na/2.png,2,Doe\nb/3.png,3,Roe\n")
    assert records[1]["patient"] == records[2]["patient"] != records[3]["patient"]
    for record in records.values():
        assert record["split"] == stable_split(record["patient"]) and record["patient"] not in ("Doe", "Roe")
    everything = b"".join(path.read_bytes() for path in (root.parent / "out").rglob("*.*") if path.suffix != ".png")
    assert b"Doe" not in everything
    (root.parent / "out/index.csv").unlink(), (root.parent / "out/prepared.json").unlink()
    _, records = prepare(root, "file,age,split\na/1.png,1,test\na/2.png,2,valid\n")
    assert records[1]["split"] == "test" and records[2]["split"] == "valid"


def test_the_header_says_what_the_table_does_not(root):
    _, records = prepare(root, "file,age\nb/IM0004,30\n")
    assert records[30]["sex"] == "female" and records[30]["view"] == "PA" and "secret" not in records[30]["patient"]


@pytest.mark.parametrize("coding, expected", [
    ("01", {"1": "positive", "0": "negative", "": None, "1.0": "positive", "-1": None}),
    ("012", {"1": "negative", "0": None, "": None, "2": "positive", "2.0": "positive"})])
def test_codings(coding, expected):
    for text, value in expected.items():
        assert hospital.finding_of(text, "edema", coding) == value
    assert hospital.finding_of("Positive", "edema", coding) == "positive"
    with pytest.raises(InputError, match=f"unknown code '3' for Edema; accepted by --coding {coding}"):
        hospital.finding_of("3", "edema", coding)


@pytest.mark.parametrize("cells", ["0,1", "1,", "0,0", "1.0,0.0", "-1,1"])
def test_codes_without_a_2_are_asked_about(root, command, cells):
    table = root.parent / "t.csv"
    table.write_text(f"file,edema,Pleural Effusion\na/1.png,{cells}\n")
    arguments = "prepare", "folder", root, root.parent / "out", "--size", 64, "--table", table, "--workers", 1
    status, _, errors = command("data.py", *arguments)
    assert status == 2 and "--coding 01" in errors and "--coding 012" in errors and not (root.parent / "out").exists()
    status, _, errors = command("data.py", *arguments, "--coding", "01")
    value = {"0": "negative", "1": "positive"}
    codes = [code.removesuffix(".0") for code in cells.split(",")]
    record = read_index(root.parent / "out")[0]
    assert status == 0 and [record.get(f) for f in ("edema", "pleural_effusion")] == [value.get(code) for code in codes]


def test_a_complete_index_of_zeros_and_ones_is_asked_about(root):
    """As most hospitals write findings; in this project's coding its positives would become negative."""
    row = ["mine", "a/1.png", "p", "40", "F", "", "PA", "train", *["0"] * 13, "1"]
    (root / "index.csv").write_text(",".join(COLUMNS) + "\n" + ",".join(row) + "\n")
    with pytest.raises(InputError, match="index.csv: no finding is 2, so what 0 and 1 mean is not certain; say"):
        data.prepare("folder", root, root.parent / "out", size=64)
    data.prepare("folder", root, root.parent / "out", size=64, coding="01")
    [record] = read_index(root.parent / "out")
    assert record["support_devices"] == "positive" and record["edema"] == "negative"
    data.prepare("folder", root, root.parent / "own", size=64, coding="012")
    assert {f for f in fields.FINDINGS if f in read_index(root.parent / "own")[0]} == {"support_devices"}


def test_what_this_project_wrote_is_read_as_it_was_meant(root):
    """A prepared folder whose findings are all negative, prepared again at another size."""
    prepare(root, "file,age,edema\na/1.png,30,negative\n")
    assert data.prepare("folder", root.parent / "out", root.parent / "again", size=32)["taken"] == 1
    assert read_index(root.parent / "again")[0]["edema"] == "negative"


@pytest.mark.parametrize("text, message", [
    ("age,sex\n3,F\n", "no column that names the file; accepted: file, imagepath"), ("file\n\n", "no image found"),
    ("file,age\n", "no image found"),
    ("file,age\na/1.png,old\n", "table.csv, line 2: age 'old' is not a number"),
    ("file,age\n../x.png,3\n", "line 2: file '../x.png' leaves"),
    ("file,age\n/etc/x.png,3\n", "line 2: file '/etc/x.png' leaves"), ("file,split\na/1.png,dev\n",
                                                                       "line 2: unknown Split 'dev'"),
    ("file,view\na/1.png,oblique\n", "line 2: unknown value 'oblique' for view"),
    ("file,age\n,3\n", "line 2: no file is named"),
    ("file,edema\na/1.png,maybe\n", "line 2: unknown value 'maybe' for edema"),
    ("file,age\nnothing.png,3\n", "looked for 'nothing.png'")])
def test_a_table_that_cannot_be_used_is_refused(root, text, message):
    with pytest.raises((InputError, RunError), match=message):
        prepare(root, text)
    assert not (root.parent / "out").exists()


def test_a_name_that_several_files_have_is_not_guessed(root):
    picture(root, RAMP, name="b/1.png")
    with pytest.raises(InputError, match="line 2: 2 files below .* are called '1.png'; name the path below it"):
        prepare(root, "file,age\n1.png,3\n")
    picture(root, RAMP, name="1.png")
    assert prepare(root, "file,age\n1.png,3\nb/1.png,4\n")[0]["taken"] == 2


def test_options_that_mean_nothing_together_are_refused(root, command):
    for options in (["brax", root, "out", "--coding", "01"], ["brax", root, "out", "--table", "t.csv"],
                    ["folder", root, "out", "--table", "none.csv"], ["folder", root, "out", "--labels", ""],
                    ["folder", root, "out", "--coding", "01"], ["folder", root, ""], ["folder", "", "out"],
                    ["folder", root, "out", "--workers", "99999999999999999999"],
                    ["folder", root, "out", "--size", "0"]):
        status, _, errors = command("data.py", "prepare", *options, cwd=root.parent)
        assert status == 2 and len(errors.splitlines()) == 1 and not (root.parent / "out").exists(), options


def test_a_note_about_a_table_that_is_not_read(root, capsys):
    (root / "patients.csv").write_text("file,age\na/1.png,3\n")
    data.prepare("folder", root, root.parent / "out", size=64)
    assert f"--table {root}/patients.csv" in capsys.readouterr().out
