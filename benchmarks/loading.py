"""Reading radiographs to 512x512: pixels.py beside the readers that users would pick instead, in one run.

    pip install monai torchxrayvision scikit-image pandas
    python benchmarks/loading.py [--n 24]

Three kinds of file, written here: DICOM as detectors write it (2500x2048, 12 bits, a window), 16-bit PNG of that size
(PadChest) and 8-bit PNG of 1024x1024 (ChestX-ray14). Every reader runs alone in a process of its own on one core and
gives a 512x512 float image, antialiased where it can be. The aspect ratio is kept by ours and MONAI's; torchxrayvision
crops the centre. Then ours with one and more worker processes. Peak memory is that of the process above its start.
"""
import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from pictures import write_dicom

from radiographs import pixels

READERS = ("radiograph.py", "MONAI", "torchxrayvision")


def write_files(folder, count):
    """{kind: paths} of pictures with the smoothness and the noise of radiographs."""
    rng, paths = np.random.default_rng(0), {"DICOM 2500x2048": [], "PNG 16 bits 2500x2048": [],
                                            "PNG 8 bits 1024x1024": []}
    for i in range(count):
        coarse = Image.fromarray(rng.uniform(0, 1, (40, 32)).astype(np.float32))
        large = np.asarray(coarse.resize((2048, 2500), Image.Resampling.BICUBIC)).clip(0, 1)
        stored = (large * 3500 + rng.normal(300, 20, large.shape)).clip(0, 4095).astype(np.uint16)
        paths["DICOM 2500x2048"].append(write_dicom(folder / f"{i}.dcm", stored, BitsStored=12,
                                                    WindowCenter=2000, WindowWidth=3600))
        Image.fromarray(stored * 16).save(folder / f"{i}-16.png")
        paths["PNG 16 bits 2500x2048"].append(folder / f"{i}-16.png")
        small = Image.fromarray((stored[:2048] >> 4).astype(np.uint8)).resize((1024, 1024), Image.Resampling.BOX)
        small.save(folder / f"{i}-8.png")
        paths["PNG 8 bits 1024x1024"].append(folder / f"{i}-8.png")
    return paths


def build(name, kind):
    """path -> a 512x512 picture, as users of that library write it."""
    if name == "radiograph.py":
        return lambda path: pixels.read_radiograph(path, 512, bits=8 if "8 bits" in kind else 16)
    if name == "MONAI":
        from monai.data import PILReader, PydicomReader
        from monai.transforms import (Compose, LoadImage, Resize,
                                      ResizeWithPadOrCrop)
        reader = PydicomReader() if "DICOM" in kind else PILReader()
        return Compose([LoadImage(reader=reader, image_only=True, ensure_channel_first=True),
                        Resize(512, size_mode="longest", mode="bilinear", anti_aliasing=True),
                        ResizeWithPadOrCrop((512, 512))])
    if not importlib.util.find_spec("torchvision"):  # it has no build for every torch, and the readers never call it
        for module in ("torchvision", "torchvision.models", "torchvision.transforms"):
            sys.modules[module] = MagicMock()
    import skimage.io
    import torchxrayvision as xrv
    crop, resize = xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(512)
    if "DICOM" in kind:
        return lambda path: resize(crop(xrv.utils.read_xray_dcm(path, voi_lut=True)[None]))
    white = 255 if "8 bits" in kind else 65535
    return lambda path: resize(crop(xrv.utils.normalize(skimage.io.imread(path), white, reshape=True)))


def peak():
    """The greatest resident memory of this process so far, in MiB (getrusage would count the parent's too)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(name, kind, paths, queue):
    torch.set_num_threads(1)
    try:
        read = build(name, kind)
        before = peak()
        read(paths[0])
    except ImportError as error:
        queue.put(str(error))
        return
    start = time.perf_counter()
    for path in paths:
        read(path)
    rate = len(paths) / (time.perf_counter() - start)
    queue.put((rate, peak() - before))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=24, help="files of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for kind, paths in write_files(Path(folder), args.n).items():
            best = {}
            for _ in range(args.rounds):
                for name in READERS:
                    queue = context.Queue()
                    process = context.Process(target=measure, args=(name, kind, paths, queue))
                    process.start()
                    result = queue.get()
                    process.join()
                    best[name] = result if isinstance(result, str) else max(result, best.get(name, result))
            for name, result in best.items():
                text = f"not measured: {result}" if isinstance(result, str) else (
                    f"{result[0]:6.1f} images/s on one core, {result[1]:5.0f} MiB; "
                    f"ours is {best['radiograph.py'][0] / result[0]:.2f} times as fast")
                print(f"{kind:24}{name:18}{text}")
            for workers in range(1, os.cpu_count() + 1):
                with context.Pool(workers) as pool:
                    jobs = [(path, 512, 8 if "8 bits" in kind else 16) for path in paths]
                    pool.starmap(pixels.read_radiograph, jobs[:workers])
                    start = time.perf_counter()
                    pool.starmap(pixels.read_radiograph, jobs * 2, chunksize=1)
                    print(f"{kind:24}{'radiograph.py':18}{2 * len(paths) / (time.perf_counter() - start):6.1f} "
                          f"images/s with {workers} workers")


if __name__ == "__main__":
    main()
