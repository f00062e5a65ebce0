import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from pictures import RAMP, picture, write_dicom
from PIL import Image

import data
from common import cli
from common.cli import InputError
from radiographs import dicom, fields, pixels, progress, tags
from radiographs.index import (COLUMNS, SPLITS, index_row, read_index,
                               stable_split)

# --- fields ---------------------------------------------------------------------------------------------

def test_there_are_19_fields_in_the_master_csvs_names():
    assert len(fields.FIELDS) == 19 and len(fields.CODED) == 18 and len(COLUMNS) == 22
    assert fields.FINDINGS["enlarged_cardiomediastinum"] == "Enlarged Cardiomediastinum"


def test_encode_metadata_by_hand():
    records = [{"age": 61.5, "sex": "male", "view": "LATERAL", "dataset": "own", "edema": "positive"},
               {"race": "black", "no_finding": "negative"}]
    age, codes = fields.encode_metadata(records, (*fields.DATASETS, "own"))
    assert age[0] == 61.5 and age[1].isnan()
    first, second = (dict(zip(fields.CODED, row.tolist())) for row in codes)
    assert {k: v for k, v in first.items() if v} == {"sex": 2, "view": 3, "dataset": 8, "edema": 2}
    assert {k: v for k, v in second.items() if v} == {"race": 2, "no_finding": 1}


@pytest.mark.parametrize("field, text, value", [
    ("sex", "F", "female"), ("sex", "Male", "male"), ("view", "pa", "PA"), ("age", "0.5", 0.5),
    ("race", "Asian", "asian"),
    ("edema", "POSITIVE", "positive"), ("dataset", "padchest", "PadChest"), ("sex", "Unknown", None),
    ("age", "", None)])
def test_values_are_read_as_people_write_them(field, text, value):
    assert fields.parse_value(field, text) == value


@pytest.mark.parametrize("field, text, message", [
    ("colour", "red", "unknown field 'colour'.*pneumonia"), ("view", "oblique",
                                                             "'oblique' for view; accepted: AP, PA, LATERAL"),
    ("age", "-1", "0 to 120"), ("age", "414", "0 to 120"), ("age", "old", "0 to 120"),
    ("dataset", "mine", "MIMIC-CXR")])
def test_other_values_are_refused_with_what_is_accepted(field, text, message):
    with pytest.raises(InputError, match=message):
        fields.parse_value(field, text)


@pytest.mark.parametrize("text, years", [("057Y", 57), ("006M", 0.5), ("57", 57), ("", None), ("old", None),
                                         ("414Y", None), ("85 or more", 85), ("57.0", 57), ("002W", 14 / 365.25)])
def test_ages(text, years):
    assert tags.age_of(text) == years


# --- sources --------------------------------------------------------------------------------------------

def read_rows(path):
    return list(csv.DictReader(open(path)))


@pytest.fixture
def nih_root(tmp_path):
    """Six images in ChestX-ray14's layout: RGBA, 16 bits, one zero-byte, one listed but not there."""
    root = tmp_path / "nih"
    (root / "images_001/images").mkdir(parents=True)
    header = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
              "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]")
    rows = ["00000001_000.png,Cardiomegaly|Emphysema,0,1,57,M,PA,1,1,.1,.1",
            "00000001_001.png,No Finding,1,1,58,M,AP,1,1,.1,.1",
            "00000002_000.png,Infiltration|Nodule|Mass,0,2,414,F,PA,1,1,.1,.1",
            "00000003_000.png,Hernia,0,3,8,F,AP,1,1,.1,.1",
            "00000004_000.png,Pneumonia,0,4,33,F,AP,1,1,.1,.1", "00000005_000.png,Edema,0,5,33,F,AP,1,1,.1,.1"]
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *rows]))
    (root / "test_list.txt").write_text("00000003_000.png\n")
    for i, name in enumerate(["00000001_000", "00000001_001", "00000002_000", "00000003_000"]):
        picture(root / "images_001/images", RAMP, ["RGBA", "L", "RGB", "P"][i], f"{name}.png")
    (root / "images_001/images/00000004_000.png").write_bytes(b"")
    return root


def test_nih_harmonised_by_hand(nih_root, tmp_path, command):
    status, output, _ = command("data.py", "prepare", "nih", nih_root, tmp_path / "out", "--size", 64)
    assert status == 0 and "4 images" in output and "1 rejected" in output
    rows = read_rows(tmp_path / "out/index.csv")
    assert [row["ImagePath"] for row in rows] == [f"images/{n}.png" for n in
                                                 ("00000001_000", "00000001_001", "00000002_000", "00000003_000")]
    known = [{k: v for k, v in row.items() if v not in ("0", "", "Unknown")} for row in rows]
    assert known[0] == {"Dataset_name": "ChestX-ray14", "ImagePath": "images/00000001_000.png",
                        "PatientID": "NIH00000001",
                        "Age": "57", "Sex_name": "Male", "View_name": "PA", "Split": rows[0]["Split"],
                        "No Finding": "1", "Cardiomegaly": "2"}
    assert rows[1]["No Finding"] == "2" and rows[1]["Edema"] == "1" and rows[1]["Support Devices"] == "0"
    assert rows[1]["Split"] == rows[0]["Split"] != "test"
    assert rows[2]["Age"] == "" and rows[2]["Lung Opacity"] == "2" and rows[2]["Lung Lesion"] == "2"
    assert rows[3]["Split"] == "test" and rows[3]["No Finding"] == "1"  # a hernia is a finding
    assert read_rows(tmp_path / "out/rejected.csv") == [{"path": "images_001/images/00000004_000.png",
                                                         "reason": "empty file"}]
    image = Image.open(tmp_path / "out/images/00000001_000.png")
    assert image.mode == "L" and image.size == (64, 64)


def test_folder_reads_dicom_tags_and_rejects_the_rest(tmp_path):
    root = tmp_path / "hospital"
    root.mkdir()
    write_dicom(root / "a.dcm", RAMP)
    write_dicom(root / "b.dcm", RAMP, Modality="CT")
    picture(root, RAMP, name="c.jpg", quality=95)
    (root / "notes.txt").write_text("not an image")
    assert data.prepare("folder", root, tmp_path / "out", size=64) == {"taken": 2, "rejected": 2, "missing": 0}
    rows = read_rows(tmp_path / "out/index.csv")
    assert (rows[0]["Age"], rows[0]["Sex_name"], rows[0]["View_name"], rows[0]["Dataset_name"]) == ("57", "Female",
                                                                                                    "PA", "hospital")
    assert (rows[1]["Age"], rows[1]["Sex_name"], rows[1]["View_name"]) == ("", "Unknown", "Unknown")
    assert "secret" not in (tmp_path / "out/index.csv").read_text()
    assert {row["path"]: row["reason"].split(",")[0] for row in read_rows(tmp_path / "out.rejected.csv")} == {
        "b.dcm": "modality CT", "notes.txt": "not an image"}


def write_index(root, **changes):
    row = dict(zip(COLUMNS, index_row({"path": "a.png", "patient": "p", "split": "train", "age": 40.0,
                                       "dataset": "own"})))
    cli.write_csv(root / "index.csv", COLUMNS, [(row | changes).values()])


def test_folder_with_an_index_keeps_what_it_says(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture(root, RAMP, name="a.png")
    write_index(root, **{"Pneumonia": "2", "Sex_name": "F"})
    assert data.prepare("folder", root, tmp_path / "out", size=64)["taken"] == 1
    record = read_index(tmp_path / "out")[0]
    assert {k: record[k] for k in ("age", "sex", "pneumonia", "dataset", "split")} == {
        "age": 40.0, "sex": "female", "pneumonia": "positive", "dataset": "own", "split": "train"}
    assert data.Radiographs([tmp_path / "out"], "train")[0].shape == (1, 64, 64)
    with pytest.raises(InputError, match="no image in the split test"):
        data.Radiographs([tmp_path / "out"], "test")


def test_a_damaged_first_image_is_named(tmp_path):
    write_index(tmp_path)
    (tmp_path / "a.png").write_bytes(b"some text")
    with pytest.raises(InputError, match="a.png: damaged, or no grey picture"):
        data.Radiographs([tmp_path])


def test_sources_of_different_sizes_do_not_mix(tmp_path):
    for name, size in (("a", 64), ("b", 96)):
        (tmp_path / name).mkdir()
        picture(tmp_path / name, RAMP, name="x.png")
        data.prepare("folder", tmp_path / name, tmp_path / f"{name}-out", size)
    with pytest.raises(InputError, match="different sizes: .*a-out 64x64, .*b-out 96x96"):
        data.Radiographs([tmp_path / "a-out", tmp_path / "b-out"])


@pytest.mark.parametrize("changes, message", [
    ({"ImagePath": "../../etc/passwd"}, "line 2: ImagePath '../../etc/passwd' leaves"),
    ({"ImagePath": "/etc/passwd"}, "line 2: ImagePath '/etc/passwd' leaves"),
    ({"Split": "dev"}, "line 2: unknown Split 'dev'; accepted: train, valid, test"),
    ({"View_name": "oblique"}, "line 2: unknown value 'oblique' for view"),
    ({"Edema": "3"}, "line 2: unknown code '3' for Edema")])
def test_a_bad_row_is_refused_in_one_line_and_nothing_is_written(tmp_path, command, changes, message):
    root = tmp_path / "root"
    root.mkdir()
    picture(root, RAMP, name="a.png")
    write_index(root, **changes)
    status, output, errors = command("data.py", "prepare", "folder", root, tmp_path / "out")
    assert status == 2 and message in errors and len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path, accepted", [
    ("a.png", True), ("inner/a.png", True), ("file_in.png", True), ("folder_in/a.png", True), ("inner/../a.png", True),
    ("not_there.png", True), ("file_out.png", False), ("folder_out/x.png", False), ("inner/../../x.png", False),
    ("..", False), ("inner/folder_out/../x.png", False)])
def test_a_path_stays_inside_through_links_too(tmp_path, path, accepted):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (root / "file_in.png").symlink_to("inner/a.png")
    (root / "folder_in").symlink_to("inner")
    (root / "file_out.png").symlink_to(tmp_path / "x.png")
    (root / "folder_out").symlink_to(tmp_path)
    (root / "inner/folder_out").symlink_to(tmp_path / "elsewhere/deep")
    write_index(root, ImagePath=path)
    if accepted:
        assert read_index(root)[0]["path"] == path
        return
    with pytest.raises(InputError, match="line 2: ImagePath .* leaves"):
        read_index(root)


@pytest.mark.parametrize("arguments, message", [
    (("folder", "nowhere", "out"), "nowhere: no such folder"), (("nih", "root", "out"), "no test_list.txt"),
    (("folder", ".", "out"), "out lies inside ."), (("folder", "root", "file/out"), "file")])
def test_bad_arguments_of_prepare(tmp_path, command, arguments, message):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/notes.txt").touch()
    (tmp_path / "file").write_text("a file where the output should go")
    status, _, errors = command("data.py", "prepare", *arguments, cwd=tmp_path)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1


def test_splits_follow_the_patient_in_the_right_shares():
    splits = [stable_split(f"patient {i}") for i in range(20_000)]
    assert splits == [stable_split(f"patient {i}") for i in range(20_000)]
    shares = [splits.count(name) / len(splits) for name in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert math.isclose(sum(shares), 1)


# --- preparing ------------------------------------------------------------------------------------------

def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def forty(tmp_path, monkeypatch):
    """Forty files, every seventh of them broken, to be prepared in chunks of eight."""
    root = tmp_path / "forty"
    root.mkdir()
    for i in range(40):
        picture(root, RAMP[: 70 + i % 30], name=f"{i:02}.png")
        if i % 7 == 0:
            (root / f"{i:02}.png").write_bytes(b"broken")
    monkeypatch.setattr(data, "CHUNK", 8)
    return root


def test_an_interrupted_run_ends_with_the_same_bytes_for_any_number_of_workers(forty, tmp_path, monkeypatch):
    out = tmp_path / "whole/out"
    assert data.prepare("folder", forty, out, size=32) == {"taken": 34, "rejected": 6, "missing": 0}
    for workers, stop in ((1, 2), (2, 3)):
        other = tmp_path / f"cut{workers}/out"
        other.parent.mkdir()
        other.with_name("out.key").write_text(out.with_name("out.key").read_text())
        values, write = [], cli.write_json

        def interrupted(path, value):
            write(path, value)
            values.append(value)
            if len(values) == stop:
                (other / "index.csv.part").open("a").write("half a ro")  # what a crash may leave behind
                raise KeyboardInterrupt

        monkeypatch.setattr(progress, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.prepare("folder", forty, other, size=32, workers=workers)
        monkeypatch.setattr(progress, "write_json", write)
        assert not (other / "index.csv").exists()
        assert sum(1 for _ in other.glob("images/*.png")) < 34
        data.prepare("folder", forty, other, size=32, workers=workers)
        assert tree(other) == tree(out)


def interrupt(monkeypatch, function):
    """Calls `function`, a preparation, and breaks it off after its first chunk."""
    save = progress.Progress.save

    def last(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "save", last)
    with pytest.raises(KeyboardInterrupt):
        function()
    monkeypatch.setattr(progress.Progress, "save", save)


def labels_table(path, value):
    cli.write_csv(path, ["name", *fields.LABELS], [[f"{i:02}.png", *[value] * 14] for i in range(40)])
    return path


def test_what_decides_the_output_does_not_change_in_a_continued_run(forty, tmp_path, monkeypatch):
    """Labels, another table under the same name, and the table of a hospital's folder."""
    def run(out, **options):
        return data.prepare("folder", forty, tmp_path / out, size=32, **options)

    labels = labels_table(tmp_path / "labels.csv", "1")
    interrupt(monkeypatch, lambda: run("a", labels=labels))
    for other in (None, labels_table(tmp_path / "others.csv", "0")):
        with pytest.raises(InputError, match="was prepared with another --labels; name another folder"):
            run("a", labels=other)
    run("a", labels=labels)
    with pytest.raises(InputError, match="another --labels"):
        run("a")
    assert {record["edema"] for record in read_index(tmp_path / "a")} == {"positive"}
    table = tmp_path / "table.csv"
    cli.write_csv(table, ["file", "age"], [[f"{i:02}.png", 30] for i in range(40)])
    interrupt(monkeypatch, lambda: run("b", table=table))
    cli.write_csv(table, ["file", "age"], [[f"{i:02}.png", 80] for i in range(40)])
    with pytest.raises(InputError, match="another --table"):
        run("b", table=table)
    # Images that came or went meanwhile: the rows begin anew.
    interrupt(monkeypatch, lambda: run("c"))
    (forty / "01.png").unlink()
    assert run("c") == {"taken": 33, "rejected": 6, "missing": 0} and len(read_index(tmp_path / "c")) == 33


def killed_at(monkeypatch, function, calls, name):
    """Calls `function` and breaks it off at the n-th call of a function that radiographs/progress.py uses."""
    original, seen = getattr(progress, name), []

    def stopped(*arguments, **options):
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(progress, name, stopped)
    try:
        function()
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(progress, name, original)


@pytest.mark.parametrize("name, calls", [("whole_file", 1), ("whole_file", 2), ("write_json", 5)])
def test_a_kill_at_the_end_leaves_nothing_half(forty, tmp_path, monkeypatch, name, calls):
    data.prepare("folder", forty, tmp_path / "whole/out", size=32)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/out.key").write_text((tmp_path / "whole/out.key").read_text())
    killed_at(monkeypatch, lambda: data.prepare("folder", forty, tmp_path / "cut/out", size=32), calls, name)
    assert (tmp_path / "cut/out/index.csv.part").exists()
    data.prepare("folder", forty, tmp_path / "cut/out", size=32)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", [
    lambda out: (out / "index.csv.part").rename(out / "index.csv"), lambda out: (out / "index.csv.part").write_text(""),
    lambda out: (out / "index.csv.part").write_bytes(b"\0" * 10_000),
    lambda out: (out / "progress.json").write_text(""),
    lambda out: (out / "progress.json").write_text("[" * 100_000), lambda out: (out / "progress.json").write_text("3"),
    lambda out: (out / "progress.json").write_text('{"settings": 3}'),
    lambda out: (out / "progress.json").write_text((out / "progress.json").read_text().replace('"ends"', '"end"')),
    lambda out: (out.parent / "out.rejected.csv.part").unlink()])
def test_damaged_leftovers_are_begun_anew(forty, tmp_path, monkeypatch, damage):
    out = tmp_path / "cut/out"
    interrupt(monkeypatch, lambda: data.prepare("folder", forty, out, size=32))
    damage(out)
    assert data.prepare("folder", forty, out, size=32) == {"taken": 34, "rejected": 6, "missing": 0}
    assert len(read_index(out)) == 34 and not list(out.glob("*.part")) and not (out / "progress.json").exists()


def test_two_commands_do_not_fill_one_folder(forty, tmp_path, command):
    with cli.locked(tmp_path / "out"):
        status, _, errors = command("data.py", "prepare", "folder", forty, tmp_path / "out", "--size", 32)
    assert status == 2 and "another command is filling this folder" in errors and len(errors.splitlines()) == 1
    assert data.prepare("folder", forty, tmp_path / "out", size=32)["taken"] == 34


PREPARE_IMAGE = data.prepare_image


def killed(job):
    """prepare_image in a worker that the system ends for want of memory."""
    if job[0].name == "13.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return PREPARE_IMAGE(job)


def test_a_killed_worker_ends_the_run_which_can_be_continued(forty, tmp_path, monkeypatch, command):
    monkeypatch.setattr(data, "prepare_image", killed)
    status, _, errors = command("data.py", "prepare", "folder", forty, tmp_path / "out", "--size", 32, "--workers", 2)
    assert status == 1 and "a worker process was killed" in errors.splitlines()[-1] and "Traceback" not in errors
    monkeypatch.setattr(data, "prepare_image", PREPARE_IMAGE)
    assert data.prepare("folder", forty, tmp_path / "out", size=32, workers=2)["taken"] == 34


@pytest.mark.slow  # starts Python
def test_ctrl_c_ends_all_processes_without_a_word_of_theirs(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture(root, np.random.default_rng(0).integers(0, 255, (1500, 1500), dtype=np.uint8), name="0.png")
    for i in range(1, 200):
        os.link(root / "0.png", root / f"{i}.png")
    for wait in (0.0, 0.5):
        process = subprocess.Popen([sys.executable, ROOT / "data.py", "prepare", "folder", root,
                                    tmp_path / f"out{wait}", "--workers", "3"],
                                   stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        while not (tmp_path / f"out{wait}/images").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors and "Error" not in errors
        assert errors.splitlines()[-1] == "interrupted; the same command continues from here"
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_file_names_that_are_no_utf8(tmp_path):
    root = os.fsencode(tmp_path / "root")
    os.makedirs(root + b"/caf\xe9")
    picture(tmp_path, RAMP, name="x.png")
    for name in (b"/caf\xe9/\xff.png", b"/caf\xe9/b.png"):
        shutil.copy(tmp_path / "x.png", root + name)
    open(root + b"/caf\xe9/\xfe.png", "w").close()
    assert data.prepare("folder", tmp_path / "root", tmp_path / "out", size=32) == {"taken": 2, "rejected": 1,
                                                                                    "missing": 0}
    assert [row["path"] for row in read_rows(tmp_path / "out.rejected.csv")] == [r"caf\xe9/\xfe.png"]


def test_an_unreadable_folder_is_rejected_by_name(tmp_path, monkeypatch):
    (tmp_path / "root/closed").mkdir(parents=True)
    picture(tmp_path / "root", RAMP, name="a.png")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert data.prepare("folder", tmp_path / "root", tmp_path / "out", size=32) == {"taken": 1, "rejected": 1,
                                                                                    "missing": 0}
    assert read_rows(tmp_path / "out.rejected.csv") == [{"path": "closed", "reason": "a folder that cannot be read"}]


@pytest.mark.parametrize("key", ["", "\n", "ab" * 31, "zz" * 32, "ab" * 33, "\0" * 64])
def test_a_key_that_is_none_is_refused(forty, tmp_path, key):
    (tmp_path / "out.key").write_text(key)
    with pytest.raises(InputError, match="out.key: not a key of 64 hexadecimal digits"):
        data.prepare("folder", forty, tmp_path / "out", size=32)


def test_every_file_is_in_one_table(forty, tmp_path):
    data.prepare("folder", forty, tmp_path / "out", size=32)
    rejected = [row["path"] for row in read_rows(tmp_path / "out.rejected.csv")]
    assert len(read_rows(tmp_path / "out/rejected.csv")) == 6 and rejected == [f"{i:02}.png" for i in range(0, 40, 7)]
    assert len(read_rows(tmp_path / "out/index.csv")) + len(rejected) == 40


def test_names_in_a_hospitals_paths_and_tags_are_hashed_with_a_key(tmp_path):
    root = tmp_path / "root"
    (root / "Doe^Jane").mkdir(parents=True)
    write_dicom(root / "Doe^Jane/a.dcm", RAMP, PatientName="Doe^Jane", PatientBirthDate="19500101",
                AccessionNumber="A77")
    write_dicom(root / "Doe^Jane/b.dcm", RAMP)
    write_dicom(root / "Doe^Jane/c.dcm", RAMP, Modality="CT")
    (root / "Doe^Jane/d.dcm").write_bytes((root / "Doe^Jane/b.dcm").read_bytes()[:3000])
    for out in ("one", "two"):
        data.prepare("folder", root, tmp_path / out, size=64)
    one, two = (read_index(tmp_path / out) for out in ("one", "two"))
    assert one[0]["patient"] == one[1]["patient"] != two[0]["patient"]      # one patient; another key, another name
    everything = b"".join(name.encode() + content for name, content in tree(tmp_path / "one").items())
    for secret in (b"Doe", b"secret name", b"19500101", b"A77"):
        assert secret not in everything
    assert [row["path"] for row in read_rows(tmp_path / "one.rejected.csv")] == ["Doe^Jane/c.dcm", "Doe^Jane/d.dcm"]
    assert (tmp_path / "one.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("record, expected", [
    ({"edema": "positive"}, {"edema": "positive", "no_finding": "negative"}),
    ({"edema": "positive", "no_finding": "positive"}, {"edema": "positive", "no_finding": "negative"}),
    # contradiction
    ({"edema": "positive", "lung_opacity": "negative"}, {"edema": "positive", "no_finding": "negative"}),
    # parent against child
    ({"cardiomegaly": "negative", "enlarged_cardiomediastinum": "negative"},) * 2,
    ({"support_devices": "positive"}, {"support_devices": "positive"}),
    ({"edema": "negative"}, {"edema": "negative"}), ({}, {}),
    ({"no_finding": "positive", "support_devices": "positive"},
     {f: "negative" for f in fields.FINDINGS} | {"no_finding": "positive", "support_devices": "positive"})])
def test_the_label_policy(record, expected):
    assert fields.resolve_labels(record) == expected


def test_the_master_csv_loads_unchanged(tmp_path):
    row = ["PadChest", "images/PadChest/1.png", "P1", "63.0", "F", "U", "LATERAL", "valid", *(["0.0"] * 12), "2", "1"]
    cli.write_csv(tmp_path / "CXR7-1M.csv", COLUMNS, [row])
    assert read_index(tmp_path / "CXR7-1M.csv") == [
        {"dataset": "PadChest", "age": 63.0, "sex": "female", "view": "LATERAL", "path": "images/PadChest/1.png",
         "patient": "P1",
         "split": "valid", "fracture": "positive", "support_devices": "negative"}]


def test_an_output_inside_the_source_is_refused(tmp_path):
    picture(tmp_path, RAMP, name="a.png")
    with pytest.raises(InputError, match="lies inside"):
        data.prepare("folder", tmp_path, tmp_path / "out", size=64)


def test_labels_of_a_reports_only_source_come_from_a_csv(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture(root, RAMP, name="a.png")
    cli.write_csv(tmp_path / "labels.csv", ["name", *fields.LABELS], [["a.png", *[""] * 5, "1.0", "-1", "0",
                                                                       *[""] * 6]])
    data.prepare("folder", root, tmp_path / "out", size=64, labels=tmp_path / "labels.csv")
    record = read_index(tmp_path / "out")[0]
    assert {k: v for k, v in record.items() if k in fields.FINDINGS} == {
        "edema": "positive", "pneumonia": "negative", "no_finding": "negative"}
    cli.write_csv(tmp_path / "short.csv", ["name"], [["a.png"]])
    with pytest.raises(InputError, match="no column Atelectasis"):
        data.prepare("folder", root, tmp_path / "out2", labels=tmp_path / "short.csv")
    cli.write_csv(tmp_path / "others.csv", ["name", *fields.LABELS], [["b.png", *["1"] * 14]])
    with pytest.raises(InputError, match="no name in the table of labels is an image's; the first .* is 'a.png'"):
        data.prepare("folder", root, tmp_path / "out2", labels=tmp_path / "others.csv")


def test_stats_count_every_value(tmp_path, command):
    rows = [{"path": "a.png", "patient": "p", "split": "train", "age": 39.5, "dataset": "own", "sex": "male",
             "edema": "positive"},
            {"path": "b.png", "patient": "q", "split": "test", "age": 40.0, "dataset": "BRAX", "sex": "male"}]
    cli.write_csv(tmp_path / "index.csv", COLUMNS, map(index_row, rows))
    table = data.statistics([tmp_path])
    assert table["sex", "male"] == {"own": 1, "BRAX": 1} and table["age", "30-39"] == {"own": 1}
    assert table["edema", "positive"] == {"own": 1} and table["edema", "unknown"] == {"BRAX": 1}
    assert sum(counts.total() for counts in table.values()) == 2 * 19
    status, output, _ = command("data.py", "stats", tmp_path, "--out", tmp_path / "stats.png")
    assert status == 0 and [line.split() for line in output.splitlines()
                            if line.startswith("sex")] == [["sex", "male", "2", "1", "1"]]
    assert Image.open(tmp_path / "stats.png").size[0] > 1000


def test_a_prepared_folder_is_not_prepared_in_another_way(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture(root, RAMP, name="a.png")
    data.prepare("folder", root, tmp_path / "out", size=64)
    before = (tmp_path / "out/index.csv").read_bytes()
    for change, message in (({"size": 96}, "size = 64, not 96"), ({"size": 64, "metadata_only": True},
                                                                  "metadata_only = False, not True")):
        with pytest.raises(InputError, match=message):
            data.prepare("folder", root, tmp_path / "out", **change)
    with pytest.raises(InputError, match="lies around"):
        data.prepare("folder", root, tmp_path, size=64)
    assert (tmp_path / "out/index.csv").read_bytes() == before


def test_a_label_that_is_none_is_refused_by_line(tmp_path):
    cli.write_csv(tmp_path / "labels.csv", ["name", *fields.LABELS], [["a.png", *["1"] * 14], ["b.png", "maybe",
                                                                                               *[""] * 13]])
    with pytest.raises(InputError, match="line 3: No Finding is 'maybe'; accepted: 1 positive"):
        data.read_labels(tmp_path / "labels.csv")


def test_images_beside_an_index_are_counted(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture(root, RAMP, name="a.png")
    picture(root, RAMP, name="b.png")
    write_index(root)
    assert data.prepare("folder", root, tmp_path / "out", size=64) == {"taken": 1, "rejected": 1, "missing": 0}
    assert [row["path"] for row in read_rows(tmp_path / "out.rejected.csv")] == ["b.png"]


def test_synthetic_images_are_counted_and_stay_marked(tmp_path, monkeypatch, capsys):
    """A PNG as sample.py writes it, a DICOM file with Synthetic Data YES, and two real ones beside them."""
    root = tmp_path / "root"
    root.mkdir()
    image = torch.from_numpy(RAMP / 127.5 - 1)[None]
    picture(root, RAMP, name="a.png")
    pixels.save_image(image, root / "b.png", {"Synthetic": "yes"})
    dicom.write(root / "c.dcm", image, {}, "demo", 0)
    write_dicom(root / "d.dcm", RAMP)
    monkeypatch.setattr(sys, "argv", ["data.py", "prepare", "folder", str(root), str(tmp_path / "out"), "--size", "64",
                                      "--workers", "1"])
    data.main()
    said = capsys.readouterr()
    assert "4 images" in said.out and [line for line in said.err.splitlines() if "warning" in line] == [
        "warning: 2 of these images say that they are synthetic. The index does not tell them from real ones, only the "
        "text field "
        "Synthetic of their PNGs does: prepare them apart from real images"]
    paths = [tmp_path / "out" / record["path"] for record in read_index(tmp_path / "out")]
    assert [pixels.is_synthetic(path) for path in paths] == [False, True, True, False]
