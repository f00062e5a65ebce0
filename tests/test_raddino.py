"""The encoder beside transformers' Dinov2Model and its image processor, with the same random weights, and written out
by hand where transformers is missing."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from common.cli import InputError
from encoders import raddino

CONFIG = raddino.EncoderConfig(width=96, depth=3, heads=3, patch=14, image_size=70)
DINOV2_BASE = raddino.EncoderConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, crop=224)


def randomise(model, seed=0):
    """Every tensor random, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model.eval()


def peer(config=CONFIG, seed=0):
    """transformers' model of that shape, with random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return randomise(transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        patch_size=config.patch, image_size=config.image_size, num_channels=config.channels,
        mlp_ratio=config.mlp_ratio, layer_norm_eps=1e-6)), seed)


def published_name(name):
    """Our tensor name in the spelling of the published file."""
    name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
    name = re.sub(r"^(cls_token|mask_token)", r"embeddings.\1", name)
    name = name.replace("positions", "embeddings.position_embeddings").replace("blocks.", "encoder.layer.")
    name = name.replace("patches.", "embeddings.patch_embeddings.projection.")
    name = re.sub(r"scale([12])", r"layer_scale\1.lambda1", name)
    name = re.sub(r"attention\.(q|k|v)\.", lambda m: "attention.attention." + {"q": "query.", "k": "key.",
                                                                              "v": "value."}[m[1]], name)
    return re.sub(r"\.(fc[12])", r".mlp.\1", name.replace("attention.out", "attention.output.dense"))


def write_ours(folder, config=CONFIG, processor=None):
    """A folder as Microsoft publishes it, of random weights; returns them."""
    return write(folder, randomise(raddino.Encoder(config)), config, published_name, processor)


def processor_file(config):
    """The preprocessor_config.json of that encoder, with the keys that microsoft/rad-dino's and facebook/dinov2-base's
    have in common."""
    mean, std = ([x] * 3 if isinstance(x, float) else list(x) for x in (config.mean, config.std))
    return {"crop_size": {"height": config.crop, "width": config.crop}, "do_center_crop": True, "do_convert_rgb": True,
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": mean, "image_std": std,
            "image_processor_type": "BitImageProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": config.resize}}


def transformers_4(name):
    """transformers 5's tensor name in the spelling of the published file."""
    words = {"q": "query", "k": "key", "v": "value"}
    name = re.sub(r"attention\.(q|k|v)_proj", lambda m: "attention.attention." + words[m[1]], name)
    return name.replace("attention.o_proj", "attention.output.dense")


def write(folder, model, config=CONFIG, spelling=lambda name: name, processor=None):
    folder.mkdir(parents=True, exist_ok=True)
    state = {spelling(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "dinov2", "hidden_size": config.width, "num_hidden_layers": config.depth,
        "patch_size": config.patch, "num_attention_heads": config.heads, "image_size": config.image_size,
        "num_channels": 3, "mlp_ratio": config.mlp_ratio}))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return state


def test_one_block_by_hand(tmp_path):
    """What the docstring says, from the tensors of a published file, in NumPy, without a module of torch."""
    config = raddino.EncoderConfig(width=12, depth=1, heads=2, patch=4, image_size=8)
    state = {name: tensor.double().numpy() for name, tensor in write_ours(tmp_path, config).items()}
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def linear(tokens, name):
        return tokens @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(tokens, name):
        centred = tokens - tokens.mean(1, keepdims=True)
        return centred / np.sqrt(centred.var(1, keepdims=True) + 1e-6) * state[name + ".weight"] + state[name + ".bias"]

    patches = [x[0, :, i:i + 4, j:j + 4].double().numpy().ravel() for i in (0, 4) for j in (0, 4)]
    projection = "embeddings.patch_embeddings.projection"
    patches = np.array(patches) @ state[projection + ".weight"].reshape(12, -1).T + state[projection + ".bias"]
    h = np.concatenate([state["embeddings.cls_token"][0], patches]) + state["embeddings.position_embeddings"][0]
    block = "encoder.layer.0."
    q, k, v = (linear(norm(h, block + "norm1"), f"{block}attention.attention.{name}")
               for name in ("query", "key", "value"))
    heads = []
    for part in (slice(0, 6), slice(6, 12)):
        weights = np.exp(q[:, part] @ k[:, part].T / 6 ** 0.5)
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    attended = linear(np.concatenate(heads, 1), block + "attention.output.dense")
    a = h + state[block + "layer_scale1.lambda1"] * attended
    hidden = linear(norm(a, block + "norm2"), block + "mlp.fc1")
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2 ** 0.5))
    h = norm(a + state[block + "layer_scale2.lambda1"] * linear(hidden, block + "mlp.fc2"), "layernorm")
    cls, rest = raddino.load_encoder(tmp_path)(x)
    np.testing.assert_allclose(cls[0].numpy(), h[0], atol=1e-5)
    np.testing.assert_allclose(rest[0].numpy(), h[1:], atol=1e-5)


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
    with torch.device("meta"):
        encoder = raddino.Encoder(raddino.EncoderConfig())
    assert len(encoder.state_dict()) == 223 and sum(p.numel() for p in encoder.parameters()) == 86_580_480


@pytest.mark.parametrize("config", [raddino.EncoderConfig(depth=1), raddino.EncoderConfig(width=48)],
                         ids=["one block", "narrow"])
def test_the_published_shape_beside_transformers(config):
    """All of it but for twelve blocks of full width, which would take this test half a minute."""
    theirs, ours = peer(config), raddino.Encoder(config).eval()
    state = theirs.state_dict()
    ours.load_state_dict({raddino.our_name(transformers_4(name)): tensor for name, tensor in state.items()})
    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for state, other in zip(ours.hidden_states(x), theirs(x, output_hidden_states=True).hidden_states, strict=True):
            torch.testing.assert_close(state, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x)[0], theirs(x).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(518, 518), (300, 300), (640, 500), (513, 777)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_preprocessing_as_published(size, mode):
    bit = pytest.importorskip("transformers.models.bit.image_processing_pil_bit",
                              reason="transformers is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    for config in (raddino.EncoderConfig(), DINOV2_BASE):
        expected = bit.BitImageProcessorPil(**processor_file(config))(image.convert("RGB"), return_tensors="pt")
        torch.testing.assert_close(raddino.preprocess(image, config), expected["pixel_values"][0], atol=1e-5, rtol=1e-5)


def test_preprocessing_by_hand():
    """What needs no resampling: the middle of the image, channel by channel, in units of the standard deviation."""
    config = raddino.EncoderConfig(12, 1, 2, 4, 8, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.2], resize=8, crop=4)
    grey = np.random.default_rng(0).integers(0, 256, (8, 10), dtype=np.uint8)
    ready = raddino.preprocess(Image.fromarray(grey), config)
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 0.2))):
        np.testing.assert_allclose(ready[channel].numpy(), (grey[2:6, 3:7] / 255 - mean) / std, atol=1e-6)
    x = torch.from_numpy(grey.astype(np.float32))[None, None] / 127.5 - 1
    torch.testing.assert_close(raddino.Encoder(config).normalise(x)[0, :, 2:6, 3:7], ready, atol=1e-5, rtol=1e-5)


def test_the_processor_is_read_beside_the_weights(tmp_path):
    """Two models of one shape are fed differently, and what is not Rad-DINO is said to be so."""
    small = {"width": 96, "depth": 3, "heads": 3, "patch": 14, "image_size": 70}
    for name, config in (("raddino", raddino.EncoderConfig(**small)), ("base", raddino.EncoderConfig(
            **small, mean=DINOV2_BASE.mean, std=DINOV2_BASE.std, resize=64, crop=56))):
        write_ours(tmp_path / name, config, processor_file(config))
        assert raddino.load_encoder(tmp_path / name).config == config
    write_ours(tmp_path / "bare")
    assert raddino.load_encoder(tmp_path / "bare").config == CONFIG


def test_what_is_not_raddino_is_said():
    def why(config, folder):
        encoder = raddino.Encoder(raddino.EncoderConfig(12, 1, 2, 4, 8))
        encoder.config = config
        return raddino.why_not_raddino(encoder, folder)
    text = why(DINOV2_BASE, Path("facebook/dinov2-base"))
    assert "mean (0.485, 0.456, 0.406) (Rad-DINO: 0.5307)" in text and "crop 224 (Rad-DINO: 518)" in text
    assert "width 96 (Rad-DINO: 768)" in why(CONFIG, Path("weights"))
    assert "no preprocessor_config.json" in why(raddino.EncoderConfig(), Path("nowhere"))


def test_only_microsoft_raddino_is_taken_for_it_in_silence(tmp_path, monkeypatch):
    encoder = raddino.Encoder(raddino.EncoderConfig(12, 1, 2, 4, 8))
    encoder.config = raddino.EncoderConfig()
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert "not checked" in raddino.why_not_raddino(encoder, tmp_path)
    monkeypatch.setattr(raddino.hub, "find", lambda *_: tmp_path)
    assert raddino.why_not_raddino(encoder, Path("microsoft/rad-dino")) == ""


@pytest.mark.parametrize("change, message", [
    ({"size": {"height": 70, "width": 70}}, "needed are size"),
    ({"crop_size": {"height": 70, "width": 60}}, "a square crop_size"),
    ({"do_center_crop": False}, "do_center_crop is False; accepted is True"),
    ({"resample": 2}, "resample is 2; accepted is 3"),
    ({"image_std": [0, 0, 0]}, r"std \(0, 0, 0\) is not"),
    ({"image_mean": ["a"]}, "mean .* is not a number from 0 to 1"),
    ({"rescale_factor": 1}, "rescale_factor 1/255"), ({"crop_size": 99}, "the crop into the resized image"),
    ({"size": {"shortest_edge": 10 ** 9}}, "resize is 1000000000; accepted: a whole number")])
def test_a_processor_that_is_not_read_is_refused(tmp_path, change, message):
    write_ours(tmp_path, processor=processor_file(CONFIG) | change)
    with pytest.raises(InputError, match=message):
        raddino.load_encoder(tmp_path)


@pytest.mark.parametrize("change", [
    {"width": 0}, {"heads": 0}, {"heads": 5}, {"channels": -1}, {"depth": 10 ** 7}, {"std": 0.0},
    {"mean": float("nan")}, {"patch": 2.0}, {"image_size": 7}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(InputError, match="accepted|is not|must"):
        raddino.EncoderConfig(**{"width": 96, "heads": 3} | change)


def test_16_bits_are_read_at_8_as_the_processor_does():
    grey = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    torch.testing.assert_close(raddino.preprocess(deep, CONFIG), raddino.preprocess(Image.fromarray(grey), CONFIG))


def test_normalise_agrees_with_the_processor():
    grey = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    x = torch.from_numpy(grey.astype(np.float32))[None, None] / 127.5 - 1
    ready = raddino.preprocess(Image.fromarray(grey), CONFIG)
    torch.testing.assert_close(raddino.Encoder(CONFIG).normalise(x)[0], ready, atol=1e-5, rtol=1e-5)


def test_only_the_kept_patches_are_seen():
    encoder = raddino.Encoder(CONFIG).eval()
    x = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([[3, 7, 0], [24, 1, 2]])
    changed = x.clone()
    changed[0, :, -14:, -14:] += 1                                   # patch 24: only the second image keeps it
    changed[1, :, 14:28, :14] += 1                                   # patch 5: neither does
    torch.testing.assert_close(encoder(x, keep), encoder(changed, keep))
    changed[1, :, -14:, -14:] += 1
    assert not torch.allclose(encoder(x, keep)[0][1], encoder(changed, keep)[0][1])
    everything = torch.arange(25).expand(2, -1)
    torch.testing.assert_close(encoder(x, everything), encoder(x))


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("layernorm.bias"), "Missing key.*norm.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
    (lambda s: s.update({"layernorm.bias": torch.zeros(5)}), "size mismatch for norm.bias"),
    (lambda s: s["layernorm.bias"].fill_(torch.nan), "not finite")])
def test_loading_is_strict(tmp_path, damage, message):
    state = write_ours(tmp_path)
    damage(state)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        raddino.load_encoder(tmp_path)


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(InputError, match="an encoder is a folder with config.json"):
        raddino.load_encoder(tmp_path)
    write_ours(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="model_type 'vit' is not dinov2"):
        raddino.load_encoder(tmp_path)
