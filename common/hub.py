"""A model is a folder: config.json (its dataclass) beside model.safetensors (its tensors). Nothing is unpickled.

Loading is strict: an unknown or missing key in the config, a missing, extra or misshapen tensor, a truncated file
is one clear line (InputError), never a partly loaded model. Weights are stored in bfloat16 and run in float32.

Wherever a folder is read, a folder on the Hugging Face Hub may stand: ORG/NAME, or ORG/NAME/FOLDER, or ORG/NAME@REVISION (a
branch, a tag or a commit). Its files are downloaded once, an interrupted download is continued, and then they are taken from
huggingface_hub's cache, without a network; HF_HUB_OFFLINE=1 asks for nothing else.
"""
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch

from common.cli import InputError, write_json


def find(place, *names):
    """The local path of the first of `names` that the folder `place` holds, here or on the Hub; None if it holds none."""
    place = Path(place)
    for name in names:
        if (place / name).is_file():
            return place / name
    # A name on the Hub has two parts; `runs/vea` beside a folder `runs` is a slip of the pen and asks nobody.
    if len(place.parts) < 2 or Path(place.parts[0]).exists():
        return None
    repository, _, revision = "/".join(place.parts[:2]).partition("@")
    at = {"revision": revision or None}
    for name in names:
        file = "/".join([*place.parts[2:], name])
        try:
            cached = huggingface_hub.try_to_load_from_cache(repository, file, **at)  # a path, None, or "known to be absent"
            if isinstance(cached, str):
                return Path(cached)
            if cached is None:
                huggingface_hub.file_exists(repository, file, **at)  # fails at once without a network, a download after many tries
                return Path(huggingface_hub.hf_hub_download(repository, file, **at))
        except huggingface_hub.errors.RemoteEntryNotFoundError:
            pass  # on to the next name
        except Exception as error:  # whatever its HTTP library raises, which changes from version to version
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{place}: no such folder here, and not to be had from the Hugging Face Hub: "
                             f"{reason[:200]}") from None
    return None


def save_model(model, folder, dtype=torch.bfloat16):
    """Writes model.config and the model's tensors into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(model.state_dict(), folder / "model.safetensors", dtype)
    write_json(folder / "config.json", dataclasses.asdict(model.config))


def save_tensors(tensors, path, dtype=torch.bfloat16):
    """Writes to a temporary name, then renames; integers keep their type."""
    tensors = {name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
               for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_model(build, config_class, folder):
    """The model build(config) with the weights in `folder`, in float32, in eval mode."""
    config, weights = find(folder, "config.json"), find(folder, "model.safetensors")
    for name, file in (("config.json", config), ("model.safetensors", weights)):
        if not file:
            raise InputError(f"{folder}: no {name}; a model is a folder with config.json and model.safetensors")
    try:
        values = json.loads(config.read_text())
        known = {field.name for field in dataclasses.fields(config_class)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"keys {sorted(set(values) ^ known)} are unknown or missing; the keys are {sorted(known)}")
        model = build(config_class(**values))
    except (ValueError, TypeError) as error:
        raise InputError(f"{config}: {error}") from None
    return load_tensors(model, weights)


def load_tensors(model, file, rename=lambda tensors: tensors):
    """Fills the model from a file, strictly, in eval mode."""
    try:
        model.load_state_dict(rename(safetensors.torch.load_file(file)))
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: truncated or not of this architecture: {reason[:300]}") from None
    return model.eval().requires_grad_(False)


def fingerprint(place):
    """Sixteen hex digits that name the weights in a model's folder, or in a file."""
    file = place if Path(place).is_file() else find(place, "model.safetensors")
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
