"""The training loop, one for every model, on one device or under torchrun on many.

The clock is the number of images seen. Data order, noise, times and dropout depend only on (seed, images seen) and the
image's place in the batch, and the checkpoint holds everything else. So the same command again continues the run, and
its losses are those of a run that was never stopped: bit for bit on as many processes, to rounding on others.

    batch = world x accumulate x micro     process r computes images [(m world + r) micro, ...) of the batch, m = 0, 1, ...

RUN/ checkpoints/        see checkpoint.py                                         log.jsonl   one line an interval
    weights/             the EMA, as sample.py and vae.py load it                  loss.png    the curve
    preview.png          what the EMA does now, for fixed inputs

SIGTERM and SIGUSR1, as schedulers send them before they take a node away: the step is finished, a checkpoint written,
and every process leaves with status 75 (EX_TEMPFAIL): start me again. torchrun's own status is then 1, with 75 in its report.
"""
import contextlib
import copy
import functools
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass

import torch
from matplotlib.figure import Figure
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

import checkpoint
import cli
import parallel
from cli import InputError, pick_device

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


def trained(model):
    """The parameters that are trained: all, or a LoRA's."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def clip(parameters, largest):
    """Scales the gradients, wherever their parts lie, to a norm of at most `largest`; returns the norm before."""
    norm = parallel.full(get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


@contextlib.contextmanager
def listening():
    """A list that SIGTERM and SIGUSR1 append to."""
    asked = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def deaf(worker):
    """A data loader's worker leaves with its parent, not before: schedulers send their signals to every process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def set_up(model, bf16, compiled, checkpointed, sharded):
    """The model to call, the EMA, and an empty copy of it to be filled when weights are saved. The blocks named change in
    place, in their `forward` only, so that no name changes and FSDP's hooks stay outside of what is compiled."""
    blocks = set(sharded)
    places = [name for name, module in model.named_modules() if module in blocks]
    plain = copy.deepcopy(model).to("meta") if sharded else None
    model.to(pick_device()[0])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for block in compiled:
        block.forward = torch.compile(block.forward, fullgraph=True)
    for block in checkpointed:  # nothing in a block is random, so no state of a generator has to be kept
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    if not sharded:
        return parallel.replicate(model), ema, ema
    parallel.shard(model, sharded, bf16)
    parallel.shard(ema, [ema.get_submodule(place) for place in places], bf16=False)
    return model, ema, plain


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
    name, config, size = type(model).__name__, asdict(model.config), sum(p.numel() for p in trained(model))
    about = {"seed": cfg.seed, "batch": cfg.batch, "images_in_data": len(dataset)} | config | task.about
    about = json.loads(json.dumps(about))  # tuples become lists, as in the checkpoint
    called, ema, plain = set_up(model, bf16, compiled, checkpointed, sharded)
    optimizer = torch.optim.AdamW(trained(model), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
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
                             pin_memory=device.type == "cuda", worker_init_fn=deaf))  # workers are two batches ahead each
    model.train()
    total, steps, started = {}, 0, time.perf_counter()
    with listening() as asked:
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
            total["grad_norm"] = total.get("grad_norm", 0) + clip(trained(model), cfg.clip)
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
