"""Training: what is trained (Rad-VAE on images, RadiT on cached latents or on pixels), and the loop that trains it.

The clock is the number of images seen. Data order, noise, times and dropout depend only on the seed, on the images seen
and on an image's place in the batch; the checkpoint holds everything else. So the same command again continues the
run, and its losses are those of a run that was never stopped: bit for bit on the same number of processes (on CPUs; on
GPUs where attention is deterministic), to rounding on another number.

    batch = world x accumulate x micro     process r computes the images [(m world + r) micro, ...) of it, m = 0, 1, ...

    RUN/checkpoints/        the state of the training, to continue from: training/checkpoint.py
        log.jsonl           losses, speed and memory: training/log.py
        loss.png            the losses as a plot
        weights/            an average of the weights over the last images (EMA), as sample.py and autoencoder/load.py
                            read it: of the half-lives kept, the one with the least held-out loss (Karras et al. 2024)
        preview.png         what that average does now, for fixed inputs
        stopped             written after SIGTERM or SIGUSR1, which schedulers send before they take a node away. The
                            step was finished and saved, and each process left with status 75: start the command again

    python train.py vae   --data PREPARED... --out RUN
    python train.py vae   --data PREPARED... --base black-forest-labs/FLUX.2-klein-4B --lora-rank 32 --out RUN
    python train.py radit --data PREPARED... --latents LATENTS --vae VAE --size XS --out RUN
    python train.py radit --data PREPARED... --pixels [--encoder weights/demo/classifier] --size XS --out RUN
    python train.py radit --data PREPARED... --latents LATENTS --init WEIGHTS [--lora-rank 8] --out RUN     (fine-tune)

On several GPUs the same commands start with `torchrun --nproc_per_node=8 train.py ...`; see training/README.md.
"""
import contextlib
import json
import math
from dataclasses import asdict

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import flow
import radit
import sample
import vae
from autoencoder import lora
from autoencoder.latents import Latents, evaluate, names_of
from autoencoder.load import copy_vae, load_vae, locate_vae
from autoencoder.widen import widen
from baselines import radunet
from common import cli, hub
from common.cli import InputError, pick_device
from encoders import raddino
from encoders.perceptual import perceptual_loss
from radiographs import fields, pixels
from training import checkpoint, dry_run, finetune, float8, parallel
from training.examples import Examples, synthetic_metadata
from training.log import Log, means
from training.muon import Muon
from training.options import read_options
from training.randomness import RandomNumbers, batches, generator

PERCEPTUAL_FROM = 0.3  # time from which a perceptual loss on predicted pixels counts
STOPPED = 75    # the exit status of a run that was asked to stop
ASK_EVERY = 8   # steps after which several processes ask each other whether one was told to stop
EMA_EVERY = 4   # steps after which averages are updated, a quarter of the reading and writing of every step


def learning_rate(cfg, seen):
    """The rate of the step that starts after `seen` images: a linear rise, a constant, a linear fall."""
    return cfg.lr * min(1, (seen + cfg.batch) / max(cfg.warmup, 1), (cfg.images - seen) / max(cfg.cooldown, 1))


def trainable_parameters(model):
    """All parameters of a model, or only those of its adapters (LoRA)."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def update_ema(ema, model, images_seen, images_since, half_life):
    """ema <- lerp(ema, model), in float32, for the `images_since` that were seen since the update before; the half-life
    is at most a twentieth of the images seen, as in EDM2."""
    decay = 0.5 ** (images_since / max(min(half_life, images_seen / 20), 1e-9))
    pairs = [(a, p) for a, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    averages, parameters = [parallel.local(a) for a, _ in pairs], [parallel.local(p) for _, p in pairs]
    torch._foreach_lerp_(averages, parameters, 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


# ---------------------------------------------------------------------------------------------------------
# The loop, one for every model, on one device or under torchrun on many

def train(task, model, dataset, cfg, out, layout=parallel.Layout(), may_change=()):
    """Trains `model` until cfg.images images are seen; returns the EMA that is best on held-out images. Under torchrun
    every process calls it with the same arguments.

    task        `name`; `flops`, the structural floating-point operations of one training image; `about`, a dict of
                what must not change when a run is continued; loss(model, batch, rng) -> (loss, dict of terms to log);
                measure(ema, micro) -> dict of numbers on held-out images, computed `micro` at a time, among them
                "held_out_loss" if there are several EMAs; save(ema, folder). Optional: finish(model), called after
                every step, and preview(ema, path, micro), where a path of None writes nothing.
    layout      which blocks are compiled, computed again in the backward pass, split, or computed in float8
    may_change  keys of the configuration that may differ from those of the run that is continued
    """
    micro, world, rank = parallel.micro_batch(cfg.batch, cfg.accumulate), parallel.world, parallel.rank
    parallel.join()
    with parallel.locked(out), parallel.catch_signals() as asked, contextlib.ExitStack() as stack:
        device, bf16 = pick_device()
        config, size = asdict(model.config), sum(parameter.numel() for parameter in trainable_parameters(model))
        about = {"seed": cfg.seed, "batch": cfg.batch, "images_in_data": len(dataset)} | config | task.about
        about = json.loads(json.dumps(about))                        # tuples become lists, as in the checkpoint
        called, emas, plain = parallel.set_up(model, len(cfg.ema), bf16, layout)
        # Clipping (foreach), fused AdamW and the averages' lerp (foreach) are few kernels already. torch.compile of the
        # three in one function took 0.87 to 1.05 of their time (CPU time, 10M parameters, five rounds) after 20 s of
        # compilation, so they are not compiled. Not measured on a GPU.
        optimizer = (Muon(model, cfg.lr, (0.9, 0.99)) if cfg.optimizer == "muon" else torch.optim.AdamW(
            trainable_parameters(model), cfg.lr, (0.9, 0.99), weight_decay=0.0, fused=True))
        checkpoint.start_moments(optimizer)
        state = checkpoint.tensors_of(model, emas, optimizer)
        seen, averaged = checkpoint.resume(out, state, about, may_change)  # images; images when averages were updated
        writer, log = checkpoint.Writer(out, cfg.keep), Log(out, seen, cfg, task.flops, cfg.logger, asdict(cfg) | about)
        log.log(f"{type(model).__name__}: {size:,} trained parameters, {device.type}, "
                f"{'bfloat16' if bf16 else 'float32'}, {world} {'processes' if world > 1 else 'process'}, "
                f"{len(dataset):,} images, starting at {seen:,} seen")
        if rank == 0:
            (out / "stopped").unlink(missing_ok=True)

        parts = [slice(start, start + micro) for start in range(rank * micro, cfg.batch, world * micro)]
        indices = (batch[part] for batch in batches(len(dataset), cfg.batch, cfg.seed, seen) for part in parts)
        loader = stack.enter_context(contextlib.closing(parallel.read(dataset, indices, device)))
        model.train()
        total, steps, best = {}, 0, 0
        while seen < cfg.images:
            rate = learning_rate(cfg, seen)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for part in parts:
                batch = parallel.to_device(next(loader), device)
                rng = RandomNumbers(generator(device, cfg.seed, seen), cfg.batch, part)
                with parallel.last_only(called, part is parts[-1]):
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        loss, terms = task.loss(called, batch, rng)
                    (loss / cfg.accumulate).backward()
                # Terms are means over images, or sums and counts in (2, bins).
                for key, value in ({"loss": loss} | terms).items():
                    value = value.detach() if value.ndim else value.detach() / cfg.accumulate
                    total[key] = total.get(key, 0) + value
            total["grad_norm"] = total.get("grad_norm", 0) + parallel.clip(trainable_parameters(model), cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(task, "finish"):
                task.finish(model)
            seen += cfg.batch
            steps += 1
            step, done = seen // cfg.batch, seen >= cfg.images
            if step % EMA_EVERY == 0 or step % cfg.save_every == 0 or done:  # what is saved as weights is up to date
                for ema, half_life in zip(emas, cfg.ema):
                    update_ema(ema, model, seen, seen - averaged, half_life)
                averaged = seen
            if log.first:
                parallel.set_timeout(parallel.TIMEOUT)               # the first step, which compiles, is over
            log.step(seen, loss)
            writer.poll()

            stop = (world == 1 or step % ASK_EVERY == 0) and parallel.anyone(bool(asked)) and not done
            save = step % cfg.save_every == 0 or done or stop
            if not save and step % cfg.log_every:
                continue
            entry = {"images": seen, "rate": rate} | means(total, steps)  # the only place that waits for the device
            checkpoint.refuse_unless(math.isfinite(entry["loss"] + entry["grad_norm"]), entry, writer, out)
            entry |= log.speed(device)
            measured = save and not stop                             # a node about to be taken away has no time
            if save:
                checkpoint.refuse_unless(checkpoint.all_finite(state), entry, writer, out)
            if measured:
                with parallel.long_timeout(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    numbers, best = measure(task, emas, cfg, micro)
                entry |= numbers
            log.write(entry)                                         # first, so that no checkpoint is without its line
            if save:
                writer.save(state, {"images": seen, "averaged": averaged, "name": task.name, "config": config,
                                    "about": about, "ema": list(cfg.ema), "processes": world})
            if measured:
                with parallel.long_timeout(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    save_weights(task, emas[best], plain, out, micro)
            log.start_interval()
            if stop:
                leave_stopped(writer, log, out, seen)
            total, steps = {}, 0
        writer.wait()
        log.close()
        log.log(f"done: {seen:,} images; weights in {out / 'weights'}")
        return emas[best]


def measure(task, emas, cfg, micro):
    """The numbers on held-out images of the average with the least held-out loss, and which of the averages that is."""
    measured = [task.measure(ema, micro) for ema in emas]
    if len(emas) == 1:
        return measured[0], 0
    losses = {str(half_life): numbers["held_out_loss"] for half_life, numbers in zip(cfg.ema, measured)}
    best = min(range(len(emas)), key=lambda number: measured[number]["held_out_loss"])
    best = parallel.agreed(best, parallel.training)
    return measured[best] | {"held_out_loss_by_ema": losses}, best


def save_weights(task, ema, plain, out, micro):
    """Writes RUN/weights and RUN/preview.png. The first process writes; where tensors are split, all take part."""
    whole = parallel.whole(ema, plain)
    if parallel.rank == 0:
        task.save(whole, out / "weights" / task.name)
    if hasattr(task, "preview"):
        task.preview(ema, out / "preview.png" if parallel.rank == 0 else None, micro)


def leave_stopped(writer, log, out, seen):
    writer.wait()
    if parallel.rank == 0:
        (out / "stopped").touch()                                    # tells the scheduler's script to start it again
    parallel.leave()
    log.close()
    log.log(f"asked to stop: all saved at {seen:,} images; the same command continues")
    raise SystemExit(STOPPED)


# ---------------------------------------------------------------------------------------------------------
# What is trained

class VAETask:
    """Rad-VAE on images. The preview shows held-out images: original, reconstruction, difference.

    encoder  None, or an encoder of encoders/raddino.py: measures the reconstructions and, if perceptual_weight is not
             0, adds the perceptual loss
    base     None, or the VAE on whose decoder a LoRA is trained
    crop     side in pixels of the squares to train on; None for whole images
    """
    name = "vae"

    def __init__(self, config, held_out, kl_weight, encoder=None, perceptual_weight=0.0, base=None, crop=None):
        self.config, self.held_out, self.raw, self.base, self.crop = config, held_out, [], base, crop
        self.kl_weight, self.encoder, self.perceptual_weight = kl_weight, encoder, perceptual_weight
        self.about = {"kl_weight": kl_weight} | ({"perceptual_weight": perceptual_weight} if encoder else {})
        self.about |= {"crop": crop} if crop else {}
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = vae.RadVAE(config)
            model.decode(model.encode(held_out[:1, :, :crop, :crop].to("meta"))[0])
        self.flops = 3 * counter.get_total_flops()

    def reconstruct(self, model, x, rng):                            # N 1 H W
        """Loss, its terms, and the means before normalisation (N 4c h w)."""
        cell = 2 ** len(self.config.widths)                          # pixels on the side of a patchified latent cell
        noise = rng.normal(4 * self.config.latent_channels, x.shape[2] // cell, x.shape[3] // cell)  # N 4c h w
        y, mean, logvar = model(x, noise)
        encoder = self.encoder if self.perceptual_weight else None
        return *vae.vae_loss(x, y, mean, logvar, kl_weight=self.kl_weight, encoder=encoder,
                             perceptual_weight=self.perceptual_weight), mean

    def loss(self, model, x, rng):                                   # N 1 H W
        if self.crop:
            x = random_squares(x, self.crop, rng.uniform(2))         # N 1 crop crop
        loss, terms, mean = self.reconstruct(model, x, rng)
        self.raw.append(mean.detach().float())
        return loss, terms

    def finish(self, model):
        """Updates the running statistics with a whole batch, however many parts and processes computed it."""
        model.bn(parallel.gathered(torch.cat(self.raw)))
        self.raw.clear()

    def save(self, ema, folder):
        if not self.base:
            return hub.save_model(ema, folder)
        copy_vae(self.base, folder)                                  # unchanged; the adapters lie beside it
        lora.save(ema, folder)

    @torch.no_grad()
    def measure(self, ema, micro):
        device, total = next(ema.parameters()).device, 0
        for part in chunks(len(self.held_out), micro):
            rng = RandomNumbers(generator(device, 0, 0), len(self.held_out), part)
            x = self.held_out[part].to(device)                       # n 1 H W
            total += len(x) * self.reconstruct(ema, x, rng)[0].item()
        with torch.autocast(device.type, enabled=False):
            scores = evaluate(ema, self.held_out, self.encoder)
        scores = {f"held_out_{name}": score.mean().item() for name, score in scores.items()}
        return {"held_out_loss": total / len(self.held_out)} | scores

    @torch.no_grad()
    def preview(self, ema, path, micro):
        if path:
            x = self.held_out[:8].to(next(ema.parameters()).device)
            y = ema.decode(ema.encode(x)[0]).float().clamp(-1, 1)
            captions = [text for text in ("held out", "reconstruction", "difference") for _ in x]
            pixels.save_image(pixels.grid(torch.cat([x, y, y - x]), len(x), captions), path)


def random_squares(x, side, random):                                 # N 1 H W, N 2 in [0, 1)
    """One square of each image, at a random place: convolutions learn the same from parts, at less cost."""
    places = torch.tensor([x.shape[2] - side + 1, x.shape[3] - side + 1])
    corners = (random.cpu() * places).long().tolist()                # row and column of the first pixel
    return torch.stack([image[:, i:i + side, j:j + side] for image, (i, j) in zip(x, corners)])  # N 1 side side


class RadiTTask:
    """RadiT on latents or pixels, or in the same way the baseline, under the name "radunet". The preview shows images
    that the EMA generates from fixed noise and metadata.

    held_out    a batch: mean, log-variance, age, codes
    decoder     the VAE of the latents, for previews; None for pixels
    vae_folder  its folder, which is copied beside the weights, so that sample.py can use them
    encoder     None, or for pixels an encoder of encoders/raddino.py: adds a perceptual loss of that weight
    """

    def __init__(self, config, held_out, decoder, vae_folder=None, about=None, encoder=None, perceptual_weight=0.0):
        self.name = "radunet" if isinstance(config, radunet.RadUNetConfig) else "radit"
        self.config, self.held_out, self.decoder, self.vae_folder = config, held_out, decoder, vae_folder
        self.encoder, self.perceptual_weight = encoder, perceptual_weight
        self.about = (about or {}) | ({"perceptual_weight": perceptual_weight} if encoder else {})
        self.flops = 3 * (radunet if self.name == "radunet" else radit).count_flops(config)

    def flow(self, model, batch, rng, drop):
        """Of a batch (mean, log-variance, age, codes): each image's loss (N,) and time (N,), the images and what the
        model predicts them to be (N C H W each); `drop` metadata or not."""
        cfg, (mean, logvar, age, codes) = self.config, batch
        shape = mean.shape[1:]                                       # C H W
        x = mean + (0.5 * logvar).exp() * rng.normal(*shape)         # N C H W, a sample of the posterior
        if drop:
            age, codes = radit.drop_metadata(age, codes, rng.uniform(4 + codes.shape[1]))
        t = rng.rows(lambda count, generator: flow.sample_times(count, cfg.shift, generator))  # N
        losses, predicted = flow.flow_loss(lambda x, t: model(x, t, age, codes), x, rng.normal(*shape), t,
                                           cfg.prediction)
        return losses, t, x, predicted

    def loss(self, model, batch, rng):
        losses, t, x, predicted = self.flow(model, batch, rng, drop=True)
        bins = torch.zeros(2, 8, device=t.device)                    # sums and counts by eighths of t
        bins.index_add_(1, (t * 8).long().clamp(0, 7), torch.stack([losses.detach(), torch.ones_like(losses)]))
        terms = {"loss_by_t": bins}
        if self.encoder:
            # Near noise the best prediction is a blur of many images, which no encoder should judge (PixelGen, Ma et
            # al. 2026): loss = |v_theta - v|² + w [t >= 0.3] d(x1_hat, x1),  x1_hat = x_t + (1 - t) v_theta
            distance = (t >= PERCEPTUAL_FROM) * perceptual_loss(self.encoder, x, predicted, last_only=True)  # N
            losses, terms["perceptual"] = losses + self.perceptual_weight * distance, distance.mean()
        return losses.mean(), terms

    def save(self, ema, folder):
        if self.about.get("lora_rank"):
            lora.save(ema, folder)                                   # beside the base, which was written at the start
        else:
            hub.save_model(ema, folder)
        if self.vae_folder:
            copy_vae(self.vae_folder, folder.parent / "vae")

    @torch.no_grad()
    def measure(self, ema, micro):
        device, count, total = next(ema.parameters()).device, len(self.held_out[0]), 0
        for part in chunks(count, micro):
            rng = RandomNumbers(generator(device, 0, 0), count, part)
            batch = [x[part].to(device) for x in self.held_out]
            total += self.flow(ema, batch, rng, drop=False)[0].sum().item()
        return {"held_out_loss": total / count}

    @torch.no_grad()
    def preview(self, ema, path, micro):
        seeds, examples = list(range(16)), self.config.examples or [{}]
        records = [examples[seed % len(examples)] for seed in seeds]
        batch = max(1, min(16, micro // 2))                          # guidance doubles it
        images, _ = sample.generate(ema, self.decoder, records, seeds, batch=batch)
        if path:
            pixels.save_image(pixels.grid(images, captions=[sample.caption(record) for record in records]), path)


def chunks(count, size):
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# ---------------------------------------------------------------------------------------------------------
# From the command line

def read_radit_data(args, datasets):
    """The training examples, 256 held-out ones as a batch, and a dict of the data's part of RadiT's config. Codes of
    data sets are places in `datasets`, to which new ones are appended."""
    images = data.Radiographs(args.data)
    latents, names = None, [None] * len(images)
    if args.latents:
        latents, names = Latents(args.latents), names_of(images)
        if latents.vae != hub.fingerprint(locate_vae(args.vae)[1]):
            raise InputError(f"{args.latents} holds latents of another VAE than {args.vae}; encode again")
        latents.check(images)
    splits = {}
    for split in ("train", "valid"):
        places = splits[split] = [i for i, record in enumerate(images.records) if record["split"] == split]
        if not places:
            raise InputError(f"{', '.join(args.data)}: no image in the split {split}{data.SPLIT_HELP}")
    records = [images.records[i] for i in splits["train"]]
    datasets = [*datasets, *sorted({record["dataset"] for record in images.records if "dataset" in record}
                                   - set(datasets))]
    examples, held_out = (Examples([images.records[i] for i in places], datasets, latents, [names[i] for i in places])
                          for places in splits.values())
    return examples, held_out.some(256), {"datasets": datasets, "covered": fields.coverage(records),
                                          "pairs": fields.count_pairs(records),
                                          "examples": synthetic_metadata(records, args.seed)}


def train_radit(args, cfg):
    parallel.join()
    base = sample.load_weights(args.init)[0] if args.init else None
    known = base.config.datasets if base else fields.DATASETS
    examples, held_out, described = parallel.on_first(lambda: read_radit_data(args, known))
    decoder = load_vae(args.vae).to(pick_device()[0]) if args.latents else None
    encoder = raddino.load_encoder(args.encoder).to(pick_device()[0]) if args.encoder else None
    shape = held_out[0].shape[1:]                                    # C H W
    vae_fingerprint = decoder.fingerprint if decoder else ""
    if args.init:
        config = finetune.extend_config(base.config, shape, vae_fingerprint, **described)
    else:
        sizes, default_patch = (radunet.SIZES, 8) if args.model == "radunet" else (radit.SIZES, 16)
        size, patch = args.size or "B", (args.patch or default_patch) if args.pixels else 1
        if size not in sizes:
            raise InputError(f"--size {size}: {args.model} has the sizes {', '.join(sizes)}")
        if shape[1] % patch or shape[2] % patch:
            raise InputError(f"--patch {patch} does not divide the images' side of {shape[1]} pixels")
        described |= {"channels": shape[0], "grid": tuple(shape[1:]), "patch": patch, "shift": args.shift or 1.0,
                      "prediction": args.prediction or ("data" if args.pixels else "velocity"), "vae": vae_fingerprint}
        if args.model == "radunet":
            width, multiples, blocks, attending = sizes[size]
            config = radunet.RadUNetConfig(width=width, multiples=multiples, blocks=blocks, attending=attending,
                                           **described)
        else:
            width, depth, heads = sizes[size]
            config = radit.RadiTConfig(width=width, depth=depth, heads=heads, **described)
    # Adam's rate falls as the width grows (Yang et al. 2022, table 3); 1e-3 was found good at XS's width, other sizes
    # are not tuned. Trained weights need smaller steps; adapters, which start from zero, do not.
    if cfg.lr is None:
        width = 4 * config.width if args.model == "radunet" else config.width  # of c, which is 256 wide in both XS
        cfg.lr = 1e-3 * 256 / width * (0.1 if args.init and not args.lora_rank else 1)
    if args.fp8:
        float8.check_tokens(cfg.batch // ((args.dry_run or parallel.world) * cfg.accumulate) * config.tokens)
    if args.dry_run:
        return dry_run.show(args, cfg, config, len(examples), decoder)
    torch.manual_seed(cfg.seed)
    model, about = radunet.RadUNet(config) if args.model == "radunet" else radit.RadiT(config), {}
    if args.init:
        model = finetune.extend(base, config)
        about = {"init": hub.fingerprint(args.init / "radit"), "lora_rank": args.lora_rank}
    if args.lora_rank:  # only adapters are trained; their base, with its new data sets, is saved once
        folder = args.out / "weights" / "radit"
        parallel.on_first(lambda: hub.save_model(model, folder))
        model.fingerprint = hub.fingerprint(folder / "model.safetensors")
        lora.add(model, args.lora_rank, args.lora_alpha or args.lora_rank)
    task = RadiTTask(config, held_out, decoder, args.vae if decoder else None, about, encoder, args.perceptual_weight)
    layout = parallel.Layout(compiled=model.blocks if args.compile else (),
                             recomputed=model.blocks if args.recompute else (),
                             sharded=model.blocks if args.fsdp else (), float8=model.blocks if args.fp8 else ())
    train(task, model, examples, cfg, args.out, layout,
          may_change=("covered", "pairs", "examples") if args.changed_labels else ())


def train_vae(args, cfg):
    parallel.join()
    dataset = parallel.on_first(lambda: data.Radiographs(args.data, "train"))
    held_out = parallel.on_first(lambda: data.Radiographs(args.data, "valid"))
    held_out = torch.stack([held_out[i] for i in range(0, len(held_out), max(1, len(held_out) // 64))][:64])
    torch.manual_seed(cfg.seed)
    if args.base:  # only adapters are trained
        model = load_vae(args.base)
        lora.add(model, args.lora_rank, args.lora_alpha or args.lora_rank)
    elif args.init:
        base = load_vae(args.init)
        model = widen(base, args.latent_channels)
    else:
        given = {name: getattr(args, name) for name in ("channels", "latent_channels", "widths", "layers", "groups")}
        model = vae.RadVAE(vae.VAEConfig(**{name: value for name, value in given.items() if value is not None}))
    cell, side = 2 ** len(model.config.widths), held_out.shape[-1]   # pixels of a latent cell, of an image
    if not args.base and side % cell:
        raise InputError(f"{len(model.config.widths)} widths need images whose side is a multiple of {cell} pixels, "
                         f"not {side}")
    if args.crop and (args.crop % cell or args.crop > side):
        raise InputError(f"--crop {args.crop}: not a multiple of {cell} pixels, or more than the images' {side}")
    encoder = raddino.load_encoder(args.encoder).to(pick_device()[0]) if args.encoder else None
    task = VAETask(model.config, held_out, args.kl_weight, encoder, args.perceptual_weight, args.base, args.crop)
    if args.base:
        task.about |= {"base": model.fingerprint, "lora_rank": args.lora_rank}
    if args.init:
        task.about |= {"init": base.fingerprint}
    if cfg.lr is None:
        cfg.lr = 1e-4 if args.init else 1e-3
    # Channels last makes bfloat16 convolutions faster; in float32 it costs a quarter of the speed on a CPU.
    order = torch.channels_last if pick_device()[1] else torch.contiguous_format
    # In bfloat16 a compiled small VAE reached a far worse loss than an eager one (torch 2.13 on a CPU).
    compiled = (model,) if args.compile and args.crop and not pick_device()[1] else ()
    train(task, model.to(memory_format=order), dataset, cfg, args.out, parallel.Layout(compiled=compiled))


def main():
    args, cfg = read_options()
    if args.command == "vae":
        train_vae(args, cfg)
    else:
        train_radit(args, cfg)
    parallel.leave()


if __name__ == "__main__":
    cli.run(main)
