"""Rad-VAE: a radiograph to a small latent and back, in FLUX.2's autoencoder architecture at any width.

    encoder   x (N 1 H W) -> mean, log-variance (N c h w), h = H / 2^(levels - 1): f8 with four levels
    patchify  2x2 latent cells become channels: (N 4c h/2 w/2), one transformer token a cell
    normalise each of the 4c channels by stored running statistics, so that the flow sees unit variance

    loss = Charbonnier(x, x̂) + w_ssim (1 - SSIM(x, x̂)) + w_kl KL(q(z|x) || N(0, I))

Source: black-forest-labs FLUX.2 (Apache-2.0 weights), as AutoencoderKLFlux2 in diffusers, whose tensor names are
kept; grey images need one channel where FLUX.2 has three. KL and SSIM are those of the papers: Kingma and Welling
2014, Wang et al. 2004 (11x11 Gaussian window, sigma 1.5).
Conventions: images in [-1, 1]; encode() returns the mean and log-variance of the *normalised, patchified* latent;
sample with mean + exp(log-variance / 2) * noise, decode() takes the same space. Normalisation lives nowhere else.

    python vae.py encode PREPARED... --vae DIR --out LATENTS
    python vae.py evaluate PREPARED... --vae DIR
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

import cli
import data
import hub
import radiograph


@dataclass
class VAEConfig:
    channels: int = 1                            # 1 grey, 3 FLUX.2
    latent_channels: int = 32                    # c, before the 2x2 patchify
    widths: tuple = (128, 256, 512, 512)         # channels of each level, finest first; FLUX.2's are the default
    layers: int = 2                              # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32                             # of every GroupNorm

    def __post_init__(self):
        self.widths = tuple(self.widths)  # JSON has no tuples
        if any(width % self.groups for width in self.widths):
            raise cli.InputError(f"widths {self.widths} are not all multiples of the {self.groups} groups of GroupNorm")


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
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over all cells."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list of one because diffusers' name is to_out.0

    def forward(self, x):                                            # N c h w
        tokens = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "n 1 (h w) c -> n c h w", h=x.shape[2])


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

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in getattr(self, "downsamplers", None) or getattr(self, "upsamplers", ()):
            x = resample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w, last = cfg.widths, len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(cfg.channels, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(w[max(i - 1, 0)], w[i], cfg.layers, cfg.groups, Downsample if i < last else None) for i in range(last + 1)])
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
            Level(w[max(i - 1, 0)], w[i], cfg.layers + 1, cfg.groups, Upsample if i < last else None) for i in range(last + 1)])
        self.conv_norm_out = nn.GroupNorm(cfg.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], cfg.channels, 3, padding=1)

    def forward(self, z):                                            # N c h w
        x = self.mid_block(self.conv_in(z))                          # N w h w
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))          # N 1 H W


def patchify(z):
    return rearrange(z, "n c (h p) (w q) -> n (c p q) h w", p=2, q=2)


def unpatchify(z):
    return rearrange(z, "n (c p q) h w -> n c (h p) (w q)", p=2, q=2)


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
        # A posterior that starts with variance 1 drowns the signal, and a narrow model never recovers: start at e^-5.
        nn.init.constant_(self.quant_conv.bias[c:], -5.0)

    def moments(self, x):                                            # N 1 H W in [-1, 1]
        """Mean and log-variance of the raw latent, patchified: each (N, 4c, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)  # N c 2h 2w each
        return patchify(mean), patchify(logvar).clamp(-30, 20)

    def encode(self, x):
        """Mean and log-variance of the normalised latent: each (N, 4c, h, w)."""
        mean, logvar = self.moments(x)                               # N 4c h w
        variance = (self.bn.running_var + self.bn.eps)[:, None, None]
        return (mean - self.bn.running_mean[:, None, None]) / variance.sqrt(), logvar - variance.log()

    def decode(self, z):                                             # N 4c h w, normalised
        """An image in [-1, 1] (not clamped): (N, 1, H, W)."""
        scale = (self.bn.running_var + self.bn.eps).sqrt()[:, None, None]
        z = z * scale + self.bn.running_mean[:, None, None]          # N 4c h w
        return self.decoder(self.post_quant_conv(unpatchify(z)))     # N 1 H W

    def forward(self, x, noise):
        """One training pass: reconstruction, mean, log-variance (raw); updates the running statistics."""
        mean, logvar = self.moments(x)                               # N 4c h w
        self.bn(mean.float())
        z = mean + (0.5 * logvar).exp() * noise                      # N 4c h w
        return self.decoder(self.post_quant_conv(unpatchify(z))), mean, logvar


# ---------------------------------------------------------------------------------------------------------
# The loss, and the two measures of a reconstruction

def ssim(x, y, data_range=2.0):
    """Mean structural similarity of each image, (N,), for x, y (N, 1, H, W) with values `data_range` apart at most."""
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


def vae_loss(x, reconstruction, mean, logvar, ssim_weight=0.1, kl_weight=3e-4):
    """The training loss of a batch and its terms, each a mean over pixels or latent elements; always in float32."""
    with torch.autocast(x.device.type, enabled=False):  # SSIM subtracts nearly equal numbers
        x, reconstruction, mean, logvar = x.float(), reconstruction.float(), mean.float(), logvar.float()
        charbonnier = ((x - reconstruction).square() + 1e-6).sqrt().mean()
        structure = 1 - ssim(x, reconstruction).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = charbonnier + ssim_weight * structure + kl_weight * kl
    return loss, {"charbonnier": charbonnier, "ssim": structure, "kl": kl}


# ---------------------------------------------------------------------------------------------------------
# Cached latents: LATENTS/00000.safetensors, ... (mean and log-variance, float16) beside latents.json

SHARD = 1024  # images


def names_of(radiographs):
    """What identifies each image in a cache: the source's folder and the path in it."""
    return ["/".join(record["path"].parts[-3:]) for record in radiographs.records]


@torch.no_grad()
def encode(folders, vae_folder, out, versions=1, batch=16):
    """Encodes every image of the prepared sources. Finished shards of the same VAE and images are kept.

    With versions > 1 a training image has that many rows: as it is, and jittered, so that a small data set is not
    learnt by heart. The jitter of a row depends on its number alone.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hub.load_model(RadVAE, VAEConfig, vae_folder).to(device)
    images = data.Radiographs(folders)
    names = names_of(images)
    if len(set(names)) < len(images):
        raise cli.InputError("two of the prepared sources have the same folder name, so their images cannot be told apart")
    rows = [(i, version) for i, record in enumerate(images.records)
            for version in range(versions if record["split"] == "train" else 1)]
    about = {"vae": hub.fingerprint(vae_folder), "rows": [names[i] for i, _ in rows]}
    table = out / "latents.json"
    if not table.exists() or json.loads(table.read_text()) != about:
        for shard in out.glob("*.safetensors"):
            shard.unlink()
        out.mkdir(parents=True, exist_ok=True)
        cli.write_json(table, about)

    def picture(row):
        i, version = rows[row]
        x = images[i][None]                                          # 1 1 H W
        return radiograph.jitter(x, torch.Generator().manual_seed(row)) if version else x

    for start in tqdm(range(0, len(rows), SHARD), unit="shard"):
        path, stop = out / f"{start // SHARD:05}.safetensors", min(start + SHARD, len(rows))
        if path.exists():
            continue
        moments = []
        for first in range(start, stop, batch):
            x = torch.cat([picture(row) for row in range(first, min(first + batch, stop))])  # N 1 H W
            moments.append([half.half().cpu() for half in model.encode(x.to(device))])
        mean, logvar = (torch.cat(halves) for halves in zip(*moments))
        safetensors.torch.save_file({"mean": mean, "logvar": logvar}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)


@torch.no_grad()
def evaluate(folders, vae_folder, split, batch=16):
    """PSNR in dB and SSIM of the reconstruction of every image of a split: two tensors (N,)."""
    model, images = hub.load_model(RadVAE, VAEConfig, vae_folder), data.Radiographs(folders, split)
    scores = []
    for start in tqdm(range(0, len(images), batch), unit="batch"):
        x = torch.stack([images[i] for i in range(start, min(start + batch, len(images)))])  # N 1 H W
        y = model.decode(model.encode(x)[0]).clamp(-1, 1)
        scores.append((psnr(x, y), ssim(x, y)))
    return tuple(torch.cat(column) for column in zip(*scores))


class Latents:
    """Cached latents by row: latents[row] is (mean, log-variance), each (4c, h, w) float32, read from disk when asked."""

    def __init__(self, folder):
        self.folder, self.shards = Path(folder), {}
        if not (self.folder / "latents.json").exists():
            raise cli.InputError(f"{folder}: no latents.json; make it with python vae.py encode")
        about = json.loads((self.folder / "latents.json").read_text())
        self.vae, self.rows = about["vae"], {}                       # rows: image -> where its versions are
        for row, name in enumerate(about["rows"]):
            self.rows.setdefault(name, []).append(row)

    def __getitem__(self, row):
        number, row = divmod(row, SHARD)
        if number not in self.shards:
            self.shards[number] = safetensors.safe_open(self.folder / f"{number:05}.safetensors", "pt")
        return tuple(self.shards[number].get_slice(name)[row].float() for name in ("mean", "logvar"))


def main():
    parser = cli.Parser(description="Cache the latents of prepared sources, or measure reconstruction.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("encode", "write mean and log-variance of every image as safetensors shards"),
                       ("evaluate", "print the PSNR and SSIM of reconstructed images")):
        p = commands.add_parser(name, help=text)
        p.add_argument("data", nargs="+", type=Path, help="prepared sources")
        p.add_argument("--vae", type=Path, required=True, help="a folder with config.json and model.safetensors")
    commands.choices["encode"].add_argument("--out", type=Path, required=True)
    commands.choices["encode"].add_argument("--versions", type=cli.positive, default=1,
                                            help="rows of a training image: itself and slightly moved copies, for small data sets")
    commands.choices["evaluate"].add_argument("--split", choices=data.SPLITS, default="test")
    args = parser.parse_args()
    if args.command == "encode":
        return encode(args.data, args.vae, args.out, args.versions)
    decibel, similarity = evaluate(args.data, args.vae, args.split)
    print(f"{args.vae}: {len(decibel)} images of the split {args.split}: PSNR {decibel.mean():.2f} dB (standard deviation "
          f"{decibel.std(correction=0):.2f}), SSIM {similarity.mean():.4f} ({similarity.std(correction=0):.4f})")


if __name__ == "__main__":
    cli.run(main)
