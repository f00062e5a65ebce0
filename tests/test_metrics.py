"""The measures beside torchmetrics, prdc, scipy and the closed form for Gaussians; and what must be refused."""
import json
import shutil

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from PIL import Image
from torchmetrics.image.kid import poly_mmd

import metrics
from common import cli, hub
from common.cli import InputError
from diagnosis import classifier
from encoders import raddino
from radiographs.index import COLUMNS, index_row, read_index


def two_sets(n=700, m=500, width=24, seed=0):
    """Correlated features of two distributions, float32."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng) / width ** 0.5
    return torch.randn(n, width, generator=rng) @ mix, torch.randn(m, width, generator=rng) @ mix * 1.3 + 0.2


def test_frechet_of_gaussians_in_closed_form():
    """Diagonal covariances commute: |mu - mu'|² + sum (s - s')²."""
    s, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 2.0, 3.0]).double()
    mean = torch.tensor([1.0, 0.0, -2.0]).double()
    expected = mean.square().sum() + (s - s2).square().sum()
    assert metrics.frechet(mean, s.square().diag(), 0 * mean, s2.square().diag()) == pytest.approx(expected.item(), rel=1e-12)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = metrics.frechet(turn @ mean, turn @ s.square().diag() @ turn.T, 0 * mean, turn @ s2.square().diag() @ turn.T)
    assert turned == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("n", [700, 15])  # 15 images of 24 features: singular covariances
def test_frechet_distance_beside_scipy(n):
    x, y = two_sets(n, n)
    a, b = (np.cov(f.double().numpy(), rowvar=False) for f in (x, y))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum().item() + np.trace(a + b - 2 * root)
    # A singular matrix has no well-conditioned root, so scipy's is the less exact of the two.
    assert metrics.frechet_distance(x, y)[0] == pytest.approx(expected, rel=1e-9 if n > 24 else 1e-5)
    assert metrics.frechet_distance(x, x)[0] == pytest.approx(0, abs=1e-6)  # roots of eigenvalues that are 0 but for rounding


def test_kernel_distance_beside_torchmetrics():
    x, y = two_sets(600, 600)
    def gram(a, b):
        return (a.double() @ b.double().T / 24 + 1) ** 3
    expected = poly_mmd(x.double(), y.double()).item()
    assert metrics.kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-9)
    # Of different sizes, by the definition: sums over i != j.
    y = y[:450]
    kxx, kyy = gram(x, x), gram(y, y)
    expected = ((kxx.sum() - kxx.trace()) / (600 * 599) + (kyy.sum() - kyy.trace()) / (450 * 449) - 2 * gram(x, y).mean()).item()
    assert metrics.kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_spread_true():
    """On two samples of one distribution the mean over repetitions is 0; on two distributions the standard error that
    each repetition reports is the standard deviation over repetitions."""
    same, apart = [], []
    for seed in range(200):
        x, _ = two_sets(100, 2, 8, seed=2 * seed)
        rng = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 100, 8, generator=rng)
        same.append(metrics.kernel_distance(a, b)[0])
        apart.append(metrics.kernel_distance(a, b * 1.5 + 0.5))
    assert abs(np.mean(same)) < 3 * np.std(same) / 200 ** 0.5
    values, errors = np.array(apart).T
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)


def test_frechet_spread_is_that_of_repetitions():
    results = []
    for seed in range(150):
        a, b = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(seed))
        results.append(metrics.frechet_distance(a, b * 1.5 + 1))
    values, errors = np.array(results).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.25)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("tile", [64, 4096])
def test_prdc_beside_prdc(monkeypatch, k, tile):
    monkeypatch.setattr(metrics, "TILE", tile)
    x, y = two_sets()
    expected = prdc.compute_prdc(x.double().numpy(), y.double().numpy(), nearest_k=k)
    ours = metrics.prdc(x, y, k)
    for name, value in expected.items():
        assert ours[name][0] == pytest.approx(value, abs=1e-12), name
        assert 0 < value < 2  # the example must be able to tell the measures apart
    assert len({round(float(v), 6) for v in expected.values()}) == 4


def test_nothing_depends_on_order_or_tiles(monkeypatch):
    x, y = two_sets()
    def everything(x, y):
        return [metrics.frechet_distance(x, y)[0], *metrics.kernel_distance(x, y), *(v for v, _ in metrics.prdc(x, y).values())]
    expected = everything(x, y)
    monkeypatch.setattr(metrics, "TILE", 37)
    rng = torch.Generator().manual_seed(5)
    assert everything(x[torch.randperm(len(x), generator=rng)], y[torch.randperm(len(y), generator=rng)]) == pytest.approx(expected, rel=1e-9)


def test_nearest_by_hand():
    training = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    distance, which = metrics.nearest(torch.tensor([[3.0, 3.0], [9.0, 0.0], [-3.0, -4.0]]), training)
    assert which.tolist() == [1, 2, 0]
    torch.testing.assert_close(distance, torch.tensor([1.0, 1.0, 5.0]).double() / 2 ** 0.5)


def test_copies_are_found():
    training, real = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0))
    table = metrics.memorisation(real, training[:100] + 1e-3, training)
    assert table["synthetic"]["below"] == 1 and table["held-out real"]["below"] <= 0.01
    table = metrics.memorisation(real[:100], real[100:], training)
    assert table["synthetic"]["below"] <= 0.05


# ---------------------------------------------------------------------------------------------------------
# The command, on files

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A classifier folder with random weights: its encoder looks at 32x32 pixels."""
    torch.manual_seed(0)
    config = classifier.ClassifierConfig(raddino.EncoderConfig(16, 2, 2, 8, 32, 1), ("own",), {})
    folder = tmp_path_factory.mktemp("classifier")
    hub.save_model(classifier.Classifier(config), folder)
    return folder


def pictures(folder, count, seed, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def prepared(root, count, seed):
    pictures(root / "images", count, seed)
    records = [{"path": f"images/{i:03}.png", "patient": f"p{i}", "split": "test" if i % 3 else "train", "dataset": "own",
                "sex": ("female", "male")[i % 2], "age": 10.0 + i, "edema": "positive" if i < 12 else "negative"} for i in range(count)]
    cli.write_csv(root / "index.csv", COLUMNS, map(index_row, records))
    return root


def test_the_report_and_its_cache(tmp_path, command, encoder):
    real, fake = prepared(tmp_path / "real", 36, 0), prepared(tmp_path / "fake", 24, 1)
    arguments = [real, fake, "--encoder", encoder, "--split", "test", "--by", "sex", "label", "--train", real, "--json", tmp_path / "m.json"]
    status, output, errors = command("metrics.py", *arguments)
    assert status == 0, errors
    first = output.splitlines()[0]
    for part in (hub.fingerprint(encoder), "real 24; synthetic 24", "resize 32", "kdd_subset all", "k 5", "seed 0", "float32",
                 "WARNING: this encoder is not Rad-DINO"):
        assert part in first
    report = json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)     # NaN is no JSON
    groups = {row["group"]: row for row in report["results"]}
    assert list(groups) == ["all", "edema=positive", "sex=female", "sex=male"]
    assert (groups["sex=male"]["real"], groups["sex=male"]["synthetic"]) == (12, 12) and "FDD" in groups["sex=male"]
    # The figures are those of the features, computed apart: the published processor, one image at a time.
    model = raddino.load_encoder(encoder)
    def features(root, split):
        paths = [root / r["path"] for r in read_index(root) if split in (None, r["split"])]
        return torch.stack([model(raddino.preprocess(Image.open(path), model.config)[None])[0][0] for path in paths])
    x, y = features(real, "test"), features(fake, None)
    assert groups["all"]["FDD"][0] == pytest.approx(metrics.frechet_distance(x, y)[0], rel=1e-3)
    assert groups["all"]["coverage"][0] == pytest.approx(metrics.prdc(x, y)["coverage"][0], abs=1e-6)
    # The second run encodes nothing and says the same; a changed image is noticed.
    status, again, errors = command("metrics.py", *arguments)
    assert again == output and "batch" not in errors
    Image.open(real / "images/001.png").rotate(90).save(fake / "images/000.png")
    status, changed, errors = command("metrics.py", *arguments)
    assert changed != output and "1/1" in errors


def test_features_do_not_depend_on_the_batch(tmp_path, encoder):
    folder, model = pictures(tmp_path / "a", 11, 0), raddino.load_encoder(encoder)
    records = metrics.listed(folder)
    few, many = (metrics.features_of(records, model, tmp_path / f"{batch}.safetensors", batch=batch) for batch in (3, 64))
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics.features_of(records[::-1], model, tmp_path / "3.safetensors"), few.flip(0), atol=0, rtol=0)


def test_chexgenbench_protocol(tmp_path, encoder):
    """299x299 without keeping the aspect, one image a prompt, KDD on as many of either side."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 80), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    config = raddino.EncoderConfig()
    squeezed = image.convert("RGB").resize((299, 299), Image.Resampling.BILINEAR)
    torch.testing.assert_close(metrics.load(tmp_path / "a.png", config, True), raddino.preprocess(squeezed, config))
    assert metrics.load(tmp_path / "a.png", config, True).shape == (3, 518, 518)
    records = [{"prompt": p, "i": i} for i, p in enumerate("abab")]
    assert [r["i"] for r in metrics.deduplicated(records)] == [0, 1]
    assert metrics.deduplicated([{"i": 0}, {"i": 1}]) == [{"i": 0}, {"i": 1}]
    x, y = two_sets(300, 200)
    kept = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:200]
    assert metrics.compare(x, y, 5, None, 3, matched=True)["KDD"][0] == pytest.approx(metrics.kernel_distance(x[kept], y)[0], rel=1e-9)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[1:]], "1 images; at least two are needed"),
    (lambda folder: (folder / "002.png").write_bytes(b"not an image"), "002.png: unreadable image"),
    (lambda folder: (folder / "002.png").write_bytes((folder / "001.png").read_bytes()[:200]), "002.png: unreadable image"),
    (lambda folder: [shutil.copy(folder / "000.png", path) for path in sorted(folder.iterdir())[1:]], "are they all the same image"),
    (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[4:]], "4 images have no 5-th neighbour"),
    (lambda folder: shutil.rmtree(folder), "no such folder")])
def test_bad_images_are_refused_in_one_line(tmp_path, command, encoder, spoil, message):
    real, fake = pictures(tmp_path / "real", 8, 0), pictures(tmp_path / "fake", 8, 1)
    spoil(fake)
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder, "--json", tmp_path / "m.json")
    assert status == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors and not (tmp_path / "m.json").exists()


def test_features_that_are_not_finite_are_refused(tmp_path, encoder):
    folder, model = pictures(tmp_path / "a", 4, 0), raddino.load_encoder(encoder)
    model.norm.weight[3] = torch.nan
    with pytest.raises(InputError, match="000.png: its features are not finite"):
        metrics.features_of(metrics.listed(folder), model, tmp_path / "cache.safetensors")


def test_fewer_images_than_features_are_measured_with_a_warning(tmp_path, command, encoder):
    real, fake = pictures(tmp_path / "real", 12, 0), pictures(tmp_path / "fake", 12, 1)
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder)
    assert status == 0, errors
    assert "WARNING: fewer images than the 16 features" in output.splitlines()[0] and "±" in output.splitlines()[2]
