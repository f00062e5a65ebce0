"""Metadata in, radiographs out.

    python sample.py                                              16 pictures from the embedded weights
    python sample.py --view PA --sex female --age 60 --set pneumonia=positive --n 4 --out out/women
    python sample.py --metadata cohort.csv                        one image a row of a table; python -m causal cohort writes some
    torchrun --nproc_per_node=8 sample.py ...                     the same images, shared among GPUs

Image i is drawn from the seed SEED + i alone: the same seed and metadata give the same picture in any batch, to rounding. Fields
that are not given are unknown to the model; with none given at all, each image asks for the metadata of an example
that config.json holds. A value that the training data never covered is refused. Every file says that it is synthetic.
The same command again continues what was interrupted, to the same bytes; another command's folder is refused.
"""
import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

import flow
import radit
from autoencoder.load import load_vae
from common import cli, hub
from common.cli import InputError
from radiographs import dicom, fields, pixels
from radiographs.index import COLUMNS, index_row, read_rows

DEMO = Path(__file__).parent / "weights" / "demo"


def load_weights(folder):
    """RadiT and its VAE (None for a pixel model) from a folder, here or on the Hub, that holds radit/ and vae/."""
    folder = Path(folder)
    if not hub.find(folder, "radit/config.json"):
        raise InputError(f"{folder}: no radit/ in it; weights are a folder that holds radit/ and, for latents, vae/")
    model = hub.load_model(radit.RadiT, radit.RadiTConfig, folder / "radit")
    if not model.config.vae:
        return model, None
    decoder = load_vae(folder / "vae")
    if decoder.fingerprint != model.config.vae:
        raise InputError(f"{folder / 'vae'} is not the VAE whose latents {folder / 'radit'} was trained on")
    return model, decoder


def fitting_batch(cfg, device):
    """How many images at a time: on a CPU 16, where more are no faster; on a GPU the largest power of two, at most 64, whose
    activations fill at most half of the memory (of all of it: the same command again makes the same batches). A block holds
    most in its SwiGLU: x and its norms, queries, keys and values (ten widths a token), gate, value and their products, all
    float32, for both branches of guidance. The VAE works in slices."""
    if device.type == "cpu":
        return 16
    bytes_an_image = 2 * cfg.tokens * (10 * cfg.width + 4 * cfg.hidden) * 4
    return 2 ** int(math.log2(min(max(torch.cuda.mem_get_info(device)[1] / 2 / bytes_an_image, 1), 64)))


@torch.no_grad()
def generate(model, decoder, records, seeds, steps=25, guidance=2.0, solver="euler", batch=None, report=None, interval=(0, 1),
             bf16=None):
    """One image for each record (dict of field -> value) and seed: (N, 1, H, W) in [-1, 1], and the number of
    velocity evaluations an image cost. `report()` is called after every evaluation of every batch; guidance acts for
    times in `interval`; `bf16` None is yes where the device multiplies bfloat16 faster. flow.count_network_calls counts what was run."""
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
        velocity = flow.classifier_free_guidance(model, condition, null, guidance, cfg.prediction, interval)
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
    pixels.save_image(image, out / f"images/{name}.png", text_fields(how, seed=seed, metadata=json.dumps(record)))


def write_tables(out, names, records, seeds, how):
    """OUT/grid.png of the first 64, metadata.csv, and index.csv as a prepared source has it, so that data.py, metrics.py and
    classifier.py read OUT like any other. They come last, when all pictures are there."""
    first = torch.stack([pixels.load_image(out / f"images/{name}.png") for name in names[:64]])  # N 1 H W
    pixels.save_image(pixels.grid(first), out / "grid.png", text_fields(how))
    rows = ([f"images/{name}.png", seed, *(record.get(field, "") for field in fields.FIELDS)]
            for name, record, seed in zip(names, records, seeds))
    cli.write_csv(out / "metadata.csv", ["file", "seed", *fields.FIELDS], rows)
    index = (index_row(record | {"path": f"images/{name}.png", "patient": f"synthetic-{seed}", "split": "train"})
             for name, record, seed in zip(names, records, seeds))
    cli.write_csv(out / "index.csv", COLUMNS, index)


def open_folder(out, about, rank=0):
    """Makes OUT ready for the pictures that `about` describes. Refuses one that holds pictures of anything else, or unknown ones:
    what is there already will not be drawn again."""
    table = out / "sample.json"
    out.mkdir(parents=True, exist_ok=True)
    while rank and not table.exists():  # the first process looks before anybody writes
        time.sleep(0.1)
    if not table.exists() and any((out / "images").glob("*")):
        raise InputError(f"{out}/images holds pictures that this command did not draw; delete them, or name another --out")
    before = json.loads(table.read_text()) if table.exists() else about
    for key in {**about, **before}:
        if before.get(key) != about.get(key):
            what = "other metadata or seeds" if key == "metadata" else f"{key} = {before.get(key)}, not {about.get(key)}"
            raise InputError(f"{out} holds pictures of another command, with {what}; name another --out")
    for folder in ["images"] + ["dicom"] * about["dicom"]:
        (out / folder).mkdir(exist_ok=True)
    if not table.exists():
        cli.write_json(table, about)


def draw(out, model, decoder, records, seeds, how, batch=16, as_dicom=False, rank=0, world=1):
    """Draws one image for each record and seed into OUT and writes each as it is made; the same call continues what was
    interrupted, to the same bytes. Returns how many images were drawn now and the velocity evaluations each cost.

    Batches begin at every batch-th image whatever is there already, and a batch of which one image is missing is drawn
    whole: its size moves results by a rounding error, which can move a pixel by one level. Process `rank` of `world` takes
    every world-th batch; the first waits for the others and writes the tables.
    """
    digest = hashlib.sha256(json.dumps([records, seeds]).encode()).hexdigest()[:16]
    open_folder(out, how | {"images": len(seeds), "first seed": seeds[0], "batch": batch, "dicom": as_dicom, "metadata": digest}, rank)
    names = [f"{i:0{max(4, len(str(len(seeds) - 1)))}}" for i in range(len(seeds))]
    missing = [i for i, name in enumerate(names) if not (out / f"images/{name}.png").exists()]
    mine = [start for start in sorted({i // batch * batch for i in missing}) if start // batch % world == rank]
    steps = how["steps"] * (2 if how["solver"] == "heun" else 1)
    with tqdm(total=len(mine) * steps, unit="step", disable=rank > 0 or not mine) as bar:
        for start in mine:
            part = slice(start, start + batch)
            images, _ = generate(model, decoder, records[part], seeds[part], how["steps"], how["guidance"], how["solver"], batch, bar.update,
                                 how["interval"], how["precision"] == "bfloat16")
            for item in zip(names[part], images, records[part], seeds[part]):
                write_image(out, *item, how, as_dicom)
    while rank == 0 and any(not (out / f"images/{names[i]}.png").exists() for i in missing):  # the other processes' share
        time.sleep(0.5)
    if rank == 0:
        write_tables(out, names, records, seeds, how)
    return len(missing), steps


def main():
    values = "; ".join(f"{field}: {', '.join(fields.VALUES[field])}" for field in fields.CODED[:4])
    parser = cli.Parser(description="Draw synthetic chest radiographs.",
                         epilog=f"Fields and their values. age: years; {values}; negative or positive: "
                                f"{', '.join(fields.FINDINGS)}. Weights may cover fewer, and data sets of their own.")
    parser.add_argument("--weights", type=Path, default=DEMO,
                        help="a folder that holds radit/ and vae/, or its name on the Hub")
    parser.add_argument("-n", "--n", type=cli.positive, help="how many images: 16, or all rows of --metadata; under torchrun -n")
    parser.add_argument("--steps", type=cli.positive, default=25)
    parser.add_argument("--solver", choices=("euler", "heun"), default="euler")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=[0, 1], metavar=("LOW", "HIGH"),
                        help="guide only for t in it, such as 0.1 0.8: elsewhere half the work is saved")
    parser.add_argument("--batch", type=cli.positive, help="images at a time; as many as fit, if not given")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16; where it is faster, if not given")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which takes a C++ compiler and a minute "
                        "or two: pays from some hundred images on")
    for field in ("dataset", "age", "sex", "race", "view"):
        parser.add_argument(f"--{field}")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, e.g. pneumonia=positive")
    parser.add_argument("--metadata", type=Path, metavar="FILE.csv", help="one image a row; columns as in metadata.csv or index.csv")
    parser.add_argument("--dicom", action="store_true", help="write OUT/dicom/*.dcm beside the PNGs")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *_: None
    model, decoder = load_weights(args.weights)
    cfg = model.config
    asked = {field: getattr(args, field) for field in ("dataset", "age", "sex", "race", "view") if getattr(args, field)}
    asked = {field: fields.parse_value(field, text, cfg.datasets) for field, text in asked.items()}
    asked = fields.drop_unknown(asked) | fields.parse_items(args.set, "--set", cfg.datasets)
    fields.check_covered(asked, cfg.covered)
    if not math.isfinite(args.guidance):
        raise InputError(f"--guidance {args.guidance} is not a finite number; 1 is off")
    if not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] <= 1:
        raise InputError("--guidance-interval {:g} {:g}: not two times from 0 to 1, the lower one first".format(*args.guidance_interval))
    if not 0 <= args.seed < 2 ** 62:
        raise InputError(f"--seed {args.seed} is not from 0 to 2^62")

    seeds = list(range(args.seed, args.seed + (args.n or 16)))
    if args.metadata:
        records, own = read_rows(args.metadata, cfg.datasets, cfg.covered)
        records = [record | asked for record in records[:args.n]]
        seeds = [args.seed + i if seed is None else seed for i, seed in enumerate(own[:args.n])]
    else:
        examples = cfg.examples or [{}]                              # trained without any metadata
        records = [asked or examples[seed % len(examples)] for seed in seeds]
    records, notes = zip(*map(fields.resolve_request, records))
    for note in sorted(set().union(*notes))[:5]:
        say(note)
    wanted, records = list(records), fields.only_covered(records, cfg.covered)
    if wanted != records:
        say(f"{sum(map(len, wanted)) - sum(map(len, records))} of {sum(map(len, wanted))} values were not covered in the "
            f"training of these weights and stay unknown")

    device, fast = cli.pick_device()
    model.to(device)
    if decoder:
        decoder.to(device)
    if args.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    bf16 = fast if args.bf16 is None else args.bf16
    how = how_drawn(args.weights, steps=args.steps, solver=args.solver, guidance=args.guidance, interval=args.guidance_interval,
                    precision="bfloat16" if bf16 else "float32")
    drawn, evaluations = draw(args.out, model, decoder, records, seeds, how, args.batch or fitting_batch(cfg, device), args.dicom, rank, world)
    passes = flow.count_network_calls(flow.time_grid(args.steps, cfg.shift), args.solver, args.guidance, args.guidance_interval)
    say(f"{len(seeds)} images in {args.out}, {drawn} of them drawn now, {evaluations} velocity evaluations and {passes} passes of the network "
        f"each; what each was asked to show is in {args.out}/metadata.csv")


if __name__ == "__main__":
    cli.run(main)
