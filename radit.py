"""RadiT: a transformer that predicts the flow of a radiograph, latent or pixels, from its 19 metadata fields.

    tokens    patches of p x p cells, one linear layer each; position enters only by 2-D rotary embedding
    condition c = time(t) + sum over the 19 fields of embedding(field), one vector an image
    block     x += g1 * attention(norm(x) (1 + s1) + b1);  x += g2 * swiglu(norm(x) (1 + s2) + b2)
              (s, b, g) = linear(silu(c)), zero at the start: adaLN-Zero, computed once an image

RMSNorm everywhere, and on queries and keys (QK-norm: bfloat16 training stays finite). Every field has its own null
embedding, used when it is unknown, dropped in training, or left out by guidance.
Sources: Peebles and Xie 2023 (DiT, adaLN-Zero), Shazeer 2020 (SwiGLU), Zhang and Sennrich 2019 (RMSNorm), Dehghani
et al. 2023 (QK-norm), Su et al. 2021 and Heo et al. 2024 (RoPE in two dimensions).
Shapes: N images, C channels, H x W cells, T tokens, D width, F fields.

    python radit.py          prints the sizes, their parameters and FLOPs
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from radiographs.fields import CODED, DATASETS, VALUES

# name: (width, depth, heads). Widths and SwiGLU widths are multiples of 128, heads are 64 or 128 wide.
SIZES = {"XS": (256, 8, 4),       # 10M: a laptop
         "S": (384, 12, 6),       # 33M: one GPU
         "B": (1024, 16, 16),     # 0.3B
         "L": (1280, 24, 10),     # 0.7B
         "XL": (1536, 31, 12)}    # 1.3B: a node


@dataclass
class RadiTConfig:
    channels: int = 128                      # C of the input: 128 for FLUX.2's latents, 1 for pixels
    grid: tuple = (32, 32)                   # H, W of the input in cells (latents) or pixels
    patch: int = 1                           # cells a token on each side: 1 for latents, 16 or 32 for pixels
    width: int = 1024                        # D
    depth: int = 16                          # blocks
    heads: int = 16                          # of width D / heads
    prediction: str = "velocity"             # or "data", see flow.py
    shift: float = 1.0                       # time shift of flow.py, the same in training and sampling
    datasets: tuple = DATASETS               # values of the field "dataset": the paper's seven and the user's own
    covered: dict = field(default_factory=dict)   # field -> {value: count in training}; age: [least, most]
    examples: list = field(default_factory=list)  # metadata of training images: what to ask for when nobody asks
    vae: str = ""                            # fingerprint of the VAE whose latents these are; empty for pixels

    def __post_init__(self):
        self.grid, self.datasets = tuple(self.grid), tuple(self.datasets)  # JSON has no tuples

    @property
    def hidden(self):
        """SwiGLU's inner width: 8/3 D, so that its three matrices cost what the usual two of 4 D do; rounded up."""
        return math.ceil(self.width * 8 / 3 / 128) * 128

    @property
    def tokens(self):
        return self.grid[0] // self.patch * (self.grid[1] // self.patch)


class ScalarEmbedding(nn.Module):
    """A number to a vector: sines and cosines of periods spread from `shortest` to `longest`, then an MLP."""

    def __init__(self, width, shortest, longest, features=256):
        super().__init__()
        periods = torch.logspace(math.log10(shortest), math.log10(longest), features // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):                                            # N
        angles = x.float()[:, None] * self.frequencies               # N features/2
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))  # N D


class MetadataEmbedding(nn.Module):
    """The sum of one embedding per field: row 0 of every table, and age's own vector, stand for unknown."""

    def __init__(self, width, datasets):
        super().__init__()
        sizes = {name: len(datasets if name == "dataset" else VALUES[name]) for name in CODED}
        self.tables = nn.ModuleDict({name: nn.Embedding(1 + size, width) for name, size in sizes.items()})
        self.age = ScalarEmbedding(width, shortest=20, longest=400)  # years: neighbouring ages look alike
        self.age_unknown = nn.Parameter(torch.zeros(width))

    def forward(self, age, codes):                                   # N, N 18
        known = ~age.isnan()
        embedded = self.age(torch.where(known, age, 0.0))            # N D
        out = torch.where(known[:, None], embedded, self.age_unknown)
        for column, table in enumerate(self.tables.values()):
            out = out + table(codes[:, column])                      # N D
        return out


def rope_angles(rows, columns, head_width, device):
    """Angles (T, head_width / 2): the first half turns with the row, the second with the column."""
    frequencies = 100.0 ** -torch.arange(0, 1, 4 / head_width, device=device)    # head_width / 4
    y = torch.arange(rows, device=device)[:, None, None] * frequencies           # rows 1 head_width/4
    x = torch.arange(columns, device=device)[None, :, None] * frequencies        # 1 columns head_width/4
    both = torch.cat([y.expand(-1, columns, -1), x.expand(rows, -1, -1)], -1)    # rows columns head_width/2
    return both.flatten(0, 1)


def rotate(x, cos, sin):
    """Turns each pair (x_i, x_{i + d/2}) of the last dimension by its angle."""
    a, b = x.chunk(2, -1)                                            # N h T d/2 each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)     # N h T d


def attention(q, k, v):                                              # N h T d each
    """softmax(q k^T / sqrt(d)) v. For few tokens on a CPU torch's fused kernel is several times slower, mostly in its
    backward pass, than the two products written out; scaling q first keeps the compiler from fusing them again."""
    if q.device.type == "cpu" and q.shape[2] <= 512:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT                    # N h T T
        return scores.softmax(-1).to(v.dtype) @ v                    # N h T d
    return F.scaled_dot_product_attention(q, k, v)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # autocast leaves a norm's weight in float32, which would miss the fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.adaln = nn.Linear(width, 6 * width)
        self.norm1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)  # adaLN's scale stands in for a weight
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // heads, eps=1e-6)
        self.k_norm = RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)  # SwiGLU's gate and value in one matrix
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, c, cos, sin):                               # N T D, N D (after silu)
        s1, b1, g1, s2, b2, g2 = self.adaln(c)[:, None].chunk(6, -1)  # N 1 D each
        h = self.norm1(x) * (1 + s1) + b1                            # N T D
        q, k, v = rearrange(self.qkv(h), "n t (three h d) -> three n h t d", three=3, h=self.heads)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)  # N h T d
        h = attention(q, k, v)                                       # N h T d
        x = x + g1 * self.out(rearrange(h, "n h t d -> n t (h d)"))  # N T D
        h = self.norm2(x) * (1 + s2) + b2                            # N T D
        gate, value = self.up(h).chunk(2, -1)                        # N T hidden each
        return x + g2 * self.down(F.silu(gate) * value)              # N T D


class RadiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width, cells = config.width, config.channels * config.patch ** 2
        self.embed = nn.Linear(cells, width)
        self.time = ScalarEmbedding(width, shortest=0.01, longest=10)
        self.metadata = MetadataEmbedding(width, config.datasets)
        self.blocks = nn.ModuleList([Block(width, config.heads, config.hidden) for _ in range(config.depth)])
        self.final_adaln = nn.Linear(width, 2 * width)
        self.final_norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.final = nn.Linear(width, cells)
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
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # T d/2
        for block in self.blocks:
            x = block(x, c, cos, sin)                                # N T D
        shift, scale = self.final_adaln(c)[:, None].chunk(2, -1)     # N 1 D
        x = self.final(self.final_norm(x) * (1 + scale) + shift)     # N T C p p
        return rearrange(x, "n (h w) (c p q) -> n c (h p) (w q)", h=rows, p=p, q=p)


def drop_metadata(age, codes, random):
    """Classifier-free dropout: one image in ten loses all fields; half lose each field with an own random rate.

    Guidance's null needs the first. Because rates vary from 0 to 1 the model also learns to draw from one or two
    known fields, which is how people ask. random: uniform numbers (N, 22). Returns new (age, codes).
    """
    everything, some, rate = random[:, 0] < 0.1, random[:, 1] < 0.5, random[:, 2]
    drop = everything[:, None] | (some[:, None] & (random[:, 3:] < rate[:, None]))  # N 19
    return torch.where(drop[:, 0], math.nan, age), torch.where(drop[:, 1:], 0, codes)


# ---------------------------------------------------------------------------------------------------------
# What a size costs, from its structure

def count_parameters(cfg):
    """The number of parameters, without building the model."""
    d, cells = cfg.width, cfg.channels * cfg.patch ** 2
    scalar = 256 * d + d + d * d + d                                 # ScalarEmbedding
    rows = sum(1 + len(cfg.datasets if name == "dataset" else VALUES[name]) for name in CODED)
    block = 6 * d * d + 6 * d + 4 * d * d + 2 * (d // cfg.heads) + 3 * d * cfg.hidden
    return (cells * d + d) + 2 * scalar + rows * d + d + cfg.depth * block + (2 * d * d + 2 * d) + (d * cells + cells)


def count_flops(cfg):
    """Floating-point operations of one image's forward pass, two for each multiply-add; training takes three times that.

    Matrix products only. adaLN, time and metadata act once an image, the rest once a token.
    """
    d, t, cells = cfg.width, cfg.tokens, cfg.channels * cfg.patch ** 2
    once = 2 * (256 * d + d * d) + cfg.depth * 6 * d * d + 2 * d * d
    per_token = 2 * cells * d + cfg.depth * (4 * d * d + 3 * d * cfg.hidden)
    attention = cfg.depth * 2 * t * t * d                            # scores and weighted sum
    return 2 * (once + t * per_token + attention)


if __name__ == "__main__":
    for name, (width, depth, heads) in SIZES.items():
        config = RadiTConfig(width=width, depth=depth, heads=heads)
        print(f"{name:3} width {width:4} depth {depth:2} heads {heads:2}: {count_parameters(config) / 1e6:7.1f} M "
              f"parameters, {3 * count_flops(config) / 1e12:6.2f} TFLOPs to train one image of {config.tokens} tokens")
