"""RadUNet: the paper's convolutional baseline, a U-Net in RadiT's place, with the same input, metadata and output.

    condition c = time(t) + sum over the 19 fields of embedding(field), as in radit.py
    block     h = conv(silu(norm(x)));  x = shortcut(x) + conv(silu(norm(h) (1 + scale) + shift))
              (shift, scale) = linear(silu(c)); the last convolution starts at zero, so a block starts as its shortcut
    network   `blocks` blocks a level on the way down, a convolution of stride 2 between levels, and one block more
              a level on the way up, each of which also sees what the way down gave at this place

Self-attention over all cells follows the blocks of the coarse levels. The paper (arXiv 2606.19460) names the baseline,
0.5B parameters on latents and 0.3B on pixels, but not its structure: this one is ADM's, and the sizes are ours.
On simulated radiographs its XS and RadiT's end alike at equal operations, after two minutes of training on a CPU
(benchmarks/results/radunet-cpu.txt); on real ones and at other sizes: not measured.
Sources: Ronneberger et al. 2015 (U-Net), Dhariwal and Nichol 2021 (ADM: adaptive group normalisation, attention).
Shapes: N images, C channels, H x W cells, D width of the condition, w channels of a level, h x w cells of a level.

    python -m baselines.radunet          prints the sizes, their parameters and FLOPs
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import check, cli
from common.cli import InputError
from flow import PREDICTIONS
from radiographs import fields
from radiographs.fields import DATASETS
from radit import MetadataEmbedding, RMSNorm, ScalarEmbedding

# name: (width, multiples, blocks, attending). Attention heads are 64 wide, groups of GroupNorm 32.
SIZES = {"XS": (64, (1, 2, 4), 1, 2),          # 12M: to race RadiT XS
         "S": (128, (1, 2, 3), 2, 2),          # 46M
         "M": (192, (1, 2, 4, 4), 3, 2),       # 0.3B: the paper's size on pixels, with patches of 8
         "B": (384, (1, 2, 3), 3, 2)}          # 0.5B: the paper's size on latents


@dataclass
class RadUNetConfig:
    channels: int = 128                      # C of the input: 128 for FLUX.2's latents, 1 for pixels
    grid: tuple = (32, 32)                   # H, W of the input in cells (latents) or pixels
    patch: int = 1                           # cells that become channels on each side: 1 for latents, 8 for pixels
    width: int = 384                         # channels of the finest level, a multiple of 64
    multiples: tuple = (1, 2, 3)             # channels of each level in widths, finest first
    blocks: int = 3                          # residual blocks a level on the way down
    attending: int = 2                       # how many levels have attention, coarsest first
    prediction: str = "velocity"             # or "data", see flow.py
    shift: float = 1.0                       # time shift of flow.py, the same in training and sampling
    datasets: tuple = DATASETS               # values of the field "dataset": the paper's seven and the user's own
    covered: dict = field(default_factory=dict)   # field -> {value: count in training}; age: [least, most]
    pairs: dict = field(default_factory=dict)     # which values stood together in training: fields.count_pairs
    examples: list = field(default_factory=list)  # metadata to ask for when nothing is asked for
    vae: str = ""                            # fingerprint of the VAE whose latents these are; empty for pixels

    def __post_init__(self):
        check.whole(self, 1, 2 ** 14, "channels")
        check.whole(self, 0, 2 ** 14, "width", "patch")
        check.whole(self, 0, 100, "blocks", "attending")
        check.wholes(self, 1, 2 ** 14, 2, 2, "grid")
        check.wholes(self, 1, 100, 1, 10, "multiples")
        check.number(self, 0.01, 100, "shift")
        check.one_of(self, PREDICTIONS, "prediction")
        check.kind(self, str, "vae")
        fields.check_config(self)
        factor = self.patch * 2 ** (len(self.multiples) - 1)
        if self.width < 64 or self.width % 64:
            raise InputError(f"width {self.width} is not a multiple of 64")
        if self.patch < 1 or any(side < 1 or side % factor for side in self.grid):
            raise InputError(f"grid {self.grid} is not a multiple of {factor}: patches of {self.patch}, "
                             f"halved {len(self.multiples) - 1} times")


class Attention(nn.Module):
    """Self-attention over all cells, in heads of 64 channels, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.q_norm, self.k_norm = RMSNorm(64, eps=1e-6), RMSNorm(64, eps=1e-6)  # as in RadiT: bfloat16 stays finite
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):                                            # N w h w
        q, k, v = rearrange(self.qkv(self.norm(x)), "n (three m d) h w -> three n m (h w) d", three=3, d=64)
        a = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # N heads cells 64
        return x + self.out(rearrange(a, "n m (h w) d -> n (m d) h w", h=x.shape[2]))


class Block(nn.Module):
    """A residual block, modulated by the condition, and attention where the level has it."""

    def __init__(self, c_in, c_out, width, attends):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * c_out)
        self.norm2 = nn.GroupNorm(32, c_out, affine=False)           # the modulation stands in for weight and bias
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attends else nn.Identity()

    def forward(self, x, c):                                         # N c_in h w, N D (after silu)
        shift, scale = self.modulation(c)[:, :, None, None].chunk(2, 1)  # N c_out 1 1 each
        h = self.conv1(F.silu(self.norm1(x)))                        # N c_out h w
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))  # N c_out h w
        return self.attention(self.shortcut(x) + h)                  # N c_out h w


class RadUNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = config.channels * config.patch ** 2
        widths = [config.width * multiple for multiple in config.multiples]
        attends = [level >= len(widths) - config.attending for level in range(len(widths))]
        D = 4 * config.width
        self.time = ScalarEmbedding(D, shortest=0.01, longest=10)
        self.metadata = MetadataEmbedding(D, config.datasets)
        self.embed = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.downsample, skips, width = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, w in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Block(width, w, D, attends[level]))
                width = w
                skips.append(w)                                      # the way up sees them again, last in, first out
            if level < len(widths) - 1:
                self.downsample.append(nn.Conv2d(w, w, 3, stride=2, padding=1))
                skips.append(w)
        self.middle = nn.ModuleList([Block(width, width, D, True), Block(width, width, D, False)])
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Block(width + skips.pop(), w, D, attends[level]))
                width = w
            if level > 0:
                self.upsample.append(nn.Conv2d(w, w, 3, padding=1))
        self.final_norm = nn.GroupNorm(32, width)
        self.final = nn.Conv2d(width, channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, Block):                            # a block starts as its shortcut
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)
                nn.init.zeros_(module.out.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.final.weight)                            # and the network as zero
        nn.init.zeros_(self.final.bias)

    @property
    def blocks(self):
        """All blocks, in the order of forward: what is compiled, computed again or split among processes."""
        return [*self.down, *self.middle, *self.up]

    def forward(self, x, t, age, codes):
        """x (N C H W), t (N,) in [0, 1], age (N,) years or NaN, codes (N, 18), 0 unknown -> (N C H W)."""
        config, last = self.config, len(self.config.multiples) - 1
        c = F.silu(self.time(t) + self.metadata(age, codes))         # N D
        x = self.embed(F.pixel_unshuffle(x, config.patch))           # N w0 H/p W/p
        skips = [x]
        for i, block in enumerate(self.down):
            x = block(x, c)                                          # N w h w
            skips.append(x)
            level, place = divmod(i, config.blocks)
            if place == config.blocks - 1 and level < last:
                x = self.downsample[level](x)                        # N w h/2 w/2
                skips.append(x)
        for block in self.middle:
            x = block(x, c)                                          # N w h w
        for i, block in enumerate(self.up):
            x = block(torch.cat([x, skips.pop()], 1), c)             # N w h w
            level, place = divmod(i, config.blocks + 1)              # level 0 is the coarsest here
            if place == config.blocks and level < last:
                x = self.upsample[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))  # N w 2h 2w
        x = self.final(F.silu(self.final_norm(x)))                   # N C p p, H/p, W/p
        return F.pixel_shuffle(x, config.patch)                      # N C H W


def count_parameters(config):
    """The number of parameters; the tensors are never filled."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in RadUNet(config).parameters())


def count_flops(config):
    """Floating-point operations of one image's forward pass, two for each multiply-add, as torch counts them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.zeros(1, config.channels, *config.grid)
        RadUNet(config)(x, torch.zeros(1), torch.zeros(1), torch.zeros(1, 18, dtype=torch.long))
    return counter.get_total_flops()


def activations(config):
    """Numbers that sampling one image holds at its largest: everything that the way up will see again, and the input,
    output and two intermediate results of a block of the finest level."""
    cells = config.grid[0] * config.grid[1] // config.patch ** 2
    skips = sum((config.blocks + 1) * config.width * multiple * cells // 4 ** level
                for level, multiple in enumerate(config.multiples))
    return skips + 4 * 2 * config.width * config.multiples[0] * cells


def main():
    for name, (width, multiples, blocks, attending) in SIZES.items():
        pixels = name == "M"
        shape = {"channels": 1, "grid": (512, 512), "patch": 8} if pixels else {}
        config = RadUNetConfig(width=width, multiples=multiples, blocks=blocks, attending=attending, **shape)
        print(f"{name:3} width {width:4} multiples {multiples} blocks {blocks}: "
              f"{count_parameters(config) / 1e6:7.1f} M parameters, {3 * count_flops(config) / 1e12:6.2f} TFLOPs "
              f"to train one image of {'512x512 pixels' if pixels else '32x32 latent cells'}")


if __name__ == "__main__":
    cli.run(main)
