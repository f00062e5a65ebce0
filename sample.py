"""Metadata in, radiographs out.

    python sample.py                                              16 images from the embedded weights
    python sample.py --view PA --sex female --age 60 --set pneumonia=positive --n 4
    python sample.py --metadata table.csv --out out/cohort        one image a row; python -m causal cohort writes some
    torchrun --nproc_per_node=8 sample.py --out DIR ...           the same images, shared among GPUs

Image i depends on its metadata and on the seed SEED + i alone: it is the same in any batch, to rounding. Fields that
are not given are unknown to the model; if none is given, each image takes the metadata of one of the examples stored
with the weights. A value that the training data never held is refused. Every file is marked as synthetic. Without --out
the images get a new folder, out/sample-1, out/sample-2 and so on. With --out, the same command again continues what was
interrupted, to the same bytes; a folder that another command filled is refused.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import flow
import radit
from autoencoder import lora
from autoencoder.load import load_vae
from baselines.radunet import RadUNet, RadUNetConfig, activations
from common import cli, hub
from common.cli import InputError, RunError
from radiographs import dicom, fields, pixels
from radiographs.index import COLUMNS, index_row, read_rows

DEMO = Path(__file__).parent / "weights" / "demo"
# The defaults. 13 of Heun's steps cost what 25 of Euler's do and keep more of the fine detail; guidance 3 shows what is
# asked more surely than 2 (weights/demo/README.md, "Sharpness of the samples").
STEPS, SOLVER, GUIDANCE = 13, "heun", 3.0


# ---------------------------------------------------------------------------------------------------------
# From metadata and seeds to images in memory

def load_weights(folder):
    """RadiT and its VAE (None for a pixel model) from a folder, here or on the Hub, that holds radit/ and vae/. With
    radunet/ in place of radit/ it is the baseline.

    Both models are in eval mode and float32, on the CPU. Raises InputError if a file is missing or damaged, or the VAE
    is not the model's.
    """
    folder = Path(folder)
    if hub.find(folder, "radit/config.json"):
        model = hub.load_model(radit.RadiT, radit.RadiTConfig, folder / "radit")
        if hub.find(folder / "radit", "lora.json"):
            model.fingerprint = hub.fingerprint(hub.find(folder / "radit", "model.safetensors"))
            lora.load(model, folder / "radit")
            lora.merge(model)
    elif hub.find(folder, "radunet/config.json"):
        model = hub.load_model(RadUNet, RadUNetConfig, folder / "radunet")
    else:
        text = "no radit/ in it; weights are a folder that holds radit/ and, for latents, vae/"
        for near in (folder.parent, folder / "weights"):             # one model of a set, or the folder of a run
            if (near / "radit/config.json").is_file() or (near / "radunet/config.json").is_file():
                text = f"no radit/ in it; name {near}, which holds it"
        raise hub.not_found(folder, text)
    if not model.config.vae:
        if model.config.channels != 1:
            raise InputError(f"{folder}: made for {model.config.channels} channels but names no VAE; "
                             "a model of pixels has 1 channel")
        return model, None
    vae = load_vae(folder / "vae").to(memory_format=torch.channels_last)  # faster on a CPU
    if vae.fingerprint != model.config.vae:
        raise InputError(f"{folder / 'vae'} is not the VAE whose latents the model beside it was trained on")
    return model, vae


def store_bf16(model):
    """Converts the weights of all linear layers to bfloat16, in place, once: without gradients, autocast would convert
    them again at every evaluation. The results are the same bit for bit. For sampling under autocast only."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)


def fitting_batch(cfg, device):
    """How many images to compute at a time. On a GPU the largest power of two, at most 64, whose activations fill at
    most half of its memory: of all its memory, not of the free part, so that the same command makes the same batches.
    Elsewhere 16, since more are not faster.

    A block needs most memory in its SwiGLU: x and its norms, queries, keys and values (ten numbers of width D for each
    token), gate, value and their products, all float32, for both branches of guidance. The VAE needs less.
    """
    if device.type != "cuda":
        return 16
    numbers = activations(cfg) if isinstance(cfg, RadUNetConfig) else cfg.tokens * (10 * cfg.width + 4 * cfg.hidden)
    bytes_per_image = 2 * numbers * 4
    fitting = torch.cuda.mem_get_info(device)[1] / 2 / bytes_per_image
    return 2 ** int(math.log2(min(max(fitting, 1), 64)))


@torch.no_grad()
def generate(model, vae, records, seeds, *, steps=STEPS, guidance=GUIDANCE, solver=SOLVER, interval=(0, 1),
             bf16=None, batch=None, report=None):
    """One image for each record and seed: (N, 1, H, W) float32 in [-1, 1] on the CPU, and the number of velocity
    evaluations that each image cost (flow.count_network_calls counts the runs of the network).

    model, vae  from load_weights, on the device that is to compute
    records     N dicts of field -> value (radiographs/fields.py); a field that is absent is unknown
    seeds       N integers; each image's noise depends on its own seed alone
    guidance    its weight w; 1 is off. Used only for times in `interval`
    bf16        whether to compute in bfloat16; if None, only where that is faster than float32
    batch       images at a time; if None, fitting_batch decides
    report      a function called after every velocity evaluation of every batch
    Raises RunError for an image that is not finite.
    """
    cfg, device = model.config, next(model.parameters()).device
    bf16 = cli.fast_bf16(device) if bf16 is None else bf16
    batch = batch or fitting_batch(cfg, device)
    times = flow.time_grid(steps, cfg.shift)
    images = []
    for start in range(0, len(seeds), batch):
        part = seeds[start:start + batch]
        noise = torch.stack([torch.randn(cfg.channels, *cfg.grid, generator=torch.Generator().manual_seed(seed))
                             for seed in part])                      # N C H W, made on the CPU: the same for any device
        condition = [x.to(device) for x in fields.encode_metadata(records[start:start + batch], cfg.datasets)]
        null = [torch.full_like(condition[0], torch.nan), torch.zeros_like(condition[1])]
        velocity = flow.classifier_free_guidance(model, condition, null, guidance, cfg.prediction, interval)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x, evaluations = flow.integrate(velocity, noise.to(device), times, solver, report)  # N C H W, float32
            x = vae.decode(x) if vae else x                          # N 1 H W
        finite = x.isfinite().all(dim=(1, 2, 3)).tolist()
        if not all(finite):
            raise RunError(f"the image of seed {part[finite.index(False)]} is not finite: guidance {guidance:g} is too "
                           "strong, or the weights are damaged")
        images.append(x.float().clamp(-1, 1).cpu())
    return torch.cat(images), evaluations


# ---------------------------------------------------------------------------------------------------------
# Files: images with text fields that say how they were made, and tables

def provenance(weights, **settings):
    """What decides an image beside its metadata and its seed, a dict that every file records: name and fingerprint of
    the weights (`weights`, a folder here or on the Hub), and settings such as steps and guidance."""
    name = weights.name if weights.is_dir() else str(weights)
    model = "radit" if hub.find(weights, "radit/config.json") else "radunet"
    return {"weights": name, "fingerprint": hub.fingerprint(weights / model), **settings}


def text_fields(settings, **more):
    """The text fields of a PNG: that it is synthetic, and the settings it was made with."""
    return {"Synthetic": "yes", "Software": "RadiT",
            **{key.capitalize(): str(value) for key, value in (settings | more).items()}}


def write_image(out, name, image, record, seed, settings, as_dicom=False):
    """Writes OUT/dicom/NAME.dcm, if asked for, then OUT/images/NAME.png: where the PNG exists, all is written."""
    if as_dicom:
        words = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("weights", "fingerprint"))
        weights = f"{settings['weights']} {settings['fingerprint']}"
        dicom.write(out / f"dicom/{name}.dcm", image, record, weights, seed, words)
    pixels.save_image(image, out / f"images/{name}.png", text_fields(settings, seed=seed, metadata=json.dumps(record)))


def caption(record):
    """A record in a few words: data set, age, sex, view, and the positive findings."""
    words = [record["dataset"]] if "dataset" in record else []
    words += [f"{record['age']:g} years"] if "age" in record else []
    words += [record[field] for field in ("sex", "view") if field in record]
    words += [fields.FINDINGS[field].lower() for field in fields.FINDINGS if record.get(field) == "positive"]
    return ", ".join(words) or "nothing asked"


def write_tables(out, names, records, seeds, settings):
    """OUT/grid.png of the first 64, metadata.csv, and index.csv as a prepared source has it, so that data.py and
    metrics.py read OUT like any other. Called last, when all images are there."""
    first = torch.stack([pixels.load_image(out / f"images/{name}.png") for name in names[:64]])  # N 1 H W
    grid = pixels.grid(first, captions=[caption(record) for record in records[:64]])
    pixels.save_image(grid, out / "grid.png", text_fields(settings))
    rows = ([f"images/{name}.png", seed, *(record.get(field, "") for field in fields.FIELDS)]
            for name, record, seed in zip(names, records, seeds))
    cli.write_csv(out / "metadata.csv", ["file", "seed", *fields.FIELDS], rows)
    index = (index_row(record | {"path": f"images/{name}.png", "patient": f"synthetic-{seed}", "split": "train"})
             for name, record, seed in zip(names, records, seeds))
    cli.write_csv(out / "index.csv", COLUMNS, index)


# ---------------------------------------------------------------------------------------------------------
# A folder of images: written one by one, continued after an interruption, shared among processes

def open_folder(out, about, rank=0):
    """Prepares OUT for the images that `about` describes. Refuses a folder with any other images, since images that
    exist are not sampled again."""
    table = out / "sample.json"
    while rank and not table.exists():  # the first process checks OUT before any other writes
        time.sleep(0.1)
    if not table.exists() and any((out / "images").glob("*")):
        raise InputError(f"{out}/images holds images that this command did not write; delete them, or name "
                         "another --out")
    before = cli.read_json(table) if table.exists() else about
    for key in {**about, **before}:
        if before.get(key) != about.get(key):
            what = f"{key} = {before.get(key)}, not {about.get(key)}"
            if key == "metadata":                                    # a checksum, of no use in a message
                what = "other metadata or seeds"
            raise InputError(f"{out} holds images of another command, with {what}; name another --out")
    (out / "images").mkdir(exist_ok=True)
    if about["dicom"]:
        (out / "dicom").mkdir(exist_ok=True)
    if not table.exists():
        cli.write_json(table, about)


def sample_folder(out, model, vae, records, seeds, settings, batch=16, as_dicom=False, rank=0, world=1):
    """One image for each record and seed into the folder OUT, each written as it is made; the same call continues what
    was interrupted, to the same bytes. `settings` is what `provenance` returns. Returns how many images were missing
    and the number of velocity evaluations that each cost.

    The division into batches does not depend on which images exist, and a batch of which one image is missing is
    computed whole: its size changes results by rounding errors, which can change a pixel by one grey level. Process
    `rank` of `world` takes every world-th batch; the first waits for the others and writes the tables.
    """
    digest = hashlib.sha256(json.dumps([records, seeds]).encode()).hexdigest()[:16]
    about = settings | {"images": len(seeds), "first seed": seeds[0], "batch": batch, "dicom": as_dicom,
                        "metadata": digest}
    with cli.locked(out) if rank == 0 else contextlib.nullcontext():
        open_folder(out, about, rank)
        digits = max(4, len(str(len(seeds) - 1)))
        names = [str(i).zfill(digits) for i in range(len(seeds))]
        missing = [i for i, name in enumerate(names) if not (out / f"images/{name}.png").exists()]
        batches = sorted({i // batch for i in missing})
        mine = [number * batch for number in batches if number % world == rank]  # where this process's batches start
        evaluations = settings["steps"] * flow.SOLVERS[settings["solver"]]
        with tqdm(total=len(mine) * evaluations, unit="step", disable=rank > 0 or not mine) as bar:
            for start in mine:
                part = slice(start, start + batch)
                images, _ = generate(
                    model, vae, records[part], seeds[part], steps=settings["steps"], guidance=settings["guidance"],
                    solver=settings["solver"], interval=settings["interval"],
                    bf16=settings["precision"] == "bfloat16", batch=batch, report=bar.update)
                for item in zip(names[part], images, records[part], seeds[part]):
                    write_image(out, *item, settings, as_dicom)
        if rank == 0:
            while any(not (out / f"images/{names[i]}.png").exists() for i in missing):  # the others' batches
                time.sleep(0.5)
            write_tables(out, names, records, seeds, settings)
    return len(missing), evaluations


# ---------------------------------------------------------------------------------------------------------
# The command

# Fields that are options, with their help; --set takes any field.
FLAGS = {"dataset": "name of a data set whose images these are to resemble, such as ChestX-ray14",
         "age": f"of the patient, in years from 0 to {fields.MAX_AGE}", "sex": "of the patient: female or male",
         "race": "of the patient: asian, black or white", "view": "AP, PA (both frontal) or LATERAL"}


def parse_arguments():
    values = "; ".join(f"{field}: {', '.join(fields.VALUES[field])}" for field in fields.CODED[:4])
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                        epilog=f"Fields and their values. age: years; {values}; negative or positive: "
                               f"{', '.join(fields.FINDINGS)}. Weights may cover fewer values and other data sets; "
                               "radit/config.json in their folder lists them, under covered. Others are refused, "
                               "with those that are covered in the message.")
    parser.add_argument("--weights", type=Path, default=DEMO,
                        help="a folder that holds radit/ and vae/, or its name on the Hub; the demo if not given")
    parser.add_argument("--n", "-n", type=cli.integer(1, 1_000_000),
                        help="how many images; if not given 16, or all rows of --metadata (under torchrun write -n)")
    parser.add_argument("--steps", type=cli.integer(1, 1000), default=STEPS,
                        help=f"steps of the solver; {STEPS} if not given")
    parser.add_argument("--solver", choices=tuple(flow.SOLVERS), default=SOLVER,
                        help=f"{SOLVER} if not given; heun: two evaluations a step; euler: one, and twice the steps")
    parser.add_argument("--guidance", type=cli.number(0, 100), default=GUIDANCE,
                        help=f"weight of the metadata: 0 ignores them, 1 is no guidance; {GUIDANCE:g} if not given")
    parser.add_argument("--guidance-interval", type=cli.number(0, 1), nargs=2, default=[0, 1], metavar=("LOW", "HIGH"),
                        help="use guidance only for times from LOW to HIGH, such as 0.1 0.8, and save half of the work "
                             "elsewhere")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 62), default=0,
                        help="seed of the first image, 0 if not given; each next image has the next seed")
    parser.add_argument("--batch", type=cli.integer(1, 4096), help="images at a time; as many as fit, if not given")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="compute in bfloat16; if not given, where that is faster")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: needs a C++ compiler and a minute "
                        "or two, so it is worth it for some hundred images or more")
    for field, text in FLAGS.items():
        parser.add_argument(f"--{field}", help=text)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="any field, such as pneumonia=positive")
    parser.add_argument("--metadata", type=Path, metavar="FILE.csv",
                        help="one image for each row; columns as in metadata.csv or index.csv")
    parser.add_argument("--dicom", action="store_true", help="write OUT/dicom/*.dcm beside the PNGs")
    parser.add_argument("--out", type=cli.new_path, help="a folder; a new one in out/, if not given")
    args = parser.parse_args()
    low, high = args.guidance_interval
    if low > high:
        raise InputError(f"--guidance-interval {low:g} {high:g}: not two times from 0 to 1, the lower one first")
    if args.guidance == 1 and args.guidance_interval != [0, 1]:
        raise InputError("--guidance-interval: --guidance 1 is off, so there is nothing to confine to an interval")
    return args


def requested_images(args, cfg):
    """The record and the seed of each image that the options ask for, and notes: sentences about fields that were
    changed or left unknown, and values that were never trained together."""
    given = {field: getattr(args, field) for field in FLAGS if getattr(args, field) is not None}
    for field, text in given.items():
        if not text.strip():
            raise InputError(f"--{field} is empty; leave it out, or give unknown")
    items = [f"{field}={text}" for field, text in given.items()] + args.set
    asked = fields.parse_items(items, "--set", cfg.datasets)
    fields.check_covered(asked, cfg.covered)
    if args.metadata:
        records, row_seeds = read_rows(args.metadata, cfg.datasets, cfg.covered)
        count = args.n or len(records)
        if count > len(records):
            raise InputError(f"--n {count}: {args.metadata} has {cli.count(len(records), 'row')}")
        records = [record | asked for record in records[:count]]
        seeds = [args.seed + i if seed is None else seed for i, seed in enumerate(row_seeds[:count])]
    else:
        seeds = list(range(args.seed, args.seed + (args.n or 16)))
        examples = cfg.examples or [{}]                              # trained without any metadata
        records = [asked if items else examples[seed % len(examples)] for seed in seeds]
    resolved = [fields.resolve_request(record) for record in records]
    records = [record for record, _ in resolved]
    notes = sorted({note for _, of_record in resolved for note in of_record})[:5]
    covered = fields.only_covered(records, cfg.covered)
    if left_out := fields.list_left_out(records, covered):
        notes.append(f"left unknown, because these weights were not trained on it: {left_out}")
    if items or args.metadata:
        apart = Counter(fields.never_together(record, cfg.pairs) for record in covered)
        notes += [f"{cli.count(number, 'image')}: no training image had {' and '.join(pair)} together"
                  for pair, number in apart.most_common(6) if pair]
    return covered, seeds, notes


def main():
    args = parse_arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not args.out:
        raise InputError("--out is needed where several processes share the work")
    model, vae = load_weights(args.weights)
    records, seeds, notes = requested_images(args, model.config)
    for note in notes:
        if rank == 0:
            print(note)
    device, fast = cli.pick_device()
    model.to(device)
    if vae:
        vae.to(device)
    if args.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    bf16 = fast if args.bf16 is None else args.bf16
    if bf16:
        store_bf16(model)
    settings = provenance(args.weights, steps=args.steps, solver=args.solver, guidance=args.guidance,
                          interval=args.guidance_interval, precision="bfloat16" if bf16 else "float32")
    batch = args.batch or fitting_batch(model.config, device)
    out = args.out or cli.new_folder("sample")
    made, evaluations = sample_folder(out, model, vae, records, seeds, settings, batch, args.dicom, rank, world)
    if rank == 0:
        times = flow.time_grid(args.steps, model.config.shift)
        calls = flow.count_network_calls(times, args.solver, args.guidance, args.guidance_interval)
        print(f"{cli.count(len(seeds), 'image')} in {out}, {made} of them made now, "
              f"{cli.count(evaluations, 'velocity evaluation')} and {cli.count(calls, 'network call')} each; "
              f"{out}/grid.png shows them, {out}/metadata.csv lists what each was asked to show")


if __name__ == "__main__":
    cli.run(main)
