"""Small image files for the tests to read."""
import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

RAMP = np.linspace(0, 255, 100 * 80).reshape(100, 80).round().astype(np.uint8)


def picture(tmp_path, array, mode=None, name="x.png", **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(tmp_path / name, **options)
    return tmp_path / name


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
