"""The answers of a reader study, checked and turned into numbers, a table and a figure.

    key        what `study build` kept: {"id", "study": {"design", "presentations", "margin", "questions", ...},
    "pairs"}
               questions: the names of the images, [a, b] sorted or [a]; pairs: the names [real, synthetic]
    result     one reader's file: {"study", "reader", "started", "finished", "answers", "checksum"}
    answer     {"presentation": from 1, "shown": names from left to right, "answer": the name called synthetic, or the
               rating of the one image from 1, definitely real, to 6, definitely synthetic, "ms": time on the screen}

Either all results are scored or none: a file of another study, an edited, repeated or incomplete one is named and
refused. The statistics are in agreement.py. Kappa is that of the answers (which image was called synthetic), whether
they are right or not. In pairs, sensitivity is the share found of the synthetic images on the left, specificity of
those on the right.
"""
import hashlib
import itertools
import json
import math
import unicodedata
import zlib

import numpy as np
from matplotlib.figure import Figure

from common import cli
from common.cli import InputError
from study import agreement

RATINGS = 6            # of a single image; those above the middle call it synthetic
MAX_PRESENTATIONS = 20
LONGEST_NAME = 60      # characters of a reader's name
SIMULATED = "SIMULATED answers: no reader has given them"


def digest(value):
    """16 hex digits that name bytes, or a value as JSON."""
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# Files, checked

def is_whole(value, low, high):
    """Whether a value out of JSON is an integer in this range: 1.0 and true, which Python takes for 1, are not."""
    return type(value) is int and low <= value <= high


def is_texts(value, count):
    return isinstance(value, list) and len(value) == count and all(isinstance(text, str) for text in value)


def is_key(key):
    """Whether a dict has the form of a key. What it says is checked by read_key."""
    study, pairs = key.get("study"), key.get("pairs")
    if not (isinstance(study, dict) and isinstance(pairs, list) and isinstance(key.get("id"), str)):
        return False
    shown = {"pairs": 2, "single": 1}.get(study.get("design") if isinstance(study.get("design"), str) else None)
    margin, questions = study.get("margin"), study.get("questions")
    return (shown is not None and isinstance(questions, list) and len(questions) > 0
            and all(is_texts(question, shown) for question in questions) and all(is_texts(pair, 2) for pair in pairs)
            and is_whole(study.get("presentations"), 1, MAX_PRESENTATIONS) and type(study.get("quiz")) is bool
            and isinstance(margin, float) and 0 < margin < 0.5)


def read_key(path):
    """The key of a study as it was built. Raises InputError for anything else."""
    key = cli.read_json(path)
    try:
        if not is_key(key):
            raise InputError(f"{path}: not a key that study build wrote")
        if digest(key["study"]) != key["id"]:
            raise InputError(f"{path}: not the study that was built; margin and questions are fixed when it is built")
    except RecursionError:                                           # read, but nested too deeply to be written again
        raise InputError(f"{path}: not a key that study build wrote") from None
    if sorted(itertools.chain(*key["pairs"])) != sorted(itertools.chain(*key["study"]["questions"])):
        raise InputError(f"{path}: the answers in this key are not those of its questions")
    return key


def checksum(result):
    """CRC-32 of the result without its checksum, as compact JSON. The page computes it without a secret: it finds
    accidents and careless edits, but anyone who means to cheat can compute it too."""
    rest = {name: value for name, value in result.items() if name != "checksum"}
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=False)
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


RESULT = {"study", "reader", "started", "finished", "answers", "checksum"}
ANSWER = {"presentation", "shown", "answer", "ms"}


def is_result(result, images):
    """Whether a dict has the form of a page's results, with `images` images in each question."""
    texts = all(isinstance(result[name], str) for name in RESULT - {"answers"})
    return texts and isinstance(result["answers"], list) and all(
        isinstance(answer, dict) and set(answer) == ANSWER and is_texts(answer["shown"], images)
        and is_whole(answer["presentation"], 1, MAX_PRESENTATIONS) and is_whole(answer["ms"], 0, 2 ** 53)
        and (isinstance(answer["answer"], str) if images == 2 else type(answer["answer"]) is int)
        for answer in result["answers"])


def read_result(path, key):
    """One reader's file, checked against the key. Raises InputError for whatever is not a complete, unedited
    reading."""
    result = cli.read_json(path)
    if set(result) != RESULT:
        raise InputError(f"{path}: not a results file of the page; those have {', '.join(sorted(RESULT))}")
    pairs, presentations = key["study"]["design"] == "pairs", key["study"]["presentations"]
    if not is_result(result, 2 if pairs else 1):
        raise InputError(f"{path}: the answers are not in the form in which the page of this study writes them")
    if result["study"] != key["id"]:
        raise InputError(f"{path}: results of another study, {result['study'][:16]!r}; the key is that of {key['id']}")
    if result["checksum"] != checksum(result):
        raise InputError(f"{path}: edited or damaged, its checksum does not fit")
    name = result["reader"]
    if not (name.strip() and name.isprintable() and len(name) <= LONGEST_NAME):
        raise InputError(f"{path}: no reader's name, or not a name of at most {LONGEST_NAME} printable characters")
    expected = {(p, *question) for p in range(1, presentations + 1) for question in key["study"]["questions"]}
    asked = [(answer["presentation"], *sorted(answer["shown"])) for answer in result["answers"]]
    possible = all(answer["answer"] in (answer["shown"] if pairs else range(1, RATINGS + 1))
                   for answer in result["answers"])
    if not (possible and set(asked) <= expected and len(set(asked)) == len(asked)):
        raise InputError(f"{path}: answers that the page cannot have written: a question or an answer that the study "
                         "does not have, or the same question twice")
    if len(asked) < len(expected):
        raise InputError(f"{path}: reader {name} answered {len(asked)} of {len(expected)} questions; "
                         "only complete readings are scored")
    return result


def read_results(paths, key):
    """{reader: answers}. Raises InputError also for two files of one reader, or for one reading under two names."""
    if key["study"]["quiz"]:
        raise InputError("a quiz tells the answers as it goes, so its results are not a blind reading")
    results, seen = {}, {}
    for path in paths:
        result = read_result(path, key)
        reader, reading = result["reader"].strip(), json.dumps(result["answers"])
        same_name = unicodedata.normalize("NFKC", reader).casefold()
        for what, seen_before in ((f"reader {reader}", same_name), ("the same answers at the same times", reading)):
            if seen_before in seen:
                raise InputError(f"{path}: {what} a second time, first in {seen[seen_before]}")
            seen[seen_before] = path
        results[reader] = result["answers"]
    return dict(sorted(results.items()))


# ---------------------------------------------------------------------------------------------------------
# Answers to numbers

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


def score_reading(table, p, pairs, margin):
    """The numbers of one reader's presentation p, from 0; table as tabulate makes it."""
    truth, signal, response = table["truth"][p], table["signal"][p], table["response"][p]
    n, right = len(truth), int((table["said"][p] == truth).sum())
    return {"presentation": p + 1, "n": n, "right": right, "accuracy": right / n,
            "interval": agreement.exact_interval(right, n),
            "sensitivity": response[signal].mean() if signal.any() else math.nan,
            "specificity": 1 - response[~signal].mean() if not signal.all() else math.nan,
            "d_prime": agreement.d_prime(signal, response, looks=2 if pairs else 1),
            "roc_area": math.nan if pairs else agreement.roc_area(truth, table["rating"][p]),
            "p_chance": agreement.chance_test(right, n),
            "p_equivalence": agreement.equivalence_test(right, n, margin)}


def kappas(said, presentations):
    """Agreement within each reader, between two, and of all readers. said: {reader: (presentations, questions)
    bool}."""

    def kappa(a, b):
        return dict(zip(("kappa", "low", "high"), agreement.cohen_kappa(a, b)))

    intra = [{"reader": reader, "presentations": [p + 1, q + 1]} | kappa(said[reader][p], said[reader][q])
             for reader in said for p, q in itertools.combinations(presentations, 2)]
    inter = [{"readers": [a, b], "presentation": p + 1} | kappa(said[a][p], said[b][p])
             for p in presentations for a, b in itertools.combinations(said, 2)]
    fleiss = [{"presentation": p + 1, "kappa": agreement.fleiss_kappa(np.stack([table[p] for table in said.values()]))}
              for p in presentations if len(said) > 1]
    return {"intra_rater": intra, "inter_rater": inter, "fleiss": fleiss}


def score_together(tables, rows, key):
    """All readers as one. Their mean is equivalent to chance only if no reader differs from chance: one who is right
    in 90 % and one who is right in 10 % have the mean 1/2, and both can tell."""
    pairs, questions = key["study"]["design"] == "pairs", key["study"]["questions"]
    right = np.mean([(t["said"] == t["truth"]).mean(0) for t in tables.values()], 0)          # of each question
    if pairs:
        by_pair = [right[questions.index(sorted(pair))] for pair in key["pairs"]]
    else:
        by_pair = [right[[questions.index([name]) for name in pair]].mean() for pair in key["pairs"]]
    accuracy, low, high, p_equivalence = agreement.together(np.array(by_pair), key["study"]["margin"])
    differ = list(dict.fromkeys(row["reader"] for row in rows if row["p_chance_holm"] <= agreement.ALPHA))
    return {"accuracy": accuracy, "interval": (low, high), "p_equivalence": p_equivalence,
            "readers_who_differ_from_chance": differ,
            "equivalent": bool(p_equivalence <= agreement.ALPHA) and not differ}


def score(results, key):
    """All numbers of the study, as the dict that the .json holds. NaN where a number cannot be computed."""
    study = key["study"]
    tables = {reader: tabulate(answers, key) for reader, answers in results.items()}
    rows = [{"reader": reader} | score_reading(table, p, study["design"] == "pairs", study["margin"])
            for reader, table in tables.items() for p in range(study["presentations"])]
    for row, p in zip(rows, agreement.holm([row["p_chance"] for row in rows])):
        row["p_chance_holm"] = float(p)
    said = {reader: table["said"] for reader, table in tables.items()}
    return {"simulated": key.get("simulated", False), "study": key["id"], "design": study["design"],
            "margin": study["margin"], "readers": rows, **kappas(said, range(study["presentations"])),
            "together": score_together(tables, rows, key)}


# ---------------------------------------------------------------------------------------------------------
# Numbers to a table, a figure and JSON

def format_number(number, form=".2f"):
    return "-" if math.isnan(number) else format(number, form)


def format_interval(interval):
    return "[" + ", ".join(map(format_number, interval)) + "]"


def format_table(scores):
    """The numbers as text: one row for each reading, then the rows of the paper's own table, then the verdict."""
    readers = list(dict.fromkeys(row["reader"] for row in scores["readers"]))
    wide = max(map(len, [*readers, "presentation 1"])) + 2
    lines = [SIMULATED] if scores["simulated"] else []
    lines.append(f"{'reader':{wide}}{'presentation':>12}{'right':>9}{'accuracy':>10}{'95 % interval':>16}"
                 f"{'sensitivity':>13}{'specificity':>13}{'d prime':>9}{'ROC area':>10}{'p chance':>10}{'Holm':>7}"
                 f"{'p equivalence':>15}")
    for row in scores["readers"]:
        right = f"{row['right']}/{row['n']}"
        lines.append(f"{row['reader']:{wide}}{row['presentation']:12}{right:>9}{format_number(row['accuracy']):>10}"
                     f"{format_interval(row['interval']):>16}{format_number(row['sensitivity']):>13}"
                     f"{format_number(row['specificity']):>13}{format_number(row['d_prime']):>9}"
                     f"{format_number(row['roc_area']):>10}{format_number(row['p_chance'], '.3f'):>10}"
                     f"{format_number(row['p_chance_holm'], '.3f'):>7}{format_number(row['p_equivalence'], '.3f'):>15}")
    every = scores["together"]
    lines += [f"{'together':{wide + 21}}{format_number(every['accuracy']):>10}{format_interval(every['interval']):>16}"
              f"{'':62}{format_number(every['p_equivalence'], '.3f'):>15}", ""]

    def kappa(row):
        return f"{format_number(row['kappa'])} {format_interval((row['low'], row['high']))}"

    for reader in readers:
        accuracies = " / ".join(format_number(row["accuracy"]) for row in scores["readers"] if row["reader"] == reader)
        intra = "".join(f"   intra-rater kappa {kappa(row)}"
                        for row in scores["intra_rater"] if row["reader"] == reader)
        lines.append(f"{reader:{wide}}accuracy {accuracies}{intra}")
    for fleiss in scores["fleiss"]:
        p = fleiss["presentation"]
        inter = ", ".join(f"{' and '.join(row['readers'])} {kappa(row)}"
                          for row in scores["inter_rater"] if row["presentation"] == p)
        lines.append(f"{f'presentation {p}':{wide}}inter-rater kappa {inter}; "
                     f"Fleiss' kappa {format_number(fleiss['kappa'])}")
    return "\n".join([*lines, "", verdict(every, scores["margin"])]) + "\n"


def verdict(every, margin):
    claim = f"Together equivalent to chance within {margin:g}, the margin fixed when the study was built"
    if differ := every["readers_who_differ_from_chance"]:
        return (f"{claim}: withheld. Different from chance by Holm's test at 5 %: {', '.join(differ)}. Readers who are "
                "often right and readers who are often wrong cancel in the mean, though both can tell.")
    return f"{claim}: {'shown' if every['equivalent'] else 'not shown'}. This says nothing about other readers."


def panels_of(scores):
    """The readers, and the heat maps, each as (title, columns, label of the columns, (least, most) value,
    {(reader, column): value})."""
    readers = list(dict.fromkeys(row["reader"] for row in scores["readers"]))
    presentations = sorted({row["presentation"] for row in scores["readers"]})
    again = list(dict.fromkeys("{} and {}".format(*row["presentations"]) for row in scores["intra_rater"]))
    accuracy = {(row["reader"], row["presentation"]): row["accuracy"] for row in scores["readers"]}
    intra = {(row["reader"], "{} and {}".format(*row["presentations"])): row["kappa"] for row in scores["intra_rater"]}
    panels = [("accuracy", presentations, "presentation", (0, 1), accuracy),
              ("intra-rater kappa", again, "presentations", (-1, 1), intra)]
    for p in presentations:
        inter = {tuple(row["readers"]): row["kappa"] for row in scores["inter_rater"] if row["presentation"] == p}
        inter |= {(b, a): kappa for (a, b), kappa in inter.items()}
        panels.append((f"inter-rater kappa, presentation {p}", readers, "", (-1, 1), inter))
    return readers, [panel for panel in panels if panel[-1]]


def plot(scores, path):
    """Heat maps as in the paper: accuracy, intra-rater kappa, and inter-rater kappa for each presentation."""
    readers, panels = panels_of(scores)
    figure = Figure(figsize=(1 + 3.2 * len(panels), 1.6 + 0.6 * len(readers)), layout="constrained")
    heading = SIMULATED if scores["simulated"] else f"Study {scores['study']}"
    figure.suptitle(heading)
    for axes, (title, columns, label, ends, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        cells = np.array([[values.get((reader, column), math.nan) for column in columns] for reader in readers])
        axes.imshow(cells, "RdBu_r", vmin=ends[0], vmax=ends[1], aspect="auto")  # white: accuracy 1/2, kappa 0
        for (i, j), value in np.ndenumerate(cells):
            axes.text(j, i, format_number(value), ha="center", va="center")
        axes.set(title=title, xlabel=label)
        axes.set_xticks(range(len(columns)), columns, parse_math=False)            # a reader may be called $
        axes.set_yticks(range(len(readers)), readers, parse_math=False)
    with cli.whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Title": heading})


def report(results, key, out):
    """Prints the table and writes OUT.txt, OUT.png and OUT.json."""
    scores = score(results, key)
    text = format_table(scores)
    plot(scores, f"{out}.png")
    cli.write_json(f"{out}.json", scores)
    cli.write_text(f"{out}.txt", text)
    print(text, end="")


def simulate(readers=("A", "B", "C"), presentations=2, pairs=50, seed=0):
    """Simulated answers and their key: readers near chance who agree a little with themselves and hardly with
    others."""
    rng = np.random.default_rng(seed)
    named = [[digest(f"made up {kind} {i}") for kind in ("real", "synthetic")] for i in range(pairs)]
    study = {"design": "pairs", "presentations": presentations, "margin": 0.1, "quiz": False,
             "questions": sorted(map(sorted, named))}
    results = {reader: [] for reader in readers}
    shared = rng.normal(size=pairs)                                  # what any reader sees in a pair
    for answers in results.values():
        personal = rng.normal(size=pairs)                            # what this reader sees, each time
        for p in range(presentations):
            correct = 0.3 * shared + 0.5 * personal + rng.normal(size=pairs) > 0
            for (real, synthetic), right in zip(named, correct):
                shown = [str(name) for name in rng.permutation([real, synthetic])]
                answers.append({"presentation": p + 1, "shown": shown, "answer": synthetic if right else real})
    return results, {"id": digest(study), "study": study, "pairs": named, "simulated": True}
