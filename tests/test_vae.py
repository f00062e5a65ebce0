import json
import pickle

import job
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import data
import radit
import sample
import vae
from autoencoder import latents
from autoencoder.load import copy_vae, load_vae
from common import cli, hub
from encoders import raddino
from encoders.perceptual import perceptual_loss
from radiographs import pixels
from radiographs.index import COLUMNS, index_row
from vae import RadVAE, VAEConfig

SMALL = VAEConfig(channels=1, latent_channels=4, widths=(8, 16, 16, 16), layers=1, groups=4)


def randomised(config, seed=0):
    """Random weights and running statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    model = RadVAE(config).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


def test_flux2_parameter_count():
    with torch.device("meta"):
        model = RadVAE(VAEConfig(channels=3))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["encoder"] == 34_421_696 and count["decoder"] == 49_619_203
    assert sum(count.values()) == 84_046_115 and len(model.state_dict()) == 251


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    """diffusers' class at FLUX.2's size with random weights and statistics, and the folder that it wrote."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    peer = diffusers.AutoencoderKLFlux2().eval().requires_grad_(False)
    peer.bn.running_mean.normal_()
    peer.bn.running_var.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("flux2")
    peer.save_pretrained(folder / "vae")
    return peer, folder


@torch.no_grad()
def test_equals_diffusers_flux2(flux2):
    """The same weights through encode, patchify, normalise and back, and grey images as three equal channels."""
    peer, folder = flux2
    ours = load_vae(folder)
    tensors = safetensors.torch.load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    assert len(tensors) == 251 and sum(p.numel() for p in ours.parameters()) == 84_046_115
    x = torch.rand(2, 1, 64, 48) * 2 - 1
    posterior = peer.encode(x.repeat(1, 3, 1, 1)).latent_dist
    patchify = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2").Flux2Pipeline._patchify_latents
    peer.bn.eval()
    expected = peer.bn(patchify(posterior.mean))
    mean, logvar = ours.encode(x)
    assert mean.shape == (2, 128, 4, 3)
    assert torch.allclose(mean, expected, atol=1e-5)
    assert torch.equal(mean, ours.encode(x.repeat(1, 3, 1, 1))[0])
    variance = (peer.bn.running_var + 1e-4)[:, None, None]
    assert torch.allclose(logvar, patchify(posterior.logvar) - variance.log(), atol=1e-5)
    assert torch.allclose(mean * variance.sqrt() + peer.bn.running_mean[:, None, None], patchify(posterior.mean),
                          atol=1e-5)
    image = peer.decode(posterior.mean).sample
    assert image.std(1).mean() > 1e-3                                # else its mean would say little
    assert ours.decode(mean).shape == x.shape
    # In float32 the peer is 1.2e-5 away from itself in float64 on a CPU with AVX2, so the architecture is compared in
    # float64.
    assert torch.allclose(ours.decode(mean), image.mean(1, keepdim=True), atol=5e-5)
    image = peer.double().decode(posterior.mean.double()).sample
    deviation = (peer.bn.running_var + 1e-4)[:, None, None].sqrt()
    latent = (patchify(posterior.mean.double()) - peer.bn.running_mean[:, None, None]) / deviation
    assert torch.allclose(ours.double().decode(latent), image.mean(1, keepdim=True), atol=1e-12)
    peer.float()


def flux2_skeleton(channels, c, widths, layers, groups):
    """The modules of src/flux2/autoencoder.py under their names there, `up` built from the coarsest level and stored
    from the finest; random weights, no forward."""
    def conv(a, b, k=3):
        return nn.Conv2d(a, b, k)

    def norm(a):
        return nn.GroupNorm(groups, a)

    def block(a, b):
        parts = {"norm1": norm(a), "conv1": conv(a, b), "norm2": norm(b), "conv2": conv(b, b)}
        return nn.ModuleDict(parts | ({"nin_shortcut": conv(a, b, 1)} if a != b else {}))

    def middle(a):
        attention = nn.ModuleDict({"norm": norm(a)} | {name: conv(a, a, 1) for name in ("q", "k", "v", "proj_out")})
        return nn.ModuleDict({"block_1": block(a, a), "attn_1": attention, "block_2": block(a, a)})

    def level(a, b, count, name, more):
        parts = {"block": nn.ModuleList([block(a if i == 0 else b, b) for i in range(count)]), "attn": nn.ModuleList()}
        return nn.ModuleDict(parts | ({name: nn.ModuleDict({"conv": conv(b, b)})} if more else {}))

    last = len(widths) - 1
    down = [level(widths[max(i - 1, 0)], widths[i], layers, "downsample", i < last) for i in range(last + 1)]
    up = [level(widths[min(i + 1, last)], widths[i], layers + 1, "upsample", i > 0) for i in range(last + 1)]
    fine, coarse = widths[0], widths[-1]
    encoder = {"quant_conv": conv(2 * c, 2 * c, 1), "conv_in": conv(channels, fine), "down": nn.ModuleList(down),
               "mid": middle(coarse), "norm_out": norm(coarse), "conv_out": conv(coarse, 2 * c)}
    decoder = {"post_quant_conv": conv(c, c, 1), "conv_in": conv(c, coarse), "mid": middle(coarse),
               "up": nn.ModuleList(up), "norm_out": norm(fine), "conv_out": conv(fine, channels)}
    return nn.ModuleDict({"encoder": nn.ModuleDict(encoder), "decoder": nn.ModuleDict(decoder),
                          "bn": nn.BatchNorm2d(4 * c, affine=False)})


def test_black_forest_labs_names_by_diffusers_own_converter(tmp_path):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch.manual_seed(0)
    theirs = flux2_skeleton(3, 32, (128, 256, 512, 512), 2, 32).state_dict()
    assert "decoder.up.3.block.0.norm1.weight" in theirs and "encoder.down.1.block.0.nin_shortcut.weight" in theirs
    theirs = {name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
              for name, tensor in theirs.items()}
    safetensors.torch.save_file(theirs, tmp_path / "ae.safetensors")
    # The converter is the one of Stable Diffusion's autoencoder, which keeps the two convolutions outside and has no
    # bn.
    outside = {name.replace("encoder.quant", "quant").replace("decoder.post", "post"): theirs[name] for name in theirs}
    config = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    statistics = {name: tensor for name, tensor in theirs.items() if name.startswith("bn.")}
    expected = utils.convert_ldm_vae_checkpoint(outside, config) | statistics
    loaded = load_vae(tmp_path / "ae.safetensors").state_dict()      # no config: FLUX.2's size
    assert len(theirs) == 251 and loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


FLUX_CONFIG = {"_class_name": "AutoencoderKLFlux2", "in_channels": 3, "latent_channels": 4,
               "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "act_fn": "silu",
               "patch_size": [2, 2], "batch_norm_eps": 1e-4, "sample_size": 1024}


@pytest.fixture
def small_flux2(tmp_path):
    """A small ae.safetensors with its config beside it, and its tensors."""
    torch.manual_seed(0)
    tensors = flux2_skeleton(3, 4, (8, 16), 1, 4).state_dict()
    safetensors.torch.save_file(tensors, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FLUX_CONFIG))
    return tmp_path, tensors


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("decoder.up.1.upsample.conv.bias"), "Missing.*decoder.up_blocks.0.upsamplers.0.conv.bias"),
    (lambda t: t.update({"decoder.extra": torch.zeros(1)}), "Unexpected.*decoder.extra"),
    (lambda t: t.update({"encoder.conv_in.bias": torch.zeros(9)}), "encoder.conv_in.bias.*9"),
    (lambda t: t.update({"quant_conv.bias": torch.zeros(8)}), "two tensors for quant_conv.bias")])
def test_a_missing_extra_or_misshapen_tensor_is_named(small_flux2, change, message):
    folder, tensors = small_flux2
    assert load_vae(folder).config == VAEConfig(3, 4, (8, 16), 1, 4)  # as it is, it loads
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "ae.safetensors")
    with pytest.raises(cli.InputError, match=message):
        load_vae(folder)


@pytest.mark.parametrize("text, message", [
    (json.dumps(FLUX_CONFIG | {"_class_name": "AutoencoderKL"}), "_class_name is 'AutoencoderKL'"),
    (json.dumps(FLUX_CONFIG | {"patch_size": [1, 1]}), r"patch_size is \[1, 1\], not \[2, 2\]"),
    (json.dumps({k: v for k, v in FLUX_CONFIG.items() if k != "latent_channels"}), "latent_channels"),
    ("{half", "config.json"), ("[]", "config.json")])
def test_another_config_is_refused(small_flux2, text, message):
    folder, _ = small_flux2
    (folder / "config.json").write_text(text)
    with pytest.raises(cli.InputError, match=message):
        load_vae(folder)


def test_a_copy_keeps_the_fingerprint_whatever_the_file_was_called(small_flux2, tmp_path):
    folder, _ = small_flux2
    (folder / "ae.safetensors").rename(folder / "flux2-vae.sft")
    for place in (folder, "nowhere"):
        with pytest.raises(cli.InputError, match="no VAE in it|no such folder here"):
            load_vae(place)
    copy_vae(folder / "flux2-vae.sft", tmp_path / "copy")
    original, again = load_vae(folder / "flux2-vae.sft"), load_vae(tmp_path / "copy")
    assert again.fingerprint == original.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), again.state_dict().values()))


@torch.no_grad()
def test_slices_equal_the_whole(monkeypatch):
    model = randomised(SMALL)
    x, z = torch.randn(5, 1, 64, 32), torch.randn(5, 16, 4, 2)
    whole = *model.encode(x), model.decode(z)
    sizes = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(vae, "SLICE", 2 * 64 * 32)                   # two images at a time
    for a, b in zip(whole, (*model.encode(x), model.decode(z))):
        assert torch.allclose(a, b, atol=1e-5)
    assert sizes == [2, 2, 1, 2, 2, 1]
    monkeypatch.setattr(vae, "SLICE", 1)                             # an image is never cut
    assert torch.allclose(model.decode(z), whole[2], atol=1e-5)


def test_patchify_order_by_hand():
    z = torch.arange(8.0).view(1, 2, 2, 2)      # channel 0: 0 1 / 2 3; channel 1: 4 5 / 6 7
    assert vae.patchify(z).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # c, then row, then column of the cell
    z = torch.randn(2, 3, 4, 6)
    assert torch.equal(vae.unpatchify(vae.patchify(z)), z)


def test_running_statistics_normalise_the_latents():
    torch.manual_seed(0)
    model = RadVAE(SMALL)
    model.bn.momentum = None  # a plain average over all batches seen
    images = torch.rand(32, 1, 32, 32) * 2 - 1
    model.train()
    for part in images.split(8):
        model.bn(model(part, torch.zeros(8, 16, 2, 2))[1])
    mean, logvar = model.eval().encode(images)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert mean.std((0, 2, 3)).sub(1).abs().max() < 0.2  # the mean of the batches' variances
    assert logvar.max() < 20


def test_forward_is_encode_sample_decode():
    model = randomised(SMALL)
    x, noise = torch.randn(2, 1, 32, 32), torch.randn(2, 16, 2, 2)
    mean, logvar = model.encode(x)
    expected = model.decode(mean + (0.5 * logvar).exp() * noise)
    assert torch.allclose(model(x, noise)[0], expected, atol=1e-4)


@pytest.mark.parametrize("name, values, accepted", [
    ("channels", [0, -1, 2, "1", None, [1]], "1 or 3"),
    ("latent_channels", [0, -4, 1.5, 10 ** 20, True], "whole number from 1"),
    ("widths", [[], 8, [0], [8, -8], [8, 8.0], "8", None, [10 ** 7]], "list of 1 to 8 whole numbers"),
    ("layers", [0, 10 ** 7, "x"], "whole number from 1 to 64"), ("groups", [0, -4, None], "whole number from 1")])
def test_every_field_of_a_config_is_checked(name, values, accepted):
    for value in values:
        with pytest.raises(cli.InputError, match=f"^{name} is .*; accepted: .*{accepted}"):
            VAEConfig(**vars(SMALL) | {name: value})
    with pytest.raises(cli.InputError, match="widths is .*multiples of the groups of GroupNorm, 32"):
        VAEConfig(widths=(48, 64))


def test_starts_with_a_narrow_posterior():
    torch.manual_seed(0)
    logvar = RadVAE(VAEConfig(1, 8, (16, 32, 64, 128), 1, 8)).encode_raw(torch.randn(2, 1, 64, 64))[1]
    assert -6 < logvar.mean() < -4


def test_ssim_and_psnr_equal_skimage():
    metrics = pytest.importorskip("skimage.metrics")
    torch.manual_seed(0)
    x = torch.rand(3, 1, 40, 52, dtype=torch.float64) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    for i in range(3):
        a, b = x[i, 0].numpy(), y[i, 0].numpy()
        # skimage averages over the picture without a border of 5 pixels, which is where the window fits
        expected = metrics.structural_similarity(a, b, data_range=2, gaussian_weights=True, sigma=1.5,
                                                 use_sample_covariance=False)
        assert vae.ssim(x, y)[i].item() == pytest.approx(expected, abs=1e-6)
        assert vae.psnr(x, y)[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=2), abs=1e-9)


def test_loss_against_torch_distributions():
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 1, 32, 32) * 2 - 1
    mean, logvar = torch.randn(2, 2, 16, 2, 2)
    loss, terms = vae.vae_loss(x, y, mean, logvar, ssim_weight=0.3, kl_weight=0.05)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean()
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert terms["charbonnier"].item() == pytest.approx((x - y).abs().mean().item(), rel=1e-3)
    assert terms["ssim"].item() == pytest.approx(1 - vae.ssim(x, y).mean().item())
    assert loss.item() == pytest.approx((terms["charbonnier"] + 0.3 * terms["ssim"] + 0.05 * kl).item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # the loss itself stays in float32
        assert vae.vae_loss(x, y, mean, logvar, 0.3, 0.05)[0].item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.fixture
def prepared(tmp_path):
    """Five random images as a prepared source."""
    root = tmp_path / "five"
    (root / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(5):
        pixels.save_image(torch.from_numpy(rng.uniform(-1, 1, (1, 32, 32))).float(), root / f"images/{i}.png")
        rows.append(index_row({"path": f"images/{i}.png", "patient": f"p{i}", "split": "valid" if i == 4 else "train",
                               "dataset": "own"}))
    cli.write_csv(root / "index.csv", COLUMNS, rows)
    return root


def test_cached_latents_are_those_of_the_vae(tmp_path, prepared, command, monkeypatch):
    model = randomised(SMALL)
    hub.save_model(model, tmp_path / "vae")
    monkeypatch.setattr(latents, "SHARD", 2)
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "latents", batch=3)
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 3
    cached, images = latents.Latents(tmp_path / "latents"), data.Radiographs([prepared])
    stored = hub.load_model(RadVAE, VAEConfig, tmp_path / "vae")
    for i in range(5):
        mean, logvar = stored.encode(images[i][None])
        assert torch.allclose(cached[i][0], mean[0], atol=5e-3) and torch.allclose(cached[i][1], logvar[0], atol=2e-2)
    assert cached.rows["five/images/3.png"] == [3] and cached.vae == hub.fingerprint(tmp_path / "vae")
    # Finished shards are kept; latents of another VAE are refused, by both commands.
    (tmp_path / "latents/00001.safetensors").unlink()
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted((tmp_path / "latents").glob("*.safetensors"))]
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "latents")
    after = [(path.name, path.stat().st_mtime_ns) for path in sorted((tmp_path / "latents").glob("*.safetensors"))]
    assert len(after) == 3 and [after[0], after[2]] == before
    hub.save_model(randomised(SMALL, seed=1), tmp_path / "vae")
    status, _, errors = command("train.py", "radit", "--data", prepared, "--latents", tmp_path / "latents",
                                "--vae", tmp_path / "vae", "--size", "XS", "--out", tmp_path / "run")
    assert status == 2 and "another VAE" in errors and not (tmp_path / "run").exists()
    with pytest.raises(cli.InputError, match="latents of another VAE"):
        latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "latents")
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 3


def test_two_processes_share_the_shards(tmp_path, prepared, monkeypatch):
    """As torchrun starts them: together they write what one process writes, each its own shards."""
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    monkeypatch.setattr(latents, "SHARD", 2)
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "one")
    assert job.run(2, "encode", [prepared], tmp_path / "two", vae_folder=tmp_path / "vae") == [0, 0]
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 4
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_images_read_by_other_processes_are_encoded_alike(tmp_path, prepared, monkeypatch):
    """As beside a GPU, where two processes read and move the images: the same files, also when some exist already."""
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    monkeypatch.setattr(latents, "SHARD", 4)
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "one", versions=3, batch=3)
    monkeypatch.setattr(latents.parallel, "loader_workers", lambda device: 2)
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "two", versions=3, batch=3)
    written = [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())]
    assert [path.read_bytes() for path in sorted((tmp_path / "two").iterdir())] == written and len(written) == 5
    (tmp_path / "two/00001.safetensors").unlink()
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "two", versions=3, batch=3)
    assert [path.read_bytes() for path in sorted((tmp_path / "two").iterdir())] == written


def test_changed_images_are_refused_and_changed_labels_are_not(tmp_path, prepared, command):
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    model = load_vae(tmp_path / "vae")
    latents.encode([prepared], model, tmp_path / "latents")
    index, image = prepared / "index.csv", prepared / "images/2.png"
    text, content = index.read_text(), image.read_bytes()

    def refused(what):
        with pytest.raises(cli.InputError, match="latents of other images"):
            latents.encode([prepared], model, tmp_path / "latents")
        with pytest.raises(cli.InputError, match=what):
            latents.Latents(tmp_path / "latents").check(data.Radiographs([prepared], "train"))

    pixels.save_image(-pixels.load_image(image), image)
    refused("images of five, train are not those that were encoded")
    latents.Latents(tmp_path / "latents").check(data.Radiographs([prepared], "valid"))  # which did not change
    status, _, errors = command("train.py", "radit", "--data", prepared, "--latents", tmp_path / "latents",
                                "--vae", tmp_path / "vae", "--size", "XS", "--out", tmp_path / "run")
    assert status == 2 and "images of five, train" in errors.splitlines()[-1] and not (tmp_path / "run").exists()
    image.write_bytes(content)
    index.write_text("\n".join(line for line in text.splitlines() if "images/2.png" not in line))
    refused("images of five, train")
    index.write_text(text.replace(",,Unknown,", ",,Female,"))
    assert index.read_text() != text
    latents.encode([prepared], model, tmp_path / "latents")
    latents.Latents(tmp_path / "latents").check(data.Radiographs([prepared], "train"))
    with pytest.raises(cli.InputError, match="other --versions"):
        latents.encode([prepared], model, tmp_path / "latents", versions=2)
    with pytest.raises(cli.InputError, match="files that are not these latents"):
        latents.encode([prepared], model, tmp_path / "vae")
    (tmp_path / "latents/latents.json").write_text(json.dumps({"vae": model.fingerprint, "rows": []}))
    with pytest.raises(cli.InputError, match="another version of this code"):
        latents.Latents(tmp_path / "latents")


def cache(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "latents")
    return tmp_path / "latents"


def shard_of(shapes):
    return lambda path: safetensors.torch.save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


@pytest.mark.parametrize("file, damage, message", [
    ("00001.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-10]), "missing or damaged"),
    ("00001.safetensors", lambda path: path.write_bytes(b""), "missing or damaged"),
    ("00002.safetensors", lambda path: path.unlink(), "missing or damaged"),
    ("00001.safetensors", shard_of({"mean": (1, 16, 2, 2), "logvar": (1, 16, 2, 2)}), "where 2 latents of one shape"),
    ("00001.safetensors", shard_of({"mean": (2, 16, 4, 4), "logvar": (2, 16, 4, 4)}), "where 2 latents of one shape"),
    ("00001.safetensors", shard_of({"mean": (2, 16, 2, 2)}), "no mean and logvar in it"),
    ("latents.json", lambda path: path.write_text(""), "not JSON"),
    ("latents.json", lambda path: path.write_text("[" * 10 ** 5), "not JSON"),
    ("latents.json", lambda path: path.write_text("3"), "holds int where dict is expected"),
    ("latents.json", lambda path: path.write_text('{"vae": 1, "images": {}, "rows": [7]}'), "damaged; encode again"),
    ("latents.json", lambda path: path.write_text('{"vae": 1, "images": {}, "rows": 7}'), "damaged; encode again")])
def test_damaged_caches_are_one_line_at_the_start(tmp_path, prepared, monkeypatch, command, file, damage, message):
    folder = cache(tmp_path, prepared, monkeypatch)
    damage(folder / file)
    status, _, errors = command("train.py", "radit", "--data", prepared, "--latents", folder, "--vae", tmp_path / "vae",
                                "--size",
                                "XS", "--out", tmp_path / "run")
    assert status == 2 and message in errors and file in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_cache_can_be_handed_to_another_process(tmp_path, prepared, monkeypatch):
    """Also after it was read, as the workers of a data loader get it where they are not forked."""
    shards = latents.Latents(cache(tmp_path, prepared, monkeypatch)).shards
    mean, _ = shards[3]
    assert torch.equal(pickle.loads(pickle.dumps(shards))[3][0], mean)


def test_of_two_that_encode_into_one_folder_the_second_is_refused(tmp_path, prepared, monkeypatch, command):
    folder = cache(tmp_path, prepared, monkeypatch)
    (folder / "00001.safetensors").unlink()
    with cli.locked(folder):
        status, _, errors = command("autoencoder", "encode", prepared, "--vae", tmp_path / "vae", "--out", folder)
    assert status == 2 and "another command is filling this folder" in errors
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_training_on_latents_by_data_prediction_makes_a_complete_set_of_weights(tmp_path, prepared, monkeypatch,
                                                                                command):
    monkeypatch.setitem(radit.SIZES, "XS", (64, 1, 1))
    folder, run = cache(tmp_path, prepared, monkeypatch), tmp_path / "run"
    status, _, errors = command("train.py", "radit", "--data", prepared, "--latents", folder, "--vae", tmp_path / "vae",
                                "--size", "XS", "--prediction", "data", "--images", "8", "--batch", "4", "--no-compile",
                                "--out", run)
    assert status == 0, errors
    model, decoder = sample.load_weights(run / "weights")
    assert model.config.prediction == "data" and decoder.fingerprint == model.config.vae
    assert (run / "preview.png").exists()
    # by the umask
    assert oct((folder / "00000.safetensors").stat().st_mode) == oct((folder / "latents.json").stat().st_mode)


def test_the_checksum_sees_one_pixel_of_an_image_of_the_same_size(tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", compress_level=0)
    pixels[3, 5] = 1
    Image.fromarray(pixels).save(tmp_path / "b.png", compress_level=0)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.png", "b.png")]
    assert sizes[0] == sizes[1]
    assert latents.file_checksum(tmp_path / "a.png") != latents.file_checksum(tmp_path / "b.png")
    (tmp_path / "empty.png").touch()
    assert latents.file_checksum(tmp_path / "empty.png") == b"0 "


def test_versions_of_training_images_are_jittered(tmp_path, prepared):
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    latents.encode([prepared], load_vae(tmp_path / "vae"), tmp_path / "latents", versions=3)
    cached, images = latents.Latents(tmp_path / "latents"), data.Radiographs([prepared])
    assert cached.rows["five/images/1.png"] == [3, 4, 5] and cached.rows["five/images/4.png"] == [12]  # 4 is held out
    stored = hub.load_model(RadVAE, VAEConfig, tmp_path / "vae")
    assert torch.allclose(cached[3][0], stored.encode(images[1][None])[0][0], atol=5e-3)
    moved = pixels.jitter(images[1][None], torch.Generator().manual_seed(5))
    assert torch.allclose(cached[5][0], stored.encode(moved)[0][0], atol=5e-3)
    assert (cached[3][0] - cached[5][0]).abs().mean() > 0.01


def test_evaluate_averages_the_held_out_images(tmp_path, prepared, command):
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    model, images = hub.load_model(RadVAE, VAEConfig, tmp_path / "vae"), data.Radiographs([prepared], "train")
    x = torch.stack([images[i] for i in range(4)])
    y = model.decode(model.encode(x)[0]).clamp(-1, 1)
    status, output, _ = command("autoencoder", "evaluate", prepared, "--vae", tmp_path / "vae", "--split", "train")
    assert status == 0 and f"4 images of the split train: PSNR {vae.psnr(x, y).mean():.2f} dB" in output
    judge = raddino.load_encoder(ROOT / "weights/demo/classifier")
    status, output, _ = command("autoencoder", "evaluate", prepared, "--vae", tmp_path / "vae", "--split", "train",
                                "--encoder", ROOT / "weights/demo/classifier")
    assert status == 0 and f"perceptual distance {perceptual_loss(judge, x, y).mean():.3g} (" in output
    status, _, errors = command("autoencoder", "evaluate", prepared, "--vae", tmp_path / "vae", "--split", "test")
    assert status == 2 and "no image in the split test" in errors
