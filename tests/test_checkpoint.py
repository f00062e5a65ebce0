"""Checkpoints: whole or absent whenever a run is killed, the last ones kept, exported for others in little memory."""
import json
import random
import resource
import time

import job
import pytest
import safetensors
import torch
from job import log_of

import radit
import sample
import train
from common.cli import InputError, RunError
from training import checkpoint
from training.options import TrainConfig


@pytest.mark.slow
def test_killed_again_and_again_no_checkpoint_is_unreadable_and_no_image_is_missed(tmp_path):
    """A run that saves in every step is killed at random times until it is done. Every checkpoint it leaves can be
    read; each step sees the images that it would have seen; every epoch sees each image once; and the end is that of a
    run left alone."""
    cfg = TrainConfig(images=120, batch=4, lr=1e-2, warmup=0, ema=(100,), log_every=1, save_every=1)
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(0)
    assert job.run(0, "seen", cfg, whole) == [0]
    lines = (whole / "seen.txt").read_text().splitlines()
    for epoch in range(12):                                          # 120 images, 10 an epoch
        images = sum(map(json.loads, lines), [])[epoch * 10:epoch * 10 + 10]
        assert sorted(images) == list(range(10))
    def steps():
        return (run / "seen.txt").read_text().splitlines() if (run / "seen.txt").exists() else []

    kills = 0
    while True:
        newest, before = checkpoint.latest(run), len(steps())
        step, left = int(newest.name) // 4 if newest else 0, rng.randint(1, 8)
        process, = job.start(0, "seen", cfg, run)
        while process.is_alive() and len(steps()) < before + left:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.01))                           # somewhere in the next step, or while it is saved
        finished = process.exitcode == 0
        process.kill()
        process.join()
        seen = steps()[before:]
        assert seen == lines[step:step + len(seen)]                  # from the checkpoint on, the same images again
        for folder in checkpoint.complete(run):
            state = {"model.weight": torch.full((2, 2), torch.nan),
                     "optimizer.bias.exp_avg": torch.full((2,), torch.nan)}
            assert checkpoint.verified(folder)["images"] == int(folder.name)
            checkpoint.read(folder, state)
            assert all(tensor.isfinite().all() for tensor in state.values())
        if finished:
            break
        kills += 1
    assert kills >= 5
    assert log_of(run) == log_of(whole)
    assert [folder.name for folder in checkpoint.complete(run)] == ["116", "120"]
    # nothing half-written is left
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["116", "120"]


def save(run, images, tensors, keep=2):
    writer = checkpoint.Writer(run, keep)
    writer.save(tensors, {"images": images, "name": "radit", "config": {}, "about": {"seed": 0}})
    writer.wait()


def test_what_is_saved_is_what_was_when_save_was_called(tmp_path):
    x, writer = torch.zeros(1000, 1000), checkpoint.Writer(tmp_path, 2)
    writer.save({"x": x}, {"images": 8, "name": "radit", "config": {}, "about": {}})
    x.fill_(7)                                                       # training goes on while it is written
    writer.wait()
    y = torch.ones(1000, 1000)
    assert checkpoint.resume(tmp_path, {"x": y}, {}) == (8, 8) and not y.any()


def test_the_newest_whole_checkpoint_counts(tmp_path, capsys):
    for images in (8, 96, 104, 112):
        save(tmp_path, images, {"x": torch.full((3,), float(images))}, keep=3)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["96", "104", "112"]  # by number, not by letter
    (tmp_path / "checkpoints/112").rename(tmp_path / "checkpoints/112.tmp")  # as if killed before the rename
    x = torch.zeros(3)
    assert checkpoint.resume(tmp_path, {"x": x}, {"seed": 0}) == (104, 104) and x.tolist() == [104] * 3
    with pytest.raises(InputError, match="started with seed = 0, not 1; use another --out or the same options"):
        checkpoint.resume(tmp_path, {"x": x}, {"seed": 1})
    assert checkpoint.resume(tmp_path, {"x": x}, {"seed": 1}, may_change=("seed",)) == (104, 104)
    with pytest.raises(InputError, match="of a run with other options, such as more --ema: .*y"):
        checkpoint.resume(tmp_path, {"x": x, "y": x}, {})
    assert not capsys.readouterr().err
    checkpoint.Writer(tmp_path, 2)
    assert not list(tmp_path.glob("checkpoints/*.tmp")) and checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.resume(tmp_path / "nowhere", {"x": x}, {}) == (0, 0)


def cut_short(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def overwritten(folder):
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[1000:1400] = bytes(400)                                  # within the tensor: torch itself would not notice
    file.write_bytes(content)


@pytest.mark.parametrize("damage, message", [
    (cut_short, "__0_0.distcp: missing, or not as it was written"),
    (overwritten, "__0_0.distcp: missing, or not as it was written"),
    (lambda folder: (folder / ".metadata").unlink(), ".metadata: missing, or not"),
    (lambda folder: (folder / "checkpoint.json").write_text(""), "checkpoint.json: not JSON"),
    (lambda folder: (folder / "checkpoint.json").write_text("7"), "checkpoint.json: holds int where dict is expected"),
    (lambda folder: (folder / "checkpoint.json").write_text("{}"), "checkpoint.json: no images"),
    (lambda folder: (folder / "checkpoint.json").write_bytes(b"\0" * 50), "checkpoint.json: not JSON")])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, capsys, damage, message):
    for images in (8, 16):
        save(tmp_path, images, {"x": torch.full((1000,), float(images))})
    damage(tmp_path / "checkpoints/16")
    x = torch.zeros(1000)
    assert checkpoint.resume(tmp_path, {"x": x}, {}) == (8, 8) and (x == 8).all()
    errors = capsys.readouterr().err
    assert errors.startswith("warning: ") and message in errors and len(errors.splitlines()) == 1
    damage(tmp_path / "checkpoints/8")
    with pytest.raises(InputError, match="no checkpoint is as it was written; to start again, delete the folder"):
        checkpoint.resume(tmp_path, {"x": x}, {})


def test_what_changed_is_named_where_it_changed():
    old = {"covered": {"sex": {"male": 2}, "edema": {"positive": 3}}, "grid": [8, 8]}
    assert checkpoint.difference("covered", old["covered"], old["covered"] | {"edema": {"positive": 4}}) \
        == "covered[edema][positive] = 3, not 4"
    assert checkpoint.difference("grid", old["grid"], [8, 16]) == "grid[1] = 8, not 16"
    assert checkpoint.difference("grid", old["grid"], [8]) == "grid = [8, 8], not [8]"
    assert checkpoint.difference("examples", [{"age": 3}], [{"sex": "male"}]) == "examples[0][age] = 3, not None"


def test_two_processes_write_about_half_each(tmp_path, monkeypatch):
    """Of tensors that both hold whole; together all of them."""
    tensors, shares = {str(size): torch.zeros(size) for size in (1000, 700, 400, 300, 200, 100, 1)}, []
    monkeypatch.setattr(checkpoint.parallel, "world", 2)
    for rank in (0, 1):
        monkeypatch.setattr(checkpoint.parallel, "rank", rank)
        shares.append(checkpoint.share_of_process(tensors))
    assert not shares[0].keys() & shares[1].keys() and shares[0].keys() | shares[1].keys() == tensors.keys()
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in shares]
    assert abs(sizes[0] - sizes[1]) <= 100


def test_what_is_not_finite_is_never_written(tmp_path, monkeypatch):
    """A finite loss with a NaN in the weights of the average: the run ends, and the checkpoint before stays the
    newest."""
    update = train.update_ema

    def spoil(ema, model, images_seen, *arguments):
        update(ema, model, images_seen, *arguments)
        if images_seen > 16:
            next(ema.parameters()).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(train, "update_ema", spoil)
    cfg = TrainConfig(images=64, batch=4, lr=1e-2, warmup=0, log_every=2, save_every=2)
    with pytest.raises(RunError, match="weights are not finite: stopped; the last good state is .*checkpoints/16"):
        job.seen_job(cfg, tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run").name == "16"
    assert [line["images"] for line in log_of(tmp_path / "run")] == [8, 16]


def test_checkpoints_come_as_often_as_asked_whatever_the_log_does(tmp_path):
    cfg = TrainConfig(images=100, batch=4, lr=1e-2, warmup=0, log_every=7, save_every=5, keep=10)
    job.seen_job(cfg, tmp_path / "run")
    assert [folder.name for folder in checkpoint.complete(tmp_path / "run")] == ["20", "40", "60", "80", "100"]


def test_export_is_the_ema_as_sample_reads_it(tmp_path):
    """Of a run of two processes, sharded, its blocks computed twice: nothing of that is left in the names."""
    cfg = TrainConfig(images=32, batch=8, lr=3e-3, warmup=0, ema=(50,), log_every=4, save_every=4)
    run, out = tmp_path / "run", tmp_path / "out"
    assert job.run(2, "radit", cfg, run, sharded=True, recomputed=True, preview=True) == [0, 0]
    assert (run / "preview.png").exists() and checkpoint.export(run, out)["images"] == 32
    model, decoder = sample.load_weights(out)
    assert decoder is None and sample.generate(model, None, [{"sex": "male"}], [0], steps=2)[0].isfinite().all()
    with safetensors.safe_open(out / "radit/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(radit.RadiT(model.config).state_dict())
    ema = {f"ema.{name}": torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    checkpoint.read(checkpoint.latest(run), ema)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ema[f"ema.{name}"].bfloat16().float())
    assert (out / "radit/model.safetensors").read_bytes() == (run / "weights/radit/model.safetensors").read_bytes()
    assert (out / "radit/config.json").read_bytes() == (run / "weights/radit/config.json").read_bytes()


def export_and_measure(run, out, pipe):
    torch.set_num_threads(1)
    save(run.with_name("small"), 8, {"ema.x": torch.zeros(2)})
    checkpoint.export(run.with_name("small"), out)                   # what is imported at the first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint.export(run, out)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


@pytest.mark.slow
def test_export_needs_less_memory_than_the_optimizer_state(tmp_path):
    """24 tensors of 4 MB: model and EMA have 96 MB each, the moments 192. Bfloat16 weights are held, twice while their
    file is written, and one tensor: 100 MB. The EMA in float32 and its file would make 192 already."""
    big = {f"{kind}.{i}": torch.randn(2 ** 20) for kind in ("model", "ema", "exp_avg", "exp_avg_sq") for i in range(24)}
    save(tmp_path / "run", 8, big)
    near, far = job.context.Pipe()
    process = job.context.Process(target=export_and_measure, args=(tmp_path / "run", tmp_path / "out", far))
    process.start()
    process.join()
    assert near.recv() < 144 * 2 ** 20
    exported = safetensors.torch.load_file(tmp_path / "out/radit/model.safetensors")
    assert set(exported) == {str(i) for i in range(24)} and torch.equal(exported["5"], big["ema.5"].bfloat16())


def test_export_refuses_in_one_line(command, tmp_path):
    status, _, errors = command("training", "export", tmp_path / "nothing", tmp_path / "out")
    assert status == 2 and "no complete checkpoint" in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    save(tmp_path / "run", 8, {"ema.decoder.conv.parametrizations.weight.0.A": torch.zeros(2)})
    with pytest.raises(InputError, match="this run trains adapters; .*weights/vae holds them beside their base"):
        checkpoint.export(tmp_path / "run", tmp_path / "out")
