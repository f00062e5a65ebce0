"""The seven sources of CXR7-1M, and any folder: how each spells a file, a patient, a view, an age, a sex, a label.

Every source is one function from its own tables to (file, record) pairs. A record is a dict of the fields it knows
(see fields.py), in their canonical spelling, plus "name" (of the prepared image, without suffix), "patient" and, where
the source has an official split, "split". A row whose image is not there yields (None, record): people download
parts. Files are found wherever under the root the archives were unpacked.

Labels. The 14 CheXpert labels are read as: 1 positive; 0 negative; -1 (uncertain) and blank unknown. Terms of other
vocabularies are mapped by the tables below; a term that is absent from a list of terms is unknown, not negative. What
follows from "No Finding" is one rule for all sources, `settle` in fields.py.
"""
import ast
import fnmatch
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

from common.tables import read_table
from radiographs.fields import LABELS, drop_unknown, field_of
from radiographs.tags import age_of, dicom_tags, sex_of, view_of

# ---------------------------------------------------------------------------------------------------------
# Tables and files

def find_table(root, *patterns):
    """The last table under root, by name, that matches one of the patterns; a later release sorts after an earlier."""
    for pattern in patterns:
        if found := sorted(root.rglob(pattern), key=lambda path: path.name):
            return found[-1]
    raise FileNotFoundError(f"{root}: no {' or '.join(patterns)} in it or below it")


def find_folders(root, pattern):
    """The folders at or below root that hold a name matching `pattern`; those called "images" first."""
    found = [Path(folder) for folder, folders, files in os.walk(root) if fnmatch.filter(folders + files, pattern)]
    return sorted(found, key=lambda folder: (folder.name != "images", folder))


def walk(root):
    """Every file at or below root, in one order, without a list of all."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files))


def locate(folders, relative):
    """The first folder's file of that relative path, or None. The folder of the last hit is tried first."""
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise ValueError(f"the path {relative!r} leaves its root")
    for i, folder in enumerate(folders):
        if (folder / relative).is_file():
            folders.insert(0, folders.pop(i))
            return folder / relative


# ---------------------------------------------------------------------------------------------------------
# Spellings

def race_of(text):
    """Asian, black or white out of a free description ("ASIAN - CHINESE", "Black or African American"); else None."""
    for race in ("asian", "black", "white"):
        if race in (text or "").lower():
            return race


def chexpert_labels(row):
    """The 14 labels of a row in CheXpert's coding (1, 0, -1, blank; as text or number)."""
    value = {"1": "positive", "1.0": "positive", "0": "negative", "0.0": "negative"}
    return {field_of(label): value.get(str(row.get(label))) for label in LABELS}


def positives(terms, table):
    """The labels that a list of another vocabulary's terms asserts, all positive."""
    labels = "|".join(table.get(term.strip().lower(), "") for term in terms)
    return {field_of(label): "positive" for label in labels.split("|") if label}


# ---------------------------------------------------------------------------------------------------------
# Other vocabularies onto the 14 labels. Two labels are joined by |. A parent (lung opacity of consolidation, edema,
# pneumonia and atelectasis; enlarged cardiomediastinum of cardiomegaly) follows only where a row says so.

NIH_TERMS = {
    "no finding": "No Finding", "cardiomegaly": "Cardiomegaly", "edema": "Edema", "consolidation": "Consolidation",
    "pneumonia": "Pneumonia", "atelectasis": "Atelectasis", "pneumothorax": "Pneumothorax", "effusion": "Pleural Effusion",
    "infiltration": "Lung Opacity",          # the term covers any ill-defined opacity, not one cause of it
    "nodule": "Lung Lesion", "mass": "Lung Lesion",
    "pleural_thickening": "Pleural Other"}   # not: emphysema, fibrosis, hernia, which CheXpert has no label for

VINDR_TERMS = {
    "no finding": "No Finding", "cardiomegaly": "Cardiomegaly", "edema": "Edema", "consolidation": "Consolidation",
    "pneumonia": "Pneumonia", "atelectasis": "Atelectasis", "pneumothorax": "Pneumothorax", "lung opacity": "Lung Opacity",
    "pleural effusion": "Pleural Effusion", "pleural thickening": "Pleural Other",
    "rib fracture": "Fracture", "clavicle fracture": "Fracture",
    "infiltration": "Lung Opacity",          # as in ChestX-ray14
    "ild": "Lung Opacity",                   # interstitial disease shows as reticular opacity; CheXpert counts it there
    "nodule/mass": "Lung Lesion", "lung tumor": "Lung Lesion", "lung cavity": "Lung Lesion", "lung cyst": "Lung Lesion",
    "aortic enlargement": "Enlarged Cardiomediastinum",  # it widens the mediastinal contour
    "mediastinal shift": ""}                 # a displaced mediastinum is not an enlarged one
# not: calcification (anywhere), emphysema, enlarged PA, pulmonary fibrosis, other lesion, COPD, tuberculosis, other diseases

PADCHEST_TERMS = {
    "normal": "No Finding", "cardiomegaly": "Cardiomegaly", "pulmonary edema": "Edema", "consolidation": "Consolidation",
    "pneumonia": "Pneumonia", "atypical pneumonia": "Pneumonia", "pneumothorax": "Pneumothorax",
    "hydropneumothorax": "Pneumothorax|Pleural Effusion",
    **dict.fromkeys(("atelectasis", "laminar atelectasis", "lobar atelectasis", "segmental atelectasis", "total atelectasis",
                     "round atelectasis", "atelectasis basal"), "Atelectasis"),
    **dict.fromkeys(("pleural effusion", "loculated pleural effusion", "loculated fissural effusion", "empyema",
                     "hemothorax"), "Pleural Effusion"),
    **dict.fromkeys(("pleural thickening", "apical pleural thickening", "calcified pleural thickening", "pleural plaques",
                     "calcified pleural plaques", "pleural mass", "fissure thickening", "minor fissure thickening",
                     "major fissure thickening"), "Pleural Other"),
    **dict.fromkeys(("nodule", "multiple nodules", "mass", "pulmonary mass", "cavitation", "abscess", "cyst",
                     "lung metastasis", "granuloma", "calcified granuloma"), "Lung Lesion"),
    **dict.fromkeys(("infiltrates", "increased density", "ground glass pattern", "interstitial pattern",
                     "reticular interstitial pattern", "reticulonodular interstitial pattern", "miliary opacities",
                     "lymphangitis carcinomatosa", "kerley lines"), "Lung Opacity"),
    "alveolar pattern": "Lung Opacity",      # air spaces filled by whatever: wider than consolidation
    "air bronchogram": "Consolidation|Lung Opacity",  # air in bronchi is seen only where the lung around them is solid
    **dict.fromkeys(("fracture", "rib fracture", "clavicle fracture", "humeral fracture", "vertebral fracture",
                     "callus rib fracture"), "Fracture"),  # a healed rib counts, as in CheXpert
    **dict.fromkeys(("mediastinal enlargement", "superior mediastinal enlargement", "mediastinal mass", "goiter",
                     "aortic aneurysm", "mediastinic lipomatosis"), "Enlarged Cardiomediastinum"),
    "pericardial effusion": "Enlarged Cardiomediastinum",  # it widens the silhouette without a larger heart
    **dict.fromkeys(("pacemaker", "dual chamber device", "single chamber device", "dai", "electrical device", "catheter",
                     "central venous catheter", "central venous catheter via jugular vein",
                     "central venous catheter via subclavian vein", "central venous catheter via umbilical vein",
                     "reservoir central venous catheter", "endotracheal tube", "tracheostomy tube", "nsg tube",
                     "chest drain tube", "ventriculoperitoneal drain tube", "gastrostomy tube", "nephrostomy tube",
                     "double j stent", "artificial heart valve", "artificial mitral heart valve",
                     "artificial aortic heart valve", "aortic endoprosthesis"), "Support Devices")}
# not: costophrenic angle blunting (a scar as often as fluid), heart insufficiency and vascular redistribution (signs
# beside edema, not edema), aortic elongation, sutures, osteosynthesis, breast and joint prostheses (no support devices)


# ---------------------------------------------------------------------------------------------------------
# The sources

def nih(root):
    """ChestX-ray14. The official test list is by patient; ages above 120 in the 2017 release are typing errors."""
    table, folders = find_table(root, "Data_Entry_2017*.csv*"), find_folders(root, "*.png")
    test = set(find_table(root, "test_list.txt").read_text().split())
    for row in read_table(table):
        name, terms = row["Image Index"], row["Finding Labels"].split("|")
        yield locate(folders, name), drop_unknown({
            "name": Path(name).stem, "patient": "NIH" + row["Patient ID"].zfill(8), "dataset": "ChestX-ray14",
            "split": "test" if name in test else None, "official": True, "age": age_of(row["Patient Age"]),
            "sex": sex_of(row["Patient Gender"]), "view": view_of(row["View Position"]),
            "no_finding": "negative"} | positives(terms, NIH_TERMS))  # a term without a label is still a finding


def mimic(root):
    """MIMIC-CXR-JPG; age, sex and race from MIMIC-IV's patients.csv and admissions.csv where they are below root."""
    def rows(pattern):
        found = sorted(root.rglob(pattern))
        return read_table(found[-1]) if found else ()

    table, folders = find_table(root, "mimic-cxr-2.0.0-metadata.csv*"), find_folders(root, "p1[0-9]")
    labels = {row["study_id"]: drop_unknown(chexpert_labels(row)) for row in
              read_table(find_table(root, "mimic-cxr-2.0.0-chexbert.csv*", "mimic-cxr-2.0.0-chexpert.csv*"))}
    splits = {row["dicom_id"]: row["split"] for row in read_table(find_table(root, "mimic-cxr-2.0.0-split.csv*"))}
    # Years are shifted alike for one patient, so differences of years are true.
    patients = {row["subject_id"]: (sex_of(row["gender"]), int(row["anchor_age"]) - int(row["anchor_year"]))
                for row in rows("patients.csv*")}
    races = defaultdict(Counter)                                     # a patient's admissions do not always agree
    for row in rows("admissions.csv*"):
        if race := race_of(row["race"]):
            races[row["subject_id"]][race] += 1
    for row in read_table(table):
        subject, study, dicom = row["subject_id"], row["study_id"], row["dicom_id"]
        sex, offset = patients.get(subject, (None, None))
        yield locate(folders, f"p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"), drop_unknown({
            "name": dicom, "patient": "MIMIC" + subject, "dataset": "MIMIC-CXR",
            "split": {"train": "train", "validate": "valid", "test": "test"}[splits[dicom]], "sex": sex,
            "age": age_of(str(offset + int(row["StudyDate"][:4]))) if subject in patients else None,
            "race": max(races[subject], key=races[subject].get) if subject in races else None,
            "view": view_of(row["ViewPosition"])} | labels.get(study, {}))


def chexpert(root):
    """CheXpert Plus, with its labels of the whole report (those of the findings alone call 76 % normal); or, where its
    table is not there, the older CheXpert with train.csv and valid.csv."""
    folders = find_folders(root, "train") + find_folders(root, "valid")
    if not list(root.rglob("df_chexpert_plus_*.csv*")):
        yield from chexpert_2019(root, folders)
        return
    with open(find_table(root, "report_fixed.json"), encoding="utf-8") as file:
        labels = {row["path_to_image"]: drop_unknown(chexpert_labels(row)) for row in map(json.loads, file)}
    for row in read_table(find_table(root, "df_chexpert_plus_*.csv*")):
        path = row["path_to_image"]
        file = locate(folders, str(Path(path).with_suffix(".png"))) or locate(folders, path)  # the table says .jpg
        yield file, drop_unknown({
            "name": path_name(path), "patient": "CXP" + row["deid_patient_id"], "dataset": "CheXpert-Plus",
            "split": {"train": "train", "valid": "valid", "test": "test"}.get(row["split"]), "age": age_of(row["age"]),
            "sex": sex_of(row["sex"]), "race": race_of(row["race"]),
            "view": "LATERAL" if row["frontal_lateral"] == "Lateral" else view_of(row["ap_pa"])} | labels.get(path, {}))


def chexpert_2019(root, folders):
    """CheXpert of 2019: age 0 means missing, the columns AP/PA are blank for laterals."""
    for split in ("train", "valid"):
        for row in read_table(find_table(root, f"{split}.csv*")):
            path = row["Path"].split("/", 1)[1]                      # without the archive's name
            yield locate(folders, path), drop_unknown({
                "name": path_name(path), "patient": "CXP" + path.split("/")[1], "dataset": "CheXpert-Plus", "split": split,
                "age": age_of(row["Age"]) or None, "sex": sex_of(row["Sex"]),
                "view": "LATERAL" if row["Frontal/Lateral"] == "Lateral" else view_of(row["AP/PA"])} | chexpert_labels(row))


def path_name(path):
    """A path as one file name."""
    return str(Path(path).with_suffix("")).replace("/", "_")


def padchest(root):
    """PadChest: terms as the text of a Python list; age = year of the study - year of birth. No official split."""
    folders = find_folders(root, "*.png")
    for row in read_table(find_table(root, "PADCHEST_chest_x_ray_images_labels_160K*.csv*")):
        terms = [term.strip().lower() for term in ast.literal_eval(row["Labels"])] if row["Labels"].startswith("[") else []
        years = row["StudyDate_DICOM"][:4], row["PatientBirth"][:4]
        reject_reason = [term for term in ("exclude", "suboptimal study") if term in terms]
        findings = {} if not any(terms) or terms == ["normal"] else {"no_finding": "negative"}
        yield locate(folders, row["ImageID"]), drop_unknown({
            "name": Path(row["ImageID"]).stem, "patient": "PAD" + row["PatientID"], "dataset": "PadChest",
            "age": age_of(str(int(years[0]) - int(years[1]))) if all(year.isdigit() for year in years) else None,
            "sex": sex_of(row["PatientSex_DICOM"]), "view": view_of(row["Projection"]),
            "reject_reason": f"labelled {reject_reason[0]}" if reject_reason else None} | findings | positives(terms, PADCHEST_TERMS))


def rexgradient(root):
    """ReXGradient-160K: one JSON a split, several images a study, reports only: all labels are unknown."""
    folders = find_folders(root, "deid_png")
    for split in ("train", "valid", "test"):
        studies = json.loads(find_table(root, f"{split}_metadata_view_position.json").read_text(encoding="utf-8"))
        for study in studies.values() if isinstance(studies, dict) else studies:
            for path, view in zip(study["ImagePath"], study["ImageViewPosition"]):
                path = path.removeprefix("../")
                yield locate(folders, path), drop_unknown({
                    "name": path_name(path.removeprefix("deid_png/")), "patient": "REX" + study["PatientID"],
                    "dataset": "ReXGradient", "split": split, "age": age_of(study["PatientAge"]), "sex": sex_of(study["PatientSex"]),
                    "view": view_of(view)})


def brax(root):
    """BRAX: PNG exports; ages above 84 are written "85 or more" and read as 85. No official split."""
    folders = find_folders(root, "id_*")
    for row in read_table(find_table(root, "master_spreadsheet_update.csv*")):
        path = row["PngPath"].removeprefix("images/")
        yield locate(folders, path), drop_unknown({
            "name": Path(path).stem, "patient": "BRAX" + row["PatientID"], "dataset": "BRAX",
            "age": age_of(row["PatientAge"]), "sex": sex_of(row["PatientSex"]), "view": view_of(row["ViewPosition"])} | chexpert_labels(row))


def vindr(root):
    """VinDr-CXR: DICOM, all PA. In training three readers answered, and two make a majority; in the test set one
    consensus. Every finding was looked for, so what the readers leave out is negative. Age and sex come from the tags."""
    folders = find_folders(root, "*.dicom")
    for split in ("train", "test"):
        votes, readers = defaultdict(Counter), Counter()
        for row in read_table(find_table(root, f"image_labels_{split}.csv*")):
            image = row.pop("image_id")
            readers[image] += 1
            votes[image].update(term.lower() for term, value in row.items() if term != "rad_id" and float(value or 0) == 1)
        for image, count in readers.items():
            agreed = [term for term, voices in votes[image].items() if 2 * voices > count]
            asked = {field_of(label): "negative" for labels in VINDR_TERMS.values() for label in labels.split("|") if label}
            file = locate(folders, image + ".dicom")
            known = {"name": image, "patient": "VIN" + image, "dataset": "VinDr-CXR", "view": "PA", "official": True}
            if split == "test":
                known["split"] = "test"
            yield file, (dicom_tags(file) if file else {}) | known | asked | positives(agreed, VINDR_TERMS)
