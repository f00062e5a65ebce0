"""RadUNet beside RadiT: held-out loss at equal floating-point operations, on the simulated radiographs of the tests.

    python benchmarks/radunet.py [--tflops 6] [--seed 0]

Both of size XS, on pixels, RadUNet in patches half as large as RadiT's, as train.py has them if not told otherwise,
which makes an image cost about the same. Both are trained by train.py's own loop with its learning rate until they have
spent --tflops on training images (three forward passes each, counted from the structure). After each eighth: the
squared velocity error of 200 held-out phantoms, of the average of the weights.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import phantom

import radit
import train
from baselines import radunet
from common import cli

BATCH, POINTS = 16, 8


def train_model(name, patch, images, data, out, seed):
    """Held-out losses after each eighth of the images, and CPU seconds."""
    started = time.process_time()
    sys.argv = ["train.py", "radit", "--model", name, "--data", str(data), "--pixels", "--patch", str(patch),
                "--size", "XS", "--batch", str(BATCH), "--images", str(images), "--warmup", str(images // 10),
                "--log-every", str(images // POINTS // BATCH), "--save-every", str(images // POINTS // BATCH),
                "--keep", "1", "--no-compile", "--seed", str(seed), "--out", str(out)]
    train.main()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["images"], line["held_out_loss"]) for line in lines], time.process_time() - started


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=cli.number(0.1, 10 ** 6), default=6, help="for each model; %(default)s")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 62), default=0)
    args = parser.parse_args()
    train.RadiTTask.preview = lambda *_: None                        # sampling takes longer than the steps
    results, costs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_source(Path(folder) / "data", 2000)
        for name, patch, module in (("radit", 8, radit), ("radunet", 4, radunet)):
            shape = {"channels": 1, "grid": (phantom.SIDE, phantom.SIDE), "patch": patch}
            if module is radit:
                width, depth, heads = radit.SIZES["XS"]
                config = radit.RadiTConfig(width=width, depth=depth, heads=heads, **shape)
            else:
                width, multiples, blocks, attending = radunet.SIZES["XS"]
                config = radunet.RadUNetConfig(width=width, multiples=multiples, blocks=blocks, attending=attending,
                                               **shape)
            costs[name] = 3 * module.count_flops(config)
            images = round(args.tflops * 1e12 / costs[name] / POINTS / BATCH) * POINTS * BATCH
            results[name] = train_model(name, patch, images, Path(folder) / "data", Path(folder) / name, args.seed)
            kind = {"radit": radit.RadiT, "radunet": radunet.RadUNet}[name]
            print(f"{kind.__name__} XS, patches of {patch}: {module.count_parameters(config):,} parameters, "
                  f"{costs[name] / 1e9:.3f} GFLOP to train one image, {results[name][1]:.0f} s of CPU time")
    print(f"\n{'TFLOP':>8}{'RadiT: images':>16}{'held-out loss':>16}{'RadUNet: images':>18}{'held-out loss':>16}")
    for (seen, loss), (seen_2, loss_2) in zip(results["radit"][0], results["radunet"][0]):
        print(f"{seen * costs['radit'] / 1e12:8.2f}{seen:16,}{loss:16.4f}{seen_2:18,}{loss_2:16.4f}")


if __name__ == "__main__":
    cli.run(main)
