"""Every command of every README runs, on small data and for few images, in one workspace, in the order of reading."""
import functools
import re
import shlex
import shutil

import numpy as np
import phantom
import pytest
from conftest import DEMO_SIDE, ROOT
from PIL import Image

import train
from radiographs import pixels

README = (ROOT / "README.md").read_text()
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("weights/**/README.md"))]
TRAIN = ["--images", "32", "--batch", "8", "--log-every", "2", "--save-every", "4"]
QUICK_BENCHMARK = ["--grid", "2", "--batch", "1", "--steps", "1", "--warmup", "1", "--rounds", "1"]
# What each command gets in addition, so that it takes seconds.
SMALLER = {"train.py vae": TRAIN, "train.py radit": [*TRAIN, "--no-compile"], "sample.py": ["--n", "7", "--steps", "2"],
           "-m causal edit": ["--steps", "2"], "-m causal edit-all": ["--steps", "1"],
           "-m causal fit": ["--steps", "20"], "-m study build": ["--pairs", "3"],
           "-m diagnosis fit": ["--images", "32"], "-m diagnosis utility": ["--images", "32"],
           "benchmarks/transformer.py": QUICK_BENCHMARK, "benchmarks/training.py": QUICK_BENCHMARK,
           "benchmarks/sampling.py": ["--steps", "1", "--batch", "1", "--rounds", "1"],
           "benchmarks/growth.py": ["--images", "2", "--rounds", "1"],
           "benchmarks/loading.py": ["--n", "1", "--rounds", "1"], "benchmarks/preparing.py": ["--n", "500"]}


def commands(readme):
    """The lines of its bash blocks that start Python. `pip install` and `pytest` are what .ci/run does."""
    text = readme.read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [part for line in lines for part in line.split(" && ") if part.startswith("python")]


def parameters():
    for readme in READMES:
        for line in commands(readme):
            words = shlex.split(line, comments=True)[1:]
            marks = [pytest.mark.slow] if words[0].startswith("benchmarks/") else []
            yield pytest.param(words, id=f"{readme.parent.relative_to(ROOT)}: {' '.join(words)}", marks=marks)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder beside a small ChestX-ray14 and the images of a small hospital."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("weights", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
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
    (root / "data").mkdir()
    (root / "data/hospital.key").write_text("0" * 64)  # decides the splits: a random key may leave one empty
    return root


@pytest.mark.parametrize("words", list(parameters()))
def test_a_command_runs(workspace, command, words, monkeypatch):
    few_steps = functools.partial(train.sample.generate, steps=2)    # of a training's previews
    monkeypatch.setattr(train.sample, "generate", few_steps)
    name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    start = [*words[:words.index(name) + 1], *arguments[:1]]
    smaller = SMALLER.get(" ".join(start), SMALLER.get(name, []))
    before = set(workspace.glob("out/sample-*"))
    try:
        status, output, errors = command(name, *arguments, *smaller, cwd=workspace)
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")              # a benchmark beside another library
    assert status == 0, errors
    for option in ("--out", "--json"):
        if option in arguments:
            out = workspace / arguments[arguments.index(option) + 1]
            assert out.exists() or list(out.parent.glob(f"{out.name}.*"))  # some take a name without suffix
    if name == "sample.py":
        out = workspace / arguments[arguments.index("--out") + 1] if "--out" in arguments else None
        out = out or (set(workspace.glob("out/sample-*")) - before).pop()
        assert pixels.load_image(out / "images/0001.png").shape[0] == 1
        assert (out / "grid.png").exists() and (out / "metadata.csv").exists()
        assert str(out.relative_to(workspace)) in output


def test_the_lines_for_python_run(capsys):
    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(block.replace("seeds=range(4))", "seeds=range(4), steps=1)").replace('"weights', f'"{ROOT}/weights'), {})
    assert capsys.readouterr().out == f"torch.Size([4, 1, {DEMO_SIDE}, {DEMO_SIDE}])\n"


def test_the_first_two_commands_come_early_and_the_file_is_short():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python sample.py" in lines[:34]
    assert "pip install -r requirements.txt && pytest" in lines[:34]
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def test_the_inventory_is_complete_and_its_line_counts_are_near():
    listed = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))
    for name, lines in listed.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 15, name
    folders = set(re.findall(r"^\| \[?`([\w/]+)/`", README, re.M))
    assert folders == {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"benchmarks", "weights/demo"}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_lead_to_files(readme):
    for target in re.findall(r"\]\(([^)#]+)", readme.read_text()):
        assert target.startswith("http") or (readme.parent / target).exists(), target
