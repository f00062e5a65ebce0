"""Pixel space: at the paper's 512x512 tokens, the files of a run and sampling from them, with a model of one narrow
block; the perceptual loss on predicted pixels by hand."""
import json

import job
import numpy as np
import phantom
import pytest
import torch
import torch.nn.functional as F
from job import log_of
from PIL import Image
from test_loop import config, same

import radit
import sample
import train
from encoders import raddino
from radiographs import pixels
from training import log
from training.randomness import RandomNumbers, generator


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Phantoms of 512x512 pixels, a prepared source."""
    root = tmp_path_factory.mktemp("data") / "large"
    phantom.write_source(root, 10)
    for path in (root / "images").glob("*.png"):
        Image.open(path).resize((512, 512)).save(path)
    return root


@pytest.mark.parametrize("patch, tokens", [(16, 1024), (32, 256)])
def test_a_pixel_model_of_512_is_trained_saved_and_drawn_from(large, tmp_path, monkeypatch, patch, tokens):
    monkeypatch.setitem(radit.SIZES, "XS", (64, 1, 1))
    monkeypatch.setattr(train.RadiTTask, "preview", lambda *_: None)  # sixteen in 25 steps take too long here
    run = tmp_path / "run"
    call(monkeypatch, train, "radit", "--data", large, "--pixels", "--patch", patch, "--size", "XS", "--images", 8,
         "--batch", 4, "--log-every", 1, "--save-every", 2, "--no-compile", "--out", run)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert [path.name for path in (run / "weights").iterdir()] == ["radit"]          # no vae/
    model, decoder = sample.load_weights(run / "weights")
    assert decoder is None and model.config.prediction == "data" and model.config.grid == (512, 512) \
        and model.config.tokens == tokens
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape))
    images, evaluations = sample.generate(model, decoder, [{"age": 60.0}] * 2, [0, 1], steps=2, solver="euler")
    assert images.shape == (2, 1, 512, 512) and images.abs().max() <= 1 and evaluations == 2
    assert seen == [(4, tokens, 64)] * 2                             # both branches of guidance
    call(monkeypatch, sample, "--weights", run / "weights", "--n", 2, "--steps", 2, "--solver", "euler",
         "--age", 60, "--out", tmp_path / "out")
    for i in range(2):
        path = tmp_path / f"out/images/000{i}.png"
        assert Image.open(path).size == (512, 512) and Image.open(path).text["Synthetic"] == "yes"
        assert torch.allclose(images[i], pixels.load_image(path), atol=0.005)    # bytes


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_the_perceptual_term_by_hand(encoder, prediction):
    """Cosines of the encoder's last layer; its gradient reaches no image with t < 0.3."""
    judge, rng = raddino.load_encoder(encoder), torch.Generator().manual_seed(0)
    images, output = (torch.rand(16, 1, 32, 32, generator=rng) * 2 - 1 for _ in range(2))
    output.requires_grad_()
    batch = [images, torch.full_like(images, -200.0), torch.full((16,), 50.0), torch.ones(16, 18, dtype=torch.long)]
    settings, seen = radit.RadiTConfig(channels=1, grid=(32, 32), patch=8, prediction=prediction), []

    def model(x, t, age, codes):
        seen.append((x, t))
        return output

    losses = []
    for more in ((), (None, None, judge, 0.7)):                      # without an encoder, and with one
        numbers = RandomNumbers(generator(torch.device("cpu"), 0, 0), 16, slice(0, 16))
        losses.append(train.RadiTTask(settings, None, None, *more).loss(model, batch, numbers))
    (x, t), (again, _) = seen
    assert torch.equal(x, again) and 0 < (t < 0.3).sum() < 16
    predicted = output if prediction == "data" else x + (1 - t).view(-1, 1, 1, 1) * output
    a, b = (judge.hidden_states(judge.normalise(image))[-1] for image in (images, predicted))
    distance = (2 - 2 * F.cosine_similarity(a, b, dim=2)).mean(1)    # N
    expected = sum(d for d, time in zip(distance, t) if time >= 0.3) / 16
    (plain, _), (whole, terms) = losses
    assert terms["perceptual"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert (whole - plain).item() == pytest.approx(0.7 * expected.item(), rel=1e-4)
    gradient, = torch.autograd.grad(whole - plain, output, retain_graph=True)
    by_hand, = torch.autograd.grad(0.7 * expected, output)
    largest = gradient.abs().amax((1, 2, 3))
    assert largest[t < 0.3].max() < 1e-9 < 1e-6 < largest[t >= 0.3].min()
    torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-8)


def test_the_encoder_is_neither_trained_nor_saved(tmp_path, encoder, monkeypatch):
    monkeypatch.setitem(radit.SIZES, "XS", (64, 1, 1))
    monkeypatch.setattr(train.RadiTTask, "preview", lambda *_: None)
    monkeypatch.setattr(log, "plot_losses", lambda history, path: None)
    phantom.write_source(tmp_path / "phantom", 20)
    loaded, load = [], raddino.load_encoder
    monkeypatch.setattr(raddino, "load_encoder", lambda folder: loaded.append(load(folder)) or loaded[-1])
    for name, more in (("without", []), ("with", ["--encoder", encoder, "--perceptual-weight", 50])):
        call(monkeypatch, train, "radit", "--data", tmp_path / "phantom", "--pixels", "--patch", 8, "--size", "XS",
             "--images", 16, "--batch", 8, "--log-every", 1, "--save-every", 1, "--no-compile", *more,
             "--out", tmp_path / name)
    for name, tensor in load(encoder).state_dict().items():
        assert torch.equal(tensor, loaded[0].state_dict()[name]), name
    a, b = (sample.load_weights(tmp_path / name / "weights")[0].state_dict() for name in ("without", "with"))
    assert a.keys() == b.keys() and any(not torch.equal(a[name], b[name]) for name in a)
    logs = [log_of(tmp_path / name) for name in ("without", "with")]
    assert "perceptual" not in logs[0][0] and logs[1][0]["loss"] == pytest.approx(
        logs[0][0]["loss"] + 50 * logs[1][0]["perceptual"], rel=1e-5)    # the same noise, times and weights


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"sharded": True}], ids=["ddp", "fsdp"])
def test_the_perceptual_term_does_not_depend_on_the_layout(tmp_path, encoder, layout):
    for name, world in (("one", 0), ("two", 2)):
        layout = layout if world else {}
        assert set(job.run(world, "radit", config(images=64, save_every=8), tmp_path / name, encoder=encoder,
                           **layout)) == {0}
    same(tmp_path / "two", tmp_path / "one", 1e-4)
    assert "perceptual" in log_of(tmp_path / "one")[0]
