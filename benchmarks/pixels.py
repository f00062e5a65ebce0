"""Does a perceptual loss make a better model of pixels? With and without one, trained for the same CPU time.

    python -m diagnosis fit OTHERS --out runs/judge          an encoder that never teaches, of other patients' images
    python benchmarks/pixels.py --data PREPARED... --judge runs/judge/weights/classifier [--teacher ENCODER]

A row for each weight of the loss (encoders/perceptual.py), 0 being without; the published one is 0.005. All are trained
by train.py's own loop from the same seed; a few steps are timed first, and the number of images follows from them, so
that a dearer loss sees fewer images. The held-out real images (splits valid and test) are halved by patient, as in
benchmarks/fidelity.py: half A is the reference; the models sample the metadata of half B, and half B is the best that
can be had. FDD, precision and recall are in the judge's features. Power is that of benchmarks/sharpness.py, beside
half B: 1 is as sharp as real, in octaves of cycles an image.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import fidelity
from sharpness import octaves, power_by_octave

import metrics
import radit
import sample
import train
from common import cli, hub
from diagnosis import classifier
from encoders import raddino
from encoders.perceptual import FLOW_WEIGHT
from radiographs import fields

BATCH, TIMED = 16, 8  # images a step, steps that are timed


class Task(train.RadiTTask):
    """RadiT's task with the CPU time at which each step ended, and without previews, which take longer than steps."""
    times = []

    def finish(self, model):
        self.times.append(time.process_time())

    def preview(self, ema, path, micro):
        pass


def train_model(args, weight, images, out):
    """The folder of the weights, and the CPU seconds of each step but the first."""
    Task.times.clear()
    sys.argv = ["train.py", "radit", "--data", *map(str, args.data), "--pixels", "--patch", str(args.patch),
                "--size", "XS", "--batch", str(BATCH), "--images", str(images), "--warmup", str(images // 8),
                "--cooldown", str(images // 4), "--log-every", "16", "--save-every", "1000000", "--no-compile",
                "--seed", str(args.seed), "--out", str(out)]
    if weight:
        sys.argv += ["--encoder", str(args.teacher), "--perceptual-weight", str(weight)]
    train.main()
    return out / "weights", [b - a for a, b in zip(Task.times, Task.times[1:])]


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="prepared sources to train on")
    parser.add_argument("--teacher", type=Path, default=classifier.DEMO, help="the encoder of the loss; %(default)s")
    parser.add_argument("--judge", type=Path, required=True, help="an encoder of other images, for FDD and recall")
    parser.add_argument("--weights", type=float, nargs="+", default=[0, FLOW_WEIGHT, 20 * FLOW_WEIGHT],
                        help="of the perceptual loss; %(default)s")
    parser.add_argument("--seconds", type=cli.number(1, 10 ** 7), default=150, help="of CPU time a model; %(default)s")
    parser.add_argument("--images", type=cli.positive, help="train for so many images instead, to tell what the loss "
                        "does from what its time does")
    parser.add_argument("--patch", type=cli.integer(1, 4096), default=8, help="side of a token in pixels; %(default)s")
    parser.add_argument("--width", type=cli.integer(64, 4096), default=128, help="of the models; %(default)s")
    parser.add_argument("--depth", type=cli.integer(1, 64), default=6, help="of the models; %(default)s")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 62), default=0)
    args = parser.parse_args()
    radit.SIZES["XS"] = (args.width, args.depth, args.width // 64)
    train.RadiTTask = Task
    judge = raddino.load_encoder(args.judge)
    records, images, a, b = fidelity.halves(args.data, args.seed)
    reference = fidelity.features(images[a], judge)
    rows = [("real, the other half", "", "", images[b])]
    for weight in args.weights:
        with tempfile.TemporaryDirectory() as folder:
            count = args.images
            if count is None:
                _, steps = train_model(args, weight, BATCH * (TIMED + 1), Path(folder) / "timed")
                count = BATCH * max(1, round(args.seconds / (sum(steps) / len(steps))))
            folder, steps = train_model(args, weight, count, Path(folder) / "run")
            model, _ = sample.load_weights(folder)
        asked = fields.only_covered([fidelity.known(records[i]) for i in b], model.config.covered)
        sampled, _ = sample.generate(model, None, asked, list(range(args.seed, args.seed + len(b))),
                                     steps=25, solver="euler", guidance=args.guidance)
        rows.append((f"perceptual weight {weight:g}" if weight else "without", f"{count:,}", f"{sum(steps):.0f}",
                     sampled))

    side, names = images.shape[-1], ("FDD", "precision", "recall")
    print(f"RadiT of {radit.count_parameters(model.config):,} parameters on {side}x{side} pixels in patches of "
          f"{args.patch}, teacher {hub.fingerprint(args.teacher)}, judge {hub.fingerprint(args.judge)}, "
          f"reference N {len(a)}, candidates N {len(b)}, seed {args.seed}, 25 Euler steps, guidance {args.guidance:g}")
    print(f"{'':26}{'images':>9}{'CPU s':>7}" + "".join(f"{name:>16}" for name in names)
          + "".join(f"{f'{low}-{2 * low}':>8}" for low in octaves(side)))
    power = power_by_octave(images[b]).mean(0)
    for name, count, seconds, pictures in rows:
        measured = metrics.compare(reference, fidelity.features(pictures, judge), seed=args.seed)
        print(f"{name:26}{count:>9}{seconds:>7}" + "".join(f"{metrics.format_value(*measured[m]):>16}" for m in names)
              + "".join(f"{ratio:8.2f}" for ratio in power_by_octave(pictures).mean(0) / power))


if __name__ == "__main__":
    cli.run(main)
