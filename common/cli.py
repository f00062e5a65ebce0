"""What every command here shares: errors in one line, files whole or not at all, the device."""
import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user can mend: one line that names what is wrong and what is accepted."""


def run(main):
    """Calls main(); what a user can cause becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "strerror", None) and error.filename else error
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints its usage first, which buries the line that says what is wrong
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text):
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number


def write_text(path, text):
    """Writes to a temporary name, then renames."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value):
    """The value with null where a number is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path, header, rows):
    """Writes to a temporary name, then renames: a reader finds the whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(temporary, path)


def pick_device():
    """The device of this process (under torchrun each has a GPU of its own), and whether it multiplies bfloat16 matrices faster
    than float32 ones."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device, fast_bf16(device)


def fast_bf16(device):
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
