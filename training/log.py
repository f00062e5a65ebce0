"""What a training prints while it runs (a progress bar on a terminal, and lines of text), and in the run's folder

    log.jsonl   one JSON object a line: images seen, learning rate, mean loss and its terms since the line before, norm
                of the gradient, images_per_second, teraflops_per_second (the model's own operations, by structure),
                peak_memory_gb, and at every save the measures on held-out images
    loss.png    training loss and held-out loss

and, if asked for, the same numbers in TensorBoard or Weights & Biases. Only the first process prints and writes. A
training prints after its first step, and then at least once a minute.
"""
import importlib
import importlib.util
import json
import resource
import sys
import time

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from common import cli
from training import parallel

LOGGERS = ("tensorboard", "wandb")
SPEED = ("images_per_second", "teraflops_per_second", "peak_memory_gb")
MINUTE = 60  # seconds


class Log:
    def __init__(self, out, seen, cfg, flops, logger=None, settings=None):
        """Continues RUN/log.jsonl from `seen` images on. flops: operations of one training image; logger: None or one
        of LOGGERS, which also shows `settings`."""
        self.path, self.plot, self.cfg, self.flops, self.seen = out / "log.jsonl", out / "loss.png", cfg, flops, seen
        self.history, self.first, self.bar, self.report = read_log(self.path, seen), True, None, None
        self.start_interval()
        if parallel.rank == 0:
            self.report = open_logger(logger, out, settings)
            self.bar = tqdm(total=cfg.images, initial=seen, unit="image", unit_scale=True, disable=None, leave=False)

    def log(self, text):
        """A line of text, from the first process."""
        if parallel.rank == 0:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def step(self, seen, loss):
        """Called after every step. After the first one it waits for the device, to print how long the step took."""
        self.seen = seen
        if self.bar is not None:
            self.bar.update(seen - self.bar.n)
        if self.first:
            self.first = False
            value = loss.item()
            elapsed = time.perf_counter() - self.begun
            self.log(f"first step done after {elapsed:.1f} s, compilation included: loss {value:.4g}")
            self.begun, self.seen_before = time.perf_counter(), seen
        elif time.perf_counter() - self.line_time > MINUTE:
            self.line_time = time.perf_counter()
            speed = self.images_per_second()
            self.log(f"images {seen:,} of {self.cfg.images:,} | {self.cfg.batch / speed:.3g} s a step, "
                     f"{self.left(speed)}")

    def images_per_second(self):
        """The speed in this interval; None before its first step."""
        images = self.seen - self.seen_before
        return images / (time.perf_counter() - self.begun) if images else None

    def left(self, speed):
        hours = max(0, self.cfg.images - self.seen) / speed / 3600    # whole batches: the last may go beyond
        return f"{hours:.2f} h left" if hours >= 1 else f"{60 * hours:.1f} min left"

    def speed(self, device):
        """Speed and memory, for a line of log.jsonl."""
        speed = self.images_per_second()
        teraflops = speed * self.flops / 1e12 if speed else None
        return dict(zip(SPEED, (speed, teraflops, peak_memory(device) / 1e9)))

    def speed_in_words(self, entry):
        speed, teraflops, memory = (entry[key] for key in SPEED)
        if not speed:
            return ""
        return f" | {speed:.3g} images/s, {teraflops:.3g} TFLOP/s, {memory:.2g} GB, {self.left(speed)}"

    def write(self, entry):
        """Writes a line of log.jsonl and one of text, the plot, and to the logger."""
        if parallel.rank == 0:
            self.history.append(entry)
            cli.write_text(self.path, "".join(json.dumps(cli.finite(line)) + "\n" for line in self.history))
            plot_losses(self.history, self.plot)
            numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
            if self.report:
                self.report(numbers, entry["images"])
            self.log(f"images {entry['images']:,} " + " ".join(f"{key} {value:.4g}" for key, value in numbers.items()
                                                               if key not in SPEED) + self.speed_in_words(entry))

    def start_interval(self):
        """Speed is measured from here to the next line: what was written and drawn for the last one does not count."""
        self.begun = self.line_time = time.perf_counter()            # start of the interval; last line printed
        self.seen_before = self.seen                                 # images seen when the interval began

    def close(self):
        if self.bar is not None:
            self.bar.close()


def means(total, steps):
    """Means over an interval and all processes. A (2, bins) tensor holds sums and counts, and becomes a list of
    means."""
    result = {}
    for key, value in total.items():
        value = parallel.summed(value)
        if value.ndim == 2:
            result[key] = [round(s / n, 4) if n else None for s, n in value.T.tolist()]
        else:
            result[key] = value.item() / (steps * parallel.world)
    return result


def read_log(path, seen):
    """The lines of a log.jsonl up to `seen` images."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["images"] <= seen]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise cli.InputError(f"{path}: damaged ({type(error).__name__}); rename it, and a new one is started") from None


def plot_losses(history, path):
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("held_out_loss", "held out, EMA")):
        points = [(line["images"], line[key]) for line in history if line.get(key)]
        if points:
            axes.plot(*zip(*points), label=label, marker="." if key == "held_out_loss" else None)
    axes.set(xlabel="images seen", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    with cli.whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def peak_memory(device):
    """Bytes of GPU memory, or on a CPU of this process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024                   # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_logger(name):
    """Refuses a logger whose package is not installed."""
    if name and not importlib.util.find_spec(name):
        raise cli.InputError(f"--logger {name} needs the package {name}: pip install {name}")


def open_logger(name, out, settings):
    """A function of (numbers, images seen) that sends the numbers to TensorBoard or Weights & Biases; None without a
    name. Both packages are optional and imported only here."""
    if name == "tensorboard":
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out / "tensorboard")
        board.add_text("settings", json.dumps(settings))

        def report(numbers, images):
            for key, value in numbers.items():
                board.add_scalar(key, value, images)
            board.flush()

        return report
    if name == "wandb":
        wandb = importlib.import_module("wandb")
        run = wandb.init(project="radit", name=out.name, dir=out, config=settings, id=out.name, resume="allow")
        return lambda numbers, images: run.log(numbers, step=images)
    return None
