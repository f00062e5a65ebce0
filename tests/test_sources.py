"""Each source in its own layout, a few rows with the traps that the real tables hold, harmonised by hand."""
import csv
import json

import numpy as np
import pytest
from PIL import Image

import data
from common import cli
from radiographs import fields, terms
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
               {"subject_id": "10000032", "study_id": "500"} | BLANK | {"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"})
    write_rows(base / "mimic-cxr-2.0.0-split.csv", *({"dicom_id": d, "split": s} for d, s in
                                                     (("aa", "train"), ("bb", "train"), ("cc", "validate"))))
    write_rows(root / "mimiciv/patients.csv", {"subject_id": "10000032", "gender": "F", "anchor_age": "52", "anchor_year": "2178"})
    write_rows(root / "mimiciv/admissions.csv", *({"subject_id": "10000032", "hadm_id": str(i), "race": race} for i, race in
                                                  enumerate(("UNKNOWN", "BLACK/AFRICAN AMERICAN", "BLACK/CAPE VERDEAN", "WHITE"))))
    image(base / "files/p10/p10000032/s500/aa.jpg")
    image(base / "files/p10/p10000032/s500/bb.jpg")
    known = {"patient": "MIMIC10000032", "age": 54, "sex": "female", "race": "black", "split": "train", "dataset": "MIMIC-CXR",
             "edema": "positive", "fracture": "negative", "no_finding": "negative"}
    return [known | {"view": "LATERAL"}, known, None]


def chexpert(root):
    row = {"path_to_image": "train/patient1/study1/view1_frontal.jpg", "frontal_lateral": "Frontal", "ap_pa": "AP",
           "deid_patient_id": "patient1", "age": "63.0", "sex": "Male", "race": "White, non-Hispanic", "split": "train",
           "report": "secret text"}
    lateral = row | {"path_to_image": "valid/patient2/study1/view2_lateral.jpg", "frontal_lateral": "Lateral", "ap_pa": "",
                     "deid_patient_id": "patient2", "split": "valid", "race": "Unknown", "sex": "Unknown"}
    write_rows(root / "df_chexpert_plus_240401.csv", row, lateral)
    labels = {"path_to_image": row["path_to_image"]} | dict.fromkeys(fields.LABELS) | {"No Finding": 1.0, "Support Devices": 1.0}
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
    write_rows(root / "CheXpert-v1.0-small/valid.csv", row | {"Path": "CheXpert-v1.0-small/valid/patient00002/study1/view1_lateral.jpg",
                                                              "Frontal/Lateral": "Lateral", "AP/PA": "", "Sex": "Female", "Age": "33"})
    image(root / "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg")
    both = {"dataset": "CheXpert-Plus", "view": "LATERAL", "pleural_effusion": "positive", "no_finding": "negative"}
    return [both | {"patient": "CXPpatient00001", "split": "train"}, None]


def padchest(root):
    row = {"ImageID": "1_a.png", "ImageDir": "0", "PatientID": "77", "PatientBirth": "1950.0", "PatientSex_DICOM": "F",
           "StudyDate_DICOM": "20140915", "Projection": "AP_horizontal", "Report": "informe secreto",
           "Labels": "['pleural effusion', ' NSG tube', 'loc right']"}
    write_rows(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", row,
               row | {"ImageID": "2_b.png", "Labels": "['normal']", "Projection": "L", "PatientBirth": ""},
               row | {"ImageID": "3_c.png", "Labels": "['exclude']"}, row | {"ImageID": "4_d.png", "Labels": "", "Projection": "COSTAL"},
               row | {"ImageID": "5_e.png", "Labels": "['scoliosis ', 'hydropneumothorax']", "Projection": "PA"})
    for name in ("0/1_a.png", "1/2_b.png", "1/3_c.png", "54/4_d.png"):
        image(root / name)
    known = {"patient": "PAD77", "sex": "female", "dataset": "PadChest", "split": stable_split("PAD77")}
    return [known | {"age": 64, "view": "AP", "pleural_effusion": "positive", "support_devices": "positive", "no_finding": "negative"},
            known | {"view": "LATERAL"} | {f: "negative" for f in fields.FINDINGS if f != "support_devices"} | {"no_finding": "positive"},
            "labelled exclude", known | {"age": 64}, None]


def rexgradient(root):
    study = {"PatientID": "p9", "PatientSex": "F", "PatientAge": "057Y", "StudyDate": "20200101", "Findings": "secret text",
             "ImagePath": ["../deid_png/g/p9/1.png", "../deid_png/g/p9/2.png"], "ImageViewPosition": ["POSTERO_ANTERIOR", None]}
    write(root / "metadata/train_metadata_view_position.json", json.dumps({"s1": study}))
    for split in ("valid", "test"):
        write(root / f"metadata/{split}_metadata_view_position.json", json.dumps({}))
    image(root / "deid_png/g/p9/1.png")
    image(root / "deid_png/g/p9/2.png")
    known = {"patient": "REXp9", "age": 57, "sex": "female", "split": "train", "dataset": "ReXGradient"}
    return [known | {"view": "PA"}, known]


def brax(root):
    row = {"PngPath": "images/id_1/Study_1/Series_1/image-1.png", "PatientID": "1", "PatientSex": "M", "PatientAge": "85 or more",
           "AccessionNumber": "secret number", "ViewPosition": "LT-DECUB"} | BLANK | {"Cardiomegaly": "1", "Edema": "-1"}
    write_rows(root / "master_spreadsheet_update.csv", row, row | {"PngPath": "images/id_2/Study_2/Series_1/image-2.png",
                                                                   "PatientID": "2", "ViewPosition": "RL", "PatientAge": "40"})
    image(root / "images/id_1/Study_1/Series_1/image-1.png")
    image(root / "images/id_2/Study_2/Series_1/image-2.png")
    known = {"sex": "male", "dataset": "BRAX", "cardiomegaly": "positive", "no_finding": "negative"}
    return [known | {"patient": "BRAX1", "age": 85, "split": stable_split("BRAX1")},
            known | {"patient": "BRAX2", "age": 40, "view": "LATERAL", "split": stable_split("BRAX2")}]


def vindr(root):
    terms = dict.fromkeys(("Nodule/Mass", "Pleural effusion", "Calcification", "No finding"), "0")
    write_rows(root / "annotations/image_labels_train.csv", *(
        {"image_id": "x", "rad_id": f"R{i}"} | terms | {"Nodule/Mass": "1" if i < 2 else "0", "Pleural effusion": "1" if i < 1 else "0"}
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


@pytest.mark.parametrize("make", [mimic, chexpert, chexpert_2019, padchest, rexgradient, brax, vindr], ids=lambda make: make.__name__)
def test_a_source_is_harmonised_by_hand(tmp_path, make):
    expected = make(tmp_path / "root")
    name = make.__name__.removesuffix("_2019")
    counts = data.prepare(name, tmp_path / "root", tmp_path / "out", size=32)
    assert counts == {"taken": sum(isinstance(e, dict) for e in expected), "rejected": sum(isinstance(e, str) for e in expected),
                      "missing": expected.count(None)}
    records = read_index(tmp_path / "out")
    for record in records:
        assert (tmp_path / "out" / record.pop("path")).is_file()
    assert records == [e for e in expected if isinstance(e, dict)]
    assert len({(r["patient"], r["split"]) for r in records}) == len({r["patient"] for r in records})
    written = (tmp_path / "out/index.csv").read_text() + (tmp_path / "out/rejected.csv").read_text()
    assert "secret" not in written
    assert [row["reason"] for row in csv.DictReader(open(tmp_path / "out/rejected.csv"))] == [e for e in expected if isinstance(e, str)]
    # Without touching images, every row of the tables is in the index.
    counts = data.prepare(name, tmp_path / "root", tmp_path / "all", metadata_only=True)
    assert counts["taken"] == sum(not isinstance(e, str) for e in expected) and not list((tmp_path / "all/images").iterdir())


def test_a_table_of_another_form_is_refused_in_one_line(tmp_path, command):
    write(tmp_path / "root/master_spreadsheet_update.csv", "PngPath,PatientID\nimages/a.png,1\n")
    status, _, errors = command("data.py", "prepare", "brax", tmp_path / "root", tmp_path / "out")
    assert status == 2 and "master_spreadsheet_update.csv: no column 'PatientAge'" in errors and len(errors.splitlines()) == 1
    status, _, errors = command("data.py", "prepare", "padchest", tmp_path / "root", tmp_path / "out")
    assert status == 2 and "no PADCHEST_chest_x_ray_images_labels_160K*.csv" in errors


def test_an_image_that_no_row_names_is_in_the_rejected(tmp_path):
    brax(tmp_path / "root")
    image(tmp_path / "root/images/id_3/Study_1/image-9.png")
    image(tmp_path / "root/images/id_3/preview.jpg")                 # another kind than the tables name: not an input
    assert data.prepare("brax", tmp_path / "root", tmp_path / "out", size=32) == {"taken": 2, "rejected": 1, "missing": 0}
    assert (tmp_path / "out/rejected.csv").read_text().splitlines()[1:] == [
        "images/id_3/Study_1/image-9.png,\"no row of the tables names it, or another file of this name was taken\""]


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
    assert data.prepare("folder", tmp_path / "root", tmp_path / "out", size=32) == {"taken": 1, "rejected": 1, "missing": 0}


@pytest.mark.parametrize("table", [terms.NIH_TERMS, terms.VINDR_TERMS, terms.PADCHEST_TERMS])
def test_every_term_leads_to_one_of_the_14_labels(table):
    labels = {label for joined in table.values() for label in joined.split("|") if label}
    assert labels <= set(fields.LABELS) and all(term == term.strip().lower() for term in table)
