"""What RadiT is trained on, as tensors: (mean, log-variance, age, codes) of each cached latent or image; and synthetic
examples of metadata for config.json, which sample.py uses when no metadata is given.

No example is the record of a patient. Its data set is chosen at random by frequency, and then every other field
independently from the values in that data set, "unknown" among them. Findings that contradict each other are resolved,
and a combination that is a row of the training data is not used. So weights can be published without any patient's
metadata in them.
"""
import math
import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset

from common.cli import InputError
from radiographs import fields, pixels

EXAMPLES, ATTEMPTS = 64, 20  # examples in config.json; combinations tried for each


class Examples(Dataset):
    """A data set with an item for each cached latent of the `records` of prepared sources, or without latents for each
    image, whose mean is the image and whose variance is 0. It holds arrays only, since a million rows are copied to
    every process. `latents` is None or a cache (autoencoder/latents.py), `names` the name of each record in it."""

    def __init__(self, records, datasets, latents=None, names=()):
        age, codes = fields.encode_metadata(records, datasets)
        self.age, self.codes = age, codes.to(torch.uint8)            # I, I 18: I images
        self.image = torch.arange(len(records))                      # of each example
        self.paths = self.shards = None
        if latents is None:
            self.paths = np.array([os.fsencode(record["path"]) for record in records])
            return
        self.shards = latents.shards
        if missing := [name for name in names if name not in latents.rows]:
            raise InputError(f"{latents.folder}: no latent for {missing[0]} ({len(missing)} missing); encode again")
        rows = [latents.rows[name] for name in names]
        self.image = torch.repeat_interleave(self.image, torch.tensor([len(versions) for versions in rows]))
        self.row = torch.tensor([row for versions in rows for row in versions])  # of each example, in the cache

    def __len__(self):
        return len(self.image)

    def __getitem__(self, item):
        image = int(self.image[item])
        if self.shards:
            mean, logvar = self.shards[int(self.row[item])]          # C H W each
        else:
            mean = pixels.load_image(os.fsdecode(self.paths[image]))  # 1 H W
            logvar = torch.full_like(mean, -math.inf)
        return mean, logvar, self.age[image], self.codes[image].long()

    def some(self, count):
        """About `count` examples, evenly spread, as a batch."""
        few = [self[i] for i in range(0, len(self), max(1, len(self) // count))][:count]
        return [torch.stack(column) for column in zip(*few)]


def metadata(record):
    """The fields of a record, without path, patient and split."""
    return {field: record[field] for field in fields.FIELDS if field in record}


def synthetic_metadata(records, seed):
    """At most EXAMPLES combinations of metadata like those of the records, none of them equal to a record."""
    rng = random.Random(seed)
    seen = {tuple(metadata(record).items()) for record in records}
    by_dataset = {}
    for record in records:
        by_dataset.setdefault(record.get("dataset"), []).append(record)
    names, examples = list(by_dataset), []
    weights = [len(group) for group in by_dataset.values()]
    for _ in range(EXAMPLES * ATTEMPTS):
        dataset = rng.choices(names, weights)[0]
        example = {field: rng.choice(by_dataset[dataset]).get(field) for field in fields.FIELDS if field != "dataset"}
        example, _ = fields.resolve_request(metadata(fields.drop_unknown({"dataset": dataset} | example)))
        if example and tuple(example.items()) not in seen:
            examples.append(example)
        if len(examples) == EXAMPLES:
            break
    return examples
