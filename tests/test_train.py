"""The loop: exact resume after a kill, refusal of a non-finite loss, and phantoms drawn as asked, end to end."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import phantom
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import data
import radit
import sample
import train
import vae
from autoencoder.load import load_vae
from common import hub
from common.cli import InputError
from encoders import perceptual, raddino
from radiographs import fields
from training import checkpoint


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_each_epoch_sees_every_image_once_wherever_it_starts():
    stream = train.batches(10, 4, seed=3, seen=0)
    indices = sum((next(stream) for _ in range(10)), [])             # 40 images: four epochs, batches across their ends
    for epoch in range(4):
        assert sorted(indices[epoch * 10:epoch * 10 + 10]) == list(range(10))
    assert indices[:10] != indices[10:20]
    resumed = train.batches(10, 4, seed=3, seen=12)
    assert sum((next(resumed) for _ in range(7)), []) == indices[12:]
    assert next(train.batches(10, 4, seed=4, seen=0)) != indices[:4]


def test_ema_against_the_recursion_by_hand():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    ema.weight.data.fill_(0.0)
    train.update_ema(ema, model, images_seen=10 ** 9, batch=50, half_life=100)   # half a half-life
    assert ema.weight.item() == pytest.approx(1 - 0.5 ** 0.5)
    train.update_ema(ema, model, images_seen=20, batch=50, half_life=100)        # early: half-life of one image
    assert ema.weight.item() == pytest.approx(1.0)


def radit_command(phantoms, out, images, *more):
    return [sys.executable, str(ROOT / "train.py"), "radit", "--data", str(phantoms), "--pixels", "--patch", "8", "--size", "XS",
            "--batch", "4", "--log-every", "2", "--save-every", "4", "--images", str(images), "--out", str(out), "--no-compile", *more]


def vae_command(phantoms, out, images, *more):
    return [sys.executable, str(ROOT / "train.py"), "vae", "--data", str(phantoms), "--widths", "8,16", "--layers", "1", "--groups",
            "4", "--latent-channels", "2", "--batch", "4", "--log-every", "2", "--save-every", "4", "--images", str(images),
            "--out", str(out), *more]


@pytest.mark.parametrize("name, make", [("radit", radit_command), ("vae", vae_command)])
def test_a_killed_run_continues_with_the_same_losses(phantoms, tmp_path, name, make):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(make(phantoms, whole, 96), check=True, capture_output=True)
    process = subprocess.Popen(make(phantoms, killed, 96), stdout=subprocess.PIPE)
    deadline = time.time() + 300
    while not (killed / "log.jsonl").exists() or len(log_of(killed)) < 3:        # past the checkpoint at 16, before 96
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = log_of(killed)
    assert 24 <= first[-1]["images"] < 96
    output = subprocess.run(make(phantoms, killed, 96), check=True, capture_output=True, text=True).stdout
    assert "starting at 0 seen" not in output
    assert log_of(killed) == log_of(whole)                                       # every loss, bit for bit
    assert (killed / f"weights/{name}/model.safetensors").read_bytes() == (whole / f"weights/{name}/model.safetensors").read_bytes()


def test_another_configuration_does_not_resume(phantoms, tmp_path):
    subprocess.run(radit_command(phantoms, tmp_path / "run", 8), check=True, capture_output=True)
    done = subprocess.run(radit_command(phantoms, tmp_path / "run", 8, "--seed", "1"), capture_output=True, text=True)
    assert done.returncode == 2 and "started with seed = 0, not 1" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["vae", "--widths", "8,12", "--groups", "8"], "widths (8, 12) are not all multiples of the 8 groups"),
    (["vae", "--widths", "8,8,8,8,8,8", "--groups", "8"], "multiple of 64 pixels, not 32"),
    (["vae", "--batch", "0"], "0 is not a whole number above 0"),
    (["radit", "--pixels", "--patch", "5"], "--patch 5 does not divide the images' side of 32 pixels"),
    (["radit", "--latents", "nowhere"], "--latents needs --vae"),
    (["radit", "--latents", "nowhere", "--vae", "nowhere"], "nowhere: no latents.json"),
    (["radit"], "one of the arguments --latents --pixels is required"), (["radit", "--pixels", "--size", "M"], "'XS', 'S', 'B'")])
def test_bad_arguments_are_one_line_and_nothing_is_written(phantoms, tmp_path, command, arguments, message):
    status, _, errors = command("train.py", *arguments, "--data", phantoms, "--out", tmp_path / "run")
    assert status == 2 and message in errors.splitlines()[-1] and not (tmp_path / "run").exists()


class Fragile:
    """A task whose loss turns to NaN after `good` steps."""
    name, flops, about, save = "fragile", 1, {}, staticmethod(hub.save_model)

    def __init__(self, good):
        self.left = good

    def loss(self, model, batch, draw):
        self.left -= 1
        loss = model.weight.square().sum()
        return (loss if self.left >= 0 else loss * float("nan")), {}

    def preview(self, ema, path):
        return {}


class Tiny(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        torch.nn.init.ones_(self.weight)
        self.config = radit.RadiTConfig()


def test_a_non_finite_loss_stops_and_the_last_good_state_stays(tmp_path):
    """NaN in the sixth step, checkpoints every second: what is on disk is the state after four good steps."""
    cfg = train.TrainConfig(images=64, batch=4, lr=0.1, warmup=0, log_every=2, save_every=2)
    with pytest.raises(SystemExit, match="the last good state is .*run/checkpoints/16"):
        train.train(Fragile(5), Tiny(), torch.utils.data.TensorDataset(torch.zeros(8, 1)), cfg, tmp_path / "run")
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(4):
        model.weight.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tensors = checkpoint.tensors_of(model, model, optimizer)
    saved = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    assert checkpoint.load(tmp_path / "run/checkpoints/16", saved, {}) == 16
    assert torch.allclose(saved["model.weight"], model.weight, atol=1e-6)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert [line["images"] for line in log_of(tmp_path / "run")] == [8, 16]


def test_the_learning_rate_warms_up_and_cools_down(tmp_path):
    """AdamW's first steps move a constant gradient's weight by the rate itself."""
    moved = []

    class Watch(Fragile):
        def loss(self, model, batch, draw):
            moved.append(model.weight[0, 0].item())
            return model.weight.sum(), {}

    cfg = train.TrainConfig(images=40, batch=4, lr=0.1, warmup=16, cooldown=16, log_every=2)
    train.train(Watch(99), Tiny(), torch.utils.data.TensorDataset(torch.zeros(8, 1)), cfg, tmp_path / "run")
    rates = [a - b for a, b in zip(moved, moved[1:])]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05], abs=1e-3)


def test_a_perceptual_term_teaches_and_measures(phantoms, tmp_path):
    encoder = ["--encoder", str(ROOT / "weights/demo/classifier")]
    for name, more in (("without", []), ("measured", [*encoder, "--perceptual-weight", "0"]), ("taught", encoder)):
        subprocess.run(vae_command(phantoms, tmp_path / name, 16, *more), check=True, capture_output=True)
    without, measured, taught = (log_of(tmp_path / name) for name in ("without", "measured", "taught"))
    assert [line["loss"] for line in measured] == [line["loss"] for line in without] and "held_out_fdd" not in without[-1]
    assert taught[0]["loss"] == pytest.approx(
        taught[0]["charbonnier"] + 0.1 * taught[0]["ssim"] + 3e-4 * taught[0]["kl"] + 250 / 768 * taught[0]["perceptual"], rel=1e-4)
    # What the log says of the held-out reconstructions, computed again from the saved weights.
    model, judge = load_vae(tmp_path / "taught/weights/vae"), raddino.load_encoder(ROOT / "weights/demo/classifier")
    x = torch.stack(list(data.Radiographs([phantoms], "valid"))[::3][:64])                  # the images that train.py chose
    y = model.decode(model.encode(x)[0]).clamp(-1, 1)
    assert taught[-1]["held_out_psnr"] == pytest.approx(vae.psnr(x, y).mean().item(), abs=0.1)       # the weights are stored in bfloat16
    assert taught[-1]["held_out_perceptual"] == pytest.approx(perceptual.perceptual_loss(judge, x, y).mean().item(), rel=0.05)
    # Fréchet by another way: of centred features X, Y (n D) the trace of (S S')^1/2 is the nuclear norm of X Y^T / (n - 1).
    a, b = (judge(perceptual.to_encoder_input(judge, z))[0].double() for z in (x, y))
    centred = [z - z.mean(0) for z in (a, b)]
    overlap = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc")
    spread = sum(z.square().sum() for z in centred) - 2 * overlap
    assert taught[-1]["held_out_fdd"] == pytest.approx(((a.mean(0) - b.mean(0)).square().sum() + spread / (len(x) - 1)).item(), rel=0.05)


def test_a_lora_is_trained_on_a_base(phantoms, tmp_path):
    """The base stays as it is, byte for byte; its latents stay valid; the adapted decoder reconstructs better."""
    base, run = tmp_path / "base/weights/vae", tmp_path / "run"
    subprocess.run(vae_command(phantoms, tmp_path / "base", 400), check=True, capture_output=True)
    lora_command = [sys.executable, str(ROOT / "train.py"), "vae", "--data", str(phantoms), "--base", str(base), "--lora-rank", "4", "--batch",
                    "8", "--log-every", "8", "--save-every", "8", "--images", "640", "--warmup", "64", "--out", str(run)]
    output = subprocess.run(lora_command, check=True, capture_output=True, text=True).stdout
    adapted = run / "weights/vae"
    assert (adapted / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    tensors = load_file(adapted / "lora.safetensors")
    assert f"{sum(t.numel() for t in tensors.values()):,} trained parameters" in output
    before, after = load_vae(base), load_vae(adapted)
    assert after.fingerprint == before.fingerprint
    for a, b in zip([*before.encoder.parameters(), *before.bn.buffers()], [*after.encoder.parameters(), *after.bn.buffers()]):
        assert torch.equal(a, b)
    x = torch.stack(list(data.Radiographs([phantoms], "valid")))
    better = [vae.psnr(x, model.decode(model.encode(x)[0])).mean() for model in (before, after)]
    assert better[1] > better[0] + 0.2
    done = subprocess.run([*lora_command, "--lora-rank", "8"], capture_output=True, text=True)
    assert done.returncode == 2 and "this run was started with lora_rank = 4, not 8" in done.stderr


def test_loss_by_t_adds_up(phantoms):
    images = data.Radiographs([phantoms], "train")
    examples = train.Examples(images, None, (*fields.DATASETS, "phantom"))
    config = radit.RadiTConfig(channels=1, grid=(32, 32), patch=8, width=128, depth=1, heads=2, prediction="data",
                               datasets=(*fields.DATASETS, "phantom"))
    batch = [torch.stack(column) for column in zip(*(examples[i] for i in range(64)))]
    draw = train.Draw(torch.Generator().manual_seed(0), 64)
    loss, terms = train.RadiTTask(config, None, None).loss(radit.RadiT(config), batch, draw)
    sums, counts = terms["loss_by_t"]
    assert counts.sum() == 64 and (sums.sum() / 64).item() == pytest.approx(loss.item(), rel=1e-5)
    with pytest.raises(InputError, match="no latent for"):
        latents = type("Empty", (), {"rows": {}, "folder": "cache"})()
        train.Examples(images, latents, config.datasets)


def test_coverage_by_hand():
    records = [{"age": 30.0, "sex": "male", "view": "PA"}, {"age": 70.0, "sex": "male"}, {"edema": "positive"}]
    assert fields.coverage(records) == {"sex": {"male": 2}, "view": {"PA": 1}, "edema": {"positive": 1}, "age": [30.0, 70.0]}


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
    assert np.mean(np.array(asked) == np.array(found)) > 0.9                                    # present, and on its side
    body = np.array([0.28 + 0.002 * r["age"] for r in records])
    assert np.abs(body - [m["body"] for m in seen]).mean() < 0.03                               # of a range of 0.16
    # The same seed with one thing changed keeps the rest: the heart grows, the body stays.
    pair = [{"dataset": "phantom", "age": 50.0, "sex": "male", "support_devices": "negative", "cardiomegaly": value}
            for value in ("negative", "positive")]
    small, big = (phantom.measure((sample.generate(model, None, [r], [7], steps=20)[0][0, 0].numpy() + 1) / 2) for r in pair)
    assert big["heart"] - small["heart"] > 0.15 and abs(big["body"] - small["body"]) < 0.05
