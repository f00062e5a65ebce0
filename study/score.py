"""What came back from a reader study: results files and a key to numbers, a table, a figure.

    key        what study.py build kept: {"id", "study": {"design", "presentations", "margin", "questions", ...}, "pairs"}
               questions: the names of the images, [a, b] sorted or [a]; pairs: the names [real, synthetic]
    result     one reader's file: {"study", "reader", "started", "finished", "answers", "checksum"}
    answer     {"presentation": from 1, "shown": names from left to right, "answer": the name called synthetic, or the
               rating of the one image from 1, definitely real, to 6, definitely synthetic, "ms": time on the screen}

All results are taken, or none: what is of another study, edited, double or half is named and refused. The statistics are
in agreement.py. Kappa is that of the answers (which image was called synthetic), whether they are right or not. In pairs,
sensitivity is the share found of the synthetic images on the left, specificity of those on the right.
"""
import hashlib
import itertools
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import cli
from common.cli import InputError
from study import agreement

RATINGS = 6  # of a single image; those above the middle call it synthetic
MADE_UP = "MADE UP: simulated answers, no reader has given them"


def digest(value):
    """16 hex digits that name bytes, or a value as JSON."""
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# Files, checked

def read_json(path, what):
    """The JSON of a file; what: the kind of file it should be."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not JSON, so not {what}") from None


def read_key(path):
    """The key of a study as it was built. Raises InputError for anything else."""
    key = read_json(path, "a key of study.py build")
    if not isinstance(key, dict) or not {"id", "study", "pairs"} <= key.keys():
        raise InputError(f"{path}: not a key of study.py build")
    if digest(key["study"]) != key["id"]:
        raise InputError(f"{path}: this study is not the one that was built; its margin and questions are fixed then")
    if sorted(itertools.chain(*key["pairs"])) != sorted(itertools.chain(*key["study"]["questions"])):
        raise InputError(f"{path}: the answers in this key are not those of its questions")
    return key


def checksum(result):
    """CRC-32 of the result without its checksum, as compact JSON. The page computes it without any secret, so it finds
    accidents and careless edits; who means to cheat can compute it too."""
    rest = {name: value for name, value in result.items() if name != "checksum"}
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=False)
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def read_result(path, key):
    """One reader's file, checked against the key. Raises InputError for whatever is not a whole, unedited reading."""
    result = read_json(path, "a results file of the page")
    if not isinstance(result, dict) or not {"study", "reader", "answers", "checksum"} <= result.keys():
        raise InputError(f"{path}: not a results file of the page; it has no study, reader, answers and checksum")
    if result["study"] != key["id"]:
        raise InputError(f"{path}: of another study, {result['study']}; the key is that of {key['id']}")
    if result["checksum"] != checksum(result):
        raise InputError(f"{path}: edited or damaged, its checksum does not fit")
    pairs, presentations = key["study"]["design"] == "pairs", key["study"]["presentations"]
    expected = {(p, *question) for p in range(1, presentations + 1) for question in key["study"]["questions"]}
    try:
        asked = [(a["presentation"], *sorted(a["shown"])) for a in result["answers"]]
        possible = set(asked) <= expected and len(set(asked)) == len(asked) and result["reader"].strip()
        for a in result["answers"]:
            possible = possible and a["answer"] in (a["shown"] if pairs else range(1, RATINGS + 1)) and a["ms"] >= 0
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: the answers are not as the page writes them") from None
    if not possible:
        raise InputError(f"{path}: answers that the page cannot have written: no reader, a question or an answer that the "
                         "study does not have, or the same question twice")
    if len(asked) < len(expected):
        raise InputError(f"{path}: reader {result['reader']} answered {len(asked)} of {len(expected)} questions; "
                         "only whole readings are scored")
    return result


def read_results(paths, key):
    """{reader: answers}. Raises InputError also for two files of one reader, or of one reading under two names."""
    if key["study"]["quiz"]:
        raise InputError("a quiz tells the answers as it goes, so its results are no blind reading")
    results, seen = {}, {}
    for path in paths:
        result = read_result(path, key)
        reader, reading = result["reader"].strip(), json.dumps(result["answers"])
        for mark, what in ((reader.casefold(), f"reader {reader}"), (reading, "the same answers at the same times")):
            if mark in seen:
                raise InputError(f"{path}: {what} a second time, first in {seen[mark]}")
            seen[mark] = path
        results[reader] = result["answers"]
    return dict(sorted(results.items()))


def tabulate(answers, key):
    """One reader's answers as arrays (presentations, questions), questions in the order of the study.

    said: which was called synthetic, for agreement; truth: which is; both name the second of a pair's sorted names, or
    the image itself. signal, response: the same by what was on the screen, for d': the left one, or the image itself.
    """
    pairs, synthetic = key["study"]["design"] == "pairs", {name for _, name in key["pairs"]}
    place = {tuple(question): i for i, question in enumerate(key["study"]["questions"])}
    shape = key["study"]["presentations"], len(place)
    arrays = {name: np.zeros(shape, bool) for name in ("said", "truth", "signal", "response")}
    arrays["rating"] = np.zeros(shape, int)
    for answer in answers:
        shown = sorted(answer["shown"])
        at = answer["presentation"] - 1, place[tuple(shown)]
        called = answer["answer"] if pairs else shown[0] if answer["answer"] > RATINGS // 2 else None
        arrays["said"][at], arrays["truth"][at] = called == shown[-1], shown[-1] in synthetic
        arrays["response"][at], arrays["signal"][at] = called == answer["shown"][0], answer["shown"][0] in synthetic
        arrays["rating"][at] = 0 if pairs else answer["answer"]
    return arrays


def score(results, key):
    """All numbers of the study, as the dict that score.json holds. NaN where a number cannot be worked out."""
    pairs, margin = key["study"]["design"] == "pairs", key["study"]["margin"]
    presentations = range(key["study"]["presentations"])
    tables = {reader: tabulate(answers, key) for reader, answers in results.items()}
    rows = []
    for reader, t in tables.items():
        for p in presentations:
            signal, response, right = t["signal"][p], t["response"][p], int((t["said"][p] == t["truth"][p]).sum())
            n = len(signal)
            rows.append({"reader": reader, "presentation": p + 1, "n": n, "right": right, "accuracy": right / n,
                         "interval": agreement.exact_interval(right, n),
                         "sensitivity": response[signal].mean() if signal.any() else math.nan,
                         "specificity": 1 - response[~signal].mean() if not signal.all() else math.nan,
                         "d_prime": agreement.d_prime(signal, response, looks=2 if pairs else 1),
                         "roc_area": math.nan if pairs else agreement.roc_area(t["truth"][p], t["rating"][p]),
                         "p_chance": agreement.chance_test(right, n),
                         "p_equivalence": agreement.equivalence_test(right, n, margin)})
    said = {reader: t["said"] for reader, t in tables.items()}

    def kappa(a, b):
        return dict(zip(("kappa", "low", "high"), agreement.cohen_kappa(a, b)))

    intra = [{"reader": reader, "presentations": [p + 1, q + 1]} | kappa(said[reader][p], said[reader][q])
             for reader in said for p, q in itertools.combinations(presentations, 2)]
    inter = [{"readers": [a, b], "presentation": p + 1} | kappa(said[a][p], said[b][p])
             for p in presentations for a, b in itertools.combinations(said, 2)]
    fleiss = [{"presentation": p + 1, "kappa": agreement.fleiss_kappa(np.stack([answers[p] for answers in said.values()]))}
              for p in presentations if len(said) > 1]
    right = np.mean([(t["said"] == t["truth"]).mean(0) for t in tables.values()], 0)          # a question
    asked = key["study"]["questions"].index
    by_pair = [right[asked(sorted(pair))] if pairs else right[[asked([name]) for name in pair]].mean()
               for pair in key["pairs"]]
    accuracy, low, high, p_equivalence = agreement.together(np.array(by_pair), margin)
    return {"made_up": key.get("made_up", False), "study": key["id"], "design": key["study"]["design"], "margin": margin,
            "readers": rows, "intra_rater": intra, "inter_rater": inter, "fleiss": fleiss,
            "together": {"accuracy": accuracy, "interval": (low, high), "p_equivalence": p_equivalence}}


# ---------------------------------------------------------------------------------------------------------
# Numbers to a table, a figure and JSON

def show(number, form=".2f"):
    return "-" if math.isnan(number) else format(number, form)


def table(s):
    """The numbers as text: one row a reading, then the rows of the paper's own table."""
    readers = list(dict.fromkeys(r["reader"] for r in s["readers"]))
    wide = max(map(len, [*readers, "presentation 1"])) + 2
    lines = [MADE_UP] if s["made_up"] else []
    lines.append(f"{'reader':{wide}}{'presentation':>12}{'right':>9}{'accuracy':>10}{'95 % interval':>16}{'sensitivity':>13}"
                 f"{'specificity':>13}{'d prime':>9}{'ROC area':>10}{'p chance':>10}{'p equivalence':>15}")
    for r in s["readers"]:
        right, interval = f"{r['right']}/{r['n']}", "[" + ", ".join(map(show, r["interval"])) + "]"
        lines.append(f"{r['reader']:{wide}}{r['presentation']:12}{right:>9}{show(r['accuracy']):>10}{interval:>16}"
                     f"{show(r['sensitivity']):>13}{show(r['specificity']):>13}{show(r['d_prime']):>9}"
                     f"{show(r['roc_area']):>10}{show(r['p_chance'], '.3f'):>10}{show(r['p_equivalence'], '.3f'):>15}")
    every = s["together"]
    interval = "[" + ", ".join(map(show, every["interval"])) + "]"
    lines += [f"{'together':{wide + 21}}{show(every['accuracy']):>10}{interval:>16}{'':55}"
              f"{show(every['p_equivalence'], '.3f'):>15}", ""]

    def kappa(row):
        return f"{show(row['kappa'])} [{show(row['low'])}, {show(row['high'])}]"

    for reader in readers:
        accuracies = " / ".join(show(r["accuracy"]) for r in s["readers"] if r["reader"] == reader)
        intra = "".join(f"   intra-rater kappa {kappa(r)}" for r in s["intra_rater"] if r["reader"] == reader)
        lines.append(f"{reader:{wide}}accuracy {accuracies}{intra}")
    for f in s["fleiss"]:
        p = f["presentation"]
        inter = ", ".join(f"{' and '.join(r['readers'])} {kappa(r)}" for r in s["inter_rater"] if r["presentation"] == p)
        lines.append(f"{f'presentation {p}':{wide}}inter-rater kappa {inter}; Fleiss' kappa {show(f['kappa'])}")
    verdict = "shown" if every["p_equivalence"] <= agreement.ALPHA else "not shown"
    lines += ["", f"Together equivalent to chance within {s['margin']:g}, the margin given beforehand: {verdict}. "
                  "This says nothing of other readers."]
    return "\n".join(lines) + "\n"


def draw(s, path):
    """Heat maps as in the paper: accuracy, intra-rater kappa, and inter-rater kappa for each presentation."""
    readers = list(dict.fromkeys(r["reader"] for r in s["readers"]))
    presentations = sorted({r["presentation"] for r in s["readers"]})
    again = [f"{p} and {q}" for p, q in itertools.combinations(presentations, 2)]
    panels = [("accuracy", presentations, "presentation", (0, 1),
               {(r["reader"], r["presentation"]): r["accuracy"] for r in s["readers"]}),
              ("intra-rater kappa", again, "presentations", (-1, 1),
               {(r["reader"], "{} and {}".format(*r["presentations"])): r["kappa"] for r in s["intra_rater"]})]
    for p in presentations:
        both = {tuple(r["readers"]): r["kappa"] for r in s["inter_rater"] if r["presentation"] == p}
        both |= {(b, a): kappa for (a, b), kappa in both.items()}
        panels.append((f"inter-rater kappa, presentation {p}", readers, "", (-1, 1), both))
    panels = [panel for panel in panels if panel[-1]]
    figure = Figure(figsize=(1 + 3.2 * len(panels), 1.6 + 0.6 * len(readers)), layout="constrained")
    heading = MADE_UP if s["made_up"] else f"Study {s['study']}"
    figure.suptitle(heading)
    for axes, (title, columns, label, ends, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        cells = np.array([[values.get((reader, column), math.nan) for column in columns] for reader in readers])
        axes.imshow(cells, "RdBu_r", vmin=ends[0], vmax=ends[1], aspect="auto")    # white is chance: 1/2, and a kappa of 0
        for (i, j), value in np.ndenumerate(cells):
            axes.text(j, i, show(value), ha="center", va="center")
        axes.set(title=title, xlabel=label)
        axes.set_xticks(range(len(columns)), columns, parse_math=False)            # a reader may be called $
        axes.set_yticks(range(len(readers)), readers, parse_math=False)
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format="png", dpi=120, metadata={"Title": heading})
    os.replace(temporary, path)


def report(results, key, out):
    """OUT.txt, OUT.png and OUT.json."""
    numbers = score(results, key)
    text = table(numbers)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(numbers, Path(f"{out}.png"))
    cli.write_json(f"{out}.json", json.loads(json.dumps(numbers), parse_constant=lambda _: None))  # JSON has no NaN
    cli.write_text(f"{out}.txt", text)
    print(text, end="")


def made_up(readers=("A", "B", "C"), presentations=2, pairs=50, seed=0):
    """Simulated answers and their key: readers near chance who agree a little with themselves and hardly with others."""
    rng = np.random.default_rng(seed)
    named = [[digest(f"made up {kind} {i}") for kind in ("real", "synthetic")] for i in range(pairs)]
    study = {"design": "pairs", "presentations": presentations, "margin": 0.1, "quiz": False,
             "questions": sorted(map(sorted, named))}
    results = {reader: [] for reader in readers}
    shared = rng.normal(size=pairs)                                  # what any reader sees in a pair
    for answers in results.values():
        own = rng.normal(size=pairs)                                 # what this one sees, each time
        for p in range(presentations):
            correct = 0.3 * shared + 0.5 * own + rng.normal(size=pairs) > 0
            for (real, synthetic), right in zip(named, correct):
                answers.append({"presentation": p + 1, "shown": [str(name) for name in rng.permutation([real, synthetic])],
                                "answer": synthetic if right else real})
    return results, {"id": digest(study), "study": study, "pairs": named, "made_up": True}


