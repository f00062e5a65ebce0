"""Every grey stage of DICOM, on images that hold each stored value once, against the standard's own pseudo-code, one
value at a time."""
import math

import numpy as np
import pydicom
import pytest
from pictures import RAMP, code, lut, write_dicom
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from radiographs import pixels
from radiographs.tags import Rejected

UNSIGNED = np.arange(4096, dtype=np.uint16).reshape(64, 64)          # 12 bits
SIGNED = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)


def window(x, c, w, kind):
    """C.11.2.1.2 and C.11.2.1.3, with y from 0 to 1."""
    if kind == "LINEAR":
        if x <= c - 0.5 - (w - 1) / 2:
            return 0.0
        if x > c - 0.5 + (w - 1) / 2:
            return 1.0
        return (x - (c - 0.5)) / (w - 1) + 0.5
    if kind == "LINEAR_EXACT":
        if x <= c - w / 2:
            return 0.0
        if x > c + w / 2:
            return 1.0
        return (x - c) / w + 0.5
    return 1 / (1 + math.exp(-4 * (x - c) / w))


def expected(stored, slope=1, intercept=0, shown=None, inverse=False):
    """The grey of an image of 12 bits: rescaled, then through `shown`, or from the least possible to the greatest."""
    ends = sorted(end * slope + intercept for end in ((-2048, 2047) if stored.dtype.kind == "i" else (0, 4095)))
    grey = [shown(x * slope + intercept) if shown else (x * slope + intercept - ends[0]) / (ends[1] - ends[0])
            for x in stored.ravel().tolist()]
    grey = np.array(grey).reshape(stored.shape)
    return 1 - grey if inverse else grey


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("stored", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("slope, intercept", [(None, None), (1, 0), (0.5, -1024), (-1, 4095), (-2, 0)])
@pytest.mark.parametrize("center, width, kind", [
    (None, None, None), (1000, 600, None), (1000, 600, "LINEAR"), (1000.5, 1, "LINEAR"), (0, 2, "LINEAR"),
    (1000, 0.5, "LINEAR_EXACT"), (1000, 600, "LINEAR_EXACT"), (900, 700, "SIGMOID"), (2047.5, 4096, "LINEAR")])
def test_every_stored_value(tmp_path, photometric, stored, slope, intercept, center, width, kind):
    path = write_dicom(tmp_path / "a.dcm", stored, BitsStored=12, PhotometricInterpretation=photometric,
                       RescaleSlope=slope, RescaleIntercept=intercept,
                       WindowCenter=center, WindowWidth=width, VOILUTFunction=kind)
    shown = None if width is None else lambda x: window(x, center, width, kind or "LINEAR")
    grey = expected(stored, 1 if slope is None else slope, intercept or 0, shown, photometric == "MONOCHROME1")
    assert np.abs(pixels.read_dicom(path) - grey).max() < 1e-6


EMPTY = {"WindowCenter": "", "WindowWidth": "", "VOILUTFunction": "", "VOILUTSequence": [], "RescaleSlope": "",
         "RescaleType": "",
         "RescaleIntercept": "", "ModalityLUTSequence": [], "PixelPaddingValue": "", "PixelPaddingRangeLimit": "",
         "PixelAspectRatio": "", "PixelSpacing": "", "PresentationLUTShape": "", "NumberOfFrames": "", "HighBit": "",
         "PatientOrientation": "", "BodyPartExamined": "", "Modality": "", "AnatomicRegionSequence": [],
         "PatientAge": "",
         "ViewCodeSequence": [], "PatientID": ""}


@pytest.mark.parametrize("keyword", EMPTY)
def test_an_empty_element_is_an_absent_one(tmp_path, keyword):
    path = write_dicom(tmp_path / "a.dcm", UNSIGNED, BitsStored=12, **{keyword: EMPTY[keyword]})
    assert keyword in pydicom.dcmread(path)
    assert np.abs(pixels.read_dicom(path) - UNSIGNED / 4095).max() < 1e-6


def test_words_are_read_in_any_case(tmp_path):
    tags = {"WindowCenter": 900, "WindowWidth": 700, "Modality": "dx", "BodyPartExamined": "Chest"}
    path = write_dicom(tmp_path / "a.dcm", UNSIGNED, BitsStored=12, PhotometricInterpretation="Monochrome1", **tags,
                       VOILUTFunction="sigmoid")
    grey = expected(UNSIGNED, shown=lambda x: window(x, 900, 700, "SIGMOID"), inverse=True)
    assert np.abs(pixels.read_dicom(path) - grey).max() < 1e-6


# --- look-up tables -------------------------------------------------------------------------------------

FALLING = np.linspace(65535, 0, 4096).round().astype(int)            # a modality LUT that inverts
ROOT = (np.sqrt(np.arange(3000) / 2999) * 1023).round().astype(int)  # a VOI LUT of 10 bits and 3000 entries
BYTES = np.arange(256)[::-1]


def packed(values):
    """Entries of 8 bits as OW holds them, two in a word, the first in the lower byte."""
    return np.asarray(values, np.uint8).tobytes()


def eight_bits(first, values):
    item = lut(first, [0], 8)
    item.LUTDescriptor = [len(values), first, 8]
    item.add_new("LUTData", "OW", packed(values))
    return item


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("modality, voi, by_hand", [
    (lut(0, FALLING, 16), None, lambda x: FALLING[x] / 65535),
    (None, lut(500, ROOT, 10), lambda x: ROOT[min(max(x - 500, 0), 2999)] / 1023),          # clipped at both ends
    # 65536 entries are written as 0
    (lut(0, FALLING, 16), lut(0, list(range(65536)), 16), lambda x: FALLING[x] / 65535),
    (lut(0, FALLING // 16, 16), lut(500, ROOT, 10), lambda x: ROOT[min(max(FALLING[x] // 16 - 500, 0), 2999)] / 1023),
    (None, lut(0, BYTES, 8), lambda x: BYTES[min(x, 255)] / 255)])
def test_look_up_tables(tmp_path, photometric, vr, modality, voi, by_hand):
    for item in filter(None, (modality, voi)):
        values = item.LUTData if not isinstance(item.LUTData, bytes) else np.frombuffer(item.LUTData, "<u2")
        item.add_new("LUTData", vr, np.asarray(values, "<u2").tobytes() if vr == "OW" else list(map(int, values)))
    path = write_dicom(tmp_path / "a.dcm", UNSIGNED, BitsStored=12, PhotometricInterpretation=photometric,
                       ModalityLUTSequence=modality and [modality], VOILUTSequence=voi and [voi])
    grey = np.array([by_hand(x) for x in range(4096)]).reshape(64, 64)
    assert np.abs(pixels.read_dicom(path) - (1 - grey if photometric == "MONOCHROME1" else grey)).max() < 1e-5


def test_a_lut_is_meant_where_a_window_is_there_too_and_a_window_follows_a_modality_lut(tmp_path):
    tags = {"BitsStored": 12, "WindowCenter": 30000, "WindowWidth": 20000}
    voi = write_dicom(tmp_path / "a.dcm", UNSIGNED, VOILUTSequence=[lut(0, list(range(4096)), 12)], **tags)
    assert np.abs(pixels.read_dicom(voi) - UNSIGNED / 4095).max() < 1e-6
    modality = write_dicom(tmp_path / "b.dcm", UNSIGNED, ModalityLUTSequence=[lut(0, FALLING, 16)], **tags)
    grey = np.array([window(x, 30000, 20000, "LINEAR") for x in FALLING.tolist()]).reshape(64, 64)
    assert np.abs(pixels.read_dicom(modality) - grey).max() < 1e-6


def test_luts_of_eight_bits_may_have_two_entries_a_word(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", UNSIGNED, BitsStored=12, VOILUTSequence=[eight_bits(0, BYTES)])
    grey = BYTES[np.minimum(UNSIGNED, 255)] / 255
    assert np.abs(pixels.read_dicom(path) - grey).max() < 1e-6


@pytest.mark.parametrize("first, vr", [(-2048, "SS"), (63488, "US")], ids=["SS", "US that holds a negative number"])
def test_the_first_value_of_a_lut_is_signed_where_the_pixels_are(tmp_path, first, vr):
    values = list(range(0, 65536, 16))                               # 4096 entries
    path = write_dicom(tmp_path / "a.dcm", SIGNED, BitsStored=12,
                       VOILUTSequence=[lut(first, values, 16, descriptor=vr)])
    assert np.abs(pixels.read_dicom(path) - (SIGNED.astype(int) + 2048) * 16 / 65535).max() < 1e-6


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_luts_and_padding_in_other_transfer_syntaxes(tmp_path, syntax):
    """In implicit VR the dictionary leaves open whether such an element is US, SS or OW."""
    path = write_dicom(tmp_path / "a.dcm", SIGNED, BitsStored=12, PixelPaddingValue=-2000,
                       VOILUTSequence=[lut(-2048, FALLING, 16, descriptor="SS")],
                       PixelRepresentation=1)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = SIGNED.astype(">i2").tobytes()
    pydicom.dcmwrite(path, ds, little_endian=syntax != ExplicitVRBigEndian,
                     implicit_vr=syntax == ImplicitVRLittleEndian, force_encoding=True)
    grey = (FALLING / 65535)[SIGNED.astype(int) + 2048]
    grey[SIGNED == -2000] = 0
    assert np.abs(pixels.read_dicom(path) - grey).max() < 1e-5


# --- bits -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("array, tags", [
    (UNSIGNED << 4, {"BitsStored": 12, "HighBit": 15}),
    (UNSIGNED << 2 | 0x4002, {"BitsStored": 12, "HighBit": 13}),         # other bits around: old overlays
    (UNSIGNED | 0xF000, {"BitsStored": 12}),
    (UNSIGNED.astype(np.uint32), {"BitsStored": 12}),
    (UNSIGNED.astype(np.uint32) << 20, {"BitsStored": 12, "HighBit": 31}),
    ((UNSIGNED - 2048) & 0x0FFF, {"BitsStored": 12, "PixelRepresentation": 1}),  # negative numbers in 12 bits
    (SIGNED << 4, {"BitsStored": 12, "HighBit": 15}),
    (SIGNED.astype(np.int32), {"BitsStored": 12})])
def test_where_the_bits_lie(tmp_path, array, tags):
    assert np.abs(pixels.read_dicom(write_dicom(tmp_path / "a.dcm", array, **tags)) - UNSIGNED / 4095).max() < 1e-6


@pytest.mark.parametrize("bits", [1, 6, 8, 10, 15, 16])
def test_the_stored_bits_set_the_scale(tmp_path, bits):
    stored = np.linspace(0, 2 ** bits - 1, 4096).round().astype(np.uint16).reshape(64, 64)
    grey = pixels.read_dicom(write_dicom(tmp_path / "a.dcm", stored, BitsStored=bits))
    assert np.abs(grey - stored / (2 ** bits - 1)).max() < 1e-6


def test_more_depth_than_used_is_refused_or_told(tmp_path):
    """12 bits in 16 without a window: nothing in the file says which value is white."""
    path = write_dicom(tmp_path / "a.dcm", UNSIGNED)
    with pytest.raises(Rejected, match="less than a quarter of the stored depth"):
        pixels.read_dicom(path)
    assert np.abs(pixels.read_dicom(path, used_bits=12) - UNSIGNED / 4095).max() < 1e-6
    with pytest.raises(Rejected, match="beyond the used depth"):
        pixels.read_dicom(path, used_bits=11)
    padded = write_dicom(tmp_path / "c.dcm", np.where(UNSIGNED < 9, 65535, UNSIGNED).astype(np.uint16),
                         PixelPaddingValue=65535)
    assert np.abs(pixels.read_dicom(padded, used_bits=12) - np.where(UNSIGNED < 9, 0, UNSIGNED) / 4095).max() < 1e-6
    with pytest.raises(Rejected, match="less than a quarter"):       # padding does not count as depth
        pixels.read_dicom(padded)
    windowed = write_dicom(tmp_path / "b.dcm", UNSIGNED, WindowCenter=2048, WindowWidth=4096)
    assert np.abs(pixels.read_dicom(windowed, used_bits=11) - UNSIGNED / 4095).max() < 1e-6   # a window says it


# --- padding --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("stored", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("value, limit", [(4095, None), (3000, 4000), (4000, 3000), (0, None)])
def test_padding_is_black(tmp_path, photometric, stored, value, limit):
    """Padding is told by the stored value, before any LUT, and is black whatever the polarity."""
    shift = int(stored.min())
    path = write_dicom(tmp_path / "a.dcm", stored, BitsStored=12, PhotometricInterpretation=photometric,
                       RescaleSlope=2, RescaleIntercept=7,
                       PixelPaddingValue=value + shift, PixelPaddingRangeLimit=None if limit is None else limit + shift)
    grey = UNSIGNED / 4095 if photometric == "MONOCHROME2" else 1 - UNSIGNED / 4095
    ends = sorted((value, value if limit is None else limit))
    grey[(UNSIGNED >= ends[0]) & (UNSIGNED <= ends[1])] = 0
    assert np.abs(pixels.read_dicom(path) - grey).max() < 1e-6


# --- geometry -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tags", [
    {"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2]}, {"ImagerPixelSpacing": [0.4, 0.2]},
    {"NominalScannedPixelSpacing": [0.2, 0.1]},
    {"PixelSpacing": [0, 0], "PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2], "PixelAspectRatio": [1, 1]}])
def test_a_disc_of_high_pixels_comes_out_round(tmp_path, tags):
    """Pixels twice as high as wide: 64 rows are as far as 128 columns."""
    y, x = np.mgrid[0.5:64, 0.5:128]
    disc = np.where((2 * y - 64) ** 2 + (x - 64) ** 2 < 40 ** 2, 200, 20).astype(np.uint8)
    grey = pixels.read_radiograph(write_dicom(tmp_path / "a.dcm", disc, **tags), 128)
    y, x = np.mgrid[0.5:128, 0.5:128]
    far = np.abs(np.hypot(y - 64, x - 64) - 40) > 3                  # away from the edge of the disc
    assert np.array_equal(grey[far] > 110, (np.hypot(y - 64, x - 64) < 40)[far])


def test_wide_pixels_too(tmp_path):
    grey = pixels.read_dicom(write_dicom(tmp_path / "a.dcm", RAMP, PixelAspectRatio=[4, 5]))
    assert grey.shape == (100, 100)                                  # 100 rows, 80 columns a quarter wider
    assert np.abs(grey[:, 0] - RAMP[:, 0] / 255).max() < 0.02


# --- which are taken ------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["CHEST", "Chest PA", "THORAX", "TORAX", "TÓRAX", "T?RAX", "PECHO", "LUNG", "UNKNOWN",
                                  "CHESTABDOMEN", "", "  ",
                                  "PORT CHEST", "BRUSTKORB", "XR", "CHEST RIBS"])
def test_body_parts_that_name_no_other_are_taken(tmp_path, part):
    pixels.read_dicom(write_dicom(tmp_path / "a.dcm", RAMP, BodyPartExamined=part, SpecificCharacterSet="ISO_IR 192"))


@pytest.mark.parametrize("part", ["HAND", "hand", "RIBCAGE", "TSPINE", "THORACIC SPINE", "L-SPINE", "RODILLA", "MAO",
                                  "MÃO", "Schädel", "LEFT KNEE",
                                  "ABDOMEN", "CLAVICLE", "HANDS", "BOTH KNEES", "WHOLE BODY", "LOW_EXM", "ABD",
                                  "ABDOME", "FEET AP"])
def test_other_body_parts_are_refused(tmp_path, part):
    with pytest.raises(Rejected, match="not a chest"):
        pixels.read_dicom(write_dicom(tmp_path / "a.dcm", RAMP, BodyPartExamined=part,
                                      SpecificCharacterSet="ISO_IR 192"))


def test_the_anatomic_region_counts_where_the_body_part_is_blank(tmp_path):
    hand, chest = code("85562004", "Hand"), code("51185008", "Chest")
    with pytest.raises(Rejected, match="body part HAND"):
        pixels.read_dicom(write_dicom(tmp_path / "a.dcm", RAMP, BodyPartExamined="", AnatomicRegionSequence=[hand]))
    pixels.read_dicom(write_dicom(tmp_path / "b.dcm", RAMP, BodyPartExamined=None, AnatomicRegionSequence=[chest]))


@pytest.mark.parametrize("tags, reason", [
    ({"Modality": "CT"}, "modality CT"), ({"Modality": "SURNAME"}, "modality unknown"),
    ({"NumberOfFrames": 2}, "more than one frame"),
    ({"PresentationIntentType": "FOR PROCESSING"}, "raw image"), ({"SamplesPerPixel": 3}, "not grey"),
    ({"PhotometricInterpretation": "RGB"}, "not grey"), ({"PhotometricInterpretation": "PALETTE COLOR"}, "not grey"),
    ({"PhotometricInterpretation": None}, "PhotometricInterpretation is missing"),
    ({"WindowCenter": 100, "WindowWidth": 0}, "WindowWidth"),
    ({"WindowCenter": 100, "WindowWidth": -200}, "WindowWidth"),
    ({"WindowCenter": 100, "WindowWidth": 0.5}, "WindowWidth"),
    ({"WindowCenter": 100}, "without its center or its width"),
    ({"WindowWidth": 100}, "without its center or its width"),
    ({"WindowCenter": "1e999", "WindowWidth": 9}, "WindowCenter"),
    ({"WindowCenter": 100, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, "WindowWidth"),
    ({"WindowCenter": 100, "WindowWidth": 90, "VOILUTFunction": "SURNAME"}, "VOILUTFunction is none of"),
    ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope is 0"),
    ({"RescaleSlope": "1e999"}, "RescaleSlope is not"),
    ({"RescaleSlope": [1, 2]}, "RescaleSlope has several"), ({"RescaleIntercept": "nan"}, "RescaleIntercept is not"),
    ({"RescaleIntercept": 1e30}, "no difference"), ({"PresentationLUTShape": "INVERSE"}, "contradicts"),
    ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, "contradicts"),
    ({"PresentationLUTShape": "LIN OD"}, "contradicts"), ({"BitsStored": 9}, "BitsStored"),
    ({"BitsStored": 0, "HighBit": 7}, "BitsStored"),
    ({"HighBit": 3}, "HighBit"), ({"HighBit": 8}, "HighBit"), ({"BitsAllocated": 12}, "BitsAllocated"),
    ({"BitsAllocated": None}, "BitsAllocated"),
    ({"PixelRepresentation": 2}, "PixelRepresentation"),
    ({"Rows": 40_000, "Columns": 65_535}, "more than any radiograph"),
    ({"Rows": 0}, "no pixels"), ({"Rows": 101}, "cannot be decoded: damaged, cut short"),
    ({"PixelAspectRatio": [100, 1]}, "far from square"), ({"PixelPaddingValue": 256}, "PixelPaddingValue"),
    ({"ModalityLUTSequence": [lut(0, BYTES, 8)] * 2}, "more than one modality LUT"),
    ({"VOILUTSequence": [lut(0, [0, 256], 8)]}, "above what its bits"),
    ({"VOILUTSequence": [lut(0, [0, 1], 7)]}, "LUT descriptor"),
    ({"PatientOrientation": ["R", "F"]}, "mirrored"), ({"PatientOrientation": ["L", "H"]}, "turned"),
    ({"PatientOrientation": ["F", "R"]}, "turned")])
def test_what_the_standard_does_not_allow_is_refused_by_name(tmp_path, tags, reason):
    path = write_dicom(tmp_path / "a.dcm", RAMP, **tags)
    with pytest.raises(Rejected, match=reason) as caught:
        pixels.read_radiograph(path, 64)
    assert "SURNAME" not in str(caught.value)


@pytest.mark.parametrize("orientation", [["L", "F"], ["A", "F"], ["P", "F"], ["LF", "FP"], "UNKNOWN", ["", ""],
                                         ["LEFT", "FOOT"]])
def test_upright_images_are_taken(tmp_path, orientation):
    path = write_dicom(tmp_path / "a.dcm", RAMP, PatientOrientation=orientation)
    assert np.abs(pixels.read_dicom(path) - RAMP / 255).max() < 1e-6


def test_a_lut_shorter_than_it_says_is_refused(tmp_path):
    item = lut(0, [0, 100, 200], 8)
    item.LUTDescriptor = [200, 0, 8]
    with pytest.raises(Rejected, match="fewer entries"):
        pixels.read_dicom(write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[item]))


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("elements", [[], ["LUTDescriptor", "LUTData"]], ids=["no element", "empty elements"])
def test_a_lut_that_holds_nothing_is_none(tmp_path, keyword, elements):
    item = pydicom.Dataset()
    for name in elements:
        item.add_new(name, "OW", b"")
    tags = {"BitsStored": 12, "WindowCenter": 900, "WindowWidth": 700, keyword: [item]}
    grey = expected(UNSIGNED, shown=lambda x: window(x, 900, 700, "LINEAR"))
    assert np.abs(pixels.read_dicom(write_dicom(tmp_path / "a.dcm", UNSIGNED, **tags)) - grey).max() < 1e-6


def test_a_voi_lut_that_leaves_most_of_its_depth_unused_is_refused(tmp_path):
    """14 bits of entries in a LUT that says 16: by the standard all is darker than a quarter."""
    dark = lut(0, (np.arange(4096) * 4 - 1).clip(0), 16)
    with pytest.raises(Rejected, match="a VOI LUT of less than a quarter of the depth that it says"):
        pixels.read_dicom(write_dicom(tmp_path / "a.dcm", UNSIGNED, BitsStored=12, VOILUTSequence=[dark]))
    light = lut(0, np.arange(4096) * 5, 16)
    grey = pixels.read_dicom(write_dicom(tmp_path / "b.dcm", UNSIGNED, BitsStored=12, VOILUTSequence=[light]))
    assert np.abs(grey - UNSIGNED * 5.0 / 65535).max() < 1e-6


def test_no_pixels(tmp_path):
    for keyword, reason in ((None, "no pixel data"), ("FloatPixelData", "floating-point")):
        ds = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", RAMP))
        del ds.PixelData
        if keyword:
            setattr(ds, keyword, np.zeros(8000, np.float32).tobytes())
        ds.save_as(tmp_path / "b.dcm")
        with pytest.raises(Rejected, match=reason):
            pixels.read_radiograph(tmp_path / "b.dcm", 64)
