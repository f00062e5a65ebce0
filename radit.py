"""RadiT: a transformer that predicts the flow of a radiograph, latent or pixels, from its 19 metadata fields.

    tokens    patches of p x p cells through one linear layer; position enters only by 2-D rotary embedding
    condition c = time(t) + sum over the 19 fields of embedding(field), one vector for each image
    block     x <- x + gate1 attention(modulate(norm(x), shift1, scale1))
              x <- x + gate2 swiglu(modulate(norm(x), shift2, scale2))
    adaLN     modulate(x, shift, scale) = x (1 + scale) + shift
              (shift, scale, gate) = linear(silu(c)), zero at the start: adaLN-Zero, once for each image

RMSNorm everywhere, and on queries and keys (QK-norm, which keeps training in bfloat16 finite). Every field has its own
null embedding, used when it is unknown, dropped in training, or left out by guidance.
Sources: Peebles and Xie 2023 (DiT, adaLN-Zero), Shazeer 2020 (SwiGLU), Zhang and Sennrich 2019 (RMSNorm), Dehghani
et al. 2023 (QK-norm), Su et al. 2021 and Heo et al. 2024 (RoPE in two dimensions).
Shapes: N images, C channels, H x W pixels or latent cells, T tokens, D width, h heads of width d = D / h.

    python radit.py          prints the sizes, their parameters and FLOPs
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import check
from flow import PREDICTIONS
from radiographs import fields
from radiographs.fields import CODED, DATASETS, VALUES

# name: (width, depth, heads). Widths are multiples of 128, heads are 64 or 128 wide.
SIZES = {"XS": (256, 8, 4),       # 10M: a laptop
         "S": (384, 12, 6),       # 33M: one GPU
         "B": (1024, 16, 16),     # 0.3B
         "L": (1280, 24, 10),     # 0.7B
         "XL": (1536, 31, 12)}    # 1.3B: a node


@dataclass
class RadiTConfig:
    channels: int = 128                      # C of the input: 128 for FLUX.2's latents, 1 for pixels
    grid: tuple = (32, 32)                   # H, W of the input in latent cells or pixels
    patch: int = 1                           # side of a token in cells or pixels: 1 for latents, 16 or 32 for pixels
    width: int = 1024                        # D
    depth: int = 16                          # blocks
    heads: int = 16                          # of width D / heads, a multiple of 4
    hidden: int = 0                          # SwiGLU's inner width; 0 chooses it from the width
    prediction: str = "velocity"             # or "data", see flow.py
    shift: float = 1.0                       # time shift of flow.py, the same in training and sampling
    datasets: tuple = DATASETS               # values of the field "dataset": the paper's seven and the user's own
    covered: dict = field(default_factory=dict)   # field -> {value: count in training}; age: [least, most]
    pairs: dict = field(default_factory=dict)     # which values stood together in training: fields.count_pairs
    examples: list = field(default_factory=list)  # metadata to show when none is given
    vae: str = ""                            # fingerprint of the VAE whose latents these are; empty for pixels

    def __post_init__(self):
        check.whole(self, 1, 2 ** 14, "channels", "patch", "width", "heads")
        check.whole(self, 0, 2 ** 16, "hidden")
        check.whole(self, 0, 1_000, "depth")
        check.wholes(self, 1, 2 ** 14, 2, 2, "grid")
        check.number(self, 0.01, 100, "shift")
        check.one_of(self, PREDICTIONS, "prediction")
        check.kind(self, str, "vae")
        fields.check_config(self)
        if any(side % self.patch for side in self.grid):
            check.refuse(self, "grid", f"two multiples of the patch, {self.patch}")
        if self.width % (4 * self.heads):  # RoPE rotates pairs, half of them by the row, half by the column
            check.refuse(self, "heads", f"a number such that 4 x heads divides the width, {self.width}")
        # 8/3 D, so that SwiGLU's three matrices cost what an MLP's two of 4 D do; rounded up for the matrix units.
        step = 64 if self.width < 512 else 128
        self.hidden = self.hidden or math.ceil(self.width * 8 / 3 / step) * step

    @property
    def tokens(self):
        return self.grid[0] // self.patch * (self.grid[1] // self.patch)


class ScalarEmbedding(nn.Module):
    """A number to a vector: sines and cosines whose periods range from `shortest` to `longest`, then an MLP."""

    def __init__(self, width, shortest, longest, features=256):
        super().__init__()
        periods = torch.logspace(math.log10(shortest), math.log10(longest), features // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):                                            # N
        angles = x.float()[:, None] * self.frequencies               # N features/2
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))                     # N D


class MetadataEmbedding(nn.Module):
    """The sum of one embedding per field: row 0 of every table, and age's own vector, stand for unknown."""

    def __init__(self, width, datasets):
        super().__init__()
        sizes = {name: len(datasets if name == "dataset" else VALUES[name]) for name in CODED}
        self.tables = nn.ModuleDict({name: nn.Embedding(1 + size, width) for name, size in sizes.items()})
        self.age = ScalarEmbedding(width, shortest=20, longest=400)  # years: close ages get similar vectors
        self.age_unknown = nn.Parameter(torch.zeros(width))

    def forward(self, age, codes):                                   # N, N 18
        known = ~age.isnan()
        embedded = self.age(torch.where(known, age, 0.0))            # N D
        out = torch.where(known[:, None], embedded, self.age_unknown)
        for column, table in enumerate(self.tables.values()):
            out = out + table(codes[:, column])                      # N D
        return out


def rope_angles(rows, columns, head_width, device):
    """Angles (T, head_width / 2): the first half grows with the row of a token, the second with its column."""
    frequencies = 100.0 ** -torch.arange(0, 1, 4 / head_width, device=device)    # head_width / 4
    y = torch.arange(rows, device=device)[:, None, None] * frequencies           # rows 1 head_width/4
    x = torch.arange(columns, device=device)[None, :, None] * frequencies        # 1 columns head_width/4
    both = torch.cat([y.expand(-1, columns, -1), x.expand(rows, -1, -1)], -1)    # rows columns head_width/2
    return both.flatten(0, 1)


def rotate(x, cos, sin):
    """Rotates each pair (x_i, x_{i + d/2}) of the last dimension by its angle. cos, sin (T 1 d/2)."""
    a, b = x.chunk(2, -1)                                            # N T h d/2 each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)     # N T h d


def modulate(x, shift, scale):                                       # N T D, N 1 D each
    return torch.addcmul(shift, x, 1 + scale)                        # N T D: x (1 + scale) + shift, in one pass


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with its weight cast to the input's type. Autocast leaves the weight in float32, and torch has no
    fused kernel for an input in bfloat16 with a weight in float32."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.adaln = nn.Linear(width, 6 * width)                     # shift, scale, gate of attention, then of SwiGLU
        self.norm1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)  # adaLN's scale replaces a weight
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // heads, eps=1e-6)
        self.k_norm = RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)           # SwiGLU's gate and value in one matrix
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, c, cos, sin):                               # N T D, N D (after silu), T 1 d/2 each
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, -1)  # N 1 D each
        y = self.qkv(modulate(self.norm1(x), shift1, scale1))        # N T 3D
        q, k, v = rearrange(y, "n t (three h d) -> three n t h d", three=3, h=self.heads)   # N T h d each
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)           # N T h d each
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # N h T d
        x = torch.addcmul(x, gate1, self.out(rearrange(y, "n h t d -> n t (h d)")))         # N T D: x + gate1 * out
        gate, value = self.up(modulate(self.norm2(x), shift2, scale2)).chunk(2, -1)         # N T hidden each
        return torch.addcmul(x, gate2, self.down(F.silu(gate) * value))                     # N T D


class RadiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width, patch_dim = config.width, config.channels * config.patch ** 2
        self.embed = nn.Linear(patch_dim, width)
        self.time = ScalarEmbedding(width, shortest=0.01, longest=10)
        self.metadata = MetadataEmbedding(width, config.datasets)
        self.blocks = nn.ModuleList([Block(width, config.heads, config.hidden) for _ in range(config.depth)])
        self.final_adaln = nn.Linear(width, 2 * width)               # shift, scale
        self.final_norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.final = nn.Linear(width, patch_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, and the output as zero.
        for linear in [*(block.adaln for block in self.blocks), self.final_adaln, self.final]:
            nn.init.zeros_(linear.weight)

    def forward(self, x, t, age, codes):
        """x (N C H W), t (N,) in [0, 1], age (N,) years or NaN, codes (N, 18), 0 unknown -> (N C H W)."""
        p = self.config.patch
        rows, columns = x.shape[2] // p, x.shape[3] // p
        x = self.embed(rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p))  # N T D
        c = F.silu(self.time(t) + self.metadata(age, codes))         # N D
        angles = rope_angles(rows, columns, self.config.width // self.config.heads, x.device)
        cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))  # T 1 d/2 each, for all heads
        for block in self.blocks:
            x = block(x, c, cos, sin)                                # N T D
        shift, scale = self.final_adaln(c)[:, None].chunk(2, -1)     # N 1 D
        x = self.final(modulate(self.final_norm(x), shift, scale))   # N T (C p p)
        return rearrange(x, "n (h w) (c p q) -> n c (h p) (w q)", h=rows, p=p, q=p)  # N C H W


def drop_metadata(age, codes, random):
    """Dropout for classifier-free guidance. One image in ten loses all its fields. Half of the images lose each field
    with a probability that is itself random, uniform in [0, 1) and one for each image.

    The first rule trains guidance's null branch. The second trains the model for requests that name only one or two
    fields, as most do.
    random: uniform numbers (N, 22). Returns new (age, codes).
    """
    everything, some, rate = random[:, 0] < 0.1, random[:, 1] < 0.5, random[:, 2]  # N each
    drop = everything[:, None] | (some[:, None] & (random[:, 3:] < rate[:, None]))  # N 19
    return torch.where(drop[:, 0], math.nan, age), torch.where(drop[:, 1:], 0, codes)


# ---------------------------------------------------------------------------------------------------------
# What a size costs, from its structure

def count_parameters(cfg):
    """The number of parameters, without building the model."""
    d, patch_dim = cfg.width, cfg.channels * cfg.patch ** 2
    scalar = 256 * d + d + d * d + d                                 # ScalarEmbedding
    rows = sum(1 + len(cfg.datasets if name == "dataset" else VALUES[name]) for name in CODED)
    block = 6 * d * d + 6 * d + 4 * d * d + 2 * (d // cfg.heads) + 3 * d * cfg.hidden
    ends = (patch_dim * d + d) + (2 * d * d + 2 * d) + (d * patch_dim + patch_dim)  # embed, final_adaln, final
    return ends + 2 * scalar + rows * d + d + cfg.depth * block


def count_flops(cfg):
    """Operations (FLOPs) of one image's forward pass, two for each multiply-add; training takes three times as many.

    Matrix products only. Those of adaLN, time and metadata run once for each image, the others once for each token.
    """
    d, t, patch_dim = cfg.width, cfg.tokens, cfg.channels * cfg.patch ** 2
    once = 2 * (256 * d + d * d) + cfg.depth * 6 * d * d + 2 * d * d
    per_token = 2 * patch_dim * d + cfg.depth * (4 * d * d + 3 * d * cfg.hidden)
    attention = cfg.depth * 2 * t * t * d                            # scores and weighted sum
    return 2 * (once + t * per_token + attention)


if __name__ == "__main__":
    for name, (width, depth, heads) in SIZES.items():
        config = RadiTConfig(width=width, depth=depth, heads=heads)
        print(f"{name:3} width {width:4} depth {depth:2} heads {heads:2}: {count_parameters(config) / 1e6:7.1f} M "
              f"parameters, {3 * count_flops(config) / 1e12:6.2f} TFLOPs to train one image of {config.tokens} tokens")
