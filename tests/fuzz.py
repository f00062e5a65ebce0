"""Damaged files by the thousand: whatever is read, nothing but Rejected may come out.

A case is a seed, so one that fails can be had again: `damaged_images(seed)`. A valid file is taken and its bytes are
flipped, cut, repeated, zeroed or exchanged with another file's, or fields of its header are given hostile values.

    python tests/fuzz.py 20000       the long run, from another seed each time; prints what came out
"""
import collections
import io
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pydicom
from pictures import lut, write_dicom, write_tiff
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radiographs import pixels, tags  # noqa: E402

NAME = "SURNAME^FORENAME"                                            # of a patient; no reason may hold it
PICTURE = np.linspace(0, 4095, 72 * 96).reshape(72, 96).astype(np.uint16)


def seeds_of_pictures():
    """Small valid files of every kind that is read: suffix -> bytes."""
    files, eight = {}, Image.fromarray((PICTURE >> 4).astype(np.uint8))
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "WEBP"):
        buffer = io.BytesIO()
        eight.save(buffer, kind)
        files[kind.lower()] = buffer.getvalue()
    for name, image, options in (("png", Image.fromarray(PICTURE * 16), {}),
                                 ("png", eight.convert("P"), {"transparency": 3}),
                                 ("tiff", eight.convert("RGB"), {"compression": "tiff_lzw"}),
                                 ("jpeg", eight.convert("CMYK"), {}),
                                 ("gif", eight, {"save_all": True, "append_images": [eight.rotate(180)]})):
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        files[f"{len(files)}.{name}"] = buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        files["float.tiff"] = write_tiff(Path(folder) / "a", PICTURE.astype(np.float32), sample_format=3).read_bytes()
        files["twelve.tiff"] = write_tiff(Path(folder) / "a", PICTURE, bits=12).read_bytes()
    return files


def seeds_of_dicom():
    """Small valid DICOM files: plain, signed, windowed, with look-up tables, and compressed: name -> bytes."""
    files = {}
    voi = [lut(0, list(range(4096)), 12)]
    kinds = {"plain": {}, "window": {"WindowCenter": 2000, "WindowWidth": 3000}, "voi": {"VOILUTSequence": voi},
             "modality": {"ModalityLUTSequence": [lut(0, list(range(0, 65536, 16)), 16)], "PixelPaddingValue": 7},
             "inverse": {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": -2, "RescaleIntercept": 9,
                         "PixelSpacing": [1, 2]}}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in kinds.items():
            path = write_dicom(Path(folder) / "a", PICTURE, BitsStored=12, PatientName=NAME,
                               **options | {"PatientID": NAME})
            files[name] = path.read_bytes()
        for name, syntax in (("rle", pydicom.uid.RLELossless),
                             ("deflated", pydicom.uid.DeflatedExplicitVRLittleEndian)):
            ds = pydicom.dcmread(io.BytesIO(files["window"]))
            if name == "rle":
                ds.compress(syntax)
            ds.file_meta.TransferSyntaxUID = syntax
            buffer = io.BytesIO()
            pydicom.dcmwrite(buffer, ds)
            files[name] = buffer.getvalue()
        for name in ("JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm", "MR_small_implicit.dcm",
                     "MR_small_bigendian.dcm"):
            ds = pydicom.dcmread(pydicom.data.get_testdata_file(name))
            ds.Modality, ds.BodyPartExamined, ds.PatientName, ds.PatientID = "DX", "CHEST", NAME, NAME
            buffer = io.BytesIO()
            pydicom.dcmwrite(buffer, ds)
            files[name] = buffer.getvalue()
    return files


FILES = {}                                                           # filled once, when they are first needed


def damaged_bytes(content, other, rng):
    """The bytes after one to six accidents, most of them near the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        limit = len(content) if rng.random() < 0.3 else min(len(content), 1500)
        place, length = rng.randrange(max(1, limit)), rng.choice([1, 2, 4, 8, 64, 1000])
        accident = rng.choice(["flip", "flip", "flip", "byte", "cut", "zero", "ones", "repeat", "exchange", "insert"])
        if accident == "flip" and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif accident == "byte" and place < len(content):
            content[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif accident == "cut":
            del content[place + 132 if rng.random() < 0.8 else place:]
        elif accident == "zero":
            content[place:place + length] = bytes(length)
        elif accident == "ones":
            content[place:place + length] = b"\xff" * length
        elif accident == "repeat":
            content[place:place] = content[place:place + length] * rng.randint(1, 20)
        elif accident == "exchange":
            content[place:place + length] = other[place:place + length]
        elif accident == "insert":
            content[place:place] = rng.randbytes(length)
    return bytes(content)


HOSTILE = ["", "nan", "1e999", "-1", "0", "99999999999999999999", NAME, "\\", "1\\2\\3", "\0", "é", "٤٥", 0, 1, 65535,
           [1, 2, 3], -1, b"\xff" * 9]
KEYWORDS = ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
            "NumberOfFrames",
            "PhotometricInterpretation", "WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope",
            "RescaleIntercept",
            "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelAspectRatio", "PixelSpacing", "Modality",
            "BodyPartExamined",
            "PatientAge", "PatientSex", "PatientID", "PatientBirthDate", "StudyDate", "ViewPosition",
            "PatientOrientation",
            "PresentationLUTShape", "SpecificCharacterSet", "SyntheticData", "LUTDescriptor", "LUTData",
            "ViewCodeSequence", "PixelData"]


def damaged_header(content, rng):
    """A valid DICOM file with hostile values in one to three elements, each under its own VR or as unknown bytes."""
    ds = pydicom.dcmread(io.BytesIO(content))
    for _ in range(rng.randint(1, 3)):
        keyword, value = rng.choice(KEYWORDS), rng.choice(HOSTILE)
        items = [item for name in ("VOILUTSequence", "ModalityLUTSequence") for item in ds.get(name) or ()]
        target = rng.choice(items) if items and keyword.startswith("LUT") else ds
        vr = rng.choice(["UN", "LO", "DS", "US", "SS", "OW", "FD", "IS", "UT"])
        try:
            target.add_new(keyword, vr, value if vr not in ("UN", "OW") else str(value).encode())
            buffer = io.BytesIO()
            pydicom.dcmwrite(buffer, ds)
            content = buffer.getvalue()
        except Exception:  # pydicom cannot write such a value: the file stays as it was before
            ds = pydicom.dcmread(io.BytesIO(content))
    return content


def damaged_image(seed):
    """(name, bytes) of one damaged file."""
    if not FILES:
        with pydicom.config.disable_value_validation(), tags.quiet():
            FILES.update(dicom=list(seeds_of_dicom().items()), pictures=list(seeds_of_pictures().items()))
    rng = random.Random(seed)
    kind = rng.choice(["dicom", "dicom", "pictures"])
    name, content = rng.choice(FILES[kind])
    if kind == "dicom" and rng.random() < 0.4:
        with pydicom.config.disable_value_validation(), tags.quiet():
            content = damaged_header(content, rng)
    if kind == "pictures" or rng.random() < 0.7:
        content = damaged_bytes(content, rng.choice(FILES[kind])[1], rng)
    return name, content


def read_one(seed, folder):
    """What comes out of every reader for the case `seed`: the reason, or "taken". AssertionError for what may not."""
    name, content = damaged_image(seed)
    path = Path(folder) / ("case.dcm" if content[128:132] == b"DICM" else "case.png")
    path.write_bytes(content)
    outcome = "taken"
    try:
        array = pixels.read_radiograph(path, 64, bits=16)
        assert array.shape == (64,
                               64) and array.dtype == np.uint16, f"case {seed} ({name}): {array.shape} {array.dtype}"
    except tags.Rejected as reason:
        outcome = str(reason)
    except Exception as error:
        raise AssertionError(f"case {seed} ({name}): {type(error).__name__} {error}") from error
    try:
        tags.dicom_tags(path)
        pixels.is_synthetic(path)
    except tags.Rejected:
        pass
    except Exception as error:
        raise AssertionError(f"case {seed} ({name}): {type(error).__name__} {error}") from error
    assert NAME.split("^")[0] not in outcome.upper(), f"case {seed} ({name}): a reason quotes the header: {outcome}"
    return outcome


def run(seeds, folder):
    """How often each outcome came out."""
    return collections.Counter(read_one(seed, folder) for seed in seeds)


def main():
    count, first = int(sys.argv[1]), random.SystemRandom().randrange(10 ** 9)
    print(f"cases {first} to {first + count - 1}")
    with tempfile.TemporaryDirectory() as folder:
        for outcome, times in run(range(first, first + count), folder).most_common():
            print(f"{times:7} {outcome}")


if __name__ == "__main__":
    main()
