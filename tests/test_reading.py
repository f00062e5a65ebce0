"""Results of the reader study: those that are not what they should be; numbers beside other libraries' and by hand."""
import json
import math
import re

import fuzz_json
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy import stats

from common.cli import InputError
from study import score


def made_key(design="pairs", pairs=6, presentations=2, margin=0.1):
    named = [[score.digest(f"{kind} {i}") for kind in ("real", "synthetic")] for i in range(pairs)]
    questions = sorted(map(sorted, named)) if design == "pairs" else sorted([name] for pair in named for name in pair)
    plan = {"design": design, "presentations": presentations, "margin": margin, "quiz": False, "questions": questions}
    return {"id": score.digest(plan), "study": plan, "pairs": named}


def made_result(key, reader="A", seed=0, answer=lambda shown, rng: shown[0]):
    """A reader who answers by a function of what is shown."""
    rng, answers = np.random.default_rng(seed), []
    for p in range(key["study"]["presentations"]):
        for question in rng.permutation(key["study"]["questions"]).tolist():
            shown = rng.permutation(question).tolist()
            answers.append({"presentation": p + 1, "shown": shown, "answer": answer(shown, rng),
                            "ms": int(rng.integers(1000, 9000))})
    result = {"study": key["id"], "reader": reader, "started": "2026-01-01T00:00:00Z",
              "finished": "2026-01-01T01:00:00Z", "answers": answers}
    return result | {"checksum": score.checksum(result)}


def sealed(result):
    """With a checksum that fits, as a cheat could make it."""
    return result | {"checksum": score.checksum(result)}


def first(result, **changes):
    return sealed(result | {"answers": [result["answers"][0] | changes, *result["answers"][1:]]})


@pytest.mark.parametrize("change, message", [
    (lambda r: r | {"study": "0" * 16}, "of another study, '0000000000000000'; the key is that of"),
    (lambda r: r | {"reader": "B"}, "edited or damaged, its checksum does not fit"),
    (lambda r: r | {"answers": [r["answers"][0] | {"ms": 1}, *r["answers"][1:]]}, "edited or damaged"),
    (lambda r: sealed(r | {"answers": r["answers"][:6]}),
     "reader A answered 6 of 12 questions; only complete readings"),
    (lambda r: sealed(r | {"answers": r["answers"][:11] + r["answers"][:1]}), "the same question twice"),
    (lambda r: sealed(r | {"answers": r["answers"] + r["answers"][:1]}), "the same question twice"),
    (lambda r: first(r, answer="elsewhere"), "an answer that the study does not have"),
    (lambda r: first(r, answer=5), "not in the form in which the page"),
    (lambda r: first(r, shown=["x", "y"], answer="x"), "a question or an answer that the study does not have"),
    (lambda r: first(r, presentation=3), "a question or an answer that the study does not have"),
    (lambda r: first(r, ms=-1), "not in the form in which the page"),
    (lambda r: first(r, ms="long"), "not in the form in which the page"),
    (lambda r: first(r, ms=True), "not in the form in which the page"),
    (lambda r: first(r, ms=float("inf")), "not in the form in which the page"),
    (lambda r: first(r, presentation=1.0), "not in the form in which the page"),
    (lambda r: first(r, presentation=True), "not in the form in which the page"),
    (lambda r: first(r, presentation=10 ** 400), "not in the form in which the page"),
    (lambda r: first(r, shown=None), "not in the form in which the page"),
    (lambda r: first(r, shown=[["x"], "y"], answer="y"), "not in the form in which the page"),
    (lambda r: first(r, more=1), "not in the form in which the page"),
    (lambda r: sealed(r | {"answers": 3}), "not in the form in which the page"),
    (lambda r: sealed(r | {"answers": [3]}), "not in the form in which the page"),
    (lambda r: sealed(r | {"reader": 7}), "not in the form in which the page"),
    (lambda r: sealed(r | {"started": [[[[]]]]}), "not in the form in which the page"),
    (lambda r: sealed(r | {"study": "x\ny" * 99}), "results of another study, 'x\\nyx"),
    (lambda r: sealed(r | {"reader": " "}), "no reader's name"),
    (lambda r: sealed(r | {"reader": "A" * 61}), "not a name of at most 60 printable characters"),
    (lambda r: sealed(r | {"reader": "A\nB"}), "not a name of at most 60 printable characters"),
    (lambda r: sealed(r | {"reader": "A\x1b[31m"}), "not a name of at most 60 printable characters"),
    (lambda r: sealed(r | {"reader": "\u202eA"}), "not a name of at most 60 printable characters"),
    (lambda r: sealed(r | {"reader": "\ud800\udfff"[::-1]}), "not a name of at most 60 printable characters"),
    (lambda r: sealed(r | {"more": {}}), "not a results file of the page; those have answers, checksum"),
    (lambda r: {"hello": 1}, "not a results file of the page; those have answers, checksum"),
    (lambda r: [r], "holds list where dict is expected")])
def test_a_result_that_is_not_whole_and_unedited_is_named(tmp_path, change, message):
    key = made_key()
    path = tmp_path / "result.json"
    path.write_text(json.dumps(made_result(key)))
    assert score.read_result(path, key)["reader"] == "A"
    path.write_text(json.dumps(change(made_result(key))))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        score.read_result(path, key)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_ratings_outside_the_scale_are_named(tmp_path):
    key = made_key("single")
    path = tmp_path / "result.json"
    possible, form = "an answer that the study does not have", "not in the form in which the page"
    for rating, message in ((1, None), (6, None), (0, possible), (7, possible), (2.5, form), (3.0, form), (True, form),
                            ("3", form), (None, form)):
        path.write_text(json.dumps(made_result(key, answer=lambda shown, rng: rating)))
        if message is None:
            score.read_result(path, key)
        else:
            with pytest.raises(InputError, match=message):
                score.read_result(path, key)


@pytest.mark.parametrize("second, message", [
    (lambda key: made_result(key, "a ", seed=1), "reader a a second time, first in"),
    (lambda key: sealed(made_result(key, "A") | {"reader": "B"}), "the same answers at the same times a second time")])
def test_a_reader_or_a_reading_counts_once(tmp_path, command, second, message):
    key = made_key()
    (tmp_path / "key.json").write_text(json.dumps(key))
    for name, result in (("1.json", made_result(key, "A")), ("2.json", second(key))):
        (tmp_path / name).write_text(json.dumps(result))
    before = sorted(tmp_path.iterdir())
    status, _, errors = command("study", "score", "1.json", "2.json", "--key", "key.json", "--out", "score",
                                cwd=tmp_path)
    assert status == 2 and "2.json: " in errors and message in errors and len(errors.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_key_with_another_margin_than_the_one_given_beforehand_is_refused(tmp_path):
    key = made_key()
    key["study"]["margin"] = 0.3
    (tmp_path / "key.json").write_text(json.dumps(key))
    with pytest.raises(InputError, match="margin and questions are fixed when it is built"):
        score.read_key(tmp_path / "key.json")
    key = made_key()
    key["pairs"][0][0] = "elsewhere"
    (tmp_path / "key.json").write_text(json.dumps(key))
    with pytest.raises(InputError, match="not those of its questions"):
        score.read_key(tmp_path / "key.json")
    for text, message in (("{}", "not a key"), ("text", "not JSON"), ("[1]", "holds list where dict is expected")):
        (tmp_path / "key.json").write_text(text)
        with pytest.raises(InputError, match=message):
            score.read_key(tmp_path / "key.json")


@pytest.mark.parametrize("change", [
    {"pairs": 7}, {"pairs": [7]}, {"pairs": [["a", 7]]}, {"pairs": {}}, {"id": 7}, {"study": []},
    {"study": {"design": ["pairs"]}},
    {"presentations": 2.0}, {"presentations": True}, {"presentations": 10 ** 30}, {"presentations": 0},
    {"margin": "0.1"},
    {"margin": float("nan")}, {"margin": 0.5}, {"quiz": 0}, {"questions": 3}, {"questions": []}, {"questions": [["a"]]},
    {"questions": [[1, 2]]}, {"design": "triples"}])
def test_a_key_that_is_not_one_is_one_line(tmp_path, command, change):
    """Whoever changes a key can also give it the digest that fits."""
    key = made_key()
    outer = {name: change[name] for name in ("pairs", "id", "study") if name in change}
    key["study"] |= {name: value for name, value in change.items() if name not in outer}
    key = {"id": score.digest(key["study"]), **{name: key[name] for name in ("study", "pairs")}} | outer
    (tmp_path / "key.json").write_text(json.dumps(key))
    (tmp_path / "1.json").write_text(json.dumps(made_result(made_key())))
    status, _, errors = command("study", "score", "1.json", "--key", "key.json", "--out", "score", cwd=tmp_path)
    assert status == 2 and "key.json: not a key that study build wrote" in errors and len(errors.splitlines()) == 1


NESTED = [b"[" * 100_000, b'{"a":' * 100_000, b'{"study":' + b"[" * 900 + b"]" * 900 + b"}"]


@pytest.mark.parametrize("content",
                         [b"", b"\xff\xfe{}", b"\x00" * 99, b"7", b"null", b'"text"', b"9" * 10_000, *NESTED])
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, command, content):
    key = made_key()
    for damaged, whole in (("1.json", "key.json"), ("key.json", "1.json")):
        (tmp_path / whole).write_text(json.dumps({"key.json": key, "1.json": made_result(key)}[whole]))
        (tmp_path / damaged).write_bytes(content)
        status, _, errors = command("study", "score", "1.json", "--key", "key.json", "--out", "score", cwd=tmp_path)
        assert status == 2 and damaged in errors and len(errors.splitlines()) == 1 and len(errors) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "key.json"]


@pytest.mark.parametrize("n, seed", [(200, 0), pytest.param(20_000, 1, marks=pytest.mark.slow)])
def test_changed_files_are_taken_or_refused_in_one_line(tmp_path, n, seed):
    outcomes = fuzz_json.run(n, seed, tmp_path)
    assert min(outcomes.values()) > n / 50 and len(outcomes) == 6    # neither harmless nor always refused


# --- the numbers ----------------------------------------------------------------------------------------

def test_four_pairs_by_hand():
    """Right on three of four pairs; the synthetic one stood left in two. Everything below is worked out on paper."""
    key = made_key(pairs=4, presentations=1)
    answers = []
    for (real, synthetic), left, right in zip(key["pairs"], (True, True, False, False), (True, True, True, False)):
        answers.append({"presentation": 1, "shown": [synthetic, real] if left else [real, synthetic],
                        "answer": synthetic if right else real})
    numbers = score.score({"A": answers}, key)
    row = numbers["readers"][0]
    assert (row["right"], row["n"], row["accuracy"], row["sensitivity"], row["specificity"]) == (3, 4, 0.75, 1.0, 0.5)
    z = {5 / 6: 0.967421566101701, 1 / 2: 0.0}                       # of the rates (2 + .5) / 3 and (1 + .5) / 3
    assert row["d_prime"] == pytest.approx((z[5 / 6] - z[1 / 2]) / math.sqrt(2), abs=1e-12)
    assert row["p_chance"] == pytest.approx(10 / 16)                 # 0, 1, 3 or 4 right of 4: (1 + 4 + 4 + 1) / 16
    assert row["p_equivalence"] == pytest.approx(1 - 0.6 ** 4)       # at most 3 right when .6 are: all but 4 of 4
    assert row["interval"] == pytest.approx((0.19412044968, 0.99369053677))
    together = numbers["together"]  # mean 3/4, s = 1/2, error 1/4, t(3) at .975 = 3.18245
    assert together["interval"] == pytest.approx((max(0.75 - 3.182446305 / 4, 0), 1.0), abs=1e-9)
    assert math.isnan(row["roc_area"]) and numbers["intra_rater"] == numbers["inter_rater"] == numbers["fleiss"] == []


def test_single_images_beside_scikit_learn_and_statsmodels(tmp_path):
    """Three readers of some ability, read back from their files."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater", reason="statsmodels is not installed")
    key = made_key("single", pairs=40)
    synthetic = {name for _, name in key["pairs"]}

    def rate(shown, rng):
        return int(np.clip(rng.normal(3.3 + 0.7 * (shown[0] in synthetic), 1.6), 1, 6.99))

    paths = []
    for i, reader in enumerate("CAB"):
        result = made_result(key, reader, i, rate)
        paths.append(tmp_path / f"{reader}.json")
        paths[-1].write_text(json.dumps(result))
    results = score.read_results(paths, key)
    numbers = score.score(results, key)
    names = [name for name, in key["study"]["questions"]]
    truth = np.array([name in synthetic for name in names])
    rating = {(reader, a["presentation"], a["shown"][0]): a["answer"]
              for reader, answers in results.items() for a in answers}
    rated = {(reader, p): np.array([rating[reader, p, name] for name in names]) for reader in "ABC" for p in (1, 2)}
    assert [(r["reader"], r["presentation"]) for r in numbers["readers"]] == list(rated)
    for row in numbers["readers"]:
        given = rated[row["reader"], row["presentation"]]
        assert row["accuracy"] == pytest.approx(metrics.accuracy_score(truth, given > 3))
        assert row["sensitivity"] == pytest.approx(metrics.recall_score(truth, given > 3))
        assert row["specificity"] == pytest.approx(metrics.recall_score(~truth, given <= 3))
        assert row["roc_area"] == pytest.approx(metrics.roc_auc_score(truth, given))
    said = {which: given > 3 for which, given in rated.items()}
    expected = [said[reader, 1] for reader in "ABC"], [said[reader, 2] for reader in "ABC"]
    for row, a, b in zip(numbers["intra_rater"], *expected):
        assert row["kappa"] == pytest.approx(metrics.cohen_kappa_score(a, b))
    for row in numbers["inter_rater"]:
        a, b = (said[reader, row["presentation"]] for reader in row["readers"])
        assert row["kappa"] == pytest.approx(metrics.cohen_kappa_score(a, b))
    for row in numbers["fleiss"]:
        table = inter_rater.aggregate_raters(np.stack(expected[row["presentation"] - 1], 1))[0]
        assert row["kappa"] == pytest.approx(inter_rater.fleiss_kappa(table))
    assert len(numbers["intra_rater"]) == 3 and len(numbers["inter_rater"]) == 6 and len(numbers["fleiss"]) == 2


def test_score_of_simulated_readers_finds_their_ability():
    """From answers to numbers: a reader who is right 70 % of the time, one who guesses, one who always says left."""
    key = made_key(pairs=400)
    synthetic = {name for _, name in key["pairs"]}

    def able(accuracy):
        return lambda shown, rng: shown[int((shown[1] in synthetic) == (rng.random() < accuracy))]

    abilities = {"able": able(0.7), "guess": able(0.5), "left": lambda shown, rng: shown[0]}
    numbers = score.score({name: made_result(key, name, i, answer)["answers"]
                             for i, (name, answer) in enumerate(abilities.items())}, key)
    rows = {(r["reader"], r["presentation"]): r for r in numbers["readers"]}
    for p in (1, 2):
        low, high = rows["able", p]["interval"]
        assert low < 0.7 < high and rows["able", p]["p_chance"] < 1e-6 and rows["able", p]["p_equivalence"] > 0.5
        assert rows["able", p]["d_prime"] == pytest.approx(2 * stats.norm.ppf(0.7) / math.sqrt(2), abs=0.25)
        assert rows["guess", p]["p_equivalence"] < 0.01 and abs(rows["guess", p]["d_prime"]) < 0.25
        assert rows["left", p]["sensitivity"] == 1 and rows["left", p]["specificity"] == 0
        assert abs(rows["left", p]["d_prime"]) < 0.1
    intra = {r["reader"]: r["kappa"] for r in numbers["intra_rater"]}
    assert abs(intra["guess"]) < 0.15 and intra["able"] == pytest.approx(2 * (0.7 ** 2 + 0.3 ** 2) - 1, abs=0.12)


def test_opposite_readers_are_not_together_equivalent_to_chance(tmp_path, capsys):
    """One is right in 90 %, one in 10 %, and one guesses: the mean is near 1/2 on every pair, and two of the three
    can tell."""
    key = made_key(pairs=200)
    synthetic = {name for _, name in key["pairs"]}

    def able(accuracy):
        return lambda shown, rng: shown[int((shown[1] in synthetic) == (rng.random() < accuracy))]

    def verdict(**abilities):
        results = {name: made_result(key, name, i, able(accuracy))["answers"]
                   for i, (name, accuracy) in enumerate(abilities.items())}
        score.report(results, key, tmp_path / "score")
        return json.loads((tmp_path / "score.json").read_text())["together"], capsys.readouterr().out

    two = {name: made_result(key, name, i, able(accuracy))["answers"]
           for i, (name, accuracy) in enumerate({"right": 0.9, "wrong": 0.1}.items())}
    numbers = score.score(two, key)["together"]
    assert numbers["p_equivalence"] < 0.001 and not numbers["equivalent"]
    numbers, text = verdict(right=0.9, wrong=0.1, guesses=0.5)
    assert numbers["p_equivalence"] < 0.001 and not numbers["equivalent"]  # the mean alone would have shown it
    assert numbers["readers_who_differ_from_chance"] == ["right", "wrong"]
    assert "withheld. Different from chance by Holm's test at 5 %: right, wrong." in text and ": shown" not in text
    numbers, text = verdict(first=0.5, second=0.5, third=0.5)
    assert numbers["equivalent"] and numbers["readers_who_differ_from_chance"] == [] and "was built: shown." in text


def test_the_example_has_the_paper_s_shape_and_says_that_it_is_simulated(tmp_path, command):
    status, output, errors = command("study", "example", "--out", tmp_path / "example")
    assert status == 0, errors
    assert output.startswith("SIMULATED") and output == (tmp_path / "example.txt").read_text()
    numbers = json.loads((tmp_path / "example.json").read_text())
    assert numbers["simulated"] is True
    rows = [(r["reader"], r["presentation"], r["n"]) for r in numbers["readers"]]
    assert rows == [(reader, p, 50) for reader in "ABC" for p in (1, 2)]
    assert len(numbers["intra_rater"]) == 3
    assert len(numbers["inter_rater"]) == 6    # .42 .23 .27, and three a presentation
    with Image.open(tmp_path / "example.png") as image:
        assert image.text["Title"].startswith("SIMULATED") and image.width > 1000
        assert np.asarray(image.convert("RGB")).std() > 10


def test_the_readme_s_command_scores_results(tmp_path, command):
    line, = (line for line in (ROOT / "study/README.md").read_text().splitlines() if "study score" in line)
    program, _, name, *words = line.split()
    assert [program, name, words[1]] == ["python", "study", "results/*.json"]
    key = made_key()
    for path, content in (("out/study.key.json", key), ("results/a.json", made_result(key, "A")),
                          ("results/b.json", made_result(key, "B", seed=1))):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    status, output, errors = command("study", words[0], "results/a.json", "results/b.json", *words[2:], cwd=tmp_path)
    assert status == 0, errors
    assert sorted(path.name for path in (tmp_path / "out").glob("score.*")) == ["score.json", "score.png", "score.txt"]
    assert output == (tmp_path / "out/score.txt").read_text()


def test_one_reader_with_an_awkward_name_and_one_presentation(tmp_path, capsys):
    key = made_key(presentations=1)
    score.report({"$a_{b $": made_result(key, "$a_{b $")["answers"]}, key, tmp_path / "new/score")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["score.json", "score.png", "score.txt"]
    assert "NaN" not in (tmp_path / "new/score.json").read_text() and "$a_{b $" in capsys.readouterr().out
