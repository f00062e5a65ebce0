"""The measures beside torchmetrics, prdc, scipy and the closed form for Gaussians; and what must be refused."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.stats
import torch
from PIL import Image, PngImagePlugin
from pictures import write_dicom

import metrics
from common import cli, hub
from common.cli import InputError
from encoders import features, raddino
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
    distance = metrics.frechet(mean, s.square().diag(), 0 * mean, s2.square().diag())
    assert distance == pytest.approx(expected.item(), rel=1e-12)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    covariances = [turn @ spread.square().diag() @ turn.T for spread in (s, s2)]
    turned = metrics.frechet(turn @ mean, covariances[0], 0 * mean, covariances[1])
    assert turned == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("n", [700, 15])  # 15 images of 24 features: singular covariances
def test_frechet_distance_beside_scipy(n):
    x, y = two_sets(n, n)
    a, b = (np.cov(f.double().numpy(), rowvar=False) for f in (x, y))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum().item() + np.trace(a + b - 2 * root)
    # A singular matrix has no well-conditioned root, so scipy's is the less exact of the two.
    assert metrics.frechet_distances(x, y)["FDD"][0] == pytest.approx(expected, rel=1e-9 if n > 24 else 1e-5)
    # Roots of eigenvalues that are 0 but for rounding.
    assert metrics.frechet_distances(x, x)["FDD"][0] == pytest.approx(0, abs=1e-6)


def gram(a, b):
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def test_kernel_distance_by_its_definition():
    """Of different sizes: sums over i != j."""
    x, y = two_sets(600, 450)
    kxx, kyy = gram(x, x), gram(y, y)
    expected = (kxx.sum() - kxx.trace()) / (600 * 599) + (kyy.sum() - kyy.trace()) / (450 * 449) - 2 * gram(x, y).mean()
    assert metrics.kernel_distance(x, y)[0] == pytest.approx(expected.item(), rel=1e-9)


def test_kernel_distance_beside_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    x, y = two_sets(600, 600)
    assert metrics.kernel_distance(x, y)[0] == pytest.approx(kid.poly_mmd(x.double(), y.double()).item(), rel=1e-9)


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


def test_mean_and_covariance_of_any_union_of_parts():
    x, _ = two_sets(203)
    sums, part = metrics.PartSums(x + 100), metrics.random_parts(203)
    for parts in ([3], [0, 4, 9], range(10)):
        mean, covariance = sums.union(parts)
        chosen = x[torch.isin(part, torch.tensor(list(parts)))].double().numpy()
        np.testing.assert_allclose(mean.numpy(), chosen.mean(0) + 100, atol=1e-5)  # float32 at 100
        np.testing.assert_allclose(covariance.numpy(), np.cov(chosen, rowvar=False), atol=1e-4)


def test_frechet_at_infinity_at_this_number_and_its_spread():
    """Two Gaussians of known distance, drawn again and again: FDD-inf is the true distance where FDD itself is far
    above it, real/real is what fresh real images have against the real ones, and the standard errors are those of the
    repetitions."""
    rng, results = torch.Generator().manual_seed(0), []
    for seed in range(80):
        x, y, fresh = (torch.randn(n, 12, generator=rng) for n in (200, 120, 120))
        y *= 1.2
        y[:, 0] += 0.5
        found = metrics.frechet_distances(x, y, seed)
        control = metrics.frechet(*metrics.mean_and_covariance(x), *metrics.mean_and_covariance(fresh))
        results.append([*found["FDD"], *found["FDD-inf"], found["real/real"][0], control])
    fdd, error, limit, limit_error, floor, control = np.array(results).T
    true = 0.5 ** 2 + 12 * 0.2 ** 2
    assert fdd.mean() > 1.25 * true and limit.mean() == pytest.approx(true, rel=0.06)
    assert error.mean() == pytest.approx(fdd.std(), rel=0.3)
    assert limit_error.mean() == pytest.approx(limit.std(), rel=0.3)
    assert floor.mean() == pytest.approx(control.mean(), rel=0.06)


def test_what_a_small_set_cannot_say_is_not_said():
    x, y = two_sets(40, 19)
    assert all(np.isnan(metrics.frechet_distances(x, y)[name][1]) for name in ("FDD", "FDD-inf", "real/real"))
    found = metrics.frechet_distances(x, two_sets(40, 40)[1])  # half of 40 do not exceed 24 features
    assert np.isnan(found["FDD-inf"][0]) and np.isfinite(found["real/real"][0]) and np.isfinite(found["FDD"][1])


def by_definition(x, y, k):
    """Precision, recall, density and coverage from all distances at once, as their authors write them."""
    x, y = x.double().numpy(), y.double().numpy()
    rr, ff, rf = (np.linalg.norm(a[:, None] - b, axis=2) for a, b in ((x, x), (y, y), (x, y)))
    real, fake = (np.sort(d, 1)[:, k] for d in (rr, ff))             # each is its own nearest, at 0
    near = rf <= real[:, None]
    return [near.any(0).mean(), (rf <= fake).any(1).mean(), near.sum() / k / len(y), near.any(1).mean()]


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("tile", [64, 4096])
def test_prdc_by_its_definition(monkeypatch, k, tile):
    monkeypatch.setattr(metrics, "TILE", tile)
    x, y = two_sets(300, 200)
    expected = by_definition(x, y, k)
    assert metrics.shares(x, y, k).tolist() == pytest.approx(expected, abs=1e-12)
    assert len({round(v, 6) for v in expected}) == 4 and min(expected) > 0  # the example tells the measures apart


def test_prdc_beside_prdc():
    peer = pytest.importorskip("prdc", reason="prdc is not installed")
    x, y = two_sets()
    expected = peer.compute_prdc(x.double().numpy(), y.double().numpy(), nearest_k=5)
    ours = metrics.prdc(x, y, 5)
    for name, value in expected.items():
        assert ours[name][0] == pytest.approx(value, abs=1e-12), name


def test_balls_are_closed():
    """On a line, k 1: the ball of 0 reaches to 2 and that of 9 to 2 as well; 2 and -2 lie on their edges."""
    real, fake = torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([[-2.0], [17.0]])
    precision, recall, density, coverage = metrics.shares(real, fake, 1).tolist()
    assert precision == 0.5 and density == 0.5                       # -2 lies in the ball of 0, 17 in none
    assert coverage == pytest.approx(1 / 3) and recall == 1          # the balls of -2 and 17 reach 19 far
    assert metrics.shares(real, real, 1).tolist() == [1, 1, 2, 1]  # 7 from 9 lies 2, on the edge


def test_the_spread_of_prdc_is_that_of_repetitions():
    rng, results = torch.Generator().manual_seed(0), []
    scale = torch.arange(1, 31) ** -0.5
    for seed in range(25):
        x, y = (torch.randn(300, 30, generator=rng) * scale * size for size in (1, 0.8))
        y[:, 0] += 0.3
        results.append([value for pair in metrics.prdc(x, y, seed=seed).values() for value in pair])
    values, errors = np.array(results)[:, ::2], np.array(results)[:, 1::2]
    assert 0.3 < values[:, 1].mean() < 0.7  # recall, of whose spread the images of one set alone show half
    ratio = errors.mean(0) / values.std(0)
    assert ratio[1] == pytest.approx(1.1, abs=0.25) and ((0.7 < ratio) & (ratio < 1.6)).all()


def test_nothing_depends_on_order_or_tiles(monkeypatch):
    x, y = two_sets(300, 200)
    def everything(x, y):
        fdd = metrics.frechet_distances(x, y)["FDD"][0]
        return [fdd, *metrics.kernel_distance(x, y), *metrics.shares(x, y, 5).tolist()]
    expected = everything(x, y)
    monkeypatch.setattr(metrics, "TILE", 37)
    rng = torch.Generator().manual_seed(5)
    mixed = (f[torch.randperm(len(f), generator=rng)] for f in (x, y))
    assert everything(*mixed) == pytest.approx(expected, rel=1e-9)


def test_nearest_by_hand():
    training = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    distance, which = metrics.nearest(torch.tensor([[3.0, 3.0], [9.0, 0.0], [-3.0, -4.0]]), training)
    assert which.tolist() == [1, 2, 0]
    torch.testing.assert_close(distance, torch.tensor([1.0, 1.0, 5.0]).double() / 2 ** 0.5)


def test_the_share_of_copies_and_its_exact_interval():
    training, real = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0))
    table = metrics.memorisation(real, torch.cat([training[:30] + 1e-3, real[:30] + 10]), training)
    row = table["synthetic"]
    assert row["n"] == 60 and row["below"] == 0.5 and table["held-out real"]["below"] <= 0.01
    # Clopper and Pearson's bounds: with them as the truth, 30 or more (or fewer) of 60 has a chance of 2.5 %.
    low, high = row["interval"]
    assert scipy.stats.binom.sf(29, 60, low) == pytest.approx(0.025) == scipy.stats.binom.cdf(30, 60, high)
    assert metrics.memorisation(real[:100], real[100:], training)["synthetic"]["below"] <= 0.05


def test_held_out_means_other_patients_files_and_pictures():
    z = torch.eye(4)
    training = [{"content": bytes([i]), "patient": f"p{i}"} for i in range(4)]
    real = [{"content": b"a", "patient": "p2"}, {"content": b"\1", "patient": "q"}, {"content": b"b", "patient": "q"},
            {"content": b"c"}, {"content": b"d", "patient": "r"}]
    x = torch.cat([torch.zeros(3, 4), z[:1], torch.ones(1, 4)])
    assert metrics.held_out(real, x, training, z) == [2, 4]
    with pytest.raises(InputError, match="1 of 4 real images are of patients and files that --train does not hold"):
        metrics.held_out(real[:4], x[:4], training, z)


# ---------------------------------------------------------------------------------------------------------
# The command, on files

def pictures(folder, count, seed, size=64):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def write_index(root, records):
    cli.write_csv(root / "index.csv", COLUMNS, map(index_row, records))


def prepared(root, count, seed):
    pictures(root / "images", count, seed)
    write_index(root, [{
        "path": f"images/{i:03}.png", "patient": f"p{i}", "split": "test" if i % 3 else "train", "dataset": "own",
        "sex": ("female", "male")[i % 2], "age": 10.0 + i, "edema": "positive" if i < 12 else "negative"}
        for i in range(count)])
    return root


def noisy_copies(source, paths, folder, levels=2):
    """Training images as a model that copies draws them: with noise of a few grey levels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for path in paths:
        noise = rng.integers(-levels, levels + 1, (64, 64))
        pixels = (np.asarray(Image.open(source / path), int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / Path(path).name)
    return folder


def test_the_report_and_its_cache(tmp_path, command, encoder):
    real, fake = prepared(tmp_path / "real", 36, 0), prepared(tmp_path / "fake", 24, 1)
    arguments = [real, fake, "--encoder", encoder, "--split", "test", "--by", "sex", "label", "--train", real,
                 "--json", tmp_path / "m.json"]
    status, output, errors = command("metrics.py", *arguments)
    assert status == 0, errors
    first = output.splitlines()[0]
    for part in (hub.fingerprint(encoder), "real 24; synthetic 24", "resize 32", "kdd_subset all", "k 5", "seed 0",
                 "float32"):
        assert part in first
    assert "WARNING: not Rad-DINO: width 16 (Rad-DINO: 768)" in output
    report = json.loads((tmp_path / "m.json").read_text())
    groups = {row["group"]: row for row in report["results"]}
    assert set(groups) == {"all", "sex=female", "sex=male", "edema=positive"}
    assert (groups["sex=male"]["real"], groups["sex=male"]["synthetic"]) == (12, 12) and "FDD" in groups["sex=male"]
    assert "FDD is mostly sample size" in groups["sex=male"]["warning"] and "warning" not in groups["all"]
    assert report["memorisation"]["held-out real"]["n"] == 24 and report["held_out"] == {"real": 24, "left_out": 0}
    # The figures are those of the features, computed apart: the published processor, one image at a time.
    model = raddino.load_encoder(encoder)
    def features_of(root, split):
        paths = [root / r["path"] for r in read_index(root) if split in (None, r["split"])]
        return torch.stack([model(raddino.preprocess(Image.open(path), model.config)[None])[0][0] for path in paths])
    x, y = features_of(real, "test"), features_of(fake, None)
    expected = metrics.frechet(*metrics.mean_and_covariance(x), *metrics.mean_and_covariance(y))
    assert groups["all"]["FDD"]["value"] == pytest.approx(expected, rel=1e-3)
    assert set(groups["all"]["FDD"]) == {"value", "standard_error"} and groups["all"]["FDD"]["standard_error"] > 0
    assert groups["all"]["coverage"]["value"] == pytest.approx(by_definition(x, y, 5)[3], abs=1e-6)
    # The second run encodes nothing and says the same; a changed image is noticed.
    status, again, errors = command("metrics.py", *arguments)
    assert again == output and "batch" not in errors
    Image.open(real / "images/001.png").rotate(90).save(fake / "images/000.png")
    status, changed, errors = command("metrics.py", *arguments)
    assert changed != output and "1/1" in errors


@pytest.mark.parametrize("split", [[], ["--split", "test"]])
def test_a_model_that_copies_is_found(tmp_path, command, encoder, split):
    """Every real image is given, the training images among them; half of the training patients have a test image
    too."""
    real = prepared(tmp_path / "real", 60, 0)
    records = read_index(real)
    for record in records[1::6]:
        record["patient"] = "p0"                                     # a training patient
    write_index(real, records)
    training_paths = [record["path"] for record in records if record["split"] == "train"]
    fake = noisy_copies(real, training_paths, tmp_path / "copies")
    arguments = ["--encoder", encoder, "--train", real, "--json", tmp_path / "m.json", *split]
    status, output, errors = command("metrics.py", real, fake, *arguments)
    assert status == 0, errors
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["memorisation"]["synthetic"]["below"] == 1 and report["memorisation"]["held-out real"]["n"] == 30
    assert report["memorisation"]["synthetic"]["interval"][0] == pytest.approx(0.025 ** (1 / 20))
    assert report["held_out"]["left_out"] == (10 if split else 30) and "look at them for copies" in output
    # One training image under another name and format, and a model that does not copy.
    other = pictures(tmp_path / "other", 30, 5)
    shutil.copy(real / training_paths[0], other / "000.png")
    status, output, errors = command("metrics.py", real, other, *arguments)
    assert "WARNING: 1 of 30 synthetic images are files of the training images" in output
    assert json.loads((tmp_path / "m.json").read_text())["memorisation"]["synthetic"]["below"] < 0.2
    # Real images that are all training images: refused before anything is measured.
    only = tmp_path / "only"
    (only / "images").mkdir(parents=True)
    for path in training_paths:
        shutil.copy(real / path, only / path)
    status, output, errors = command("metrics.py", only / "images", fake, "--encoder", encoder, "--train", real)
    assert status == 2 and "0 of 20 real images" in errors and "memorisation needs held-out images" in errors
    assert not output


def test_any_folder_with_subfolders_and_dicom(tmp_path, command, encoder):
    """The same picture as PNG, 16-bit PNG and DICOM has the same features."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80), dtype=np.uint8)
    (tmp_path / "a/b").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "a/8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a/b/16.PNG")
    write_dicom(tmp_path / "a/b/image", pixels)
    Image.fromarray(pixels.T).save(tmp_path / "a/other.png")
    (tmp_path / "a/notes.txt").write_text("not an image")
    model = raddino.load_encoder(encoder)
    for squeezed in (False, True):
        records = features.images_of(tmp_path / "a")
        rows = features.features_of(records, model, tmp_path / f"{squeezed}.safetensors", squeezed)
        assert [record["path"].name for record in records] == ["8.png", "other.png", "16.PNG", "image"]
        torch.testing.assert_close(rows[[2, 3]], rows[[0, 0]], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(rows[0], rows[1])


def test_sets_the_wrong_way_round_are_noticed(tmp_path, command, encoder):
    real, fake = pictures(tmp_path / "real", 8, 0), pictures(tmp_path / "fake", 8, 1)
    info = PngImagePlugin.PngInfo()
    info.add_text("Synthetic", "yes")
    for path in fake.iterdir():
        Image.open(path).save(path, pnginfo=info)
    status, output, errors = command("metrics.py", fake, real, "--encoder", encoder)
    assert status == 2 and "8 of 8 real images say that they are synthetic" in errors and not output
    assert command("metrics.py", real, fake, "--encoder", encoder)[0] == 0
    shutil.copy(fake / "003.png", real / "003.png")
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder)
    assert status == 0 and "WARNING: 1 of 8 real images say that they are synthetic" in output
    assert "WARNING: 1 of 8 synthetic images are files of the real images" in output


def test_a_selection_is_no_sample(tmp_path, command, encoder):
    """Images that python -m diagnosis check --redraw made anew until a classifier was pleased."""
    real, fake = pictures(tmp_path / "real", 8, 0), pictures(tmp_path / "fake", 8, 1)
    info = PngImagePlugin.PngInfo()
    info.add_text("Selected", "images that the classifier contradicted were made anew")
    for path in sorted(fake.iterdir())[:5]:
        Image.open(path).save(path, pnginfo=info)
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder)
    assert status == 0, errors
    assert "WARNING: a classifier chose 5 of 8 synthetic images, so this says nothing of the weights" in output


def test_an_unfinished_sample_is_refused(tmp_path, command, encoder):
    real, fake = pictures(tmp_path / "real", 8, 0), pictures(tmp_path / "fake/images", 8, 1).parent
    (fake / "sample.json").write_text("{}")
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder)
    assert status == 2 and "an unfinished sample" in errors


def test_features_do_not_depend_on_the_batch(tmp_path, encoder):
    folder, model = pictures(tmp_path / "a", 11, 0), raddino.load_encoder(encoder)
    records = features.images_of(folder)
    caches = [tmp_path / "3.safetensors", tmp_path / "64.safetensors"]
    few, many = (features.features_of(records, model, cache, batch=batch) for cache, batch in zip(caches, (3, 64)))
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)
    again = features.features_of(records[::-1], model, caches[0])
    torch.testing.assert_close(again, few.flip(0), atol=0, rtol=0)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:100]), lambda path: path.write_bytes(b""),
    lambda path: safetensors.torch.save_file({"x": torch.ones(3)}, path),
    lambda path: safetensors.torch.save_file({"names": torch.ones(2, 16), "features": torch.ones(3, 16)}, path)])
def test_a_damaged_cache_is_computed_anew(tmp_path, encoder, damage):
    folder, model, cache = pictures(tmp_path / "a", 5, 0), raddino.load_encoder(encoder), tmp_path / "c.safetensors"
    rows = features.features_of(features.images_of(folder), model, cache)
    whole = cache.read_bytes()
    damage(cache)
    assert torch.equal(features.features_of(features.images_of(folder), model, cache), rows)
    assert cache.read_bytes() == whole


def test_a_read_only_folder_has_its_cache_elsewhere(tmp_path, encoder, monkeypatch):
    folder, model = pictures(tmp_path / "a", 5, 0), raddino.load_encoder(encoder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(features.os, "access", lambda path, mode: False)  # the superuser may write anywhere
    records, rows = features.set_of([folder], model, "f" * 16)
    assert len(rows) == 5 and len(list(folder.iterdir())) == 5
    assert [path.suffix for path in (tmp_path / "caches").rglob("*") if path.is_file()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, encoder, capsys):
    folder, model = pictures(tmp_path / "a", 5, 0), raddino.load_encoder(encoder)
    (tmp_path / "c.safetensors").mkdir()
    assert len(features.features_of(features.images_of(folder), model, tmp_path / "c.safetensors")) == 5
    assert "the features are not kept for the next run" in capsys.readouterr().out


def test_a_cache_belongs_to_all_that_decides_a_feature(tmp_path):
    encoder = raddino.Encoder(raddino.EncoderConfig(16, 1, 2, 8, 32, 1))
    names = {features.cache_of(tmp_path, encoder, fingerprint, squeezed)
             for fingerprint in "ab" for squeezed in (True, False)}
    encoder.config = raddino.EncoderConfig(16, 1, 2, 8, 32, 1, mean=0.5)
    names.add(features.cache_of(tmp_path, encoder, "a", True))
    assert len(names) == 5 and all(name.parent == tmp_path.resolve() for name in names)


def test_chexgenbench_protocol(tmp_path, encoder):
    """299x299 without keeping the aspect, one image a prompt, KDD on as many of either side; 16 bits are no white."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 80), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    config = raddino.EncoderConfig()
    squeezed = raddino.preprocess(image.convert("RGB").resize((299, 299), Image.Resampling.BILINEAR), config)
    for name in ("a.png", "deep.png"):
        torch.testing.assert_close(features.load(tmp_path / name, config, True), squeezed)
    assert squeezed.shape == (3, 518, 518) and squeezed.std() > 0.1
    records = [{"prompt": p, "i": i} for i, p in enumerate("abab")]
    assert [r["i"] for r in features.deduplicated(records)] == [0, 1]
    assert features.deduplicated([{"i": 0}, {"i": 1}]) == [{"i": 0}, {"i": 1}]
    x, y = two_sets(300, 200)
    kept = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:200]
    kdd = metrics.compare(x, y, 5, None, 3, equal=True)["KDD"][0]
    assert kdd == pytest.approx(metrics.kernel_distance(x[kept], y)[0], rel=1e-9)


def test_chexgenbench_tables(tmp_path, command, encoder):
    """The benchmark's own columns: the real table's labels say which synthetic images are of a condition, by their
    prompts."""
    pictures(tmp_path / "files", 20, 0)
    pictures(tmp_path / "images", 16, 1)
    labels = ["{'Edema': 1.0, 'Pneumonia': nan}", "{'Edema': 0.0, 'Pneumonia': -1.0}", ""]
    cli.write_csv(tmp_path / "real.csv", ["path", "annotated_prompt", "chexpert_labels"],
                  [[f"files/{i:03}.png", f"Edema, number {i // 2 * 2}", labels[i % 4 // 2]] for i in range(20)])
    cli.write_csv(tmp_path / "prompt_INFO.csv", ["img_savename", "annotated_prompt"],
                  [[f"images/{i:03}.png", f"Edema, number {2 * (i % 10)}"] for i in range(16)])
    records = features.images_of(tmp_path / "real.csv")
    assert records[0] == {"path": tmp_path / "files/000.png", "prompt": "Edema, number 0", "edema": "positive"}
    assert records[2] == {"path": tmp_path / "files/002.png", "prompt": "Edema, number 2", "edema": "negative"}
    arguments = ["--encoder", encoder, "--protocol", "chexgenbench", "--by", "label", "--k", "2",
                 "--json", tmp_path / "m.json"]
    status, output, errors = command("metrics.py", tmp_path / "real.csv", tmp_path / "prompt_INFO.csv", *arguments)
    assert status == 0, errors
    rows = json.loads((tmp_path / "m.json").read_text())["results"]
    numbers = [(row["group"], row["real"], row["synthetic"]) for row in rows]
    assert numbers == [("all", 10, 10), ("edema=positive", 5, 5)]
    cli.write_csv(tmp_path / "bad.csv", ["img_savename", "chexpert_labels"], [["images/000.png", "[1, 2"]])
    cli.write_csv(tmp_path / "gone.csv", ["img_savename"], [["images/000.png"], ["images/900.png"]])
    for name, message in (("bad.csv", "bad.csv, line 2: chexpert_labels"), ("gone.csv", "900.png: no such file")):
        status, output, errors = command("metrics.py", tmp_path / "real.csv", tmp_path / name, "--encoder", encoder)
        assert status == 2 and message in errors.splitlines()[-1]


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("spoil, message", [
    (empty, "neither an index.csv nor an image"),
    (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[1:]], "1 image; at least two are needed"),
    (lambda folder: (folder / "002.png").write_bytes(b"not an image"), "002.png: not an image"),
    (lambda folder: (folder / "002.png").write_bytes((folder / "001.png").read_bytes()[:200]),
     "002.png: "),
    (lambda folder: [shutil.copy(folder / "000.png", path) for path in sorted(folder.iterdir())[1:]],
     "are they all the same image"),
    (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[4:]],
     "among 4 images there is no 5-th neighbour"),
    (lambda folder: shutil.rmtree(folder), "no such folder")])
def test_bad_images_are_refused_in_one_line(tmp_path, command, encoder, spoil, message):
    real, fake = pictures(tmp_path / "real", 8, 0), pictures(tmp_path / "fake", 8, 1)
    spoil(fake)
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder, "--json", tmp_path / "m.json")
    assert status == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("options, message", [
    (["--k", "0"], "from 1 to 1,000"), (["--k", "99999999999999999999"], "from 1 to 1,000"),
    (["--subset", "1"], "from 2 to"),
    (["--seed", "-1"], "from 0 to"), (["--json", ""], "an empty path"), (["--by", "weight"], "choose from"),
    (["--split", "test"], "no index.csv that says which image is in the split test")])
def test_options_out_of_range_are_refused(tmp_path, command, encoder, options, message):
    real, fake = pictures(tmp_path / "real", 8, 0), pictures(tmp_path / "fake", 8, 1)
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder, *options)
    assert status == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors


def test_the_help_shows_two_examples(command):
    status, output, errors = command("metrics.py", "--help")
    assert status == 0 and output.count("\n  python metrics.py data") == 2


def test_features_that_are_not_finite_are_refused(tmp_path, encoder):
    folder, model = pictures(tmp_path / "a", 4, 0), raddino.load_encoder(encoder)
    model.norm.weight[3] = torch.nan
    with pytest.raises(InputError, match="000.png: its features are not finite"):
        features.features_of(features.images_of(folder), model, tmp_path / "cache.safetensors")


def test_fewer_images_than_features_are_measured_with_a_warning(tmp_path, command, encoder):
    real, fake = pictures(tmp_path / "real", 12, 0), pictures(tmp_path / "fake", 12, 1)
    status, output, errors = command("metrics.py", real, fake, "--encoder", encoder)
    assert status == 0, errors
    row = next(line for line in output.splitlines() if line.startswith("all"))
    assert "WARNING: no more than 16 images, as many as features" in row and "±" in row
