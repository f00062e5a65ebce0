import numpy as np
import pydicom
import pytest
import torch
from pictures import RAMP, picture, write_dicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from radiographs import greyscale, pixels
from radiographs.pixels import Rejected

# --- pictures -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", [None, "RGB", "RGBA", "LA", "P"])
def test_every_grey_encoding_gives_the_same_picture(tmp_path, mode):
    expected = pixels.read_radiograph(picture(tmp_path, RAMP, name="grey.png"), 128)
    got = pixels.read_radiograph(picture(tmp_path, RAMP, mode), 128)
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert expected.max() > 250


def test_16_bits_keep_their_depth(tmp_path):
    fine = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
    out = pixels.read_radiograph(picture(tmp_path, fine), 64, bits=16)
    assert out.dtype == np.uint16 and np.abs(out.astype(int) - fine).max() <= 1  # same size: nothing to resample
    small = pixels.read_radiograph(picture(tmp_path, fine // 4), 64, bits=8)
    assert 62 <= small.max() <= 64  # a dark image stays dark: no stretch to the image's own maximum


def test_aspect_ratio_kept_centred_on_black_and_never_flipped(tmp_path):
    array = np.full((64, 128), 200, np.uint8)
    array[:, :16] = 40   # a dark band on the left
    array[:8] = 120      # and a grey one on top
    out = pixels.read_radiograph(picture(tmp_path, array), 64)
    assert out.shape == (64, 64) and out[:16].max() == 0 and out[48:].max() == 0  # 64x32 in the middle
    middle = out[16:48]
    assert abs(int(middle[20, 2]) - 40) < 3 and abs(int(middle[20, 60]) - 200) < 3 and abs(int(middle[0, 40]) - 120) < 12


def test_resize_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))  # one pixel wide: the mean is all that remains
    out = pixels.read_radiograph(picture(tmp_path, stripes), 64)
    assert np.abs(out[8:-8, 8:-8].astype(int) - 127).max() <= 3


@pytest.mark.parametrize("make, reason", [
    (lambda p: (p / "x.png").write_bytes(b""), "empty file"),
    (lambda p: (p / "x.png").write_bytes(b"some text"), "not an image"),
    (lambda p: (p / "x.png").write_bytes(picture(p, RAMP, name="y.png").read_bytes()[:300]), "unreadable"),
    (lambda p: picture(p, np.full((100, 100), 7, np.uint8)), "constant"),
    (lambda p: picture(p, RAMP[:20]), "fewer than 64 pixels on a side"),
    (lambda p: picture(p, np.dstack([RAMP, RAMP[::-1], RAMP])), "colour"),
    (lambda p: picture(p, np.dstack([RAMP, RAMP, RAMP, RAMP])), "transparent"),
    (lambda p: write_dicom(p / "x.png", RAMP, Modality="CT"), "modality CT"),
    (lambda p: write_dicom(p / "x.png", RAMP, BodyPartExamined="HAND"), "body part HAND"),
    (lambda p: write_dicom(p / "x.png", RAMP, NumberOfFrames=2), "more than one frame")])
def test_what_is_not_a_radiograph_is_rejected_with_the_reason(tmp_path, make, reason):
    make(tmp_path)
    with pytest.raises(Rejected, match=reason):
        pixels.read_radiograph(tmp_path / "x.png", 64)


def test_saved_images_come_back(tmp_path):
    image = torch.linspace(-1, 1, 256).view(1, 16, 16)
    pixels.save_image(image, tmp_path / "a.png", {"Synthetic": "yes"})
    assert torch.allclose(pixels.load_image(tmp_path / "a.png"), image, atol=1e-6)
    assert Image.open(tmp_path / "a.png").mode == "L" and Image.open(tmp_path / "a.png").text == {"Synthetic": "yes"}


def test_grid_by_hand():
    images = torch.stack([torch.full((1, 1, 1), float(i)) for i in range(3)])
    assert pixels.grid(images, columns=2).tolist() == [[[0, 1], [2, -1]]]


def test_jitter_moves_a_little_and_never_flips():
    """A bright spot on the left, above the middle: it stays within the promised distance, on its side."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    image = (2 * torch.exp(-((x + 0.6) ** 2 + (y + 0.3) ** 2) / 0.02) - 0.9).clamp(-1, 1).expand(200, 1, 128, 128)
    moved = pixels.jitter(image, torch.Generator().manual_seed(0))
    assert moved.min() >= -1 and moved.max() <= 1
    weight = (((moved + 1) / 2) ** 4).clamp(min=1e-3) - 1e-3
    place = torch.stack([(weight * axis).sum((1, 2, 3)) / weight.sum((1, 2, 3)) for axis in (x, y)], 1)
    distance = (place - torch.tensor([-0.6, -0.3])).norm(dim=1)
    # 12 % closer and 0.12 of room along each axis: at most 0.12 * (1 + 0.6), 0.12 * (1 + 0.3)
    assert 0.03 < distance.mean() and distance.max() < (0.19 ** 2 + 0.16 ** 2) ** 0.5 + 0.02
    assert place[:, 0].max() < -0.3
    assert torch.equal(moved, pixels.jitter(image, torch.Generator().manual_seed(0)))


def test_jitter_leaves_black_borders_where_they_are():
    """A letterboxed picture: its borders stay black, its edge rows stay lit, whatever is moved inside."""
    image = torch.full((100, 1, 64, 64), -1.0)
    image[:, :, 10:50, 4:60] = torch.rand(40, 56, generator=torch.Generator().manual_seed(0)) * 0.5
    moved = pixels.jitter(image, torch.Generator().manual_seed(1))
    lit = moved[:, 0] > -0.9
    assert (lit == (image[:, 0] > -0.9)).all()
    assert (moved - image).abs().mean() > 0.05
    centre, half = pixels.content(image[:1])
    assert centre[0].tolist() == [0.0, -4 / 64] and half[0].tolist() == [56 / 64, 40 / 64]
    black = torch.full((1, 1, 8, 8), -1.0)
    assert torch.allclose(pixels.jitter(black, torch.Generator().manual_seed(0)), black)


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
    assert np.abs(pixels.read_dicom(path) - (shown - low) / (high - low)).max() < 1e-3


def test_stored_bits_set_the_scale_without_a_window(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED // 2, BitsStored=12)
    assert np.allclose(pixels.read_dicom(path), (STORED // 2) / 4095)
    signed = write_dicom(tmp_path / "b.dcm", STORED.astype(np.int16) - 2048, BitsStored=12)
    assert np.allclose(pixels.read_dicom(signed), STORED / 4095)


def test_monochrome1_is_inverted_after_the_window(tmp_path):
    tags = {"BitsStored": 12, "WindowCenter": 1000, "WindowWidth": 600}
    normal = pixels.read_dicom(write_dicom(tmp_path / "a.dcm", STORED, **tags))
    inverted = pixels.read_dicom(write_dicom(tmp_path / "b.dcm", STORED, PhotometricInterpretation="MONOCHROME1", **tags))
    assert np.allclose(inverted, 1 - normal) and normal[0, 0] == 0 and inverted[0, 0] == 1


def lut_item(first, values, bits):
    """A LUT sequence's item: stored value first + i shows as values[i] of `bits` bits."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", list(values))
    return item


def test_luts_by_hand(tmp_path):
    """Stored values 0 to 3; the modality LUT turns them round, the VOI LUT spreads them over ten bits."""
    stored = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) % 4
    modality, voi = lut_item(0, [3, 2, 1, 0], 16), lut_item(0, [0, 100, 500, 1023], 10)
    modality.ModalityLUTType = "US"
    tags = {"ModalityLUTSequence": [modality], "VOILUTSequence": [voi]}
    shown = pixels.read_dicom(write_dicom(tmp_path / "a.dcm", stored, BitsStored=12, **tags))
    assert np.allclose(shown, np.array([1023, 500, 100, 0])[stored] / 1023)
    tags |= {"WindowCenter": 1, "WindowWidth": 2}                     # where both are there, the LUT is meant
    assert np.allclose(pixels.read_dicom(write_dicom(tmp_path / "b.dcm", stored, BitsStored=12, **tags)), shown)


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
                                  "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "CT_small.dcm", "JPEGLSNearLossless_16.dcm",
                                  "image_dfl.dcm", "JPEG2000.dcm"])
def test_bundled_files_equal_pydicoms_pipeline(tmp_path, name):
    """pydicom's own files, called a chest, against its modality and VOI functions on the scale of the stored bits."""
    ds = pydicom.dcmread(pydicom.data.get_testdata_file(name))
    ds.Modality, ds.BodyPartExamined = "DX", "CHEST"
    if "WindowWidth" not in ds:
        ds.WindowCenter, ds.WindowWidth = 1000, 1500
    ds.save_as(tmp_path / name)
    modality = apply_modality_lut(ds.pixel_array, ds)
    least = -(2 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    low, high = least * slope + intercept, (least + 2 ** ds.BitsStored - 1) * slope + intercept
    expected = ((apply_voi_lut(modality, ds) - low) / (high - low)).clip(0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        expected = 1 - expected
    assert np.abs(pixels.read_dicom(tmp_path / name) - expected).max() < 1e-3


# --- compressed DICOM -----------------------------------------------------------------------------------

LOSSLESS = {"JPEG lossless": "JPEGLosslessProcess14", "JPEG lossless, first order": "JPEGLosslessProcess14_1",
            "JPEG 2000": "JPEG2000Lossless", "JPEG-LS": "JPEGLSLossless", "RLE": "RLELossless"}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [*LOSSLESS, "implicit", "big endian", "deflated"])
def test_transfer_syntaxes_give_the_pixels_that_went_in(tmp_path, syntax, photometric):
    """12 bits of 16, written by GDCM in each lossless syntax, against the array that was written."""
    plain = write_dicom(tmp_path / "plain.dcm", STORED, BitsStored=12, PhotometricInterpretation=photometric)
    path = tmp_path / "compressed.dcm"
    if syntax in LOSSLESS:
        gdcm = pytest.importorskip("gdcm")
        reader = gdcm.ImageReader()
        reader.SetFileName(str(plain))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, LOSSLESS[syntax])))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    else:
        ds = pydicom.dcmread(plain)
        ds.file_meta.TransferSyntaxUID = {"implicit": pydicom.uid.ImplicitVRLittleEndian, "big endian": pydicom.uid.ExplicitVRBigEndian,
                                          "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian}[syntax]
        if syntax == "big endian":
            ds.PixelData = STORED.astype(">u2").tobytes()
        pydicom.dcmwrite(path, ds, little_endian=syntax != "big endian", implicit_vr=syntax == "implicit", force_encoding=True)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID != pydicom.dcmread(plain).file_meta.TransferSyntaxUID
    expected = STORED / 4095
    assert np.allclose(pixels.read_dicom(path), 1 - expected if photometric == "MONOCHROME1" else expected)


def test_what_no_decoder_can_do_is_refused_by_name(tmp_path):
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("JPGExtended.dcm"))
    ds.Modality, ds.BodyPartExamined = "DX", "CHEST"
    ds.save_as(tmp_path / "a.dcm")
    with pytest.raises(Rejected, match="no decoder for JPEG Extended .* of more than 8 bits"):
        pixels.read_radiograph(tmp_path / "a.dcm", 64)


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    path = pydicom.data.get_testdata_file("MR_small_jpeg_ls_lossless.dcm")
    ds = pydicom.dcmread(path)
    ds.Modality = "DX"
    ds.save_as(tmp_path / "a.dcm")
    monkeypatch.setattr(greyscale, "get_decoder", lambda syntax: type("None", (), {"is_available": False}))
    with pytest.raises(Rejected, match="no decoder for JPEG-LS Lossless.*python-gdcm"):
        pixels.read_radiograph(tmp_path / "a.dcm", 64)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    Image.new("L", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1e6
    with pytest.raises(Rejected, match="pixels"):
        pixels.read_radiograph(tmp_path / "bomb.png", 64)
    write_dicom(tmp_path / "bomb.dcm", RAMP, Rows=60_000, Columns=60_000)
    with pytest.raises(Rejected, match="more than any radiograph has"):
        pixels.read_radiograph(tmp_path / "bomb.dcm", 64)
