"""Rad-DINO: the image encoder in whose features the measures and the perceptual loss compare images.

A DINOv2 ViT without registers. The tokens are a CLS token and one per patch; s1 and s2 are learnt per channel
(layer scale).

    h_0 = [CLS, patches] + positions
    h_l = a + s2 MLP(LN(a)),  a = h_{l-1} + s1 Attention(LN(h_{l-1})),  l = 1 ... L
    features = LN(h_L)[CLS]                                             (transformers' pooler_output)

Source: microsoft/rad-dino (MIT), Perez-Garcia et al. 2024; DINOv2, Oquab et al. 2023. The defaults below are the
published model: 86,580,480 parameters, 223 tensors. A smaller one is the same class with other numbers, such as the
encoder of weights/demo/classifier, which needs no network.
Conventions: `preprocess` takes an image as files hold it and is the published processor, to the pixel; its values are
read from the preprocessor_config.json beside the weights. `normalise` takes images of this project, (N, 1, H, W) in
[-1, 1], and lets gradients through. Any height and width is accepted: positions are interpolated, and pixels on the
right and at the bottom that do not fill a patch are not used.
"""
import math
import re
from dataclasses import asdict, dataclass

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from common import check, cli, hub
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
    mean: float = 0.5307     # of the training images' pixels in [0, 1]; a tuple where the channels differ
    std: float = 0.2583
    resize: int = None       # shortest edge in pixels that preprocess resamples to; image_size if not given
    crop: int = None         # side of the square that preprocess cuts out of the middle; resize if not given

    def __post_init__(self):
        self.resize = self.image_size if self.resize is None else self.resize
        self.crop = self.resize if self.crop is None else self.crop
        check.whole(self, 1, 8192, "width", "image_size", "resize", "crop")
        check.whole(self, 1, 256, "depth", "heads", "patch")
        check.whole(self, 1, 16, "channels", "mlp_ratio")
        if self.width % self.heads or self.image_size < self.patch or self.resize < self.crop:
            raise InputError(f"width {self.width}, heads {self.heads}, patch {self.patch}, image_size {self.image_size}"
                             f", resize {self.resize}, crop {self.crop}: heads must divide the width, a patch must fit "
                             "into the image and the crop into the resized image")
        for name, low in (("mean", 0), ("std", 1e-6)):
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, (list, tuple)) else (values,)
            allowed = all(type(x) in (int, float) and low <= x <= 1 for x in values)
            if len(values) not in (1, self.channels) or not allowed:
                raise InputError(f"{name} {values} is not a number from {low:g} to 1, or one for each channel")
            setattr(self, name, values[0] if len(set(values)) == 1 else values)


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
        self.mask_token = nn.Parameter(torch.zeros(1, config.width))  # unused here; kept to load strictly
        self.positions = nn.Parameter(torch.randn(1, 1 + side * side, config.width) * 0.02)  # CLS, then row by row
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
        """CLS features (N, D) and patch features (N, h w, D), after the last LayerNorm, of normalised images (N, C,
        H, W). `keep` (N, K) holds the numbers of the patches to keep; the others are left out, which makes
        training cheaper and regularises it (PatchDropout, Liu et al. 2023)."""
        tokens = self.embed(x)                                       # N T D
        if keep is not None:
            patches = tokens[:, 1:].gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))  # N K D
            tokens = torch.cat([tokens[:, :1], patches], 1)          # N 1+K D
        for block in self.blocks:
            tokens = block(tokens)                                   # N T D
        tokens = self.norm(tokens)                                   # N T D
        return tokens[:, 0], tokens[:, 1:]

    def normalise(self, images):                                     # N 1 H W in [-1, 1]
        """Images as the encoder expects them, (N, C, H, W), with gradients; the size stays."""
        mean, std = (torch.tensor(value, dtype=images.dtype, device=images.device).view(-1, 1, 1)
                     for value in (self.config.mean, self.config.std))
        x = images.expand(-1, self.config.channels, -1, -1)          # N C H W
        return ((x + 1) / 2 - mean) / std


def preprocess(image, config):
    """The published processor: a PIL image to (C, S, S) float32, S = config.crop. Shortest edge to config.resize by
    Pillow's bicubic filter on bytes, centre crop, mean and standard deviation."""
    if image.mode.startswith("I"):  # 16 bits (PadChest, CXR7-1M): the processor works on bytes
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
    image = image.convert("L" if config.channels == 1 else "RGB")
    width, height = (config.resize * edge // min(image.size) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - config.crop) // 2, (height - config.crop) // 2
    image = image.crop((left, top, left + config.crop, top + config.crop))
    pixels = np.asarray(image, np.float32).reshape(config.crop, config.crop, -1) / 255     # S S C
    return torch.from_numpy((pixels - config.mean) / config.std).permute(2, 0, 1).float()  # C S S


# ---------------------------------------------------------------------------------------------------------
# Weights

# Patterns in microsoft/rad-dino's tensor names, those of its file (transformers 4) and those of transformers 5, and
# what replaces them in ours.
NAMES = [(r"embeddings\.position_embeddings", "positions"), (r"embeddings\.patch_embeddings\.projection", "patches"),
         (r"embeddings\.", ""), (r"encoder\.layer\.", "blocks."), (r"layer_scale([12])\.lambda1", r"scale\1"),
         (r"attention\.attention\.(q|k|v)(uery|ey|alue)", r"attention.\1"),
         (r"attention\.output\.dense", "attention.out"),
         (r"attention\.([qkvo])_proj", r"attention.\1"), (r"attention\.o\.", "attention.out."), (r"mlp\.", ""),
         (r"^layernorm", "norm")]


def our_name(name):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def processor_values(folder):
    """resize, crop, mean and std of the preprocessor_config.json beside the weights; without that file an empty dict,
    which leaves Rad-DINO's values. Raises InputError for steps other than those of `preprocess`."""
    file = hub.find(folder, "preprocessor_config.json")
    if not file:
        return {}
    values = cli.read_json(file)
    steps = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    for name, expected in steps.items():
        if values.get(name, expected) != expected:
            raise InputError(f"{file}: {name} is {values[name]!r}; accepted is {expected} (bicubic resize of the "
                             "shortest edge, centre crop, mean and standard deviation)")
    try:
        crop = values["crop_size"]
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        if crop[0] != crop[1] or not math.isclose(values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
            raise ValueError
        return {"resize": values["size"]["shortest_edge"], "crop": crop[0],
                "mean": values["image_mean"], "std": values["image_std"]}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file}: not the processor of a DINOv2: needed are size (shortest_edge), a square crop_size, "
                         "image_mean, image_std and rescale_factor 1/255") from None


def why_not_raddino(encoder, folder):
    """Why features of this encoder may not be compared with Rad-DINO's: one line, empty for microsoft/rad-dino as
    published. Equal shapes prove nothing: facebook/dinov2-base has Rad-DINO's, but crops to 224 pixels and uses
    ImageNet's mean."""
    published, found = asdict(EncoderConfig()), asdict(encoder.config)
    if found != published:
        return "not Rad-DINO: " + ", ".join(f"{name} {found[name]} (Rad-DINO: {value})"
                                            for name, value in published.items() if found[name] != value)
    if not hub.find(folder, "preprocessor_config.json"):
        return "no preprocessor_config.json beside the weights, so Rad-DINO's values are assumed"
    if str(folder) != "microsoft/rad-dino":
        return "configured like Rad-DINO; whether the weights are Rad-DINO's is not checked"
    return ""


def load_encoder(folder):
    """The encoder in `folder`, here or on the Hub, in float32, in eval mode, without gradients of its own:
    microsoft/rad-dino as published, another DINOv2 of that architecture, or a folder of this project's classifier,
    whose encoder is taken.

    Raises InputError for a missing file, another architecture, a missing or an extra tensor, weights that are not
    finite.
    """
    files = [hub.find(folder, name) for name in ("config.json", "model.safetensors")]
    if not all(files):
        raise hub.not_found(folder, "an encoder is a folder with config.json and model.safetensors, here or on the Hub")
    try:
        config = cli.read_json(files[0])
        state = safetensors.torch.load_file(files[1])
        if "encoder" in config:  # a classifier: its heads are not the encoder's
            encoder = Encoder(EncoderConfig(**config["encoder"]))
            state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()
                     if name.startswith("encoder.")}
        else:
            if config.get("model_type") != "dinov2":
                raise ValueError(f"model_type {config.get('model_type')!r} is not dinov2")
            encoder = Encoder(EncoderConfig(
                config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], config["patch_size"],
                config["image_size"], config["num_channels"], config["mlp_ratio"], **processor_values(folder)))
            state = {our_name(name): tensor for name, tensor in state.items()}
        encoder.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("weights that are not finite")
    except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: not an encoder of this architecture: {reason[:300]}") from None
    return encoder.eval().requires_grad_(False)
