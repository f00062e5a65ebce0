"""The encoder beside transformers' Dinov2Model and its image processor, with the same random weights."""
import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import \
    BitImageProcessorPil

from common.cli import InputError
from encoders import raddino

CONFIG = raddino.EncoderConfig(width=96, depth=3, heads=3, patch=14, image_size=70)


def peer(config=CONFIG, seed=0):
    """transformers' model of that shape; every tensor random, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
                                     patch_size=config.patch, image_size=config.image_size, num_channels=config.channels,
                                     mlp_ratio=config.mlp_ratio, layer_norm_eps=1e-6)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def transformers_4(name):
    """transformers 5's tensor name in the spelling of the published file."""
    name = re.sub(r"attention\.(q|k|v)_proj", lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]], name)
    return name.replace("attention.o_proj", "attention.output.dense")


def write(folder, model, config=CONFIG, spelling=lambda name: name):
    folder.mkdir(parents=True, exist_ok=True)
    state = {spelling(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "dinov2", "hidden_size": config.width, "num_hidden_layers": config.depth, "patch_size": config.patch,
        "num_attention_heads": config.heads, "image_size": config.image_size, "num_channels": 3, "mlp_ratio": config.mlp_ratio}))
    return state


@pytest.mark.parametrize("spelling", [lambda name: name, transformers_4], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("size", [(70, 70), (56, 98), (75, 83)])
def test_equal_to_transformers(tmp_path, spelling, size):
    theirs = peer()
    names = write(tmp_path, theirs, spelling=spelling)
    assert any("attention.attention.query" in name for name in names) == (spelling is transformers_4)
    ours = raddino.load_encoder(tmp_path)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(a, output_hidden_states=True)
    states = ours.hidden_states(b)
    assert len(states) == len(expected.hidden_states) == CONFIG.depth + 1
    for state, other in zip(states, expected.hidden_states):
        torch.testing.assert_close(state, other, atol=1e-5, rtol=1e-5)
    cls, patches = ours(b)
    torch.testing.assert_close(cls, expected.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=1e-5)
    weight = torch.randn(cls.shape, generator=torch.Generator().manual_seed(2))
    (expected.pooler_output * weight).sum().backward()
    (cls * weight).sum().backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4)


def test_the_published_shape():
    config = raddino.EncoderConfig()
    theirs, ours = peer(config), raddino.Encoder(config).eval()
    state = theirs.state_dict()
    assert len(state) == 223 and sum(p.numel() for p in ours.parameters()) == 86_580_480
    ours.load_state_dict({raddino.our_name(transformers_4(name)): tensor for name, tensor in state.items()})
    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for state, other in zip(ours.hidden_states(x), theirs(x, output_hidden_states=True).hidden_states):
            torch.testing.assert_close(state, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x)[0], theirs(x).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(518, 518), (300, 300), (640, 500), (513, 777)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_preprocessing_as_published(size, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    processor = BitImageProcessorPil(size={"shortest_edge": 518}, crop_size={"height": 518, "width": 518},
                                     image_mean=[0.5307] * 3, image_std=[0.2583] * 3)
    expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(raddino.preprocess(image, raddino.EncoderConfig()), expected, atol=1e-5, rtol=1e-5)


def test_16_bits_are_read_at_8_as_the_processor_does():
    grey = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    torch.testing.assert_close(raddino.preprocess(deep, CONFIG), raddino.preprocess(Image.fromarray(grey), CONFIG))


def test_normalise_agrees_with_the_processor():
    grey = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    x = torch.from_numpy(grey.astype(np.float32))[None, None] / 127.5 - 1
    torch.testing.assert_close(raddino.Encoder(CONFIG).normalise(x)[0], raddino.preprocess(Image.fromarray(grey), CONFIG),
                               atol=1e-5, rtol=1e-5)


def test_only_the_kept_patches_are_seen():
    encoder = raddino.Encoder(CONFIG).eval()
    x = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([[3, 7, 0], [24, 1, 2]])
    changed = x.clone()
    changed[0, :, -14:, -14:] += 1                                   # patch 24: the second image keeps it, the first does not
    changed[1, :, 14:28, :14] += 1                                   # patch 5: neither does
    torch.testing.assert_close(encoder(x, keep), encoder(changed, keep))
    changed[1, :, -14:, -14:] += 1
    assert not torch.allclose(encoder(x, keep)[0][1], encoder(changed, keep)[0][1])
    everything = torch.arange(25).expand(2, -1)
    torch.testing.assert_close(encoder(x, everything), encoder(x))


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("layernorm.bias"), "Missing key.*norm.bias"), (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
    (lambda s: s.update({"layernorm.bias": torch.zeros(5)}), "size mismatch for norm.bias")])
def test_loading_is_strict(tmp_path, damage, message):
    state = write(tmp_path, peer())
    damage(state)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        raddino.load_encoder(tmp_path)


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(InputError, match="an encoder is a folder with config.json"):
        raddino.load_encoder(tmp_path)
    write(tmp_path, peer())
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="model_type 'vit' is not dinov2"):
        raddino.load_encoder(tmp_path)
