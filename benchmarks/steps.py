"""How few steps are enough? Fidelity against the number of velocity evaluations, for Euler and Heun.

    python benchmarks/steps.py --data PREPARED... [--weights weights/demo] [--n 48] [--guidance 3] [--seed 0]

The same seeds and metadata in every row: the metadata of n held-out real images, chosen at random from half B of
benchmarks/fidelity.py; half A is the reference of FDD and KDD. Their standard errors are those of the images; from row
to row the images are the same but for the solver, so rows differ by less. FDD of so few images is far above what many
would give, and compares within this table only. `distance` needs no reference: the root mean square difference of the
pixels, in [-1, 1], to the same seed's picture by Heun with the most evaluations, its standard error over the images.
Heun takes two evaluations a step, so it stands at the even number next to Euler's.

Images are kept in --out, and the same command, or one with a larger --n, continues. Written there: steps.txt and
steps.png.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import fidelity

import flow
import metrics
import sample
from common import cli, hub
from diagnosis import classifier
from encoders import raddino
from radiographs import fields

PLAN = [("euler", 5), ("heun", 3), ("euler", 10), ("heun", 5), ("euler", 25), ("heun", 13), ("euler", 50), ("heun", 25),
        ("euler", 100), ("heun", 50)]            # (solver, steps); the last is what all are compared with


def sample_all(model, decoder, asked, seeds, guidance, folder):
    """{(solver, steps): images}, sixteen at a time by every solver, sampled or read from `folder`."""
    sampled = {way: [] for way in PLAN}
    for part in (slice(start, min(start + 16, len(seeds))) for start in range(0, len(seeds), 16)):
        for solver, steps in PLAN:
            path = folder / f"{solver}-{steps}-images-{part.start}-{part.stop}.safetensors"
            if not path.exists():
                with tqdm(desc=path.stem, unit="evaluation", total=steps * flow.SOLVERS[solver]) as bar:
                    images, _ = sample.generate(model, decoder, asked[part], seeds[part], steps=steps,
                                                guidance=guidance, solver=solver, batch=16, report=bar.update)
                safetensors.torch.save_file({"images": images}, f"{path}.tmp")
                os.replace(f"{path}.tmp", path)
            sampled[solver, steps].append(safetensors.torch.load_file(path)["images"])
    return {way: torch.cat(parts) for way, parts in sampled.items()}


def draw_figure(rows, real, path):
    """rows: (solver, steps, {"FDD", "KDD", "distance": (value, standard error)}); real: {"FDD", "KDD"} of real
    images."""
    figure = Figure(figsize=(10, 3.5))
    for axes, measure in zip(figure.subplots(1, 3), ("FDD", "KDD", "distance")):
        for solver, colour, marker in (("euler", "#2b5d8c", "o"), ("heun", "#c8642b", "s")):
            points = [(steps * flow.SOLVERS[solver], *row[measure]) for which, steps, row in rows if which == solver]
            # The last has no distance from itself.
            points = points[:-1] if measure == "distance" and solver == "heun" else points
            axes.errorbar(*zip(*points), color=colour, marker=marker, capsize=2, label=solver.capitalize())
        if measure in real:
            axes.axhline(real[measure][0], color="grey", linestyle=":", label="real images")
        axes.set(xlabel="velocity evaluations",
                 title="RMS distance to Heun's last" if measure == "distance" else measure,
                 xscale="log", ylim=(0, None) if measure == "distance" else None, xticks=[5, 10, 25, 50, 100],
                 xticklabels=[5, 10, 25, 50, 100])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(f"{path}.tmp", format="png", dpi=90)
    os.replace(f"{path}.tmp", path)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True,
                        help="the prepared sources the weights were trained on")
    parser.add_argument("--weights", type=Path, default=sample.DEMO)
    parser.add_argument("--encoder", type=Path, default=classifier.DEMO)
    parser.add_argument("--n", type=cli.positive, default=48)
    parser.add_argument("--guidance", type=cli.number(0, 100), default=sample.GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/steps"))
    args = parser.parse_args()
    model, decoder = sample.load_weights(args.weights)
    encoder = raddino.load_encoder(args.encoder)
    records, images, a, b = fidelity.halves(args.data, args.seed)
    if args.n > len(b):
        raise cli.InputError(f"--n {args.n}: only {len(b)} held-out images to take metadata from")
    chosen = np.random.default_rng(args.seed).permutation(b)[:args.n]
    asked = fields.only_covered([fidelity.known(records[i]) for i in chosen], model.config.covered)
    digest = hub.fingerprint(args.weights / "radit")
    folder = args.out / f"{digest}-guidance-{args.guidance:g}-seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    seeds = list(range(args.seed, args.seed + args.n))
    sampled = sample_all(model, decoder, asked, seeds, args.guidance, folder)

    reference = fidelity.features(images[a], encoder)
    real = metrics.compare(reference, fidelity.features(images[chosen], encoder), 5, None, args.seed)
    best, rows = sampled[PLAN[-1]], []
    for (solver, steps), generated in sampled.items():
        apart = (generated - best).square().mean((1, 2, 3)).sqrt()    # N
        row = metrics.compare(reference, fidelity.features(generated, encoder), 5, None, args.seed)
        rows.append((solver, steps, row | {"distance": (apart.mean().item(), apart.std().item() / len(apart) ** 0.5)}))
    lines = [f"weights {os.path.relpath(args.weights)} ({digest}), "
             f"encoder {os.path.relpath(args.encoder)} ({hub.fingerprint(args.encoder)}), "
             f"reference N {len(a)}, candidates N {args.n}, {images.shape[-1]}x{images.shape[-1]} pixels, "
             f"guidance {args.guidance:g}, seed {args.seed}, "
             f"{'bfloat16' if cli.fast_bf16(images.device) else 'float32'}",
             f"{'solver':14}{'evaluations':>12}{'calls':>8}{'FDD':>18}{'KDD':>18}{'distance':>22}"]
    for solver, steps, row in rows:
        times = flow.time_grid(steps, model.config.shift)
        lines.append(f"{solver:14}{steps * flow.SOLVERS[solver]:12}"
                     f"{flow.count_network_calls(times, solver, args.guidance):8}"
                     + "".join(f"{'{:.3f} ± {:.3f}'.format(*row[m]):>18}" for m in ("FDD", "KDD"))
                     + f"{'-' if (solver, steps) == PLAN[-1] else '{:.4f} ± {:.4f}'.format(*row['distance']):>22}")
    lines.append(f"{'the real ones':34}" + "".join(f"{'{:.3f} ± {:.3f}'.format(*real[m]):>18}" for m in ("FDD", "KDD")))
    cli.write_text(args.out / "steps.txt", "\n".join(lines) + "\n")
    draw_figure(rows, {m: real[m] for m in ("FDD", "KDD")}, args.out / "steps.png")
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
