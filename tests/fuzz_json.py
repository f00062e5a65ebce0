"""Changes JSON at random: results and keys of a reader study, forms of the sampling page, reports of metrics.py.

    python tests/fuzz_json.py --n 20000 --seed 0

A changed file is either still right, or raises InputError in one line. Checksums and digests are made to fit most of
the time, or nothing but them would be tested. tests/test_reading.py runs a quick part, and a long one marked slow.
"""
import argparse
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from common.cli import InputError
from radit import RadiTConfig
from share import publish, serve
from study import score

VALUES = [None, True, False, 0, 1, -1, 2.5, 1.0, float("nan"), float("inf"), 10 ** 30, "", "x", "\ud800", "a\nb",
          [], {}, [[]], [1], {"a": 1}, ["x", "y"], [["x", "y"]], "pairs", "single", "unknown", "positive"]
CONFIG = RadiTConfig(covered={"sex": {"female": 1, "male": 1}, "pneumonia": {"negative": 1, "positive": 1},
                              "no_finding": {"positive": 1}, "age": [2.0, 80.0]})
FORM = {"n": 2, "steps": 2, "guidance": 2, "seed": 5,
        "metadata": {"sex": "female", "age": "60", "no_finding": "positive", "pneumonia": "positive"}}
REPORT = {"protocol": {"encoder": "microsoft/rad-dino", "k": 5, "warnings": ["few images"]},
          "results": [{"group": "all", "real": 50, "FDD": {"value": 9.1, "standard_error": 0.5}, "share": [0.1, 0.2]},
                      {"group": "sex=male", "real": 2}],
          "memorisation": {"synthetic": {"least": 0.1, "below": 0.02}}}


def changed(value, rng):
    """A copy with one to three of its parts, at any depth, replaced, left out or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        node = value
        while isinstance(node, (dict, list)) and node:
            place = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if not isinstance(node[place], (dict, list)) or rng.random() < 0.4:
                change(node, place, rng)
                break
            node = node[place]
    return value


def change(node, place, rng):
    kind = rng.random()
    if kind < 0.7:
        node[place] = copy.deepcopy(rng.choice(VALUES))
    elif kind < 0.85:
        del node[place]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[place]))
    else:
        node["more"] = 1


def study(design, rng):
    """A key and one reader's result that fits."""
    named = [[score.digest(f"{kind} {i}") for kind in ("real", "synthetic")] for i in range(3)]
    questions = sorted(map(sorted, named)) if design == "pairs" else sorted([name] for pair in named for name in pair)
    plan = {"design": design, "presentations": 2, "margin": 0.1, "quiz": False, "questions": questions}
    answers = [{"presentation": p, "shown": question, "answer": question[0] if design == "pairs" else rng.randint(1, 6),
                "ms": 1000} for p in (1, 2) for question in questions]
    result = {"study": score.digest(plan), "reader": "A", "started": "", "finished": "", "answers": answers}
    return {"id": score.digest(plan), "study": plan, "pairs": named}, result


def sealed(result, rng):
    return result | {"checksum": score.checksum(result) if rng.random() < 0.9 else "0" * 8}


def score_changed(folder, rng):
    """Changes a key or a result, and scores the study from its files."""
    key, result = study(rng.choice(["pairs", "single"]), rng)
    if rng.random() < 0.5:
        key = changed(key, rng)
        if "study" in key and rng.random() < 0.9:
            key["id"] = score.digest(key["study"])
    else:
        result = changed(result, rng)
    (folder / "key.json").write_text(json.dumps(key))
    (folder / "result.json").write_text(json.dumps(sealed(result, rng)))
    key = score.read_key(folder / "key.json")
    score.format_table(score.score(score.read_results([folder / "result.json"], key), key))


def read_one(kind, folder, rng):
    if kind == "study":
        score_changed(folder, rng)
    elif kind == "form":
        serve.parse_form(json.dumps(changed(FORM, rng)), CONFIG)
    else:
        publish.metrics_section(changed(REPORT, rng))


def run(n, seed, folder):
    """Reads n changed files of each kind; returns how many of each kind were taken and how many refused."""
    outcomes = Counter()
    for kind in ("study", "form", "report"):
        for i in range(n):
            try:
                read_one(kind, folder, random.Random(f"{kind} {seed} {i}"))
                outcomes[kind, "taken"] += 1
            except InputError as error:
                assert "\n" not in str(error), (kind, i, str(error))
                outcomes[kind, "refused"] += 1
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(run(args.n, args.seed, Path(folder)))


if __name__ == "__main__":
    main()
