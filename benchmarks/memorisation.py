"""Does the model copy? The distance from each sample to its nearest training image, beside that of held-out images.

    python benchmarks/memorisation.py --data PREPARED... [--weights weights/demo] [--n 64] [--seed 0]

Distance: root mean square difference of the pixels, in [-1, 1], after averaging to 32x32, so that place and shape
count and fine texture does not. Real held-out images (split test) are measured as they are and as the VAE returns
them, since samples come out of the same decoder; training images as the VAE returns them, still and moved, show what
copies would score. With --versions, the images searched are those that `python -m autoencoder encode --versions` made,
moved copies included. A model that copies has samples near the last rows, one that does not near the held-out ones.
Writes the closest pairs, sample above training image, to --out.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sample
from common import cli
from radiographs import pixels


def descriptor(images):
    """(N, 1, H, W) to (N, 1024): 32x32 averages."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1)


def nearest(images, training):
    """RMS distance to the nearest training image, and which it is: (N,), (N,)."""
    distance, index = torch.cdist(descriptor(images), training).min(1)
    return distance / training.shape[1] ** 0.5, index


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="the prepared sources the weights were trained on")
    parser.add_argument("--weights", type=Path, default=sample.DEMO)
    parser.add_argument("--versions", type=int, default=1, help="as given to python -m autoencoder encode")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/nearest.png"))
    args = parser.parse_args()
    model, decoder = sample.load_weights(args.weights)
    train, test, everything = (data.Radiographs(args.data, split) for split in ("train", "test", None))
    training_images = torch.stack(list(train))
    seen, row = [], 0                                                # every picture the model was trained on
    for record, image in zip(tqdm(everything.records), everything):
        versions = args.versions if record["split"] == "train" else 1
        if record["split"] == "train":
            moved = [pixels.jitter(image[None], torch.Generator().manual_seed(row + i)) for i in range(1, versions)]
            seen.append(descriptor(torch.cat([image[None], *moved])))
        row += versions
    training = torch.cat(seen)                                       # N * versions 1024

    examples = model.config.examples
    seeds = list(range(args.seed, args.seed + args.n))
    samples, _ = sample.generate(model, decoder, [examples[seed % len(examples)] for seed in seeds], seeds)
    held_out = torch.stack([test[i] for i in torch.linspace(0, len(test) - 1, args.n).long().tolist()])
    copies = training_images[torch.linspace(0, len(train) - 1, args.n).long()]
    columns = {"samples": samples, "held-out": held_out}
    if decoder:
        columns["held-out, through the VAE"] = decoder.decode(decoder.encode(held_out)[0]).clamp(-1, 1)
        columns["training, through the VAE"] = decoder.decode(decoder.encode(copies)[0]).clamp(-1, 1)
        moved = pixels.jitter(copies, torch.Generator().manual_seed(2 ** 32 + args.seed))
        columns["the same, moved anew"] = decoder.decode(decoder.encode(moved)[0]).clamp(-1, 1)
    print(f"{args.weights}: {args.n} images each, seed {args.seed}, "
          f"{len(train)} training images in {args.versions} versions, RMS at 32x32 to the nearest")
    print(f"{'':28}{'least':>8}{'5 %':>8}{'median':>8}{'95 %':>8}")
    for name, images in columns.items():
        distance, index = nearest(images, training)
        values = [distance.min(), *distance.quantile(torch.tensor([0.05, 0.5, 0.95]))]
        print(f"{name:28}" + "".join(f"{value:8.4f}" for value in values))
        if name == "samples":
            closest = distance.argsort()[:8]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            pixels.save_image(pixels.grid(torch.cat([
                samples[closest], training_images[index[closest] // args.versions]]), columns=8), args.out)


if __name__ == "__main__":
    cli.run(main)
