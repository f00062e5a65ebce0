"""Preparing many images: memory that does not grow with their number, and a run that is killed and goes on.

    python benchmarks/preparing.py [--n 50000] [--workers 2]

Writes a source in ChestX-ray14's layout with n small images, prepares it in a process of its own, and prints the peak
memory of that process for n / 5 and for n images. Then prepares it again, kills that process at about half, goes on
with another number of workers, and compares every byte.
"""
import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def write_source(root, count):
    """`count` images of 64x64, all of them one picture under many names."""
    images = root / "images_001/images"
    images.mkdir(parents=True)
    Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)).save(images / "picture.png")
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,W,H,x,y\n"
    with open(root / "Data_Entry_2017_v2020.csv", "w") as table:
        table.write(header)
        for i in range(count):
            os.link(images / "picture.png", images / f"{i:08}_000.png")
            table.write(f"{i:08}_000.png,{'Edema|Mass' if i % 3 else 'No Finding'},"
                        f"0,{i // 2},{i % 90},M,PA,1,1,.1,.1\n")
    (images / "picture.png").unlink()
    (root / "test_list.txt").write_text("\n".join(f"{i:08}_000.png" for i in range(0, count, 10)))


def start(root, out, workers):
    return subprocess.Popen([sys.executable, ROOT / "data.py", "prepare", "nih", root, out, "--size", "32",
                             "--workers", str(workers)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def peak_of(process):
    """The greatest resident memory of a process in MiB, read from /proc until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) // 1024)
        except (FileNotFoundError, IndexError):
            pass
        time.sleep(0.2)
    assert process.returncode == 0
    return peak


def digest(out):
    """One hash of every name and byte in a prepared folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for count in (args.n // 5, args.n):
            write_source(folder / str(count), count)
            begin = time.perf_counter()
            peak = peak_of(start(folder / str(count), folder / f"out{count}", args.workers))
            print(f"{count:,} images, {args.workers} workers: peak {peak} MiB in the process that steers, "
                  f"{count / (time.perf_counter() - begin):.0f} images/s")
        whole, cut = folder / f"out{args.n}", folder / "cut"
        process = start(folder / str(args.n), cut, args.workers)
        while (not (cut / "index.csv.part").exists()
               or (cut / "index.csv.part").stat().st_size < (whole / "index.csv").stat().st_size / 2):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = (cut / "index.csv.part").read_bytes().count(b"\n") - 1
        assert start(folder / str(args.n), cut, args.workers + 1).wait() == 0
        same = digest(whole) == digest(cut)
        print(f"killed after {done:,} rows, continued with {args.workers + 1} workers: "
              f"{'every byte the same' if same else 'DIFFERENT'} ({digest(whole)}, {digest(cut)})")


if __name__ == "__main__":
    main()
