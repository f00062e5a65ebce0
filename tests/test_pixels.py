"""Pixel space at the paper's 512x512: tokens, the files of a run, and drawing from them, with a model of one narrow
block."""
import json

import numpy as np
import phantom
import pytest
import torch
from PIL import Image

import radit
import sample
import train
from radiographs import pixels


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
    images, evaluations = sample.generate(model, decoder, [{"age": 60.0}] * 2, [0, 1], steps=2)
    assert images.shape == (2, 1, 512, 512) and images.abs().max() <= 1 and evaluations == 2
    assert seen == [(4, tokens, 64)] * 2                             # both branches of guidance
    call(monkeypatch, sample, "--weights", run / "weights", "--n", 2, "--steps", 2, "--age", 60,
         "--out", tmp_path / "out")
    for i in range(2):
        path = tmp_path / f"out/images/000{i}.png"
        assert Image.open(path).size == (512, 512) and Image.open(path).text["Synthetic"] == "yes"
        assert torch.allclose(images[i], pixels.load_image(path), atol=0.005)    # bytes
