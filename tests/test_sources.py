"""Each source in its own layout, a few rows with the traps that the real tables hold, harmonised by hand."""
import csv
import gzip
import json
import os

import numpy as np
import pytest
from pictures import write_dicom
from PIL import Image

import data
from common import cli
from radiographs import fields, sources, terms
from radiographs.files import Download, walk
from radiographs.index import read_index, stable_split

RAMP = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
BLANK = dict.fromkeys(fields.LABELS, "")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    RAMP.save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def mimic(root):
    base = root / "physionet.org/files/mimic-cxr-jpg/2.0.0"
    row = {"dicom_id": "aa", "subject_id": "10000032", "study_id": "500", "ViewPosition": "LL", "StudyDate": "21800506"}
    write_rows(base / "mimic-cxr-2.0.0-metadata.csv", row, row | {"dicom_id": "bb", "ViewPosition": ""},
               row | {"dicom_id": "cc", "subject_id": "11000033", "study_id": "501", "ViewPosition": "AP"})
    write_rows(base / "mimic-cxr-2.0.0-chexpert.csv",
               {"subject_id": "10000032", "study_id": "500"} | BLANK | {"Edema": "1.0", "Pneumonia": "-1.0",
                                                                        "Fracture": "0.0"})
    write_rows(base / "mimic-cxr-2.0.0-split.csv", *({"dicom_id": d, "split": s} for d, s in
                                                     (("aa", "train"), ("bb", "train"), ("cc", "validate"))))
    write_rows(root / "mimiciv/patients.csv", {"subject_id": "10000032", "gender": "F", "anchor_age": "52",
                                               "anchor_year": "2178"})
    races = ("UNKNOWN", "BLACK/AFRICAN AMERICAN", "BLACK/CAPE VERDEAN", "WHITE")
    write_rows(root / "mimiciv/admissions.csv",
               *({"subject_id": "10000032", "hadm_id": str(i), "race": race} for i, race in enumerate(races)))
    image(base / "files/p10/p10000032/s500/aa.jpg")
    image(base / "files/p10/p10000032/s500/bb.jpg")
    known = {"patient": "MIMIC10000032", "age": 54, "sex": "female", "race": "black", "split": "train",
             "dataset": "MIMIC-CXR",
             "edema": "positive", "fracture": "negative", "no_finding": "negative"}
    return [known | {"view": "LATERAL"}, known, None]


def chexpert(root):
    row = {"path_to_image": "train/patient1/study1/view1_frontal.jpg", "frontal_lateral": "Frontal", "ap_pa": "AP",
           "deid_patient_id": "patient1", "age": "63.0", "sex": "Male", "race": "White, non-Hispanic", "split": "train",
           "report": "secret text"}
    lateral = row | {"path_to_image": "valid/patient2/study1/view2_lateral.jpg", "frontal_lateral": "Lateral",
                     "ap_pa": "",
                     "deid_patient_id": "patient2", "split": "valid", "race": "Unknown", "sex": "Unknown"}
    write_rows(root / "df_chexpert_plus_240401.csv", row, lateral)
    labels = {"path_to_image": row["path_to_image"]} | dict.fromkeys(fields.LABELS) | {"No Finding": 1.0,
                                                                                       "Support Devices": 1.0}
    write(root / "chexbert_labels/report_fixed.json", json.dumps(labels) + "\n")
    write(root / "chexbert_labels/findings_fixed.json", json.dumps(labels | {"Edema": 1.0}) + "\n")
    image(root / "PNG/train/patient1/study1/view1_frontal.png")
    image(root / "PNG/valid/patient2/study1/view2_lateral.png")
    negative = {f: "negative" for f in fields.FINDINGS} | {"no_finding": "positive", "support_devices": "positive"}
    return [{"patient": "CXPpatient1", "age": 63, "sex": "male", "race": "white", "view": "AP", "split": "train",
             "dataset": "CheXpert-Plus"} | negative,
            {"patient": "CXPpatient2", "age": 63, "view": "LATERAL", "split": "valid", "dataset": "CheXpert-Plus"}]


def chexpert_2019(root):
    row = {"Path": "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", "Sex": "Unknown", "Age": "0",
           "Frontal/Lateral": "Frontal", "AP/PA": "LL"} | BLANK | {"Pleural Effusion": "1.0", "No Finding": "1.0"}
    write_rows(root / "CheXpert-v1.0-small/train.csv", row)
    write_rows(root / "CheXpert-v1.0-small/valid.csv",
               row | {"Path": "CheXpert-v1.0-small/valid/patient00002/study1/view1_lateral.jpg",
                                                              "Frontal/Lateral": "Lateral", "AP/PA": "",
                                                              "Sex": "Female", "Age": "33"})
    image(root / "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg")
    both = {"dataset": "CheXpert-Plus", "view": "LATERAL", "pleural_effusion": "positive", "no_finding": "negative"}
    return [both | {"patient": "CXPpatient00001", "split": "train"}, None]


def padchest(root):
    row = {"ImageID": "1_a.png", "ImageDir": "0", "PatientID": "77", "PatientBirth": "1950.0", "PatientSex_DICOM": "F",
           "StudyDate_DICOM": "20140915", "Projection": "AP_horizontal", "Report": "informe secreto",
           "Labels": "['pleural effusion', ' NSG tube', 'loc right']"}
    write_rows(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", row,
               row | {"ImageID": "2_b.png", "Labels": "['normal']", "Projection": "L", "PatientBirth": ""},
               row | {"ImageID": "3_c.png", "Labels": "['exclude']"}, row | {"ImageID": "4_d.png", "Labels": "",
                                                                             "Projection": "COSTAL"},
               row | {"ImageID": "5_e.png", "Labels": "['scoliosis ', 'hydropneumothorax']", "Projection": "PA"})
    for name in ("0/1_a.png", "1/2_b.png", "1/3_c.png", "54/4_d.png"):
        image(root / name)
    known = {"patient": "PAD77", "sex": "female", "dataset": "PadChest", "split": stable_split("PAD77")}
    return [known | {"age": 64, "view": "AP", "pleural_effusion": "positive", "support_devices": "positive",
                     "no_finding": "negative"},
            known | {"view": "LATERAL"} | {f: "negative" for f in fields.FINDINGS
                                           if f != "support_devices"} | {"no_finding": "positive"},
            "labelled exclude", known | {"age": 64}, None]


def rexgradient(root):
    study = {"PatientID": "p9", "PatientSex": "F", "PatientAge": "057Y", "StudyDate": "20200101",
             "Findings": "secret text",
             "ImagePath": ["../deid_png/g/p9/1.png", "../deid_png/g/p9/2.png"],
             "ImageViewPosition": ["POSTERO_ANTERIOR", None]}
    write(root / "metadata/train_metadata_view_position.json", json.dumps({"s1": study}))
    for split in ("valid", "test"):
        write(root / f"metadata/{split}_metadata_view_position.json", json.dumps({}))
    image(root / "deid_png/g/p9/1.png")
    image(root / "deid_png/g/p9/2.png")
    known = {"patient": "REXp9", "age": 57, "sex": "female", "split": "train", "dataset": "ReXGradient"}
    return [known | {"view": "PA"}, known]


def brax(root):
    row = {"PngPath": "images/id_1/Study_1/Series_1/image-1.png", "PatientID": "1", "PatientSex": "M",
           "PatientAge": "85 or more",
           "AccessionNumber": "secret number", "ViewPosition": "LT-DECUB"} | BLANK | {"Cardiomegaly": "1",
                                                                                      "Edema": "-1"}
    write_rows(root / "master_spreadsheet_update.csv", row,
               row | {"PngPath": "images/id_2/Study_2/Series_1/image-2.png",
                                                                   "PatientID": "2", "ViewPosition": "RL",
                                                                   "PatientAge": "40"})
    image(root / "images/id_1/Study_1/Series_1/image-1.png")
    image(root / "images/id_2/Study_2/Series_1/image-2.png")
    known = {"sex": "male", "dataset": "BRAX", "cardiomegaly": "positive", "no_finding": "negative"}
    return [known | {"patient": "BRAX1", "age": 85, "split": stable_split("BRAX1")},
            known | {"patient": "BRAX2", "age": 40, "view": "LATERAL", "split": stable_split("BRAX2")}]


def vindr(root):
    terms = dict.fromkeys(("Nodule/Mass", "Pleural effusion", "Calcification", "No finding"), "0")
    write_rows(root / "annotations/image_labels_train.csv", *(
        {"image_id": "x", "rad_id": f"R{i}"} | terms | {"Nodule/Mass": "1" if i < 2 else "0", "Pleural effusion": "1"
                                                        if i < 1 else "0"}
        for i in range(3)))
    write_rows(root / "annotations/image_labels_test.csv", {"image_id": "y"} | terms | {"No finding": "1"})
    image(root / "train/x.dicom")
    image(root / "test/y.dicom")
    # A normal aorta does not say that the mediastinum is; "No finding" does, by the policy for all sources.
    asked = {f: "negative" for f in fields.FINDINGS if f not in ("support_devices", "enlarged_cardiomediastinum")}
    known = {"view": "PA", "dataset": "VinDr-CXR"}
    return [known | asked | {"patient": "VINx", "split": stable_split("VINx", 0.1, 0), "lung_lesion": "positive"},
            known | asked | {"patient": "VINy", "split": "test", "no_finding": "positive",
                             "enlarged_cardiomediastinum": "negative"}]


@pytest.mark.parametrize("make", [mimic, chexpert, chexpert_2019, padchest, rexgradient, brax, vindr],
                         ids=lambda make: make.__name__)
def test_a_source_is_harmonised_by_hand(tmp_path, make):
    expected = make(tmp_path / "root")
    name = make.__name__.removesuffix("_2019")
    counts = data.prepare(name, tmp_path / "root", tmp_path / "out", size=32)
    assert counts == {"taken": sum(isinstance(e, dict) for e in expected),
                      "rejected": sum(isinstance(e, str) for e in expected),
                      "missing": expected.count(None)}
    records = read_index(tmp_path / "out")
    for record in records:
        assert (tmp_path / "out" / record.pop("path")).is_file()
    assert records == [e for e in expected if isinstance(e, dict)]
    assert len({(r["patient"], r["split"]) for r in records}) == len({r["patient"] for r in records})
    tables = (tmp_path / "out/index.csv").read_text() + (tmp_path / "out/rejected.csv").read_text()
    assert "secret" not in tables
    assert [row["reason"] for row in csv.DictReader(open(tmp_path / "out/rejected.csv"))] == [e for e in expected
                                                                                              if isinstance(e, str)]
    # Without touching images, every row of the tables is in the index.
    counts = data.prepare(name, tmp_path / "root", tmp_path / "all", metadata_only=True)
    assert counts["taken"] == sum(not isinstance(e, str)
                                  for e in expected) and not list((tmp_path / "all/images").iterdir())


def test_a_table_of_another_form_is_refused_in_one_line(tmp_path, command):
    write(tmp_path / "root/master_spreadsheet_update.csv", "PngPath,PatientID\nimages/a.png,1\n")
    status, _, errors = command("data.py", "prepare", "brax", tmp_path / "root", tmp_path / "out")
    assert status == 2 and len(errors.splitlines()) == 1
    assert "master_spreadsheet_update.csv: no column 'PatientAge'" in errors
    status, _, errors = command("data.py", "prepare", "padchest", tmp_path / "root", tmp_path / "out")
    assert status == 2 and "no PADCHEST_chest_x_ray_images_labels_160K*.csv" in errors


def test_an_image_that_no_row_names_is_in_the_rejected(tmp_path):
    brax(tmp_path / "root")
    image(tmp_path / "root/images/id_3/Study_1/image-9.png")
    image(tmp_path / "root/images/id_3/preview.jpg")                 # another kind than the tables name: not an input
    assert data.prepare("brax", tmp_path / "root", tmp_path / "out", size=32) == {"taken": 2, "rejected": 1,
                                                                                  "missing": 0}
    assert (tmp_path / "out/rejected.csv").read_text().splitlines()[1:] == [
        "images/id_3/Study_1/image-9.png,\"no row of the tables names it, or another file of this name was taken\""]


# --- downloads as they lie on disks -----------------------------------------------------------------------

def prepared(name, tmp_path, **options):
    """The counts and the index of a source below tmp_path/root."""
    counts = data.prepare(name, tmp_path / "root", tmp_path / "out", size=32, **options)
    return dict(counts), read_index(tmp_path / "out")


def test_chexpert_as_its_archives_unpack(tmp_path):
    """CheXpert v1.0 in batches: no folder is called train."""
    row = {"Path": "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg", "Sex": "Male", "Age": "57",
           "Frontal/Lateral": "Frontal", "AP/PA": "AP"} | BLANK
    base = tmp_path / "root/chexpertchestxrays-u20210408"
    write_rows(base / "CheXpert-v1.0 batch 1 (validate & csv)/train.csv", row,
               row | {"Path": "CheXpert-v1.0/train/patient00002/study1/view1_frontal.jpg"})
    write_rows(base / "CheXpert-v1.0 batch 1 (validate & csv)/valid.csv",
               row | {"Path": "CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg"})
    image(base / "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg")
    image(base / "CheXpert-v1.0 batch 3 (train 2)/patient00002/study1/view1_frontal.jpg")
    image(base / "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient64541/study1/view1_frontal.jpg")
    counts, records = prepared("chexpert", tmp_path)
    assert counts == {"taken": 3, "rejected": 0, "missing": 0}
    assert [r["patient"] for r in records] == ["CXPpatient00001", "CXPpatient00002", "CXPpatient64541"]


@pytest.mark.parametrize("suffix", [".dcm", ".dicom", ".DCM", ".PNG", ".jpeg", ".jpg"])
@pytest.mark.parametrize("make", [mimic, chexpert, padchest, brax], ids=lambda make: make.__name__)
def test_an_image_is_found_whatever_its_ending(tmp_path, make, suffix):
    expected = make(tmp_path / "root")
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        path.unlink()
        if suffix.lower() in (".dcm", ".dicom"):
            write_dicom(path.with_suffix(suffix), np.asarray(RAMP))
        else:
            image(path.with_suffix(suffix))
    counts = data.prepare(make.__name__, tmp_path / "root", tmp_path / "out", size=32)
    assert counts["taken"] == sum(isinstance(e, dict) for e in expected) and counts["missing"] == expected.count(None)


def test_dicom_is_found_by_its_own_column(tmp_path):
    brax(tmp_path / "root")
    write_dicom(tmp_path / "root/other.dcm", np.asarray(RAMP))
    for name, column, path in (("brax", "DicomPath", "Anonymized_DICOMs/id_1/Study_1/Series_1/scan.dcm"),
                               ("chexpert", "path_to_dcm", "train/patient1/study1/scan.dcm")):
        root = tmp_path / name / "root"
        (brax if name == "brax" else chexpert)(root)
        for file in root.rglob("*.png"):
            file.unlink()
        [table] = root.rglob("master*.csv") if name == "brax" else root.rglob("df_*.csv")
        first, *rows = table.read_text().splitlines()
        table.write_text("\n".join([f"{column},{first}", f"{path},{rows[0]}",
                                    *(f"nothing.dcm,{row}" for row in rows[1:])]))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        write_dicom(root / path, np.asarray(RAMP))
        counts, records = prepared(name, tmp_path / name)
        assert counts == {"taken": 1, "rejected": 0, "missing": 1}


def test_links_are_followed_and_lead_in_no_circle(tmp_path):
    padchest(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    for name in ("0", "1", "54", "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere/1/around").symlink_to(tmp_path / "elsewhere/1")
    (tmp_path / "root/up").symlink_to(tmp_path)
    (tmp_path / "root/again").symlink_to(tmp_path / "elsewhere/0")
    (tmp_path / "root/nowhere").symlink_to(tmp_path / "nowhere")
    assert prepared("padchest", tmp_path)[0] == {"taken": 3, "rejected": 1, "missing": 1}
    unreadable = []
    files = list(walk(tmp_path / "root", unreadable))
    assert len(files) == len({os.path.realpath(file) for file in files}) == 6 and not unreadable


def test_no_image_at_all_is_a_failed_run_that_says_what_it_looked_for(tmp_path, command):
    brax(tmp_path / "root")
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    status, _, errors = command("data.py", "prepare", "brax", tmp_path / "root", tmp_path / "out")
    assert status == 1 and f"{tmp_path}/root" in errors
    assert "id_1/Study_1/Series_1/image-1" in errors and ".dicom" in errors
    assert len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()
    (tmp_path / "root/images/id_1/Study_1/Series_1/image-1.png").write_text("no image")
    status, _, errors = command("data.py", "prepare", "brax", tmp_path / "root", tmp_path / "out")
    assert status == 1 and "no image was taken: 1 rejected" in errors.splitlines()[-1]


@pytest.mark.parametrize("beside", ["Data_Entry_2017.csv:Zone.Identifier", "Data_Entry_2018.csv.part",
                                    "Data_Entry_2019.csv.zip",
                                    "._Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv.gz.crdownload"])
def test_what_lies_beside_a_table_is_not_it(tmp_path, beside):
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("the table")
    (tmp_path / "Data_Entry_2017.csv").write_text("an older one")
    (tmp_path / beside).write_text("no table")
    (tmp_path / "Data_Entry_2020.csv").mkdir()
    assert Download(tmp_path).table("Data_Entry_20*.csv").read_text() == "the table"


def test_two_rows_of_one_file_name_keep_two_images(tmp_path):
    """BRAX's names repeat in other folders; one path in two rows is one image of one patient, and the second is
    refused."""
    row = {"PatientSex": "M", "PatientAge": "40", "ViewPosition": "PA"} | BLANK
    paths = ["images/id_1/Study_1/Series_1/image.png", "images/id_2/Study_2/Series_1/image.png",
             "images/id_2/Study_2/Series_1/image.png"]
    write_rows(tmp_path / "root/master_spreadsheet_update.csv",
               *(row | {"PngPath": path, "PatientID": str(i)} for i, path in enumerate(paths)))
    for i, path in enumerate(paths[:2]):
        (tmp_path / "root" / path).parent.mkdir(parents=True)
        Image.fromarray(np.roll(np.asarray(RAMP), 1000 * i)).save(tmp_path / "root" / path)
    counts, records = prepared("brax", tmp_path, workers=2)
    assert counts == {"taken": 2, "rejected": 1, "missing": 0}
    one, two = (Image.open(tmp_path / "out" / record["path"]).tobytes() for record in records)
    assert one != two and [record["patient"] for record in records] == ["BRAX0", "BRAX1"]
    assert "listed twice" in (tmp_path / "out/rejected.csv").read_text()


def test_long_paths_become_names_that_a_file_system_takes():
    path = "GRDN/" + "/".join(["1.2.826.0.1.3680043.8.498." + "7" * 39] * 3) + ".png"
    assert len(sources.path_name(path)) < 150 and sources.path_name(path) != sources.path_name("x" + path)
    assert sources.path_name("a/b/c.png") == "a_b_c"


# --- words ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, race", [
    ("White or Caucasian", "white"), ("CAUCASIAN", "white"), ("WHITE - RUSSIAN", "white"),
    ("White, non-Hispanic", "white"),
    ("Black or African American", "black"), ("BLACK/CAPE VERDEAN", "black"), ("ASIAN - SOUTH EAST ASIAN", "asian"),
    ("Asian, Hispanic", "asian"), ("Eurasian", None), ("Non-white", None), ("not Black", None),
    ("White and Asian", None), ("Other than white", None), ("Not White or Caucasian", None), ("half white", None),
    ("Other race (not white)", None), ("No, not Black", None), ("North African", None), ("South African", None),
    ("White - South African", "white"), ("Afro-Caribbean", "black"), ("Non Hispanic White", "white"),
    ("Not Hispanic or Latino, White", "white"), ("White, not of Hispanic/Latino origin", "white"),
    ("American Indian/Alaska Native", None), ("HISPANIC/LATINO - DOMINICAN", None), ("Blackfoot", None), ("", None),
    (None, None)])
def test_races_are_read_by_words(text, race):
    assert sources.race_of(text) == race


@pytest.mark.parametrize("words, labels", [
    (["unchanged"], {}), (["pacemaker"], {"support_devices": "positive"}),
    (["nsg tube"], {"support_devices": "positive"}),
    (["sternotomy"], {}), (["suture material", "mastectomy", "obesity", "nipple shadow"], {}), (["a new term"], {}),
    ([], {}),
    (["normal"], {"no_finding": "positive"}), (["normal", "unchanged"], {"no_finding": "positive"}),
    (["scoliosis"], {"no_finding": "negative"}), ([" Scoliosis ", "pacemaker"], {"no_finding": "negative",
                                                                                 "support_devices": "positive"}),
    (["normal", "kyphosis"], {"no_finding": "negative"}), (["nodule"], {"no_finding": "negative",
                                                                        "lung_lesion": "positive"})])
def test_only_findings_speak_against_no_finding(words, labels):
    assert terms.labels_of(words, terms.PADCHEST_TERMS) == labels


def test_vindr_s_aorta_answers_no_question_but_its_own():
    assert "aortic enlargement" not in terms.VINDR_ASKED
    assert terms.labels_of(["aortic enlargement"], terms.VINDR_TERMS) == {
        "enlarged_cardiomediastinum": "positive", "no_finding": "negative"}


# --- tables as they are downloaded ------------------------------------------------------------------------

def test_rexgradient_keeps_images_without_views(tmp_path):
    study = {"PatientID": "p", "PatientSex": "M", "PatientAge": "040Y", "ImagePath": [f"../deid_png/g/p/{i}.png"
                                                                                      for i in range(3)]}
    studies = {"a": study | {"ImageViewPosition": ["PA"]}, "b": study | {"ImageViewPosition": None,
                                                                         "ImagePath": ["../deid_png/g/p/3.png"]},
               "c": study | {"ImageViewPosition": [], "ImagePath": None},
               "d": study | {"ImageViewPosition": "AP", "ImagePath": "../deid_png/g/p/4.png"},
               "e": study | {"ImageViewPosition": ["PA", "AP"], "ImagePath": [None, "../deid_png/g/p/5.png"]}}
    for split in ("train", "valid", "test"):
        write(tmp_path / f"root/{split}_metadata_view_position.json", json.dumps(studies if split == "train" else []))
    for i in range(6):
        image(tmp_path / f"root/deid_png/g/p/{i}.png")
    counts, records = prepared("rexgradient", tmp_path)
    assert counts["taken"] == 6
    assert [record.get("view") for record in records] == ["PA", None, None, None, "AP", "AP"]


@pytest.mark.parametrize("content", ["3", "[3]", '{"a": {"PatientID": "p"}}', "[" * 100_000, "", "{",
                                     '[{"PatientID": null}]'])
def test_rexgradient_s_damaged_json_is_named(tmp_path, content):
    rexgradient(tmp_path / "root")
    [table] = tmp_path.rglob("train_metadata_view_position.json")
    table.write_text(content)
    with pytest.raises(cli.InputError, match="train_metadata_view_position.json"):
        prepared("rexgradient", tmp_path)


def test_mimic_iv_1_and_a_foreign_table_of_its_name(tmp_path, capsys):
    """The older name of a column is read; a table that a source can do without does not stop it."""
    mimic(tmp_path / "root")
    table = tmp_path / "root/mimiciv/admissions.csv"
    table.write_text(table.read_text().replace("race", "ethnicity"))
    assert prepared("mimic", tmp_path)[1][0]["race"] == "black"
    table.write_text("subject_id,insurance\n10000032,Other\n")
    data.prepare("mimic", tmp_path / "root", tmp_path / "other", size=32)
    assert "race" not in read_index(tmp_path / "other")[0]
    assert f"warning: {table} is left out" in capsys.readouterr().err


CHANGES = [lambda text: text.rstrip()[:-12].encode(), lambda text: gzip.compress(text.encode())[:-20],
           lambda text: b"<!DOCTYPE html><title>Log in</title>", lambda text: b"", lambda text: text.encode() + b"\0\0",
           lambda text: (text + "x" * 200_000).encode(), lambda text: text.encode("utf-16")[:-1]]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [mimic, padchest, brax], ids=lambda make: make.__name__)
def test_a_damaged_table_is_one_line_that_names_it(tmp_path, command, make, change):
    make(tmp_path / "root")
    table = max(tmp_path.rglob("*.csv"), key=lambda path: ("metadata" in path.name, path.name))
    table.write_bytes(change(table.read_text()))
    status, _, errors = command("data.py", "prepare", make.__name__, tmp_path / "root", tmp_path / "out", "--workers",
                                1)
    assert status == 2 and str(table) in errors and len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", ["['normal'", "['a' 'b', ", "[" * 5000, "[1/0]", "[open('x')]"])
def test_a_list_of_terms_that_is_none_is_named_by_line(tmp_path, labels):
    padchest(tmp_path / "root")
    [table] = tmp_path.rglob("PADCHEST*.csv")
    rows = list(csv.DictReader(open(table)))
    rows[2]["Labels"] = labels
    write_rows(table, *rows)
    with pytest.raises(cli.InputError, match=r"160K_01.02.19.csv, line 4: Labels is not a list of terms"):
        prepared("padchest", tmp_path)


@pytest.mark.parametrize("path", ["../../etc/passwd.png", "/etc/passwd.png"])
def test_no_path_of_a_table_leaves_its_root(tmp_path, path):
    brax(tmp_path / "root")
    table = tmp_path / "root/master_spreadsheet_update.csv"
    table.write_text(table.read_text().replace("images/id_1/Study_1/Series_1/image-1.png", path))
    with pytest.raises(cli.InputError, match="leaves its root"):
        data.prepare("brax", tmp_path / "root", tmp_path / "out", size=32)
    mimic(tmp_path / "other")
    for table in (tmp_path / "other").rglob("mimic-cxr-2.0.0-*.csv"):
        table.write_text(table.read_text().replace("aa", path.removesuffix(".png")))
    with pytest.raises(cli.InputError, match="leaves its root|not a plain file name"):
        data.prepare("mimic", tmp_path / "other", tmp_path / "out", size=32)
    assert not (tmp_path / "out").exists()


def test_damaged_tags_do_not_stop_a_run(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x10\x00\x20\x00LO\xff\xff rubbish")
    image(tmp_path / "root/b.png")
    assert data.prepare("folder", tmp_path / "root", tmp_path / "out", size=32) == {"taken": 1, "rejected": 1,
                                                                                    "missing": 0}


@pytest.mark.parametrize("table", [terms.NIH_TERMS, terms.VINDR_TERMS, terms.PADCHEST_TERMS])
def test_every_term_leads_to_one_of_the_14_labels(table):
    labels = {label for joined in table.values() for label in joined.split("|") if label}
    assert labels <= set(fields.LABELS) and all(term == term.strip().lower() for term in table)
