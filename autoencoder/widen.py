"""Training a Rad-VAE from the weights of another one, its base, that may have fewer latent channels.

The base's channels keep their place and their values, and until the first step the widened VAE reconstructs exactly as
its base: the decoder's weights for the new channels start at zero. The gradient of these weights is not zero, so that
the new channels are used from the first step on.
"""
import dataclasses

import torch

from common.cli import InputError
from vae import RadVAE


@torch.no_grad()
def widen(base, latent_channels=None):
    """A RadVAE in training mode with the weights of `base` and this many latent channels (before patchifying), by
    default as many as the base has. New weights come from torch's global generator. Raises InputError for fewer
    channels."""
    old = base.config.latent_channels
    c = latent_channels or old
    if c < old:
        raise InputError(f"--latent-channels {c}: the base has {old}, and channels cannot be removed")
    model = RadVAE(dataclasses.replace(base.config, latent_channels=c))
    new, tensors = model.state_dict(), base.state_dict()
    # quant_conv's outputs are all means, then all log-variances; the base's two halves move apart.
    mean, logvar = slice(old), slice(c, c + old)
    for rows, part in ((mean, slice(old)), (logvar, slice(old, 2 * old))):
        new["quant_conv.bias"][rows] = tensors["quant_conv.bias"][part]
        new["quant_conv.weight"][rows] = 0                           # the encoder's new outputs are not used
        new["quant_conv.weight"][rows, :2 * old] = tensors["quant_conv.weight"][part]
    new["post_quant_conv.weight"][:old] = 0                          # new channels do not enter the old ones
    new["decoder.conv_in.weight"][:, old:] = 0                       # new channels do not enter the image
    for name, tensor in tensors.items():
        if not name.startswith("quant_conv"):
            new[name][tuple(slice(n) for n in tensor.shape)] = tensor  # the first channels, or all
    return model
