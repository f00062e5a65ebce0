"""Cohorts: balanced exactly, from rows, from the causal model; tables and requests as sample.py reads them."""
import collections
import csv
from types import SimpleNamespace

import pytest

import radit
import sample
from causal import cohort, patients
from common.cli import InputError, write_csv
from radiographs import fields
from radiographs.index import COLUMNS, index_row, read_rows
from training import finetune

COVERED = {"sex": {"female": 5, "male": 4}, "view": {"PA": 9, "AP": 3}, "race": {"white": 3, "asian": 1},
           "age": [20.5, 70], "pneumonia": {"positive": 2}, "dataset": {"own": 9}}


@pytest.fixture(scope="module")
def model():
    return patients.load(sample.DEMO / "causal")


# --- balance --------------------------------------------------------------------------------------------

def test_every_combination_comes_as_often():
    records, cells, left_out = cohort.balanced(["sex", "age", "race"], 50, 0, COVERED)
    assert len(cells) == 2 * 3 * 2 and sorted(left_out) == ["age=0-17", "age=80-120", "race=black"]
    counts = collections.Counter(tuple(fields.groups_of(record, ["sex", "age", "race"])) for record in records)
    assert len(counts) == 12 and sorted(counts.values()) == [4] * 10 + [5] * 2
    assert all(record.keys() == {"sex", "age", "race"} and 21 <= record["age"] <= 70 for record in records)
    again, _, _ = cohort.balanced(["sex", "age", "race"], 20, 30, COVERED)
    assert [r["age"] for r in again] != [r["age"] for r in records[:20]]


def test_the_causal_model_draws_the_rest(model):
    """Against plain draws under one intervention; the set values come through, and No Finding agrees with the
    findings."""
    records, _, _ = cohort.balanced(["sex", "view"], 8, 3, COVERED, model)
    assert records[0] == patients.sample(model, 1, {"sex": "female", "view": "AP"}, 3)[0]
    assert records[3] == patients.sample(model, 4, {"sex": "male", "view": "PA"}, 3)[3]
    many, _, left_out = cohort.balanced(["cardiomegaly", "sex"], 80, 0,
                                        COVERED | {"cardiomegaly": {"positive": 1, "negative": 1}}, model)
    assert not left_out and collections.Counter(r["cardiomegaly"] for r in many) == {"positive": 40, "negative": 40}
    assert all(r["no_finding"] == "negative" for r in many if r["cardiomegaly"] == "positive")
    effusions = {value: sum(r["pleural_effusion"] == "positive" for r in many if r["cardiomegaly"] == value)
                 for value in ("positive", "negative")}
    assert effusions["positive"] > effusions["negative"]             # its cause in the graph


def test_what_the_causal_model_does_not_cover_is_left_out_by_name(model):
    covered = COVERED | {"dataset": {"ChestX-ray14": 5, "kermany": 5}}
    records, cells, left_out = cohort.balanced(["dataset", "race"], 4, 0, covered, model)  # the model has no race
    assert cells == [("ChestX-ray14", "asian"), ("ChestX-ray14", "white")] \
        and left_out == ["dataset=kermany", "race=black"]
    assert [r["race"] for r in records] == ["asian", "white"] * 2


@pytest.mark.parametrize("names, message", [
    (["colour"], "unknown field 'colour'"), (["edema"], "says nothing of it; covered: sex"),
    (["dataset"], "no combination is covered by both"), (["no_finding"], "it follows from the findings")])
def test_what_cannot_be_balanced_is_refused(model, names, message):
    with pytest.raises(InputError, match=message):
        cohort.balanced(names, 4, 0, COVERED | {"no_finding": {"positive": 1}}, model)


def test_what_was_never_seen_together_is_left_out(model):
    """A data set of children: it is balanced over the ages that it has, and no grown-up of it is asked for."""
    seen = [{"dataset": "own", "age": 40.0, "sex": "male", "view": "PA"},
            {"dataset": "own", "age": 65.0, "sex": "female"},
            {"dataset": "children", "age": 21.0, "sex": "male"}, {"dataset": "children", "age": 21.0, "sex": "female"}]
    covered, pairs = fields.coverage(seen), fields.count_pairs(seen)
    records, cells, left_out = cohort.balanced(["dataset", "age"], 12, 0, covered, None, pairs)
    assert cells == [("children", (21, 39)), ("own", (40, 59)), ("own", (60, 65))]
    assert {(r["dataset"], tuple(fields.groups_of(r, ["age"]))) for r in records} == {
        ("children", ("age=18-39",)), ("own", ("age=40-59",)), ("own", ("age=60-79",))}
    assert "dataset=own with age=18-39" in left_out and "dataset=children with age=60-79" in left_out
    # What only follows stays unknown where it was never seen with what was asked for.
    patient = {"age": 50.0, "sex": "male", "view": "PA", "dataset": "children"}
    assert cohort.only_together(patient, ["dataset"], pairs) == {"dataset": "children", "sex": "male"}
    assert cohort.only_together(patient, ["age"], pairs) == {"age": 50.0, "sex": "male", "view": "PA"}
    assert cohort.only_together(patient, ["dataset"], {}) == patient


def run(monkeypatch, command, out, *arguments, covered=COVERED):
    """python -m causal cohort for weights that cover `covered`, without a causal model beside them; rows and what it
    said."""
    config = SimpleNamespace(datasets=(*fields.DATASETS, "own"), covered=covered, pairs={})
    monkeypatch.setattr(sample, "load_weights", lambda folder: (SimpleNamespace(config=config), None))
    status, output, errors = command("causal", "cohort", "--weights", out / "weights", "--out", out / "t.csv",
                                     *arguments)
    assert status == 0, errors
    return list(csv.DictReader(open(out / "t.csv"))), output


def test_the_command_writes_a_balanced_table(tmp_path, monkeypatch, command):
    rows, output = run(monkeypatch, command, tmp_path, "--balance", "sex,age", "--n", 11, "--set", "view=PA",
                       "--seed", 4)
    assert "6 combinations of sex, age, 1 or 2 rows each" in output and "no causal model beside the weights" in output
    assert "do not cover them: age=0-17, age=80-120" in output
    assert [row["sex"] for row in rows] == ["female"] * 3 + ["male"] * 3 + ["female"] * 3 + ["male"] * 2
    assert {row["view"] for row in rows} == {"PA"} and [row["seed"] for row in rows] == [str(4 + i) for i in range(11)]
    records, seeds = read_rows(tmp_path / "t.csv", [*fields.DATASETS, "own"], COVERED)   # as sample.py --metadata does
    assert len(records) == 11 and seeds == list(range(4, 15)) and records[0]["view"] == "PA"


def test_like_takes_the_rows_of_an_index(tmp_path, monkeypatch, command):
    records = [{"path": f"{i}.png", "patient": str(i), "split": "test" if i else "train", "age": 30.0 + i,
                "sex": "male", "race": "black"} for i in range(4)]   # the weights were never taught that race
    write_csv(tmp_path / "index.csv", COLUMNS, map(index_row, records))
    rows, output = run(monkeypatch, command, tmp_path, "--like", tmp_path, "--split", "test", "--n", 6,
                       "--set", "view=PA")
    assert "left unknown, because these weights were not trained on it: race=black in 6 rows\n" in output
    ages = [float(row["age"]) for row in rows]
    assert sorted(ages[:3]) == sorted(ages[3:]) == [31, 32, 33]
    assert all(row["view"] == "PA" and row["sex"] == "male" and not row["race"] for row in rows)


def test_a_contradictory_table_goes_through_the_label_policy(tmp_path, monkeypatch, command):
    covered = COVERED | {"no_finding": {"positive": 1, "negative": 1}}
    rows, output = run(monkeypatch, command, tmp_path, "--balance", "sex", "--set", "pneumonia=positive", "--set",
                       "no_finding=positive", covered=covered)
    assert {row["no_finding"] for row in rows} == {"negative"} and {row["pneumonia"] for row in rows} == {"positive"}
    assert output.count("no_finding=positive contradicts pneumonia=positive, so no_finding becomes negative") == 1


# --- tables ---------------------------------------------------------------------------------------------

def table(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    return read_rows(tmp_path / "t.csv", [*fields.DATASETS, "own"], COVERED)


def test_rows_by_the_names_of_fields(tmp_path):
    records, seeds = table(tmp_path, "seed,view,age,pneumonia,file\n7,pa,30.5,positive,x\n,unknown,,,\n")
    assert records == [{"age": 30.5, "view": "PA", "pneumonia": "positive"}, {}] and seeds == [7, None]


def test_rows_in_the_columns_of_an_index(tmp_path):
    row = {"path": "images/a.png", "patient": "p", "split": "test", "age": 30.0, "sex": "female",
           "pneumonia": "positive"}
    write_csv(tmp_path / "index.csv", COLUMNS, [index_row(row)])
    records, seeds = read_rows(tmp_path / "index.csv", fields.DATASETS, COVERED)
    assert records == [{"age": 30.0, "sex": "female", "pneumonia": "positive"}] and seeds == [None]


@pytest.mark.parametrize("text, message", [
    ("", "empty, where a first line"), ("age\n", "no rows"),
    ("age,colour\n3,red\n", "unknown column colour; accepted: seed, dataset"),
    ("age,sex\n30,F\n30,q\n", "line 3, column sex: unknown value 'q' for sex; accepted: female, male"),
    ("age\n30\n400\n", "line 3, column age: age '400' is not a number of years"),
    ("age,sex\n30\n", "line 2: 1 cell, where the first line names 2"),
    ("age\n30,40\n", "line 2: 2 cells, where the first line names 1"),
    ("seed\n-1\n", "line 2, column seed: '-1'"), ("seed\n" + "9" * 30, "line 2, column seed"),
    ("age\n30\n90\n", "line 3: age 90 was not covered"),
    ("edema\npositive\n", "line 2: the training data of these weights says nothing"),
    ("ImagePath,Age\na.png,3\n", "line 2: no column 'Dataset_name'")])
def test_a_bad_table_is_one_line_that_names_row_and_column(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        table(tmp_path, text)


def test_a_missing_table_and_one_that_is_no_text(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "none.csv", fields.DATASETS, COVERED)
    (tmp_path / "t.csv").write_bytes(b"age\n\x00\x01\n")
    with pytest.raises(InputError, match="line 2: no text"):
        read_rows(tmp_path / "t.csv", fields.DATASETS, COVERED)


# --- requests that contradict themselves -----------------------------------------------------------------

@pytest.mark.parametrize("request_, resolved, notes", [
    ({"no_finding": "positive", "pneumonia": "positive"}, {"no_finding": "negative", "pneumonia": "positive"},
     ["no_finding=positive contradicts pneumonia=positive, so no_finding becomes negative"]),
    ({"edema": "positive", "lung_opacity": "negative"}, {"edema": "positive"},
     ["lung_opacity=negative contradicts edema=positive, so lung_opacity becomes unknown"]),
    ({"no_finding": "positive", "age": 3.0}, {"no_finding": "positive", "age": 3.0}, []),
    ({"no_finding": "positive", "support_devices": "positive"},
     {"no_finding": "positive", "support_devices": "positive"}, [])])
def test_a_request_that_contradicts_itself_is_read_by_the_label_policy(request_, resolved, notes):
    assert fields.resolve_request(request_) == (resolved, notes)


# --- pairs of values that the training data holds --------------------------------------------------------

def test_pairs_are_counted_and_what_was_never_together_is_named():
    records = [{"dataset": "own", "age": 3.0, "sex": "male"}, {"dataset": "own", "age": 5.5},
               {"age": 80.0, "sex": "male"}]
    pairs = fields.count_pairs(records)
    assert pairs == {"dataset=own": {"age=0-17": 2, "sex=male": 1}, "age=0-17": {"sex=male": 1},
                     "age=80-120": {"sex=male": 1}}
    assert fields.never_together({"dataset": "own", "age": 81.0}, pairs) == ("dataset=own", "age=80-120")
    assert fields.never_together({"age": 90.0, "sex": "male"}, pairs) is None
    assert fields.never_together({"dataset": "own", "age": 81.0}, {}) is None
    assert fields.add_pairs(fields.count_pairs(records[:1]), fields.count_pairs(records[1:])) == pairs


def test_pairs_come_with_fine_tuned_weights_if_the_base_has_them():
    new = fields.count_pairs([{"sex": "male", "view": "PA"}])
    for old, expected in (({}, {}), (new, {"sex=male": {"view=PA": 2}})):
        base = radit.RadiTConfig(width=64, heads=1, covered={"sex": {"male": 1}, "view": {"PA": 1}}, pairs=old)
        config = finetune.extend_config(base, (128, 32, 32), "", datasets=[], covered={}, pairs=new)
        assert config.pairs == expected
