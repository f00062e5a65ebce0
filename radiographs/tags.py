"""What is said of a radiograph in words: sex, age and view as hospitals spell them, and a DICOM header's patient.

Each function takes what stands in a table or a header and returns the value as fields.py spells it, or None if it is
unknown. Unknown is better than wrong: what is not understood is None.
"""
import re

import pydicom

from radiographs.fields import MAX_AGE, drop_unknown

SEX = {"M": "male", "MALE": "male", "F": "female", "FEMALE": "female"}
VIEW = {"AP": "AP", "ANTERO_POSTERIOR": "AP", "AP AXIAL": "AP", "AP LLD": "AP", "AP RLD": "AP", "AP_HORIZONTAL": "AP",
        "PA": "PA", "POSTERO_ANTERIOR": "PA", "PA LLD": "PA", "PA RLD": "PA",
        "LATERAL": "LATERAL", "LAT": "LATERAL", "LL": "LATERAL", "RL": "LATERAL", "L": "LATERAL"}


def sex_of(text):
    return SEX.get(str(text or "").strip().upper())


def view_of(text):
    return VIEW.get(str(text or "").strip().upper())


def age_of(text):
    """Years out of "57", "057Y" or "85 or more"; months, weeks and days as fractions; None if blank or above 120."""
    if match := re.match(r"(\d{1,3})(?:\.0)?([YMWD]?)\b", (text or "").strip()):
        years = int(match[1]) * {"": 1, "Y": 1, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}[match[2]]
        return years if years <= MAX_AGE else None


def dicom_tags(path):
    """Patient, sex, age and view out of a DICOM file's tags; nothing from a file that is not DICOM or is damaged, which
    will be rejected when its pixels are read."""
    try:
        ds = pydicom.dcmread(path, stop_before_pixels=True,
                             specific_tags=["PatientID", "PatientSex", "PatientAge", "ViewPosition"])
        return drop_unknown({"patient": str(ds.get("PatientID") or "") or None, "sex": sex_of(ds.get("PatientSex")),
                             "age": age_of(str(ds.get("PatientAge") or "")), "view": view_of(ds.get("ViewPosition"))})
    except Exception:  # pydicom raises many kinds on a damaged header, some of them only when a value is looked at
        return {}
