"""What is trained, and by which command: Rad-VAE on images, RadiT on cached latents or on pixels. The loop is loop.py.

    python train.py vae   --data PREPARED... --out RUN                 or, on a base: --base FLUX.2 --lora-rank 32
    python train.py radit --data PREPARED... --latents LATENTS --size XS --out RUN
    python train.py plan  --size XL --tokens 1.6e12 --gpus 64          what that would cost
    python train.py export RUN OUT                                     the EMA as weights that sample.py reads

On several GPUs the same commands start with `torchrun --nproc_per_node=8 train.py ...`. The same command again continues.
"""
import argparse
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import cli
import data
import fields
import flow
import hub
import lora
import parallel
import plan
import raddino
import radiograph
import radit
import sample
import vae
from cli import InputError, pick_device
from latents import Latents, names_of
from loop import Draw, TrainConfig, generator, micro_batch, train


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
            radiograph.save_image(radiograph.grid(torch.cat([x, y, y - x]), columns=8), path)
        return {f"held_out_{name}": score.mean().item() for name, score in vae.evaluate(ema, self.held_out, self.encoder).items()}


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
            radiograph.save_image(radiograph.grid(images), path)
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
    if latents and parallel.rank == 0:  # so that RUN/weights can be sampled from as it is
        vae.copy(args.vae, args.out / "weights" / "vae")
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
        model = vae.load(args.base)
        lora.add(model, args.lora_rank, args.lora_alpha or args.lora_rank)
        if parallel.rank == 0:
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
    parser = cli.Parser(description="Train Rad-VAE or RadiT; the same command again resumes. Or export what was trained.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {"vae": TrainConfig(), "radit": TrainConfig(batch=64, ema=100_000, warmup=20_000)}
    for name, default in defaults.items():
        p = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--data", nargs="+", required=True, help="prepared sources")
        p.add_argument("--out", type=Path, required=True, help="the run's folder")
        for field, value in asdict(default).items():
            kind = cli.positive if field in ("images", "batch", "log_every", "save_every", "keep", "accumulate") else type(value)
            p.add_argument(f"--{field.replace('_', '-')}", type=kind, default=value, help="see TrainConfig in loop.py")
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
    p.add_argument("--checkpointing", action="store_true", help="compute each block's activations twice instead of keeping them")
    p.add_argument("--fsdp", action="store_true", help="split weights, moments and EMA among torchrun's processes")
    p = commands.add_parser("export", help="write the EMA of a run as weights that sample.py reads")
    p.add_argument("run", type=Path, help="the folder of a run of yours: its checkpoints are unpickled")
    p.add_argument("out", type=Path)
    plan.add_arguments(commands.add_parser("plan", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                           help="what a training of RadiT would cost; nothing is built"))
    args = parser.parse_args()
    if args.command == "plan":
        return plan.show(args)
    if args.command == "export":
        seen = checkpoint.export(args.run, args.out)
        return print(f"{args.out}: the EMA of {args.run} after {seen:,} images")
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
