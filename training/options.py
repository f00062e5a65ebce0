"""The options of train.py: what can be set, its default, what is accepted and what it does."""
import argparse
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import radit
from baselines import radunet
from common import cli
from encoders.perceptual import FLOW_WEIGHT, PUBLISHED_WEIGHT
from training import float8, parallel
from training.log import LOGGERS, check_logger


def option(default, kind, text, choices=None):
    """A field of TrainConfig and the option of the same name: default, argparse type, help, accepted values."""
    return field(default=default, metadata={"type": kind, "help": text, "choices": choices})


@dataclass
class TrainConfig:
    images: int = option(1_000_000, cli.integer(1, 10 ** 12), "stop after this many images seen")
    batch: int = option(16, cli.integer(1, 10 ** 6), "images in each step, over all processes")
    lr: float = option(None, cli.number(1e-12, 1),
                       "learning rate after the warm-up; if not given, 0.001 for the VAE, 0.001 x 256 / width "
                       "for RadiT, and a tenth of it with --init")
    optimizer: str = option("adamw", str, "muon: the matrices of the blocks take Muon's steps, all else AdamW's",
                            ("adamw", "muon"))
    warmup: int = option(8_000, cli.integer(0, 10 ** 12), "images over which the learning rate rises from 0")
    cooldown: int = option(0, cli.integer(0, 10 ** 12), "images at the end over which the learning rate falls to 0")
    clip: float = option(1.0, cli.number(1e-6, 1e6), "largest norm of the gradient; larger ones are scaled down to it")
    ema: tuple = option((20_000,), cli.integers(1, 10 ** 12),
                        "half-lives of the averages of the weights that are kept, in images, separated by commas; at "
                        "most a twentieth of the images seen")
    log_every: int = option(128, cli.positive, "steps between lines of the log")
    save_every: int = option(512, cli.positive, "steps between saves: checkpoint, held-out loss, preview")
    keep: int = option(2, cli.integer(1, 1000), "how many checkpoints to keep")
    accumulate: int = option(1, cli.integer(1, 10 ** 6),
                             "parts into which each step is cut, computed one after another to need less memory")
    seed: int = option(0, cli.integer(0, 2 ** 62),
                       "seed of the initial weights, the order of images, noise, times and dropout")
    logger: str = option(None, str, "send the log's numbers there too, if that package is installed", LOGGERS)


RADIT_EXAMPLES = """
examples:
  python train.py radit --data data/nih --latents runs/latents --vae runs/vae/weights/vae --size XS --out runs/radit
  python train.py radit --data data/mine --latents runs/mine --init weights/demo --out runs/finetuned
  torchrun --nproc_per_node=8 train.py radit --data data/* --pixels --patch 32 --size L --accumulate 4 --out runs/pixels
"""
VAE_EXAMPLES = """
examples:
  python train.py vae --data data/nih --widths 16,32,64,128 --layers 1 --groups 8 --latent-channels 8 --out runs/vae
  python train.py vae --data data/nih --base black-forest-labs/FLUX.2-klein-4B --lora-rank 32 --out runs/lora
"""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None, as one types them, and keeps the lines of the examples."""

    def _get_help_string(self, action):
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return action.help if action.default is None else super()._get_help_string(action)


def add_common_options(p, default):
    p.add_argument("--data", nargs="+", required=True, help="prepared sources")
    p.add_argument("--out", type=cli.new_path, required=True, help="the run's folder")
    for part in fields(TrainConfig):
        p.add_argument(f"--{part.name.replace('_', '-')}", default=getattr(default, part.name), **part.metadata)


def add_radit_options(p):
    p.add_argument("--init", type=Path,
                   help="fine-tune these weights: a folder that holds radit/, or a name on the Hub")
    p.add_argument("--lora-rank", type=cli.integer(1, 10 ** 4), help="with --init: train adapters of this rank only")
    p.add_argument("--lora-alpha", type=cli.number(1e-6, 1e6),
                   help="adapters are scaled by alpha / rank; if not given, alpha is the rank")
    p.add_argument("--model", choices=("radit", "radunet"), default="radit", help="RadiT, or the paper's baseline")
    p.add_argument("--size", choices=tuple(radit.SIZES | radunet.SIZES),
                   help="see python radit.py and python -m baselines.radunet; B if not given")
    space = p.add_mutually_exclusive_group(required=True)
    space.add_argument("--latents", type=Path, help="cached latents, made by python -m autoencoder encode")
    space.add_argument("--pixels", action="store_true", help="no VAE: patches of pixels")
    p.add_argument("--vae", type=Path, help="the VAE of the latents, for previews")
    p.add_argument("--patch", type=cli.integer(1, 4096),
                   help="with --pixels: side of a token in pixels, 16 (radunet: 8) if not given")
    p.add_argument("--prediction", choices=("velocity", "data"),
                   help="what the network predicts, see flow.py; velocity for latents and data for pixels if not given")
    p.add_argument("--encoder", type=Path,
                   help="with --pixels: a perceptual loss on the predicted image too, in the last layer of this "
                        "encoder: microsoft/rad-dino or weights/demo/classifier; in a short race on a CPU FDD was "
                        "lower with it, sharpness was not better (benchmarks/results/pixels-perceptual-cpu.txt)")
    p.add_argument("--perceptual-weight", type=cli.number(0, 1e6),
                   help=f"with --encoder: weight of the perceptual loss; {FLOW_WEIGHT} as published if not given")
    p.add_argument("--shift", type=cli.number(0.01, 100),
                   help="time shift of flow.py: above 1 towards noise, for many tokens; 1 if not given")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=bool(shutil.which("g++")),
                   help="compile each block, which needs a C++ compiler")
    p.add_argument("--recompute", action="store_true",
                   help="compute activations again in the backward pass instead of keeping them: a quarter of the "
                        "memory for a sixth more operations if compiled, otherwise less memory for a third more")
    p.add_argument("--fp8", action="store_true",
                   help="compute the blocks' matrix products in float8, which needs torchao, --compile and a GPU of "
                        "compute capability 8.9 or later")
    p.add_argument("--fsdp", action="store_true", help="split weights, moments and averages among torchrun's processes")
    p.add_argument("--changed-labels", action="store_true",
                   help="continue a run although labels of its images were corrected")
    p.add_argument("--dry-run", type=cli.integer(1, 10 ** 5), nargs="?", const=1, metavar="PROCESSES",
                   help="check everything, print what would run on that many processes, and end")


def add_vae_options(p):
    p.add_argument("--widths", type=cli.integers(1, 10 ** 4),
                   help="channels of each level, finest first; 128,256,512,512 if not given")
    p.add_argument("--layers", type=cli.integer(1, 100), help="residual blocks of each level; 2 if not given")
    p.add_argument("--groups", type=cli.integer(1, 10 ** 4), help="groups of GroupNorm; 32 if not given")
    p.add_argument("--latent-channels", type=cli.integer(1, 10 ** 4),
                   help="channels of the latent, before 2x2 cells are joined; 32 if not given; with --init at least "
                        "the base's")
    p.add_argument("--channels", type=cli.integer(1, 3), choices=(1, 3),
                   help="channels of the image, 1 if not given; 3 repeats the grey image")
    p.add_argument("--crop", type=cli.integer(1, 10 ** 4),
                   help="train on one random square of each image, with sides of so many pixels")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=bool(shutil.which("g++")),
                   help="with --crop and in float32: compile the model, which needs a C++ compiler")
    p.add_argument("--kl-weight", type=cli.number(0, 1e6), default=3e-4, help="weight of the loss's KL term")
    p.add_argument("--encoder", type=Path,
                   help="microsoft/rad-dino or weights/demo/classifier: for held-out measures and the perceptual loss")
    p.add_argument("--perceptual-weight", type=cli.number(0, 1e6),
                   help=f"with --encoder: weight of the perceptual loss; {PUBLISHED_WEIGHT:.2f} as published if not "
                        "given, 0 only measures it")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, help="continue from these weights: a VAE's folder, or its name on the Hub")
    start.add_argument("--base", type=Path,
                       help="train a LoRA on the decoder of this VAE, such as black-forest-labs/FLUX.2-klein-4B")
    p.add_argument("--lora-rank", type=cli.integer(1, 10 ** 4),
                   help="with --base: rank of the adapters; 32 if not given")
    p.add_argument("--lora-alpha", type=cli.number(1e-6, 1e6),
                   help="adapters are scaled by alpha / rank; if not given, alpha is the rank")


# Options that the weights given with --init decide.
FROM_BASE = {"vae": ("channels", "widths", "layers", "groups"), "radit": ("size", "patch", "prediction", "shift")}


def read_options():
    """The options that train.py was given, and those of every training as TrainConfig. Ends the program, before
    anything is read or written, if they do not go together."""
    parser = cli.Parser(description="Train Rad-VAE or RadiT; the same command again continues.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("vae", help="Rad-VAE, or a LoRA on one, from images", formatter_class=Help,
                            epilog=VAE_EXAMPLES)
    add_common_options(p, TrainConfig())
    add_vae_options(p)
    p = commands.add_parser("radit", help="RadiT from cached latents or pixels", formatter_class=Help,
                            epilog=RADIT_EXAMPLES)
    add_common_options(p, TrainConfig(batch=64, ema=(20_000, 100_000), warmup=20_000))
    add_radit_options(p)
    args = parser.parse_args()
    cfg = TrainConfig(**{part.name: getattr(args, part.name) for part in fields(TrainConfig)})
    check_logger(cfg.logger)
    if args.init:
        for name in FROM_BASE[args.command]:
            if getattr(args, name) is not None:
                parser.error(f"--{name} {getattr(args, name)}: with --init it is that of the weights; leave it out")
    if args.command == "radit":
        check_radit_options(parser, args)
    elif args.base:
        args.lora_rank = args.lora_rank or 32
    elif args.lora_rank:
        parser.error(f"--lora-rank {args.lora_rank}: adapters change a trained VAE; name it with --base")
    elif args.lora_alpha:
        parser.error(f"--lora-alpha {args.lora_alpha:g} scales adapters; it needs --base")
    if args.perceptual_weight is None:
        args.perceptual_weight = PUBLISHED_WEIGHT if args.command == "vae" else FLOW_WEIGHT
    elif not args.encoder:
        parser.error(f"--perceptual-weight {args.perceptual_weight:g}: no perceptual loss without --encoder; give that "
                     "too")
    if args.command == "vae" or not args.dry_run:
        parallel.micro_batch(cfg.batch, cfg.accumulate)
    return args, cfg


def check_radit_options(parser, args):
    if args.model == "radunet":
        for name in ("init", "dry_run", "fp8"):
            if getattr(args, name):
                parser.error(f"--model radunet: --{name.replace('_', '-')} works for RadiT only")
        if args.optimizer == "muon":                                 # its matrices are not in blocks by name
            parser.error("--model radunet: --optimizer muon works for RadiT only")
    if args.lora_rank and not args.init:
        parser.error(f"--lora-rank {args.lora_rank}: adapters change trained weights; name these with --init")
    if args.lora_alpha and not args.lora_rank:
        parser.error(f"--lora-alpha {args.lora_alpha:g} scales adapters; it needs --lora-rank")
    if args.pixels and args.vae:
        parser.error(f"--vae {args.vae}: with --pixels there is none; leave one of them out")
    if args.latents and args.patch:
        parser.error(f"--patch {args.patch}: a token is one cell of a latent; it needs --pixels")
    if args.init and args.latents and not args.vae:
        args.vae = args.init / "vae"
    if args.encoder and not args.pixels:
        parser.error(f"--encoder {args.encoder}: the perceptual loss is of pixels; it needs --pixels")
    if args.latents and not args.vae:
        parser.error("--latents needs --vae, the VAE that made them")
    if args.fsdp and not (parallel.launched or args.dry_run):
        parser.error("--fsdp splits a model among several processes: start it with torchrun")
    if args.fsdp and args.optimizer == "muon":
        parser.error("--optimizer muon needs whole matrices, and --fsdp splits them; leave one out")
    if args.fp8 and args.lora_rank:
        parser.error(f"--fp8: adapters (--lora-rank {args.lora_rank}) are not computed in float8; leave one out")
    if args.fp8:
        float8.check(args.compile, args.dry_run)
