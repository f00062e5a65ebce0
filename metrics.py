"""How good are generated radiographs? Distances between two sets of images in the feature space of an encoder.

    FDD        Fréchet distance    |mu - mu'|² + tr(S + S' - 2 (S S')^1/2)        Heusel et al. 2017, Rad-DINO features
    FDD-inf    its limit for infinitely many images                               Chong and Forsyth 2020
    KDD        kernel distance     E k(x,x') + E k(y,y') - 2 E k(x,y), k = (x·y/D + 1)³     Binkowski et al. 2018
    precision  share of synthetic images within a real image's k-th neighbour distance     Kynkäänniemi et al. 2019
    recall     share of real images within a synthetic image's k-th neighbour distance
    density, coverage              as precision and recall, robust to outliers             Naeem et al. 2020
    memorisation                   |x - nearest training image| / sqrt(D), beside the same for held-out real images

The figure after ± is one standard error, from a jackknife over parts of both sets; for KDD that of the U-statistic, or
with --subset the standard deviation over subsets. FDD falls as N grows: compare only at equal N, encoder and protocol,
which the first line of the output names, and compare with the column `real/real`: the FDD that two sets of real images
of these sizes would have.

REAL and SYNTHETIC are any folders of images (subfolders and DICOM too), prepared sources, what sample.py wrote, or
CheXGenBench's tables. --split and --by need an index.csv. Its optional column Prompt holds the prompt of an image, and
--protocol chexgenbench takes one image for each prompt.
"""
import argparse
import math
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.stats
import torch

from common import cli, hub
from common.cli import InputError
from encoders import raddino
from encoders.features import (deduplicated, images_of, labels_of_prompts,
                               set_of, training_images)
from radiographs.fields import GROUPS, groups_of
from radiographs.index import SPLITS
from radiographs.pixels import is_selected, is_synthetic

TILE = 1024  # rows and columns of a block of distances, which bounds the memory
PARTS = 10   # parts of each set, for the jackknife of FDD


# ---------------------------------------------------------------------------------------------------------
# The distances; features are (N, D) tensors, computed with in float64

def mean_and_covariance(features):
    """Mean (D,) and unbiased covariance (D, D) in float64, block by block: no float64 copy of all features."""
    mean = sum(block.double().sum(0) for block in features.split(TILE)) / len(features)
    scatter = sum((block.double() - mean).T @ (block.double() - mean) for block in features.split(TILE))
    return mean, scatter / (len(features) - 1)


def frechet(mean, cov, mean2, cov2):
    """The Fréchet distance of two Gaussians. tr (S S')^1/2 is the sum of the roots of the eigenvalues of S' S, which
    are those of A^T S' A, where S = A A^T: a symmetric product, so no matrix square root and nothing complex. LAPACK
    finds them by Cholesky's factor A; where S is singular, A comes from its eigenvalues."""
    s, s2 = cov.cpu().numpy(), cov2.cpu().numpy()
    try:
        overlap = scipy.linalg.eigh(s2, s, type=2, eigvals_only=True, driver="gv")           # D
    except np.linalg.LinAlgError:  # fewer images than features
        values, vectors = np.linalg.eigh(s)
        a = vectors * np.sqrt(values.clip(0))                        # D D
        overlap = np.linalg.eigvalsh(a.T @ s2 @ a)                   # D
    trace = np.sqrt(overlap.clip(0)).sum().item()
    return ((mean - mean2).square().sum() + cov.trace() + cov2.trace()).item() - 2 * trace


def random_parts(n, seed=0):
    """The part, 0 to 9, to which each of n images belongs: (N,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % PARTS


class PartSums:
    """Sums over random parts of a set of features: they give mean and covariance of any union of parts without another
    pass over the images."""

    def __init__(self, features, seed=0):
        part, self.centre = random_parts(len(features), seed), features.double().mean(0)   # centred: exact sums
        self.counts, self.sums, self.products = [], [], []           # of each part: a number, D, D D
        for i in range(PARTS):
            block = features[(part == i).to(features.device)].double() - self.centre         # n D
            self.counts.append(len(block))
            self.sums.append(block.sum(0))
            self.products.append(block.T @ block)

    def union(self, parts):
        """Mean (D,) and unbiased covariance (D, D) of the images in `parts`."""
        n = sum(self.counts[i] for i in parts)
        mean = sum(self.sums[i] for i in parts) / n
        scatter = sum(self.products[i] for i in parts) - n * torch.outer(mean, mean)
        return self.centre + mean, scatter / (n - 1)


def frechet_distances(x, y, seed=0):
    """{"FDD", "FDD-inf", "real/real": (value, standard error)} of real features x (N, D) and synthetic ones y (M, D).

    With noise in mean and covariance, FDD(N) = FDD-inf + c / N to first order: FDD-inf is the intercept of the line
    through the distances of 5 to 10 tenths of both sets (Chong and Forsyth 2020), each the mean over ten windows of
    neighbouring parts. It is NaN where half a set has no more images than the D features: there the law does not hold.
    Real/real is the distance between halves of x, converted to N and M images by the same law. The standard error is
    that of a jackknife, which leaves out one part of both sets at a time. FDD-inf is given the error of FDD, as the
    correction between them hardly varies.
    """
    nothing = (math.nan, math.nan)
    result = {"FDD": (frechet(*mean_and_covariance(x), *mean_and_covariance(y)), math.nan), "FDD-inf": nothing,
              "real/real": nothing}
    if min(len(x), len(y)) < 2 * PARTS:
        return result
    a, b = PartSums(x, seed), PartSums(y, seed)

    def windows(size):
        """`size` neighbouring parts, beginning at each of the ten."""
        return [[(first + i) % PARTS for i in range(size)] for first in range(PARTS)]

    def distances(size):
        return np.array([frechet(*a.union(parts), *b.union(parts)) for parts in windows(size)])

    error = float(np.sqrt((PARTS - 1) * distances(PARTS - 1).var()))
    result["FDD"] = (result["FDD"][0], error)
    if min(len(x), len(y)) > 2 * x.shape[1]:
        sizes = range(PARTS // 2, PARTS)
        means = [distances(size).mean() for size in sizes] + [result["FDD"][0]]
        result["FDD-inf"] = (float(np.polyfit([1 / size for size in [*sizes, PARTS]], means, 1)[1]), error)
    halves = [(parts, set(range(PARTS)) - set(parts)) for parts in windows(PARTS // 2)[:PARTS // 2]]
    between = np.mean([frechet(*a.union(parts), *a.union(others)) for parts, others in halves])
    law = (1 / len(x) + 1 / len(y)) / (4 / len(x))                   # two halves of N: c (2 / N + 2 / N)
    result["real/real"] = (float(between * law), math.nan)
    return result


def kernel_means(x, y):
    """Mean of k(x_i, y_j) over j for each i, (N,), and over i for each j, (M,), in float64."""
    rows, columns = x.new_zeros(len(x), dtype=torch.float64), y.new_zeros(len(y), dtype=torch.float64)
    for i in range(0, len(x), TILE):
        for j in range(0, len(y), TILE):
            base = x[i:i + TILE].double() @ y[j:j + TILE].double().T / x.shape[1] + 1       # n m
            k = base * base * base
            rows[i:i + TILE] += k.sum(1)
            columns[j:j + TILE] += k.sum(0)
    return rows / len(y), columns / len(x)


def kernel_distance(x, y):
    """The unbiased squared MMD of x (N, D) and y (M, D) with KID's kernel, and its standard error."""
    n, m = len(x), len(y)
    (kxx, _), (kyy, _), (kxy, kyx) = kernel_means(x, x), kernel_means(y, y), kernel_means(x, y)
    diagonals = [((f.double().square().sum(1) / f.shape[1]) + 1).pow(3) for f in (x, y)]    # k(x_i, x_i), left out
    kxx, kyy = (n * kxx - diagonals[0]) / (n - 1), (m * kyy - diagonals[1]) / (m - 1)
    error = 4 * (kxx - kxy).var() / n + 4 * (kyy - kyx).var() / m    # of the first-order terms of the U-statistic
    return (kxx.mean() + kyy.mean() - 2 * kxy.mean()).item(), error.sqrt().item()


def kernel_distance_of_subsets(x, y, size, count=100, seed=0):
    """Mean and standard deviation of KDD over random subsets, as KID is often reported."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.empty(count)
    for i in range(count):
        part_x, part_y = (f[torch.randperm(len(f), generator=rng)[:size]] for f in (x, y))
        values[i] = kernel_distance(part_x, part_y)[0]
    return values.mean().item(), values.std().item()


def squared_distances(x, y):
    """Squared Euclidean distances (N, M) in float64. Of equal rows it is set to 0: x² + y² - 2 x y leaves a rounding
    error."""
    x, y = x.double(), y.double()
    squares = x.square().sum(1)[:, None] + y.square().sum(1)         # N M
    distances = squares - 2 * x @ y.T                                # N M
    return torch.where(distances > 1e-12 * squares, distances, 0)


def radii(x, k):
    """Squared distance from each of x (N, D) to its k-th neighbour in x, (N,), rounded up by a billionth, so that the
    k-th neighbour itself lies inside."""
    result, indices = [], torch.arange(len(x), device=x.device)
    for rows in indices.split(TILE):
        found = torch.empty(len(rows), 0, dtype=torch.float64, device=x.device)
        for columns in indices.split(TILE):
            distances = squared_distances(x[rows], x[columns])       # n m
            distances[rows[:, None] == columns] = math.inf           # no image counts as its own neighbour
            found = torch.cat([found, distances], 1)
            found = found.topk(min(k, found.shape[1]), largest=False).values
        result.append(found[:, -1])
    return torch.cat(result) * (1 + 1e-9)


def shares(real, fake, k):
    """Precision, recall, density and coverage of `fake` (M, D) against `real` (N, D): (4,). The ball around an image
    that reaches to its k-th neighbour includes its surface (<=), as in Kynkäänniemi et al."""
    real_radii, fake_radii = radii(real, k), radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.float64, device=real.device)   # M, how many real balls hold it
    reached, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for i in range(0, len(real), TILE):
        for j in range(0, len(fake), TILE):
            rows, columns = slice(i, i + TILE), slice(j, j + TILE)
            distances = squared_distances(real[rows], fake[columns])  # n m
            near = distances <= real_radii[rows, None]
            inside[columns] += near.sum(0)
            covered[rows] |= near.any(1)
            reached[rows] |= (distances <= fake_radii[columns]).any(1)
    return torch.stack([x.double().mean() for x in (inside > 0, reached, inside / k, covered)]).cpu()


def prdc(real, fake, k=5, seed=0, halves=20):
    """Precision, recall, density and coverage of `fake` (M, D) against `real` (N, D): {name: (value, standard error)}.

    The error is that of a jackknife that leaves out half of both sets (Shao and Wu 1989): the standard deviation over
    random halves. It covers that the k-th neighbours change with both sets. Leaving out only a tenth would overstate
    it, since k-th neighbours jump when single images are missing. Raises InputError if a set has no k-th neighbour.
    """
    size = min(len(real), len(fake))
    if size <= k:
        raise InputError(f"among {cli.count(size, 'image')} there is no {k}-th neighbour; use more images or a "
                         "smaller --k")
    values, errors, rng = shares(real, fake, k), [math.nan] * 4, torch.Generator().manual_seed(seed)

    def half(x):
        return x[torch.randperm(len(x), generator=rng)[:len(x) // 2].to(x.device)]

    if size // 2 > k:
        errors = torch.stack([shares(half(real), half(fake), k) for _ in range(halves)]).std(0).tolist()
    return dict(zip(("precision", "recall", "density", "coverage"), zip(values.tolist(), errors)))


def nearest(x, training):
    """|x_i - nearest training image| / sqrt(D), (N,), and which image that is, (N,)."""
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    which = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for start in range(0, len(training), TILE):
        for first in range(0, len(x), TILE):
            rows = slice(first, first + TILE)
            distance, index = squared_distances(x[rows], training[start:start + TILE]).min(1)
            closer = distance < best[rows]
            best[rows] = torch.where(closer, distance, best[rows])
            which[rows] = torch.where(closer, index + start, which[rows])
    return (best / x.shape[1]).sqrt(), which


# ---------------------------------------------------------------------------------------------------------
# Memorisation: does the model copy its training images?

def held_out(real, x, training, z):
    """Which real images the model cannot have been trained on: those whose patient, file and features differ from all
    training images'. (Features too, since an image may have been saved twice.) real, training: records; x, z: their
    features (N, D)."""
    patients = {record["patient"] for record in training if "patient" in record}
    files = {record["content"] for record in training}
    distance, _ = nearest(x, z)
    rows = [i for i, record in enumerate(real) if record.get("patient") not in patients
            and record["content"] not in files and distance[i] > 1e-4]
    if len(rows) < 2:
        raise InputError(f"{len(rows)} of {len(real)} real images are of patients and files that --train does not "
                         "hold; memorisation needs held-out images: give real images of other patients")
    return rows


def memorisation(real, fake, training):
    """How near synthetic images come to training images, and how near held-out real ones do (features (N, D) each). A
    model that copies has many synthetic images nearer than the distance below which only 1 % of held-out images lie.
    `below` is their share, `interval` its exact 95 % interval (Clopper and Pearson 1934)."""
    table, bound = {}, None
    for name, features in (("held-out real", real), ("synthetic", fake)):
        distance, _ = nearest(features, training)
        quantiles = distance.quantile(torch.tensor([0, 0.01, 0.05, 0.5], dtype=distance.dtype)).tolist()
        bound = quantiles[1] if bound is None else bound
        below = int((distance < bound).sum())
        interval = scipy.stats.binomtest(below, len(distance)).proportion_ci(method="exact")
        table[name] = {"n": len(distance), **dict(zip(("least", "1 %", "5 %", "median"), quantiles)),
                      "below": below / len(distance), "interval": [float(interval.low), float(interval.high)]}
    return table


# ---------------------------------------------------------------------------------------------------------
# The report

def compare(real, fake, k=5, subset=None, seed=0, equal=False):
    """{measure: (value, standard error)} of synthetic features (M, D) against real ones (N, D). With `equal`, KDD
    compares equally many images of both sets, as CheXGenBench does. Raises InputError for fewer than k + 1 images."""
    size = min(len(real), len(fake))
    shares = prdc(real, fake, k, seed)
    if equal and len(real) != len(fake):
        chosen = [f[torch.randperm(len(f), generator=torch.Generator().manual_seed(seed))[:size]] for f in (real, fake)]
        kdd = kernel_distance(*chosen)
    elif subset:
        kdd = kernel_distance_of_subsets(real, fake, min(subset, size), seed=seed)
    else:
        kdd = kernel_distance(real, fake)
    return {**frechet_distances(real, fake, seed), "KDD": kdd, **shares}


MEASURES = ("FDD", "FDD-inf", "real/real", "KDD", "precision", "recall", "density", "coverage")


def grouped(real, fake, kinds):
    """(name, rows of real, rows of fake) of all images, and of each subgroup that both sets have."""
    yield "all", range(len(real)), range(len(fake))
    members = [{}, {}]
    for side, records in zip(members, (real, fake)):
        for i, record in enumerate(records):
            for name in groups_of(record, kinds):
                side.setdefault(name, []).append(i)
    for name in sorted(members[0].keys() & members[1].keys()):
        yield name, members[0][name], members[1][name]


def warnings_of(real, fake, training):
    """Why a comparison of these sets may mislead: a list of sentences. Raises InputError if real and synthetic images
    were given the wrong way round."""
    marked = [sum(is_synthetic(record["path"]) for record in records) for records in (real, fake)]
    if marked[0] and not marked[1]:
        raise InputError(f"{marked[0]} of {len(real)} real images say that they are synthetic, and no image of the "
                         "last set does; the synthetic set is given last")
    notes = [f"{marked[0]} of {len(real)} real images say that they are synthetic"] if marked[0] else []
    if selected := sum(is_selected(record["path"]) for record in fake):
        notes.append(f"a classifier chose {selected} of {len(fake)} synthetic images, so this says nothing of the "
                     "weights")
    files = Counter(record["content"] for record in fake)
    for name, records in (("real", real), ("training", training)):
        if shared := sum(files[content] for content in {record["content"] for record in records}):
            notes.append(f"{shared} of {len(fake)} synthetic images are files of the {name} images")
    return notes


def format_value(value, error=math.nan):
    if not math.isfinite(value):
        return "-"
    return f"{value:.4g} ± {error:.2g}" if math.isfinite(error) else f"{value:.4g}"


def report(real, x, fake, y, kinds=(), k=5, subset=None, seed=0, equal=False):
    """A dict for each group: its name, numbers of images, measures as {"value", "standard_error"}, and a warning if it
    is small."""
    rows, spread = [], "standard_deviation" if subset else "standard_error"
    for group, of_real, of_fake in grouped(real, fake, kinds):
        row, size = {"group": group, "real": len(of_real), "synthetic": len(of_fake)}, min(len(of_real), len(of_fake))
        if size > k or group == "all":
            measured = compare(x[list(of_real)], y[list(of_fake)], k, subset, seed, equal)
            row |= {name: {"value": value, spread if name == "KDD" else "standard_error": error}
                    for name, (value, error) in measured.items()}
            if size <= x.shape[1]:
                row["warning"] = f"no more than {x.shape[1]} images, as many as features: FDD is mostly sample size"
        else:
            row["warning"] = f"too few: more than {k} of each are needed"
        rows.append(row)
    return rows


def print_report(rows):
    print(f"{'':32}{'real':>7}{'synth.':>8}" + "".join(f"{name:>19}" for name in MEASURES))
    for row in rows:
        cells = (format_value(*row[name].values()) if name in row else "" for name in MEASURES)
        line = f"{row['group']:32}{row['real']:7,}{row['synthetic']:8,}" + "".join(f"{cell:>19}" for cell in cells)
        print(line + (f"   WARNING: {row['warning']}" if "warning" in row else ""))


def print_memorisation(table, training, left_out):
    names = ("least", "1 %", "5 %", "median")
    print(f"\nDistance to the nearest of {training:,} training images, |difference| / sqrt(D); {left_out:,} real "
          "images are left out, since their patient or image is among the training images")
    print(f"{'':32}{'n':>7}" + "".join(f"{name:>10}" for name in names)
          + f"{'below the held-out 1 %':>26}   95 % interval")
    for name, row in table.items():
        low, high = row["interval"]
        print(f"{name:32}{row['n']:7,}" + "".join(f"{row[key]:10.4f}" for key in names) + f"{row['below']:26.1%}"
              f"   {low:.1%} to {high:.1%}")
    if table["synthetic"]["interval"][0] > table["held-out real"]["interval"][1]:
        print("More synthetic than held-out images are that near to a training image: look at them for copies.")
    if table["held-out real"]["n"] < 100:
        print("Of fewer than 100 held-out images, 1 % is less than one: the bound is the nearest of them.")


def load_encoder(folder):
    try:
        return raddino.load_encoder(folder).to(cli.pick_device()[0])
    except InputError as error:
        raise InputError(f"{error}; --encoder weights/demo/classifier needs no network") from None


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""examples:
  python metrics.py data/nih out --split test --encoder weights/demo/classifier
  python metrics.py data/nih out --split test --by sex label --train data/nih --json out/metrics.json""")
    parser.add_argument("real", nargs="+", type=Path, help="real images: folders, prepared sources or tables")
    parser.add_argument("synthetic", type=Path, help="the last one is the synthetic set")
    parser.add_argument("--encoder", type=Path, default=Path("microsoft/rad-dino"),
                        help="%(default)s, or weights/demo/classifier, which needs no network")
    parser.add_argument("--split", choices=SPLITS, help="use only this split of the real images")
    parser.add_argument("--by", nargs="+", choices=GROUPS, default=[], help="also for subgroups or positive labels")
    parser.add_argument("--train", nargs="+", type=Path, default=[],
                        help="what the model was trained on (the split train, or a folder of images): memorisation")
    parser.add_argument("--protocol", choices=("own", "chexgenbench"), default="own",
                        help="own: all images, aspect ratio kept; chexgenbench: as that benchmark does")
    parser.add_argument("--k", type=cli.integer(1, 1000), default=5,
                        help="neighbours of precision, recall, density and coverage; %(default)s")
    parser.add_argument("--subset", type=cli.integer(2, 10 ** 9),
                        help="KDD over 100 random subsets of this size, not over all images")
    parser.add_argument("--seed", type=cli.integer(0, 2 ** 62), default=0, help="seed of the random parts and subsets")
    parser.add_argument("--json", type=cli.new_path, metavar="FILE", help="write the same figures as JSON")
    args = parser.parse_args()
    for places, split in ((args.real, args.split), ([args.synthetic], None), (args.train, None)):
        for place in places:
            images_of(place, split)                                  # a wrong place is refused before any work
    encoder, bench = load_encoder(args.encoder), args.protocol == "chexgenbench"
    fingerprint, choose = hub.fingerprint(args.encoder), deduplicated if bench else list
    real, x = set_of(args.real, encoder, fingerprint, args.split, bench, choose)
    fake, y = set_of([args.synthetic], encoder, fingerprint, None, bench, choose)
    training, z = [], None
    if args.train:
        training, z = set_of(args.train, encoder, fingerprint, None, bench, training_images)
        unseen = held_out(real, x, training, z)
    notes = warnings_of(real, fake, training)
    if reason := raddino.why_not_raddino(encoder, args.encoder):
        notes.append(f"{reason}: not comparable with published figures")
    if bench:
        fake = labels_of_prompts(real, fake)
    if bench and not any("prompt" in record for record in real):
        notes.append("no column Prompt: not deduplicated")
    resize = f"{'299x299, then ' if bench else ''}{encoder.config.resize} bicubic, centre crop {encoder.config.crop}"
    protocol = {"encoder": str(args.encoder), "encoder_hash": fingerprint, "real": len(real), "synthetic": len(fake),
                "resize": resize, "protocol": args.protocol, "kdd_subset": args.subset or "all", "k": args.k,
                "seed": args.seed, "precision": "features float32, distances float64", "warnings": notes}
    print("; ".join(f"{key} {value}" for key, value in protocol.items() if key != "warnings"))
    for note in notes:
        print(f"WARNING: {note}")
    rows = report(real, x, fake, y, args.by, args.k, args.subset, args.seed, bench)
    print_report(rows)
    result = {"protocol": protocol, "results": rows}
    if training:
        result["held_out"] = {"real": len(unseen), "left_out": len(real) - len(unseen)}
        result["memorisation"] = memorisation(x[unseen], y, z)
        print_memorisation(result["memorisation"], len(training), len(real) - len(unseen))
    if args.json:
        cli.write_json(args.json, result)


if __name__ == "__main__":
    cli.run(main)
