"""The page to sample on: what it refuses, several requests at once, and the page in a browser, by keyboard."""
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from conftest import DEMO_SIDE, ROOT
from PIL import Image

import sample
from share import serve

FORM = {"n": 2, "steps": 2, "guidance": 2, "seed": 5, "metadata": {"sex": "female", "age": "60"}}


@pytest.fixture(scope="module")
def models():
    return sample.load_weights(sample.DEMO)


@pytest.fixture
def server(models, monkeypatch):
    monkeypatch.setattr(sample, "load_weights", lambda folder: models)  # once for all tests
    with serve.Server(0, sample.DEMO) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def request(server, method="POST", path="/sample", body=None, headers=(), form=FORM):
    """Status, headers and body of one answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    body = json.dumps(form).encode() if body is None and method == "POST" else body
    connection.request(method, path, body, {"Content-Type": "application/json"} | dict(headers))
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def events(body):
    return [json.loads(line) for line in body.splitlines()]


def test_an_image_of_the_page_is_that_of_the_command(server):
    status, headers, body = request(server)
    assert status == 200
    told = events(body)
    # Heun's steps take two evaluations each.
    assert [event["done"] for event in told if "done" in event] == [1, 2, 3, 4] and told[0]["of"] == 4
    made = [event for event in told if "image" in event]
    assert [event["seed"] for event in made] == [5, 6]
    assert [event["metadata"] for event in made] == [{"sex": "female", "age": 60.0}] * 2
    expected, _ = sample.generate(server.model, server.vae, [{"sex": "female", "age": 60.0}] * 2, [5, 6], steps=2,
                                  guidance=2)
    for event, image in zip(made, expected):
        status, headers, png = request(server, "GET", f"/images/{event['image']}.png")
        assert status == 200 and headers["Content-Type"] == "image/png"
        picture = Image.open(io.BytesIO(png))
        shown = (image[0] + 1) * 127.5
        assert np.abs(np.asarray(picture) - shown.numpy()).max() <= 0.5 + 1e-3
        assert picture.text["Synthetic"] == "yes" and picture.text["Seed"] == str(event["seed"])
        assert json.loads(picture.text["Metadata"]) == event["metadata"]
        status, headers, dicom = request(server, "GET", f"/images/{event['image']}.dcm")
        assert status == 200 and headers["Content-Type"] == "application/dicom"
        ds = pydicom.dcmread(io.BytesIO(dicom))
        assert ds.SyntheticData == "YES" and ds.PatientSex == "F"
        assert np.array_equal(ds.pixel_array, np.asarray(picture))


def test_nothing_asked_takes_examples_as_the_command_does(server):
    examples = server.model.config.examples
    told = events(request(server, form=FORM | {"metadata": {}, "seed": 63})[2])
    assert [event["metadata"] for event in told if "image" in event] == [examples[63], examples[0]]


@pytest.mark.parametrize("change, message", [
    ({"steps": -1}, "steps -1 is not a whole number from 1 to 250"),
    ({"steps": 2.5}, "steps 2.5 is not a whole number"),
    ({"steps": True}, "steps True is not a whole number"),
    ({"guidance": float("nan")}, "guidance nan is not a number from 0 to 20"),
    ({"guidance": float("inf")}, "guidance inf"), ({"guidance": "2"}, None), ({"guidance": [2]}, "guidance [2]"),
    ({"n": 10 ** 9}, "n 1000000000 is not a whole number from 1 to 64"), ({"n": 0}, "n 0"), ({"n": None}, "n None"),
    ({"n": "<script>alert(1)</script>" * 9}, "n <script>"), ({"seed": -1}, "seed -1"),
    ({"seed": 2 ** 63}, "seed 9223372036854775808"),
    ({"metadata": {"sex": "<img src=x onerror=alert(1)>"}},
     "unknown value '<img src=x onerror=alert(1)>' for sex; accepted: female, male"),
    ({"metadata": {"<b>": "x"}}, "unknown field '<b>'"),
    ({"metadata": {"view": "LATERAL"}}, "view=LATERAL was not covered"),
    ({"metadata": {"race": "white"}}, "says nothing of race"), ({"metadata": {"age": 1e999}}, "age 'inf'"),
    ({"metadata": {"age": "old"}}, "age 'old' is not a number"),
    ({"metadata": {"age": "100"}}, "age 100 was not covered"),
    ({"metadata": {"sex": ["male"]}}, "field to value"), ({"metadata": ["male"]}, "a form has n, steps"),
    ({"more": 1}, "a form has n, steps")])
def test_hostile_forms_are_one_line_and_400(server, change, message):
    status, headers, body = request(server, form=FORM | change)
    assert status == 400 and len(body.splitlines()) == 1 and len(body) < 350
    assert (message or "").encode() in body
    assert headers["Content-Type"] == "text/plain; charset=utf-8" and headers["X-Content-Type-Options"] == "nosniff"
    assert not server.queue.tickets and not server.kept


@pytest.mark.parametrize("method, path, body, headers, status, message", [
    ("POST", "/sample", b"{", {}, 400, "not JSON"), ("POST", "/sample", b"[" * 9999, {}, 400, "not JSON"),
    ("POST", "/sample", b"\xff\xfe", {}, 400, "not JSON"),
    ("POST", "/sample", b'{"n": ' + b"9" * 5000 + b"}", {}, 400, "not JSON"),
    ("POST", "/sample", b" " * 20_000, {}, 400, "20000 bytes are too many"),
    ("POST", "/sample", None, {"Content-Type": "text/plain"}, 400, "application/json"),
    ("POST", "/sample", b"", {"Content-Length": "-5"}, 400, "length"),
    ("POST", "/sample", b"0\r\n\r\n", {"Transfer-Encoding": "chunked"}, 400, "length"),
    ("POST", "/sample", None, {"Host": "evil.example"}, 400, "another host"),
    ("GET", "/", None, {"Host": "evil.example:80"}, 400, "another host"),
    ("POST", "/sample", None, {"Origin": "http://evil.example"}, 400, "another page"),
    ("POST", "/sample", None, {"Origin": "null"}, 400, "another page"),
    ("POST", "/", None, {}, 404, "nothing here"), ("GET", "/sample", None, {}, 404, "nothing here"),
    ("GET", "/../sample.py", None, {}, 404, "nothing here"),
    ("GET", "/images/../../x.png", None, {}, 404, "nothing here"),
    ("GET", "/images/0123456789abcdef.png", None, {}, 404, "no such image"),
    ("GET", "http://evil.example/", None, {}, 400, "another host"), ("PUT", "/sample", b"", {}, 405, ""),
    ("DELETE", "/", None, {}, 405, ""),
    ("OPTIONS", "/sample", None, {}, 405, ""), ("TRACE", "/", None, {}, 405, ""), ("FETCH", "/", None, {}, 405, "")])
def test_requests_that_are_not_the_page_s_are_refused(server, method, path, body, headers, status, message):
    answer = request(server, method, path, body, headers)
    assert answer[0] == status and len(answer[2].splitlines()) == 1 and message.encode() in answer[2]
    assert "Access-Control-Allow-Origin" not in answer[1]
    assert request(server, "GET", "/")[0] == 200                     # and the page is as it was


def test_the_page_and_its_policy(server, monkeypatch):
    hostile = ("</script><script>alert(1)</script>",)                # of somebody else's weights
    monkeypatch.setattr(server.model.config, "datasets", hostile)
    status, headers, body = request(server, "GET", "/", headers={"Host": f"localhost:{server.server_address[1]}"})
    policy, page = headers["Content-Security-Policy"], body.decode()
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 3 and "{{" not in page
    assert request(server, "GET", "/")[1]["Content-Security-Policy"] != policy   # a nonce of its own each time
    assert "alert(1)" in page and "</script><script>alert" not in page
    assert "http" not in page and "not for clinical use" in page


class Slow:
    """Stands in for sample.generate: goes on when it is told to, and counts how many run at once."""

    def __init__(self, monkeypatch):
        self.go, self.now, self.most, self.ended = threading.Semaphore(0), 0, 0, 0
        monkeypatch.setattr(sample, "generate", self.generate)

    def generate(self, model, vae, records, seeds, *, steps, guidance, report):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            report()
            while not self.go.acquire(timeout=0.02):
                report()
        finally:
            self.now -= 1
            self.ended += 1
        return torch.zeros(len(seeds), 1, 8, 8), steps


class Person:
    """Somebody who has sent a form and reads the answer line by line."""

    def __init__(self, server):
        self.connection = http.client.HTTPConnection(*server.server_address, timeout=30)
        self.connection.request("POST", "/sample", json.dumps(FORM | {"n": 1}), {"Content-Type": "application/json"})
        self.answer = self.connection.getresponse()

    def until(self, key):
        while line := self.answer.readline():
            if key in (event := json.loads(line)):
                return event
        raise AssertionError(f"the answer ended without {key}")

    def leave(self):
        self.answer.close()
        self.connection.close()


def test_people_queue_see_their_place_and_are_served_in_turn(server, monkeypatch):
    slow = Slow(monkeypatch)
    first = Person(server)
    first.until("done")
    second = Person(server)
    assert second.until("waiting") == {"waiting": 1}
    third = Person(server)
    assert third.until("waiting") == {"waiting": 2}
    slow.go.release()
    assert "image" in first.until("image") and first.answer.read() == b""
    assert second.until("done")["done"] == 1
    while third.until("waiting") != {"waiting": 1}:                  # one up
        pass
    slow.go.release(2)
    assert second.until("image")["image"] != third.until("image")["image"]
    assert third.answer.read() == b"" and slow.most == 1 and not server.queue.tickets


def test_who_goes_away_frees_the_place(server, monkeypatch, capfd):
    slow = Slow(monkeypatch)
    sampling, waiting, last = Person(server), None, None
    sampling.until("done")
    waiting = Person(server)
    waiting.until("waiting")
    last = Person(server)
    assert last.until("waiting") == {"waiting": 2}
    waiting.leave()                                                  # from the queue
    while last.until("waiting") != {"waiting": 1}:
        pass
    sampling.leave()                                                  # from the model, in the middle of its work
    last.until("done")
    assert slow.ended == 1
    slow.go.release()
    assert last.until("image") and capfd.readouterr().err == ""


def test_a_long_queue_sends_away_and_a_failure_is_told(server, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(serve, "LONGEST_QUEUE", 1)
    first = Person(server)
    first.until("done")
    status, _, body = request(server)
    assert status == 503 and b"1 requests are waiting already" in body
    slow.go.release()
    assert "image" in first.until("image") and first.answer.read() == b""    # read to the end: it has left the queue
    monkeypatch.setattr(sample, "generate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of\nmemory")))
    assert events(request(server)[2]) == [{"error": "RuntimeError: out of memory"}]
    monkeypatch.setattr(sample, "generate", slow.generate)
    slow.go.release()
    assert "image" in events(request(server)[2])[-1]


def test_old_pictures_are_forgotten(server, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(serve, "KEPT", 3)
    slow.go.release(2)
    names = [event["image"] for _ in range(2) for event in events(request(server)[2]) if "image" in event]
    assert len(set(names)) == 4
    found = [request(server, "GET", f"/images/{name}.{kind}")[0] for name in names for kind in ("png", "dcm")]
    assert found == [404] * 2 + [200] * 6
    assert len(list(server.folder.rglob("*.*"))) == 6


def test_half_a_request_or_none_harms_nobody(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    host = f"Host: {server.hosts[0]}\r\n"
    for text in ("", "GET", "GET /\r\n\r\n",
                 "POST /sample HTTP/1.1\r\n" + host + "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
                 "GET / HTTP/1.1\r\n" + host * 2 + "\r\n", "GET /" + "a" * 70_000 + " HTTP/1.1\r\n" + host + "\r\n"):
        with socket.create_connection(server.server_address, timeout=10) as raw:
            raw.sendall(text.encode())
            try:
                answer = raw.recv(1000)
            except ConnectionResetError:                             # it did not read all of the last one
                answer = b""
            assert answer == b"" or b"200" not in answer.splitlines()[0]
    assert request(server, "GET", "/")[0] == 200


def test_the_server_listens_at_home_only_and_says_which_port_is_taken(server, command):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_address[1]
    for arguments, message in ((["--port", port], f"--port {port}: Address already in use; give another"),
                               (["--port", 70_000], "'70000' is not a whole number from 0 to 65,535"),
                               (["--port", ""], "'' is not a whole number from 0 to 65,535"),
                               (["--weights", ""], "an empty path")):
        status, output, errors = command("share", "serve", *arguments)
        assert status == 2 and output == "" and message in errors and len(errors.splitlines()) == 1


def test_port_80_is_left_out_by_browsers(server):
    assert serve.hosts_of(8000) == ["127.0.0.1:8000", "localhost:8000"]
    assert serve.hosts_of(80) == ["127.0.0.1", "localhost"]
    server.hosts = serve.hosts_of(80)  # as on port 80, which needs rights that a test may lack
    page = {"Host": "127.0.0.1", "Origin": "http://127.0.0.1"}
    assert request(server, "GET", "/", headers={"Host": "localhost"})[0] == 200
    assert request(server, headers=page, form=FORM | {"n": 0})[2].startswith(b"n 0 is not")          # it was read
    for change in ({"Origin": "http://127.0.0.1:8000"}, {"Origin": "https://127.0.0.1"}, {"Host": "127.0.0.1:8000"},
                   {"Host": "127.0.0.1.evil.example"}, {"Origin": "http://localhost"}):
        assert b"another" in request(server, headers=page | change)[2]


def test_a_request_that_contradicts_itself_goes_through_the_label_policy(server, monkeypatch):
    Slow(monkeypatch).go.release()
    metadata = {"no_finding": "positive", "pneumonia": "positive", "sex": "male"}
    told = events(request(server, form=FORM | {"n": 1, "metadata": metadata})[2])
    note = "no_finding=positive contradicts pneumonia=positive, so no_finding becomes negative"
    assert told[0] == {"note": note}
    assert told[-1]["metadata"] == {"no_finding": "negative", "pneumonia": "positive", "sex": "male"}


def start_serving(tmp_path):
    """`python -m share serve` on a free port, with its temporary files in tmp_path: the process and its address."""
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen([sys.executable, "-m", "share", "serve", "--port", "0"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"TMPDIR": str(tmp_path / "temporary")})
    address = process.stdout.readline().split()[0]
    return process, address.removeprefix("http://").rstrip("/").split(":")


def test_temporary_files_go_when_a_signal_ends_the_program(models, monkeypatch):
    monkeypatch.setattr(sample, "load_weights", lambda folder: models)
    with pytest.raises(SystemExit) as stop, serve.Server(0, sample.DEMO) as server:
        server.keep(torch.zeros(1, 8, 8), {}, 1, server.settings)
        assert len(list(server.folder.rglob("*.*"))) == 2
        serve.end_program(signal.SIGTERM, None)
    assert stop.value.code == 143 and not server.folder.exists()


def test_closing_waits_for_the_thread_that_samples_and_for_no_client(models, monkeypatch):
    """A thread inside torch when Python ends would abort the process."""
    monkeypatch.setattr(sample, "load_weights", lambda folder: models)
    slow, before = Slow(monkeypatch), set(threading.enumerate())
    with serve.Server(0, sample.DEMO) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        person = Person(server)
        person.until("done")
        silent = socket.create_connection(server.server_address)     # sends nothing, and may do so for 20 s
        while len(server.connections) < 2:
            time.sleep(0.01)
        server.shutdown()
        start = time.monotonic()
    assert slow.ended == 1 and set(threading.enumerate()) <= before and not server.folder.exists()
    assert time.monotonic() - start < serve.Handler.timeout / 2
    silent.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_temporary_files_go_when_the_server_is_ended_while_it_samples(tmp_path, number):
    process, (host, port) = start_serving(tmp_path)
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", "/sample", json.dumps(FORM | {"n": 64, "steps": 3}),
                       {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while "image" not in json.loads(answer.readline()):              # the first of many is written
        pass
    assert list((tmp_path / "temporary").rglob("*.png"))
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGINT: 130}.get(number, 128 + number)
    left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file() or path.name.startswith("radit-")]
    assert process.stderr.read() == "" and not left                  # torch leaves an empty folder of its own


# --- in a browser ---------------------------------------------------------------------------------------

class Page:
    def __init__(self, browser, server):
        self.browser, self.address = browser, f"http://127.0.0.1:{server.server_address[1]}/"
        browser.get_log("browser")
        browser.get(self.address)

    def __getitem__(self, name):
        return self.browser.find_element("id", name)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def press(self, *keys):
        from selenium.webdriver import ActionChains, Keys
        for key in keys:
            ActionChains(self.browser).send_keys(getattr(Keys, key.upper(), key)).perform()

    def go_to(self, name):
        """Tab by tab to the control of that name."""
        for _ in range(60):
            if self.browser.switch_to.active_element.accessible_name == name:
                return
            self.press("tab")
        raise AssertionError(f"no {name} to be reached")

    def status(self, *starts):
        for _ in range(600):
            if (text := self["status"].text).startswith(starts):
                return text
            time.sleep(0.05)
        raise AssertionError(text)


def downloaded(browser, name):
    for _ in range(200):
        if (path := Path(browser.downloads / name)).exists():
            return path
        time.sleep(0.05)
    raise AssertionError(f"{name} was not downloaded")


@pytest.mark.slow
def test_an_image_by_keyboard_from_the_first_key_to_both_files(server, browser):
    page = Page(browser, server)
    assert "not for clinical use" in page.all("header")[0].text
    page.press("tab")
    assert browser.switch_to.active_element.get_attribute("id") == "age"   # the first control
    page.press(*"64")
    page.press("tab", "right", "right")                              # sex: any, female, male
    page.press("tab", "tab", "right", "right")  # past race, which has nothing but any; view: any, AP, PA
    page.go_to("any")
    page.go_to("Images")
    page.press("delete", "2", "tab", "delete", "delete", "3", "tab", "tab", "delete", "8", "enter")
    assert page.status("2 radiographs", "The", "1 ") == "2 radiographs sampled."
    asked = {"age": 64.0, "sex": "male", "view": "PA"}
    assert page.all(".set h3")[0].text == "64 years, male, PA" and page.all(".set p")[0].text == "3 steps, guidance 3"
    pictures = page.all("figure img")
    for image, seed in zip(pictures, (8, 9), strict=True):
        assert image.get_attribute("alt") == f"Synthetic chest radiograph, seed {seed}: 64 years, male, PA"
    widths = browser.execute_script("return [...document.images].slice(-2).map(image => image.naturalWidth)")
    assert widths[0] == DEMO_SIDE
    page.go_to("Download seed 8 as PNG")
    page.press("enter")
    picture = Image.open(downloaded(browser, "synthetic-8.png"))
    assert picture.text["Synthetic"] == "yes" and picture.text["Seed"] == "8"
    assert json.loads(picture.text["Metadata"]) == asked
    page.go_to("Download seed 8 as DICOM")
    page.press("enter")
    ds = pydicom.dcmread(downloaded(browser, "synthetic-8.dcm"))
    assert ds.SyntheticData == "YES" and ds.PatientAge == "064Y" and ds.PatientSex == "M" and ds.ViewPosition == "PA"
    assert np.array_equal(ds.pixel_array, np.asarray(picture))
    page.go_to("Seed 8, enlarge")
    page.press("enter")
    assert page["large"].is_displayed()
    for key, seed, place in (("left", 8, 1), ("right", 9, 2), ("right", 9, 2), ("up", 8, 1), ("down", 9, 2)):
        page.press(key)
        text = page["large"].text
        assert f"Seed {seed}: 64 years, male, PA" in text and "synthetic" in text and "3 steps, guidance 3" in text
        assert f"image {place} of 2 on this page" in text
        image = page["large"].find_element("tag name", "img")
        assert image.get_attribute("src") == pictures[place - 1].get_attribute("src")
        assert image.get_attribute("alt") == pictures[place - 1].get_attribute("alt")
        assert page["previous"].is_enabled() == (place == 2) and page["following"].is_enabled() == (place == 1)
    page["previous"].click()
    assert "Seed 8" in page["large"].text
    page.press("escape")
    assert not page["large"].is_displayed()
    assert browser.switch_to.active_element.accessible_name == "Seed 8, enlarge"
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith(page.address) or name.startswith("data:") for name in loaded)
    assert not [entry for entry in browser.get_log("browser")
                if entry["level"] == "SEVERE"]   # the policy refused nothing


def test_only_what_is_covered_can_be_chosen_and_all_has_a_name(server, browser):
    page = Page(browser, server)
    covered = server.model.config.covered
    for field, values in serve.describe(server.model.config, "demo")["fields"].items():
        if field == "dataset":
            found = {option.get_attribute("value"): option.is_enabled()
                     for option in page.all("select[name=dataset] option")}
        else:
            found = {radio.get_attribute("value"): radio.is_enabled() for radio in page.all(f"input[name={field}]")}
        assert found == {"": True} | {value: value in covered.get(field, {}) for value, _ in values}
    assert page["age"].get_attribute("min") == "2" and page["age"].get_attribute("max") == "89"
    for element in page.all("input, select, button, [role=radiogroup]"):
        assert element.accessible_name or not element.is_displayed(), element.get_attribute("outerHTML")
    for width in (360, 768, 1200):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    colours = set()
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(colours) == 2


def test_a_refusal_a_place_in_the_queue_and_a_stop_are_said(server, browser, monkeypatch):
    page = Page(browser, server)
    page["age"].send_keys("99")
    page["sample"].click()
    assert page.status("age 99 was not covered") and page["status"].get_attribute("class") == "bad"
    page["clear"].click()
    slow = Slow(monkeypatch)
    other = Person(server)
    other.until("done")
    page["sample"].click()
    assert page.status("In the queue: 1 before you.") and page["sample"].text == "Stop"
    assert len(page.all(".pending")) == 4
    other.leave()
    assert page.status("Sampling: 0 of 4 done.") and " of 26" in page["step"].text
    page["sample"].click()
    assert page.status("Stopped after 0 of 4.") and page["sample"].text == "Sample" and not page.all("figure")
    for _ in range(100):
        if not server.queue.tickets:
            break
        time.sleep(0.05)
    assert not server.queue.tickets and slow.most == 1
