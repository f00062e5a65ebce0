"""The loop on several processes: losses do not depend on the layout, signals and deaths end it in order, speed costs
nothing."""
import os
import re
import signal
import subprocess
import sys
import time

import conftest
import job
import phantom
import pytest
import torch
from job import log_of

import radit
import train
from common import hub
from common.cli import InputError
from training import checkpoint, log, parallel
from training.options import TrainConfig
from training.randomness import RandomNumbers, generator

CFG = dict(images=160, batch=8, lr=3e-3, warmup=40, ema=(200,), log_every=1, save_every=10)  # 20 steps


def config(**changes):
    return TrainConfig(**(CFG | changes))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process, to which all others are compared."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert job.run(0, "radit", config(), out) == [0]
    return out


def same(a, b, tolerance):
    """Two runs' logs, line by line."""
    a, b = log_of(a), log_of(b)
    assert [line["images"] for line in a] == [line["images"] for line in b]
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x.keys() - {"loss_by_t"}:
            assert x[key] == pytest.approx(y[key], rel=tolerance), (key, x["images"])
        for p, q in zip(x.get("loss_by_t", []), y.get("loss_by_t", [])):
            # of four digits
            assert (p is None) == (q is None) and (p or 0) == pytest.approx(q or 0, rel=tolerance, abs=2e-4)


def state_of(run):
    """All tensors of a run's newest checkpoint, whatever layout wrote it."""
    folder = checkpoint.latest(run)
    known = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(stored.size, dtype=stored.properties.dtype) for name, stored in known.items()}
    checkpoint.read(folder, tensors, alone=True)
    return tensors


def identical(a, b):
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("world, changes, layout", [
    (2, {}, {}), (2, {}, {"sharded": True}),
    (0, {"accumulate": 4}, {"recomputed": True}),
    pytest.param(2, {"accumulate": 2}, {"sharded": True, "recomputed": True}, marks=pytest.mark.slow)],
    ids=["ddp", "fsdp", "accumulate", "all"])
def test_losses_do_not_depend_on_the_layout(one, tmp_path, world, changes, layout):
    assert set(job.run(world, "radit", config(**changes), tmp_path / "run", **layout)) == {0}
    same(tmp_path / "run", one, 1e-4)
    assert log_of(one)[-1]["loss"] != log_of(one)[0]["loss"]
    states = state_of(one), state_of(tmp_path / "run")
    assert states[0].keys() == states[1].keys()                      # no wrapper's prefix
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=2e-4, msg=name)
    files = [hub.load_model(radit.RadiT, radit.RadiTConfig, run / "weights/radit") for run in (one, tmp_path / "run")]
    for a, b in zip(*(model.parameters() for model in files)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-4)


@pytest.mark.slow
def test_each_layout_continues_what_another_began(one, tmp_path):
    """One process begins, two with FSDP continue, two with DDP, one finishes."""
    out = tmp_path / "run"
    parts = [(40, 0, {}), (80, 2, {"sharded": True}), (120, 2, {}), (160, 0, {"recomputed": True})]
    for images, world, layout in parts:
        assert set(job.run(world, "radit", config(images=images), out, **layout)) == {0}
    held_out = [line.pop("held_out_loss", None) for line in log_of(out)]
    assert sum(value is not None for value in held_out) == 4         # at the end of each part
    for x, y in zip(log_of(out), log_of(one), strict=True):
        assert x["images"] == y["images"] and x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("layout, optimizer", [
    ({}, "adamw"), pytest.param({}, "muon", marks=pytest.mark.slow),
    pytest.param({"sharded": True}, "adamw", marks=pytest.mark.slow)], ids=["ddp", "muon", "fsdp"])
def test_a_signal_to_one_of_two_stops_both_and_they_continue_exactly(tmp_path, layout, optimizer):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert job.run(2, "radit", config(optimizer=optimizer), whole, **layout) == [0, 0]
    event = (1, 5, signal.SIGUSR1 if layout else signal.SIGTERM)     # the second process, in its fifth step
    assert job.run(2, "radit", config(optimizer=optimizer), stopped, event=event, **layout) == [train.STOPPED] * 2
    assert checkpoint.latest(stopped).name == "64"                   # the next step at which all are asked: 8
    assert (stopped / "stopped").exists()
    assert job.run(2, "radit", config(optimizer=optimizer), stopped, **layout) == [0, 0]
    assert log_of(stopped) == log_of(whole)                          # bit for bit
    assert not (stopped / "stopped").exists()
    identical(stopped, whole)


def test_processes_that_read_images_end_with_the_training(tmp_path):
    """As beside a GPU. They ignore the signal by which Python ends processes at exit, so a training that did not close
    its loader waited for them without end."""
    assert job.run(0, "radit", config(), tmp_path / "whole", workers=2) == [0]
    assert job.run(0, "radit", config(), tmp_path / "stopped", workers=2, event=(0, 6, signal.SIGTERM)) == [75]
    assert job.run(0, "radit", config(), tmp_path / "stopped") == [0]
    assert job.run(0, "radit", config(), tmp_path / "alone") == [0]
    assert job.log_of(tmp_path / "whole") == job.log_of(tmp_path / "alone")
    assert job.log_of(tmp_path / "stopped")[-1] == job.log_of(tmp_path / "alone")[-1]


def test_a_signal_between_two_lines_of_the_log(tmp_path):
    """Alone, a process stops after the step in which it was asked; the interval becomes two lines."""
    cfg = config(log_every=4, save_every=4, images=96)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert job.run(0, "radit", cfg, whole) == [0]
    assert job.run(0, "radit", cfg, stopped, event=(0, 6, signal.SIGTERM)) == [75]
    assert job.run(0, "radit", cfg, stopped) == [0]
    a, b = log_of(whole), log_of(stopped)
    assert [line["images"] for line in b] == [32, 48, 64, 96]
    assert (b[1]["loss"] + b[2]["loss"]) / 2 == pytest.approx(a[1]["loss"], rel=1e-6) and (b[0], b[3]) == (a[0], a[2])
    identical(stopped, whole)


@pytest.mark.parametrize("number, timeout", [(signal.SIGKILL, None),
                                             (signal.SIGSTOP, train.parallel.timedelta(seconds=3))],
                         ids=["dead", "hanging"])
def test_the_job_ends_when_a_process_dies_or_hangs(tmp_path, number, timeout):
    started = time.monotonic()
    first, second = job.start(2, "radit", config(images=10 ** 6, log_every=10 ** 6), tmp_path / "run",
                              event=(1, 3, number), timeout=timeout)
    first.join(60)
    assert first.exitcode not in (None, 0, train.STOPPED) and time.monotonic() - started < 60
    second.kill()
    second.join()


@pytest.mark.slow
def test_the_running_statistics_are_of_the_whole_batch(tmp_path):
    for name, world, changes in (("one", 0, {}), ("two", 2, {}), ("four", 2, {"accumulate": 2})):
        assert set(job.run(world, "vae", config(images=48, save_every=6, **changes), tmp_path / name)) == {0}
    expected = state_of(tmp_path / "one")
    for name in ("two", "four"):
        same(tmp_path / name, tmp_path / "one", 1e-4)
        found = state_of(tmp_path / name)
        for key in ("model.bn.running_mean", "model.bn.running_var", "model.bn.num_batches_tracked",
                    "ema.bn.running_var"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    assert expected["model.bn.num_batches_tracked"] == 6             # steps


@pytest.mark.slow
def test_in_bfloat16_fsdp_agrees_with_ddp(tmp_path):
    """FSDP's bfloat16 weights are what autocast makes of DDP's float32 ones; moments and EMA stay float32."""
    cfg = config(images=64, save_every=8)
    for name, layout in (("ddp", {}), ("fsdp", {"sharded": True})):
        assert job.run(2, "radit", cfg, tmp_path / name, bf16=True, **layout) == [0, 0]
    same(tmp_path / "fsdp", tmp_path / "ddp", 2e-3)
    assert {tensor.dtype for tensor in state_of(tmp_path / "fsdp").values()} == {torch.float32}


def test_a_process_that_leaves_as_asked_ignores_further_signals():
    """As schedulers send them while others still finish; in an ordinary end the handlers from before return."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit), parallel.catch_signals() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [signal.SIGTERM]
            raise SystemExit(train.STOPPED)
        os.kill(os.getpid(), signal.SIGTERM)                         # which would end pytest
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number in parallel.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    with parallel.catch_signals():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL == before


def test_an_images_numbers_depend_on_its_place_in_the_batch_only():
    def numbers_of(part):
        rng = RandomNumbers(generator("cpu", 3, 640), 8, part)
        return rng.normal(2, 3), rng.uniform(5), rng.rows(lambda count, rng: train.flow.sample_times(count, 2.0, rng))
    whole, halves = numbers_of(slice(None)), [numbers_of(slice(0, 4)), numbers_of(slice(4, 8))]
    for i, numbers in enumerate(whole):
        assert torch.equal(numbers, torch.cat([half[i] for half in halves])) and len(numbers) == 8
    assert not torch.equal(whole[0], RandomNumbers(generator("cpu", 3, 648), 8).normal(2, 3))
    assert ((whole[2].sort().values == whole[2]).all())              # the stratified times: one in each eighth


@pytest.mark.parametrize("world, accumulate, accepted", [(2, 2, True), (3, 1, False), (8, 2, False), (1, 3, False)])
def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, world, accumulate, accepted):
    monkeypatch.setattr(parallel, "world", world)
    if accepted:
        assert parallel.micro_batch(8, accumulate) == 2
        return
    with pytest.raises(InputError, match=f"--batch 8 cannot be shared by {world} processes, --accumulate {accumulate}"):
        parallel.micro_batch(8, accumulate)


def test_the_command_line_refuses_before_it_writes(command, tmp_path):
    for more, message in ((["--fsdp"], "start it with torchrun"), (["--accumulate", "3"], "must be a multiple of 3")):
        status, _, errors = command("train.py", "radit", "--data", "nowhere", "--pixels", "--out", tmp_path / "run",
                                    *more)
        assert status == 2 and message in errors.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """SIGTERM to torchrun reaches the processes, which save; the same command continues; a killed process ends it
    all."""
    run = tmp_path / "run"
    phantom.write_source(tmp_path / "data", 80)  # few held-out ones: torchrun kills what takes over 30 s to leave
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "radit",
               "--data", tmp_path / "data", "--pixels", "--patch", "8", "--size", "XS", "--batch", "32",
               "--log-every", "4", "--save-every", "4", "--images", "1000000", "--no-compile", "--fsdp", "--out", run]
    ends = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        with open(tmp_path / "output.txt", "w") as output:
            process = subprocess.Popen(list(map(str, command)), cwd=job.ROOT, stdout=output, stderr=subprocess.STDOUT)
        begun = checkpoint.latest(run)
        while checkpoint.latest(run) == begun:                       # until it has saved once more
            time.sleep(0.05)
            assert process.poll() is None
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True,
                                  text=True).stdout.split()
        os.kill(process.pid if number == signal.SIGTERM else int(children[0]), number)
        assert process.wait(60) != 0
        ends.append((tmp_path / "output.txt").read_text())
    stopped = int(re.search(r"all saved at ([\d,]+) images", ends[0])[1].replace(",", ""))
    assert f"2 processes, 72 images, starting at {stopped:,} seen" in ends[1]
    assert "SIGKILL" in ends[1]


@pytest.mark.parametrize("ends, calls", [
    (["stopped 75", "stopped 143", "done 0"], 2),                    # time is up, whatever srun makes of the status
    (["dead 1"] * 9, 5), (["done 0"], 0), (["dead 137", "stopped 1", "dead 1", "done 0"], 3)])
def test_the_slurm_script_requeues(tmp_path, ends, calls):
    """The script of training/README.md beside a srun and a scontrol that are made up: one run after the other, as long
    as it is put back into the queue."""
    script, = re.findall(r"```slurm\n(.*?)```", (job.ROOT / "training/README.md").read_text(), re.S)
    (tmp_path / "xl.sh").write_text(script)
    programs = {"srun": """read end status < ends; sed -i 1d ends; mkdir -p runs/xl; rm -f runs/xl/stopped
                           if [ $end = stopped ]; then touch runs/xl/stopped; fi; exit $status""",
                "scontrol": 'if [ "$1" = requeue ]; then echo $2 >> requeued; else echo node1; fi'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ends").write_text("\n".join(ends) + "\n")
    (tmp_path / "requeued").touch()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NODELIST": "node[1-8]"}
    requeued = 0
    for end in ends:
        done = subprocess.run(["bash", "xl.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == int(end.split()[1]), done.stderr
        before, requeued = requeued, len((tmp_path / "requeued").read_text().split())
        if requeued == before:
            break
    assert requeued == calls


NEEDS_BF16 = pytest.mark.skipif(not conftest.fast_bf16(parallel.pick_device()[0]), reason="no bfloat16 units")


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=NEEDS_BF16)])
def test_compiled_and_eager_training_agree_without_recompilation(tmp_path, monkeypatch, bf16):
    device = parallel.pick_device()[0]
    monkeypatch.setattr(train, "pick_device", lambda: (device, bf16))
    monkeypatch.setattr(log, "plot_losses", lambda history, path: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        job.radit_job(config(), tmp_path / "compiled", blocks=3, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1   # three blocks, twenty steps, one graph
    job.radit_job(config(), tmp_path / "eager", blocks=3)
    same(tmp_path / "compiled", tmp_path / "eager", 2e-2 if bf16 else 1e-4)
    torch._dynamo.reset()
    job.radit_job(config(), tmp_path / "recomputed", blocks=3, compiled=True, recomputed=True)
    assert torch._functorch.config.activation_memory_budget == parallel.BUDGET
    parallel.set_up(radit.RadiT(radit.RadiTConfig(width=64, depth=1, heads=2)), 1, False, parallel.Layout())
    assert torch._functorch.config.activation_memory_budget == 1
    same(tmp_path / "recomputed", tmp_path / "eager", 2e-2 if bf16 else 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_waited_for_at_the_log_only(tmp_path, monkeypatch):
    """Between two lines nothing synchronises, from the second interval on: torch would raise."""
    monkeypatch.setattr(log, "plot_losses", lambda history, path: None)
    lines, means = [], train.means

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        lines.append(1)
        return means(*arguments)

    class Task(train.RadiTTask):
        def loss(self, model, batch, rng):
            torch.cuda.set_sync_debug_mode("error" if lines else "default")
            return super().loss(model, batch, rng)

    monkeypatch.setattr(train, "means", watched)
    monkeypatch.setattr(train, "RadiTTask", Task)
    job.radit_job(config(log_every=5, save_every=20), tmp_path / "run", compiled=True)
    assert len(lines) == 4
