"""Rad-DINO: the image encoder that the measures and the perceptual loss look through.

A DINOv2 ViT without registers. Tokens are a CLS token and one token a patch; with s1, s2 learnt per channel (layer scale),

    h_0 = [CLS, patches] + positions
    h_l = a + s2 MLP(LN(a)),  a = h_{l-1} + s1 Attention(LN(h_{l-1})),  l = 1 ... L
    features = LN(h_L)[CLS]                                             (transformers' pooler_output)

Source: microsoft/rad-dino (MIT), Perez-Garcia et al. 2024; DINOv2, Oquab et al. 2023. The defaults below are the published
model: 86,580,480 parameters, 223 tensors. A smaller one is the same class with other numbers, such as the encoder of
weights/demo/classifier, which needs no network.
Conventions: `preprocess` takes an image as files hold it and is the published processor, to the pixel; `normalise` takes
images of this project, (N, 1, H, W) in [-1, 1], and lets gradients through. Any height and width is accepted: positions are
interpolated, and what a patch does not cover on the right and below is not seen.
"""
import json
import re
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from common import hub
from common.cli import InputError


@dataclass
class EncoderConfig:
    width: int = 768         # D, channels of a token
    depth: int = 12          # L, blocks
    heads: int = 12          # of attention, width / heads channels each
    patch: int = 14          # pixels a token on each side
    image_size: int = 518    # side in pixels that the positions were trained for
    channels: int = 3        # of the image; grey is repeated
    mlp_ratio: int = 4       # hidden channels of the MLP over width
    mean: float = 0.5307     # of the training images' pixels in [0, 1], every channel
    std: float = 0.2583


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.out = (nn.Linear(cfg.width, cfg.width) for _ in range(4))

    def forward(self, x):                                            # N T D
        q, k, v = (rearrange(f(x), "n t (h d) -> n h t d", h=self.heads) for f in (self.q, self.k, self.v))
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)"))  # N T D


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.attention = Attention(cfg)
        self.scale1 = nn.Parameter(torch.ones(cfg.width))
        self.norm2 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.fc1 = nn.Linear(cfg.width, cfg.mlp_ratio * cfg.width)
        self.fc2 = nn.Linear(cfg.mlp_ratio * cfg.width, cfg.width)
        self.scale2 = nn.Parameter(torch.ones(cfg.width))

    def forward(self, x):                                            # N T D
        x = x + self.scale1 * self.attention(self.norm1(x))          # N T D
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, side = config, config.image_size // config.patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, config.width))  # of DINOv2's own training; unused, kept to load strictly
        self.positions = nn.Parameter(torch.randn(1, 1 + side * side, config.width) * 0.02)  # CLS first, then row by row
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def positions_of(self, h, w):
        """The position embeddings of a grid of h x w patches: (1, 1 + h w, D)."""
        side = self.config.image_size // self.config.patch
        if (h, w) == (side, side):
            return self.positions
        grid = rearrange(self.positions[:, 1:], "1 (h w) d -> 1 d h w", h=side)
        grid = F.interpolate(grid.float(), (h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d").to(self.positions.dtype)], 1)

    def embed(self, x):                                              # N C H W, normalised
        tokens = self.patches(x)                                     # N D h w
        positions = self.positions_of(*tokens.shape[2:])             # 1 T D
        tokens = rearrange(tokens, "n d h w -> n (h w) d")
        return torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + positions  # N T D, T = 1 + h w

    def hidden_states(self, x):
        """h_0 ... h_L of normalised images (N, C, H, W): a list of L + 1 tensors (N, 1 + h w, D), CLS first."""
        states = [self.embed(x)]                                     # N T D
        for block in self.blocks:
            states.append(block(states[-1]))                         # N T D
        return states

    def forward(self, x, keep=None):
        """CLS features (N, D) and patch features (N, h w, D), after the last LayerNorm. keep (N, K) says which patches to
        look at; the others are left out, which makes training cheaper and harder (PatchDropout, Liu et al. 2023)."""
        tokens = self.embed(x)                                       # N T D
        if keep is not None:
            patches = tokens[:, 1:].gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))  # N K D
            tokens = torch.cat([tokens[:, :1], patches], 1)          # N 1+K D
        for block in self.blocks:
            tokens = block(tokens)                                   # N T D
        tokens = self.norm(tokens)                                   # N T D
        return tokens[:, 0], tokens[:, 1:]

    def normalise(self, images):                                     # N 1 H W in [-1, 1]
        """Images as the encoder wants them, (N, C, H, W), with gradients; the size stays."""
        x = ((images + 1) / 2 - self.config.mean) / self.config.std  # N 1 H W
        return x.expand(-1, self.config.channels, -1, -1)


def preprocess(image, config):
    """The published processor: a PIL image to (C, S, S) float32. Shortest edge to S by Pillow's bicubic filter on bytes,
    centre crop, mean and standard deviation."""
    size = config.image_size
    if image.mode.startswith("I"):  # 16 bits (PadChest, CXR7-1M): the processor works on bytes
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
    image = image.convert("L" if config.channels == 1 else "RGB")
    width, height = (size * edge // min(image.size) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float32).reshape(size, size, -1) / 255                   # S S C
    return torch.from_numpy((pixels - config.mean) / config.std).permute(2, 0, 1).float()  # C S S


# ---------------------------------------------------------------------------------------------------------
# Weights

# microsoft/rad-dino's tensor names, in the spelling of the file (transformers 4) and of transformers 5, to ours.
NAMES = [(r"embeddings\.position_embeddings", "positions"), (r"embeddings\.patch_embeddings\.projection", "patches"),
         (r"embeddings\.", ""), (r"encoder\.layer\.", "blocks."), (r"layer_scale([12])\.lambda1", r"scale\1"),
         (r"attention\.attention\.(q|k|v)(uery|ey|alue)", r"attention.\1"), (r"attention\.output\.dense", "attention.out"),
         (r"attention\.([qkvo])_proj", r"attention.\1"), (r"attention\.o\.", "attention.out."), (r"mlp\.", ""),
         (r"^layernorm", "norm")]


def our_name(name):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_encoder(folder):
    """The encoder in `folder`, here or on the Hub, in float32, in eval mode, without gradients of its own: microsoft/rad-dino
    as published, or a folder of this project's classifier, whose encoder it takes.

    Raises InputError for a missing file, another architecture, a missing or an extra tensor.
    """
    files = [hub.find(folder, name) for name in ("config.json", "model.safetensors")]
    if not all(files):
        raise InputError(f"{folder}: an encoder is a folder with config.json and model.safetensors, here or on the Hub")
    try:
        config = json.loads(files[0].read_text())
        state = safetensors.torch.load_file(files[1])
        if "encoder" in config:  # a classifier: its heads are not the encoder's
            encoder = Encoder(EncoderConfig(**config["encoder"]))
            state = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
        else:
            if config.get("model_type") != "dinov2":
                raise ValueError(f"model_type {config.get('model_type')!r} is not dinov2")
            encoder = Encoder(EncoderConfig(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
                                            config["patch_size"], config["image_size"], config["num_channels"], config["mlp_ratio"]))
            state = {our_name(name): tensor for name, tensor in state.items()}
        encoder.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: not an encoder of this architecture: {reason[:300]}") from None
    return encoder.eval().requires_grad_(False)
