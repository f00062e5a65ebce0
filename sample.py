"""Metadata in, radiographs out.

    python sample.py                                              16 pictures from the embedded weights
    python sample.py --view PA --sex female --age 60 --set pneumonia=positive --n 4 --out out/women

Image i is drawn from the seed SEED + i alone: the same seed and metadata give the same picture in any batch, to rounding. Fields
that are not given are unknown to the model; with none given at all, each image asks for the metadata of an example
that config.json holds. A value that the training data never covered is refused. Every file says that it is synthetic.
"""
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import fields
import flow
import hub
import radiograph
import radit
import vae
from cli import InputError

DEMO = Path(__file__).parent / "weights" / "demo"


def load_weights(folder):
    """RadiT and its VAE (None for a pixel model) from a folder that holds radit/ and vae/."""
    folder = Path(folder)
    if not (folder / "radit").is_dir():
        raise InputError(f"{folder}: no radit/ in it; weights are a folder that holds radit/ and, for latents, vae/")
    model = hub.load_model(radit.RadiT, radit.RadiTConfig, folder / "radit")
    if not model.config.vae:
        return model, None
    decoder = hub.load_model(vae.RadVAE, vae.VAEConfig, folder / "vae")
    if hub.fingerprint(folder / "vae") != model.config.vae:
        raise InputError(f"{folder / 'vae'} is not the VAE whose latents {folder / 'radit'} was trained on")
    return model, decoder


def check_covered(record, covered):
    """Refuses a field or value that the training data never held."""
    for field, value in record.items():
        if field not in covered:
            raise InputError(f"the training data of these weights says nothing of {field}; covered: {', '.join(covered)}")
        if field == "age":
            low, high = covered["age"]
            if not low <= value <= high:
                raise InputError(f"age {value:g} was not covered by the training data of these weights: {low:g} to {high:g}")
        elif value not in covered[field]:
            raise InputError(f"{field}={value} was not covered by the training data of these weights; "
                             f"covered: {', '.join(covered[field])}")


@torch.no_grad()
def generate(model, decoder, records, seeds, steps=25, guidance=2.0, solver="euler", batch=16, report=None):
    """One image for each record (dict of field -> value) and seed: (N, 1, H, W) in [-1, 1], and the number of
    velocity evaluations an image cost. `report()` is called after every evaluation of every batch."""
    cfg, device = model.config, next(model.parameters()).device
    times = flow.time_grid(steps, cfg.shift)
    images = []
    for start in range(0, len(seeds), batch):
        part = seeds[start:start + batch]
        noise = torch.stack([torch.randn(cfg.channels, *cfg.grid, generator=torch.Generator().manual_seed(seed))
                             for seed in part])                      # N C H W, drawn on the CPU: the same on any device
        condition = [x.to(device) for x in fields.encode_metadata(records[start:start + batch], cfg.datasets)]
        null = [torch.full_like(condition[0], torch.nan), torch.zeros_like(condition[1])]
        velocity = flow.guided(model, condition, null, guidance, cfg.prediction)
        x, evaluations = flow.integrate(velocity, noise.to(device), times, solver, report)  # N C H W
        images.append((decoder.decode(x) if decoder else x).clamp(-1, 1).cpu())  # N 1 H W
    return torch.cat(images), evaluations


def write_samples(out, images, records, seeds, weights):
    """OUT/0000.png ..., grid.png and metadata.csv; the table comes last, when all pictures are there."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (image, record, seed) in enumerate(zip(images, records, seeds)):
        text = {"Synthetic": "yes", "Software": "RadiT", "Weights": weights, "Seed": str(seed), "Metadata": json.dumps(record)}
        radiograph.save_image(image, out / f"{i:04}.png", text)
        rows.append([f"{i:04}.png", seed, *(record.get(field, "") for field in fields.FIELDS)])
    radiograph.save_image(radiograph.grid(images), out / "grid.png", {"Synthetic": "yes", "Software": "RadiT", "Weights": weights})
    cli.write_csv(out / "metadata.csv", ["file", "seed", *fields.FIELDS], rows)


def main():
    values = "; ".join(f"{field}: {', '.join(fields.VALUES[field])}" for field in fields.CODED[:4])
    parser = cli.Parser(description="Draw synthetic chest radiographs.",
                         epilog=f"Fields and their values. age: years; {values}; negative or positive: "
                                f"{', '.join(fields.FINDINGS)}. Weights may cover fewer, and data sets of their own.")
    parser.add_argument("--weights", type=Path, default=DEMO, help="a folder that holds radit/ and vae/")
    parser.add_argument("--n", type=cli.positive, default=16, help="how many images")
    parser.add_argument("--steps", type=cli.positive, default=25)
    parser.add_argument("--solver", choices=("euler", "heun"), default="euler")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    parser.add_argument("--batch", type=cli.positive, default=16, help="images at a time")
    for field in ("dataset", "age", "sex", "race", "view"):
        parser.add_argument(f"--{field}")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, e.g. pneumonia=positive")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()

    model, decoder = load_weights(args.weights)
    cfg = model.config
    asked = {field: getattr(args, field) for field in ("dataset", "age", "sex", "race", "view") if getattr(args, field)}
    for item in args.set:
        if "=" not in item:
            raise InputError(f"--set {item}: not of the form FIELD=VALUE, such as pneumonia=positive")
        asked |= [item.split("=", 1)]
    asked = {field: fields.parse_value(field, text, cfg.datasets) for field, text in asked.items()}
    asked = {field: value for field, value in asked.items() if value is not None}
    check_covered(asked, cfg.covered)
    if not math.isfinite(args.guidance):
        raise InputError(f"--guidance {args.guidance} is not a finite number; 1 is off")
    seeds = list(range(args.seed, args.seed + args.n))
    records = [asked or cfg.examples[seed % len(cfg.examples)] for seed in seeds]
    args.out.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    if decoder:
        decoder.to(device)
    batches = -(-args.n // args.batch)
    with tqdm(total=batches * args.steps * (2 if args.solver == "heun" else 1), unit="step") as bar:
        images, evaluations = generate(model, decoder, records, seeds, args.steps, args.guidance, args.solver, args.batch,
                                       report=bar.update)
    write_samples(args.out, images, records, seeds, args.weights.name)
    print(f"{args.n} images in {args.out}, {evaluations} velocity evaluations each; "
          f"what each was asked to show is in {args.out}/metadata.csv")


if __name__ == "__main__":
    cli.run(main)
