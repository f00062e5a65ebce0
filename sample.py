"""Metadata in, radiographs out.

    python sample.py                                              16 pictures from the embedded weights
    python sample.py --view PA --sex female --age 60 --set pneumonia=positive --n 4 --out out/women
    python sample.py --causal --do cardiomegaly=positive          whole patients of the causal model, one field set

Image i is drawn from the seed SEED + i alone: the same seed and metadata give the same picture in any batch, to rounding. Fields
that are not given are unknown to the model; with none given at all, each image asks for the metadata of an example
that config.json holds. A value that the training data never covered is refused. Every file says that it is synthetic.
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import causal
import cli
import data
import dicom
import fields
import flow
import hub
import radiograph
import radit
import vae
from cli import InputError

DEMO = Path(__file__).parent / "weights" / "demo"


def load_weights(folder):
    """RadiT and its VAE (None for a pixel model) from a folder, here or on the Hub, that holds radit/ and vae/."""
    folder = Path(folder)
    if not hub.find(folder, "radit/config.json"):
        raise InputError(f"{folder}: no radit/ in it; weights are a folder that holds radit/ and, for latents, vae/")
    model = hub.load_model(radit.RadiT, radit.RadiTConfig, folder / "radit")
    if not model.config.vae:
        return model, None
    decoder = vae.load(folder / "vae")
    if decoder.fingerprint != model.config.vae:
        raise InputError(f"{folder / 'vae'} is not the VAE whose latents {folder / 'radit'} was trained on")
    return model, decoder


def uncovered(field, value, covered):
    """Why the weights cannot be asked for field = value: the training data never held it. None if they can."""
    if field not in covered:
        return f"the training data of these weights says nothing of {field}; covered: {', '.join(covered)}"
    if field == "age":
        low, high = covered["age"]
        return None if low <= value <= high else f"age {value:g} was not covered by the training data of these weights: {low:g} to {high:g}"
    if value not in covered[field]:
        return f"{field}={value} was not covered by the training data of these weights; covered: {', '.join(covered[field])}"


def check_covered(record, covered):
    """Refuses a field or value that the training data never held."""
    for item in record.items():
        if reason := uncovered(*item, covered):
            raise InputError(reason)


def only_covered(records, covered):
    """The records without what the training data never held, which the model can only be asked for as unknown."""
    return [{field: value for field, value in record.items() if not uncovered(field, value, covered)} for record in records]


def patients(folder, do, n, seed, covered):
    """n records from a causal model under the interventions `do` ("FIELD=VALUE", ...)."""
    model = causal.load(folder)
    do = causal.parse_do(do, model)
    check_covered(do, covered)
    return causal.sample(model, n, do, seed)


def fitting_batch(cfg, device):
    """How many images at a time: on a CPU 16, where more are no faster; on a GPU the largest power of two, at most 64, whose
    activations fill at most half of the free memory. A block holds most in its SwiGLU: x and its norms, queries, keys and
    values (ten widths a token), gate, value and their products, all float32, for both branches. The VAE works in slices."""
    if device.type == "cpu":
        return 16
    bytes_an_image = 2 * cfg.tokens * (10 * cfg.width + 4 * cfg.hidden) * 4
    return 2 ** int(math.log2(min(max(torch.cuda.mem_get_info(device)[0] / 2 / bytes_an_image, 1), 64)))


@torch.no_grad()
def generate(model, decoder, records, seeds, steps=25, guidance=2.0, solver="euler", batch=None, report=None, interval=(0, 1),
             bf16=None):
    """One image for each record (dict of field -> value) and seed: (N, 1, H, W) in [-1, 1], and the number of
    velocity evaluations an image cost. `report()` is called after every evaluation of every batch; guidance acts for
    times in `interval`; `bf16` None is yes where the device multiplies bfloat16 faster. flow.passes counts what was run."""
    cfg, device = model.config, next(model.parameters()).device
    times = flow.time_grid(steps, cfg.shift)
    batch = batch or fitting_batch(cfg, device)
    images = []
    for start in range(0, len(seeds), batch):
        part = seeds[start:start + batch]
        noise = torch.stack([torch.randn(cfg.channels, *cfg.grid, generator=torch.Generator().manual_seed(seed))
                             for seed in part])                      # N C H W, drawn on the CPU: the same on any device
        condition = [x.to(device) for x in fields.encode_metadata(records[start:start + batch], cfg.datasets)]
        null = [torch.full_like(condition[0], torch.nan), torch.zeros_like(condition[1])]
        velocity = flow.guided(model, condition, null, guidance, cfg.prediction, interval)
        with torch.autocast(device.type, torch.bfloat16, enabled=cli.fast_bf16(device) if bf16 is None else bf16):
            x, evaluations = flow.integrate(velocity, noise.to(device), times, solver, report)  # N C H W, float32
            x = decoder.decode(x) if decoder else x                  # N 1 H W
        images.append(x.float().clamp(-1, 1).cpu())
    return torch.cat(images), evaluations


def how_drawn(weights, **settings):
    """What decides a picture beside its metadata and its seed, as every file of it says: a name and the fingerprint of the
    weights (`weights`, a folder here or on the Hub), and settings such as steps and guidance."""
    name = weights.name if weights.is_dir() else str(weights)
    return {"weights": name, "fingerprint": hub.fingerprint(weights / "radit"), **settings}


def text_fields(how, **more):
    """The text fields of a PNG: that it is synthetic, and what decided it."""
    return {"Synthetic": "yes", "Software": "RadiT", **{key.capitalize(): str(value) for key, value in (how | more).items()}}


def write_image(out, name, image, record, seed, how, as_dicom=False):
    """OUT/images/NAME.png, and before it OUT/dicom/NAME.dcm: where the PNG is, the image is there whole."""
    if as_dicom:
        words = ", ".join(f"{key} {value}" for key, value in how.items() if key not in ("weights", "fingerprint"))
        dicom.write(out / f"dicom/{name}.dcm", image, record, f"{how['weights']} {how['fingerprint']}", seed, words)
    radiograph.save_image(image, out / f"images/{name}.png", text_fields(how, seed=seed, metadata=json.dumps(record)))


def write_samples(out, images, records, seeds, weights):
    """OUT/images/0000.png ..., grid.png, metadata.csv, and index.csv as a prepared source has it, so that data.py, metrics.py
    and classifier.py read OUT like any other. The tables come last, when all pictures are there."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows, index = [], []
    for i, (image, record, seed) in enumerate(zip(images, records, seeds)):
        text = {"Synthetic": "yes", "Software": "RadiT", "Weights": weights, "Seed": str(seed), "Metadata": json.dumps(record)}
        name = f"images/{i:04}.png"
        radiograph.save_image(image, out / name, text)
        rows.append([name, seed, *(record.get(field, "") for field in fields.FIELDS)])
        index.append(data.index_row(record | {"path": name, "patient": f"synthetic-{seed}", "split": "train"}))
    radiograph.save_image(radiograph.grid(images), out / "grid.png", {"Synthetic": "yes", "Software": "RadiT", "Weights": weights})
    cli.write_csv(out / "metadata.csv", ["file", "seed", *fields.FIELDS], rows)
    cli.write_csv(out / "index.csv", data.COLUMNS, index)


def records_like(folders, splits, count, seed):
    """The metadata of `count` rows of real indices, in an order that depends on the seed; all are used before any twice."""
    rows = [record for folder in folders for record in data.read_index(folder) if not splits or record["split"] in splits]
    if not rows:
        raise InputError(f"{', '.join(map(str, folders))}: no row in the split {' or '.join(splits)}")
    order = [i for n in range(-(-count // len(rows))) for i in random.Random(seed + n).sample(range(len(rows)), len(rows))]
    return [{field: rows[i][field] for field in fields.FIELDS if field in rows[i]} for i in order[:count]]


def main():
    if sys.argv[1:2] == ["serve"]:
        import serve  # which imports this file
        return serve.main(sys.argv[2:])
    values = "; ".join(f"{field}: {', '.join(fields.VALUES[field])}" for field in fields.CODED[:4])
    parser = cli.Parser(description="Draw synthetic chest radiographs.",
                         epilog=f"Fields and their values. age: years; {values}; negative or positive: "
                                f"{', '.join(fields.FINDINGS)}. Weights may cover fewer, and data sets of their own.")
    parser.add_argument("--weights", type=Path, default=DEMO,
                        help="a folder that holds radit/ and vae/, or its name on the Hub")
    parser.add_argument("--n", type=cli.positive, default=16, help="how many images")
    parser.add_argument("--steps", type=cli.positive, default=25)
    parser.add_argument("--solver", choices=("euler", "heun"), default="euler")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0, 1), metavar=("LOW", "HIGH"),
                        help="guide only for t in it, such as 0.1 0.8: elsewhere half the work is saved")
    parser.add_argument("--batch", type=cli.positive, help="images at a time; as many as fit, if not given")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16; where it is faster, if not given")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which takes a C++ compiler and about a "
                        "minute: pays from some thousand images on")
    for field in ("dataset", "age", "sex", "race", "view"):
        parser.add_argument(f"--{field}")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, e.g. pneumonia=positive")
    parser.add_argument("--like", nargs="+", type=Path, help="ask for the metadata of rows of these prepared sources")
    parser.add_argument("--split", nargs="+", choices=data.SPLITS, help="of --like")
    parser.add_argument("--causal", type=Path, nargs="?", const=DEMO / "causal", metavar="MODEL",
                        help="draw whole patients from a causal model; without MODEL from the embedded one")
    parser.add_argument("--do", action="append", default=[], metavar="FIELD=VALUE", help="with --causal: intervene")
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
    if not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] <= 1:
        raise InputError("--guidance-interval {:g} {:g}: not two times from 0 to 1, the lower one first".format(*args.guidance_interval))
    seeds = list(range(args.seed, args.seed + args.n))
    records = [asked or cfg.examples[seed % len(cfg.examples)] for seed in seeds]
    if args.do and not args.causal:
        raise InputError("--do intervenes on a causal model: give --causal too, or --set for a mere wish")
    if args.causal and (asked or args.like):
        raise InputError("--causal draws every field itself; set one by --do, without --like")
    if args.causal or args.like:
        if args.causal:
            records = patients(args.causal, args.do, args.n, args.seed, cfg.covered)
        else:
            records = [record | asked for record in records_like(args.like, args.split, args.n, args.seed)]
        wanted, records = records, only_covered(records, cfg.covered)
        if wanted != records:
            print(f"{sum(map(len, wanted)) - sum(map(len, records))} of {sum(map(len, wanted))} values were not covered in the "
                  f"training of these weights and stay unknown")
    args.out.mkdir(parents=True, exist_ok=True)

    device, _ = cli.pick_device()
    model.to(device)
    if decoder:
        decoder.to(device)
    if args.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    batch = args.batch or fitting_batch(cfg, device)
    with tqdm(total=-(-args.n // batch) * args.steps * (2 if args.solver == "heun" else 1), unit="step") as bar:
        images, evaluations = generate(model, decoder, records, seeds, args.steps, args.guidance, args.solver, batch, bar.update,
                                       args.guidance_interval, args.bf16)
    passes = flow.passes(flow.time_grid(args.steps, cfg.shift), args.solver, args.guidance, args.guidance_interval)
    write_samples(args.out, images, records, seeds, args.weights.name)
    print(f"{args.n} images in {args.out}, {evaluations} velocity evaluations and {passes} passes of the network each; "
          f"what each was asked to show is in {args.out}/metadata.csv")


if __name__ == "__main__":
    cli.run(main)
