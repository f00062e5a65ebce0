"""Checkpoints of a training: written beside it, whole or not at all, read by any number of processes.

    RUN/checkpoints/8192/  __0_0.distcp ...     each process's part of weights, EMA and moments, float32
                           .metadata            which part of which tensor lies where
                           checkpoint.json      images seen, configuration; written last
                    9216.tmp/                   being written, or left by a run that was killed; never read

torch.distributed.checkpoint copies the tensors and writes them in a thread while training goes on. When every process has
written its part the folder is renamed, which is the moment at which the checkpoint exists; the oldest are renamed away
before they are deleted. RUN must lie where all processes see it.

.metadata is a pickle, and a pickle can run code: read checkpoints of your own runs only. For others there is
`python -m training export RUN OUT`, which writes the EMA as config.json + model.safetensors.
"""
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from common import cli, hub
from common.cli import InputError
from training import parallel

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant


def tensors_of(model, ema, optimizer):
    """name -> tensor of all that a run must remember. The names know nothing of the layout."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def start_moments(optimizer):
    """AdamW's state before its first step, so that there is something to load into. Moments lie as their parameter does
    (channels last), for the fused optimizer walks memory in order."""
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device),
                                      "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def complete(run):
    """The folders of complete checkpoints, oldest first."""
    folders = [path for path in (Path(run) / "checkpoints").glob("*") if path.name.isdigit() and (path / "checkpoint.json").exists()]
    return sorted(folders, key=lambda path: int(path.name))


def latest(run):
    """The newest complete checkpoint, or None."""
    return (complete(run) or [None])[-1]


def load(folder, tensors, about):
    """Fills the tensors; returns the images seen. Refuses a run of another configuration."""
    before = json.loads((folder / "checkpoint.json").read_text())
    for key in about:
        if before["about"].get(key) != about[key]:
            old, new = (str(value)[:40] for value in (before["about"].get(key), about[key]))
            raise InputError(f"{folder.parent.parent}: this run was started with {key} = {old}, not {new}; "
                             f"use another --out or the same options")
    read(folder, tensors)
    return before["images"]


def read(folder, tensors, alone=False):
    try:
        dcp.load(tensors, checkpoint_id=folder, no_dist=alone or not parallel.training)
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder}: unreadable checkpoint ({reason[:200]}); delete it to continue from the one before") from None


class Writer:
    """Writes checkpoints of one run in the background, one at a time, and keeps the last `keep`."""

    def __init__(self, run, keep):
        self.folder, self.keep, self.future = Path(run) / "checkpoints", keep, None
        if parallel.rank == 0:
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left)

    def save(self, tensors, about):
        """Starts to write; returns as soon as the tensors are copied. `about` is the JSON beside them, with "images"."""
        self.wait()
        self.about, self.temporary = about, self.folder / f"{about['images']}.tmp"
        self.future = dcp.async_save(tensors, checkpoint_id=self.temporary, no_dist=not parallel.training)

    def poll(self):
        """Completes what has been written meanwhile; to be called often, waits for nothing."""
        if self.future and self.future.done():
            self.wait()

    def wait(self):
        """Completes what is being written: at the end of a run, or before the next checkpoint."""
        if not self.future:
            return
        self.future.result()
        self.future = None
        if parallel.rank == 0:
            cli.write_json(self.temporary / "checkpoint.json", self.about)
            os.replace(self.temporary, self.temporary.with_suffix(""))
            for old in complete(self.folder.parent)[:-self.keep]:
                os.replace(old, old.with_suffix(".tmp"))
                shutil.rmtree(old.with_suffix(".tmp"))


def export(run, out):
    """Writes the EMA of a run's newest checkpoint as a set of weights: OUT/radit or
    OUT/vae. Nothing else is read, and one tensor at a time is held in float32. Returns what checkpoint.json says of it."""
    folder = latest(run)
    if not folder:
        raise InputError(f"{run}: no complete checkpoint in {Path(run) / 'checkpoints'}")
    about = json.loads((folder / "checkpoint.json").read_text())
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if any(".parametrizations." in name for name in known):
        raise InputError(f"{run}: this run trains adapters; {Path(run) / 'weights/vae'} holds them beside their base")
    tensors = {}
    for name, stored in known.items():
        if name.startswith("ema."):
            one = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
            read(folder, one, alone=True)
            tensors[name.removeprefix("ema.")] = one[name].bfloat16() if one[name].is_floating_point() else one[name]
    place = Path(out) / about["name"]
    place.mkdir(parents=True, exist_ok=True)
    hub.save_tensors(tensors, place / "model.safetensors")
    cli.write_json(place / "config.json", about["config"])
    return about
