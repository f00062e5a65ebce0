import collections

import pytest

import sample
from causal import cohort, patients
from common.cli import InputError, write_csv
from radiographs import fields
from radiographs.index import COLUMNS, index_row, read_rows

COVERED = {"sex": {"female": 5, "male": 4}, "view": {"PA": 9, "AP": 3}, "race": {"white": 3, "asian": 1}, "age": [20.5, 70],
           "pneumonia": {"positive": 2}, "dataset": {"own": 9}}


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
    """Against plain draws under one intervention; the set values come through, and No Finding agrees with the findings."""
    records, _, _ = cohort.balanced(["sex", "view"], 8, 3, COVERED, model)
    assert records[0] == patients.sample(model, 1, {"sex": "female", "view": "AP"}, 3)[0]
    assert records[3] == patients.sample(model, 4, {"sex": "male", "view": "PA"}, 3)[3]
    many, _, left_out = cohort.balanced(["cardiomegaly", "sex"], 80, 0, COVERED | {"cardiomegaly": {"positive": 1, "negative": 1}}, model)
    assert not left_out and collections.Counter(r["cardiomegaly"] for r in many) == {"positive": 40, "negative": 40}
    assert all(r["no_finding"] == "negative" for r in many if r["cardiomegaly"] == "positive")
    effusions = {value: sum(r["pleural_effusion"] == "positive" for r in many if r["cardiomegaly"] == value) for value in ("positive", "negative")}
    assert effusions["positive"] > effusions["negative"]             # its cause in the graph


def test_what_the_causal_model_does_not_cover_is_left_out_by_name(model):
    covered = COVERED | {"dataset": {"ChestX-ray14": 5, "kermany": 5}}
    records, cells, left_out = cohort.balanced(["dataset", "race"], 4, 0, covered, model)  # the model has no race
    assert cells == [("ChestX-ray14", "asian"), ("ChestX-ray14", "white")] and left_out == ["dataset=kermany", "race=black"]
    assert [r["race"] for r in records] == ["asian", "white"] * 2


@pytest.mark.parametrize("names, message", [
    (["colour"], "unknown field 'colour'"), (["edema"], "says nothing of it; covered: sex"),
    (["dataset"], "no combination is covered by both"), (["no_finding"], "it follows from the findings")])
def test_what_cannot_be_balanced_is_refused(model, names, message):
    with pytest.raises(InputError, match=message):
        cohort.balanced(names, 4, 0, COVERED | {"no_finding": {"positive": 1}}, model)


# --- tables ---------------------------------------------------------------------------------------------

def table(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    return read_rows(tmp_path / "t.csv", [*fields.DATASETS, "own"], COVERED)


def test_rows_by_the_names_of_fields(tmp_path):
    records, seeds = table(tmp_path, "seed,view,age,pneumonia,file\n7,pa,30.5,positive,x\n,unknown,,,\n")
    assert records == [{"age": 30.5, "view": "PA", "pneumonia": "positive"}, {}] and seeds == [7, None]


def test_rows_in_the_columns_of_an_index(tmp_path):
    row = {"path": "images/a.png", "patient": "p", "split": "test", "age": 30.0, "sex": "female", "pneumonia": "positive"}
    write_csv(tmp_path / "index.csv", COLUMNS, [index_row(row)])
    records, seeds = read_rows(tmp_path / "index.csv", fields.DATASETS, COVERED)
    assert records == [{"age": 30.0, "sex": "female", "pneumonia": "positive"}] and seeds == [None]


@pytest.mark.parametrize("text, message", [
    ("", "empty, where a first line"), ("age\n", "no rows"), ("age,colour\n3,red\n", "unknown column colour; accepted: seed, dataset"),
    ("age,sex\n30,F\n30,q\n", "line 3, column sex: unknown value 'q' for sex; accepted: female, male"),
    ("age\n30\n400\n", "line 3, column age: age '400' is not a number of years"),
    ("age,sex\n30\n", "line 2: 1 cells, where the first line names 2"), ("age\n30,40\n", "line 2: 2 cells, where the first line names 1"),
    ("seed\n-1\n", "line 2, column seed: '-1'"), ("seed\n" + "9" * 30, "line 2, column seed"),
    ("age\n30\n90\n", "line 3: age 90 was not covered"), ("edema\npositive\n", "line 2: the training data of these weights says nothing"),
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
     ["no_finding=positive contradicts pneumonia=positive and is taken as negative"]),
    ({"edema": "positive", "lung_opacity": "negative"}, {"edema": "positive"},
     ["lung_opacity=negative contradicts edema=positive and is taken as unknown"]),
    ({"no_finding": "positive", "age": 3.0}, {"no_finding": "positive", "age": 3.0}, []),
    ({"no_finding": "positive", "support_devices": "positive"}, {"no_finding": "positive", "support_devices": "positive"}, [])])
def test_a_request_that_contradicts_itself_is_read_by_the_label_policy(request_, resolved, notes):
    assert fields.resolve_request(request_) == (resolved, notes)


# --- pairs of values that the training data holds --------------------------------------------------------

def test_pairs_are_counted_and_what_was_never_together_is_named():
    records = [{"dataset": "own", "age": 3.0, "sex": "male"}, {"dataset": "own", "age": 5.5}, {"age": 80.0, "sex": "male"}]
    pairs = fields.count_pairs(records)
    assert pairs == {"dataset=own": {"age=0-17": 2, "sex=male": 1}, "age=0-17": {"sex=male": 1}, "age=80-120": {"sex=male": 1}}
    assert fields.never_together({"dataset": "own", "age": 81.0}, pairs) == ("dataset=own", "age=80-120")
    assert fields.never_together({"age": 90.0, "sex": "male"}, pairs) is None
    assert fields.never_together({"dataset": "own", "age": 81.0}, {}) is None
