"""The causal model at the paper's scale: 1.2 million records, fitted on a CPU; time, memory, and distance from the
truth.

    python benchmarks/causal.py [--n 1205494] [--steps 8000] [--seed 0]

The records are simulated, not real: dataset, sex, race and view as often as the paper reports, age about 58 (the paper
gives no distribution), each finding logistic in its parents of the paper's graph with random log-odds and an intercept
such that it is positive as often as the paper reports among the rows that know it. Then values are hidden at random, as
often as the paper reports them as unknown. So the truth is known: the table compares each mechanism with it, given all
parents and as a marginal of sampled patients. Nothing about real radiographs follows from these numbers.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from causal import mechanisms, patients
from causal.graph import GRAPH, check_graph

DATASETS = (377_095, 273_004, 223_462, 160_846, 112_120, 40_967, 18_000)                   # arXiv 2606.19460
ROOTS = {"sex": (559_384, 631_099), "race": (35_467, 71_869, 360_983), "view": (442_198, 333_777, 293_693),
         "dataset": DATASETS}                                        # in the order of fields.VALUES
LABELS = {"atelectasis": (1_875, 122_684), "cardiomegaly": (71_154, 110_081), "consolidation": (38_563, 33_539),
          "edema": (58_166, 67_258), "enlarged_cardiomediastinum": (52_565, 18_998), "fracture": (24_634, 26_221),
          "lung_lesion": (4_059, 42_854), "lung_opacity": (7_900, 194_848), "pleural_effusion": (89_455, 143_600),
          "pleural_other": (188, 17_349), "pneumonia": (57_351, 43_247), "pneumothorax": (89_137, 26_788),
          "support_devices": (2_718, 153_430)}                      # negative, positive
TOTAL = 1_205_494


def log_odds(name, columns, weights):
    """The true log-odds of a finding, (N,), from the classes of its parents, without the intercept."""
    total = 0
    for parent in GRAPH[name]:
        x = (columns[parent] - 58) / 18 if parent == "age" else columns[parent]
        total = total + weights[name, parent] * x
    return total


def make_records(n, rng):
    """True classes {variable: (N,) float} in topological order, and {finding: (N,) true chance of positive}."""
    weights = {(child, parent): 1.2 * torch.randn((), generator=rng) for child in LABELS for parent in GRAPH[child]}
    columns, chances = {}, {}
    for name in check_graph(GRAPH):
        if name == "age":
            columns[name] = (58 + 18 * torch.randn(n, generator=rng)).round().clamp(0, 105)
        elif name in ROOTS:
            columns[name] = torch.multinomial(torch.tensor(ROOTS[name]).float(), n, True, generator=rng).float()
        elif name in LABELS:
            odds, (negative, positive) = log_odds(name, columns, weights), LABELS[name]
            low, high = torch.tensor(-20.0), torch.tensor(20.0)
            for _ in range(40):                                      # bisection: an intercept with the published share
                middle = (low + high) / 2
                above = (odds + middle).sigmoid().double().mean() > positive / (negative + positive)
                low, high = (low, middle) if above else (middle, high)
            chances[name] = (odds + middle).sigmoid()
            columns[name] = (torch.rand(n, generator=rng) < chances[name]).float()
    return columns, chances


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=TOTAL)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(args.seed)
    columns, chances = make_records(args.n, rng)
    names = list(columns)
    whole = torch.stack([columns[name] for name in names], 1).short()             # N M
    rates = [sum(ROOTS.get(name, LABELS.get(name, (TOTAL,)))) / TOTAL for name in names]
    known = torch.rand(whole.shape, generator=rng) < torch.tensor(rates)
    classes = torch.where(known, whole, torch.tensor(-1, dtype=torch.int16))
    config = mechanisms.CausalConfig(GRAPH, {}, rows=args.n)
    full = torch.full((args.n, len(patients.CLASS_COLUMNS)), -1, dtype=torch.int16)
    full[:, [patients.CLASS_COLUMNS.index(name) for name in names]] = classes
    config.shares = patients.count_shares(full, config, names)
    start, cpu = time.perf_counter(), time.process_time()
    model = mechanisms.fit(classes, config, args.steps, seed=args.seed, progress=True)
    print(f"{args.n:,} records, {args.steps} steps of 256 rows a variable, seed {args.seed}: fitted in "
          f"{(time.perf_counter() - start) / 60:.1f} minutes ({(time.process_time() - cpu) / 60:.1f} of CPU time), "
          f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB")
    start = time.perf_counter()
    sampled = patients.sample(model, 20_000, seed=args.seed)
    print(f"20,000 patients sampled in {time.perf_counter() - start:.0f} s")
    shown = model.show(whole[:5000].double() + 0.5)                  # 5,000 true rows, with all parents
    print(f"{'finding':28}{'known':>10}{'with all parents':>18}   positive: true sampled   "
          "error of p(positive | parents)")
    for name in LABELS:
        i = names.index(name)
        parents = [names.index(parent) for parent in GRAPH[name]]
        cut = torch.special.ndtri(model.levels[i, 1]).expand(5000)   # where negative ends and positive begins
        with torch.no_grad():
            p = 1 - torch.special.ndtr(model.transport(cut, shown, i, (1, 0)))
        error = (p - chances[name][:5000]).abs().mean()
        share = sum(record[name] == "positive" for record in sampled) / len(sampled)
        print(f"{name:28}{int(known[:, i].sum()):10,}{int(known[:, [i, *parents]].all(1).sum()):18,}"
              f"{columns[name].mean():17.4f}{share:8.4f}{error:20.4f}")


if __name__ == "__main__":
    main()
