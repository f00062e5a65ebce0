"""Small image files for the tests to read."""
import struct
import warnings

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

RAMP = np.linspace(0, 255, 100 * 80).reshape(100, 80).round().astype(np.uint8)


def picture(tmp_path, array, mode=None, name="x.png", **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(tmp_path / name, **options)
    return tmp_path / name


def lut(first, values, bits, vr="US", descriptor="US"):
    """An item of a LUT sequence: the input first + i gives values[i], of `bits` bits."""
    item = Dataset()
    item.add_new("LUTDescriptor", descriptor, [len(values) % 65536, first, bits])
    item.add_new("LUTData", vr, list(map(int, values)) if vr == "US" else np.asarray(values, "<u2").tobytes())
    return item


def code(value, meaning, scheme="SCT"):
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def write_dicom(path, array, **tags):
    """A minimal DX file; tags set to None are left out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, generate_uid()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = array.shape
    bits = array.dtype.itemsize * 8
    settings = {"BitsAllocated": bits, "Modality": "DX", "BodyPartExamined": "CHEST",
                "PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1,
                "BitsStored": bits, "PixelRepresentation": int(array.dtype.kind == "i"),
                "PatientID": "secret name", "PatientSex": "F", "PatientAge": "057Y", "ViewPosition": "PA"} | tags
    settings = {"HighBit": settings["BitsStored"] - 1} | settings
    with pydicom.config.disable_value_validation(), warnings.catch_warnings(action="ignore"):
        for tag, value in settings.items():
            if value is not None:
                setattr(ds, tag, value)
        ds.PixelData = array.tobytes()
        ds.save_as(path, enforce_file_format=True)
    return path


def write_tiff(path, array, bits=None, sample_format=1, photometric=1, order="<"):
    """A grey TIFF of one strip, by hand. bits=12 packs two values into three bytes. sample_format: 1 unsigned,
    2 signed, 3 floating-point. photometric: 0 white is zero, 1 black is zero."""
    if bits == 12:
        pairs = array.astype(np.uint32).reshape(-1, 2)
        triples = pairs[:, 0] << 12 | pairs[:, 1]
        strip = np.stack([triples >> 16, triples >> 8 & 255, triples & 255], 1).astype(np.uint8).tobytes()
    else:
        strip = array.astype(array.dtype.newbyteorder(order)).tobytes()
    entries = [(256, 4, array.shape[1]), (257, 4, array.shape[0]), (258, 3, bits or array.dtype.itemsize * 8),
               (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, array.shape[0]),
               (279, 4, len(strip)), (339, 3, sample_format)]     # tag, 3 (16 bits) or 4 (32 bits), value; by tag
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack(f"{order}HHI{'H2x' if kind == 3 else 'I'}", tag, kind, 1, value)
    start = 8 + len(strip) + len(strip) % 2
    magic = {"<": b"II", ">": b"MM"}[order]
    path.write_bytes((magic + struct.pack(f"{order}HI", 42, start) + strip).ljust(start, b"\0") + directory + bytes(4))
    return path
