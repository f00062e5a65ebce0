"""How good are generated radiographs? Distances between two sets of images in the feature space of an encoder.

    FDD        Fréchet distance      |mu - mu'|² + tr(S + S' - 2 (S S')^1/2)             Heusel et al. 2017, Rad-DINO features
    KDD        kernel distance       E k(x,x') + E k(y,y') - 2 E k(x,y), k = (x·y/D + 1)³     Binkowski et al. 2018, unbiased
    precision  share of synthetic images within a real image's k-th neighbour distance     Kynkäänniemi et al. 2019
    recall     share of real images within a synthetic image's k-th neighbour distance
    density, coverage                as precision and recall, robust to outliers             Naeem et al. 2020
    memorisation                     |x - nearest training image| / sqrt(D), beside the same for held-out real images

The spread beside a figure is one standard error: for FDD a jackknife over ten parts of both sets, for KDD that of the
U-statistic (or over subsets, where asked for), for the four shares that of a mean over images, the other set held fixed.
FDD falls as N grows: compare only at equal N, equal encoder and equal protocol, which the first line of the output names.

    python metrics.py REAL SYNTHETIC [--encoder DIR] [--by sex age label] [--train PREPARED] [--json FILE]

REAL and SYNTHETIC are folders of images, or prepared sources (with index.csv), which --split and --by need.
"""
import argparse
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import safetensors.torch
import scipy.linalg
import torch
from PIL import Image
from tqdm import tqdm

from common import cli, hub
from common.cli import InputError
from encoders import raddino
from radiographs.fields import GROUPS, groups_of
from radiographs.index import SPLITS, read_index

TILE = 1024  # rows of a block of distances


# ---------------------------------------------------------------------------------------------------------
# The distances; features are (N, D) tensors, computed with in float64

def moments(features):
    """Mean (D,) and unbiased covariance (D, D) in float64, block by block: no float64 copy of all features."""
    mean = sum(block.double().sum(0) for block in features.split(TILE)) / len(features)
    scatter = sum((block.double() - mean).T @ (block.double() - mean) for block in features.split(TILE))
    return mean, scatter / (len(features) - 1)


def frechet(mean, cov, mean2, cov2):
    """The Fréchet distance of two Gaussians. tr (S S')^1/2 is the sum of the roots of the eigenvalues of S' S, which are
    those of A^T S' A, where S = A A^T: a symmetric product, so no matrix square root and nothing complex. LAPACK finds them
    by Cholesky's factor A; where S is singular, A comes from its eigenvalues."""
    s, s2 = cov.cpu().numpy(), cov2.cpu().numpy()
    try:
        overlap = scipy.linalg.eigh(s2, s, type=2, eigvals_only=True, driver="gv")           # D
    except np.linalg.LinAlgError:  # fewer images than features
        values, vectors = np.linalg.eigh(s)
        a = vectors * np.sqrt(values.clip(0))                        # D D
        overlap = np.linalg.eigvalsh(a.T @ s2 @ a)                   # D
    return ((mean - mean2).square().sum() + cov.trace() + cov2.trace()).item() - 2 * np.sqrt(overlap.clip(0)).sum().item()


def frechet_distance(x, y, parts=10, seed=0):
    """FDD of features x (N, D) and y (M, D), and its standard error: leave out a tenth of both, ten times."""
    value = frechet(*moments(x), *moments(y))
    if min(len(x), len(y)) < 2 * parts:
        return value, math.nan
    rng = torch.Generator().manual_seed(seed)
    groups = [torch.randperm(len(f), generator=rng) % parts for f in (x, y)]
    values = torch.tensor([frechet(*moments(x[groups[0] != i]), *moments(y[groups[1] != i])) for i in range(parts)])
    return value, ((parts - 1) * values.var(correction=0)).sqrt().item()


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
    (kxx, _), (kyy, _), (kxy, kyx), (n, m) = kernel_means(x, x), kernel_means(y, y), kernel_means(x, y), (len(x), len(y))
    own = [((f.double().square().sum(1) / f.shape[1]) + 1).pow(3) for f in (x, y)]          # k(x_i, x_i), not wanted
    kxx, kyy = (n * kxx - own[0]) / (n - 1), (m * kyy - own[1]) / (m - 1)
    error = 4 * (kxx - kxy).var() / n + 4 * (kyy - kyx).var() / m    # of the first-order terms of the U-statistic
    return (kxx.mean() + kyy.mean() - 2 * kxy.mean()).item(), error.sqrt().item()


def kernel_distance_of_subsets(x, y, size, count=100, seed=0):
    """Mean and standard deviation of KDD over random subsets, as KID is often reported."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.tensor([kernel_distance(*(f[torch.randperm(len(f), generator=rng)[:size]] for f in (x, y)))[0]
                           for _ in range(count)])
    return values.mean().item(), values.std().item()


def squared_distances(x, y):
    """Squared Euclidean distances (N, M) in float64."""
    x, y = x.double(), y.double()
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0)


def radii(x, k):
    """Squared distance from each of x (N, D) to its k-th neighbour in x: (N,)."""
    result = []
    for start, block in zip(range(0, len(x), TILE), x.split(TILE)):
        nearest = torch.empty(len(block), 0, dtype=torch.float64, device=x.device)
        for other, part in zip(range(0, len(x), TILE), x.split(TILE)):
            distances = squared_distances(block, part)               # n m
            if start == other:
                distances.fill_diagonal_(math.inf)                   # nobody is their own neighbour
            nearest = torch.cat([nearest, distances], 1)
            nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
        result.append(nearest[:, -1])
    return torch.cat(result)


def prdc(real, fake, k=5):
    """Precision, recall, density, coverage of `fake` (M, D) against `real` (N, D): {name: (value, standard error)}."""
    if min(len(real), len(fake)) <= k:
        raise InputError(f"{min(len(real), len(fake))} images have no {k}-th neighbour; use more images or a smaller --k")
    real_radii, fake_radii = radii(real, k), radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.float64, device=real.device)  # M, real neighbourhoods it lies in
    reached, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for i in range(0, len(real), TILE):
        for j in range(0, len(fake), TILE):
            rows, columns = slice(i, i + TILE), slice(j, j + TILE)
            distances = squared_distances(real[rows], fake[columns])  # n m
            near = distances < real_radii[rows, None]
            inside[columns] += near.sum(0)
            covered[rows] |= near.any(1)
            reached[rows] |= (distances < fake_radii[columns]).any(1)
    per_image = {"precision": inside > 0, "recall": reached, "density": inside / k, "coverage": covered}
    return {name: (v.double().mean().item(), v.double().std().item() / len(v) ** 0.5) for name, v in per_image.items()}


def nearest(x, training):
    """|x_i - nearest training image| / sqrt(D), (N,), and which image that is, (N,)."""
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    which = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for start in range(0, len(training), TILE):
        for first in range(0, len(x), TILE):
            rows = slice(first, first + TILE)
            distance, index = squared_distances(x[rows], training[start:start + TILE]).min(1)
            closer = distance < best[rows]
            best[rows], which[rows] = torch.where(closer, distance, best[rows]), torch.where(closer, index + start, which[rows])
    return (best / x.shape[1]).sqrt(), which


# ---------------------------------------------------------------------------------------------------------
# Features of files, cached beside them

def listed(where, split=None):
    """What is known of every image of a prepared source, or {"path"} for every image file of a plain folder."""
    where = Path(where)
    if where.is_file() or (where / "index.csv").exists():
        root = where.parent if where.is_file() else where
        records = [record | {"path": root / record["path"]} for record in read_index(where)]
        records = [record for record in records if split in (None, record["split"])]
    elif where.is_dir():
        if split:
            raise InputError(f"{where}: --split needs an index.csv there")
        records = [{"path": path} for path in sorted(where.iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
        if not records:
            raise InputError(f"{where}: neither an index.csv nor an image in it; prepare it first, or name the folder of the images")
    else:
        raise InputError(f"{where}: no such folder")
    return records


def load(path, config, chexgenbench):
    """One file as the encoder wants it, (C, S, S). CheXGenBench first squeezes it to 299x299 bytes."""
    try:
        with Image.open(path) as image:
            if chexgenbench:
                image = image.convert("RGB").resize((299, 299), Image.Resampling.BILINEAR)
            return raddino.preprocess(image, config)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise InputError(f"{path}: unreadable image ({error})") from None


@torch.no_grad()
def features_of(records, encoder, cache, chexgenbench=False, batch=16):
    """CLS features (N, D) float32. `cache` is a file that holds those of every image seen before, by the hash of the
    image's bytes: a changed image is a new one. It is written anew, whole, every few thousand images."""
    saved = safetensors.torch.load_file(cache) if cache.exists() else {"names": torch.empty(0, 16), "features": ()}
    known = dict(zip(map(bytes, saved["names"].byte().numpy()), saved["features"]))
    names = [hashlib.sha256(record["path"].read_bytes()).digest()[:16] for record in records]
    new = list({name: record["path"] for name, record in zip(names, records) if name not in known}.items())
    device = next(encoder.parameters()).device
    for start in tqdm(range(0, len(new), batch), desc=str(cache.parent), unit="batch", disable=not new):
        part = new[start:start + batch]
        images = torch.stack([load(path, encoder.config, chexgenbench) for _, path in part])  # N C S S
        known |= zip([name for name, _ in part], encoder(images.to(device))[0].float().cpu())
        if start + batch >= len(new) or start // batch % 256 == 255:
            table = torch.from_numpy(np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16).copy())
            safetensors.torch.save_file({"names": table, "features": torch.stack(list(known.values()))}, f"{cache}.tmp")
            os.replace(f"{cache}.tmp", cache)
    features = torch.stack([known[name] for name in names])          # N D
    if not features.isfinite().all():
        raise InputError(f"{records[(~features.isfinite().all(1)).nonzero()[0, 0]]['path']}: its features are not finite")
    if len(features) > 1 and (features == features[0]).all():
        raise InputError(f"{cache.parent}: all {len(features)} images have the same features; are they all the same image?")
    return features


# ---------------------------------------------------------------------------------------------------------
# The report

def deduplicated(records, seed=0):
    """CheXGenBench: one image a prompt. Records without prompts stay as they are."""
    return list({record.get("prompt", i): record for i, record in reversed(list(enumerate(records)))}.values())[::-1]


def compare(real, fake, k, subset, seed, matched=False):
    """{measure: (value, standard error)} of synthetic features against real ones."""
    if matched and len(real) != len(fake):  # CheXGenBench's KDD takes as many of either side
        size = min(len(real), len(fake))
        a, b = (f[torch.randperm(len(f), generator=torch.Generator().manual_seed(seed))[:size]] for f in (real, fake))
        kdd = kernel_distance(a, b)
    elif subset:
        kdd = kernel_distance_of_subsets(real, fake, min(subset, len(real), len(fake)), seed=seed)
    else:
        kdd = kernel_distance(real, fake)
    return {"FDD": frechet_distance(real, fake, seed=seed), "KDD": kdd, **prdc(real, fake, k)}


def grouped(real, fake, kinds):
    """(name, rows of real, rows of fake) of everything, and of each subgroup that both sides have."""
    yield "all", range(len(real)), range(len(fake))
    members = [{}, {}]
    for side, records in zip(members, (real, fake)):
        for i, record in enumerate(records):
            for name in groups_of(record, kinds):
                side.setdefault(name, []).append(i)
    for name in sorted(members[0].keys() & members[1].keys()):
        yield name, members[0][name], members[1][name]


def memorisation(real, fake, training):
    """How near synthetic images come to training images, beside held-out real ones: a copying model has many synthetic
    images below the distance that only 1 % of real images come under."""
    table, bound = {}, None
    for who, features in (("held-out real", real), ("synthetic", fake)):
        distance, _ = nearest(features, training)
        quantiles = distance.quantile(torch.tensor([0, 0.01, 0.05, 0.5], dtype=distance.dtype)).tolist()
        bound = quantiles[1] if bound is None else bound
        table[who] = dict(zip(("least", "1 %", "5 %", "median"), quantiles)) | {"below": (distance < bound).double().mean().item()}
    return table


def written(value, error):
    """FDD of a small subgroup has no standard error."""
    return f"{value:.4f} ± {error:.4f}" if math.isfinite(error) else f"{value:.4f}"


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", nargs="+", type=Path, help="real images: folders or prepared sources")
    parser.add_argument("synthetic", type=Path, help="the last folder is the synthetic one")
    parser.add_argument("--encoder", type=Path, default=Path("microsoft/rad-dino"),
                        help="Rad-DINO, %(default)s, by default; without a network weights/demo/classifier")
    parser.add_argument("--split", choices=SPLITS, help="of the real images")
    parser.add_argument("--by", nargs="+", choices=GROUPS, default=[], help="the same for each subgroup or positive label")
    parser.add_argument("--train", nargs="+", type=Path, default=[], help="what the model was trained on (split train): memorisation")
    parser.add_argument("--protocol", choices=("own", "chexgenbench"), default="own")
    parser.add_argument("--k", type=cli.positive, default=5, help="neighbours of precision, recall, density, coverage")
    parser.add_argument("--subset", type=cli.positive, help="KDD over 100 random subsets of this size, not over all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the same figures as a file")
    args = parser.parse_args()
    try:
        encoder = raddino.load_encoder(args.encoder).to("cuda" if torch.cuda.is_available() else "cpu")
    except InputError as error:
        raise InputError(f"{error}; --encoder weights/demo/classifier needs no network") from None
    name, bench = hub.fingerprint(args.encoder), args.protocol == "chexgenbench"

    def side(folders, split):
        records, features = [], []
        for folder in folders:
            found = listed(folder, split)
            found = deduplicated(found) if bench else found
            root = folder if folder.is_dir() else folder.parent
            if found:
                features.append(features_of(found, encoder, root / f"features-{name}{'-chexgenbench' * bench}.safetensors", bench))
            records += found
        if len(records) < 2:
            raise InputError(f"{', '.join(map(str, folders))}: {len(records)} images{f' in the split {split}' if split else ''}; "
                             "at least two are needed")
        return records, torch.cat(features)

    (real, x), (fake, y) = side(args.real, args.split), side([args.synthetic], None)
    width = x.shape[1]
    protocol = {"encoder": str(args.encoder), "encoder_hash": name, "real": len(real), "synthetic": len(fake),
                "resize": f"{'299x299, then ' * bench}{encoder.config.image_size} bicubic, centre crop", "protocol": args.protocol,
                "kdd_subset": args.subset or "all", "k": args.k, "seed": args.seed, "precision": "features float32, distances float64"}
    notes = []
    if min(len(real), len(fake)) <= width:
        notes.append(f"fewer images than the {width} features: FDD is dominated by the sample's size")
    if encoder.config != raddino.EncoderConfig():
        notes.append("this encoder is not Rad-DINO: not comparable with published figures")
    if bench and not any("prompt" in record for record in real):
        notes.append("no column Prompt: not deduplicated")
    protocol["warnings"] = notes
    print("; ".join(f"{key} {value}" for key, value in protocol.items() if key != "warnings") + "".join(f"; WARNING: {n}" for n in notes))

    measures, results = ("FDD", "KDD", "precision", "recall", "density", "coverage"), []
    print(f"{'':32}{'real':>7}{'synth.':>7}" + "".join(f"{measure:>20}" for measure in measures))
    for group, rows, columns in grouped(real, fake, args.by):
        result = {"group": group, "real": len(rows), "synthetic": len(columns)}
        line = f"{group:32}{len(rows):7,}{len(columns):7,}"
        if min(len(rows), len(columns)) > args.k or group == "all":
            result |= compare(x[list(rows)], y[list(columns)], args.k, args.subset, args.seed, bench)
            print(line + "".join(f"{written(*result[measure]):>20}" for measure in measures))
        else:
            print(line + f"   too few: more than {args.k} of each are needed")
        results.append(result)
    report = {"protocol": protocol, "results": results}
    if args.train:
        training, z = side(args.train, "train")
        report["memorisation"] = memorisation(x, y, z)
        print(f"\nDistance to the nearest of {len(training):,} training images, |difference| / sqrt({width})")
        print(f"{'':32}" + "".join(f"{name:>10}" for name in ("least", "1 %", "5 %", "median")) + f"{'below the held-out 1 %':>26}")
        for who, row in report["memorisation"].items():
            print(f"{who:32}" + "".join(f"{row[q]:10.4f}" for q in ("least", "1 %", "5 %", "median")) + f"{row['below']:26.1%}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_json(args.json, report)


if __name__ == "__main__":
    cli.run(main)
