"""Every command of the README runs, on small data and for few images; its two first lines stand near the top."""
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import phantom
import pytest
from conftest import ROOT
from PIL import Image

from radiographs import pixels

README = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
# `pip install` and `pytest` are what runs this file (.ci/run), so only what follows them is run here.
COMMANDS = [command for line in LINES for command in line.split(" && ") if command.startswith("python")]
TRAIN = ["--images", "32", "--batch", "8", "--log-every", "2", "--save-every", "4"]
SMALLER = {"train.py vae": TRAIN, "train.py radit": TRAIN,
           "sample.py": ["--n", "7", "--steps", "2"], "edit.py": ["--steps", "2"], "study.py build": ["--pairs", "3"],
           "causal.py fit": ["--steps", "20"], "classifier.py fit": ["--images", "32"], "classifier.py utility": ["--images", "32"]}


def test_the_two_commands_come_before_line_35():
    lines = README.splitlines()[:34]
    assert "pip install -r requirements.txt && python sample.py" in lines
    assert "pip install -r requirements.txt && pytest" in lines


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The project beside a small ChestX-ray14 and a small hospital folder."""
    root = tmp_path_factory.mktemp("readme")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.html"), ROOT / "weights", ROOT / "benchmarks"]:
        (root / path.name).symlink_to(path)
    images = root / "downloads/nih/images_001/images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, record = [], {"age": 50, "sex": "male", "cardiomegaly": "negative", "support_devices": "negative"}
    for i in range(24):
        name = f"{i:08}_000.png"
        Image.fromarray((phantom.draw(record, rng) * 255).astype(np.uint8)).resize((128, 128)).save(images / name)
        rows.append(f"{name},No Finding,0,{i},50,M,PA,1,1,.1,.1")
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,W,H,x,y"
    (root / "downloads/nih/Data_Entry_2017_v2020.csv").write_text("\n".join([header, *rows]))
    (root / "downloads/nih/test_list.txt").write_text("".join(f"{i:08}_000.png\n" for i in range(8)))
    shutil.copytree(images, root / "downloads/hospital")
    return root


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(workspace, line):
    program, file, *arguments = shlex.split(line)
    assert program == "python"
    smaller = SMALLER.get(" ".join([file, *arguments[:1]]), SMALLER.get(file, []))
    done = subprocess.run([sys.executable, file, *arguments, *smaller], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if file == "sample.py":
        out = workspace / (arguments[arguments.index("--out") + 1] if "--out" in arguments else "out")
        assert pixels.load_image(out / "images/0001.png").shape[0] == 1 and (out / "grid.png").exists() and (out / "metadata.csv").exists()


def test_the_inventory_is_complete_and_its_line_counts_are_near():
    listed = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))
    for name, lines in listed.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 15, name
