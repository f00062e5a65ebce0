"""The page of the reader study: what it gives away, what cannot be built, and the whole study in a browser."""
import base64
import csv
import json
import math
import os
import re
import shutil
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from common import cli
from common.cli import InputError
from radiographs import dicom
from radiographs.index import COLUMNS, index_row
from study import __main__ as program
from study import build, score

SIZE = 64


def picture(rng):
    """A smooth grey picture (SIZE, SIZE) in [0, 1] between black bars, always of the same distribution."""
    coarse = Image.fromarray(rng.uniform(0.1, 0.9, (6, 6)).astype(np.float32))
    image = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(0, 1).copy()
    image[:, :6] = image[:, -6:] = 0
    return image


def write_folder(root, pictures, views, bits=8, noise=0, **text):
    """A folder that is both a prepared source, all held out, and what sample.py writes."""
    (root / "images").mkdir(parents=True)
    rng, info = np.random.default_rng(1), PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    rows = []
    for i, (image, view) in enumerate(zip(pictures, views)):
        white = 2 ** bits - 1
        grey = (image * white).round() + rng.integers(0, noise + 1, image.shape)  # a decoder's black is not quite 0
        grey = grey.clip(0, white).astype(np.uint8 if bits == 8 else np.uint16)
        Image.fromarray(grey).save(root / f"images/{i:03}.png", pnginfo=info)
        rows.append({"path": f"images/{i:03}.png", "patient": f"p{i}", "view": view, "split": "test"})
    with open(root / "index.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *map(index_row, rows)])
    with open(root / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "view"], *[[row["path"], row["view"]] for row in rows]])
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    views = ["PA"] * 6 + ["AP"] * 4
    return [write_folder(root / name, [picture(rng) for _ in views], views) for name in ("a", "b")]


def make(real, synthetic, out, *arguments):
    """Builds in this process; returns the page's text, what it holds, and the key."""
    arguments = ["study", "build", "--real", real, "--synthetic", synthetic, "--out", out, *arguments]
    with mock.patch.object(sys, "argv", list(map(str, arguments))):
        program.main()
    page = out.read_text()
    content = re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.S).group(1)
    return page, json.loads(content), score.read_key(out.with_suffix(".key.json"))


# --- the page gives nothing away ------------------------------------------------------------------------

@pytest.mark.parametrize("design", ["pairs", "single"])
def test_the_page_is_the_same_whichever_folder_is_synthetic(folders, tmp_path, design):
    """So nothing in it, names, order, sides or bytes, can depend on the answer; the keys are opposite."""
    a, b = folders
    page, content, key = make(a, b, tmp_path / "one.html", "--pairs", 7, "--seed", 3, "--design", design)
    swapped, _, other = make(b, a, tmp_path / "two.html", "--pairs", 7, "--seed", 3, "--design", design)
    assert page == swapped
    assert [pair[::-1] for pair in key["pairs"]] == other["pairs"] and key["pairs"] != other["pairs"]
    assert content["answers"] is None and len(content["images"]) == 2 * (7 + build.PRACTICE)
    assert len(content["study"]["questions"]) == (7 if design == "pairs" else 14)


@pytest.mark.slow
def test_a_classifier_of_bytes_and_headers_is_at_chance(tmp_path):
    """The same kind of picture, stored in two ways: the files are told apart, what the page holds is not."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score
    rng, n = np.random.default_rng(0), 120
    real = write_folder(tmp_path / "real", [picture(rng) for _ in range(n)], ["PA"] * n, bits=16, Software="scanner")
    synthetic = write_folder(tmp_path / "synthetic", [picture(rng) for _ in range(n)], ["PA"] * n, noise=5,
                             Synthetic="yes")
    page, content, key = make(real, synthetic, tmp_path / "page.html", "--pairs", n - build.PRACTICE)
    names = [name for pair in key["pairs"] for name in pair]
    truth = np.tile([0, 1], len(key["pairs"]))

    def features(blob, *more):
        """Length, the first bytes, how often each byte value occurs, how often it equals the one before."""
        values = np.frombuffer(blob, np.uint8)
        return [len(blob), *values[:64], *np.bincount(values, minlength=256), np.mean(values[1:] == values[:-1]), *more]

    def accuracy(rows):
        forest = RandomForestClassifier(30, random_state=0)
        return cross_val_score(forest, np.array(rows), truth, cv=5).mean()

    place = {name: i for i, name in enumerate(content["images"])}
    embedded = [features(base64.b64decode(content["images"][name]), place[name], *bytes.fromhex(name))
                for name in names]
    files = [features(open(key["files"][name], "rb").read(), os.path.getmtime(key["files"][name])) for name in names]
    assert accuracy(files) > 0.99
    assert abs(accuracy(embedded) - 0.5) < 3.3 * 0.5 / math.sqrt(len(names))
    assert {len(image) for image in content["images"].values()} == {4 * math.ceil(SIZE ** 2 / 3)}
    for word in ("scanner", "images/", ".png", str(tmp_path)):
        assert word not in page


def test_pairs_are_matched_held_out_and_one_a_patient(folders, tmp_path):
    real = shutil.copytree(folders[0], tmp_path / "real")
    text = (real / "index.csv").read_text().replace("p1,", "p0,")    # images 0 and 1 are now of one patient
    (real / "index.csv").write_text(text.replace("p2,,Unknown,Unknown,PA,test", "p2,,Unknown,Unknown,PA,train"))
    assert sorted(r["patient"] for r in build.read_real([real])) == ["p0", "p3", "p4", "p5", "p6", "p7", "p8", "p9"]
    _, content, key = make(folders[0], folders[1], tmp_path / "page.html", "--pairs", 8, "--seed", 1)
    views = {str(r["path"]): r["view"] for folder in folders for r in build.read_synthetic([folder])}
    seen = [[views[key["files"][name]] for name in pair] for pair in key["pairs"]]
    assert all(a == b for a, b in seen) and {a for a, _ in seen} == {"PA", "AP"}
    for real_name, synthetic_name in key["pairs"]:
        assert str(folders[0]) in key["files"][real_name] and str(folders[1]) in key["files"][synthetic_name]
    shown = base64.b64decode(content["images"][key["pairs"][0][0]])
    original = np.asarray(Image.open(key["files"][key["pairs"][0][0]]))
    assert np.array_equal(np.frombuffer(shown, np.uint8).reshape(SIZE, SIZE),
                          np.where(original < build.BLACK, 0, original))


def test_the_seed_chooses_the_images_and_the_same_command_makes_the_same_files(folders, tmp_path):
    def one(name, seed):
        return make(*folders, tmp_path / name, "--pairs", 4, "--seed", seed)
    (first, _, key), (again, _, same), (_, _, different) = one("a.html", 1), one("b.html", 1), one("c.html", 2)
    assert first == again and key == same
    assert key["id"] != different["id"] and key["pairs"] != different["pairs"]


def test_images_of_two_sizes_are_brought_to_the_smaller(folders, tmp_path, capsys):
    large = shutil.copytree(folders[0], tmp_path / "large")
    for path in large.glob("images/*.png"):
        Image.open(path).resize((100, 100)).save(path)
    _, content, _ = make(large, folders[1], tmp_path / "page.html", "--pairs", 4)
    assert content["study"]["size"] == SIZE and "sides of 64 to 100 pixels" in capsys.readouterr().out
    assert {len(base64.b64decode(image)) for image in content["images"].values()} == {SIZE ** 2}


def test_a_quiz_holds_its_answers_and_is_not_scored(folders, tmp_path):
    _, content, key = make(*folders, tmp_path / "quiz.html", "--pairs", 4, "--quiz")
    assert json.loads(base64.b64decode(content["answers"])) == [name for _, name in key["pairs"]]
    with pytest.raises(InputError, match="not a blind reading"):
        score.read_results([], key)


def break_metadata(text):
    return lambda root: (root / "metadata.csv").write_text(text)


@pytest.mark.parametrize("damage, arguments, message", [
    (None, ["--pairs", 50], "52 pairs are needed, 2 of them for practice, and only 10 can be matched by view: "
                            "AP 4 real and 4 synthetic, PA 6 real and 6 synthetic, LATERAL 0 real and 0 synthetic"),
    (None, ["--margin", "0.5"], "0.5 is not between 0 and 0.5"), (None, ["--design", "triples"], "'pairs', 'single'"),
    (None, ["--out", "page"], "page is a file that ends in .html"),
    (None, ["--quiz", "--presentations", 2], "a quiz tells the answers"),
    (lambda root: [path.unlink() for path in root.rglob("*.*")], [],
     "neither an index.csv nor an image in it or below it"),
    (lambda root: shutil.rmtree(root), [], "synthetic: no such folder"),
    (None, ["--synthetic", ""], "an empty path"), (None, ["--pairs", "1e3"], "is not a whole number from 1 to 100,000"),
    (None, ["--pairs", 10 ** 20], "is not a whole number"),
    (None, ["--margin", "nan"], "is not a number from 0 to 0.5"),
    (None, ["--presentations", 10 ** 9], "is not a whole number from 1 to 20"),
    (break_metadata("file,view\n../secret.png,PA\n"), [], "line 2: '../secret.png' leaves"),
    (break_metadata("file,view\nimages/000.png,oblique\n"), [],
     "line 2: unknown value 'oblique' for view; accepted: AP, PA, LATERAL"),
    (break_metadata("file\nimages/000.png\n"), [], "line 2: no file or no view"),
    (break_metadata("file,view\n" + "images/000.png,PA\n" * 9), [], "the same picture as"),
    (break_metadata("file,view\n" + "images/none.png,PA\n" * 9), [], "none.png: No such file"),
    (lambda root: [path.write_bytes(path.read_bytes()[:300]) for path in root.glob("images/*.png")], [],
     ".png: unreadable"),
    (lambda root: [path.write_text("text") for path in root.glob("images/*.png")], [], ".png: not an image")])
def test_what_cannot_be_built_is_named_and_nothing_is_written(folders, tmp_path, monkeypatch, capsys,
                                                              damage, arguments, message):
    synthetic = shutil.copytree(folders[1], tmp_path / "synthetic")
    if damage:
        damage(synthetic)
    monkeypatch.chdir(tmp_path)
    usual = ["study", "build", "--real", folders[0], "--synthetic", "synthetic", "--pairs", 4, "--out", "page.html"]
    monkeypatch.setattr(sys, "argv", list(map(str, [*usual, *arguments])))
    with pytest.raises(SystemExit) as stop:
        cli.run(program.main)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and len(errors.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"synthetic"}


def scatter(root, real, kind):
    """Ten pictures below a folder without any table, in two subfolders; DICOM files have no suffix and say their
    view."""
    rng = np.random.default_rng(100 + real)
    for i in range(10):
        folder = root / f"ward {i % 2}" / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        image = picture(rng)
        if kind == "dicom":
            tensor = torch.from_numpy(image.astype(np.float32))[None] * 2 - 1
            dicom.write(folder / f"{i}", tensor, {"view": ["AP", "PA"][i % 2]}, "nobody", i, "")
        else:
            Image.fromarray((image * 255).astype(np.uint8)).save(folder / f"{i}.{kind}")
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.mark.parametrize("kind", ["dicom", "jpg"])
def test_any_folder_of_images_with_subfolders_and_dicom(folders, tmp_path, capsys, kind):
    synthetic = scatter(tmp_path / "synthetic", False, kind)
    _, _, key = make(folders[0], synthetic, tmp_path / "page.html", "--pairs", 6, "--seed", 1)
    views = {str(r["path"]): r["view"] for r in build.read_synthetic([folders[0]])}
    for real_name, name in key["pairs"]:
        path = key["files"][name]
        assert path.startswith(str(synthetic))
        if kind == "dicom":                                          # even numbers are AP
            assert views[key["files"][real_name]] == ["AP", "PA"][int(path[-1]) % 2]
    said = capsys.readouterr().out
    assert ("views of one side are not known" in said) == (kind == "jpg")
    assert ("without a mark in the header" in said) == (kind == "jpg")
    _, _, key = make(scatter(tmp_path / "real", True, "jpg"), synthetic, tmp_path / "other.html", "--pairs", 8)
    said = capsys.readouterr().out
    assert "real has no index.csv, so whether a model was trained on these images is not known" in said
    assert all(str(tmp_path / "real") in key["files"][name] for name, _ in key["pairs"])


def test_sides_given_the_wrong_way_round_are_noticed(folders, tmp_path):
    rng = np.random.default_rng(2)
    marked = write_folder(tmp_path / "marked", [picture(rng) for _ in range(6)], ["PA"] * 6, Synthetic="yes")
    scattered = scatter(tmp_path / "dicom", False, "dicom")
    for synthetic in (marked, scattered):
        make(folders[0], synthetic, tmp_path / f"{synthetic.name}.html", "--pairs", 3)       # the right way round
        with pytest.raises(InputError,
                           match="says in its header that it is synthetic; are --real and --synthetic the wrong"):
            make(synthetic, folders[0], tmp_path / "page.html", "--pairs", 3)
    with pytest.raises(InputError, match="says in its header that it is synthetic$"):  # not swapped: both synthetic
        make(marked, scattered, tmp_path / "page.html", "--pairs", 1)
    assert not (tmp_path / "page.html").exists()


def test_real_images_must_be_held_out(folders, tmp_path):
    real = shutil.copytree(folders[0], tmp_path / "real")
    (real / "index.csv").write_text((real / "index.csv").read_text().replace(",test,", ",train,"))
    with pytest.raises(InputError, match="no image of the split test"):
        make(real, folders[1], tmp_path / "page.html", "--pairs", 4)


def test_a_key_is_not_overwritten_by_another_study(folders, tmp_path):
    make(*folders, tmp_path / "page.html", "--pairs", 4, "--seed", 1)
    before = (tmp_path / "page.key.json").read_bytes()
    with cli.locked(tmp_path), pytest.raises(InputError, match="another command is filling this folder"):
        make(*folders, tmp_path / "page.html", "--pairs", 4, "--seed", 1)
    with pytest.raises(InputError, match="is the key of another study"):
        make(*folders, tmp_path / "page.html", "--pairs", 4, "--seed", 2)
    assert (tmp_path / "page.key.json").read_bytes() == before


# --- the page in a browser ------------------------------------------------------------------------------

class Page:
    """What a reader does, in words."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get_log("browser")                                   # what another test left there
        browser.get(path.as_uri())

    def __getitem__(self, name):
        return self.browser.find_element("id", name)

    def press(self, *keys):
        from selenium.webdriver import ActionChains, Keys
        for key in keys:
            ActionChains(self.browser).send_keys(getattr(Keys, key.upper(), key)).perform()

    def shown(self):
        """The names on the screen."""
        return self.browser.execute_script("return shown")

    def grey(self):
        """Everything the first canvas shows, as red values."""
        script = """const canvas = document.querySelector("canvas"), size = [canvas.width, canvas.height];
                    return [...canvas.getContext("2d").getImageData(0, 0, ...size).data]"""
        return np.array(self.browser.execute_script(script)).reshape(-1, 4)[:, 0]

    def title(self):
        """The heading that is on the screen, which also has the focus."""
        heading = self.browser.switch_to.active_element
        assert heading.tag_name == "h1"
        return heading.text

    def download(self):
        before = set(self.browser.downloads.glob("*.json"))
        self["download"].click()
        for _ in range(100):
            if new := set(self.browser.downloads.glob("*.json")) - before:
                return new.pop()
            time.sleep(0.05)
        raise AssertionError("nothing was downloaded")


@pytest.mark.slow
def test_pairs_by_keyboard_from_the_first_key_to_the_file(folders, tmp_path, browser):
    _, content, key = make(*folders, tmp_path / "page.html", "--pairs", 4, "--seed", 1)
    page = Page(browser, tmp_path / "page.html")
    assert page.title() == "Real or synthetic?"
    page.press("tab", "Dr. Ä <1>", "enter")
    assert page.title() == "Practice first"
    page.press("tab", "enter")
    for i in range(build.PRACTICE):
        assert page.title() == f"Practice, {build.PRACTICE - i} to go"
        assert page.shown() not in content["study"]["questions"]
        page.press("1", "enter")
    assert page.title() == "Practice is over"
    page.press("tab", "enter")
    assert page.title() == "Question 1 of 4, round 1 of 2"

    before = np.frombuffer(base64.b64decode(content["images"][page.shown()[0]]), np.uint8)
    assert np.array_equal(page.grey(), before)                       # as it is, until somebody windows
    page.press(*"[[[[,,")
    window, level = 256 - 4 * 16, 128 - 2 * 8
    assert np.array_equal(page.grey(), (((before - float(level)) / window + 0.5) * 256 + 0.5).clip(0, 255.5) // 1)
    page.press("+", "+")
    assert "scale(1.44)" in browser.find_element("tag name", "canvas").get_attribute("style")
    page.press("0")
    assert np.array_equal(page.grey(), before)

    page.press("enter")                                              # without an answer nothing goes on
    assert page["progress-text"].text == "Question 1 of 4, round 1 of 2"
    said = []
    for question in range(8):
        if question == 4:
            assert page.title() == "Round 1 is done"
            page.press("tab", "enter")
        if question == 2:                                            # pause, and no image is to be seen
            shown = page.shown()
            page.press("p")
            assert page.title() == "Paused" and not page["images"].is_displayed()
            spent = browser.execute_script("return spent")
            time.sleep(0.5)
            page.press("tab", "enter")
            assert page.shown() == shown
            assert browser.execute_script("return spent + performance.now() - clock") < spent + 500  # it stood still
        if question == 6:                                            # the tab is closed, and the reader comes back
            shown = page.shown()
            page = Page(browser, tmp_path / "page.html")
            page.press("tab", "Dr. Ä <1>", "enter")
            assert page.title() == "Welcome back" and "6 of 8" in page["between-text"].text
            page.press("tab", "enter")
            assert page.shown() == shown
        side = question % 3 % 2
        said.append((page.shown(), page.shown()[side]))
        page.press("12"[side], "enter")
        assert page["said"].text == ""                               # no feedback
    assert page.title() == "Thank you, that was the last question"

    result = score.read_result(page.download(), key)
    assert result["reader"] == "Dr. Ä <1>" and [(a["shown"], a["answer"]) for a in result["answers"]] == said
    assert [a["presentation"] for a in result["answers"]] == [1] * 4 + [2] * 4
    assert all(a["ms"] > 0 for a in result["answers"])
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.slow
def test_single_images_by_mouse_from_the_first_click_to_the_score(folders, tmp_path, browser, command):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    _, content, key = make(*folders, tmp_path / "page.html", "--pairs", 2, "--design", "single", "--presentations", 1)
    page = Page(browser, tmp_path / "page.html")
    page["reader"].send_keys("second")
    page["enter"].find_element("tag name", "button").click()
    page["continue"].click()
    for _ in range(2 * build.PRACTICE):
        page["choices"].find_elements("tag name", "label")[0].click()
        page["next"].click()
    page["continue"].click()
    before = page.grey()
    frame = browser.find_element("class name", "frame")
    ActionChains(browser).move_to_element(frame).click_and_hold().move_by_offset(-100, 20).release().perform()
    assert float(page["window"].get_property("value")) == 156 and float(page["level"].get_property("value")) == 148
    assert not np.array_equal(page.grey(), before)
    page["reset"].click()
    assert np.array_equal(page.grey(), before)
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(frame), 0, -400).perform()
    assert float(page["zoom"].get_property("value")) == pytest.approx(1.0015 ** 400)
    ActionChains(browser).key_down(Keys.SHIFT).drag_and_drop_by_offset(frame, 30, 0).key_up(Keys.SHIFT).perform()
    assert browser.execute_script("return view.x") == pytest.approx(30 / frame.size["width"] / 1.0015 ** 400, rel=0.1)
    synthetic = {name for _, name in key["pairs"]}
    for rating in (1, 2, 3, 4):
        choice = 7 - rating if page.shown()[0] in synthetic else rating   # knows every image, surer of some
        page["choices"].find_elements("tag name", "label")[choice - 1].click()
        page["next"].click()
    file = page.download()
    status, output, errors = command("study", "score", file, "--key", tmp_path / "page.key.json",
                                     "--out", tmp_path / "score")
    assert status == 0, errors
    row = json.loads((tmp_path / "score.json").read_text())["readers"][0]
    assert row["right"] == 3 and row["accuracy"] == 0.75  # the rating 4 of a real image, or 3 of a synthetic one
    assert "second" in output and "3/4" in output and output == (tmp_path / "score.txt").read_text()


def test_every_reader_and_presentation_has_its_own_order_and_sides(folders, tmp_path, browser):
    make(*folders, tmp_path / "page.html", "--pairs", 8, "--seed", 1)
    page = Page(browser, tmp_path / "page.html")
    plans = browser.execute_script("return [...'abcdefghij'].flatMap(name => { enter(name); return state.plan; })")
    assert len({json.dumps([sorted(q) for q in plan]) for plan in plans}) == len(plans) == 20
    orders = [{tuple(sorted(q)): q == sorted(q) for q in plan} for plan in plans]
    sides = np.array([[order[q] for q in sorted(orders[0])] for order in orders])
    assert len({tuple(row) for row in sides}) > 15  # 20 choices among 256; 19.3 of them differ on average
    assert 50 < sides.sum() < 110                                    # of 160; 80 with a deviation of 6.3
    assert page["reader"].get_attribute("required")


def test_the_page_takes_only_names_that_can_be_scored(folders, tmp_path, browser):
    make(*folders, tmp_path / "page.html", "--pairs", 4)
    page = Page(browser, tmp_path / "page.html")
    start = page["enter"].find_element("tag name", "button")
    assert start.text == "Start" and page["reset"].get_attribute("textContent") == "Reset"
    for name, reader in (("", None), ("  ", None), ("A\u202eB", None), ("A\x07", None), (" Dr.\u00a0 Ä ", "Dr. Ä")):
        browser.execute_script("""const input = document.getElementById("reader");
            input.value = arguments[0]; input.dispatchEvent(new Event("input"))""", name)
        start.click()
        assert browser.execute_script("return state?.reader ?? null") == reader


def test_the_quiz_says_what_was_right_shows_what_was_missed_and_can_be_played_again(folders, tmp_path, browser):
    _, content, key = make(*folders, tmp_path / "quiz.html", "--pairs", 3, "--quiz")
    page, synthetic = Page(browser, tmp_path / "quiz.html"), {name for _, name in key["pairs"]}
    assert "its source holds the answers" in page["privacy"].text
    page.press("tab", "player", "enter")
    for i, right in enumerate([True, False, True]):
        assert page.title() == f"Question {i + 1} of 3"
        side = [name in synthetic for name in page.shown()].index(right)
        if i == 1:
            second, side_of_second = page.shown(), side
        page.press("12"[side], "enter")
        assert page["said"].text.startswith("Right" if right else "Wrong")
        page.press("enter")
    assert page.title() == "2 of 3 right" and not page["download"].is_displayed()
    assert page["end-text"].text == "You missed 1; the synthetic image of each pair has a yellow frame."
    missed, = page["misses"].find_elements("tag name",
                                           "figure")     # the second question, on which the real one was chosen
    canvases = missed.find_elements("tag name", "canvas")
    assert [canvas.accessible_name for canvas in canvases] == [["real", "synthetic"][name in synthetic]
                                                               for name in second]
    assert missed.text == f"You chose the {['left', 'right'][side_of_second]} one."
    script = """return arguments[0].map(canvas => {
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [...data].filter((_, i) => i % 4 === 0) })"""
    shown = browser.execute_script(script, canvases)
    for pixels, name in zip(shown, second):
        assert bytes(pixels) == base64.b64decode(content["images"][name])
    page.press("tab", "enter")                                       # play again, and miss nothing
    for i in range(3):
        assert page.title() == f"Question {i + 1} of 3"
        page.press("12"[[name in synthetic for name in page.shown()].index(True)], "enter", "enter")
    assert page.title() == "3 of 3 right" and page["end-text"].text == "You missed none."
    assert not page["misses"].find_elements("tag name", "figure")


@pytest.mark.slow
def test_everything_has_a_name_and_fits_a_tablet(folders, tmp_path, browser):
    """Every control has a label for a screen reader, is big enough to touch, and nothing is wider than the screen."""
    for design in ("pairs", "single"):
        make(*folders, tmp_path / f"{design}.html", "--pairs", 4, "--design", design)
        page = Page(browser, tmp_path / f"{design}.html")
        page.press("tab", "x", "enter", "tab", "enter")
        for width, height in ((768, 1024), (1024, 768)):
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True})
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script("return document.documentElement.scrollHeight") <= height
            for element in browser.find_elements("css selector", "section:not([hidden]) :is(input, button, canvas)"):
                assert element.accessible_name, element.get_attribute("outerHTML")
                if element.tag_name == "input":
                    element = element.find_element("xpath", "..")    # its label, which takes the touch
                assert element.size["height"] >= 44
        touches = [[{"x": 300 + i * way, "y": 300, "id": i} for i in (0, 1)] for way in (50, 75, 100)]
        for kind, points in zip(("touchStart", "touchMove", "touchMove", "touchEnd"), [*touches, []]):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert browser.execute_script("return view.zoom") == pytest.approx(2, rel=0.01)   # twice as far apart
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_power_of_a_plan(command, capsys):
    status, output, errors = command("study", "power", "--readers", 3, "--pairs", 50, "--margin", 0.1)
    assert status == 0, errors
    numbers = [line.split() for line in output.splitlines() if re.match(r" +0\.\d", line)]
    rows = {accuracy: list(map(float, chances)) for accuracy, *chances in numbers}
    assert list(rows) == ["0.50", "0.52", "0.55", "0.60", "0.70"]
    assert rows["0.50"][0] == 0                                      # 50 answers of one reader can never show it
    assert rows["0.50"][1] <= 0.05 < 0.7 < rows["0.70"][1]
    together = np.array([rows[accuracy][2:] for accuracy in rows])
    assert (np.diff(together[:2], axis=1) < 0).all()                 # readers who agree are worth fewer
    build.print_power(3, 50, 0.1, "single")
    double = capsys.readouterr().out
    build.print_power(3, 100, 0.1, "pairs")
    assert double.splitlines()[2:] == capsys.readouterr().out.splitlines()[2:]
