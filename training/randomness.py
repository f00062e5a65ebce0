"""Which images a step sees, and its random numbers. Both depend only on the seed and on how many images were seen
before, so a run that was stopped continues as if it had not been, on any number of processes.
"""
import torch


def batches(count, batch, seed, seen):
    """Endless lists of `batch` indices below `count`, starting after `seen` images. Epoch e is a permutation that
    depends on (seed, e) alone."""
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
    """The random numbers of some images of a batch, n of them. They are made for the whole batch and then cut, so that
    an image gets the same ones whichever process computes it."""

    def __init__(self, generator, batch, part=slice(None)):
        self.generator, self.batch, self.part = generator, batch, part

    def rows(self, make):
        """make(count, generator) gives one row for each image of the whole batch."""
        return make(self.batch, self.generator)[self.part]

    def normal(self, *shape):                                        # n *shape
        return self.rows(lambda count, rng: torch.randn(count, *shape, generator=rng, device=rng.device))

    def uniform(self, *shape):                                       # n *shape
        return self.rows(lambda count, rng: torch.rand(count, *shape, generator=rng, device=rng.device))
