"""Cached latents: every image is encoded once, and RadiT trains without the VAE.

    LATENTS/ 00000.safetensors ...   mean and log-variance, float16, of 1024 rows a file; noise is added at use
             latents.json            the VAE's fingerprint, the images' fingerprints, and which image each row is

Made by `python -m autoencoder encode`, or `torchrun --nproc_per_node=8 -m autoencoder encode`; the same command again
continues. A cache belongs to one VAE and to the images as they were: continuing or training with others is refused. Labels
may change, no latent depends on them.
"""
import hashlib
import json
import os
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

import data
import metrics
from common import cli
from encoders.perceptual import perceptual_loss, to_encoder_input
from radiographs import pixels
from vae import psnr, ssim

SHARD = 1024  # images


def names_of(radiographs):
    """What identifies each image in a cache: the source's folder and the path in it."""
    return ["/".join(record["path"].parts[-3:]) for record in radiographs.records]


def stamp(path):
    """What changes when an image does: the size and the last 20 bytes of its file. They are read instead of the whole,
    for there may be a million files; a PNG's compressed pixels end in a checksum of them all, 20 bytes before its end."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 20))
        return b"%d %b" % (size, file.read())


def fingerprints(radiographs):
    """"SOURCE, SPLIT" -> sixteen hex digits of the names and contents of its images, in the index's order."""
    digests = {}
    with ThreadPool(16) as pool:  # a network's file system answers many at a time
        stamps = pool.imap(stamp, [record["path"] for record in radiographs.records], chunksize=256)
        for name, record, content in zip(names_of(radiographs), radiographs.records, stamps):
            digest = digests.setdefault(f"{name.split('/')[0]}, {record['split']}", hashlib.sha256())
            digest.update(name.encode() + b"\n" + content)
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}


@torch.no_grad()
def encode(folders, model, out, versions=1, batch=16):
    """Encodes every image of the prepared sources; finished shards are kept.

    With versions > 1 a training image has that many rows: as it is, and jittered, so that a small data set is not
    learnt by heart. The jitter of a row depends on its number alone. Under torchrun every process takes its share of the
    shards, on a GPU of its own; nothing has to be said between them.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, _ = cli.pick_device()
    model.to(device)
    images = data.Radiographs(folders)
    names = names_of(images)
    if len(set(names)) < len(images):
        raise cli.InputError("two of the prepared sources have the same folder name, so their images cannot be told apart")
    rows = [(i, version) for i, record in enumerate(images.records)
            for version in range(versions if record["split"] == "train" else 1)]
    about = {"vae": model.fingerprint, "images": fingerprints(images), "rows": [names[i] for i, _ in rows]}
    table = out / "latents.json"
    while rank and not table.exists():  # the first process checks the folder before anybody writes there
        time.sleep(0.1)
    if not table.exists() and any(out.glob("*.safetensors")):
        raise cli.InputError(f"{out} holds files that are not these latents; name another --out")
    before = json.loads(table.read_text()) if table.exists() else about
    for key, what in (("vae", "another VAE"), ("images", "other images, or of these before they changed"),
                      ("rows", "other --versions of these images")):
        if before.get(key) != about[key]:
            raise cli.InputError(f"{out} holds latents of {what}; delete it, or name another --out")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        cli.write_json(table, about)

    def picture(row):
        i, version = rows[row]
        x = images[i][None]                                          # 1 1 H W
        return pixels.jitter(x, torch.Generator().manual_seed(row)) if version else x

    for start in tqdm(range(rank * SHARD, len(rows), world * SHARD), unit="shard", disable=rank > 0):
        path, stop = out / f"{start // SHARD:05}.safetensors", min(start + SHARD, len(rows))
        if path.exists():
            continue
        moments = []
        for first in range(start, stop, batch):
            x = torch.cat([picture(row) for row in range(first, min(first + batch, stop))])  # N 1 H W
            moments.append([half.half().cpu() for half in model.encode(x.to(device))])
        mean, logvar = (torch.cat(halves) for halves in zip(*moments))
        safetensors.torch.save_file({"mean": mean, "logvar": logvar}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)


class Latents:
    """Cached latents by row: latents[row] is (mean, log-variance), each (4c, h, w) float32, read from disk when asked."""

    def __init__(self, folder):
        self.folder, self.shards = Path(folder), {}
        if not (self.folder / "latents.json").exists():
            raise cli.InputError(f"{folder}: no latents.json; make it with python -m autoencoder encode")
        about = json.loads((self.folder / "latents.json").read_text())
        if set(about) != {"vae", "images", "rows"}:
            raise cli.InputError(f"{folder}: latents.json was written by another version of this code; encode again")
        self.vae, self.images, self.rows = about["vae"], about["images"], {}  # rows: image -> where its versions are
        for row, name in enumerate(about["rows"]):
            self.rows.setdefault(name, []).append(row)

    def check(self, radiographs):
        """Refuses images other than those that were encoded."""
        for part, digest in fingerprints(radiographs).items():
            if self.images.get(part) != digest:
                raise cli.InputError(f"{self.folder}: the images of {part} are not those that were encoded; encode again")

    def __getitem__(self, row):
        number, row = divmod(row, SHARD)
        if number not in self.shards:
            self.shards[number] = safetensors.safe_open(self.folder / f"{number:05}.safetensors", "pt")
        return tuple(self.shards[number].get_slice(name)[row].float() for name in ("mean", "logvar"))


@torch.no_grad()
def evaluate(model, images, encoder=None, batch=16):
    """What reconstruction does to `images`, a sequence of (1, H, W) in [-1, 1]: {"psnr": in dB, "ssim": ...}, each (N,). With
    an encoder of raddino.py "perceptual", (N,), as well, and "fdd", one number: the Fréchet distance of originals and
    reconstructions in its features."""
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
    if encoder:
        real, returned = (metrics.moments(torch.cat(side)) for side in zip(*seen))
        scores["fdd"] = torch.tensor(metrics.frechet(*real, *returned))
    return scores
