"""Fine-tuning RadiT: a new run that starts from trained weights, on images of one's own.

    configuration   the base's: width, depth, heads, patch, prediction, time shift, VAE
    grid            the new images'; RoPE works on any grid
    data sets       the base's keep their rows in the table of embeddings, new ones are appended; a new row starts as a
                    copy of the row for "unknown", since to the base these data sets were unknown
    coverage        the base's and the new data's together: requests that the base accepts stay possible. Counts that
                    agree in every field are of the same images, prepared at another size, and are kept as they are

Before the first step of training the result samples the same images as the base. The average (EMA) starts from the
same weights.
"""
import dataclasses

import torch

from common.cli import InputError
from radiographs import fields
from radit import RadiT

TABLE = "metadata.tables.dataset.weight"


def merge_coverage(base, new):
    """Coverage (see radiographs/fields.py) of two sets of training data together: counts add up, ages span both."""
    merged = {field: dict(values) if isinstance(values, dict) else list(values) for field, values in base.items()}
    for field, values in new.items():
        if field not in merged:
            merged[field] = values
        elif field == "age":
            merged[field] = [min(merged[field][0], values[0]), max(merged[field][1], values[1])]
        else:
            merged[field] = {value: merged[field].get(value, 0) + values.get(value, 0)
                             for value in sorted(merged[field] | values)}
    return merged


def extend_config(base, shape, vae, **described):
    """The configuration of a fine-tuned model.

    base: RadiTConfig. shape: (C, H, W) of the new training images or latents. vae: fingerprint of the VAE that made
    them, empty for pixels. described: `datasets`, `covered` and other fields of RadiTConfig that the new data decide.
    Raises InputError if the base was trained on another kind of images or latents.
    """
    if vae != base.vae:
        def name(fingerprint):
            return f"latents of the VAE {fingerprint}" if fingerprint else "pixels"
        raise InputError(f"--init: these weights were trained on {name(base.vae)}, and the new images are {name(vae)}")
    if shape[0] != base.channels:
        raise InputError(f"--init: these weights are made for {base.channels} channels, "
                         f"and the new images have {shape[0]}")
    new = [name for name in described.pop("datasets") if name not in base.datasets]
    covered, pairs = described.pop("covered"), described.pop("pairs", {})
    if covered == base.covered:          # the same images, at another size: they are not counted twice
        pairs = base.pairs
    else:
        covered = merge_coverage(base.covered, covered)
        # Older weights do not know their pairs, so the sum is not known either.
        pairs = {} if base.covered and not base.pairs else fields.add_pairs(base.pairs, pairs)
    return dataclasses.replace(base, grid=tuple(shape[1:]), datasets=(*base.datasets, *new), covered=covered,
                               pairs=pairs, **described)


@torch.no_grad()
def extend(base, config):
    """A RadiT of this configuration, as extend_config gives it, with the weights of `base`, for training."""
    model = RadiT(config)
    tensors = base.state_dict()
    rows = len(config.datasets) + 1 - len(tensors[TABLE])            # of new data sets
    tensors[TABLE] = torch.cat([tensors[TABLE], tensors[TABLE][:1].expand(rows, -1)])
    model.load_state_dict(tensors)
    return model
