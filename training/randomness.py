"""Which images a step sees, and its random numbers. Both depend only on the seed and on how many images were seen
before, so a stopped run continues exactly as if it had not been stopped, on any number of processes.
"""
import torch


def batches(count, batch, seed, seen):
    """Yields lists of `batch` indices below `count`, without end, starting after `seen` images. Each epoch is a
    permutation that depends only on the seed and the epoch's number."""
    indices = []
    while True:
        epoch, start = divmod(seen, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for index in order[start:].tolist():
            indices.append(index)
            if len(indices) == batch:
                yield indices
                indices = []
        seen = (epoch + 1) * count


def generator(device, seed, seen):
    """The generator of the step that starts after `seen` images."""
    return torch.Generator(device).manual_seed((seed * 0x9E3779B97F4A7C15 + seen) % 2 ** 63)


class RandomNumbers:
    """Random numbers for n images, a part of a batch. They are made for the whole batch and then cut, so that an image
    gets the same numbers whichever process computes it."""

    def __init__(self, generator, batch, part=slice(None)):
        self.generator, self.batch, self.part = generator, batch, part

    def rows(self, make):
        """make(count, generator) gives one row for each image of the whole batch."""
        return make(self.batch, self.generator)[self.part]

    def normal(self, *shape):                                        # n *shape
        return self.rows(lambda count, rng: torch.randn(count, *shape, generator=rng, device=rng.device))

    def uniform(self, *shape):                                       # n *shape
        return self.rows(lambda count, rng: torch.rand(count, *shape, generator=rng, device=rng.device))
