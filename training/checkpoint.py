"""Checkpoints of a training: written in the background, whole or not at all, read by any number of processes.

    RUN/checkpoints/8192/  __0_0.distcp ...     each process's share of weights, averages and AdamW's moments, float32
                           .metadata            which part of which tensor is in which file
                           checkpoint.json      images seen, configuration, SHA-256 of the other files; written last
                    9216.tmp/                   being written, or left by a run that was killed; never read

torch.distributed.checkpoint copies the tensors and writes them in a thread while the training continues. When every
process has written its share, the folder is renamed: from then on the checkpoint exists. Old checkpoints are renamed
before they are deleted. RUN must lie in a file system that all processes share. A run continues from the newest
checkpoint whose files match their checksums. Tensors with a NaN or an infinity are never written.

.metadata is a pickle, and a pickle can run code: read checkpoints of your own runs only. For others there is
`python -m training export RUN OUT`, which writes an average of the weights as config.json + model.safetensors.
"""
import hashlib
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from common import cli, hub
from common.cli import InputError, RunError
from training import parallel
from training.log import read_log

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose, with one process


def tensors_of(model, emas, optimizer):
    """name -> tensor: everything that a run needs to continue. The names do not depend on DDP, FSDP or one process."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, ema in enumerate(emas):
        tensors |= {f"{ema_prefix(number)}{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def ema_prefix(number):
    """The prefix of the tensors of the average with that number; the first has no number in it."""
    return f"ema{number}." if number else "ema."


def start_moments(optimizer):
    """Gives AdamW the state it has before its first step, so that a checkpoint can be loaded into it. The moments have
    the memory layout of their parameter (channels last), as the fused optimizer needs it."""
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device),
                                      "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def all_finite(tensors):
    """Whether no process holds a NaN or an infinity."""
    finite = [parallel.local(tensor).isfinite().all() for tensor in tensors.values()]
    return not parallel.anyone(not torch.stack(finite).all())


# ---------------------------------------------------------------------------------------------------------
# Reading

def complete(run):
    """The folders of complete checkpoints, oldest first."""
    numbered = [path for path in (Path(run) / "checkpoints").glob("*") if path.name.isdecimal()]
    return sorted((path for path in numbered if (path / "checkpoint.json").exists()), key=lambda path: int(path.name))


def latest(run):
    """The newest complete checkpoint, or None; its files are not read."""
    folders = complete(run)
    return folders[-1] if folders else None


def checksums(folder):
    """File name -> SHA-256 of every file of a checkpoint but checkpoint.json."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != "checkpoint.json":
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def verified(folder):
    """The content of checkpoint.json; InputError if a file is missing or does not match its checksum."""
    about = cli.read_json(folder / "checkpoint.json")
    for key, kind in (("images", int), ("name", str), ("config", dict), ("about", dict), ("files", dict)):
        if not isinstance(about.get(key), kind):
            raise InputError(f"{folder / 'checkpoint.json'}: no {key}, or not a {kind.__name__}")
    found = checksums(folder)
    for name, checksum in about["files"].items():
        if found.get(name) != checksum:
            raise InputError(f"{folder / name}: missing, or not as it was written")
    return about


def newest(run):
    """(folder, content of its checkpoint.json) of the newest undamaged checkpoint, with a warning for each newer one
    that is damaged; (None, None) if the run has no checkpoint at all."""
    folders = complete(run)
    for folder in reversed(folders):
        try:
            return folder, verified(folder)
        except InputError as error:
            print(f"warning: {error}; this checkpoint is skipped", file=sys.stderr)
    if folders:
        raise InputError(f"{Path(run) / 'checkpoints'}: no checkpoint is as it was written; "
                         "to start again, delete the folder")
    return None, None


def resume(run, tensors, about, may_change=()):
    """Fills the tensors from the newest checkpoint; returns the images seen, and those seen when the averages were
    updated last; (0, 0) if there is none. `about` must be what it was when the run was started, except for the keys in
    `may_change`."""
    folder, before = parallel.on_first(lambda: newest(run))
    if not folder:
        return 0, 0
    for key in about:
        if key not in may_change and before["about"].get(key) != about[key]:
            labels = key in ("covered", "pairs", "examples")
            advice = ", or --changed-labels if labels were corrected" if labels else ""
            change = difference(key, before["about"].get(key), about[key])
            raise InputError(f"{run}: this run was started with {change}; use another --out or the same "
                             f"options{advice}")
    read(folder, tensors)
    return before["images"], before.get("averaged", before["images"])  # older runs updated them in every step


def difference(name, old, new):
    """"NAME = OLD, not NEW" of the first place in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return difference(f"{name}[{key}]", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return difference(f"{name}[{place}]", a, b)
    return f"{name} = {str(old)[:60]}, not {str(new)[:60]}"


def read(folder, tensors, alone=False):
    """Fills the tensors from a checkpoint; with `alone`, in this process only."""
    try:
        dcp.load(tensors, checkpoint_id=folder, no_dist=alone or not parallel.training)
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder}: unreadable, or of a run with other options, such as more --ema: "
                         f"{reason[:200]}") from None


# ---------------------------------------------------------------------------------------------------------
# Writing

def share_of_process(tensors):
    """The tensors that this process copies and writes: its part of those that are split, and some of those that every
    process holds whole, chosen so that all processes write about as much."""
    share, loads = {}, [0] * parallel.world
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].nbytes, reverse=True):
        if isinstance(tensor, DTensor):
            share[name] = tensor
            continue
        least = loads.index(min(loads))
        loads[least] += tensor.nbytes
        if least == parallel.rank:
            share[name] = tensor
    return share


class Writer:
    """Writes checkpoints of one run in the background, one at a time, and keeps the last `keep`."""

    def __init__(self, run, keep):
        self.folder, self.keep, self.future, self.thread = Path(run) / "checkpoints", keep, None, ThreadPoolExecutor(1)
        if parallel.rank == 0:
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left)

    def save(self, tensors, about):
        """Starts to write; returns as soon as the tensors are copied. `about` is the content of checkpoint.json, which
        must have the key "images"."""
        self.wait()
        temporary = self.folder / f"{about['images']}.tmp"
        saving = dcp.async_save(share_of_process(tensors), checkpoint_id=temporary, no_dist=not parallel.training)
        self.future = self.thread.submit(self.complete, saving, temporary, about)

    def complete(self, saving, temporary, about):
        """In the thread: waits until all processes have written their shares; then the first process completes the
        checkpoint and deletes old ones."""
        try:
            saving.result()
        except (Exception, dcp.api.CheckpointException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"{temporary}: the checkpoint could not be written: {reason[:200]}") from None
        if parallel.rank > 0:
            return
        cli.write_json(temporary / "checkpoint.json", about | {"files": checksums(temporary)})
        os.replace(temporary, temporary.with_suffix(""))
        for old in complete(self.folder.parent)[:-self.keep]:
            os.replace(old, old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))

    def poll(self):
        """Raises an error of the thread, such as a full disk; does not wait."""
        if self.future and self.future.done():
            self.wait()

    def wait(self):
        """Waits for the checkpoint being written: at the end of a run, or before the next checkpoint."""
        if self.future:
            self.future.result()
            self.future = None


def refuse_unless(finite, entry, writer, out):
    """Ends a run whose loss, gradient or weights are not finite, before they are saved."""
    if not finite:
        writer.wait()
        last = latest(out)
        kept = f"the last good state is {last}" if last else "there was no checkpoint yet"
        raise RunError(f"after {entry['images']:,} images the loss ({entry['loss']}), the gradient "
                       f"({entry['grad_norm']}) or the weights are not finite: stopped; {kept}. A lower --lr, a longer "
                       "--warmup or a smaller --clip may help")


# ---------------------------------------------------------------------------------------------------------
# Weights for others

def best_average(run, about):
    """The number of the average whose held-out loss was least when the run last measured it; 0 if there is only one."""
    lines = read_log(Path(run) / "log.jsonl", about["images"])
    losses = [line["held_out_loss_by_ema"] for line in lines if "held_out_loss_by_ema" in line]
    if not losses or len(about.get("ema", [])) < 2:
        return 0
    best = min(losses[-1], key=losses[-1].get)
    return about["ema"].index(int(best)) if int(best) in about["ema"] else 0


def export(run, out, half_life=None):
    """Writes an average of the weights from a run's newest checkpoint to OUT/radit or OUT/vae: the one with that
    half-life, or the best one; the VAE of a run on latents as well. One tensor at a time is held in float32. Returns
    the content of checkpoint.json, with the chosen "half_life" added."""
    folder, about = newest(run)
    if not folder:
        raise InputError(f"{run}: no complete checkpoint in {Path(run) / 'checkpoints'}")
    half_lives = about.get("ema", [])
    if half_life and half_life not in half_lives:
        raise InputError(f"--ema {half_life}: this run keeps the half-lives {', '.join(map(str, half_lives))}")
    number = half_lives.index(half_life) if half_life else best_average(run, about)
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if any(".parametrizations." in name for name in known):
        raise InputError(f"{run}: this run trains adapters; {Path(run) / 'weights/vae'} holds them beside their base")
    tensors, prefix = {}, ema_prefix(number)
    for name, stored in known.items():
        if name.startswith(prefix):
            one = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
            read(folder, one, alone=True)
            tensors[name.removeprefix(prefix)] = one[name].bfloat16() if one[name].is_floating_point() else one[name]
    with cli.locked(out):
        hub.save_parts(tensors, about["config"], Path(out) / about["name"])
        if about["config"].get("vae"):
            for file in sorted((Path(run) / "weights" / "vae").iterdir()):
                cli.copy_file(file, Path(out) / "vae" / file.name)
    return about | {"half_life": half_lives[number] if half_lives else None}
