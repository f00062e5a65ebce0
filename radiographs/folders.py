"""The images of any folder: a prepared source, what sample.py wrote, or image files as they lie on a disk.

Whoever compares two sets of images (metrics.py, study/) reads both with one function, so that neither set needs a
special form: where there is no index, every image file at or below the folder is taken, DICOM with the view, sex and
age of its header.
"""
from pathlib import Path

from common.cli import InputError
from radiographs.index import read_index
from radiographs.pixels import is_dicom
from radiographs.files import walk
from radiographs.tags import dicom_tags

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def images_of(place):
    """A record, with `path`, for every image of `place`: an index.csv, a folder with an index.csv, or any folder of
    images.

    From an index come all its fields, patient and split; from DICOM files what tags.dicom_tags finds; from other
    images nothing else. Raises InputError where there is no image. """
    place = Path(place)
    if place.is_file() or (place / "index.csv").exists():
        root = place.parent if place.is_file() else place
        return [record | {"path": root / record["path"]} for record in read_index(place)]
    if not place.is_dir():
        raise InputError(f"{place}: no such folder")
    records = []
    for path in map(Path, walk(place, [])):
        if path.is_file() and path.stat().st_size:
            if path.suffix.lower() in SUFFIXES:
                records.append({"path": path})
            elif is_dicom(path):
                records.append(dicom_tags(path) | {"path": path})
    if not records:
        raise InputError(f"{place}: neither an index.csv nor an image in it or below it; "
                         f"accepted are {', '.join(SUFFIXES)} and DICOM files")
    return records
