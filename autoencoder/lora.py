"""LoRA: adapters of low rank that fine-tune the decoder of a VAE, or RadiT's blocks, and leave the rest as it is, bit
for bit.

    W' = W + alpha / r  B A        W (c_out, c_in, k, k) frozen, A (r, c_in, k, k), B (c_out, r); k = 1 for projections

Source: Hu et al. 2021. A starts uniform, B at zero, so that training starts exactly at the base. peft applies A as a
k x k convolution to r channels and B as a 1x1 convolution, which is the same map. Here W' itself is computed, once in
each forward pass, which is less work than two more convolutions at every pixel.

    a VAE     all convolutions and projections of the decoder, not its norms. The encoder and the running statistics do
              not change, so latents cached with the base stay valid.
    RadiT     qkv, out, up and down of each block. The table of data sets, which may have new rows, is trained too.

On disk, beside the base: lora.safetensors (A and B, and that table, in bfloat16) and lora.json (rank, alpha, the
fingerprint of the base).
"""
import argparse
import json
import math
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

from common import cli, hub
from radit import RadiT

TABLE = "metadata.tables.dataset.weight"


class Adapter(nn.Module):
    """Computes W' from a layer's weight W (torch's parametrize): the layer uses W', and W does not change."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight):                                       # c_out c_in (k k)
        return weight + self.alpha / self.rank * (self.B @ self.A.flatten(1)).view_as(weight)


def adapted_part(model):
    """The part of a model that gets adapters; their names are relative to it."""
    return model.blocks if isinstance(model, RadiT) else model.decoder


def layers(model):
    """(name, layer) of every layer that can be adapted."""
    return [(name, layer) for name, layer in adapted_part(model).named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.endswith("adaln")]


def adapters(model):
    """name -> Adapter."""
    return {name: layer.parametrizations.weight[0] for name, layer in layers(model)
            if parametrize.is_parametrized(layer)}


def add(model, rank, alpha):
    """Freezes the model and adds adapters, which are then its only trainable parameters, except for RadiT's table of
    data sets."""
    if adapters(model) or getattr(model, "merged", False):
        raise cli.InputError("these weights have adapters already; new ones start from their base")
    model.requires_grad_(False)
    if isinstance(model, RadiT):
        model.metadata.tables["dataset"].requires_grad_(True)
    else:
        model.bn.track_running_stats = False  # model.train() would move the statistics that normalise cached latents
    for _, layer in layers(model):
        parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, rank, alpha))


def merge(model):
    """Writes W' into the layers and removes the adapters; returns what unmerge needs: name -> (W, adapter)."""
    replaced = {}
    for name, adapter in adapters(model).items():
        layer = adapted_part(model).get_submodule(name)
        replaced[name] = layer.parametrizations.weight.original.clone(), adapter
        parametrize.remove_parametrizations(layer, "weight")
    model.merged = True
    return replaced


def unmerge(model, replaced):
    """Undoes merge. The kept W is put back, since W' - BA would differ from it by rounding."""
    for name, (weight, adapter) in replaced.items():
        layer = adapted_part(model).get_submodule(name)
        layer.weight.data.copy_(weight)
        parametrize.register_parametrization(layer, "weight", adapter)
    model.merged = False


def trained_tensors(model):
    """name -> tensor, of all that is trained and saved."""
    tensors = {}
    for name, adapter in adapters(model).items():
        tensors |= {f"{name}.{key}": value for key, value in adapter.named_parameters()}
    if isinstance(model, RadiT):
        tensors[TABLE] = model.metadata.tables["dataset"].weight
    return tensors


def save(model, folder):
    """Writes the adapters of a model; model.fingerprint is that of its base's weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = next(iter(adapters(model).values()))                       # all have the same rank and alpha
    hub.save_tensors(trained_tensors(model), folder / "lora.safetensors")
    cli.write_json(folder / "lora.json", {"base": model.fingerprint, "rank": one.rank, "alpha": one.alpha})


def load(model, folder):
    """Adds the adapters in `folder` to their base, strictly."""
    table, file = hub.find(folder, "lora.json"), hub.find(folder, "lora.safetensors")
    if not table or not file:
        raise cli.InputError(f"{folder}: adapters are two files, lora.json and lora.safetensors")
    try:
        about, tensors = json.loads(table.read_text()), safetensors.torch.load_file(file)
        base, rank, alpha = about["base"], cli.positive(str(about["rank"])), cli.number(0, 1e6)(str(about["alpha"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, argparse.ArgumentTypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise cli.InputError(f"{folder}: lora.json or lora.safetensors is damaged: {reason}") from None
    if base != model.fingerprint:
        raise cli.InputError(f"{folder}: trained on the base {base}, and this one is {model.fingerprint}")
    add(model, rank, alpha)
    expected = trained_tensors(model)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors or tensors[name].shape != expected[name].shape:
            raise cli.InputError(f"{file}: {name} is missing, unknown or of another shape")
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
