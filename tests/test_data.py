import csv
import math

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import data
from data import InputError, Rejected

RAMP = np.linspace(0, 255, 100 * 80).reshape(100, 80).round().astype(np.uint8)


def write_dicom(path, array, **tags):
    """A minimal DX file; tags set to None are left out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, generate_uid()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = array.shape
    ds.BitsAllocated = array.dtype.itemsize * 8
    settings = {"Modality": "DX", "BodyPartExamined": "CHEST", "PhotometricInterpretation": "MONOCHROME2",
                "SamplesPerPixel": 1, "BitsStored": ds.BitsAllocated, "PixelRepresentation": int(array.dtype.kind == "i"),
                "PatientID": "secret name", "PatientSex": "F", "PatientAge": "057Y", "ViewPosition": "PA"} | tags
    for tag, value in settings.items():
        if value is not None:
            setattr(ds, tag, value)
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData = array.tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


# --- fields ---------------------------------------------------------------------------------------------

def test_there_are_19_fields_in_the_master_csvs_names():
    assert len(data.FIELDS) == 19 and len(data.CODED) == 18 and len(data.COLUMNS) == 22
    assert data.FINDINGS["enlarged_cardiomediastinum"] == "Enlarged Cardiomediastinum"


def test_encode_metadata_by_hand():
    records = [{"age": 61.5, "sex": "male", "view": "LATERAL", "dataset": "own", "edema": "positive"},
               {"race": "black", "no_finding": "negative"}]
    age, codes = data.encode_metadata(records, (*data.DATASETS, "own"))
    assert age[0] == 61.5 and age[1].isnan()
    first, second = (dict(zip(data.CODED, row.tolist())) for row in codes)
    assert {k: v for k, v in first.items() if v} == {"sex": 2, "view": 3, "dataset": 8, "edema": 2}
    assert {k: v for k, v in second.items() if v} == {"race": 2, "no_finding": 1}


@pytest.mark.parametrize("field, text, value", [
    ("sex", "F", "female"), ("sex", "Male", "male"), ("view", "pa", "PA"), ("age", "0.5", 0.5), ("race", "Asian", "asian"),
    ("edema", "POSITIVE", "positive"), ("dataset", "padchest", "PadChest"), ("sex", "Unknown", None), ("age", "", None)])
def test_values_are_read_as_people_write_them(field, text, value):
    assert data.parse_value(field, text) == value


@pytest.mark.parametrize("field, text, message", [
    ("colour", "red", "unknown field 'colour'.*pneumonia"), ("view", "oblique", "'oblique' for view; accepted: AP, PA, LATERAL"),
    ("age", "-1", "0 to 120"), ("age", "414", "0 to 120"), ("age", "old", "0 to 120"), ("dataset", "mine", "MIMIC-CXR")])
def test_other_values_are_refused_with_what_is_accepted(field, text, message):
    with pytest.raises(InputError, match=message):
        data.parse_value(field, text)


# --- pictures -------------------------------------------------------------------------------------------

def picture(tmp_path, array, mode=None, name="x.png", **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("mode", [None, "RGB", "RGBA", "LA", "P"])
def test_every_grey_encoding_gives_the_same_picture(tmp_path, mode):
    expected = data.read_radiograph(picture(tmp_path, RAMP, name="grey.png"), 128)
    got = data.read_radiograph(picture(tmp_path, RAMP, mode), 128)
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert expected.max() > 250


def test_16_bits_keep_their_depth(tmp_path):
    fine = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
    out = data.read_radiograph(picture(tmp_path, fine), 64, bits=16)
    assert out.dtype == np.uint16 and np.abs(out.astype(int) - fine).max() <= 1  # same size: nothing to resample
    small = data.read_radiograph(picture(tmp_path, fine // 4), 64, bits=8)
    assert 62 <= small.max() <= 64  # a dark image stays dark: no stretch to the image's own maximum


def test_aspect_ratio_kept_centred_on_black_and_never_flipped(tmp_path):
    array = np.full((64, 128), 200, np.uint8)
    array[:, :16] = 40   # a dark band on the left
    array[:8] = 120      # and a grey one on top
    out = data.read_radiograph(picture(tmp_path, array), 64)
    assert out.shape == (64, 64) and out[:16].max() == 0 and out[48:].max() == 0  # 64x32 in the middle
    middle = out[16:48]
    assert abs(int(middle[20, 2]) - 40) < 3 and abs(int(middle[20, 60]) - 200) < 3 and abs(int(middle[0, 40]) - 120) < 12


def test_resize_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))  # one pixel wide: the mean is all that remains
    out = data.read_radiograph(picture(tmp_path, stripes), 64)
    assert np.abs(out[8:-8, 8:-8].astype(int) - 127).max() <= 3


@pytest.mark.parametrize("make, reason", [
    (lambda p: (p / "x.png").write_bytes(b""), "empty file"),
    (lambda p: (p / "x.png").write_bytes(b"some text"), "not an image"),
    (lambda p: (p / "x.png").write_bytes(picture(p, RAMP, name="y.png").read_bytes()[:300]), "unreadable"),
    (lambda p: picture(p, np.full((100, 100), 7, np.uint8)), "constant"),
    (lambda p: picture(p, RAMP[:20]), "only 80x20 pixels"),
    (lambda p: picture(p, np.dstack([RAMP, RAMP[::-1], RAMP])), "colour"),
    (lambda p: picture(p, np.dstack([RAMP, RAMP, RAMP, RAMP])), "transparent"),
    (lambda p: write_dicom(p / "x.png", RAMP, Modality="CT"), "modality CT"),
    (lambda p: write_dicom(p / "x.png", RAMP, BodyPartExamined="HAND"), "body part HAND"),
    (lambda p: write_dicom(p / "x.png", RAMP, NumberOfFrames=2), "more than one frame")])
def test_what_is_not_a_radiograph_is_rejected_with_the_reason(tmp_path, make, reason):
    make(tmp_path)
    with pytest.raises(Rejected, match=reason):
        data.read_radiograph(tmp_path / "x.png", 64)


def test_saved_images_come_back(tmp_path):
    image = torch.linspace(-1, 1, 256).view(1, 16, 16)
    data.save_image(image, tmp_path / "a.png", {"Synthetic": "yes"})
    assert torch.allclose(data.load_image(tmp_path / "a.png"), image, atol=1e-6)
    assert Image.open(tmp_path / "a.png").mode == "L" and Image.open(tmp_path / "a.png").text == {"Synthetic": "yes"}


def test_grid_by_hand():
    images = torch.stack([torch.full((1, 1, 1), float(i)) for i in range(3)])
    assert data.grid(images, columns=2).tolist() == [[[0, 1], [2, -1]]]


def test_jitter_moves_a_little_and_never_flips():
    """A bright spot on the left, above the middle: it stays within the promised distance, on its side."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    image = (2 * torch.exp(-((x + 0.6) ** 2 + (y + 0.3) ** 2) / 0.02) - 1).expand(200, 1, 128, 128)
    moved = data.jitter(image, torch.Generator().manual_seed(0))
    assert moved.min() >= -1 and moved.max() <= 1
    weight = ((moved + 1) / 2) ** 4
    place = torch.stack([(weight * axis).sum((1, 2, 3)) / weight.sum((1, 2, 3)) for axis in (x, y)], 1)
    distance = (place - torch.tensor([-0.6, -0.3])).norm(dim=1)
    # 12 % closer and 0.12 of room along each axis: at most 0.12 * (1 + 0.6), 0.12 * (1 + 0.3); the tilt adds 0.05 * 0.67
    assert 0.03 < distance.mean() and distance.max() < (0.19 ** 2 + 0.16 ** 2) ** 0.5 + 0.05
    assert place[:, 0].max() < -0.3
    assert torch.equal(moved, data.jitter(image, torch.Generator().manual_seed(0)))


# --- DICOM ----------------------------------------------------------------------------------------------

STORED = np.linspace(0, 4095, 80 * 80).reshape(80, 80).round().astype(np.uint16)


@pytest.mark.parametrize("tags", [
    {"WindowCenter": 2000, "WindowWidth": 1000},
    {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
    {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
    {"WindowCenter": [1000, 3000], "WindowWidth": [500, 900]},
    {"WindowCenter": 500, "WindowWidth": 3000, "RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "US"}])
def test_windows_equal_pydicoms(tmp_path, tags):
    path = write_dicom(tmp_path / "a.dcm", STORED, BitsStored=12, **tags)
    ds = pydicom.dcmread(path)
    slope, intercept = tags.get("RescaleSlope", 1), tags.get("RescaleIntercept", 0)
    shown = apply_voi_lut(ds.pixel_array.astype(int) * slope + intercept, ds)  # on the scale of the stored bits, after the modality LUT
    low, high = intercept, 4095 * slope + intercept
    assert np.abs(data.read_dicom(path) - (shown - low) / (high - low)).max() < 1e-3


def test_stored_bits_set_the_scale_without_a_window(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED // 2, BitsStored=12)
    assert np.allclose(data.read_dicom(path), (STORED // 2) / 4095)
    signed = write_dicom(tmp_path / "b.dcm", STORED.astype(np.int16) - 2048, BitsStored=12)
    assert np.allclose(data.read_dicom(signed), STORED / 4095)


def test_monochrome1_is_inverted_after_the_window(tmp_path):
    tags = {"BitsStored": 12, "WindowCenter": 1000, "WindowWidth": 600}
    normal = data.read_dicom(write_dicom(tmp_path / "a.dcm", STORED, **tags))
    inverted = data.read_dicom(write_dicom(tmp_path / "b.dcm", STORED, PhotometricInterpretation="MONOCHROME1", **tags))
    assert np.allclose(inverted, 1 - normal) and normal[0, 0] == 0 and inverted[0, 0] == 1


@pytest.mark.parametrize("text, years", [("057Y", 57), ("006M", 0.5), ("57", 57), ("", None), ("old", None), ("414Y", None)])
def test_dicom_ages(text, years):
    assert data.dicom_age(text) == years


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
    rows = ["00000001_000.png,Cardiomegaly|Emphysema,0,1,57,M,PA,1,1,.1,.1", "00000001_001.png,No Finding,1,1,58,M,AP,1,1,.1,.1",
            "00000002_000.png,Infiltration|Nodule|Mass,0,2,414,F,PA,1,1,.1,.1", "00000003_000.png,Hernia,0,3,8,F,AP,1,1,.1,.1",
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
    assert known[0] == {"Dataset_name": "ChestX-ray14", "ImagePath": "images/00000001_000.png", "PatientID": "NIH00000001",
                        "Age": "57", "Sex_name": "Male", "View_name": "PA", "Split": rows[0]["Split"],
                        "No Finding": "1", "Cardiomegaly": "2"}
    assert rows[1]["No Finding"] == "2" and rows[1]["Edema"] == "1" and rows[1]["Support Devices"] == "0"
    assert rows[1]["Split"] == rows[0]["Split"] != "test"
    assert rows[2]["Age"] == "" and rows[2]["Lung Opacity"] == "2" and rows[2]["Lung Lesion"] == "2"
    assert rows[3]["Split"] == "test" and rows[3]["No Finding"] == "1"  # a hernia is a finding
    assert read_rows(tmp_path / "out/rejected.csv") == [{"path": "images_001/images/00000004_000.png", "reason": "empty file"}]
    image = Image.open(tmp_path / "out/images/00000001_000.png")
    assert image.mode == "L" and image.size == (64, 64)


def test_folder_reads_dicom_tags_and_rejects_the_rest(tmp_path):
    root = tmp_path / "hospital"
    root.mkdir()
    write_dicom(root / "a.dcm", RAMP)
    write_dicom(root / "b.dcm", RAMP, Modality="CT")
    picture(root, RAMP, name="c.jpg", quality=95)
    (root / "notes.txt").write_text("not an image")
    assert data.prepare("folder", root, tmp_path / "out", size=64) == (2, 2)
    rows = read_rows(tmp_path / "out/index.csv")
    assert (rows[0]["Age"], rows[0]["Sex_name"], rows[0]["View_name"], rows[0]["Dataset_name"]) == ("57", "Female", "PA", "hospital")
    assert (rows[1]["Age"], rows[1]["Sex_name"], rows[1]["View_name"]) == ("", "Unknown", "Unknown")
    assert "secret" not in (tmp_path / "out/index.csv").read_text()
    assert {row["path"]: row["reason"].split(",")[0] for row in read_rows(tmp_path / "out/rejected.csv")} == {
        "b.dcm": "modality CT", "notes.txt": "not an image"}


def write_index(root, **changes):
    row = dict(zip(data.COLUMNS, data.index_row({"path": "a.png", "patient": "p", "split": "train", "age": 40.0, "dataset": "own"})))
    data.write_csv(root / "index.csv", data.COLUMNS, [(row | changes).values()])


def test_folder_with_an_index_keeps_what_it_says(tmp_path):
    picture(tmp_path, RAMP, name="a.png")
    write_index(tmp_path, **{"Pneumonia": "2", "Sex_name": "F"})
    assert data.prepare("folder", tmp_path, tmp_path / "out", size=64) == (1, 0)
    record = data.read_index(tmp_path / "out")[0]
    assert {k: record[k] for k in ("age", "sex", "pneumonia", "dataset", "split")} == {
        "age": 40.0, "sex": "female", "pneumonia": "positive", "dataset": "own", "split": "train"}
    assert data.Radiographs([tmp_path / "out"], "train")[0].shape == (1, 64, 64)
    with pytest.raises(InputError, match="no image in the split test"):
        data.Radiographs([tmp_path / "out"], "test")


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


@pytest.mark.parametrize("arguments, message", [
    (("folder", "nowhere", "out"), "nowhere: no such folder"), (("nih", ".", "out"), "this is not ChestX-ray14"),
    (("folder", ".", "file/out"), "file")])
def test_bad_arguments_of_prepare(tmp_path, command, arguments, message):
    (tmp_path / "file").write_text("a file where the output should go")
    status, _, errors = command("data.py", "prepare", *arguments, cwd=tmp_path)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1


def test_splits_follow_the_patient_in_the_right_shares():
    splits = [data.stable_split(f"patient {i}") for i in range(20_000)]
    assert splits == [data.stable_split(f"patient {i}") for i in range(20_000)]
    shares = [splits.count(name) / len(splits) for name in data.SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert math.isclose(sum(shares), 1)
