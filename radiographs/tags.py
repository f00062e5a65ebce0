"""What is said of a radiograph in words: sex, age and view as hospitals spell them, and what a DICOM header says.

A function of text takes what stands in a table or a header and returns the value as fields.py spells it, or None if it
is unknown. Unknown is better than wrong: what is not understood is None, and what contradicts itself too.

Headers are read with bounds, since a damaged file may say anything of its own lengths. An element that is absent and
one that is empty are the same (PS3.5, 7.4.5). Whatever is wrong becomes Rejected with a reason in fixed words: a value
of a header may be the patient's name, so none is ever quoted.

Source: DICOM PS3.3, C.7.1.1 (patient), C.8.11.5 (position and view), C.7.6.1.1.1 (orientation); PS3.5, 6.2 (AS, DA);
PS3.16, CID 4010 (views).
"""
import contextlib
import io
import re
import struct
import warnings
import zlib
from datetime import date
from pathlib import Path

import pydicom
from pydicom.multival import MultiValue

from radiographs.fields import MAX_AGE, drop_unknown

MAX_BYTES = 2 ** 29     # of a file: 100 million pixels of 32 bits and room for a header
MAX_READS = 100_000     # of a DICOM file: two to four an element, and radiographs have a few hundred elements


class Rejected(ValueError):
    """An image that cannot be used, and why, in fixed words. The run goes on."""


# ---------------------------------------------------------------------------------------------------------
# Words

def sex_of(text):
    words = {"male": ("M", "MALE", "MAN", "MÄNNLICH"), "female": ("F", "FEMALE", "WOMAN", "W", "WEIBLICH")}
    return next((sex for sex, names in words.items() if str(text or "").strip().upper() in names), None)


VIEWS = {"AP": {"AP"}, "PA": {"PA"},
         "LATERAL": {"LATERAL", "LAT", "LL", "RL", "LLAT", "RLAT", "LATERALE", "PROFIL", "PERFIL", "SEITLICH"}}
# Words beside a view that leave it what it is. OBLIQUE, for one, does not.
BESIDE = set("""SUPINE ERECT UPRIGHT STANDING SITTING SEMI SEMIERECT PORTABLE MOBILE BEDSIDE BED CROSS TABLE XTABLE
    HORIZONTAL AXIAL LORDOTIC LLD RLD LEFT RIGHT LT RT L R TRUE INSPIRATION EXPIRATION VIEW PROJECTION FRONTAL
    CHEST THORAX PORT FACE GAUCHE DROIT IZQUIERDO IZQUIERDA DERECHO DERECHA IM STEHEN STEHEND LIEGEN LIEGEND""".split())


def view_of(text):
    """AP, PA or LATERAL out of "pa", "POSTERO-ANTERIOR", "AP SUPINE", "LATERAL LEFT" and their like. None for obliques,
    for several views at once, and for a lateral decubitus, a frontal view of a patient who lies on one side."""
    text = str(text or "").strip().upper()
    text = re.sub(r"\bA(NTER(O|IOR))?[^A-Z]*P(OSTERIOR)?\b", "AP", text)
    text = re.sub(r"\bP(OSTER(O|IOR))?[^A-Z]*A(NTERIOR)?\b", "PA", text)
    text = re.sub(r"\bLATERO[^A-Z]*LATERAL\b", "LATERAL", text)
    if text == "L":  # PadChest's and BRAX's lateral
        return "LATERAL"
    words = set(re.findall(r"[^\W_]+", text))
    views = [view for view, names in VIEWS.items() if words & names]
    if len(views) == 1 and words <= BESIDE | VIEWS[views[0]]:
        return views[0]


# AS is three digits and a letter; tables say it in words. ASCII digits only: int() would read those of all scripts.
AGE = re.compile(r"(?:>=? *)?([0-9]{1,4}(?:[.,][0-9]+)?)"
                 r"(?:[ -]*(?:(Y|YR|YRS|YEAR|YEARS|YO|Y/O)"
                 r"|(M|MO|MOS|MONTH|MONTHS)|(W|WK|WKS|WEEK|WEEKS)|(D|DAY|DAYS)))?"
                 r"(?: *\+| +OR +(?:MORE|OLDER|OVER)| +AND +OVER|[ -]+OLD)?")


def age_of(text):
    """Years out of "57", "057Y", "6 months", ">89" or "85 or more"; months, weeks and days as fractions. None if
    blank or above 120, and for "000Y", which stands where no age was entered."""
    if match := AGE.fullmatch(str(text or "").strip().upper()):
        number, years, months, weeks, days = match.groups()
        number = float(number.replace(",", "."))
        if years and number == 0:
            return None
        age = number / 12 if months else number * 7 / 365.25 if weeks else number / 365.25 if days else number
        return age if age <= MAX_AGE else None


def age_between(birth, study):
    """Years from a birth to a study, both as DICOM writes dates (YYYYMMDD, once YYYY.MM.DD): completed years, below two
    of them the fraction. None if one is missing or no date. The first of January 1900 stands for no date."""
    days = []
    for text in (birth, study):
        match = re.fullmatch(r"([0-9]{4})\.?([0-9]{2})\.?([0-9]{2})", str(text or "").strip())
        try:
            days.append(date(*map(int, match.groups())))
        except (ValueError, AttributeError):  # no such day; no match
            return None
    born, taken = days
    years = taken.year - born.year - ((taken.month, taken.day) < (born.month, born.day))
    if not 0 <= years <= MAX_AGE or born == date(1900, 1, 1):
        return None
    return float(years) if years >= 2 else (taken - born).days / 365.25


# ---------------------------------------------------------------------------------------------------------
# Files, read with bounds

@contextlib.contextmanager
def rejecting(reason):
    """Whatever is raised in the block becomes Rejected(reason). Libraries raise what they like on a damaged file, and
    their messages quote it."""
    try:
        yield
    except Rejected:
        raise
    except Exception:
        raise Rejected(reason) from None


@contextlib.contextmanager
def quiet():
    """Without the warnings of pydicom and Pillow, which quote values and file names."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def open_file(path):
    """A file to read, if it is one: a pipe would never end."""
    path = Path(path)
    with rejecting("the file cannot be read"):
        if not path.exists():
            raise Rejected("no such file")
        if not path.is_file():
            raise Rejected("not a regular file")
        size = path.stat().st_size
        if size == 0:
            raise Rejected("empty file")
        if size > MAX_BYTES:
            raise Rejected("a larger file than any radiograph")
        return open(path, "rb")


def is_dicom(path):
    """Whether a file begins as DICOM files do. False for what is no file."""
    try:
        with open_file(path) as file:
            return file.read(132)[128:] == b"DICM"
    except Rejected:
        return False


class Bounded:
    """A file that gives up after MAX_READS reads, and never reads more than there is: 16 MB of zeros are two million
    elements to a parser, and a damaged length can ask for 4 GB."""

    def __init__(self, file):
        self.file, self.reads, self.seek, self.tell = file, 0, file.seek, file.tell
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size=-1):
        self.reads += 1
        if self.reads > MAX_READS:
            raise Rejected("a DICOM header of more elements than any radiograph has")
        return self.file.read(self.size if size < 0 else min(size, self.size))


DEFLATED, EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"  # transfer syntaxes, of one length


def inflate(content):
    """A deflated DICOM file as the same file not deflated, at most MAX_BYTES: a bomb is a thousand times its file.
    What is deflated follows the file meta information, whose first element says how long it is (PS3.10, 7.1)."""
    start = 144 + struct.unpack("<L", content[140:144])[0]
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(content[start:], MAX_BYTES)
    if inflater.unconsumed_tail:
        raise Rejected("a larger file than any radiograph")
    return content[:start].replace(DEFLATED, EXPLICIT) + body


def read_dicom_file(path, **options):
    """A dataset, by pydicom's dcmread with its options. Values are decoded when they are looked at: do so in
    `rejecting`."""
    with open_file(path) as file, rejecting("damaged DICOM header"):
        if DEFLATED in file.read(4096):
            file.seek(0)
            file = io.BytesIO(inflate(file.read()))
        return pydicom.dcmread(Bounded(file), **options)


# ---------------------------------------------------------------------------------------------------------
# What a header says

WORDS = ("PatientID", "PatientSex", "PatientAge", "PatientBirthDate", "StudyDate", "AcquisitionDate",
         "ViewPosition", "ViewCodeSequence", "PatientOrientation")


def value_of(ds, keyword):
    """The value of an element, None if it is absent or empty."""
    value = ds.get(keyword)
    return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value


def text_of(ds, keyword):
    """The text of an element in capitals, without padding, its values parted by a backslash; "" if absent or empty."""
    value = value_of(ds, keyword)
    values = value if isinstance(value, (list, MultiValue)) else [value if value is not None else ""]
    return "\\".join(str(item).strip(" \0") for item in values).upper()


def orientation(ds):
    """Where in the patient an image's rows and its columns run to, one letter each of A, P, R, L, H, F; "" if it is not
    said. A frontal radiograph as one looks at it is ("L", "F"): the patient's left is on the right."""
    letters = [direction[:1] for direction in text_of(ds, "PatientOrientation").split("\\")]
    return tuple(letters) if len(letters) == 2 and set(letters) <= set("APRLHF") else ""


# PS3.16, CID 4010, in SNOMED CT and in the older SNOMED RT that PACS still hold
VIEW_CODES = {"399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-10214": "PA", "R-40888": "PA",
              "399067008": "LATERAL", "R-102CD": "LATERAL", "399198007": "LATERAL", "R-10232": "LATERAL",
              "399173006": "LATERAL", "R-10236": "LATERAL"}


def dicom_view(ds):
    """The view by its name, by its code, or, of a lateral, by its orientation; None where name and code contradict."""
    views = {view_of(text_of(ds, "ViewPosition"))}
    for item in value_of(ds, "ViewCodeSequence") or ():
        views.add(VIEW_CODES.get(text_of(item, "CodeValue")) or view_of(text_of(item, "CodeMeaning")))
    views.discard(None)
    if not views and orientation(ds) in (("A", "F"), ("P", "F")):
        return "LATERAL"
    return views.pop() if len(views) == 1 else None


def dicom_age(ds):
    """PatientAge, or the years from birth to the study."""
    text = text_of(ds, "PatientAge")
    age = age_of(text) if text.strip("0") else None  # zeros without a unit are a placeholder too
    study = value_of(ds, "StudyDate") or value_of(ds, "AcquisitionDate")
    return age if age is not None else age_between(value_of(ds, "PatientBirthDate"), study)


def describe(ds):
    """Patient, sex, age and view as a dataset says them; what is unknown is absent. Raises Rejected if damaged."""
    with rejecting("damaged DICOM header"):
        patient = str(value_of(ds, "PatientID") or "").strip(" \0")
        return drop_unknown({"patient": patient or None, "sex": sex_of(text_of(ds, "PatientSex")),
                             "age": dicom_age(ds), "view": dicom_view(ds)})


def dicom_tags(path):
    """`describe` of a DICOM file; of one that is damaged only reject_reason. Nothing of a file that is not DICOM."""
    if not is_dicom(path):
        return {}
    try:
        with quiet():
            return describe(read_dicom_file(path, stop_before_pixels=True, specific_tags=list(WORDS)))
    except Rejected as reason:
        return {"reject_reason": str(reason)}
