"""Simulated radiographs: body, lungs, heart, ribs, diaphragm, fluid and a device, whose size and place follow the
metadata by a fixed rule.

    age            10 to 90 years: the body's half-width is 0.28 + 0.002 age of the image's side
    cardiomegaly   positive: the heart's half-width is 0.55 of the body's; negative: 0.25
    sex            the side of the device: female left of the image, male right
    pleural_effusion positive: fluid stands in both lungs up to LEVEL; negative: none
    support_devices positive: a bright square in that upper corner of the body; negative: none

`measure` reads the same quantities back from a picture. Nothing here knows the model.
"""
import csv
import random

import numpy as np
from PIL import Image

from radiographs.fields import FINDINGS
from radiographs.index import COLUMNS, index_row

SIDE = 32
LEVEL = -0.04  # of the fluid; y runs from -0.5, the top, to 0.5, and the diaphragm is at 0.3


def draw(record, rng):
    """A phantom (SIDE, SIDE) in [0, 1] for a record; `rng` (numpy) moves and shades it a little."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    x = x - rng.uniform(-0.03, 0.03)
    half = 0.28 + 0.002 * record["age"]
    image = np.zeros((SIDE, SIDE))
    image[np.abs(x) < half] = 0.65                                    # body
    for side in (-1, 1):                                              # lungs
        image[((x - side * half * 0.5) / (half * 0.45)) ** 2 + ((y + 0.08) / 0.36) ** 2 < 1] = 0.15
    ribs = (np.abs(x) < half) & (np.sin(2 * np.pi * (y * 6 + rng.uniform())) > 0.6) & (image < 0.3)
    image[ribs] = 0.3
    if record.get("pleural_effusion") == "positive":
        image[(np.abs(x) < half) & (y > LEVEL) & (image < 0.4)] = 0.48
    heart = half * (0.55 if record["cardiomegaly"] == "positive" else 0.25)
    image[(x / heart) ** 2 + ((y - 0.12) / 0.18) ** 2 < 1] = 0.75
    image[(np.abs(x) < half) & (y > 0.3)] = 0.65                      # below the diaphragm
    if record["support_devices"] == "positive":
        side = 1 if record["sex"] == "male" else -1
        image[(np.abs(x - side * half * 0.6) < 0.07) & (np.abs(y + 0.3) < 0.07)] = 1
    return (image * rng.uniform(0.9, 1)).clip(0, 1)


def measure(image):
    """Half-width of the body in image sides, that of the heart as a share of the body's, the fluid's height in image
    sides (of what can be told from the diaphragm: it counts down to y = 0.16), and how bright the device is."""
    rows = image[int(SIDE * 0.85):].mean(0)                           # below the diaphragm: body only
    body = np.flatnonzero(rows > 0.3)
    heart = np.flatnonzero(image[int(SIDE * 0.58):int(SIDE * 0.66)].mean(0) > 0.57)  # fluid is darker
    center = int(round(body.mean()))
    heart = heart[np.abs(heart - center) < len(body) * 0.45]          # not the body's own edge
    corner = image[int(SIDE * 0.1):int(SIDE * 0.3)]
    half = len(body) / 2
    between = [int(round(center + side * half * 0.72)) for side in (-1, 1)]  # heart and ribs' end
    lungs = image[:, between].mean(1)
    fluid = lungs[int(np.ceil(0.3 * (SIDE - 1))):int(0.66 * (SIDE - 1)) + 1] > 0.36  # y from -0.2 to 0.16
    left, right = (corner[:, int(round(center + side * half * 0.6))] for side in (-1, 1))
    return {"body": len(body) / 2 / SIDE, "heart": len(heart) / len(body), "fluid": fluid.mean() * 0.36,
            "left": left.max(), "right": right.max()}


def random_record(rng):
    positive = {True: "positive", False: "negative"}
    return {"dataset": "phantom", "age": float(rng.randint(10, 90)), "sex": rng.choice(["female", "male"]),
            **{field: positive[rng.random() < 0.5]
               for field in ("cardiomegaly", "support_devices", "pleural_effusion")}}


def write_source(root, count, seed=0):
    """A prepared source of `count` phantoms in `root`: index.csv and images/; the last tenth is held out."""
    (root / "images").mkdir(parents=True)
    choices, noise = random.Random(seed), np.random.default_rng(seed)
    with open(root / "index.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for i in range(count):
            record = random_record(choices)
            Image.fromarray((draw(record, noise) * 255).round().astype(np.uint8)).save(root / f"images/{i:05}.png")
            split = "train" if i < count * 0.9 else "valid"
            table.writerow(index_row(record | {"path": f"images/{i:05}.png", "patient": f"P{i}", "split": split}))
    assert set(record) <= {"dataset", "age", "sex", *FINDINGS}
