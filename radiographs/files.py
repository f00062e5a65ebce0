"""The files of a download, found wherever its archives were unpacked.

The path by which a data set's table names an image is seldom the one on disk: archives unpack under names of their
own ("CheXpert-v1.0 batch 2 (train 1)"), people hold PNG where the table says JPEG, and DICOM where it says PNG. So an
image is found by the last parts of its path, without the ending of its name.
"""
import fnmatch
import os
import unicodedata
from pathlib import Path

from common.cli import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")  # an image may have any of them, in capitals too


def walk(root, unreadable):
    """Every file at or below root, as text, in one order. Linked folders come after the real ones. Each folder comes
    once, so no link leads in a circle, and none leads out to the folders around root. A folder that cannot be read is
    appended to the list `unreadable`."""
    seen = {identity(folder) for folder in Path(root).resolve().parents}
    waiting = [str(root)]
    while waiting:
        for folder, folders, files in os.walk(waiting.pop(0), onerror=lambda error: unreadable.append(error.filename)):
            if identity(folder) in seen:
                folders.clear()  # os.walk then goes no deeper
                continue
            seen.add(identity(folder))
            folders.sort()
            paths = [os.path.join(folder, name) for name in folders]
            waiting += [path for path in paths if os.path.islink(path)]  # os.walk itself follows none
            yield from (os.path.join(folder, name) for name in sorted(files))


def identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def without_ending(path):
    stem, ending = os.path.splitext(path)
    return stem if ending.lower() in ENDINGS else path


def printable(path):
    """A path as text that a table can hold: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Download:
    """The files at or below `root`. `unreadable` are its folders that cannot be read, `missed` is the first path that
    no image was found for."""

    def __init__(self, root):
        self.root, self.unreadable, self.missed = Path(root), [], None
        self.files = list(walk(root, self.unreadable))
        self.by_tail = {}  # number of parts -> {the last parts of a path, without ending: files}
        self.found = set()

    def tables(self, pattern):
        """The tables of that name, as such or with .gz, a later release after an earlier. Parts of downloads,
        archives and hidden files bear other endings or begin with a dot."""
        paths = [Path(file) for file in self.files if file.endswith((".csv", ".csv.gz", ".json", ".txt"))]
        paths = [path for path in paths if fnmatch.fnmatchcase(path.name.removesuffix(".gz"), pattern)
                 and not path.name.startswith(".") and path.is_file()]
        return sorted(paths, key=lambda path: (path.name.removesuffix(".gz"), path.suffix != ".gz", path))

    def table(self, *patterns):
        """The last table of the first pattern that has any."""
        for pattern in patterns:
            if found := self.tables(pattern):
                return found[-1]
        raise InputError(f"{self.root}: no {' or '.join(patterns)}, as such or with .gz, in it or below it; images of "
                         "your own are the source folder (python data.py prepare folder ...)")

    def images(self, relative, parts=1):
        """The images that the last `parts` parts of a path identify: of several those that agree with it in most parts,
        and then in the ending."""
        relative = relative.replace("\\", "/")
        if relative.startswith("/") or ".." in relative.split("/"):
            raise InputError(f"{self.root}: the path {relative!r} leaves its root")
        if parts not in self.by_tail:
            self.by_tail[parts] = tails = {}
            for file in self.files:
                tails.setdefault(tail(file, parts), []).append(file)
        files = [file for file in self.by_tail[parts].get(tail(relative, parts), ()) if os.path.isfile(file)]
        agreement = [(common_parts(file, relative), os.path.splitext(file)[1] == os.path.splitext(relative)[1])
                     for file in files]
        return [file for file, agrees in zip(files, agreement) if agrees == max(agreement)]

    def image(self, relative, parts=1):
        """One of images(), as a Path, or None: one of a folder called "images", or the first."""
        files = self.images(relative, parts)
        if len(files) > 1:
            files.sort(key=lambda file: Path(file).parent.name != "images")
        return self.take(files, relative)

    def take(self, files, relative):
        """The first of the files that were found for a path, as a Path, or None; remembers what was found."""
        if not files:
            self.missed = self.missed or relative
            return None
        self.found.add(files[0])
        return Path(files[0])

    def unlisted(self):
        """The files of the kinds that were found, which themselves were not asked for."""
        kinds = {os.path.splitext(file)[1] for file in self.found}
        return (Path(file) for file in self.files if os.path.splitext(file)[1] in kinds and file not in self.found)


def parts_of(path):
    """The parts of a path, without ending, to be compared: macOS writes an accent as a character of its own (NFD),
    tables mostly with its letter (NFC)."""
    return unicodedata.normalize("NFC", without_ending(path)).split("/")


def tail(path, parts):
    return "/".join(parts_of(path)[-parts:])


def common_parts(path, other):
    """How many parts two paths have in common, counted from their ends, whatever the ending."""
    pairs = zip(reversed(parts_of(path)), reversed(parts_of(other)))
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count
