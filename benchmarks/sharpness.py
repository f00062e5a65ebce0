"""How sharp? The power of images by octave of spatial frequency, beside that of held-out real images, in one table.

    python benchmarks/sharpness.py --data PREPARED... --vae weights/demo/vae
    python benchmarks/sharpness.py --data PREPARED... --vae weights/demo/vae --samples OUT

Rows: the held-out images as the VAE returns them; the same through a linear method of the same size, a PCA of blocks
fitted on the training images, below which a network has learnt nothing; the samples of OUT. PSNR is the mean over
images in dB. Power: the mean is taken off an image, a Hann window keeps its borders from showing, and |FFT|² is
averaged over images and over the frequencies from f to 2 f cycles per image (not 2 f itself), f = 2, 4, 8, ... A
ratio of 1 is as sharp as real; a PSNR or a Fréchet distance hardly shows what the last octaves lose. Ask for samples
with the metadata of the held-out images, since groups of patients and data sets differ in sharpness.
"""
import argparse
import sys
from pathlib import Path

import torch
from einops import rearrange
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import vae
from autoencoder.load import load_vae
from common import cli
from common.cli import InputError
from encoders.features import images_of
from radiographs.pixels import load_image


def octaves(side):
    """The lower ends of the octaves that an image of this side resolves: 2, 4, ... up to a quarter of it."""
    return [2 ** i for i in range(1, side.bit_length()) if 2 ** (i + 1) <= side // 2]


def power_by_octave(images):
    """Mean power of images (N, 1, H, W), H = W, in each octave: (N, K) float64."""
    images = images[:, 0].double()                                   # N H W
    side = images.shape[-1]
    window = torch.hann_window(side, dtype=torch.float64, device=images.device)
    images = (images - images.mean((1, 2), keepdim=True)) * torch.outer(window, window)
    power = torch.fft.fft2(images).abs().square()                    # N H W
    cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64, device=images.device)
    frequency = (cycles[:, None].square() + cycles.square()).sqrt()  # H W, cycles per image
    return torch.stack([power[:, (low <= frequency) & (frequency < 2 * low)].mean(1) for low in octaves(side)], 1)


def blocks_of(images, size):
    """Images (N, 1, H, W) as rows of size x size pixels: (N H/size W/size, size²)."""
    return rearrange(images, "n 1 (h p) (w q) -> (n h w) (p q)", p=size, q=size)


def fit_pca(images, size, count):
    """Mean (size²,) and the `count` directions (count, size²) of most variance of the blocks of images (N, 1, H, W)."""
    total, products, number = 0, 0, 0
    for part in images.split(64):
        rows = blocks_of(part, size).double()
        total, products, number = total + rows.sum(0), products + rows.T @ rows, number + len(rows)
    mean = total / number
    _, directions = torch.linalg.eigh(products / number - torch.outer(mean, mean))  # of rising variance
    return mean, directions[:, -count:].T


def through_pca(images, mean, directions, size):
    """Images (N, 1, H, W) after projection of each block on the directions."""
    rows = blocks_of(images, size).double() - mean
    rows = mean + rows @ directions.T @ directions
    return rearrange(rows, "(n h w) (p q) -> n 1 (h p) (w q)", n=len(images), h=images.shape[2] // size, p=size).float()


@torch.no_grad()
def through_vae(images, model):
    device = next(model.parameters()).device
    return torch.cat([model.decode(model.encode(part.to(device))[0]).clamp(-1, 1).cpu()
                      for part in tqdm(images.split(16), unit="batch", leave=False)])


def load_samples(place, side):
    """The images of a sample's folder, or of any other, (N, 1, H, W). Raises InputError if they are of another size."""
    images = [load_image(record["path"]) for record in images_of(place)]
    for image in images:
        if image.shape != (1, side, side):
            raise InputError(f"{place}: an image of {image.shape[-1]}x{image.shape[-2]} pixels, where the held-out "
                             f"images have {side}x{side}")
    return torch.stack(images)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="the sources the VAE was trained on")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--samples", type=Path, metavar="OUT", help="what sample.py wrote, or any folder of images")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="the held-out images; %(default)s")
    parser.add_argument("--n", type=cli.positive, default=200, help="at most so many held-out images; %(default)s")
    args = parser.parse_args()
    training, held_out = data.Radiographs(args.data, "train"), data.Radiographs(args.data, args.split)
    chosen = torch.linspace(0, len(held_out) - 1, min(args.n, len(held_out))).long()
    real = torch.stack([held_out[i] for i in chosen])                # N 1 H W
    side = real.shape[-1]
    model = load_vae(args.vae).to(cli.pick_device()[0])
    size, count = 2 ** (len(model.config.widths) - 1), model.config.latent_channels
    if count > size * size:
        raise InputError(f"{args.vae}: {count} latent channels for {size}x{size} pixels; PCA would lose nothing")
    some = torch.linspace(0, len(training) - 1, min(2000, len(training))).long()
    pca = fit_pca(torch.stack([training[i] for i in some]), size, count)
    rows = {"real, through the VAE": through_vae(real, model),
            f"real, through PCA of {size}x{size}, {count} values": through_pca(real, *pca, size).clamp(-1, 1)}
    quality = {name: f"{vae.psnr(images, real).mean():.1f}" for name, images in rows.items()}
    if args.samples:
        rows[f"samples of {args.samples.name}"] = load_samples(args.samples, side)

    print(f"mean power by octave, beside {len(real)} held-out real images (split {args.split}); {side}x{side} pixels")
    print(f"{'cycles per image':44}{'N':>6}{'PSNR':>7}" + "".join(f"{f'{low}-{2 * low}':>9}" for low in octaves(side)))
    reference = power_by_octave(real).mean(0)
    for name, images in rows.items():
        ratios = power_by_octave(images).mean(0) / reference
        print(f"{name:44}{len(images):6}{quality.get(name, '-'):>7}" + "".join(f"{ratio:9.2f}" for ratio in ratios))


if __name__ == "__main__":
    cli.run(main)
