"""Training: what is trained (Rad-VAE on images, RadiT on cached latents or on pixels), and the loop that trains it.

The clock is the number of images seen. Data order, noise, times and dropout depend only on (seed, images seen) and the
image's place in the batch, and the checkpoint holds everything else. So the same command again continues the run, and
its losses are those of a run that was never stopped: bit for bit on as many processes, to rounding on others.

    batch = world x accumulate x micro     process r computes images [(m world + r) micro, ...) of the batch, m = 0, 1, ...

RUN/ checkpoints/        see training/checkpoint.py                                log.jsonl   one line an interval
    weights/             the EMA, as sample.py and autoencoder/load.py load it     loss.png    the curve
    preview.png          what the EMA does now, for fixed inputs

SIGTERM and SIGUSR1, as schedulers send them before they take a node away: the step is finished, a checkpoint written,
and every process leaves with status 75 (EX_TEMPFAIL): start me again. torchrun's own status is then 1, with 75 in its report.

    python train.py vae   --data PREPARED... --out RUN                 or, on a base: --base FLUX.2 --lora-rank 32
    python train.py radit --data PREPARED... --latents LATENTS --size XS --out RUN

On several GPUs the same commands start with `torchrun --nproc_per_node=8 train.py ...`. The same command again continues.
"""
import argparse
import json
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import data
import flow
import radit
import sample
import vae
from autoencoder import lora
from autoencoder.latents import Latents, evaluate, names_of
from autoencoder.load import copy_vae, load_vae
from common import cli, hub
from common.cli import InputError, pick_device
from encoders import raddino
from encoders.perceptual import PUBLISHED_WEIGHT
from radiographs import fields, pixels
from training import checkpoint, parallel

STOPPED = 75  # the exit status of a run that was asked to stop
VOTE = 8      # steps between two questions to all processes whether one was asked to stop


@dataclass
class TrainConfig:
    images: int = 1_000_000      # stop after this many images seen
    batch: int = 16              # images a step, over all processes
    lr: float = 1e-3             # AdamW's, after the warm-up
    warmup: int = 8_000          # images over which the learning rate rises from 0
    cooldown: int = 0            # images at the end over which it falls to 0
    clip: float = 1.0            # largest norm of the gradient
    ema: int = 20_000            # half-life of the weight average, in images; shorter at the start
    log_every: int = 128         # steps between lines of the log
    save_every: int = 512        # steps between checkpoints and previews; a multiple of log_every
    keep: int = 2                # checkpoints kept
    accumulate: int = 1          # parts of a step that a process computes one after another, for less memory
    seed: int = 0


def micro_batch(cfg):
    """Images that a process computes at a time."""
    parts = parallel.world * cfg.accumulate
    if cfg.batch % parts:
        raise InputError(f"--batch {cfg.batch} cannot be shared by {parallel.world} processes, --accumulate {cfg.accumulate}: "
                         f"it must be a multiple of {parts}")
    return cfg.batch // parts


def batches(count, batch, seed, seen):
    """Endless lists of indices, starting after `seen` images. Epoch e is a permutation that depends on (seed, e)."""
    indices = []
    while True:
        epoch, start = divmod(seen, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for index in order[start:].tolist():
            indices.append(index)
            if len(indices) == batch:
                yield indices
                indices = []
        seen = (epoch + 1) * count


def generator(device, seed, seen):
    """All randomness of the step that starts after `seen` images."""
    return torch.Generator(device).manual_seed((seed * 0x9E3779B97F4A7C15 + seen) % 2 ** 63)


class Draw:
    """The random numbers of some images of a batch: draw(make), where make(count, generator) gives one row an image. They
    are drawn for the whole batch, so that an image gets the same ones whichever process computes it."""

    def __init__(self, rng, batch, part=slice(None)):
        self.rng, self.batch, self.part = rng, batch, part

    def __call__(self, make):
        return make(self.batch, self.rng)[self.part]

    def normal(self, *shape):                                        # n *shape
        return self(lambda count, rng: torch.randn(count, *shape, generator=rng, device=rng.device))

    def uniform(self, *shape):                                       # n *shape
        return self(lambda count, rng: torch.rand(count, *shape, generator=rng, device=rng.device))


@torch.no_grad()
def update_ema(ema, model, images_seen, batch, half_life):
    """ema <- lerp(ema, model), in float32; the half-life is at most a twentieth of the images seen, as in EDM2."""
    decay = 0.5 ** (batch / max(min(half_life, images_seen / 20), 1e-9))
    pairs = [map(parallel.local, pair) for pair in zip(ema.parameters(), model.parameters()) if pair[1].requires_grad]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


def trainable_parameters(model):
    """The parameters that are trained: all, or a LoRA's."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------
# The loop, one for every model, on one device or under torchrun on many

def train(task, model, dataset, cfg, out, compiled=(), checkpointed=(), sharded=()):
    """Trains `model` until cfg.images images are seen; returns the EMA. Under torchrun all processes call this alike.

    `task` has loss(model, batch, draw) -> (loss, dict of terms to log), preview(ema, path) -> dict to log (path None: draw
    nothing), save(ema, folder), `about`, a dict of what must not change when a run is continued, and `flops`, the structural
    floating-point operations of one training image; if there is finish(model), it is called after every step.
    compiled, checkpointed, sharded: the blocks of the model that are compiled, whose activations are computed again in the
    backward pass instead of kept, and that FSDP splits; without the last, every process holds the whole model.
    """
    micro, world, rank = micro_batch(cfg), parallel.world, parallel.rank
    parallel.join()
    device, bf16 = pick_device()
    name, config, size = type(model).__name__, asdict(model.config), sum(p.numel() for p in trainable_parameters(model))
    about = {"seed": cfg.seed, "batch": cfg.batch, "images_in_data": len(dataset)} | config | task.about
    about = json.loads(json.dumps(about))  # tuples become lists, as in the checkpoint
    called, ema, plain = parallel.set_up(model, bf16, compiled, checkpointed, sharded)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    checkpoint.start_moments(optimizer)
    start, seen = parallel.agreed(checkpoint.latest(out)), 0
    if start:
        seen = checkpoint.load(start, checkpoint.tensors_of(model, ema, optimizer), about)
    writer, log, history = checkpoint.Writer(out, cfg.keep), out / "log.jsonl", []
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        history = [entry for entry in history if entry["images"] <= seen]
        print(f"{name}: {size:,} trained parameters, {device.type}, {'bfloat16' if bf16 else 'float32'}, "
              + (f"{world} processes, " if world > 1 else "") + f"{len(dataset):,} images, starting at {seen:,} seen", flush=True)

    parts = [slice(start, start + micro) for start in range(rank * micro, cfg.batch, world * micro)]
    ours = (indices[part] for indices in batches(len(dataset), cfg.batch, cfg.seed, seen) for part in parts)
    loader = iter(DataLoader(dataset, batch_sampler=ours, num_workers=4 if device.type == "cuda" else 0,
                             pin_memory=device.type == "cuda", worker_init_fn=parallel.ignore_signals))  # workers are two batches ahead each
    model.train()
    total, steps, started = {}, 0, time.perf_counter()
    with parallel.catch_signals() as asked:
        while seen < cfg.images:
            rate = cfg.lr * min(1, (seen + cfg.batch) / max(cfg.warmup, 1), (cfg.images - seen) / max(cfg.cooldown, 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            for part in parts:
                batch = next(loader)
                batch = [x.to(device, non_blocking=True) for x in batch] if isinstance(batch, list) else batch.to(device, non_blocking=True)
                draw = Draw(generator(device, cfg.seed, seen), cfg.batch, part)
                with parallel.last_only(called, part is parts[-1]):
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        loss, terms = task.loss(called, batch, draw)
                    (loss / cfg.accumulate).backward()
                for key, value in ({"loss": loss} | terms).items():  # means over images, or (2, bins) of sums and counts
                    value = value.detach() if value.ndim else value.detach() / cfg.accumulate
                    total[key] = total.get(key, 0) + value
            total["grad_norm"] = total.get("grad_norm", 0) + parallel.clip(trainable_parameters(model), cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(task, "finish"):
                task.finish(model)
            seen += cfg.batch
            steps += 1
            update_ema(ema, model, seen, cfg.batch, cfg.ema)
            writer.poll()

            step, done = seen // cfg.batch, seen >= cfg.images
            stop = (world == 1 or step % VOTE == 0) and parallel.anyone(bool(asked)) and not done
            if not (step % cfg.log_every == 0 or done or stop):
                continue
            entry = {"images": seen} | summary(total, steps)         # the only place that waits for the device
            speed = steps * cfg.batch / (time.perf_counter() - started)
            if not math.isfinite(entry["loss"] + entry["grad_norm"]):  # before anything is saved: what is on disk is good
                refuse(entry, writer, out)
            if step % cfg.save_every == 0 or done or stop:
                writer.save(checkpoint.tensors_of(model, ema, optimizer),
                            {"images": seen, "name": task.name, "config": config, "about": about, "processes": world})
                if not stop:                                         # a node that is taken away leaves no time for pictures
                    if sharded:
                        parallel.put_together(ema, plain)
                    if rank == 0:
                        task.save(plain, out / "weights" / task.name)
                    entry |= task.preview(ema, out / "preview.png" if rank == 0 else None)
            if rank == 0:
                history.append(entry)
                cli.write_text(log, "".join(json.dumps(line) + "\n" for line in history))
                draw_curve(history, out / "loss.png")
                left = (cfg.images - seen) / speed / 3600
                print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
                      + f" | {speed:.1f} images/s, {speed * task.flops / 1e12:.3f} TFLOP/s, {left:.2f} h left", flush=True)
            if stop:
                writer.wait()
                parallel.leave()
                print(f"asked to stop: all saved at {seen:,} images; the same command continues", flush=True)
                raise SystemExit(STOPPED)
            total, steps, started = {}, 0, time.perf_counter()
    writer.wait()
    return ema


def refuse(entry, writer, out):
    """Ends a run whose loss or gradient is not finite."""
    writer.wait()
    good = checkpoint.latest(out)
    kept = f"the last good state is {good}" if good else "there was no checkpoint yet"
    raise SystemExit(f"loss {entry['loss']}, gradient {entry['grad_norm']} after {entry['images']:,} images: stopped; {kept}. "
                     f"A lower --lr, a longer --warmup or a smaller --clip may help")


def summary(total, steps):
    """Means over an interval and all processes; a term that is a (2, bins) tensor holds sums and counts, and gives a list of
    means."""
    result = {}
    for key, value in total.items():
        value = parallel.summed(value)
        if value.ndim == 2:
            result[key] = [round(s / n, 4) if n else None for s, n in value.T.tolist()]
        else:
            result[key] = value.item() / (steps * parallel.world)
    return result


def draw_curve(history, path):
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot([entry["images"] for entry in history], [entry["loss"] for entry in history])
    axes.set(xlabel="images seen", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(f"{path}.tmp", format="png", dpi=100)
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------------------
# What is trained

class VAETask:
    """Rad-VAE on images; previews reconstruct held-out images: original, reconstruction, difference. `encoder` (None, or one
    of raddino.py) measures the reconstructions, and teaches too if its weight is not 0."""
    name = "vae"

    def __init__(self, config, held_out, kl_weight, encoder=None, perceptual_weight=0.0):
        self.config, self.held_out, self.raw = config, held_out, []
        self.kl_weight, self.encoder, self.perceptual_weight = kl_weight, encoder, perceptual_weight
        self.about = {"kl_weight": kl_weight} | ({"perceptual_weight": perceptual_weight} if encoder else {})
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = vae.RadVAE(config)
            model.decode(model.encode(held_out[:1].to("meta"))[0])
        self.flops = 3 * counter.get_total_flops()

    def loss(self, model, x, draw):                                  # N 1 H W
        factor = 2 ** len(self.config.widths)                        # pixels a patchified latent cell
        noise = draw.normal(4 * self.config.latent_channels, x.shape[2] // factor, x.shape[3] // factor)
        y, mean, logvar = model(x, noise)
        self.raw.append(mean.detach().float())                       # N 4c h w
        encoder = self.encoder if self.perceptual_weight else None
        return vae.vae_loss(x, y, mean, logvar, kl_weight=self.kl_weight, encoder=encoder, perceptual_weight=self.perceptual_weight)

    def finish(self, model):
        """The running statistics are those of whole batches, however many parts and processes computed one."""
        model.bn(parallel.gathered(torch.cat(self.raw)))
        self.raw.clear()

    def save(self, ema, folder):
        lora.save(ema, folder) if lora.adapters(ema) else hub.save_model(ema, folder)

    @torch.no_grad()
    def preview(self, ema, path):
        if path:
            x = self.held_out[:8].to(next(ema.parameters()).device)
            y = ema.decode(ema.encode(x)[0]).clamp(-1, 1)
            pixels.save_image(pixels.grid(torch.cat([x, y, y - x]), columns=8), path)
        return {f"held_out_{name}": score.mean().item() for name, score in evaluate(ema, self.held_out, self.encoder).items()}


class RadiTTask:
    """RadiT on latents or pixels; previews the EMA's pictures for fixed noise and metadata, and its held-out loss."""
    name, about = "radit", {}
    save = staticmethod(hub.save_model)

    def __init__(self, config, held_out, decoder):
        self.config, self.held_out, self.decoder = config, held_out, decoder
        self.flops = 3 * radit.count_flops(config)

    def flow(self, model, batch, draw, drop):
        """Loss and time of each image, (N,), (N,). batch: mean, log-variance, age, codes."""
        cfg, (mean, logvar, age, codes) = self.config, batch
        shape = mean.shape[1:]                                       # C H W
        x = mean + (0.5 * logvar).exp() * draw.normal(*shape)        # N C H W, a fresh draw from the posterior
        if drop:
            age, codes = radit.drop_metadata(age, codes, draw.uniform(4 + codes.shape[1]))
        t = draw(lambda count, rng: flow.sample_times(count, cfg.shift, rng))  # N
        return flow.flow_loss(lambda x, t: model(x, t, age, codes), x, draw.normal(*shape), t, cfg.prediction), t

    def loss(self, model, batch, draw):
        losses, t = self.flow(model, batch, draw, drop=True)
        bins = torch.zeros(2, 8, device=t.device)                    # sums and counts by eighths of t
        bins.index_add_(1, (t * 8).long().clamp(0, 7), torch.stack([losses.detach(), torch.ones_like(losses)]))
        return losses.mean(), {"loss_by_t": bins}

    @torch.no_grad()
    def preview(self, ema, path):
        device = next(ema.parameters()).device
        held_out = [x.to(device) for x in self.held_out]
        draw = Draw(generator(device, 0, 0), len(held_out[0]))
        loss = self.flow(ema, held_out, draw, drop=False)[0].mean().item()
        seeds = list(range(16))
        records = [self.config.examples[seed % len(self.config.examples)] for seed in seeds]
        images, _ = sample.generate(ema, self.decoder, records, seeds)
        if path:
            pixels.save_image(pixels.grid(images), path)
        return {"held_out_loss": loss}


class Examples(Dataset):
    """Training examples of RadiT: (mean, log-variance, age, codes), one for each cached version of each image. A pixel
    image is its own mean, without variance."""

    def __init__(self, images, latents, datasets):
        self.images, self.latents = images, latents
        self.age, self.codes = fields.encode_metadata(images.records, datasets)
        self.items = [(i, None) for i in range(len(images))]         # image, row of the cache
        if latents:
            names = names_of(images)
            if missing := [name for name in names if name not in latents.rows]:
                raise InputError(f"{latents.folder}: no latent for {missing[0]} ({len(missing)} missing); encode again")
            self.items = [(i, row) for i, name in enumerate(names) for row in latents.rows[name]]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        i, row = self.items[item]
        if self.latents:
            mean, logvar = self.latents[row]                         # C H W each
        else:
            mean = self.images[i]                                    # 1 H W
            logvar = torch.full_like(mean, -math.inf)
        return mean, logvar, self.age[i], self.codes[i]


def train_radit(args, cfg):
    images, held_out = (data.Radiographs(args.data, split) for split in ("train", "valid"))
    latents = Latents(args.latents) if args.latents else None
    decoder = load_vae(args.vae).to(pick_device()[0]) if latents else None
    if latents:
        if decoder.fingerprint != latents.vae:
            raise InputError(f"{args.latents} holds latents of another VAE than {args.vae}; encode again")
        for radiographs in (images, held_out):
            latents.check(radiographs)
    datasets = list(fields.DATASETS)
    datasets += sorted({record["dataset"] for record in images.records if "dataset" in record} - set(datasets))
    examples = Examples(images, latents, datasets)
    width, depth, heads = radit.SIZES[args.size]
    shape = examples[0][0].shape                                     # C H W
    if args.pixels and shape[1] % args.patch:
        raise InputError(f"--patch {args.patch} does not divide the images' side of {shape[1]} pixels")
    chosen = random.Random(cfg.seed).sample(images.records, min(64, len(images)))
    config = radit.RadiTConfig(
        channels=shape[0], grid=tuple(shape[1:]), patch=1 if latents else args.patch, width=width, depth=depth, heads=heads,
        prediction="velocity" if latents else "data", shift=args.shift, datasets=datasets, covered=fields.coverage(images.records),
        examples=[{field: r[field] for field in fields.FIELDS if field in r} for r in chosen], vae=latents.vae if latents else "")
    torch.manual_seed(cfg.seed)
    model = radit.RadiT(config)
    few = Examples(held_out, latents, datasets)
    few = [few[i] for i in range(0, len(few), max(1, len(few) // 256))][:256]
    few = [torch.stack(column) for column in zip(*few)]
    if latents and parallel.rank == 0:  # so that RUN/weights can be sampled from as it is
        copy_vae(args.vae, args.out / "weights" / "vae")
    train(RadiTTask(config, few, decoder), model, examples, cfg, args.out, compiled=model.blocks if args.compile else (),
          checkpointed=model.blocks if args.checkpointing else (), sharded=model.blocks if args.fsdp else ())


def train_vae(args, cfg):
    dataset = data.Radiographs(args.data, "train")
    held_out = data.Radiographs(args.data, "valid")
    held_out = torch.stack([held_out[i] for i in range(0, len(held_out), max(1, len(held_out) // 64))][:64])
    if not args.base and held_out.shape[-1] % 2 ** len(args.widths):
        raise InputError(f"{len(args.widths)} widths need images whose side is a multiple of {2 ** len(args.widths)} pixels, "
                         f"not {held_out.shape[-1]}")
    torch.manual_seed(cfg.seed)
    if args.base:  # only adapters are trained; the base lies beside them, as it is
        model = load_vae(args.base)
        lora.add(model, args.lora_rank, args.lora_alpha or args.lora_rank)
        if parallel.rank == 0:
            copy_vae(args.base, args.out / "weights" / "vae")
    else:
        model = vae.RadVAE(vae.VAEConfig(args.channels, args.latent_channels, args.widths, args.layers, args.groups))
    encoder = raddino.load_encoder(args.encoder).to(pick_device()[0]) if args.encoder else None
    task = VAETask(model.config, held_out, args.kl_weight, encoder, args.perceptual_weight)
    if args.base:
        task.about |= {"base": model.fingerprint, "lora_rank": args.lora_rank}
    # Channels last is what bfloat16 convolutions want; in float32 it costs a quarter of the speed on a CPU.
    layout = torch.channels_last if pick_device()[1] else torch.contiguous_format
    train(task, model.to(memory_format=layout), dataset, cfg, args.out)


def numbers(text):
    return tuple(int(part) for part in text.split(","))


def main():
    parser = cli.Parser(description="Train Rad-VAE or RadiT; the same command again resumes.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {"vae": TrainConfig(), "radit": TrainConfig(batch=64, ema=100_000, warmup=20_000)}
    for name, default in defaults.items():
        p = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--data", nargs="+", required=True, help="prepared sources")
        p.add_argument("--out", type=Path, required=True, help="the run's folder")
        for field, value in asdict(default).items():
            kind = cli.positive if field in ("images", "batch", "log_every", "save_every", "keep", "accumulate") else type(value)
            p.add_argument(f"--{field.replace('_', '-')}", type=kind, default=value, help="see TrainConfig in train.py")
    p = commands.choices["vae"]
    p.add_argument("--widths", type=numbers, default=(128, 256, 512, 512), help="channels of each level, finest first")
    p.add_argument("--layers", type=cli.positive, default=2, help="residual blocks a level")
    p.add_argument("--groups", type=cli.positive, default=32, help="of GroupNorm")
    p.add_argument("--latent-channels", type=cli.positive, default=32)
    p.add_argument("--channels", type=int, choices=(1, 3), default=1, help="of the VAE's image; grey is repeated to 3")
    p.add_argument("--kl-weight", type=float, default=3e-4)
    p.add_argument("--encoder", type=Path, help="microsoft/rad-dino or weights/demo/classifier: measures, and teaches by its weight")
    p.add_argument("--perceptual-weight", type=float, default=PUBLISHED_WEIGHT,
                   help="of the encoder's loss; %(default).2f as published, 0 measures only")
    p.add_argument("--base", type=Path, help="train a LoRA on the decoder of this VAE, such as black-forest-labs/FLUX.2-klein-4B")
    p.add_argument("--lora-rank", type=cli.positive, default=32)
    p.add_argument("--lora-alpha", type=float, help="the rank, if not given")
    p = commands.choices["radit"]
    p.add_argument("--size", choices=radit.SIZES, default="B")
    space = p.add_mutually_exclusive_group(required=True)
    space.add_argument("--latents", type=Path, help="made by python -m autoencoder encode")
    space.add_argument("--pixels", action="store_true", help="no VAE: patches of pixels, data prediction")
    p.add_argument("--vae", type=Path, help="the VAE of the latents, for previews")
    p.add_argument("--patch", type=cli.positive, default=16, help="pixels a token on each side, with --pixels")
    p.add_argument("--shift", type=float, default=1.0, help="time shift towards noise; above 1 for many tokens")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=bool(shutil.which("g++")),
                   help="compile each block, which needs a C++ compiler")
    p.add_argument("--checkpointing", action="store_true", help="compute each block's activations twice instead of keeping them")
    p.add_argument("--fsdp", action="store_true", help="split weights, moments and EMA among torchrun's processes")
    args = parser.parse_args()
    if args.command == "radit" and args.latents and not args.vae:
        parser.error("--latents needs --vae, the VAE that they were made with")
    if args.command == "radit" and args.fsdp and not parallel.launched:
        parser.error("--fsdp splits a model among several processes: start it with torchrun")
    cfg = TrainConfig(**{field: getattr(args, field) for field in asdict(TrainConfig())})
    micro_batch(cfg)  # refuses before anything is read or written
    {"vae": train_vae, "radit": train_radit}[args.command](args, cfg)
    parallel.leave()


if __name__ == "__main__":
    cli.run(main)
