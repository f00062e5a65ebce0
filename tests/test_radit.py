import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import radit
import sample
from common import cli
from radiographs import fields
from radit import RadiT, RadiTConfig

SMALL = RadiTConfig(channels=4, grid=(6, 4), patch=2, width=128, depth=2, heads=2)


def randomised(config, seed=0):
    """A model whose every parameter is random, as adaLN-Zero's are not at the start."""
    torch.manual_seed(seed)
    model = RadiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def inputs(config, count=3):
    torch.manual_seed(1)
    age, codes = fields.encode_metadata([{"age": 50.0, "sex": "male", "view": "PA"}, {"edema": "positive"}, {}][:count])
    return torch.randn(count, config.channels, *config.grid), torch.rand(count), age, codes


def test_sizes_are_what_they_say():
    configs = {name: RadiTConfig(width=w, depth=d, heads=h) for name, (w, d, h) in radit.SIZES.items()}
    count = {name: radit.count_parameters(config) for name, config in configs.items()}
    assert count["XL"] > 1.3e9 and round(count["XL"] / 1e9, 1) == 1.3
    assert round(count["B"] / 1e9, 1) == 0.3
    assert sorted(count, key=count.get) == ["XS", "S", "B", "L", "XL"]
    for width, _, heads in radit.SIZES.values():
        assert width % 128 == 0 and width // heads in (64, 128)
    # SwiGLU's width: 8/3 D rounded up, to 64 below a width of 512 and to 128 above; what a config says stays.
    assert [RadiTConfig(width=w, heads=2).hidden for w in (256, 384, 1024, 1536)] == [704, 1024, 2816, 4096]
    assert RadiTConfig(width=256, hidden=768).hidden == 768


@pytest.mark.parametrize("config", [SMALL, RadiTConfig(width=256, depth=3, heads=4), RadiTConfig(
    channels=1, grid=(64, 64), patch=16, width=128, depth=2, heads=1, datasets=(*fields.DATASETS, "own"))])
def test_parameters_and_flops_are_those_of_the_built_model(config):
    model = RadiT(config)
    assert sum(p.numel() for p in model.parameters()) == radit.count_parameters(config)
    x = torch.randn(1, config.channels, *config.grid)
    age, codes = fields.encode_metadata([{"age": 60.0}])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.rand(1), age, codes)
    assert radit.count_flops(config) == counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.rand(1), age, codes).sum().backward()
    # The input needs no gradient, so its layer's backward costs one product instead of two.
    saved = 2 * config.tokens * config.channels * config.patch ** 2 * config.width + 2 * 2 * 256 * config.width
    assert counter.get_total_flops() == 3 * radit.count_flops(config) - saved


def test_xl_parameters_on_the_meta_device():
    width, depth, heads = radit.SIZES["XL"]
    config = RadiTConfig(width=width, depth=depth, heads=heads)
    with torch.device("meta"):
        model = RadiT(config)
    assert sum(p.numel() for p in model.parameters()) == radit.count_parameters(config)


def test_starts_at_zero_output_and_identity_blocks():
    model = RadiT(SMALL)
    x, t, age, codes = inputs(SMALL)
    assert torch.equal(model(x, t, age, codes), torch.zeros_like(x))
    tokens, c = torch.randn(2, 6, 128), torch.randn(2, 128)
    assert torch.equal(model.blocks[0](tokens, c, torch.ones(6, 1, 32), torch.zeros(6, 1, 32)), tokens)


def test_block_against_a_direct_computation():
    """One block, written out token by token and head by head in float64."""
    block = radit.Block(width=128, heads=2, hidden=384).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, c = torch.randn(1, 6, 128, dtype=torch.float64), torch.randn(1, 128, dtype=torch.float64)
    angles = radit.rope_angles(3, 2, 64, "cpu").double()

    def rms(v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    shift1, scale1, gate1, shift2, scale2, gate2 = (block.adaln.weight @ c[0] + block.adaln.bias).split(128)
    h = rms(x[0]) * (1 + scale1) + shift1
    q, k, v = (h @ block.qkv.weight.T).split(128, -1)
    heads = []
    for head in range(2):
        part = slice(head * 64, head * 64 + 64)

        def turned(u, norm):
            u = rms(u[:, part]) * norm.weight
            z = torch.complex(u[:, :32], u[:, 32:]) * torch.polar(torch.ones_like(angles), angles)  # a rotation
            return torch.cat([z.real, z.imag], -1)

        scores = turned(q, block.q_norm) @ turned(k, block.k_norm).T / math.sqrt(64)
        heads.append(scores.softmax(-1) @ v[:, part])
    y = x[0] + gate1 * (torch.cat(heads, -1) @ block.out.weight.T)
    gate, value = ((rms(y) * (1 + scale2) + shift2) @ block.up.weight.T).split(384, -1)
    y = y + gate2 * ((gate * gate.sigmoid() * value) @ block.down.weight.T)
    assert torch.allclose(block(x, c, angles.cos()[:, None], angles.sin()[:, None])[0], y, atol=1e-9)


def test_rope_scores_depend_on_the_offset_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 64).double()
    angles = radit.rope_angles(5, 5, 64, "cpu").double().view(5, 5, 32)

    def score(a, b):
        turned = radit.rotate(q, angles[a].cos(), angles[a].sin()), radit.rotate(k, angles[b].cos(), angles[b].sin())
        return (turned[0] * turned[1]).sum()

    assert score((0, 0), (1, 2)) == pytest.approx(score((3, 2), (4, 4)).item(), abs=1e-5)
    assert abs(score((0, 0), (1, 2)) - score((0, 0), (2, 1))) > 1e-3  # rows and columns are told apart


@pytest.mark.parametrize("channels, grid, patch",
                         [(1, (32, 48), 8), (3, (16, 16), 4), (128, (4, 4), 1), (32, (3, 5), 1)])
def test_any_channels_and_grid(channels, grid, patch):
    config = dataclasses.replace(SMALL, channels=channels, grid=grid, patch=patch)
    x, t, age, codes = inputs(config)
    assert randomised(config)(x, t, age, codes).shape == x.shape


def test_patches_keep_their_place():
    """With the blocks idle, output patch (r, c) depends on input patch (r, c) alone."""
    model = RadiT(SMALL)
    torch.nn.init.normal_(model.final.weight)
    x, t, age, codes = inputs(SMALL, 1)
    base = model(x, t, age, codes)
    moved = x.clone()
    moved[0, :, 2:4, 0:2] += 1
    changed = (model(moved, t, age, codes) != base)[0].any(0)
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected[2:4, 0:2] = True
    assert torch.equal(changed, expected)


def test_each_field_has_its_own_null_and_images_do_not_mix():
    model = randomised(SMALL)
    x, t, age, codes = inputs(SMALL)
    base = model(x, t, age, codes)
    for column in range(codes.shape[1]):
        other = codes.clone()
        other[0, column] = 1 if other[0, column] == 0 else 0
        out = model(x, t, age, other)
        assert not torch.allclose(out[0], base[0], atol=1e-6), fields.CODED[column]
        assert torch.allclose(out[1:], base[1:], atol=1e-5)
    unknown = age.clone()
    unknown[0] = math.nan
    assert not torch.allclose(model(x, t, unknown, codes)[0], base[0], atol=1e-6)
    nulls = [model.metadata.age_unknown, *(table.weight[0] for table in model.metadata.tables.values())]
    null = model.metadata(torch.tensor([math.nan]), torch.zeros(1, 18, dtype=torch.long))[0]
    assert len(nulls) == 19 and torch.allclose(null, sum(nulls), atol=1e-6)


def test_age_is_continuous():
    model = randomised(SMALL)
    codes = torch.zeros(3, 18, dtype=torch.long)
    a, b, c = model.metadata(torch.tensor([50.0, 50.5, 80.0]), codes)
    assert 0 < (a - b).norm() < 0.2 * (a - c).norm()


def test_gradients_reach_every_parameter():
    model = randomised(SMALL).train()
    x, t, age, codes = inputs(SMALL)
    codes = torch.arange(18).remainder(2).add(1).expand(3, 18).clone()
    codes[1] = 0
    model(x, t, age, codes).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dropout_rates():
    count = 20_000
    age, codes = torch.full((count,), 40.0), torch.ones(count, 18, dtype=torch.long)
    random = torch.rand(count, 22, generator=torch.Generator().manual_seed(0))
    new_age, new_codes = radit.drop_metadata(age, codes, random)
    dropped = torch.cat([new_age.isnan()[:, None], new_codes == 0], 1).float()      # N 19
    # P(all) = 0.1 + 0.9 * 0.5 * E[u^19] = 0.1225;  P(one field) = 0.1 + 0.9 * 0.5 * E[u] = 0.325
    assert (dropped.sum(1) == 19).float().mean().item() == pytest.approx(0.1225, abs=0.01)
    assert dropped.mean(0).tolist() == pytest.approx([0.325] * 19, abs=0.015)
    assert (dropped.sum(1) == 0).float().mean().item() == pytest.approx(0.45 + 0.9 * 0.5 / 20, abs=0.015)


BASE = dataclasses.asdict(RadiTConfig())


@pytest.mark.parametrize("name, values, accepted", [
    ("channels", [0, -1, 1.0, "4", True, None, 10 ** 20], "whole number from 1"),
    ("patch", [0, -16, 2.5], "whole number from 1"), ("width", [0, -64, "wide", 10 ** 20], "whole number from 1"),
    ("heads", [0, 3, 512, math.nan], "whole number from 1|4 x heads divides"),
    ("depth", [-1, 10 ** 7, 1e7, []], "whole number from 0"), ("hidden", [-1, 10 ** 9], "whole number from 0"),
    ("grid", [[32], [32, 0], [32, 32, 32], "32", 32, [8, 8.0], None, [10 ** 7, 8]], "list of 2 whole numbers"),
    ("prediction", ["x", "", None, [], 1], "'velocity' or 'data'"),
    ("shift", [math.nan, math.inf, 0, -1, "1", True], "number from 0.01 to 100"),
    ("datasets", [[], "MIMIC", ["a", "a"], [""], [1], None], "different names"),
    ("covered", [[], None, "x"], "type dict"), ("examples", [{}, "x", 3], "type list"),
    ("pairs", [[], None], "type dict"),
    ("covered", [{"sex": ["male"]}, {"sex": {"male": -1}}, {"sex": {"x": 1}}, {"weight": {"9": 1}}, {"age": [9]},
                 {"age": [9, 3]}, {"age": [0, math.nan]}, {"age": [0, 10 ** 400]}, {"dataset": None}],
     "counts of its values"),
    ("pairs", [{"sex=male": 1}, {"sex=male": {"view=PA": "x"}}], "counts of other values"),
    ("examples", [[{"sex": "x"}], [{"age": math.inf}], [{"race": []}], [{"weight": 9}], [["sex"]]],
     "a list of records"),
    ("vae", [None, 5, []], "type str")])
def test_every_field_of_a_config_is_checked(name, values, accepted):
    for value in values:
        with pytest.raises(cli.InputError, match=accepted) as caught:
            RadiTConfig(**BASE | {name: value})
        message = str(caught.value)
        assert message.startswith(f"{name} is ") and repr(value).strip("[]")[:10] in message and "\n" not in message


def test_a_grid_is_made_of_whole_patches():
    assert RadiTConfig(grid=[32, 48], patch=16).tokens == 6
    with pytest.raises(cli.InputError, match=r"grid is \(32, 40\); accepted: two multiples of the patch, 16"):
        RadiTConfig(grid=[32, 40], patch=16)


def test_weights_stored_in_bfloat16_sample_the_same_to_the_bit():
    config = dataclasses.replace(SMALL, channels=1, patch=2)
    model, records = randomised(config), [{"age": 50.0, "view": "PA"}, {"edema": "positive"}]
    pictures = sample.generate(model, None, records, [0, 1], steps=3, bf16=True)[0]
    full = sample.generate(model, None, records, [0, 1], steps=3, bf16=False)[0]
    sample.store_bf16(model)
    assert model.blocks[0].qkv.weight.dtype == torch.bfloat16 and model.metadata.age_unknown.dtype == torch.float32
    assert torch.equal(sample.generate(model, None, records, [0, 1], steps=3, bf16=True)[0], pictures)
    assert not torch.equal(full, pictures)
