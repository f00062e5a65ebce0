"""Rad-VAE: a radiograph to a small latent and back, in FLUX.2's autoencoder architecture at any width.

    encoder   x (N 1 H W) -> mean, log-variance (N c h w), h = H / 2^(levels - 1): f8 with four levels
    patchify  2x2 latent cells become channels: (N 4c h/2 w/2), each cell a token of the transformer
    normalise each of the 4c channels by stored running statistics, so that the flow sees unit variance

    loss = Charbonnier(x, x̂) + w_ssim (1 - SSIM(x, x̂)) + w_kl KL(q(z|x) || N(0, I)) + w_p perceptual(x, x̂)

Source: black-forest-labs FLUX.2 (Apache-2.0 weights), as AutoencoderKLFlux2 in diffusers, whose tensor names are
kept; grey images need one channel where FLUX.2 has three. KL as in Kingma and Welling 2014, SSIM as in Wang et al.
2004 (11x11 Gaussian window, sigma 1.5).
Conventions: images are grey, (N 1 H W) in [-1, 1]. In a VAE of three channels all three get the grey image, and the
mean of the three it returns is the result. encode() returns the mean and log-variance of the *normalised, patchified*
latent, z = mean + exp(log-variance / 2) noise is a sample of it, and decode() takes such a z. Latents are normalised
nowhere else.

A module without a command: train.py trains it; autoencoder/ loads it, or FLUX.2's published weights, and caches
latents.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import check
from encoders.perceptual import PUBLISHED_WEIGHT, perceptual_loss


@dataclass
class VAEConfig:
    channels: int = 1                            # 1 grey, 3 FLUX.2
    latent_channels: int = 32                    # c, before the 2x2 patchify
    widths: tuple = (128, 256, 512, 512)         # channels of each level, finest first; FLUX.2's are the default
    layers: int = 2                              # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32                             # of every GroupNorm

    def __post_init__(self):
        check.one_of(self, (1, 3), "channels")
        check.whole(self, 1, 4_096, "latent_channels", "groups")
        check.whole(self, 1, 64, "layers")
        check.wholes(self, 1, 2 ** 14, 1, 8, "widths")
        if any(width % self.groups for width in self.widths):
            check.refuse(self, "widths", f"multiples of the groups of GroupNorm, {self.groups}")


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                            # N c_in h w
        h = self.conv1(F.silu(self.norm1(x)))                        # N c_out h w
        h = self.conv2(F.silu(self.norm2(h)))                        # N c_out h w
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)  # N c_out h w


class Attention(nn.Module):
    """Single-head self-attention over all cells."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list of one because diffusers' name is to_out.0

    def forward(self, x):                                            # N c h w
        tokens = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")             # one head
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))  # N 1 (h w) c
        return x + rearrange(self.to_out[0](out), "n 1 (h w) c -> n c h w", h=x.shape[2])    # N c h w


class MidBlock(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):                                            # N c h w
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Stride 2, padded on the right and below only, as FLUX.2 was trained."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):                                            # N c h w
        return self.conv(F.pad(x, (0, 1, 0, 1)))                     # N c h/2 w/2


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                            # N c h w
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # N c 2h 2w


class Level(nn.Module):
    """The residual blocks of one resolution and the resampling that leaves it, if any."""

    def __init__(self, c_in, c_out, layers, groups, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        if resample is Downsample:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        elif resample is Upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):                                            # N c_in h w
        for resnet in self.resnets:
            x = resnet(x)                                            # N c_out h w
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)                              # N c_out h/2 w/2
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x)                                # N c_out 2h 2w
        return x


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w, last = cfg.widths, len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(cfg.channels, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(w[max(i - 1, 0)], w[i], cfg.layers, cfg.groups, Downsample if i < last else None)
            for i in range(last + 1)])
        self.mid_block = MidBlock(w[-1], cfg.groups)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):                                            # N 1 H W
        x = self.conv_in(x)                                          # N w0 H W
        for level in self.down_blocks:
            x = level(x)                                             # N wi H/2^i W/2^i
        x = self.mid_block(x)                                        # N w h w
        return self.conv_out(F.silu(self.conv_norm_out(x)))          # N 2c h w


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w, last = cfg.widths[::-1], len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, w[0], 3, padding=1)
        self.mid_block = MidBlock(w[0], cfg.groups)
        self.up_blocks = nn.ModuleList([
            Level(w[max(i - 1, 0)], w[i], cfg.layers + 1, cfg.groups, Upsample if i < last else None)
            for i in range(last + 1)])
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], cfg.channels, 3, padding=1)

    def forward(self, z):                                            # N c h w
        x = self.mid_block(self.conv_in(z))                          # N w h w
        for level in self.up_blocks:
            x = level(x)                                             # N wi, twice as large after each but the last
        return self.conv_out(F.silu(self.conv_norm_out(x)))          # N 1 H W


def patchify(z):
    return rearrange(z, "n c (h p) (w q) -> n (c p q) h w", p=2, q=2)


def unpatchify(z):
    return rearrange(z, "n (c p q) h w -> n c (h p) (w q)", p=2, q=2)


# Pixels that encode() and decode() work on at a time, in whole images: on a CPU four images of 128x128 fit into the
# caches, sixteen do not; a GPU would be idle with so few.
SLICE, GPU_SLICE = 2 ** 16, 2 ** 20


def in_slices(x, pixels):
    """A batch x of images of so many `pixels`, or of their latents, in parts."""
    return x.split(max(1, (GPU_SLICE if x.is_cuda else SLICE) // pixels))


class RadVAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.bn = nn.BatchNorm2d(4 * c, eps=1e-4, momentum=0.01, affine=False)  # only its running statistics are used
        # A posterior that starts with variance 1 hides the image in noise, and a narrow model may never learn from it:
        # start with the variance e^-5.
        nn.init.constant_(self.quant_conv.bias[c:], -5.0)

    def encode_raw(self, x):                                         # N 1 H W in [-1, 1]
        """Mean and log-variance of the raw latent, patchified: each (N, 4c, h, w)."""
        x = x.expand(-1, self.config.channels, -1, -1)               # N channels H W: FLUX.2 sees grey as R = G = B
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)  # N c 2h 2w each
        return patchify(mean), patchify(logvar).clamp(-30, 20)

    def encode(self, x):
        """Mean and log-variance of the normalised latent: each (N, 4c, h, w)."""
        slices = in_slices(x, x[0, 0].numel())                       # whole images, as GroupNorm needs them
        encoded = [self.encode_raw(part) for part in slices]
        mean, logvar = (torch.cat(parts) for parts in zip(*encoded))  # N 4c h w each
        variance = (self.bn.running_var + self.bn.eps)[:, None, None]
        return (mean - self.bn.running_mean[:, None, None]) / variance.sqrt(), logvar - variance.log()

    def decode(self, z):                                             # N 4c h w, normalised
        """An image in [-1, 1] (not clamped): (N, 1, H, W)."""
        scale = (self.bn.running_var + self.bn.eps).sqrt()[:, None, None]
        z = z * scale + self.bn.running_mean[:, None, None]          # N 4c h w
        pixels = z[0, 0].numel() * 4 ** len(self.config.widths)      # of one image
        return torch.cat([self.decode_raw(part) for part in in_slices(z, pixels)])  # N 1 H W

    def decode_raw(self, z):                                         # N 4c h w, raw
        x = self.decoder(self.post_quant_conv(unpatchify(z)))        # N channels H W
        return x.mean(1, keepdim=True)                               # N 1 H W

    def forward(self, x, noise):
        """One training pass: reconstruction, mean, log-variance (raw). After it, the training loop passes the means of
        the whole batch through bn, which updates the running statistics."""
        mean, logvar = self.encode_raw(x)                               # N 4c h w
        z = mean + (0.5 * logvar).exp() * noise                      # N 4c h w
        return self.decode_raw(z), mean, logvar


# ---------------------------------------------------------------------------------------------------------
# The loss, and the two measures of a reconstruction

def ssim(x, y, data_range=2.0):
    """Mean structural similarity of each image, (N,), of x, y (N, 1, H, W), whose values differ by at most
    `data_range`."""
    offsets = torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    window = torch.exp(-offsets ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()

    def blur(image):                                                 # separable 11x11 Gaussian, valid pixels only
        return F.conv2d(F.conv2d(image, window.view(1, 1, 1, 11)), window.view(1, 1, 11, 1))

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    similarity = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean((1, 2, 3))


def psnr(x, y, data_range=2.0):
    """Peak signal-to-noise ratio of each image in dB, (N,)."""
    return 10 * torch.log10(data_range ** 2 / (x - y).square().mean((1, 2, 3)))


def vae_loss(x, reconstruction, mean, logvar, ssim_weight=0.1, kl_weight=3e-4, encoder=None,
             perceptual_weight=PUBLISHED_WEIGHT):
    """The training loss of a batch and a dict of its terms, each a mean over pixels or latent elements, in float32.
    With an `encoder` (encoders/raddino.py) there is a perceptual term too (encoders/perceptual.py)."""
    with torch.autocast(x.device.type, enabled=False):  # SSIM subtracts nearly equal numbers
        x, reconstruction, mean, logvar = x.float(), reconstruction.float(), mean.float(), logvar.float()
        charbonnier = ((x - reconstruction).square() + 1e-6).sqrt().mean()
        structure = 1 - ssim(x, reconstruction).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = charbonnier + ssim_weight * structure + kl_weight * kl
    terms = {"charbonnier": charbonnier, "ssim": structure, "kl": kl}
    if encoder:
        terms["perceptual"] = perceptual_loss(encoder, x, reconstruction).mean()
        loss = loss + perceptual_weight * terms["perceptual"]
    return loss, terms
