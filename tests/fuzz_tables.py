"""Damages tables and JSON at random, and reads them with everything here that reads such files.

    python tests/fuzz_tables.py --n 3000 --seed 0

What a reader may do with a damaged file: take it, or raise InputError or RunError in one line that names it. A
traceback of any other kind is a fault. tests/test_tables.py runs a quick part, and a long one marked slow.
"""
import argparse
import csv
import gzip
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import test_sources
from phantom import random_record

from common.cli import InputError, RunError, read_json
from radiographs.fields import CODED, DATASETS, LABELS, VALUES
from radiographs.files import Download
from radiographs.harmonise import harmonise, read_labels, survey
from radiographs.index import COLUMNS, index_row, read_index, read_rows

CELLS = ["", "0", "-1", "2", "1e400", "NaN", "99999999999999999999", "\0", "é", "x" * 200_000, '"', '""', "a,b",
         "../../x",
         "/etc/x", "[", "['normal'", "\r", "=1+1", "\u0661", "1_0", "{}", "null"]

EVERYTHING = {field: dict.fromkeys(VALUES[field], 1) for field in CODED} | {"age": [0, 120]}
EVERYTHING["dataset"]["phantom"] = 1


def damaged(content, rng):
    """The bytes of a file with one to three damages."""
    for _ in range(rng.randint(1, 3)):
        kind, at = rng.randrange(15), rng.randrange(len(content) + 1)
        lines = content.split(b"\n")
        line = rng.randrange(len(lines))
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1:]
        elif kind == 2:
            content = content[:at] + b"\0" * rng.randint(1, 9) + content[at:]
        elif kind == 3:
            encoding = rng.choice(["utf-16", "utf-16-le", "cp1252", "utf-8-sig", "utf-32"])
            content = content.decode("utf-8", "replace").encode(encoding, "replace")
        elif kind == 4:
            content = gzip.compress(content)[:rng.choice([None, -1, -9, 5])]
        elif kind == 5:
            content = rng.choice([b"", b"\n\n", b"<!DOCTYPE html><html>Log in</html>", b"PK\x03\x04", b"[" * 100_000,
                                  b"3",
                                  b"null", b"{}"])
        elif kind == 6:
            del lines[line]
            content = b"\n".join(lines)
        elif kind == 7:
            content = b"\n".join(lines[:line] + lines[line:line + 1] * 2 + lines[line + 1:])
        elif kind == 8:
            content = content.replace(b",", rng.choice([b";", b"\t", b",,", b" "]))
        elif kind == 9:
            content = content[:at] + rng.choice([b'"', b"'", b"[", b"{", b"\r", b"\\"]) + content[at:]
        elif kind == 10:
            content = content.replace(rng.choice([b"0", b"1", b"a", b".", b"_"]),
                                      rng.choice([b"", b"-", b"\xff", b"9" * 30]))
        else:                                        # a cell
            cells = lines[line].split(b",")
            cells[rng.randrange(len(cells))] = rng.choice(CELLS).encode("utf-8", "replace")
            content = b"\n".join(lines[:line] + [b",".join(cells)] + lines[line + 1:])
    return content


def write_index(path, rng):
    with open(path, "w", newline="") as file:
        records = (random_record(rng) | {"path": f"{i}.png", "patient": str(i), "split": "train"} for i in range(4))
        csv.writer(file).writerows([COLUMNS, *map(index_row, records)])


def readers(folder):
    """(name, file to damage, function that reads it) for each source and each kind of table; files lie below
    `folder`."""
    rng = random.Random(0)
    for make in (test_sources.mimic, test_sources.chexpert, test_sources.chexpert_2019, test_sources.padchest,
                 test_sources.rexgradient, test_sources.brax, test_sources.vindr):
        root = folder / make.__name__
        make(root)
        for path in sorted([*root.rglob("*.csv"), *root.rglob("*.json")]):
            source = make.__name__.removesuffix("_2019")
            yield source, path, lambda path, root=root, source=source: survey(harmonise(source, Download(root), {}), {})
    index, hospital, labels = folder / "index/index.csv", folder / "hospital/table.csv", folder / "labels.csv"
    for path in (index, hospital):
        path.parent.mkdir()
    write_index(index, rng)
    yield "index", index, read_index
    yield "rows of an index", index, lambda path: read_rows(path, DATASETS, EVERYTHING)
    hospital.write_text("file,age,sex,edema,patient,split\na.png,61,F,2,Doe,train\nb.png,,M,1,,\nc.png,7,,0,Roe,test\n")
    yield "hospital", hospital, lambda path: survey(harmonise("folder", Download(path.parent), {}, path), {})
    labels.write_text(",".join(["name", *LABELS]) + "\n" + "\n".join(f"{i},1,0,-1" + "," * 11 for i in range(3)) + "\n")
    yield "labels", labels, read_labels
    (folder / "metadata.csv").write_text("file,seed,age,sex,edema\n0.png,3,61,female,positive\n1.png,4,,,\n")
    yield "metadata", folder / "metadata.csv", lambda path: read_rows(path, DATASETS, EVERYTHING)
    (folder / "any.json").write_text('{"settings": {"a": [1, 2.5, null]}, "taken": 3}')
    yield "JSON", folder / "any.json", read_json


def fuzz(count, seed):
    """Damages and reads `count` times; returns how often each reader took or refused a file, and the faults."""
    rng, outcomes, faults = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        cases = list(readers(Path(folder)))
        for i in range(count):
            name, path, read = cases[i % len(cases)]
            shutil.copy(path, f"{folder}/whole")
            path.write_bytes(damaged(path.read_bytes(), rng))
            try:
                read(path)
                outcomes[name, "taken"] += 1
            except (InputError, RunError) as error:
                outcomes[name, "refused"] += 1
                if len(str(error).splitlines()) != 1 or folder not in str(error):
                    faults.append(f"{i} {name} {path.name}: a message that names no file: {error}")
            except Exception as error:
                faults.append(f"{i} {name} {path.name}: {type(error).__name__}: {error}")
            shutil.copy(f"{folder}/whole", path)
    return outcomes, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes, faults = fuzz(args.n, args.seed)
    for (name, outcome), number in sorted(outcomes.items()):
        print(f"{name:20} {outcome:8} {number}")
    print("\n".join(faults) or "no fault")
    sys.exit(bool(faults))
