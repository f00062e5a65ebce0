import contextlib
import fcntl
import http.server
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch at its import: each of pytest's workers has one core
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch

# Jobs in the background ignore Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import loopback
import phantom
import radit
import train
from common import cli, hub
from diagnosis import classifier
from encoders import raddino
from sample import DEMO

# Tests compare to float32's rounding, also on CPUs that are faster in bfloat16.
fast_bf16 = cli.fast_bf16
cli.fast_bf16 = lambda device: device.type == "cuda" and fast_bf16(device)

DEMO_SIDE = 16 * cli.read_json(DEMO / "radit/config.json")["grid"][0]  # pixels on a side of the demo's images


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Whatever needs the trained phantom model waits minutes for its training."""
    for item in items:
        if "phantom_weights" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


class Command:
    """Runs `python FILE.py ARGUMENTS...` of the project, or `python -m FOLDER ARGUMENTS...`; returns (status, output,
    errors).

    Called directly it runs in this process, because starting Python and importing torch takes four seconds. Whatever
    depends on a fresh process (environment variables read at import, signals, torchrun) is run by `command.subprocess`.
    """
    def __call__(self, name, *arguments, cwd=None):
        module = name.removesuffix(".py").replace("/", ".") if name.endswith(".py") else f"{name}.__main__"
        module = importlib.import_module(module)
        output, errors, status = io.StringIO(), io.StringIO(), 0
        threads, random_state = torch.get_num_threads(), torch.random.get_rng_state()
        before, sys.argv = sys.argv, list(map(str, [module.__file__, *arguments]))
        try:
            with (contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
                  contextlib.chdir(cwd or os.getcwd())):
                try:
                    cli.run(module.main)
                except SystemExit as stop:
                    status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                except Exception:  # as Python itself does: a traceback, and status 1
                    traceback.print_exc()
                    status = 1
        finally:
            sys.argv = before
            torch.set_num_threads(threads)
            torch.random.set_rng_state(random_state)
        return status, output.getvalue(), errors.getvalue()

    def subprocess(self, name, *arguments, env=None, **options):
        program = [ROOT / name] if name.endswith(".py") else ["-m", name]
        done = subprocess.run([sys.executable, *program, *map(str, arguments)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}), **options)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def command():
    return Command()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "phantom"
    phantom.write_source(root, 2000)
    return root


@pytest.fixture(scope="session")
def phantom_weights(phantoms, tmp_path_factory):
    """A RadiT half as wide as XS, trained on phantoms in pixel space, three minutes on one core: once, while pytest's
    other workers wait for it."""
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else phantoms.parent
    run = shared / "phantom-run"
    with open(shared / "phantom-run.lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run / "trained").exists():
            patch.setitem(radit.SIZES, "XS", (128, 6, 4))
            patch.setattr("sys.argv", ["train.py", "radit", "--data", str(phantoms), "--pixels", "--patch", "8",
                                       "--size", "XS", "--images", "32000", "--cooldown", "8000", "--batch", "32",
                                       "--lr", "3e-3", "--warmup", "3000", "--ema", "3000", "--log-every", "100",
                                       "--save-every", "1000", "--no-compile", "--out", str(run)])
            train.main()
            (run / "trained").touch()
    return run / "weights"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, driven by chromedriver; what it downloads lies in browser.downloads."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver here (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.downloads = downloads
    yield browser
    browser.quit()


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """Serves tmp_path/served/ORG/NAME/... as the Hub does, to this process and to commands started meanwhile; yields
    (server, requests, drops)."""
    requests, drops = [], {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), loopback.handler(tmp_path / "served", requests, drops))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # huggingface_hub read its environment when this process imported it.
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    huggingface_hub.utils.close_session()                            # the next one sees NO_PROXY
    yield server, requests, drops
    huggingface_hub.utils.close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A classifier's folder with random weights: its encoder looks at 32x32 pixels."""
    torch.manual_seed(0)
    config = classifier.ClassifierConfig(raddino.EncoderConfig(16, 2, 2, 8, 32, 1), ("own",), {})
    folder = tmp_path_factory.mktemp("classifier")
    hub.save_model(classifier.Classifier(config), folder)
    return folder
