"""Training a Rad-VAE further, from the weights of another one that may have fewer latent channels.

The base's channels keep their place and their values, and its reconstructions are those of the widened VAE until the
first step: the new channels are there, but the decoder's weights for them start at zero. Their gradient does not, so
that they are put to use at once.
"""
import dataclasses

import torch

from common.cli import InputError
from vae import RadVAE


@torch.no_grad()
def widen(base, latent_channels=None):
    """A RadVAE with the weights of `base` and `latent_channels` of them before patchifying: at least as many as the
    base has, which is the default. It is in training mode; new weights come from torch's global random numbers."""
    old = base.config.latent_channels
    c = latent_channels or old
    if c < old:
        raise InputError(f"--latent-channels {c}: the base has {old}, and channels cannot be taken away")
    model = RadVAE(dataclasses.replace(base.config, latent_channels=c))
    new, tensors = model.state_dict(), base.state_dict()
    # quant_conv's outputs are all means, then all log-variances; the base's two halves move apart.
    mean, logvar = slice(old), slice(c, c + old)
    for rows, part in ((mean, slice(old)), (logvar, slice(old, 2 * old))):
        new["quant_conv.bias"][rows] = tensors["quant_conv.bias"][part]
        new["quant_conv.weight"][rows] = 0                           # nothing from the encoder's new outputs
        new["quant_conv.weight"][rows, :2 * old] = tensors["quant_conv.weight"][part]
    new["post_quant_conv.weight"][:old] = 0                          # nothing from the new channels into the old ones
    new["decoder.conv_in.weight"][:, old:] = 0                       # nothing from the new channels into the image
    for name, tensor in tensors.items():
        if not name.startswith("quant_conv"):
            new[name][tuple(slice(n) for n in tensor.shape)] = tensor  # the first channels, or all
    return model
