import json
import math

import phantom
import pytest
import torch
import torch.nn.functional as F

import radit
import sample
from baselines import radunet
from baselines.radunet import Block, RadUNet, RadUNetConfig
from common import hub
from common.cli import InputError

SMALL = dict(channels=3, grid=(8, 12), width=64, multiples=(1, 2), blocks=1, attending=1)


def small(seed=0, **changes):
    """A small model whose zeros at the start are filled, so that everything has an influence."""
    torch.manual_seed(seed)
    model = RadUNet(RadUNetConfig(**SMALL | changes)).double()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(n=4, seed=1):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (n, 18), generator=rng)
    age = torch.tensor([30.0, math.nan, 70.0, 5.0])[:n].double()
    return torch.randn(n, 3, 8, 12, generator=rng).double(), torch.rand(n, generator=rng).double(), age, codes


def test_it_starts_as_zero_and_every_parameter_learns():
    torch.manual_seed(0)
    model = RadUNet(RadUNetConfig(**SMALL))
    x, t, age, codes = (a.float() if a.is_floating_point() else a for a in inputs())
    assert not model(x, t, age, codes).any()
    model = small()
    x, t, age, codes = inputs()
    codes[0], codes[1] = 1, 2                                        # every table's rows are seen
    model(x, t, age, codes).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_an_image_does_not_depend_on_its_batch():
    model, (x, t, age, codes) = small(), inputs()
    together = model(x, t, age, codes)
    for i in range(4):
        assert torch.allclose(model(x[i:i + 1], t[i:i + 1], age[i:i + 1], codes[i:i + 1])[0], together[i], atol=1e-12)


def test_time_and_every_field_have_an_influence():
    model, (x, t, age, codes) = small(), inputs(1)
    before = model(x, t, age, codes)
    assert not torch.allclose(model(x, t / 2, age, codes), before)
    assert not torch.allclose(model(x, t, age + 10, codes), before)
    for column in range(18):
        other = codes.clone()
        other[0, column] = (codes[0, column] + 1) % 3
        assert not torch.allclose(model(x, t, age, other), before), column


def test_a_block_is_the_equation():
    """Written out with torch.nn.functional, and attention as torch.nn.MultiheadAttention with the weights copied."""
    torch.manual_seed(0)
    block = Block(64, 128, 32, attends=True).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.ones_(block.attention.q_norm.weight)
    torch.nn.init.ones_(block.attention.k_norm.weight)
    x, c = torch.randn(2, 64, 4, 6).double(), torch.randn(2, 32).double()
    h = F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    modulation = c @ block.modulation.weight.T + block.modulation.bias
    shift, scale = modulation[:, :128, None, None], modulation[:, 128:, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, 32) * (1 + scale) + shift), block.conv2.weight, block.conv2.bias, padding=1)
    h = h + F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    a = block.attention
    tokens = F.group_norm(h, 32, a.norm.weight, a.norm.bias).flatten(2).mT                   # n cells w
    q, k, v = (tokens @ a.qkv.weight[:, :, 0, 0].T + a.qkv.bias).chunk(3, -1)
    heads = []
    for part in range(2):
        channels = slice(64 * part, 64 * part + 64)
        a1, a2 = (side[..., channels] for side in (q, k))
        a1, a2 = (side / (side.square().mean(-1, keepdim=True) + 1e-6).sqrt() for side in (a1, a2))  # RMSNorm
        heads.append((a1 @ a2.mT / 8).softmax(-1) @ v[..., channels])
    out = torch.cat(heads, -1) @ a.out.weight[:, :, 0, 0].T + a.out.bias
    expected = h + out.mT.reshape(h.shape)
    assert torch.allclose(block(x, c), expected, atol=1e-10)


def test_a_residual_block_equals_diffusers():
    resnet = pytest.importorskip("diffusers.models.resnet", reason="diffusers is not installed")
    torch.manual_seed(0)
    peer = resnet.ResnetBlock2D(in_channels=64, out_channels=128, temb_channels=32, groups=32, eps=1e-5,
                                time_embedding_norm="scale_shift").double()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.ones_(peer.norm2.weight)                           # ours has none: the modulation stands in
    torch.nn.init.zeros_(peer.norm2.bias)
    block = Block(64, 128, 32, attends=False).double()
    scale, shift = peer.time_emb_proj.weight.chunk(2), peer.time_emb_proj.bias.chunk(2)
    block.load_state_dict({
        "norm1.weight": peer.norm1.weight, "norm1.bias": peer.norm1.bias, "conv1.weight": peer.conv1.weight,
        "conv1.bias": peer.conv1.bias, "conv2.weight": peer.conv2.weight, "conv2.bias": peer.conv2.bias,
        "shortcut.weight": peer.conv_shortcut.weight, "shortcut.bias": peer.conv_shortcut.bias,
        "modulation.weight": torch.cat([scale[1], scale[0]]), "modulation.bias": torch.cat([shift[1], shift[0]])})
    x, c = torch.randn(2, 64, 4, 6).double(), torch.randn(2, 32).double()
    assert torch.allclose(block(x, F.silu(c)), peer(x, c), atol=1e-10)


@pytest.mark.parametrize("patch, multiples, blocks", [(1, (1, 2), 2), (2, (1, 2, 2), 1), (4, (1,), 3)])
def test_any_structure_keeps_the_shape(patch, multiples, blocks):
    config = RadUNetConfig(channels=2, grid=(16, 32), patch=patch, width=64, multiples=multiples, blocks=blocks)
    with torch.device("meta"):
        model = RadUNet(config)
        out = model(torch.zeros(2, 2, 16, 32), torch.zeros(2), torch.zeros(2), torch.zeros(2, 18, dtype=torch.long))
    assert out.shape == (2, 2, 16, 32)
    assert len(model.blocks) == (2 * blocks + 1) * len(multiples) + 2


def test_a_pixel_grid_is_cut_into_patches_at_their_place():
    """With convolutions of 1x1 influence only, a patch of the output depends on no other patch of the input."""
    config = RadUNetConfig(channels=1, grid=(16, 16), patch=4, width=64, multiples=(1,), blocks=1, attending=0)
    model = RadUNet(config).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if parameter.ndim == 4 and parameter.shape[-1] == 3:         # 3x3 kernels: keep the centre alone
            centre = torch.zeros_like(parameter)
            centre[:, :, 1, 1] = parameter.detach()[:, :, 1, 1]
            parameter.data.copy_(centre)
    for module in model.modules():                                   # statistics over the image would couple patches
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
        if isinstance(module, radunet.Attention):
            module.forward = lambda x: x
    x = torch.randn(1, 1, 16, 16).double()
    t, age, codes = torch.zeros(1).double(), torch.zeros(1).double(), torch.zeros(1, 18, dtype=torch.long)
    other = x.clone()
    other[..., 4:8, 8:12] += 1
    moved = (model(x, t, age, codes) - model(other, t, age, codes)).abs()[0, 0] > 1e-9
    assert moved[4:8, 8:12].all() and moved.sum() == 16


def test_sizes_are_the_papers():
    sizes = {}
    for name, shape in (("B", {}), ("M", {"channels": 1, "grid": (512, 512), "patch": 8})):
        width, multiples, blocks, attending = radunet.SIZES[name]
        sizes[name] = radunet.count_parameters(RadUNetConfig(width=width, multiples=multiples, blocks=blocks,
                                                             attending=attending, **shape))
    assert round(sizes["B"] / 1e8) == 5 and round(sizes["M"] / 1e8) == 3


def test_flops_are_those_of_the_convolutions():
    """One level, no attention: every product counted by hand."""
    config = RadUNetConfig(channels=4, grid=(8, 8), width=64, multiples=(1,), blocks=1, attending=0)
    w, D, cells = 64, 256, 64
    def conv(a, b, k=9):
        return 2 * a * b * k * cells
    embedding = 2 * 2 * (256 * D + D * D)                            # of the time, and of the age
    block = 2 * conv(w, w) + 2 * D * 2 * w
    wide = conv(2 * w, w) + conv(w, w) + conv(2 * w, w, 1) + 2 * D * 2 * w
    middle = 2 * block + conv(w, 3 * w, 1) + 2 * 2 * cells * cells * w + conv(w, w, 1)
    assert radunet.count_flops(config) == embedding + conv(4, w) + block + middle + 2 * wide + conv(w, 4)


@pytest.mark.parametrize("changes, message", [
    ({"width": 100}, "width 100 is not a multiple of 64"), ({"width": 0}, "width 0"),
    ({"grid": (8, 7)}, "not a multiple of 2"), ({"patch": 0}, "patches of 0"),
    ({"shift": float("nan")}, "shift is nan"), ({"prediction": "x"}, "prediction is 'x'"),
    ({"vae": None}, "vae is None"),
    ({"covered": {"sex": 1}}, "covered is"), ({"width": 10 ** 20}, "width is 1"), ({"blocks": "1"}, "blocks is '1'"),
    ({"multiples": [0]}, "multiples is"), ({"grid": 8}, "grid is 8"), ({"attending": -1}, "attending is -1")])
def test_a_wrong_structure_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        RadUNetConfig(**SMALL | changes)


def test_metadata_is_embedded_as_in_radit():
    """The same modules, so that unknown is one null a field here too."""
    model = small()
    assert type(model.metadata) is radit.MetadataEmbedding and type(model.time) is radit.ScalarEmbedding


def test_it_is_sampled_by_the_same_command(tmp_path):
    """Pixels, random weights: the same image in any batch, other metadata another image, named after its own
    weights."""
    torch.manual_seed(0)
    config = RadUNetConfig(channels=1, grid=(16, 16), patch=2, width=64, multiples=(1,), blocks=1, attending=0,
                           prediction="data", covered={"sex": {"female": 1, "male": 1}})
    model = RadUNet(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hub.save_model(model, tmp_path / "radunet", torch.float32)
    model, vae = sample.load_weights(tmp_path)
    assert type(model) is RadUNet and vae is None
    records = [{"sex": "male"}, {"sex": "female"}, {"sex": "male"}]
    images, _ = sample.generate(model, vae, records, [0, 0, 1], steps=3)
    alone, _ = sample.generate(model, vae, records[1:2], [0], steps=3)
    assert images.shape == (3, 1, 16, 16) and torch.allclose(images[1], alone[0], atol=1e-5)
    assert not torch.allclose(images[0], images[1], atol=1e-3)
    assert sample.provenance(tmp_path)["fingerprint"] == hub.fingerprint(tmp_path / "radunet")


@pytest.mark.slow
def test_it_is_trained_by_the_same_command(command, tmp_path):
    """Phantoms in pixels: the loss falls, and what is saved is sampled from as it is. Sizes and options that it does
    not have are refused."""
    phantom.write_source(tmp_path / "data", 40)
    radit_command = ["train.py", "radit", "--model", "radunet", "--data", tmp_path / "data", "--pixels", "--patch", 4,
                     "--no-compile", "--batch", 8, "--log-every", 4, "--save-every", 8, "--out", tmp_path / "run"]
    status, _, errors = command(*radit_command, "--size", "XS", "--images", 128, "--warmup", 16)
    assert status == 0, errors
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    model, _ = sample.load_weights(tmp_path / "run/weights")
    assert type(model) is RadUNet and model.config.grid == (32, 32) \
        and model.config.covered["dataset"] == {"phantom": 36}


@pytest.mark.parametrize("more, message", [
    (["--size", "XL"], "radunet has the sizes XS, S, M, B"), (["--dry-run"], "--dry-run works for RadiT only"),
    (["--init", "weights/demo"], "--init works for RadiT only"),
    (["--optimizer", "muon"], "--optimizer muon works for RadiT only")])
def test_what_it_does_not_have_is_refused(command, tmp_path, more, message):
    phantom.write_source(tmp_path / "data", 12)
    status, _, errors = command("train.py", "radit", "--model", "radunet", "--data", tmp_path / "data", "--pixels",
                                "--out", tmp_path / "run", *more)
    assert status == 2 and message in errors and errors.count("\n") == 1
