"""The loop: exact resume after a kill, refusal of a non-finite loss, and phantoms sampled as asked, end to end."""
import json
import random
import sys
import time
import types

import job
import numpy as np
import phantom
import pytest
import torch
from conftest import ROOT
from job import log_of
from safetensors.torch import load_file

import data
import radit
import sample
import train
import vae
from autoencoder.load import load_vae
from common import cli, hub
from common.cli import InputError, RunError
from encoders import perceptual, raddino
from radiographs import fields
from training import checkpoint, log
from training.examples import Examples, synthetic_metadata
from training.options import TrainConfig
from training.randomness import RandomNumbers, batches


@pytest.fixture(scope="module")
def few_phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("few") / "phantom"
    phantom.write_source(root, 80)
    return root


def test_each_epoch_sees_every_image_once_wherever_it_starts():
    stream = batches(10, 4, seed=3, seen=0)
    indices = sum((next(stream) for _ in range(10)), [])             # 40 images: four epochs, batches across their ends
    for epoch in range(4):
        assert sorted(indices[epoch * 10:epoch * 10 + 10]) == list(range(10))
    assert indices[:10] != indices[10:20]
    resumed = batches(10, 4, seed=3, seen=12)
    assert sum((next(resumed) for _ in range(7)), []) == indices[12:]
    assert next(batches(10, 4, seed=4, seen=0)) != indices[:4]


def test_ema_against_the_recursion_by_hand():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    ema.weight.data.fill_(0.0)
    train.update_ema(ema, model, images_seen=10 ** 9, images_since=50, half_life=100)   # half a half-life
    assert ema.weight.item() == pytest.approx(1 - 0.5 ** 0.5)
    train.update_ema(ema, model, images_seen=20, images_since=50, half_life=100)        # early: half-life of one image
    assert ema.weight.item() == pytest.approx(1.0)


class Steady(torch.nn.Linear):
    """A task and a model whose weight grows by the same amount in every step."""
    name, flops, about, save = "steady", 1, {}, staticmethod(lambda ema, folder: None)

    def __init__(self):
        super().__init__(1, 1, bias=False)
        torch.nn.init.zeros_(self.weight)
        self.config = radit.RadiTConfig()

    def loss(self, model, batch, rng):
        return -model.weight.sum(), {}

    def measure(self, ema, micro):
        return {"held_out_loss": ema.weight.item()}


def test_averages_of_every_fourth_step_have_the_same_half_lives(tmp_path):
    """By hand, in float64: after steps 4, 8, 10 (a save), 12, 16, 20 (a save) and 22 (the end) each average moves
    towards the weight by 1 - 0.5^(images since / half-life), at most a twentieth of the images seen; so a run that is
    stopped in between, or extended, ends as one that was not."""
    cfg = dict(images=88, batch=4, lr=0.1, warmup=0, clip=1e6, ema=(2, 10 ** 9), log_every=1, save_every=10)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    model = Steady()
    train.train(model, model, data, TrainConfig(**cfg), tmp_path / "run")
    averages, before = [0.0, 0.0], 0
    for step in (4, 8, 10, 12, 16, 20, 22):
        for number, half_life in enumerate(cfg["ema"]):
            decay = 0.5 ** (4 * (step - before) / min(half_life, 4 * step / 20))
            averages[number] = decay * averages[number] + (1 - decay) * 0.1 * step
        before = step
    measured = log_of(tmp_path / "run")[-1]["held_out_loss_by_ema"]
    assert list(measured.values()) == pytest.approx(averages, rel=1e-4)
    assert 1e-3 < averages[0] - averages[1] < 1

STEPS = ["--batch", "4", "--log-every", "2", "--save-every", "4"]


def radit_options(phantoms, images, *more):
    return ["radit", "--data", phantoms, "--pixels", "--patch", "8", "--size", "XS", "--no-compile", *STEPS, "--images",
            images, *more]


def vae_options(phantoms, images, *more):
    return ["vae", "--data", phantoms, "--widths", "8,16", "--layers", "1", "--groups", "4", "--latent-channels", "2",
            *STEPS, "--images", images, *more]


@pytest.fixture
def tiny(monkeypatch):
    """train.py in this process with a tiny XS and without previews, which take longer than the steps."""
    monkeypatch.setitem(radit.SIZES, "XS", (64, 2, 2))
    monkeypatch.setattr(train.RadiTTask, "preview", lambda *arguments: None)
    monkeypatch.setattr(log, "plot_losses", lambda history, path: None)


@pytest.mark.parametrize("name, options", [("radit", radit_options), ("vae", vae_options)])
def test_a_killed_run_continues_with_the_same_losses(few_phantoms, tmp_path, name, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = options(few_phantoms, 96)
    assert job.run(0, "command", arguments, whole) == [0]
    process, = job.start(0, "command", arguments, killed)
    deadline = time.time() + 300
    while not checkpoint.latest(killed):                                         # at 16 images, there by 32
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert log_of(killed)[-1]["images"] < 96
    assert job.run(0, "command", arguments, killed) == [0]
    assert log_of(killed) == log_of(whole)                                       # every loss, bit for bit
    weights = f"weights/{name}/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()


def test_what_the_first_process_refuses_is_refused_by_all_processes(few_phantoms, tmp_path):
    """It alone reads the index, and no process waits for it in vain."""
    assert job.run(2, "command", radit_options(few_phantoms, 8, "--patch", "5"), tmp_path / "run") == [2, 2]
    assert job.run(2, "command", radit_options(tmp_path / "nowhere", 8), tmp_path / "run") == [2, 2]
    with cli.locked(tmp_path / "run"):
        assert job.run(2, "command", radit_options(few_phantoms, 8), tmp_path / "run") == [2, 2]


def test_another_configuration_does_not_resume(few_phantoms, tmp_path, command, tiny):
    status, output, _ = command("train.py", *radit_options(few_phantoms, 8), "--out", tmp_path / "run")
    assert status == 0 and "first step done after" in output and "min left" in output
    status, _, errors = command("train.py", *radit_options(few_phantoms, 8, "--seed", "1"), "--out", tmp_path / "run")
    assert status == 2 and "started with seed = 0, not 1" in errors


def test_corrected_labels_are_named_and_continue_by_a_flag(tmp_path, command, tiny):
    phantom.write_source(tmp_path / "phantom", 30)
    index, run = tmp_path / "phantom/index.csv", tmp_path / "run"
    assert command("train.py", *radit_options(tmp_path / "phantom", 8), "--out", run)[0] == 0
    rows = index.read_text().splitlines()
    place = next(i for i, row in enumerate(rows) if ",Female," in row and ",train," in row)
    rows[place] = rows[place].replace(",Female,", ",Male,")
    index.write_text("\n".join(rows))
    status, _, errors = command("train.py", *radit_options(tmp_path / "phantom", 16), "--out", run)
    assert status == 2 and "covered[sex][female] = " in errors and "--changed-labels" in errors
    assert command("train.py", *radit_options(tmp_path / "phantom", 16, "--changed-labels"), "--out", run)[0] == 0
    assert log_of(run)[-1]["images"] == 16


def test_saves_need_not_fall_on_lines_of_the_log(tmp_path):
    cfg = TrainConfig(images=100, batch=4, lr=0.01, log_every=7, save_every=5, keep=9)
    train.train(Fragile(99), Tiny(), torch.utils.data.TensorDataset(torch.zeros(8, 1)), cfg, tmp_path / "run")
    assert [folder.name for folder in checkpoint.complete(tmp_path / "run")] == ["20", "40", "60", "80", "100"]
    assert [line["images"] for line in log_of(tmp_path / "run")] == [20, 28, 40, 56, 60, 80, 84, 100]


def test_of_two_trainings_in_one_folder_the_second_is_refused(tmp_path, few_phantoms, command, tiny):
    with cli.locked(tmp_path / "run"):
        status, _, errors = command("train.py", *radit_options(few_phantoms, 8), "--out", tmp_path / "run")
    assert status == 2 and "another command is filling this folder" in errors and len(errors.splitlines()) == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_the_average_with_the_least_held_out_loss_becomes_the_weights(tmp_path, few_phantoms, command, tiny):
    run, out = tmp_path / "run", tmp_path / "out"
    options = radit_options(few_phantoms, 64, "--ema", "1,1000000", "--lr", "0.003", "--warmup", "0")
    assert command("train.py", *options, "--out", run)[0] == 0
    last = log_of(run)[-1]
    losses = last["held_out_loss_by_ema"]
    assert list(losses) == ["1", "1000000"] and losses["1"] != losses["1000000"]
    assert last["held_out_loss"] == min(losses.values())
    assert command("training", "export", run, out)[0] == 0
    assert (out / "radit/model.safetensors").read_bytes() == (run / "weights/radit/model.safetensors").read_bytes()
    other = max(losses, key=losses.get)
    assert f"half-life of {int(other):,}" in command("training", "export", run, out, "--ema", other)[1]
    assert (out / "radit/model.safetensors").read_bytes() != (run / "weights/radit/model.safetensors").read_bytes()
    status, _, errors = command("training", "export", run, out, "--ema", "5")
    assert status == 2 and "this run keeps the half-lives 1, 1000000" in errors


def test_what_is_published_holds_no_row_of_the_training_data(tmp_path, few_phantoms, command, tiny):
    """config.json's examples: like the training data in every field, and no row of it."""
    assert command("train.py", *radit_options(few_phantoms, 8), "--out", tmp_path / "run")[0] == 0
    examples = json.loads((tmp_path / "run/weights/radit/config.json").read_text())["examples"]
    records = data.Radiographs([few_phantoms], "train").records
    rows = [{field: record[field] for field in fields.FIELDS if field in record} for record in records]
    assert len(examples) == 64 and not [example for example in examples if example in rows]
    covered = fields.coverage(records)
    for example in examples:
        fields.check_covered(example, covered)
    ages = [example["age"] for example in examples]
    assert abs(np.mean(ages) - np.mean([row["age"] for row in rows])) < 15 and len(set(ages)) > 20


def test_examples_keep_to_the_values_of_their_data_set_and_to_the_label_policy():
    children = [{"dataset": "a", "age": float(age), "sex": sex, "no_finding": "positive"} for age in range(1, 5)
                for sex in ("male", "female")]
    adults = [{"dataset": "b", "age": float(age), "edema": edema, "no_finding": none}
              for age in range(50, 90) for edema, none in (("positive", "negative"), ("negative", "positive"))]
    for record in adults:
        record["view"] = "PA" if record["age"] % 2 else "AP"
    made = synthetic_metadata(children + adults, seed=3)
    assert made == synthetic_metadata(children + adults, seed=3) and len(made) == 64
    assert all(example["dataset"] == "b" for example in made)  # every combination of the children is a row of theirs
    assert not any(example.get("edema") == "positive" and example.get("no_finding") == "positive" for example in made)
    assert synthetic_metadata([{}], seed=0) == []


def test_the_learning_rate_falls_with_the_width(tmp_path, few_phantoms, command, monkeypatch):
    """A dry run says it, and writes nothing."""
    for size, rate in (("XS", "0.001"), ("S", "0.000667"), ("B", "0.00025")):
        status, output, _ = command("train.py", "radit", "--data", few_phantoms, "--pixels", "--patch", "8",
                                    "--size", size, "--dry-run", "--out", tmp_path / "run")
        assert status == 0 and f"learning rate {rate}," in output and "nothing was written" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, message", [
    (["--dry-run", "3"], "--batch 64 cannot be shared by 3 processes"), (["--patch", "5"], "--patch 5 does not divide"),
    (["--images", "0"], "'0' is not a whole number from 1 to")])
def test_a_dry_run_fails_where_the_run_would(tmp_path, few_phantoms, command, more, message):
    status, _, errors = command("train.py", "radit", "--data", few_phantoms, "--pixels", "--size", "XS", "--dry-run",
                                *more, "--out", tmp_path / "run")
    assert status == 2 and message in errors and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option, value", [
    ("--clip", "nan"), ("--clip", "0"), ("--lr", "inf"), ("--lr", "-1"), ("--shift", "-1"), ("--shift", "0"),
    ("--ema", "-5"), ("--ema", "5,,6"), ("--ema", ""), ("--warmup", "-1"), ("--images", "1e3"), ("--keep", "0"),
    ("--batch", "99999999999999999999"), ("--log-every", "0"), ("--seed", "-1"), ("--patch", "0"),
    ("--accumulate", "x"), ("--out", ""), ("--logger", "paper"), ("--prediction", "noise"), ("--dry-run", "0")])
def test_values_that_make_no_sense_are_refused(tmp_path, command, option, value):
    status, _, errors = command("train.py", "radit", "--data", "nowhere", "--pixels", "--out", tmp_path / "run", option,
                                value)
    assert status == 2 and option in errors and len(errors.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_either_prediction_for_either_space(tmp_path, few_phantoms, command, tiny, prediction):
    """Pixels here, latents in the test of caches: the option decides, sample.py follows the config."""
    assert command("train.py", *radit_options(few_phantoms, 8, "--prediction", prediction), "--out",
                   tmp_path / "run")[0] == 0
    model, _ = sample.load_weights(tmp_path / "run/weights")
    assert model.config.prediction == prediction
    assert sample.generate(model, None, [{"sex": "male"}], [0], steps=2)[0].isfinite().all()


def test_help_says_what_every_option_does(command):
    for name in ("radit", "vae"):
        _, output, _ = command("train.py", name, "--help")
        assert output.count("\n  python train.py") + output.count("\n  torchrun") >= 2
        assert "see TrainConfig" not in output and "largest norm of the gradient" in output


def test_a_dry_run_checks_and_writes_nothing(tmp_path, few_phantoms, command, tiny, monkeypatch):
    """Its memory is that of the plan, by the way of keeping activations that the options ask for."""
    monkeypatch.setattr(train.float8.importlib.util, "find_spec", lambda name: True)
    options, run = radit_options(few_phantoms, 16), tmp_path / "run"
    for more, way in (([], "eager"), (["--recompute"], "eager, recomputed"), (["--compile"], "compiled"),
                      (["--compile", "--recompute", "--fp8"], "compiled, recomputed, float8")):
        status, output, errors = command("train.py", *options, *more, "--dry-run", "2", "--out", run)
        assert status == 0, errors
        assert f", {way}\n" in output and "2 processes x 2 at a time x 1" in output and "all checks passed" in output
    status, _, errors = command("train.py", *options, "--dry-run", "3", "--out", run)
    assert status == 2 and "--batch 4 cannot be shared by 3 processes" in errors and len(errors.splitlines()) == 1
    assert not run.exists()


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path, few_phantoms, command, tiny):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")
    run = tmp_path / "run"
    assert command("train.py", *radit_options(few_phantoms, 16, "--logger", "tensorboard"), "--out", run)[0] == 0
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    for key in ("loss", "rate", "grad_norm"):
        assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(key)] \
            == [(line["images"], line[key]) for line in log_of(run)]
    assert [event.step for event in events.Scalars("held_out_loss")] == [16]


def test_wandb_gets_the_numbers_of_the_log(tmp_path, few_phantoms, command, tiny, monkeypatch):
    """A stand-in with wandb's two functions; the service itself cannot be asked here."""
    said = []
    run = types.SimpleNamespace(log=lambda numbers, step: said.append((step, numbers["loss"])))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: run, __spec__=sys.__spec__))
    assert command("train.py", *radit_options(few_phantoms, 16, "--logger", "wandb"), "--out", tmp_path / "run")[0] == 0
    assert said == [(line["images"], line["loss"]) for line in log_of(tmp_path / "run")]


def test_a_logger_that_is_not_installed_is_named(tmp_path, few_phantoms, command, monkeypatch):
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    status, _, errors = command("train.py", *radit_options(few_phantoms, 16, "--logger", "wandb"), "--out",
                                tmp_path / "run")
    assert status == 2 and "pip install wandb" in errors and not (tmp_path / "run").exists()


def test_the_log_holds_speed_rate_and_memory(tmp_path, few_phantoms, command, tiny):
    run = tmp_path / "run"
    assert command("train.py", *radit_options(few_phantoms, 16), "--out", run)[0] == 0
    line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    flops = 3 * radit.count_flops(hub.load_model(radit.RadiT, radit.RadiTConfig, run / "weights/radit").config)
    assert line["teraflops_per_second"] == pytest.approx(line["images_per_second"] * flops / 1e12)
    assert line["rate"] == pytest.approx(1e-3 * 256 / 64 * 16 / 20_000) and 0.1 < line["peak_memory_gb"] < 100


def test_a_long_interval_is_not_silent(tmp_path, monkeypatch, capsys):
    """With one line of the log in all, something is printed after the first step and then once a minute."""
    clock = iter(range(0, 10 ** 6, 25))  # seconds: 25 from one look at the clock to the next
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    cfg = TrainConfig(images=40, batch=4, lr=0.01, log_every=1000, save_every=1000)
    train.train(Fragile(99), Tiny(), torch.utils.data.TensorDataset(torch.zeros(8, 1)), cfg, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert "first step done" in lines[1] and sum("s a step" in line and "left" in line for line in lines) >= 2


def test_a_damaged_log_is_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    for text in ("{", "7", "[]", "\0"):
        (tmp_path / "run/log.jsonl").write_text(text)
        with pytest.raises(InputError, match="log.jsonl: damaged"):
            log.read_log(tmp_path / "run/log.jsonl", 0)


@pytest.mark.parametrize("arguments, message", [
    (["vae", "--widths", "8,12", "--groups", "8"],
     "widths is (8, 12); accepted: multiples of the groups of GroupNorm, 8"),
    (["vae", "--widths", "8,8,8,8,8,8", "--groups", "8"], "multiple of 64 pixels, not 32"),
    (["vae", "--batch", "0"], "'0' is not a whole number from 1 to"),
    (["radit", "--pixels", "--patch", "5"], "--patch 5 does not divide the images' side of 32 pixels"),
    (["radit", "--latents", "nowhere"], "--latents needs --vae"),
    (["radit", "--latents", "nowhere", "--vae", "nowhere"], "nowhere: no such folder; latents are made by"),
    (["radit", "--latents", "nowhere", "--vae", "nowhere", "--encoder", "here"],
     "--encoder here: the perceptual loss is of pixels; it needs --pixels"),
    (["radit", "--pixels", "--vae", "here"], "--vae here: with --pixels there is none"),
    (["radit", "--latents", "nowhere", "--vae", "here", "--patch", "2"], "--patch 2: a token is one cell of a latent"),
    (["radit", "--pixels", "--lora-alpha", "2"], "--lora-alpha 2 scales adapters; it needs --lora-rank"),
    (["vae", "--lora-alpha", "2"], "--lora-alpha 2 scales adapters; it needs --base"),
    (["vae", "--lora-rank", "2"], "--lora-rank 2: adapters change a trained VAE; name it with --base"),
    (["vae", "--perceptual-weight", "0"], "--perceptual-weight 0: no perceptual loss without --encoder"),
    (["radit", "--pixels", "--perceptual-weight", "1"], "--perceptual-weight 1: no perceptual loss without --encoder"),
    (["radit", "--pixels", "--encoder", "nowhere"], "nowhere: no such folder here"),
    (["radit"], "one of the arguments --latents --pixels is required"),
    (["radit", "--pixels", "--size", "M"], "XS, S, B")])
def test_bad_arguments_are_one_line_and_nothing_is_written(phantoms, tmp_path, command, arguments, message):
    status, _, errors = command("train.py", *arguments, "--data", phantoms, "--out", tmp_path / "run")
    assert status == 2 and message in errors.splitlines()[-1] and not (tmp_path / "run").exists()


class Fragile:
    """A task whose loss turns to NaN after `good` steps."""
    name, flops, about, save = "fragile", 1, {}, staticmethod(hub.save_model)

    def __init__(self, good):
        self.left = good

    def loss(self, model, batch, rng):
        self.left -= 1
        loss = model.weight.square().sum()
        return (loss if self.left >= 0 else loss * float("nan")), {}

    def measure(self, ema, micro):
        return {}


class Tiny(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        torch.nn.init.ones_(self.weight)
        self.config = radit.RadiTConfig()


def test_a_non_finite_loss_stops_and_the_last_good_state_stays(tmp_path):
    """NaN in the sixth step, checkpoints every second: what is on disk is the state after four good steps."""
    cfg = TrainConfig(images=64, batch=4, lr=0.1, warmup=0, log_every=2, save_every=2)
    with pytest.raises(RunError, match="the last good state is .*run/checkpoints/16"):
        train.train(Fragile(5), Tiny(), torch.utils.data.TensorDataset(torch.zeros(8, 1)), cfg, tmp_path / "run")
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(4):
        model.weight.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tensors = checkpoint.tensors_of(model, [model], optimizer)
    saved = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    checkpoint.read(tmp_path / "run/checkpoints/16", saved)
    assert torch.allclose(saved["model.weight"], model.weight, atol=1e-6)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert [line["images"] for line in log_of(tmp_path / "run")] == [8, 16]


def test_the_learning_rate_warms_up_and_cools_down(tmp_path):
    """AdamW's first steps move a constant gradient's weight by the rate itself."""
    moved = []

    class Watch(Fragile):
        def loss(self, model, batch, rng):
            moved.append(model.weight[0, 0].item())
            return model.weight.sum(), {}

    cfg = TrainConfig(images=40, batch=4, lr=0.1, warmup=16, cooldown=16, log_every=2)
    train.train(Watch(99), Tiny(), torch.utils.data.TensorDataset(torch.zeros(8, 1)), cfg, tmp_path / "run")
    rates = [a - b for a, b in zip(moved, moved[1:])]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05], abs=1e-3)


@pytest.mark.slow
def test_a_perceptual_term_teaches_and_measures(phantoms, tmp_path, command):
    encoder = ["--encoder", ROOT / "weights/demo/classifier"]
    for name, more in (("without", []), ("measured", [*encoder, "--perceptual-weight", "0"]), ("taught", encoder)):
        assert command("train.py", *vae_options(phantoms, 16, *more), "--out", tmp_path / name)[0] == 0
    without, measured, taught = (log_of(tmp_path / name) for name in ("without", "measured", "taught"))
    assert [line["loss"] for line in measured] == [line["loss"] for line in without]
    assert "held_out_fdd" not in without[-1]
    assert taught[0]["loss"] == pytest.approx(
        taught[0]["charbonnier"] + 0.1 * taught[0]["ssim"] + 3e-4 * taught[0]["kl"]
        + 250 / 768 * taught[0]["perceptual"], rel=1e-4)
    # What the log says of the held-out reconstructions, computed again from the saved weights.
    model, judge = load_vae(tmp_path / "taught/weights/vae"), raddino.load_encoder(ROOT / "weights/demo/classifier")
    x = torch.stack(list(data.Radiographs([phantoms], "valid"))[::3][:64])  # the images that train.py chose
    y = model.decode(model.encode(x)[0]).clamp(-1, 1)
    # the weights are stored in bfloat16
    assert taught[-1]["held_out_psnr"] == pytest.approx(vae.psnr(x, y).mean().item(), abs=0.1)
    assert taught[-1]["held_out_perceptual"] == pytest.approx(perceptual.perceptual_loss(judge, x, y).mean().item(),
                                                              rel=0.05)
    # Fréchet by another way: of centred features X, Y (n D) the trace of (S S')^1/2 is the nuclear norm of
    # X Y^T / (n - 1).
    a, b = (judge(perceptual.to_encoder_input(judge, z))[0].double() for z in (x, y))
    centred = [z - z.mean(0) for z in (a, b)]
    overlap = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc")
    spread = sum(z.square().sum() for z in centred) - 2 * overlap
    distance = (a.mean(0) - b.mean(0)).square().sum() + spread / (len(x) - 1)
    assert taught[-1]["held_out_fdd"] == pytest.approx(distance.item(), rel=0.05)


@pytest.mark.slow
def test_a_lora_is_trained_on_a_base(phantoms, tmp_path, command):
    """The base stays as it is, byte for byte; its latents stay valid; the adapted decoder reconstructs better."""
    base, run = tmp_path / "base/weights/vae", tmp_path / "run"
    assert command("train.py", *vae_options(phantoms, 400), "--out", tmp_path / "base")[0] == 0
    options = ["vae", "--data", phantoms, "--base", base, "--lora-rank", "4", "--batch", "8", "--log-every", "8",
               "--save-every", "80", "--images", "640", "--warmup", "64", "--out", run]
    status, output, _ = command("train.py", *options)
    assert status == 0
    adapted = run / "weights/vae"
    assert (adapted / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    tensors = load_file(adapted / "lora.safetensors")
    assert f"{sum(t.numel() for t in tensors.values()):,} trained parameters" in output
    before, after = load_vae(base), load_vae(adapted)
    assert after.fingerprint == before.fingerprint
    for a, b in zip([*before.encoder.parameters(), *before.bn.buffers()],
                    [*after.encoder.parameters(), *after.bn.buffers()]):
        assert torch.equal(a, b)
    x = torch.stack(list(data.Radiographs([phantoms], "valid")))
    better = [vae.psnr(x, model.decode(model.encode(x)[0])).mean() for model in (before, after)]
    assert better[1] > better[0] + 0.2
    status, _, errors = command("train.py", *options, "--lora-rank", "8")
    assert status == 2 and "this run was started with lora_rank = 4, not 8" in errors


def test_loss_by_t_adds_up(phantoms):
    records = data.Radiographs([phantoms], "train").records
    examples = Examples(records, (*fields.DATASETS, "phantom"))
    config = radit.RadiTConfig(channels=1, grid=(32, 32), patch=8, width=128, depth=1, heads=2, prediction="data",
                               datasets=(*fields.DATASETS, "phantom"))
    batch = [torch.stack(column) for column in zip(*(examples[i] for i in range(64)))]
    rng = RandomNumbers(torch.Generator().manual_seed(0), 64)
    loss, terms = train.RadiTTask(config, None, None).loss(radit.RadiT(config), batch, rng)
    sums, counts = terms["loss_by_t"]
    assert counts.sum() == 64 and (sums.sum() / 64).item() == pytest.approx(loss.item(), rel=1e-5)
    with pytest.raises(InputError, match="no latent for"):
        latents = types.SimpleNamespace(rows={}, folder="cache", shards=None)
        Examples(records, config.datasets, latents, ["phantom/images/0.png"] * len(records))


def test_coverage_by_hand():
    records = [{"age": 30.0, "sex": "male", "view": "PA"}, {"age": 70.0, "sex": "male"}, {"edema": "positive"}]
    assert fields.coverage(records) == {"sex": {"male": 2}, "view": {"PA": 1}, "edema": {"positive": 1},
                                        "age": [30.0, 70.0]}


def test_phantoms_are_drawn_as_asked(phantom_weights):
    """Heart, device, side and age are measured in the pictures."""
    model = hub.load_model(radit.RadiT, radit.RadiTConfig, phantom_weights / "radit")
    choose = random.Random(5)
    records = [phantom.random_record(choose) for _ in range(64)]
    images, _ = sample.generate(model, None, records, list(range(64)), steps=20, batch=64)
    seen = [phantom.measure((image[0].numpy() + 1) / 2) for image in images]
    large = np.array([r["cardiomegaly"] == "positive" for r in records])
    heart = np.array([m["heart"] for m in seen])
    assert abs(heart[large].mean() - 0.55) < 0.05 and abs(heart[~large].mean() - 0.25) < 0.05   # the rule's two widths
    assert ((heart > 0.4) == large).mean() > 0.95
    asked = [(r["support_devices"] == "positive" and r["sex"] == sex) for r in records for sex in ("female", "male")]
    found = [m[side] > 0.8 for m in seen for side in ("left", "right")]
    assert np.mean(np.array(asked) == np.array(found)) > 0.9  # present, and on its side
    body = np.array([0.28 + 0.002 * r["age"] for r in records])
    assert np.abs(body - [m["body"] for m in seen]).mean() < 0.03                               # of a range of 0.16
    # The same seed with one thing changed keeps the rest: the heart grows, the body stays.
    pair = [{"dataset": "phantom", "age": 50.0, "sex": "male", "support_devices": "negative", "cardiomegaly": value}
            for value in ("negative", "positive")]
    small, big = (phantom.measure((sample.generate(model, None, [r], [7], steps=20)[0][0, 0].numpy() + 1) / 2)
                  for r in pair)
    assert big["heart"] - small["heart"] > 0.15 and abs(big["body"] - small["body"]) < 0.05
