import json

import numpy as np
import pytest
import torch

import cli
import data
import hub
import radiograph
import vae
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


def test_equals_diffusers_flux2():
    """The same random weights, under the same names, in diffusers' class: encode, patchify, decode."""
    diffusers = pytest.importorskip("diffusers")
    config = VAEConfig(channels=3, latent_channels=4, widths=(8, 16, 16, 16), layers=2, groups=4)
    ours = randomised(config)
    peer = diffusers.AutoencoderKLFlux2(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=config.widths, layers_per_block=2,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).eval()
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        mean, logvar = ours.encode(x)
        posterior = peer.encode(x).latent_dist
        raw = mean * (ours.bn.running_var + 1e-4).sqrt()[:, None, None] + ours.bn.running_mean[:, None, None]
        assert mean.shape == (2, 16, 4, 3)
        assert torch.allclose(vae.unpatchify(raw), posterior.mean, atol=1e-5)
        raw_logvar = logvar + (ours.bn.running_var + 1e-4).log()[:, None, None]
        assert torch.allclose(vae.unpatchify(raw_logvar), posterior.logvar, atol=1e-5)
        assert torch.allclose(ours.decode(mean), peer.decode(posterior.mean).sample, atol=1e-5)


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
        model(part, torch.zeros(8, 16, 2, 2))
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


def test_starts_with_a_narrow_posterior():
    torch.manual_seed(0)
    logvar = RadVAE(VAEConfig(1, 8, (16, 32, 64, 128), 1, 8)).moments(torch.randn(2, 1, 64, 64))[1]
    assert -6 < logvar.mean() < -4


def test_ssim_and_psnr_equal_skimage():
    metrics = pytest.importorskip("skimage.metrics")
    torch.manual_seed(0)
    x = torch.rand(3, 1, 40, 52, dtype=torch.float64) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    for i in range(3):
        a, b = x[i, 0].numpy(), y[i, 0].numpy()
        # skimage averages over the picture without a border of 5 pixels, which is where the window fits
        expected = metrics.structural_similarity(a, b, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
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
        radiograph.save_image(torch.from_numpy(rng.uniform(-1, 1, (1, 32, 32))).float(), root / f"images/{i}.png")
        rows.append(data.index_row({"path": f"images/{i}.png", "patient": f"p{i}", "split": "valid" if i == 4 else "train", "dataset": "own"}))
    cli.write_csv(root / "index.csv", data.COLUMNS, rows)
    return root


def test_cached_latents_are_those_of_the_vae(tmp_path, prepared, command, monkeypatch):
    model = randomised(SMALL)
    hub.save_model(model, tmp_path / "vae")
    monkeypatch.setattr(vae, "SHARD", 2)
    vae.encode([prepared], tmp_path / "vae", tmp_path / "latents", batch=3)
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 3
    cached, images = vae.Latents(tmp_path / "latents"), data.Radiographs([prepared])
    stored = hub.load_model(RadVAE, VAEConfig, tmp_path / "vae")
    for i in range(5):
        mean, logvar = stored.encode(images[i][None])
        assert torch.allclose(cached[i][0], mean[0], atol=5e-3) and torch.allclose(cached[i][1], logvar[0], atol=2e-2)
    assert cached.rows["five/images/3.png"] == [3] and cached.vae == hub.fingerprint(tmp_path / "vae")
    # Finished shards are kept by the same VAE and replaced for another.
    shard = tmp_path / "latents/00000.safetensors"
    before = shard.stat().st_mtime_ns
    vae.encode([prepared], tmp_path / "vae", tmp_path / "latents")
    assert shard.stat().st_mtime_ns == before
    hub.save_model(randomised(SMALL, seed=1), tmp_path / "vae")
    status, _, errors = command("train.py", "radit", "--data", prepared, "--latents", tmp_path / "latents",
                                "--vae", tmp_path / "vae", "--size", "XS", "--out", tmp_path / "run")
    assert status == 2 and "another VAE" in errors and not (tmp_path / "run").exists()
    vae.encode([prepared], tmp_path / "vae", tmp_path / "latents")
    assert json.loads((tmp_path / "latents/latents.json").read_text())["vae"] == hub.fingerprint(tmp_path / "vae")
    assert shard.stat().st_mtime_ns != before


def test_versions_of_training_images_are_jittered(tmp_path, prepared):
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    vae.encode([prepared], tmp_path / "vae", tmp_path / "latents", versions=3)
    cached, images = vae.Latents(tmp_path / "latents"), data.Radiographs([prepared])
    assert cached.rows["five/images/1.png"] == [3, 4, 5] and cached.rows["five/images/4.png"] == [12]  # 4 is held out
    stored = hub.load_model(RadVAE, VAEConfig, tmp_path / "vae")
    assert torch.allclose(cached[3][0], stored.encode(images[1][None])[0][0], atol=5e-3)
    moved = radiograph.jitter(images[1][None], torch.Generator().manual_seed(5))
    assert torch.allclose(cached[5][0], stored.encode(moved)[0][0], atol=5e-3)
    assert (cached[3][0] - cached[5][0]).abs().mean() > 0.01


def test_evaluate_averages_the_held_out_images(tmp_path, prepared, command):
    hub.save_model(randomised(SMALL), tmp_path / "vae")
    model, images = hub.load_model(RadVAE, VAEConfig, tmp_path / "vae"), data.Radiographs([prepared], "train")
    x = torch.stack([images[i] for i in range(4)])
    y = model.decode(model.encode(x)[0]).clamp(-1, 1)
    status, output, _ = command("vae.py", "evaluate", prepared, "--vae", tmp_path / "vae", "--split", "train")
    assert status == 0 and f"4 images of the split train: PSNR {vae.psnr(x, y).mean():.2f} dB" in output
    status, _, errors = command("vae.py", "evaluate", prepared, "--vae", tmp_path / "vae", "--split", "test")
    assert status == 2 and "no image in the split test" in errors
