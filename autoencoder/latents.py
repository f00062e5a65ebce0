"""Cached latents: every image is encoded once, and RadiT trains without the VAE.

    LATENTS/ 00000.safetensors ...   mean and log-variance, float16, 1024 rows in each file; training adds the noise
             latents.json            the VAE's fingerprint, the images' fingerprints, and which image each row is

Made by `python -m autoencoder encode`, or `torchrun --nproc_per_node=8 -m autoencoder encode`; the same command again
continues. A cache belongs to one VAE and to unchanged images: continuing or training with others is refused. Labels may
change, since no latent depends on them.
"""
import contextlib
import hashlib
import itertools
import math
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import safetensors
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import data
import metrics
from common import cli, hub
from encoders.perceptual import perceptual_loss, to_encoder_input
from radiographs import pixels
from training import parallel
from vae import psnr, ssim

SHARD = 1024  # rows in each file


def names_of(radiographs):
    """The name of each image in a cache: the source's folder and the path in it."""
    return ["/".join(record["path"].parts[-3:]) for record in radiographs.records]


def file_checksum(path):
    """Bytes that change when an image does: the size of its file and the last 20 bytes, where a PNG has a checksum of
    its pixels. A million files could not be read whole each time."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 20))
        return b"%d %b" % (size, file.read())


def fingerprints(radiographs):
    """"SOURCE, SPLIT" -> sixteen hex digits of the names and contents of its images, in the index's order."""
    digests = {}
    with ThreadPool(16) as pool:  # a network file system answers many requests at a time
        checksums = pool.imap(file_checksum, [record["path"] for record in radiographs.records], chunksize=256)
        for name, record, content in zip(names_of(radiographs), radiographs.records, checksums):
            digest = digests.setdefault(f"{name.split('/')[0]}, {record['split']}", hashlib.sha256())
            digest.update(name.encode("utf-8", "surrogateescape") + b"\n" + content)
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}


# ---------------------------------------------------------------------------------------------------------
# Writing

def encode(folders, model, out, versions=1, batch=16):
    """Encodes every image of the prepared sources; shards that exist already are kept.

    With versions > 1 a training image has that many rows: the image itself and slightly moved copies, so that a small
    data set is not memorised. How a copy is moved depends only on its row's number. Under torchrun each process encodes
    its share of the shards on its own GPU.
    """
    parallel.join()
    images = parallel.on_first(lambda: data.Radiographs(folders))
    rows = [(i, version) for i, record in enumerate(images.records)
            for version in range(versions if record["split"] == "train" else 1)]
    with parallel.locked(out):
        parallel.on_first(lambda: begin(out, table_of(images, rows, model)))
        device = cli.pick_device()[0]
        model.to(device)
        missing = {}                                                 # path of a shard: numbers of its rows, in batches
        for start in range(parallel.rank * SHARD, len(rows), parallel.world * SHARD):
            path, numbers = out / f"{start // SHARD:05}.safetensors", range(start, min(start + SHARD, len(rows)))
            if not path.exists():
                missing[path] = [numbers[i:i + batch] for i in range(0, len(numbers), batch)]
        batches = itertools.chain.from_iterable(missing.values())
        with contextlib.closing(parallel.read(Versions(images, rows), batches, device)) as loader:
            for path in tqdm(missing, unit="shard", disable=None if parallel.rank == 0 else True):
                encode_shard(path, itertools.islice(loader, len(missing[path])), model, device)
        parallel.leave()                                             # waits until all processes are done
    if parallel.rank == 0:
        print(f"{cli.count(len(rows), 'latent')} of {cli.count(len(images), 'image')} in {out}")


def table_of(images, rows, model):
    """The content of latents.json."""
    names = names_of(images)
    if len(set(names)) < len(images):
        raise cli.InputError("two of the prepared sources have the same folder name, so their images cannot be told "
                             "apart")
    return {"vae": model.fingerprint, "images": fingerprints(images), "rows": [names[i] for i, _ in rows]}


def begin(out, about):
    """Writes OUT/latents.json. Refuses a folder that holds anything but these latents."""
    table = out / "latents.json"
    if not table.exists() and any(out.glob("*.safetensors")):
        raise cli.InputError(f"{out} holds files that are not these latents; name another --out")
    before = cli.read_json(table) if table.exists() else about
    for key, what in (("vae", "another VAE"), ("images", "other images, or these images have changed"),
                      ("rows", "other --versions of these images")):
        if before.get(key) != about[key]:
            raise cli.InputError(f"{out} holds latents of {what}; delete it, or name another --out")
    cli.write_json(table, about)


@torch.no_grad()
def encode_shard(path, batches, model, device):
    """Writes the latents of all images in `batches`, each (N, 1, H, W)."""
    parts = [[half.half().cpu() for half in model.encode(x.to(device))] for x in batches]
    mean, logvar = (torch.cat(halves) for halves in zip(*parts))
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        raise cli.RunError(f"{path}: the VAE gives latents that are not finite; nothing was written")
    hub.save_tensors({"mean": mean, "logvar": logvar}, path, torch.float16)


class Versions(Dataset):
    """The image of each row, (1, H, W): of a row (i, version) image i itself for version 0, a moved copy for others."""

    def __init__(self, images, rows):
        self.images, self.rows = images, rows

    def __getitem__(self, number):
        i, version = self.rows[number]
        x = self.images[i]                                           # 1 H W
        return pixels.jitter(x[None], torch.Generator().manual_seed(number))[0] if version else x


# ---------------------------------------------------------------------------------------------------------
# Reading

class Shards:
    """shards[row] is (mean, log-variance) of a row, each (4c, h, w) float32, read from disk when needed. A copy sent to
    another process opens the files again."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}

    def __getstate__(self):
        return {"folder": self.folder, "files": {}}

    def path(self, number):
        return self.folder / f"{number:05}.safetensors"

    def open(self, number):
        if number not in self.files:
            try:
                self.files[number] = safetensors.safe_open(self.path(number), "pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise cli.InputError(f"{self.path(number)}: missing or damaged ({error}); delete it and encode "
                                     "again") from None
        return self.files[number]

    def __getitem__(self, row):
        file = self.open(row // SHARD)
        return tuple(file.get_slice(name)[row % SHARD].float() for name in ("mean", "logvar"))

    def check(self, rows):
        """Refuses shards that are missing, cut short, or do not hold `rows` latents of one shape."""
        shapes = set()
        for number in range(math.ceil(rows / SHARD)):
            file, count = self.open(number), min(SHARD, rows - number * SHARD)
            if set(file.keys()) != {"mean", "logvar"}:
                raise cli.InputError(f"{self.path(number)}: no mean and logvar in it; delete it and encode again")
            sizes = [tuple(file.get_slice(name).get_shape()) for name in ("mean", "logvar")]
            shapes.add(sizes[0][1:])
            if sizes[0] != sizes[1] or sizes[0][0] != count or len(sizes[0]) != 4 or len(shapes) > 1:
                raise cli.InputError(f"{self.path(number)}: holds {sizes[0]} and {sizes[1]}, where {count} latents of "
                                     "one shape are expected; delete it and encode again")
            del self.files[number]                                   # closed: a million images have a thousand files


class Latents:
    """A cache: `rows` holds for each image's name the numbers of its rows in `shards`."""

    def __init__(self, folder):
        self.folder, self.shards, self.rows = Path(folder), Shards(folder), {}
        table = self.folder / "latents.json"
        if not table.exists():
            what = "no latents.json in it" if self.folder.is_dir() else "no such folder"
            raise cli.InputError(f"{folder}: {what}; latents are made by python -m autoencoder encode")
        about = cli.read_json(table)
        if set(about) != {"vae", "images", "rows"}:
            raise cli.InputError(f"{table}: written by another version of this code; encode again")
        self.vae, self.images = about["vae"], about["images"]
        if not (isinstance(self.images, dict) and isinstance(about["rows"], list)
                and set(map(type, about["rows"])) == {str}):
            raise cli.InputError(f"{table}: damaged; encode again")
        for row, name in enumerate(about["rows"]):
            self.rows.setdefault(name, []).append(row)
        self.shards.check(len(about["rows"]))

    def check(self, radiographs):
        """Refuses images other than those that were encoded."""
        for part, digest in fingerprints(radiographs).items():
            if self.images.get(part) != digest:
                raise cli.InputError(f"{self.folder}: the images of {part} are not those that were encoded; "
                                     "encode again")

    def __getitem__(self, row):
        return self.shards[row]


# ---------------------------------------------------------------------------------------------------------
# Evaluation: what is lost in reconstruction

@torch.no_grad()
def evaluate(model, images, encoder=None, batch=16):
    """How well `images`, a sequence of (1, H, W) in [-1, 1], are reconstructed: {"psnr": in dB, "ssim"}, each (N,).
    With an encoder of encoders/raddino.py also "perceptual", (N,), and for two images or more "fdd", one number: the
    Fréchet distance of originals and reconstructions in its features."""
    scores, seen, device = {"psnr": [], "ssim": []}, [], next(model.parameters()).device
    for start in tqdm(range(0, len(images), batch), unit="batch", leave=False):
        x = torch.stack([images[i] for i in range(start, min(start + batch, len(images)))]).to(device)  # N 1 H W
        y = model.decode(model.encode(x)[0]).clamp(-1, 1)            # N 1 H W
        scores["psnr"].append(psnr(x, y))
        scores["ssim"].append(ssim(x, y))
        if encoder:
            scores.setdefault("perceptual", []).append(perceptual_loss(encoder, x, y))
            seen.append([encoder(to_encoder_input(encoder, z))[0].cpu() for z in (x, y)])            # N D each
    scores = {name: torch.cat(parts).cpu() for name, parts in scores.items()}
    if encoder and len(images) > 1:
        real, returned = (metrics.mean_and_covariance(torch.cat(side)) for side in zip(*seen))
        scores["fdd"] = torch.tensor(metrics.frechet(*real, *returned))
    return scores
