"""Training, one loop for both models: Rad-VAE on images, RadiT on cached latents or on pixels.

    python train.py vae   --data PREPARED... --out RUN                 or, on a base: --base FLUX.2 --lora-rank 32
    python train.py radit --data PREPARED... --latents LATENTS --size XS --out RUN
    python train.py plan  --size XL --tokens 1.6e12 --gpus 64          what that would cost

The clock is the number of images seen. Data order, noise, times and dropout depend only on (seed, images seen), and
the checkpoint holds everything else, so the same command again continues the run, and its losses are those of a
run that was never stopped, bit for bit.

RUN/ state.safetensors   weights, EMA, optimizer moments; replaced atomically      log.jsonl   one line an interval
    weights/             the EMA, as sample.py and vae.py load it                  loss.png    the curve
    preview.png          what the EMA does now, for fixed inputs
"""
import argparse
import copy
import json
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import cli
import data
import fields
import flow
import hub
import lora
import plan
import raddino
import radiograph
import radit
import sample
import vae
from cli import InputError, pick_device
from latents import Latents, names_of


@dataclass
class TrainConfig:
    images: int = 1_000_000      # stop after this many images seen
    batch: int = 16              # images a step
    lr: float = 1e-3             # AdamW's, after the warm-up
    warmup: int = 8_000          # images over which the learning rate rises from 0
    cooldown: int = 0            # images at the end over which it falls to 0
    clip: float = 1.0            # largest norm of the gradient
    ema: int = 20_000            # half-life of the weight average, in images; shorter at the start
    log_every: int = 128         # steps between lines of the log
    save_every: int = 512        # steps between checkpoints and previews
    seed: int = 0


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


@torch.no_grad()
def update_ema(ema, model, images_seen, batch, half_life):
    """ema <- lerp(ema, model), in float32; the half-life is at most a twentieth of the images seen, as in EDM2."""
    decay = 0.5 ** (batch / max(min(half_life, images_seen / 20), 1e-9))
    pairs = [(average, p) for average, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


def trained(model):
    """The parameters that are trained: all, or a LoRA's."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------
# The checkpoint: one file, replaced by one rename, without pickles

def save_state(path, seen, model, ema, optimizer, about):
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    temporary = f"{path}.tmp"
    safetensors.torch.save_file(tensors, temporary, metadata={"seen": str(seen), "about": json.dumps(about)})
    os.replace(temporary, path)


def load_state(path, model, ema, optimizer, about):
    """Fills the three from the checkpoint; returns the images seen. Refuses a run of another configuration."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: unreadable checkpoint ({error}); delete it to start again") from None
    before = json.loads(header["about"])
    for key in about:
        if before.get(key) != about[key]:
            old, new = (str(value)[:40] for value in (before.get(key), about[key]))
            raise InputError(f"{path.parent}: this run was started with {key} = {old}, not {new}; "
                             f"use another --out or the same options")
    for name, module in (("model.", model), ("ema.", ema)):
        module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
    state, parameters = {}, trained(model)
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            # The fused optimizer walks memory in order, so moments must lie as their parameter does (channels last).
            state.setdefault(int(i), {})[name] = torch.empty_like(parameters[int(i)]).copy_(value) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(header["seen"])


# ---------------------------------------------------------------------------------------------------------
# The loop

def train(task, model, dataset, cfg, out, compiled=()):
    """Trains `model` until cfg.images images are seen.

    `task` has loss(model, batch, generator) -> (loss, dict of terms to log), preview(ema, path) -> dict to log,
    save(ema, folder), `about`, a dict of what must not change when a run is continued, and `flops`, the structural
    floating-point operations of one training image.
    """
    device, bf16 = pick_device()
    out.mkdir(parents=True, exist_ok=True)
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for module in compiled:
        module.compile(fullgraph=True)  # in place: no "_orig_mod." in any name
    optimizer = torch.optim.AdamW(trained(model), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    about = {"seed": cfg.seed, "batch": cfg.batch, "images_in_data": len(dataset)} | asdict(model.config) | task.about
    about = json.loads(json.dumps(about))  # tuples become lists, as in the checkpoint
    state, log = out / "state.safetensors", out / "log.jsonl"
    seen = load_state(state, model, ema, optimizer, about) if state.exists() else 0
    history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    history = [entry for entry in history if entry["images"] <= seen]
    print(f"{type(model).__name__}: {sum(p.numel() for p in trained(model)):,} trained parameters, {device.type}, "
          f"{'bfloat16' if bf16 else 'float32'}, {len(dataset):,} images, starting at {seen:,} seen", flush=True)

    loader = DataLoader(dataset, batch_sampler=batches(len(dataset), cfg.batch, cfg.seed, seen),
                        num_workers=4 if device.type == "cuda" else 0, pin_memory=device.type == "cuda")
    model.train()
    total, steps, started = {}, 0, time.perf_counter()
    for batch in loader:
        if seen >= cfg.images:
            break
        batch = [x.to(device, non_blocking=True) for x in batch] if isinstance(batch, list) else batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (seen + cfg.batch) / max(cfg.warmup, 1), (cfg.images - seen) / max(cfg.cooldown, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, terms = task.loss(model, batch, generator(device, cfg.seed, seen))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained(model), cfg.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += cfg.batch
        steps += 1
        update_ema(ema, model, seen, cfg.batch, cfg.ema)
        for key, value in ({"loss": loss, "grad_norm": norm} | terms).items():
            total[key] = total.get(key, 0) + value.detach()

        if seen // cfg.batch % cfg.log_every == 0 or seen >= cfg.images:
            entry = {"images": seen} | summary(total, steps)  # the only place that waits for the device
            rate = steps * cfg.batch / (time.perf_counter() - started)
            if not math.isfinite(entry["loss"] + entry["grad_norm"]):  # before anything is saved: what is on disk is good
                kept = f"the last good state is {state}" if state.exists() else "there was no checkpoint yet"
                raise SystemExit(f"loss {entry['loss']}, gradient {entry['grad_norm']} after {seen:,} images: stopped; {kept}. "
                                 f"A lower --lr, a longer --warmup or a smaller --clip may help")
            if seen // cfg.batch % cfg.save_every == 0 or seen >= cfg.images:
                save_state(state, seen, model, ema, optimizer, about)
                task.save(ema, out / "weights" / task.name)
                entry |= task.preview(ema, out / "preview.png")
            history.append(entry)
            with open(f"{log}.tmp", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in history)
            os.replace(f"{log}.tmp", log)
            draw_curve(history, out / "loss.png")
            left = (cfg.images - seen) / rate / 3600
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
                  + f" | {rate:.1f} images/s, {rate * task.flops / 1e12:.3f} TFLOP/s, {left:.2f} h left", flush=True)
            total, steps, started = {}, 0, time.perf_counter()
    return ema


def summary(total, steps):
    """Means over an interval; a term that is a (2, bins) tensor holds sums and counts, and gives a list of means."""
    result = {}
    for key, value in total.items():
        if value.ndim == 2:
            result[key] = [round(s / n, 4) if n else None for s, n in value.T.tolist()]
        else:
            result[key] = value.item() / steps
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
        self.held_out, self.kl_weight, self.encoder, self.perceptual_weight = held_out, kl_weight, encoder, perceptual_weight
        self.about = {"kl_weight": kl_weight} | ({"perceptual_weight": perceptual_weight} if encoder else {})
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = vae.RadVAE(config)
            model.decode(model.encode(held_out[:1].to("meta"))[0])
        self.flops = 3 * counter.get_total_flops()

    def loss(self, model, x, rng):                                   # N 1 H W
        factor = 2 ** len(model.config.widths)                       # pixels a patchified latent cell
        noise = torch.randn(len(x), 4 * model.config.latent_channels, x.shape[2] // factor, x.shape[3] // factor,
                            generator=rng, device=x.device)
        encoder = self.encoder if self.perceptual_weight else None
        return vae.vae_loss(x, *model(x, noise), kl_weight=self.kl_weight, encoder=encoder, perceptual_weight=self.perceptual_weight)

    def save(self, ema, folder):
        lora.save(ema, folder) if lora.adapters(ema) else hub.save_model(ema, folder)

    @torch.no_grad()
    def preview(self, ema, path):
        x = self.held_out[:8].to(next(ema.parameters()).device)
        y = ema.decode(ema.encode(x)[0]).clamp(-1, 1)
        radiograph.save_image(radiograph.grid(torch.cat([x, y, y - x]), columns=8), path)
        return {f"held_out_{name}": score.mean().item() for name, score in vae.evaluate(ema, self.held_out, self.encoder).items()}


class RadiTTask:
    """RadiT on latents or pixels; previews the EMA's pictures for fixed noise and metadata, and its held-out loss."""
    name, about = "radit", {}
    save = staticmethod(hub.save_model)

    def __init__(self, config, held_out, decoder):
        self.config, self.held_out, self.decoder = config, held_out, decoder
        self.flops = 3 * radit.count_flops(config)

    def flow(self, model, batch, rng, drop):
        """Loss and time of each image, (N,), (N,). batch: mean, log-variance, age, codes."""
        cfg, (mean, logvar, age, codes) = self.config, batch
        def normal():
            return torch.randn(mean.shape, generator=rng, device=mean.device)
        x = mean + (0.5 * logvar).exp() * normal()                   # N C H W, a fresh draw from the posterior
        if drop:
            age, codes = radit.drop_metadata(age, codes, rng)
        t = flow.sample_times(len(x), cfg.shift, rng)                # N
        return flow.flow_loss(lambda x, t: model(x, t, age, codes), x, normal(), t, cfg.prediction), t

    def loss(self, model, batch, rng):
        losses, t = self.flow(model, batch, rng, drop=True)
        bins = torch.zeros(2, 8, device=t.device)                    # sums and counts by eighths of t
        bins.index_add_(1, (t * 8).long().clamp(0, 7), torch.stack([losses.detach(), torch.ones_like(losses)]))
        return losses.mean(), {"loss_by_t": bins}

    @torch.no_grad()
    def preview(self, ema, path):
        device = next(ema.parameters()).device
        held_out = [x.to(device) for x in self.held_out]
        loss = self.flow(ema, held_out, generator(device, 0, 0), drop=False)[0].mean().item()
        seeds = list(range(16))
        records = [self.config.examples[seed % len(self.config.examples)] for seed in seeds]
        radiograph.save_image(radiograph.grid(sample.generate(ema, self.decoder, records, seeds)[0]), path)
        return {"held_out_loss": loss}


class Examples(torch.utils.data.Dataset):
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
    decoder = vae.load(args.vae).to(pick_device()[0]) if latents else None
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
    if latents:  # so that RUN/weights can be sampled from as it is
        vae.copy(args.vae, args.out / "weights" / "vae")
    train(RadiTTask(config, few, decoder), model, examples, cfg, args.out, compiled=model.blocks if args.compile else ())


def train_vae(args, cfg):
    dataset = data.Radiographs(args.data, "train")
    held_out = data.Radiographs(args.data, "valid")
    held_out = torch.stack([held_out[i] for i in range(0, len(held_out), max(1, len(held_out) // 64))][:64])
    if not args.base and held_out.shape[-1] % 2 ** len(args.widths):
        raise InputError(f"{len(args.widths)} widths need images whose side is a multiple of {2 ** len(args.widths)} pixels, "
                         f"not {held_out.shape[-1]}")
    torch.manual_seed(cfg.seed)
    if args.base:  # only adapters are trained; the base lies beside them, as it is
        model = vae.load(args.base)
        lora.add(model, args.lora_rank, args.lora_alpha or args.lora_rank)
        vae.copy(args.base, args.out / "weights" / "vae")
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
            kind = cli.positive if field in ("images", "batch", "log_every", "save_every") else type(value)
            p.add_argument(f"--{field.replace('_', '-')}", type=kind, default=value, help="see TrainConfig in this file")
    p = commands.choices["vae"]
    p.add_argument("--widths", type=numbers, default=(128, 256, 512, 512), help="channels of each level, finest first")
    p.add_argument("--layers", type=cli.positive, default=2, help="residual blocks a level")
    p.add_argument("--groups", type=cli.positive, default=32, help="of GroupNorm")
    p.add_argument("--latent-channels", type=cli.positive, default=32)
    p.add_argument("--channels", type=int, choices=(1, 3), default=1, help="of the VAE's image; grey is repeated to 3")
    p.add_argument("--kl-weight", type=float, default=3e-4)
    p.add_argument("--encoder", type=Path, help="microsoft/rad-dino or weights/demo/classifier: measures, and teaches by its weight")
    p.add_argument("--perceptual-weight", type=float, default=250.0, help="of the encoder's loss; 0 measures only")
    p.add_argument("--base", type=Path, help="train a LoRA on the decoder of this VAE, such as black-forest-labs/FLUX.2-klein-4B")
    p.add_argument("--lora-rank", type=cli.positive, default=32)
    p.add_argument("--lora-alpha", type=float, help="the rank, if not given")
    p = commands.choices["radit"]
    p.add_argument("--size", choices=radit.SIZES, default="B")
    space = p.add_mutually_exclusive_group(required=True)
    space.add_argument("--latents", type=Path, help="made by python vae.py encode")
    space.add_argument("--pixels", action="store_true", help="no VAE: patches of pixels, data prediction")
    p.add_argument("--vae", type=Path, help="the VAE of the latents, for previews")
    p.add_argument("--patch", type=cli.positive, default=16, help="pixels a token on each side, with --pixels")
    p.add_argument("--shift", type=float, default=1.0, help="time shift towards noise; above 1 for many tokens")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=bool(shutil.which("g++")),
                   help="compile each block, which needs a C++ compiler")
    plan.add_arguments(commands.add_parser("plan", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                           help="what a training of RadiT would cost; nothing is built"))
    args = parser.parse_args()
    if args.command == "plan":
        return plan.show(args)
    if args.command == "radit" and args.latents and not args.vae:
        parser.error("--latents needs --vae, the VAE that they were made with")
    cfg = TrainConfig(**{field: getattr(args, field) for field in asdict(TrainConfig())})
    {"vae": train_vae, "radit": train_radit}[args.command](args, cfg)


if __name__ == "__main__":
    cli.run(main)
