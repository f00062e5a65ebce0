"""A diagnostic model: what a radiograph shows, field by field, and what that says of synthetic ones.

An encoder of encoders/raddino.py and one linear layer on its CLS feature: every coded field of fields.py is a softmax
over its values, age is a number. A field that is unknown for an image gives no loss there.

Intervals (95 %) count patients, not images, as one patient's images resemble each other. Of an AUROC it is Newcombe's
score interval (2006, method 5): all theta with |estimate - theta| <= 1.96 sqrt(V(theta)), where for m positives and n
negatives

    V(theta) = theta (1 - theta) / (m n) [1 + (k - 1) ((1 - theta) / (2 - theta) + theta / (1 + theta))]
    k        = (m + n) / 2

which holds its level with few positives, where a bootstrap does not; of an accuracy it is Wilson's, which solves the
same equation with V = theta (1 - theta) / n; of the age's error a bootstrap over patients.

Sources: Oquab et al. 2023 (DINOv2, the encoder's architecture), Guo et al. 2017 (temperatures). Not a medical device.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import rankdata
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from common import cli, hub
from common.cli import InputError
from diagnosis.resnet import ResNet, ResNetConfig
from encoders.raddino import Encoder, EncoderConfig
from radiographs import fields, pixels
from radiographs.fields import CODED
from training import parallel

Z = 1.959964  # of a 95 % interval
FEW = 10      # positive or negative patients: below it an AUROC is marked, and never called worse than another
DEMO = Path(__file__).parent.parent / "weights" / "demo" / "classifier"


@dataclass
class ClassifierConfig:
    encoder: EncoderConfig       # what looks at the image, or a ResNetConfig
    datasets: tuple              # values of the field dataset
    covered: dict                # what the training images hold (fields.coverage): other fields are not predicted
    age_error: float = None      # years: the mean error of the predicted age on held-out images

    def __post_init__(self):
        if isinstance(self.encoder, dict):
            self.encoder = (ResNetConfig if "layers" in self.encoder else EncoderConfig)(**self.encoder)
        self.datasets = tuple(self.datasets)


class Classifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = (Encoder if isinstance(config.encoder, EncoderConfig) else ResNet)(config.encoder)
        self.values = {field: config.datasets if field == "dataset" else fields.VALUES[field] for field in CODED}
        self.head = nn.Linear(config.encoder.width, 1 + sum(len(values) for values in self.values.values()))
        self.register_buffer("temperature", torch.ones(len(CODED)))  # of each field's softmax, set after training

    def forward(self, images, keep=None):                            # N 1 H W in [-1, 1]
        """Age in years (N,) and, for each coded field, logits (N, number of values)."""
        size = self.config.encoder.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        cls, _ = self.encoder(self.encoder.normalise(images), keep)  # N D
        age, *logits = self.head(cls).split([1, *map(len, self.values.values())], 1)
        return 50 + 20 * age[:, 0], [x / t for x, t in zip(logits, self.temperature)]


class Labelled(torch.utils.data.Dataset):
    """Prepared images with their metadata: (image, age, codes)."""

    def __init__(self, folders, split, datasets=None):
        self.images = data.Radiographs(folders, split)
        found = {record["dataset"] for record in self.images.records if "dataset" in record}
        self.datasets = datasets or (*fields.DATASETS, *sorted(found - set(fields.DATASETS)))
        records = [{field: record[field] for field in fields.FIELDS if field in record and
                    (field != "dataset" or record[field] in self.datasets)} for record in self.images.records]
        self.age, self.codes = fields.encode_metadata(records, self.datasets)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.age[i], self.codes[i]


class ClassifierTask:
    """What train.py asks for; on one process."""
    name, about = "classifier", {}
    save = staticmethod(hub.save_model)

    def __init__(self, config, held_out):
        self.held_out = held_out
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            size = config.encoder.image_size
            Classifier(config)(torch.empty(1, 1, size, size))
        # Of a transformer, half of the patches are left out in training.
        self.drops_patches = isinstance(config.encoder, EncoderConfig)
        self.flops = 3 * counter.get_total_flops() // (2 if self.drops_patches else 1)

    @staticmethod
    def terms(model, images, age, codes, keep=None):
        """Mean over images of the age's and the coded fields' losses: a scalar each."""
        years, logits = model(images, keep)
        known = age.isfinite()
        age_loss = torch.where(known, F.smooth_l1_loss(years / 20, age.nan_to_num() / 20, reduction="none"), 0).mean()
        entropies = [F.cross_entropy(x.float(), code - 1, ignore_index=-1, reduction="sum")
                     for x, code in zip(logits, codes.T)]
        return age_loss, sum(entropies) / len(images)

    def loss(self, model, batch, rng):
        images, age, codes = batch                                   # N 1 H W, N, N 18
        images = pixels.jitter(images, rng.generator)
        keep = None
        if self.drops_patches:
            patches = (model.config.encoder.image_size // model.config.encoder.patch) ** 2
            keep = rng.uniform(patches).argsort(1)[:, :patches // 2]
        age_loss, entropy = self.terms(model, images, age, codes, keep)
        return age_loss + entropy, {"age_loss": age_loss, "entropy": entropy}

    def measure(self, ema, micro):
        results = measure(self.held_out, predict(ema, self.held_out), ema.config, intervals=False)
        scores = {f"{r['field']} {r['value']}": round(r["auroc"], 3) for r in results
                  if math.isfinite(r.get("auroc", math.nan))}
        return {"held_out_auroc": float(np.mean(list(scores.values()))), "held_out_aurocs": scores,
                "held_out_mae": next((r["mae"] for r in results if r["field"] == "age"), None)}


def fit(folders, out, cfg, encoder=None, config=EncoderConfig(), held_out=None):
    """Trains on the split train of prepared sources, sets the temperatures on the split valid (of the sources
    `held_out`, if they are others); returns the EMA."""
    if parallel.world > 1:
        raise InputError("a classifier is small: it is trained by one process, without torchrun")
    images = Labelled(folders, "train")
    held_out = Labelled(held_out or folders, "valid", images.datasets)
    covered = fields.coverage(images.images.records)
    config = ClassifierConfig(encoder.config if encoder else config, images.datasets, covered)
    torch.manual_seed(cfg.seed)
    model = Classifier(config)
    if encoder:
        model.encoder.load_state_dict(encoder.state_dict())
        model.encoder.requires_grad_(True)
    ema = train.train(ClassifierTask(config, held_out), model, images, cfg, out)
    calibrate(ema, held_out)
    hub.save_model(ema, out / "weights" / "classifier")
    return ema


# ---------------------------------------------------------------------------------------------------------
# What the model says, and how well

@torch.no_grad()
def predict(model, dataset, batch=64):
    """Age in years (N,) and {field: probabilities (N, values)} in float64, of every image of a Labelled or
    Radiographs."""
    device, ages, answers = next(model.parameters()).device, [], []
    for start in range(0, len(dataset), batch):
        items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
        images = torch.stack([item[0] if isinstance(item, tuple) else item for item in items]).to(device)  # N 1 H W
        age, logits = model(images)
        ages.append(age)
        answers.append([x.double().softmax(1) for x in logits])
    probabilities = [torch.cat(column).cpu().numpy() for column in zip(*answers)]
    return torch.cat(ages).double().cpu().numpy(), dict(zip(CODED, probabilities))


def questions(config):
    """What can be asked of the model: (field, value, index of the value) for every field of which training saw two
    values; a field of two values asks for the second only."""
    asked = []
    for field, counts in config.covered.items():
        if field != "age" and len(counts) > 1:
            values = config.datasets if field == "dataset" else fields.VALUES[field]
            asked += [(field, value, i) for i, value in enumerate(values)
                      if value in counts and (len(values) > 2 or i == 1)]
    return asked


def auroc(scores, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half; NaN if a class
    is empty. scores (N,), positive (N,) bool. By ranks (Mann and Whitney)."""
    n, m = positive.sum(), (~positive).sum()
    return (rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m) if n and m else math.nan


def calibration_error(probability, positive, bins=10):
    """Expected calibration error: the mean over images of |mean probability - share of positives| in ten equal bins."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    sums = np.bincount(which, probability - positive, bins)
    return np.abs(sums).sum() / len(probability)


def score_interval(estimate, variance):
    """[low, high]: all theta in [0, 1] from which the estimate is at most Z standard errors away, `variance`(theta)
    being its variance if theta were true."""
    def distance(theta):
        return (estimate - theta) ** 2 - Z ** 2 * variance(theta)
    inside = min(max(estimate, 1e-9), 1 - 1e-9)                      # at 0 and 1 the variance is 0
    low = brentq(distance, 0, inside) if distance(0) > 0 else 0.0
    high = brentq(distance, inside, 1) if distance(1) > 0 else 1.0
    return [low, high]


def auroc_interval(area, m, n):
    """Newcombe's interval of an AUROC from m positive and n negative patients (see the top of this file)."""
    def variance(theta):
        k = (m + n) / 2
        return theta * (1 - theta) / (m * n) * (1 + (k - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
    return score_interval(area, variance)


def share_interval(share, n):
    """Wilson's interval of a share of n patients."""
    return score_interval(share, lambda theta: theta * (1 - theta) / n)


def count_patients(patients):
    return len(set(patients.tolist()))


def images_by_patient(patients):
    """The indices of each patient's images, a list of arrays."""
    _, which = np.unique(patients, return_inverse=True)
    return np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])


def resample(images_of, rng):
    """The indices of a bootstrap sample of as many patients, with all their images."""
    return np.concatenate([images_of[i] for i in rng.integers(len(images_of), size=len(images_of))])


def bootstrap_interval(measure, patients, repeats=1000, seed=0):
    """95 % interval of measure(indices): patients are resampled, not images, as one patient's images resemble each
    other."""
    images_of, rng = images_by_patient(patients), np.random.default_rng(seed)
    values = [measure(resample(images_of, rng)) for _ in range(repeats)]
    return [float(x) for x in np.nanpercentile(values, [2.5, 97.5])] if np.isfinite(values).any() else [math.nan] * 2


def calibrate(model, held_out):
    """Sets each field's temperature to the one that makes the held-out answers most likely (Guo et al. 2017), and the
    mean error of the age."""
    model.temperature.fill_(1)
    years, probabilities = predict(model, held_out)
    for column, field in enumerate(CODED):
        code = held_out.codes[:, column].numpy()
        logp = np.log(probabilities[field][code > 0].clip(1e-30))
        target = code[code > 0] - 1
        if len(set(target)) > 1:
            def loss(log_t):
                x = logp / math.exp(log_t)
                return (np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), target]).mean()
            model.temperature[column] = math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)
    known = held_out.age.isfinite().numpy()
    if known.any():
        model.config.age_error = float(np.abs(years - held_out.age.double().numpy())[known].mean())


def measure(dataset, predicted, config, rows=None, intervals=True):
    """What the model said of a Labelled data set beside what is known: a dict for each question, and one for age.

    rows: the images to look at, all by default. Each dict has field, value, n (images where the field is known), and
    positives, auroc, few (whether fewer than FEW patients are positive, or negative), interval, ece; for a field as a
    whole accuracy and interval; for age mae (mean absolute error in years) and interval.
    """
    years, probabilities = predicted
    rows = np.arange(len(dataset)) if rows is None else rows
    patients = np.array([record["patient"] for record in dataset.images.records])
    asked = questions(config)
    results = [measure_value(dataset, probabilities, patients, rows, *question, intervals) for question in asked]
    for field in dict.fromkeys(field for field, _, _ in asked if field not in fields.FINDINGS):
        code = dataset.codes[:, CODED.index(field)].numpy()
        known = rows[code[rows] > 0]
        right = probabilities[field][known].argmax(1) == code[known] - 1
        accuracy = float(right.mean()) if len(known) else math.nan
        results.append({"field": field, "value": "(any)", "n": len(known), "accuracy": accuracy})
        if intervals and len(known):
            results[-1]["interval"] = share_interval(accuracy, count_patients(patients[known]))
    known = rows[dataset.age[rows].isfinite().numpy()]
    if "age" in config.covered and len(known):
        errors = np.abs(years[known] - dataset.age[known].double().numpy())
        results.append({"field": "age", "value": "(years)", "n": len(known), "mae": float(errors.mean())})
        if intervals:
            results[-1]["interval"] = bootstrap_interval(lambda i: errors[i].mean(), patients[known])
    return results


def measure_value(dataset, probabilities, patients, rows, field, value, index, intervals):
    """One dict of `measure`: how well field = value, whose index among the field's values is given, is told from the
    rest."""
    code = dataset.codes[:, CODED.index(field)].numpy()
    known = rows[code[rows] > 0]
    positive, probability = code[known] == index + 1, probabilities[field][known, index]
    m, n = count_patients(patients[known][positive]), count_patients(patients[known][~positive])
    result = {"field": field, "value": value, "n": len(known), "positives": int(positive.sum()),
              "auroc": float(auroc(probability, positive)), "few": min(m, n) < FEW}
    if intervals and math.isfinite(result["auroc"]):
        result["interval"] = auroc_interval(result["auroc"], m, n)
        result["ece"] = float(calibration_error(probability, positive))
    return result


def print_table(results, title=""):
    """Rows of `measure`; what cannot be measured, for no image or one class only is known, is left out."""
    results = [r for r in results if r["n"] and math.isfinite(r.get("auroc", 0))]
    if not results:
        raise InputError(f"{title}: no image with a field that this model predicts, or none of both classes")
    print(f"{title:30}{'value':14}{'n':>7}{'positive':>10}{'AUROC':>8}{'95 % interval':>18}{'ECE':>8}"
          "   accuracy or error")
    for r in results:
        span = f"{r['interval'][0]:.3f} to {r['interval'][1]:.3f}" if "interval" in r else ""
        area = f"{r['auroc']:8.3f}" if "auroc" in r else f"{'':8}"
        ece = f"{r['ece']:8.3f}" if "ece" in r else f"{'':8}"
        other = f"   {r['accuracy']:.3f}" if "accuracy" in r else f"   {r['mae']:.2f} years" if "mae" in r else ""
        positives = f"{r['positives']}{'*' if r['few'] else ''}" if "positives" in r else ""
        print(f"{r['field']:30}{r['value']:14}{r['n']:7,}{positives:>10}{area}{span:>18}{ece}{other}")
    if any(r.get("few") for r in results):
        print(f"* fewer than {FEW} patients are positive, or negative")


def load(folder):
    model = hub.load_model(Classifier, ClassifierConfig, folder)
    return model.to(cli.pick_device()[0])


def robustness(model, dataset, kinds):
    """{group: rows of `measure`} for each subgroup; a row is `worse` if its interval lies below the AUROC of all
    images, and not only FEW patients stand behind it. There is no correction for the number of subgroups looked
    at."""
    predicted, members = predict(model, dataset), {"all": list(range(len(dataset)))}
    for i, record in enumerate(dataset.images.records):
        for group in fields.groups_of(record, kinds):
            members.setdefault(group, []).append(i)
    table = {}
    for group, rows in sorted(members.items()):
        table[group] = measure(dataset, predicted, model.config, np.array(rows))
    overall = {(r["field"], r["value"]): r.get("auroc") for r in table["all"]}
    for rows in table.values():
        for r in rows:
            if "auroc" in r and "interval" in r:
                r["worse"] = bool(r["interval"][1] < overall[r["field"], r["value"]]) and not r["few"]
    return table


def utility(real, synthetic, out, cfg, config):
    """Three models of the same size that see the same number of images, from real, synthetic and both; each measured on
    the real split test. {regime: rows of `measure`}."""
    results = {}
    for regime, folders in (("real", real), ("synthetic", synthetic), ("both", [*real, *synthetic])):
        model = fit(folders, out / regime, cfg, config=config, held_out=real)
        test = Labelled(real, "test", model.config.datasets)
        results[regime] = measure(test, predict(model, test), model.config)
    return results
