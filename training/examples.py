"""What RadiT is trained on, as tensors: (mean, log-variance, age, codes) of each cached latent or image; and what
config.json says of it: which values there were, and examples of metadata to ask for when nobody asks.

The examples are nobody's record. The data set of each is drawn by its frequency, and then every other field
independently from its values in that data set, "unknown" among them; findings that contradict each other are resolved,
and a combination that is a row of the training data is drawn again. Weights can so be given away without the metadata
of a patient in them.
"""
import math
import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset

from common.cli import InputError
from radiographs import fields, pixels

EXAMPLES, ATTEMPTS = 64, 20  # in config.json; combinations tried for each


class Examples(Dataset):
    """The rows of `records`, as prepared sources have them, one for each of their latents, or one for each image; a
    pixel image is its own mean, without variance. Only arrays are kept: a million rows are handed from process to
    process. `latents` is None or a cache as autoencoder/latents.py reads it, `names` what it calls each image."""

    def __init__(self, records, datasets, latents=None, names=()):
        age, codes = fields.encode_metadata(records, datasets)
        self.age, self.codes = age, codes.to(torch.uint8)            # I, I 18: of I images
        self.image = torch.arange(len(records))                      # of each example
        self.paths = self.shards = None
        if latents is None:
            self.paths = np.array([os.fsencode(record["path"]) for record in records])
            return
        self.shards = latents.shards
        if missing := [name for name in names if name not in latents.rows]:
            raise InputError(f"{latents.folder}: no latent for {missing[0]} ({len(missing)} missing); encode again")
        rows = [latents.rows[name] for name in names]
        self.image = torch.repeat_interleave(self.image, torch.tensor([len(of_one) for of_one in rows]))
        self.row = torch.tensor([row for of_one in rows for row in of_one])  # of each example, in the cache

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
    """At most EXAMPLES combinations of metadata like those of the records, none of which is one of theirs."""
    rng = random.Random(seed)
    seen = {tuple(metadata(record).items()) for record in records}
    by_dataset = {}
    for record in records:
        by_dataset.setdefault(record.get("dataset"), []).append(record)
    names, examples = list(by_dataset), []
    weights = [len(group) for group in by_dataset.values()]
    for _ in range(EXAMPLES * ATTEMPTS):
        dataset, = rng.choices(names, weights)
        example = {field: rng.choice(by_dataset[dataset]).get(field) for field in fields.FIELDS if field != "dataset"}
        example, _ = fields.resolve_request(metadata(fields.drop_unknown({"dataset": dataset} | example)))
        if example and tuple(example.items()) not in seen:
            examples.append(example)
        if len(examples) == EXAMPLES:
            break
    return examples
