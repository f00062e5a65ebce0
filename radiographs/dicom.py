"""A synthetic radiograph as a DICOM file: what can be said truthfully of an image that no detector took.

The class is Secondary Capture with the conversion type SYN, synthetic image: Digital X-Ray would ask for a detector,
an exposure and a study that never were. Modality says DX, the kind of image it imitates, as a synthetic CT says CT, so
that programs looking for radiographs take it. Synthetic Data (0008,001C) is YES, the derivation says by which
weights and from which seed, there is no patient, no date and no place. Age, sex and view are those that were asked for.

    pixels   8 bits, MONOCHROME2, the window 128/256: stored value x is shown as x / 255, as in the PNG of that image
    UIDs     from the pixels and all that is said of them: the same image again is the same file, byte for byte

Source: DICOM PS3.3, A.8.1 (Secondary Capture), C.8.6.1 (conversion type), C.12.1.1.1 (Synthetic Data); PS3.5, 6.2 (AS).
"""
import json

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (ExplicitVRLittleEndian, SecondaryCaptureImageStorage,
                         generate_uid)

from common.cli import whole_file
from radiographs.pixels import to_bytes


def age_string(years):
    """DICOM's age: whole years, below two of them whole months."""
    return f"{int(years):03}Y" if years >= 2 else f"{int(years * 12 + 1e-6):03}M"


def write(path, image, record, weights, seed, settings="", what="Synthetic radiograph sampled from RadiT"):
    """Writes an image (1, H, W), float in [-1, 1], as one file.

    record: what it was asked to show, a dict as in fields.py; unknown fields are absent. weights: which made it, a name
    and best a fingerprint. settings: further ones in words, such as "25 euler steps, guidance 2". what: how the
    derivation begins. Raises InputError if `path` is no new name and no regular file.
    """
    pixels = to_bytes(image)                              # H W, uint8
    asked = json.dumps(record)
    derivation = "; ".join(filter(None, [what, f"weights {weights}", f"seed {seed}", settings]))[:1024]  # LT: 1024
    entropy = [derivation, asked, str(pixels.shape), pixels.tobytes().hex()]
    study, series, instance = (generate_uid(entropy_srcs=[kind, *entropy]) for kind in ("study", "series", "instance"))
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, instance
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ""
    ds.Modality, ds.ConversionType, ds.SyntheticData = "DX", "SYN", "YES"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.DerivationDescription = derivation
    ds.ImageComments = f"Asked to show: {asked}"
    ds.Manufacturer = ""
    ds.SecondaryCaptureDeviceSoftwareVersions = "RadiT"
    ds.PatientName, ds.PatientID = "SYNTHETIC^RADIOGRAPH", f"synthetic-{seed}"
    ds.PatientBirthDate = ""
    ds.PatientSex = {"female": "F", "male": "M"}.get(record.get("sex"), "")
    if "age" in record:
        ds.PatientAge = age_string(record["age"])
    ds.BodyPartExamined = "CHEST"
    if "view" in record:
        ds.ViewPosition = record["view"]
    # Frontal views are never flipped: rows run to the patient's left, columns to the feet. Which side a lateral faces
    # is not known, nor what an image of no view shows.
    ds.PatientOrientation = ["L", "F"] if record.get("view") in ("AP", "PA") else ""
    ds.SeriesNumber = ds.InstanceNumber = 1
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"     # nothing that names a patient; not compressed
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.WindowCenter, ds.WindowWidth = 128, 256
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    ds["PixelData"].VR = "OB"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with whole_file(path) as temporary:
        ds.save_as(temporary, enforce_file_format=True)
