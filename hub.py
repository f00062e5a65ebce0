"""A model is a folder: config.json (its dataclass) beside model.safetensors (its tensors). Nothing is unpickled.

Loading is strict: an unknown or missing key in the config, a missing, extra or misshapen tensor, a truncated file
is one clear line (InputError), never a partly loaded model. Weights are stored in bfloat16 and run in float32.
"""
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from cli import InputError, write_json


def save_model(model, folder, dtype=torch.bfloat16):
    """Writes model.config and the model's tensors into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
             for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors.tmp")
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    write_json(folder / "config.json", dataclasses.asdict(model.config))


def load_model(build, config_class, folder):
    """The model build(config) with the weights in `folder`, in float32, in eval mode."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; a model is a folder with config.json and model.safetensors")
    try:
        values = json.loads((folder / "config.json").read_text())
        known = {field.name for field in dataclasses.fields(config_class)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"keys {sorted(set(values) ^ known)} are unknown or missing; the keys are {sorted(known)}")
        model = build(config_class(**values))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    try:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        model.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder / 'model.safetensors'}: truncated or not of this architecture: {reason[:300]}") from None
    return model.eval().requires_grad_(False)


def fingerprint(folder):
    """Sixteen hex digits that name the weights in a model folder."""
    digest = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]
