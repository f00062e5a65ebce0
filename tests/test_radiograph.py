import multiprocessing
import os
import stat

import numpy as np
import pydicom
import pytest
import torch
from pictures import RAMP, picture, write_dicom, write_tiff
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from common.cli import InputError, RunError
from radiographs import dicom, greyscale, pixels
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
    assert abs(int(middle[20, 2]) - 40) < 3 and abs(int(middle[20, 60]) - 200) < 3
    assert abs(int(middle[0, 40]) - 120) < 12


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


# EXIF 2.3, table 6: how stored rows and columns are shown
SHOWN = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation_is_applied(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    stored = RAMP.copy()
    stored[:30, :20] = 255                                           # a bright corner
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(kind, {})
    shown = pixels.read_picture(picture(tmp_path, stored, name=f"x.{kind}", exif=exif, **options))
    difference = np.abs(shown * 255 - SHOWN[orientation](stored.astype(float)))
    assert np.median(difference) < 2 and difference.mean() < 2


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_exif_orientation_is_applied_to_16_bits(tmp_path, kind):
    exif = Image.Exif()
    exif[274] = 6
    shown = pixels.read_picture(picture(tmp_path, SIXTEEN, name=f"x.{kind}", exif=exif))
    assert np.abs(shown - np.rot90(SIXTEEN, -1) / 65535).max() < 1e-6


SIXTEEN = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("array, bits", [(SIXTEEN, 16), (SIXTEEN >> 4, 12), ((SIXTEEN >> 8).astype(np.uint8), 8)])
def test_tiff_of_8_12_and_16_bits_white_or_black_at_zero(tmp_path, array, bits, photometric, order):
    path = write_tiff(tmp_path / "x.tif", array, bits, photometric=photometric, order=order)
    if (bits, photometric, order) in ((16, 0, ">"), (12, 0, "<"), (12, 0, ">"), (12, 1, ">")):  # Pillow cannot
        with pytest.raises(Rejected, match="TIFF of a kind that is not supported"):
            pixels.read_picture(path)
        return
    grey = pixels.read_picture(path)
    by_hand = array / (2.0 ** bits - 1)
    assert np.abs(grey - (by_hand if photometric else 1 - by_hand)).max() < 1e-6


@pytest.mark.parametrize("array, sample_format, reason", [
    (SIXTEEN.astype(np.float32) / 16, 3, "floating-point"), (SIXTEEN.astype(np.float32) / 65535, 3, "floating-point"),
    (SIXTEEN.astype(np.float64), 3, "floating-point|not supported"),
    (SIXTEEN.astype(np.int16), 2, "signed"), ((SIXTEEN >> 8).astype(np.int8), 2, "signed"),
    (SIXTEEN.astype(np.int32), 2, "signed"),
    (SIXTEEN.astype(np.uint32) << 16, 1, "more than 16 bits")])
def test_a_tiff_whose_white_nobody_states_is_refused(tmp_path, array, sample_format, reason):
    with pytest.raises(Rejected, match=reason):
        pixels.read_radiograph(write_tiff(tmp_path / "x.tif", array, sample_format=sample_format), 64)


def test_twelve_bits_in_sixteen_are_scaled_when_it_is_known(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pixels, "WARNED", multiprocessing.RawValue("b", 0))
    path = picture(tmp_path, SIXTEEN >> 4)                           # 0 to 4095 in a PNG of 16 bits
    assert np.abs(pixels.read_picture(path, used_bits=12) - (SIXTEEN >> 4) / 4095).max() < 1e-6
    assert capfd.readouterr().err == ""
    assert np.abs(pixels.read_picture(path) - (SIXTEEN >> 4) / 65535).max() < 1e-6
    assert "less than a quarter of its depth" in capfd.readouterr().err
    pixels.read_picture(path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(pixels.read_picture, [path] * 4)
    assert capfd.readouterr().err == ""                              # one warning a run
    with pytest.raises(Rejected, match="beyond the used depth"):
        pixels.read_picture(path, used_bits=11)
    eight = picture(tmp_path, RAMP, name="y.png")
    assert np.array_equal(pixels.read_picture(eight, used_bits=12), pixels.read_picture(eight))


@pytest.mark.parametrize("kind", ["gif", "png", "tif", "webp"])
def test_only_one_picture_a_file(tmp_path, kind):
    first = Image.fromarray(RAMP)
    first.save(tmp_path / f"one.{kind}", **({"lossless": True} if kind == "webp" else {}))
    assert np.abs(pixels.read_picture(tmp_path / f"one.{kind}") - RAMP / 255).max() < 0.01
    first.save(tmp_path / f"two.{kind}", save_all=True, append_images=[Image.fromarray(RAMP[::-1].copy())])
    with pytest.raises(Rejected, match="more than one picture"):
        pixels.read_picture(tmp_path / f"two.{kind}")


def test_a_transparent_value_is_transparent_in_8_and_16_bits(tmp_path):
    for array in (RAMP, SIXTEEN):
        present, absent = int(array[5, 5]), 3
        with pytest.raises(Rejected, match="transparent"):
            pixels.read_picture(picture(tmp_path, array, transparency=present))
        if array is SIXTEEN:
            pixels.read_picture(picture(tmp_path, array, transparency=absent))


def test_a_flipped_bit_never_gives_another_picture(tmp_path):
    """PNG has a checksum for every part: a damaged file is refused or reads as it was."""
    whole = picture(tmp_path, RAMP).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(8, len(whole), 100):
        content = bytearray(whole)
        content[place] ^= 1 << rng.integers(8)
        (tmp_path / "y.png").write_bytes(content)
        try:
            assert np.array_equal(pixels.read_picture(tmp_path / "y.png"), (RAMP / 255).astype(np.float32))
        except Rejected:
            refused += 1
    assert refused > 90


def test_a_damaged_prepared_image_is_named(tmp_path):
    for name, content in (("cut.png", picture(tmp_path, RAMP).read_bytes()[:200]), ("text.png", b"some text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: damaged, or no grey picture of 8 or 16 bits"):
            pixels.load_image(tmp_path / name)
    with pytest.raises(InputError, match="x.png: .*no grey picture"):
        pixels.load_image(picture(tmp_path, np.dstack([RAMP] * 3)))
    with pytest.raises(FileNotFoundError):
        pixels.load_image(tmp_path / "none.png")


def test_images_are_written_to_new_names_and_regular_files_only(tmp_path):
    image = torch.zeros(1, 64, 64)
    (tmp_path / "other.png").write_bytes(b"kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "other.png")
    for write in (pixels.save_image, lambda image, path: dicom.write(path, image, {}, "demo", 0)):
        for path in (tmp_path / "link.png", "/dev/null"):
            with pytest.raises(InputError, match="neither a new name nor a regular file"):
                write(image, path)
        with pytest.raises(RunError, match="no numbers"):
            write(image * float("nan"), tmp_path / "nan.png")
    assert (tmp_path / "other.png").read_bytes() == b"kept" and not (tmp_path / "nan.png").exists()
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


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
    # on the scale of the stored bits, after the modality LUT
    shown = apply_voi_lut(ds.pixel_array.astype(int) * slope + intercept, ds)
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
    inverted = pixels.read_dicom(write_dicom(tmp_path / "b.dcm", STORED, PhotometricInterpretation="MONOCHROME1",
                                             **tags))
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


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm",
                                  "MR_small_jpeg_ls_lossless.dcm",
                                  "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "CT_small.dcm",
                                  "JPEGLSNearLossless_16.dcm",
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
        ds.file_meta.TransferSyntaxUID = {"implicit": pydicom.uid.ImplicitVRLittleEndian,
                                          "big endian": pydicom.uid.ExplicitVRBigEndian,
                                          "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian}[syntax]
        if syntax == "big endian":
            ds.PixelData = STORED.astype(">u2").tobytes()
        pydicom.dcmwrite(path, ds, little_endian=syntax != "big endian", implicit_vr=syntax == "implicit",
                         force_encoding=True)
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
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1e6
    with pytest.raises(Rejected, match="pixels"):
        pixels.read_radiograph(tmp_path / "bomb.png", 64)
    write_dicom(tmp_path / "bomb.dcm", RAMP, Rows=60_000, Columns=60_000)
    with pytest.raises(Rejected, match="more than any radiograph has"):
        pixels.read_radiograph(tmp_path / "bomb.dcm", 64)
