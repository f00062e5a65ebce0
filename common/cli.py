"""What every command shares: errors in one line, files written whole or not at all, folders locked while they are
filled, the device.

Exit status: 0 when something was done, 2 for bad usage (InputError), 1 for a run that failed (RunError, a full disk).
"""
import argparse
import contextlib
import csv
import fcntl
import functools
import json
import math
import os
import platform
import re
import shutil
import stat
import sys
import time
from pathlib import Path

import safetensors
import torch


def count(number, noun, plural=None):
    """A number and what it counts, with the noun in its number: "1 image", "1,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def one_line(text):
    """The text with line breaks and control characters, which the name of a file or a column may hold, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class InputError(ValueError):
    """Something the user can correct: one line that names what is wrong and what is accepted."""
    def __str__(self):
        return one_line(super().__str__())


class RunError(RuntimeError):
    """The input is valid, but nothing could be done with it, or the work failed: one line."""
    def __str__(self):
        return one_line(super().__str__())


def run(main):
    """Calls main(). Errors that a user can cause become one line on stderr and an exit status, without a traceback."""
    try:
        main()
    except (InputError, RunError, OSError, safetensors.SafetensorError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "strerror", None) and error.filename else error
        print(f"{program_name()}: error: {one_line(text)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (InputError, FileNotFoundError, NotADirectoryError, IsADirectoryError,
                                      FileExistsError)) else 1)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"{program_name()}: error: out of memory: {str(error)[:200]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.unraisablehook = lambda unraisable: None  # a progress bar that was half made complains when it is deleted
        sys.exit(130)


def program_name():
    """The command as it was given: sample.py, or python -m causal."""
    file = Path(sys.argv[0])
    return f"python -m {file.parent.name}" if file.name == "__main__.py" else file.name


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**{"prog": program_name(), **options})      # for a folder argparse would write __main__.py

    def error(self, message):  # argparse prints its usage first, which buries the line that says what is wrong
        self.exit(2, f"{program_name()}: error: {one_line(message)}\n")


# ---------------------------------------------------------------------------------------------------------
# Values of options: argparse types whose message says what is accepted

def integer(low, high):
    """A whole number from low to high, in ASCII digits: int() would also take 1_0, and the digits of other scripts."""
    def parse(text):
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low:,} to {high:,}")
        return int(text)
    return parse


def integers(low, high):
    """Whole numbers from low to high, separated by commas, as a tuple."""
    def parse(text):
        return tuple(integer(low, high)(part) for part in text.split(","))
    return parse


def number(low, high):
    """A finite number from low to high, in ASCII digits; see integer."""
    def parse(text):
        try:
            value = float(text) if re.fullmatch("[-+.0-9eE]+", text) else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value
    return parse


positive = integer(1, 10 ** 9)


def new_path(text):
    """A path to write to. An empty one would silently be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; name a file or folder")
    return Path(text)


# ---------------------------------------------------------------------------------------------------------
# Files: read with errors that name them, written whole or not at all

@contextlib.contextmanager
def whole_file(path):
    """A temporary name to write to. The file becomes `path` when the block ends without an error, and is deleted
    otherwise. Makes the folder. `path` must be new or a regular file: a device or a link is refused, not replaced.
    Each process has a name of its own: of two that write the same file at a time, one file stays, and it is whole."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
        raise InputError(f"{path}: neither a new name nor a regular file, so it is not written over")
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_left(path.parent)
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link too
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        other = error.filename and str(error.filename) != str(temporary)      # that the block reads
        raise OSError(error.errno, error.strerror, str(error.filename if other else path)) from error
    except safetensors.SafetensorError as error:                     # says "No space left on device" in its own way
        raise safetensors.SafetensorError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache  # once for each folder: a list of its files for every file written would take too long
def delete_left(folder):
    """Deletes the temporary files of whole_file that processes of this machine left in a folder when they were
    killed."""
    mark = f".{platform.node()}-"
    for file in folder.glob("*.tmp"):
        before, _, process = file.name.removesuffix(".tmp").rpartition(mark)
        if before and process.isdecimal() and len(process) < 10 and not is_running(int(process)):
            file.unlink(missing_ok=True)


def is_running(process):
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)                                          # sends nothing
    except ProcessLookupError:
        return False
    except OSError:                                                  # another user's
        pass
    return True


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source, path):
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path, value):
    write_text(path, json_text(value))


def json_text(value):
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def finite(value):
    """The value with None, JSON's null, in place of numbers that are not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path, kind=dict):
    """The value of a JSON file, which must be of the type `kind`; raises InputError that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of 5,000 digits
        raise InputError(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: holds {type(value).__name__} where {kind.__name__} is expected")
    return value


def write_csv(path, header, rows):
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@contextlib.contextmanager
def locked(folder):
    """Makes `folder` and locks it for this process: two commands that fill one folder would mix their files. The system
    releases the lock when the process ends, however it ends. The folder itself is locked, so no lock file is left."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder}: a file is in the place of this folder; name a folder, new or of the same "
                         "command") from None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{folder}: another command is filling this folder; wait, or name another folder") from None
    try:
        yield folder
    finally:
        os.close(handle)


def refuse_filled(folder):
    """Refuses a folder, or a file in its place, for a command that fills a new one: old and new files would mix."""
    if folder.exists() and not (folder.is_dir() and all(file.name.endswith(".tmp") for file in folder.iterdir())):
        raise InputError(f"{folder}: {'not empty' if folder.is_dir() else 'a file'}; name a new folder with --out")


def new_folder(name):
    """Makes and returns out/NAME-1, or the first of out/NAME-2, out/NAME-3, ... that is not there yet."""
    number = 1
    while True:
        folder = Path("out") / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


# ---------------------------------------------------------------------------------------------------------
# Where to compute

def pick_device():
    """The device of this process (under torchrun each has a GPU of its own), and whether it multiplies bfloat16
    matrices faster than float32 ones."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available():  # Apple's GPUs, in float32; not tested on one
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        use_idle_cores()
    return device, fast_bf16(device)


@functools.cache  # once: another number of threads during a training would change its rounding
def use_idle_cores():
    """Sets torch to as many threads as cores are idle, at least one. The threads of a matrix product wait for the
    slowest one, so on cores that other programs use two threads can take longer than one. OMP_NUM_THREADS overrides it;
    without /proc/stat, that is on other systems than Linux, nothing is changed."""
    if "OMP_NUM_THREADS" in os.environ or not Path("/proc/stat").exists():
        return
    before, seconds = idle_seconds(), 0.2
    time.sleep(seconds)
    idle, threads = (idle_seconds() - before) / seconds, torch.get_num_threads()
    if round(idle) < threads:
        torch.set_num_threads(max(1, round(idle)))
        print(f"{torch.get_num_threads()} of {threads} threads, since other programs keep the cores busy; "
              f"OMP_NUM_THREADS={threads} would use all", file=sys.stderr)


def idle_seconds():
    """Seconds of idle time since the system started, summed over the cores that this process may use."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return sum(int(line[4]) for line in lines if line[0] in cores) / os.sysconf("SC_CLK_TCK")


def fast_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 or V100 would only emulate it
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
