"""The seven sources of CXR7-1M: how each spells a file, a patient, a view, an age, a sex, a label.

Every source is one function from a download (files.py) to (file, record) pairs. A record is a dict of the fields it
knows (fields.py), in their canonical spelling, plus "name" (of the prepared image, without suffix), "patient" and,
where the source has an official split, "split". A row whose image is not there yields (None, record): people download
parts.

Labels. The 14 CheXpert labels are read as: 1 positive; 0 negative; -1 (uncertain) and blank unknown. The terms of
other vocabularies are mapped by terms.py. What follows from "No Finding" is one rule for all sources, `resolve_labels`
in fields.py.
"""
import ast
import hashlib
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from common.cli import InputError, read_json
from common.tables import read_table
from radiographs.fields import drop_unknown, field_of
from radiographs.tags import age_of, sex_of, view_of
from radiographs.terms import NIH_TERMS, PADCHEST_TERMS, VINDR_ASKED, VINDR_TERMS, chexpert_labels, labels_of

RACE_WORDS = {"asian": {"asian"}, "black": {"black", "african", "afro"}, "white": {"white", "caucasian"}}
DENIED_OR_MIXED = {"no", "non", "not", "nor", "neither", "without", "than", "mixed", "multiple", "half"}
NOT_HISPANIC = re.compile(r"\bno[nt][\s-]+(of )?(hispanic|latin[oax])(( or |/)latin[oax])?")  # says nothing of race
PARTS_OF_AFRICA = re.compile(r"\b(north|south)[\s-]+african")         # people of any of the three


def race_of(text):
    """Asian, black or white out of a free description, by its words ("ASIAN - CHINESE", "White or Caucasian", "Black
    or African American"); None where it names none of them or several, or denies one ("other than white")."""
    text = PARTS_OF_AFRICA.sub("", NOT_HISPANIC.sub("", (text or "").lower()))
    words = set(re.findall(r"[a-z]+", text))
    if words & DENIED_OR_MIXED:
        return None
    races = [race for race, names in RACE_WORDS.items() if words & names]
    return races[0] if len(races) == 1 else None


def path_name(path):
    """A path below a root as one file name. File systems take 255 bytes: of a longer one the end is kept, which names
    the image, and a hash of the whole."""
    name = str(Path(path).with_suffix("")).replace("/", "_")
    return name if len(name) <= 150 else f"{hashlib.sha256(name.encode()).hexdigest()[:16]}_{name[-120:]}"


def whole_number(row, column, digits=None):
    """The whole number in a cell, or in its first digits."""
    text = row[column].removesuffix(".0")[:digits]
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{row.path}, line {row.line}: {column} is not a whole number")
    return int(text)


def one_of(row, column, values):
    """The value that `values` holds for a cell."""
    if row[column] not in values:
        raise InputError(f"{row.path}, line {row.line}: unknown {column}; accepted: {', '.join(values)}")
    return values[row[column]]


def nih(download):
    """ChestX-ray14. The official test list is by patient; ages above 120 in the 2017 release are typing errors."""
    test = set(download.table("test_list.txt").read_text().split())
    for row in read_table(download.table("Data_Entry_2017*.csv")):
        name = row["Image Index"]
        yield download.image(name), drop_unknown({
            "name": Path(name).stem, "patient": "NIH" + row["Patient ID"].zfill(8), "dataset": "ChestX-ray14",
            "split": "test" if name in test else None, "official": True, "age": age_of(row["Patient Age"]),
            "sex": sex_of(row["Patient Gender"]), "view": view_of(row["View Position"])}
            | labels_of(row["Finding Labels"].split("|"), NIH_TERMS))


def mimic(download):
    """MIMIC-CXR-JPG, or its images as DICOM beside the same tables. Age, sex and race come from MIMIC-IV's patients
    and admissions where they are below the root."""
    labels = {row["study_id"]: drop_unknown(chexpert_labels(row)) for row in
              read_table(download.table("mimic-cxr-2*-chexbert.csv", "mimic-cxr-2*-chexpert.csv"))}
    splits = {row["dicom_id"]: one_of(row, "split", {"train": "train", "validate": "valid", "test": "test"})
              for row in read_table(download.table("mimic-cxr-2*-split.csv"))}
    patients, races = mimic_patients(download), mimic_races(download)
    for row in read_table(download.table("mimic-cxr-2*-metadata.csv")):
        subject, study, dicom = row["subject_id"], row["study_id"], row["dicom_id"]
        if dicom not in splits:
            raise InputError(f"{row.path}, line {row.line}: an image that the table of splits does not name")
        sex, offset = patients.get(subject, (None, None))
        age = str(whole_number(row, "StudyDate", digits=4) + offset) if subject in patients else None
        yield download.image(f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"), drop_unknown({
            "name": dicom, "patient": "MIMIC" + subject, "dataset": "MIMIC-CXR", "split": splits[dicom], "sex": sex,
            "age": age_of(age), "race": races.get(subject), "view": view_of(row["ViewPosition"])}
            | labels.get(study, {}))


def mimic_patients(download):
    """Patient -> (sex, age minus year). MIMIC shifts all years of a patient alike, so their differences are true."""
    rows = optional_rows(download, "patients.csv", ("subject_id", "gender", "anchor_age", "anchor_year"))
    return {row["subject_id"]: (sex_of(row["gender"]),
                                whole_number(row, "anchor_age") - whole_number(row, "anchor_year")) for row in rows}


def mimic_races(download):
    """Patient -> the race that most admissions say: they do not always agree."""
    races = defaultdict(Counter)
    for row in optional_rows(download, "admissions.csv", ("subject_id", "race"), ("subject_id", "ethnicity")):
        if race := race_of(row.get("race") or row.get("ethnicity")):  # MIMIC-IV 1.0 has the older name
            races[row["subject_id"]][race] += 1
    return {patient: counts.most_common(1)[0][0] for patient, counts in races.items()}


def optional_rows(download, name, *columns):
    """The rows of a table that a source can do without: none, with a warning, if it lacks columns."""
    if found := download.tables(name):
        rows = read_table(found[-1])
        first = next(rows, None)
        if first is None or any(set(names) <= set(first) for names in columns):
            return itertools.chain([first] if first else [], rows)
        print(f"warning: {found[-1]} is left out: it lacks the columns {', '.join(columns[0])}", file=sys.stderr)
    return ()


def chexpert(download):
    """CheXpert Plus, with its labels of the whole report (those of the findings alone call 76 % normal); or, where its
    table is not there, the older CheXpert with train.csv and valid.csv."""
    if not download.tables("df_chexpert_plus_*.csv"):
        yield from chexpert_2019(download)
        return
    labels = chexpert_plus_labels(download.table("report_fixed.json"))
    for row in read_table(download.table("df_chexpert_plus_*.csv")):
        path, dicom = row["path_to_image"], row.get("path_to_dcm")
        file = download.image(path, parts=3) or (download.image(dicom, parts=3) if dicom else None)
        yield file, drop_unknown({
            "name": path_name(path), "patient": "CXP" + row["deid_patient_id"], "dataset": "CheXpert-Plus",
            "split": {"train": "train", "valid": "valid", "test": "test"}.get(row["split"]), "age": age_of(row["age"]),
            "sex": sex_of(row["sex"]), "race": race_of(row["race"]),
            "view": "LATERAL" if row["frontal_lateral"] == "Lateral" else view_of(row["ap_pa"])}
            | labels.get(path, {}))


def chexpert_plus_labels(path):
    """Image path -> labels, from a file with one JSON object a line."""
    labels = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                labels[row["path_to_image"]] = drop_unknown(chexpert_labels(row))
            except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
                raise InputError(f"{path}, line {number}: not a JSON object with path_to_image and labels") from None
    return labels


def chexpert_2019(download):
    """CheXpert of 2019: age 0 means missing, the columns AP/PA are blank for laterals."""
    for split in ("train", "valid"):
        for row in read_table(download.table(f"{split}.csv")):
            parts = row["Path"].split("/")                           # CheXpert-v1.0/train/patient00001/study1/NAME.jpg
            if len(parts) < 4:
                raise InputError(f"{row.path}, line {row.line}: Path is not of the form .../PATIENT/STUDY/IMAGE")
            yield download.image(row["Path"], parts=3), drop_unknown({
                "name": path_name("/".join(parts[1:])), "patient": "CXP" + parts[-3], "dataset": "CheXpert-Plus",
                "split": split, "age": age_of(row["Age"]) or None, "sex": sex_of(row["Sex"]),
                "view": "LATERAL" if row["Frontal/Lateral"] == "Lateral" else view_of(row["AP/PA"])}
                | chexpert_labels(row))


def padchest(download):
    """PadChest: terms as the text of a Python list; age = year of the study - year of birth. No official split."""
    for row in read_table(download.table("PADCHEST_chest_x_ray_images_labels_160K*.csv")):
        terms = padchest_terms(row)
        years = row["StudyDate_DICOM"][:4], row["PatientBirth"][:4]
        unusable = [term for term in ("exclude", "suboptimal study") if term in terms]
        yield download.image(row["ImageID"]), drop_unknown({
            "name": Path(row["ImageID"]).stem, "patient": "PAD" + row["PatientID"], "dataset": "PadChest",
            "age": age_of(str(int(years[0]) - int(years[1]))) if all(map(str.isdecimal, years)) else None,
            "sex": sex_of(row["PatientSex_DICOM"]), "view": view_of(row["Projection"]),
            "reject_reason": f"labelled {unusable[0]}" if unusable else None} | labels_of(terms, PADCHEST_TERMS))


def padchest_terms(row):
    """The terms of a row in lower case; none where the cell holds no list."""
    if not row["Labels"].startswith("["):
        return []
    try:
        return [str(term).strip().lower() for term in ast.literal_eval(row["Labels"])]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"{row.path}, line {row.line}: Labels is not a list of terms as Python writes it") from None


def rexgradient(download):
    """ReXGradient-160K: one JSON a split, several images a study, reports only: all labels are unknown."""
    for split in ("train", "valid", "test"):
        table = download.table(f"{split}_metadata_view_position.json")
        studies = read_json(table, object)
        if not isinstance(studies, (dict, list)):
            raise InputError(f"{table}: neither a list nor a dict of studies")
        for study in studies.values() if isinstance(studies, dict) else studies:
            try:
                known = {"patient": "REX" + study["PatientID"], "dataset": "ReXGradient", "split": split,
                         "age": age_of(study["PatientAge"]), "sex": sex_of(study["PatientSex"])}
                images, views = ([value] if isinstance(value, str) else value or []
                                 for value in (study["ImagePath"], study["ImageViewPosition"]))
            except (KeyError, TypeError) as error:
                raise InputError(f"{table}: not a list of studies as ReXGradient publishes it: {error}") from None
            for path, view in itertools.zip_longest(images, views[:len(images)]):  # fewer views than images occur
                if path is None:
                    continue
                path = path.removeprefix("../")
                yield download.image(path, parts=2), drop_unknown(
                    known | {"name": path_name(path.removeprefix("deid_png/")), "view": view_of(view)})


def brax(download):
    """BRAX: PNG exports, or its DICOM files; ages above 84 are written "85 or more" and read as 85. No official
    split."""
    for row in read_table(download.table("master_spreadsheet_update.csv")):
        path, dicom = row["PngPath"], row.get("DicomPath")
        file = download.image(path, parts=4) or (download.image(dicom, parts=4) if dicom else None)
        yield file, drop_unknown({
            "name": path_name(path.removeprefix("images/")), "patient": "BRAX" + row["PatientID"], "dataset": "BRAX",
            "age": age_of(row["PatientAge"]), "sex": sex_of(row["PatientSex"]), "view": view_of(row["ViewPosition"])}
            | chexpert_labels(row))


def vindr(download):
    """VinDr-CXR: DICOM, all PA. In training three readers answered, and two make a majority; in the test set one
    consensus. They were asked about every finding of VINDR_ASKED, so what they leave out is negative. Age and sex come
    from the DICOM tags."""
    asked = {field_of(VINDR_TERMS[term]): "negative" for term in VINDR_ASKED}
    for split in ("train", "test"):
        votes, readers = defaultdict(Counter), Counter()
        for row in read_table(download.table(f"image_labels_{split}.csv")):
            image = row["image_id"]
            readers[image] += 1
            votes[image].update(term.lower() for term, value in row.items() if value in ("1", "1.0"))
        for image, count in readers.items():
            agreed = [term for term, voices in votes[image].items() if 2 * voices > count]
            known = {"name": image, "patient": "VIN" + image, "dataset": "VinDr-CXR", "view": "PA", "official": True}
            if split == "test":
                known["split"] = "test"
            yield download.image(image), known | asked | labels_of(agreed, VINDR_TERMS)
