"""The house: seven files on top, a folder for each theme, and imports that run down only."""
import ast
import graphlib
import subprocess

import pytest
from conftest import ROOT

SPINE = {"data", "vae", "radit", "flow", "train", "sample", "metrics"}
LAYERS = [{"flow", "common"}, {"radiographs", "encoders"}, {"vae", "radit", "data"},
          {"autoencoder", "baselines", "training", "metrics"}, {"sample"}, {"train"}, {"diagnosis"},
          {"causal", "study", "share"}, {"benchmarks"}]
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
OTHER_FILES = {"README.md", "LICENSE", "requirements.txt", "pytest.ini", ".gitignore"}
OTHER_FOLDERS = {".ci", "tests", "weights"}

SOURCES = {path: ast.parse(path.read_text()) for room in FLOOR
           for path in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")]}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree):
    """The modules that a file's syntax tree imports, `from common import cli` as "common.cli", and their nodes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full, from the top of the house"
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def rooms_imported(tree):
    return {module.split(".")[0] for module, _ in imports(tree)} & FLOOR.keys()


def test_the_seven_files_and_the_folders_on_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    assert {name for name in names if "/" not in name} == OTHER_FILES | {f"{name}.py" for name in SPINE}
    assert {name.split("/")[0] for name in names if "/" in name} <= OTHER_FOLDERS | FLOOR.keys() - SPINE


def test_folders_are_plain_packages():
    for room in {room_of(path) for path in SOURCES} - SPINE - {"benchmarks"}:
        assert (ROOT / room / "__init__.py").read_text() == "", room


def test_imports_run_down_only():
    upwards = [(path.name, room) for path, tree in SOURCES.items() for room in rooms_imported(tree)
               if FLOOR[room] > FLOOR[room_of(path)]]
    assert not upwards


def test_there_is_no_circle_of_rooms_and_none_of_files():
    rooms, files = {}, {}
    for path, tree in SOURCES.items():
        rooms.setdefault(room_of(path), set()).update(rooms_imported(tree) - {room_of(path)})
        files[path] = {ROOT / (module.replace(".", "/") + ".py") for module, _ in imports(tree)} & SOURCES.keys()
    for graph in (rooms, files):
        list(graphlib.TopologicalSorter(graph).static_order())       # raises CycleError, which names the circle


def test_no_import_hides_in_a_function():
    """Benchmarks may import a peer where they use it, since few have them all; no other file may."""
    hidden = []
    for path, tree in SOURCES.items():
        inside = {node for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
                  for node in ast.walk(function)}
        hidden += [(path.name, module) for module, node in imports(tree) if node in inside
                   and (room_of(path) != "benchmarks" or module.split(".")[0] in FLOOR)]
    assert not hidden


def test_lines_are_at_most_120_columns():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]
            for number, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 120]
    assert not long
