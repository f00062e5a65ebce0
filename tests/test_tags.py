"""What headers and tables say of a person and a view, spelled as hospitals spell it; and files that are no files."""
import os
import zlib

import numpy as np
import pydicom
import pytest
from pictures import RAMP, code, write_dicom

import data
from radiographs import pixels, tags
from radiographs.tags import Rejected


@pytest.mark.parametrize("text, years", [
    ("057Y", 57), ("057y", 57), ("0057Y", 57), ("57", 57), (" 57 ", 57), ("57.0", 57), ("57.5", 57.5),
    ("57 years", 57), ("1 year old", 1),
    ("006M", 0.5), ("6 months", 0.5), ("6M", 0.5), ("002W", 14 / 365.25), ("003D", 3 / 365.25), ("000D", 0), ("0", 0),
    ("85 or more", 85), ("90+", 90), (">89", 89), ("000Y", None), ("0Y", None), ("1_0", None), ("٤٥", None), ("", None),
    (None, None), ("old", None),
    ("414Y", None), ("121", None), ("-5", None), ("1e1", None), ("5Y6M", None), ("57X", None), ("nan", None),
    ("057Y\n", 57), ("45,5", 45.5), ("45yo", 45), ("45 y/o", 45), ("45-year-old", 45), ("18 mo", 1.5), ("45-", None),
    ("40-50", None), ("-045Y", None)])
def test_ages(text, years):
    assert tags.age_of(text) == (years if years is None else pytest.approx(years))


@pytest.mark.parametrize("birth, study, years", [
    ("19630512", "20200511", 56), ("19630512", "20200512", 57), ("1963.05.12", "2020.05.12", 57),
    ("20200101", "20200701", 182 / 365.25),
    ("20200101", "20200101", 0), ("20200102", "20200101", None), ("18630512", "20200512", None),
    ("19000101", "20100101", None),
    ("", "20200101", None), ("19630512", "", None), ("19630232", "20200101", None), ("1963", "20200101", None)])
def test_ages_by_dates(birth, study, years):
    assert tags.age_between(birth, study) == (years if years is None else pytest.approx(years))


@pytest.mark.parametrize("text, view", [
    ("PA", "PA"), ("pa", "PA"), ("POSTERO-ANTERIOR", "PA"), ("posteroanterior", "PA"), ("POSTERO_ANTERIOR", "PA"),
    ("Postero Anterior", "PA"),
    ("PA ERECT", "PA"), ("P.A.", "PA"), ("P-A", "PA"), ("Posterior-Anterior", "PA"), ("FRONTAL PA", "PA"),
    ("CHEST PA", "PA"), ("AP", "AP"), ("ap", "AP"), ("AP SUPINE", "AP"), ("AP_HORIZONTAL", "AP"),
    ("AP LLD", "AP"), ("A/P", "AP"), ("ANTERIOR/POSTERIOR", "AP"), ("latero-lateral", "LATERAL"),
    ("Antero-Posterior", "AP"), ("ANTERO_POSTERIOR", "AP"), ("AP AXIAL", "AP"), ("PORTABLE AP", "AP"),
    ("Lateral", "LATERAL"), ("LAT", "LATERAL"),
    ("LL", "LATERAL"), ("RL", "LATERAL"), ("L", "LATERAL"), ("LEFT LATERAL", "LATERAL"), ("LATERAL_LEFT", "LATERAL"),
    ("XTABLE LATERAL", "LATERAL"),
    ("PA OBLIQUE", None), ("RAO", None), ("LPO", None), ("LATERAL DECUBITUS", None), ("LT-DECUB", None),
    ("AP AND LATERAL", None), ("PA/LAT", None),
    ("TRUE LATERAL", "LATERAL"), ("Thorax p.a. im Stehen", "PA"), ("Thorax ap liegend", "AP"),
    ("THORAX SEITLICH", "LATERAL"), ("Perfil izquierdo", "LATERAL"), ("FACE PA", "PA"), ("not PA", None),
    ("COSTAL", None), ("FRONTAL", None), ("PALATE", None), ("APEX", None), ("", None), (None, None)])
def test_views(text, view):
    assert tags.view_of(text) == view


@pytest.mark.parametrize("text, sex", [
    ("M", "male"), (" f ", "female"), ("Woman", "female"), ("w", "female"), ("weiblich", "female"),
    ("männlich", "male"), ("O", None), ("H", None), ("not male", None), ("1", None), ("FALSE", None), (None, None)])
def test_sexes(text, sex):
    assert tags.sex_of(text) == sex


@pytest.mark.parametrize("header, said", [
    ({}, {"age": 57, "sex": "female", "view": "PA"}),
    ({"PatientSex": "m", "PatientAge": "006M", "ViewPosition": "ll"}, {"age": 0.5, "sex": "male", "view": "LATERAL"}),
    ({"PatientSex": "O", "PatientAge": "000Y", "ViewPosition": "RAO"}, {}),
    ({"PatientSex": "", "PatientAge": "000", "ViewPosition": ""}, {}),
    ({"PatientAge": "", "PatientBirthDate": "19630512", "StudyDate": "20200511"},
     {"age": 56, "sex": "female", "view": "PA"}),
    ({"PatientAge": None, "PatientBirthDate": "19630512", "AcquisitionDate": "20200511"},
     {"age": 56, "sex": "female", "view": "PA"}),
    ({"PatientAge": "000Y", "PatientBirthDate": "19630512"}, {"sex": "female", "view": "PA"}),
    ({"ViewPosition": "", "ViewCodeSequence": [code("272479007", "postero-anterior")]},
     {"age": 57, "sex": "female", "view": "PA"}),
    ({"ViewPosition": None, "ViewCodeSequence": [code("R-10206", "antero-posterior", "SRT")]},
     {"age": 57, "sex": "female", "view": "AP"}),
    ({"ViewPosition": None, "ViewCodeSequence": [code("399173006", "left lateral")]},
     {"age": 57, "sex": "female", "view": "LATERAL"}),
    ({"ViewPosition": None, "ViewCodeSequence": [code("399059000", "postero-anterior oblique")]},
     {"age": 57, "sex": "female"}),
    ({"ViewPosition": None, "ViewCodeSequence": [code("7", "Lateral", "99LOCAL")]},
     {"age": 57, "sex": "female", "view": "LATERAL"}),
    # a contradiction
    ({"ViewPosition": "PA", "ViewCodeSequence": [code("399067008", "lateral")]}, {"age": 57, "sex": "female"}),
    ({"ViewPosition": None, "PatientOrientation": ["A", "F"]}, {"age": 57, "sex": "female", "view": "LATERAL"}),
    ({"ViewPosition": None, "PatientOrientation": ["L", "F"]}, {"age": 57, "sex": "female"}),
    ({"PatientID": "  "}, {"age": 57, "sex": "female", "view": "PA"})])
def test_headers(tmp_path, header, said):
    found = tags.dicom_tags(write_dicom(tmp_path / "a.dcm", RAMP, **header))
    if header.get("PatientID") is None:
        assert found.pop("patient") == "secret name"
    assert found == said


# --- damaged, endless and large files -------------------------------------------------------------------

def damage(path, keyword, change):
    """The file with other bytes in the eight that begin an element: its tag, its VR and its length."""
    content, tag = bytearray(path.read_bytes()), pydicom.tag.Tag(keyword)
    start = content.index(tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little"))
    for offset, byte in change.items():
        content[start + offset] = byte
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("keyword", ["PatientID", "PatientAge", "ViewPosition", "Rows", "BitsStored"])
@pytest.mark.parametrize("vr", [b"ZZ", b"QI", b"FD", b"AT", b"SQ", b"UN"])
def test_one_damaged_header_costs_one_file_and_is_not_quoted(tmp_path, keyword, vr):
    """A VR that does not exist, or one that does not fit: pydicom decodes a value when it is looked at."""
    root = tmp_path / "in"
    root.mkdir()
    write_dicom(root / "good.dcm", RAMP)
    damage(write_dicom(root / "bad.dcm", RAMP), keyword, {4: vr[0], 5: vr[1]})
    try:
        pixels.read_radiograph(root / "bad.dcm", 64)
        damaged = False
    except Rejected as reason:
        damaged = True
        assert "secret" not in str(reason)
    counts = data.prepare("folder", root, tmp_path / "out", size=64)
    assert counts["taken"] == 2 - damaged and counts["rejected"] == damaged
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*.csv"))
    if vr in (b"ZZ", b"QI"):
        assert damaged and tags.dicom_tags(root / "bad.dcm").get("reject_reason") in (
            None if keyword in ("Rows", "BitsStored") else "damaged DICOM header",)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "folder.dcm").mkdir()
    for name, reason in (("pipe.dcm", "not a regular file"), ("folder.dcm", "not a regular file"),
                         ("none.dcm", "no such file")):
        for read in (lambda path: pixels.read_radiograph(path, 64), pixels.read_picture, pixels.read_dicom,
                     pixels.is_synthetic):
            with pytest.raises(Rejected, match=reason):
                read(tmp_path / name)
        assert tags.dicom_tags(tmp_path / name) == {} and not tags.is_dicom(tmp_path / name)
    (tmp_path / "link.dcm").symlink_to(write_dicom(tmp_path / "a.dcm", RAMP))
    assert pixels.read_radiograph(tmp_path / "link.dcm", 64).max() > 250


ELEMENT = b"\x08\x00\x05\x00CS\x00\x00"                              # an empty one, eight bytes


@pytest.mark.parametrize("after",
                         [bytes(2 ** 22), ELEMENT * 2 ** 18, b"\x02\x00\x00\x00UL\x04\x00\0\0\0\0" + ELEMENT * 2 ** 18,
                                   b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 2 ** 17])
def test_a_header_that_does_not_end_is_given_up(tmp_path, monkeypatch, after):
    """Zeros, elements without end, sequences in sequences: after so many reads, whatever the size of the file."""
    monkeypatch.setattr(tags, "MAX_READS", 5000)
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + after)
    with pytest.raises(Rejected, match="damaged DICOM header|more elements"):
        pixels.read_radiograph(tmp_path / "a.dcm", 64)
    assert "reject_reason" in tags.dicom_tags(tmp_path / "a.dcm")


def test_a_deflated_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """A file of 1 MB that inflates to 1 GB; and one that does not is read as before."""
    ds = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", RAMP))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "a.dcm", ds)
    assert np.array_equal(pixels.read_dicom(tmp_path / "a.dcm"), (RAMP / 255).astype(np.float32))
    content = (tmp_path / "a.dcm").read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    deflater = zlib.compressobj(wbits=-15)
    bomb = deflater.compress(bytes(2 ** 24)) + deflater.flush()
    (tmp_path / "b.dcm").write_bytes(content[:start] + bomb)
    monkeypatch.setattr(tags, "MAX_BYTES", 2 ** 22)
    assert len(bomb) < 2 ** 16
    with pytest.raises(Rejected, match="larger file than any radiograph"):
        pixels.read_dicom(tmp_path / "b.dcm")


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "a.dcm", "wb") as file:
        file.write(bytes(128) + b"DICM")
        file.truncate(2 ** 40)                                       # a sparse file of a terabyte
    with pytest.raises(Rejected, match="larger file than any radiograph"):
        pixels.read_radiograph(tmp_path / "a.dcm", 64)
