"""What a training will cost, before anything is spent: parameters, FLOPs, memory of a GPU, time, GPU-hours, storage.

    python -m training plan --size XL --tokens 1.6e12 --gpus 64

Everything is computed from the structure of radit.py; no weight is built and nothing is measured. P parameters, G GPUs,
N images on a GPU at a time, T tokens of an image, D width, H SwiGLU's inner width, h heads.

    FLOPs   3 x forward's (backward computes two products for each of forward's), and what is computed again with
            --recompute: if compiled, the products that torch's memory budget leaves out (out and up), otherwise all of
            forward's
    state   bytes per parameter: weights 4, gradients 4, AdamW's two moments 8, and 4 for each of two EMAs, all float32;
            FSDP divides them by G
    copies  of the weights in bfloat16: DDP under autocast holds all (2 P); FSDP those of the current block and the next
    kept    activations that backward needs, counted in `kept_by_block`; or what a preview needs, if that is more

The device's context, workspaces, fragmentation and what exists only inside one operation come on top: a plan that fills
more than nine tenths of the memory counts as one that does not fit.
"""
import math
from dataclasses import dataclass

import torch

import radit
import vae
from common import cli

LATENT_CHANNELS, LATENT_CELL = 128, 16  # FLUX.2's: 128 channels, one cell for 16x16 pixels
KEPT = ("compiled", "compiled, recomputed", "eager", "eager, recomputed")
AVERAGES = 2  # EMAs that train.py radit keeps by default


def kept_by_block(cfg, kept, bf16=True):
    """Bytes that one block keeps for the backward pass of one image. `kept` is one of KEPT."""
    d, h, size = cfg.width, cfg.hidden, 2 if bf16 else 4             # bytes of a number
    if kept == "eager, recomputed":                                  # only the block's input
        return size * cfg.tokens * d
    if kept == "compiled, recomputed":
        # What torch 2.13 chooses for the budget of training/parallel.py, 5 tensors D wide; found by tests/test_plan.py.
        wide, hidden, floats = 5, 0, 0
    elif kept == "compiled":
        # Only what is costly to compute again. D wide, 11: the block's input, the inputs of qkv and up, out's and
        # down's results, q, k, attention's output, which is out's input, and qkv's result (3). H wide, 3: up's result
        # (2) and down's input.
        wide, hidden, floats = 11, 3, 0
    else:
        # Every operation keeps its operands. D wide, 16: inputs and results of two norms, and these modulated (6);
        # qkv's result (3); q and k, normed and turned (4); attention's output, which is out's input; out's and down's
        # results (2). H wide, 4: up's result (2), silu(gate), down's input. Under autocast norms work in float32: the
        # inputs of two, and q and k before and after theirs.
        wide, hidden, floats = (12, 4, 6) if bf16 else (16, 4, 0)
    elements = size * (wide * d + hidden * h) + 4 * floats * d
    statistics = 4 * (3 * cfg.heads + 2)                             # float32: rms of q, k, two norms; attention's sum
    return cfg.tokens * (elements + statistics)


def kept_outside(cfg, bf16=True):
    """Bytes that the first and last layers keep for one image: the patches, and norm, modulation and product of the
    output. The vectors of time and metadata, one for each image, are small and left out."""
    patch_dim = cfg.channels * cfg.patch ** 2
    wide = 8 if bf16 else 12                                         # bytes: three D-wide tensors, norm's in float32
    return cfg.tokens * (wide * cfg.width + (2 if bf16 else 4) * patch_dim)


def activations(cfg, images, kept, bf16=True):
    """Bytes kept at the end of the forward pass; where they are recomputed, while one block is computed again."""
    again = kept_by_block(cfg, kept.split(",")[0], bf16) if "recomputed" in kept else 0
    return images * (cfg.depth * kept_by_block(cfg, kept, bf16) + again + kept_outside(cfg, bf16))


def recomputed_flops(cfg, kept):
    """Operations of one image that the backward pass computes again."""
    if kept == "compiled, recomputed":
        return cfg.depth * 2 * cfg.tokens * (cfg.width ** 2 + 2 * cfg.width * cfg.hidden)  # out and up
    return radit.count_flops(cfg) if kept == "eager, recomputed" else 0


def preview(cfg, images, bf16=True):
    """Bytes that train.py needs for the preview at a save, without the VAE: the forward pass of a micro-batch, which
    keeps the tensors of one block at a time."""
    return images * (kept_by_block(cfg, "eager", bf16) + kept_outside(cfg, bf16))


def decoder_bytes(cfg, vae_config):
    """Bytes that the VAE needs for a preview: its weights, and about four float32 tensors of its second width at full
    resolution for each slice of images."""
    with torch.device("meta"):
        weights = sum(p.nbytes for p in vae.RadVAE(vae_config).parameters())
    pixels = max(vae.SLICE, cfg.grid[0] * cfg.grid[1] * 4 ** len(vae_config.widths))
    return weights + 4 * 4 * vae_config.widths[min(1, len(vae_config.widths) - 1)] * pixels


def checkpoint_bytes(cfg, averages=AVERAGES):
    """On disk: weights, averages and AdamW's two moments in float32."""
    return 4 * (3 + averages) * radit.count_parameters(cfg)


def state(cfg, gpus, fsdp, averages=AVERAGES):
    """What each GPU holds beside activations: name -> bytes."""
    count = radit.count_parameters(cfg)
    block = (count - radit.count_parameters(radit.RadiTConfig(**{**vars(cfg), "depth": 0}))) // cfg.depth
    parts = gpus if fsdp else 1
    # FSDP gathers the layers outside the blocks in float32, and reduces the gradients of one block at a time.
    outside = count - cfg.depth * block
    copies = 2 * 2 * block + 4 * outside if fsdp else 2 * count
    reduced = (2 + 4) * block + 4 * outside if fsdp else 0
    return {"weights, float32": 4 * count / parts, "copies to compute with": copies,
            "gradients, float32": 4 * count / parts + reduced, "AdamW's moments, float32": 8 * count / parts,
            f"{averages} EMAs, float32": 4 * averages * count / parts}


def latent_bytes(cfg):
    """A cached latent on disk: mean and log-variance, float16."""
    return 2 * 2 * cfg.channels * cfg.grid[0] * cfg.grid[1]


@dataclass
class Plan:
    cfg: radit.RadiTConfig
    tokens: float          # to train on
    gpus: int
    batch: int             # images in each step, on all GPUs together
    accumulate: int        # parts into which each GPU splits its share of a batch
    peak: float            # FLOP/s of one GPU
    utilisation: float     # share of it that the model's own FLOPs reach
    decoder: int           # bytes that the VAE needs for a preview; 0 for pixels

    @property
    def images(self):
        return math.ceil(self.tokens / self.cfg.tokens)

    @property
    def micro_batch(self):
        return self.batch // (self.gpus * self.accumulate)

    @property
    def steps(self):
        return math.ceil(self.images / self.batch)

    @property
    def flops(self):
        return 3 * radit.count_flops(self.cfg) * self.steps * self.batch

    def gpu_hours(self, kept):
        flops = self.flops + recomputed_flops(self.cfg, kept) * self.steps * self.batch
        return flops / (self.peak * self.utilisation) / 3600

    def memory(self, fsdp, kept, accumulate=None):
        micro = self.batch / (self.gpus * (accumulate or self.accumulate))
        active = max(activations(self.cfg, micro, kept), preview(self.cfg, micro) + self.decoder)
        return sum(state(self.cfg, self.gpus, fsdp).values()) + active


def add_arguments(p):
    p.add_argument("--size", choices=radit.SIZES, default="XL", help="see python radit.py")
    p.add_argument("--tokens", type=cli.number(1, 1e18), default=1.6e12, help="tokens to train on; the paper's 1.6e12")
    p.add_argument("--gpus", type=cli.integer(1, 10 ** 5), default=8, help="number of GPUs, all alike")
    p.add_argument("--batch", type=cli.integer(1, 10 ** 6), default=1024, help="images in each step, on all GPUs")
    p.add_argument("--accumulate", type=cli.integer(1, 10 ** 6), default=1,
                   help="parts of a GPU's share of a batch, computed one after another")
    p.add_argument("--side", type=cli.integer(1, 10 ** 5), default=512, help="side of the images in pixels")
    p.add_argument("--pixels", action="store_true", help="no VAE: patches of pixels; otherwise FLUX.2's latents")
    p.add_argument("--patch", type=cli.integer(1, 4096), default=16, help="with --pixels: pixels on a token's side")
    p.add_argument("--memory", type=cli.number(0.1, 1e5), default=80.0, help="memory of a GPU in GB")
    p.add_argument("--peak", type=cli.number(0.001, 1e6), default=989.0,
                   help="peak of a GPU in TFLOP/s, dense bfloat16; an H100's by default")
    p.add_argument("--utilisation", type=cli.number(0.001, 1), default=0.4,
                   help="share of the peak that is reached; an assumption")
    p.add_argument("--images", type=cli.positive, default=1_205_494, help="images to encode; CXR7-1M's by default")
    p.add_argument("--versions", type=cli.integer(1, 10 ** 4), default=1,
                   help="latents of each image, as in python -m autoencoder encode")


def make(args):
    """The plan that the arguments ask for."""
    cell = args.patch if args.pixels else LATENT_CELL
    if args.side % cell:
        raise cli.InputError(f"--side {args.side} is not a multiple of {cell} pixels, the side of a token")
    if args.batch % (args.gpus * args.accumulate):
        raise cli.InputError(f"--batch {args.batch} cannot be split evenly among {args.gpus} GPUs x {args.accumulate} "
                             "parts")
    width, depth, heads = radit.SIZES[args.size]
    grid = args.side if args.pixels else args.side // cell
    cfg = radit.RadiTConfig(channels=1 if args.pixels else LATENT_CHANNELS, grid=(grid, grid),
                            patch=cell if args.pixels else 1,
                            width=width, depth=depth, heads=heads)
    return Plan(cfg, args.tokens, args.gpus, args.batch, args.accumulate, args.peak * 1e12, args.utilisation,
                0 if args.pixels else decoder_bytes(cfg, vae.VAEConfig(channels=3)))


def advice(plan, memory):
    """One line: the first way that fits, the cheapest first. Accumulating costs no FLOPs, FSDP costs communication, and
    recomputing costs a sixth more FLOPs."""
    share = plan.batch // plan.gpus
    for kept in ("compiled", "compiled, recomputed"):
        for fsdp in (False, True):
            for parts in range(plan.accumulate, share + 1):
                if share % parts == 0 and plan.memory(fsdp, kept, parts) <= 0.9 * memory:
                    flags = (["--fsdp"] if fsdp else []) + ([f"--accumulate {parts}"] if parts > 1 else [])
                    flags += ["--recompute"] if kept == "compiled, recomputed" else []
                    return f"fits: {'FSDP' if fsdp else 'DDP'}, compiled ({' '.join(flags) or 'no option needed'})"
    return "does not fit, whatever --accumulate: take more GPUs and --fsdp, or a smaller --size"


def show(args):
    plan = make(args)
    cfg, gigabyte = plan.cfg, 1e9
    space = f"patches of {cfg.patch}x{cfg.patch} pixels" if args.pixels else "FLUX.2's latents"
    rows = [("model", f"RadiT {args.size}, {args.side}x{args.side} pixels as {space}: {cfg.tokens:,} tokens an image"),
            ("parameters", f"{radit.count_parameters(cfg):,}"),
            ("images", f"{plan.images:,} of {cfg.tokens:,} tokens, "
                       f"{plan.images / args.images:,.0f} times {args.images:,}"),
            ("FLOPs", f"{3 * radit.count_flops(cfg) / 1e12:.3g} TFLOP an image, {plan.flops:.3g} in all"),
            ("batch", f"{plan.batch:,} images: {plan.gpus} GPUs x {plan.micro_batch} at a time x {plan.accumulate}"),
            ("steps", f"{plan.steps:,}")]
    for kept, name in (("compiled", "time"), ("compiled, recomputed", "  with --recompute")):
        hours = plan.gpu_hours(kept)
        rows.append((name, f"{hours / plan.gpus / 24:,.1f} days, {hours:,.0f} GPU-hours"))
    size = checkpoint_bytes(cfg) / gigabyte
    rows.append(("checkpoint on disk", f"{size:,.1f} GB (weights, {AVERAGES} EMAs, moments)"))
    if not args.pixels:
        rows.append(("latents on disk", f"{latent_bytes(cfg) * args.images * args.versions / gigabyte:,.0f} GB "
                                        f"({args.images:,} images x {args.versions})"))
    print("\n".join(f"{name:26}{text}" for name, text in rows))
    print(f"\n{'GB on each GPU':42}{'DDP':>8}{'FSDP':>8}")
    ddp, fsdp = (state(cfg, plan.gpus, split) for split in (False, True))
    lines = [(name, ddp[name], fsdp[name]) for name in ddp]
    lines += [(f"activations, {kept}", *[activations(cfg, plan.micro_batch, kept)] * 2) for kept in KEPT]
    lines += [("the preview at a save", *[preview(cfg, plan.micro_batch) + plan.decoder] * 2)]
    lines += [(f"total, {kept}", plan.memory(False, kept), plan.memory(True, kept)) for kept in KEPT]
    print("\n".join(f"{name:42}{a / gigabyte:8.1f}{b / gigabyte:8.1f}" for name, a, b in lines))
    print(f"{advice(plan, args.memory * gigabyte)}; of {args.memory:g} GB a tenth is left for what is not counted here")
    print(f"\nComputed from the model's structure, not measured. That {args.utilisation:.0%} of {args.peak:g} "
          f"TFLOP/s are reached is an assumption: measure it with benchmarks/training.py, and give --utilisation.")
