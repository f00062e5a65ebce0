"""The matrix products of RadiT's blocks in float8, twice bfloat16's rate on GPUs that have it: `train.py radit --fp8`.

    y = x W^T    x, W and, in the backward pass, the gradient of y are scaled so that their largest value is the largest
                 of float8, and rounded to 8 bits; products are summed in float32

torchao does it (its recipe "tensorwise": e4m3 for x and W, e5m2 for gradients, one scale a tensor, computed anew each
time). Weights, moments, averages and checkpoints stay float32, so a run may be continued with or without it. Converted
are qkv, out, up and down of each block. Everything else is small or sensitive: adaLN, embeddings, the final layer.
Averages are measured without float8. Not measured on a GPU yet. Source: Micikevicius et al. 2022.
"""
import importlib
import importlib.util

import torch
from torch import nn

from common.cli import InputError

CAPABILITY = (8, 9)  # of NVIDIA's Ada and Hopper, the first with products in float8
MULTIPLE = 16        # float8 products need sides that are multiples of it


def check(compiled, dry_run=False):
    """Raises InputError where --fp8 cannot work. A dry run may be on a machine without a GPU."""
    if not importlib.util.find_spec("torchao"):
        raise InputError("--fp8 needs the package torchao: pip install torchao")
    if not compiled:
        raise InputError("--fp8 needs --compile: uncompiled, rounding costs more than the products gain")
    if not torch.cuda.is_available():
        if not dry_run:
            raise InputError("--fp8 needs a GPU of compute capability 8.9 or later, and there is no GPU here")
    elif (found := torch.cuda.get_device_capability()) < CAPABILITY:
        raise InputError("--fp8 needs a GPU of compute capability 8.9 or later, and this one has "
                         f"{found[0]}.{found[1]}")


def check_tokens(tokens):
    """Raises InputError if a micro-batch has a number of tokens that float8 products do not take."""
    if tokens % MULTIPLE:
        raise InputError(f"--fp8 needs a multiple of {MULTIPLE} tokens at a time, not {tokens}: change --batch or "
                         "--accumulate")


def convert(block, emulate=False):
    """Replaces the block's linear layers but adaLN, in place; parameters and their names stay. `emulate` computes the
    rounded products in float32, on any device, for tests."""
    torchao = importlib.import_module("torchao.float8")              # optional, so imported only here

    def wanted(module, name):
        return isinstance(module, nn.Linear) and not name.endswith("adaln")

    torchao.convert_to_float8_training(block, module_filter_fn=wanted,
                                       config=torchao.Float8LinearConfig(emulate=emulate))
