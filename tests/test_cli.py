"""What every command shares: values of options, files written whole, locked folders, exit statuses, threads."""
import argparse
import errno
import gc
import importlib
import json
import os
import platform
import subprocess
import sys

import pytest
import safetensors
import torch
from conftest import ROOT

import flow
from common import cli
from common.cli import InputError, RunError


# --- values of options ----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [("1", 1), ("10", 10), ("007", 7), ("-3", -3)])
def test_whole_numbers(text, value):
    assert cli.integer(-5, 10)(text) == value


@pytest.mark.parametrize("text", ["", "x", "1.0", "1e1", "1_0", " 1", "١", "²", "--1", "11", "-6", "9" * 5000, "nan"])
def test_what_is_no_whole_number_in_the_range_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from -5 to 10"):
        cli.integer(-5, 10)(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "1.5", "1e999", "-0.1", "0,5", "١", "１", "0_1", " 1",
                                  "1\n", "0x1", "1e", "."])
def test_what_is_no_number_in_the_range_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number from 0 to 1"):
        cli.number(0, 1)(text)


def test_numbers_and_paths():
    assert cli.number(0, 1)("0.25") == 0.25 and cli.number(0, 1)("1e-3") == 0.001
    with pytest.raises(argparse.ArgumentTypeError, match="an empty path"):
        cli.new_path(" ")


# --- files ----------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/a.txt"
    with cli.whole_file(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError), cli.whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_links_devices_and_folders_are_not_written_over(tmp_path):
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "folder", tmp_path / "pipe", "/dev/null"):
        with pytest.raises(InputError, match="neither a new name nor a regular file"):
            cli.write_text(path, "x")
    assert (tmp_path / "target").read_text() == "kept" and not list(tmp_path.glob("*.tmp"))


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("kept")
    with cli.whole_file(tmp_path / "a.json") as temporary:
        temporary.touch()
    temporary.symlink_to("target")
    cli.write_json(tmp_path / "a.json", {"x": 1})
    assert (tmp_path / "target").read_text() == "kept" and cli.read_json(tmp_path / "a.json") == {"x": 1}


def test_two_processes_that_write_one_file_leave_one_of_both_whole(tmp_path, monkeypatch):
    """The second writes and ends while the first is half way."""
    process = os.getpid()
    with cli.whole_file(tmp_path / "a.txt") as first:
        first.write_text("half")
        monkeypatch.setattr(os, "getpid", lambda: process + 1)
        cli.write_text(tmp_path / "a.txt", "second")
        assert (tmp_path / "a.txt").read_text() == "second" and first.read_text() == "half"
        first.write_text("first, whole")
    assert (tmp_path / "a.txt").read_text() == "first, whole" and len(list(tmp_path.iterdir())) == 1


def test_the_next_command_deletes_what_killed_ones_left_and_nothing_else(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, others = platform.node(), []
    (tmp_path / f"b.png.{host}-{ended.pid}.tmp").write_text("half")
    for name in (f"c.png.{host}-{os.getppid()}.tmp", f"d.png.elsewhere-{ended.pid}.tmp", "e.tmp", f"f.{host}-x.tmp"):
        others.append(tmp_path / name)
        others[-1].touch()
    cli.write_text(tmp_path / "a.txt", "x")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "a.txt"])


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught, cli.whole_file(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "a.bin") and not list(tmp_path.iterdir())
    with pytest.raises(OSError) as caught, cli.whole_file(tmp_path / "a.json"), cli.whole_file(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "a.bin") and not list(tmp_path.iterdir())   # the inner one of two
    with pytest.raises(safetensors.SafetensorError, match="a.bin: No space"), cli.whole_file(tmp_path / "a.bin"):
        raise safetensors.SafetensorError("No space left on device")
    with pytest.raises(OSError) as caught:
        cli.copy_file(tmp_path / "missing", tmp_path / "a")
    assert caught.value.filename == str(tmp_path / "missing")


def test_json_has_no_nan(tmp_path):
    cli.write_json(tmp_path / "a.json", {"a": [1.5, float("nan")], "b": (float("inf"), "x")})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None], "b": [None, "x"]}


@pytest.mark.parametrize("content", [b"", b"{half", b"\xff\xfe\x00", b"[" * 100_000, b"1" * 5000, b"3", b"[1]",
                                     b"null"])
def test_json_that_is_not_what_is_needed_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match="a.json: (not JSON|holds)"):
        cli.read_json(tmp_path / "a.json")


def test_a_folder_is_held_by_one_process_and_free_when_it_dies(tmp_path):
    code = f"""
from common import cli
with cli.locked({str(tmp_path / 'out')!r}):
    print('held', flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another command is filling this folder"), cli.locked(tmp_path / "out"):
        pass
    other.kill()
    other.wait()
    with cli.locked(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    with cli.locked(tmp_path / "out"):                               # and when a block ends
        pass


def test_counts_have_the_noun_in_its_number():
    assert [cli.count(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]
    assert cli.count(2, "index", "indices") == "2 indices"


def parsers(monkeypatch, name):
    """The parser of a command and of all its subcommands."""
    found = []

    def parse_args(self, *_):
        found.append(self)
        raise SystemExit(0)

    module = importlib.import_module(name)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module.__file__])
        module.main()
    for parser in found:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
    return found


@pytest.mark.parametrize("name", ["data", "train", "sample", "metrics", *(
    f"{path.parent.name}.__main__" for path in sorted(ROOT.glob("*/__main__.py")))])
def test_help_explains_every_option_and_names_the_command_as_it_is_called(monkeypatch, name):
    called = f"python -m {name.removesuffix('.__main__')}" if "." in name else f"{name}.py"
    for parser in parsers(monkeypatch, name):
        assert parser.prog.startswith(called) and parser.format_usage().startswith(f"usage: {called}")
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)
            assert "-n" not in action.option_strings or action.option_strings[0] == "--n"


def test_new_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [str(cli.new_folder("sample")) for _ in range(3)]
    assert made == ["out/sample-1", "out/sample-2", "out/sample-3"] and all((tmp_path / path).is_dir() for path in made)


# --- exit statuses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, status, text", [
    (InputError("--n 0: no"), 2, "--n 0: no"), (RunError("no image is usable"), 1, "no image is usable"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "a: No such file"),
    (FileExistsError(errno.EEXIST, "File exists", "a"), 2, "a: File exists"),
    (OSError(errno.ENOSPC, "No space left on device", "a"), 1, "a: No space left on device"),
    (safetensors.SafetensorError("cut short"), 1, "cut short"),
    (InputError("a\nb.csv: no column '\x1b'"), 2, r"a\nb.csv: no column '\x1b'"),
    (torch.OutOfMemoryError("tried to allocate 3 GiB"), 1, "out of memory: tried to allocate 3 GiB")])
def test_what_a_user_can_cause_is_one_line_and_a_status(monkeypatch, capsys, error, status, text):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == status and capsys.readouterr().err == f"sample.py: error: {text}\n"


def test_what_ctrl_c_left_half_made_says_nothing(monkeypatch):
    class HalfMade:
        def __del__(self):
            raise AttributeError("no attribute 'pos'")

    def main():
        bar = HalfMade()
        raise KeyboardInterrupt(bar)

    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 130
    del stop
    gc.collect()
    assert not said


def test_a_command_that_is_a_folder_is_named_as_it_is_called(command):
    status, _, errors = command("causal", "graph", "--no-such-option")
    assert status == 2 and errors.startswith("python -m causal: error: ") and len(errors.splitlines()) == 1


def test_an_error_of_the_program_itself_keeps_its_traceback():
    def main():
        raise KeyError("a mistake in the code")

    with pytest.raises(KeyError):
        cli.run(main)


# --- where to compute -----------------------------------------------------------------------------------

@pytest.mark.parametrize("idle, threads", [(4, 4), (3.6, 4), (2.4, 2), (0.3, 1), (0, 1)])
def test_as_many_threads_as_cores_are_idle(monkeypatch, capsys, idle, threads):
    clock, set_to = iter([100, 100 + idle * 0.2]), [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cli, "idle_seconds", lambda: next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    cli.use_idle_cores.cache_clear()                                 # it decides once a process
    cli.use_idle_cores()
    assert set_to[-1] == threads
    assert ("of 4 threads" in capsys.readouterr().err) == (threads < 4)


def test_the_user_s_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "set_num_threads", pytest.fail)
    cli.use_idle_cores.cache_clear()                                 # it decides once a process
    cli.use_idle_cores()


def test_idle_seconds_are_the_idle_column_of_the_cores_this_process_may_use(monkeypatch):
    text = "cpu 1 1 1 600 1\ncpu0 1 1 1 100 1\ncpu1 1 1 1 200 1\ncpu2 1 1 1 300 1\nintr 5\n"
    monkeypatch.setattr(cli.Path, "read_text", lambda path: text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2})
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert cli.idle_seconds() == 4


def test_an_apple_gpu_is_taken_and_computes_in_float32(monkeypatch):
    """What can be tested without one: the choice, and that nothing in float64 is sent to it, which it cannot hold."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device, bf16 = cli.pick_device()
    assert device.type == "mps" and not bf16
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):  # as sample.py and train.py write it
        pass

    def velocity(x, t):
        assert x.dtype == torch.float32
        return x * float(t)

    assert flow.integrate(velocity, torch.ones(1, 1, 2, 2), flow.time_grid(3, 1.0), "heun")[0].dtype == torch.float32
