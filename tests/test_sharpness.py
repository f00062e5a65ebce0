"""The measure of sharpness: waves of known frequency, white noise, and a PCA whose answer is known."""
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from benchmarks import sharpness
from common.cli import InputError, write_csv
from radiographs.index import COLUMNS, index_row
from radiographs.pixels import save_image


def wave(cycles_x, cycles_y, side=64, amplitude=1.0):
    place = torch.arange(side) / side
    return amplitude * torch.cos(2 * torch.pi * (cycles_x * place + cycles_y * place[:, None]))[None, None]


def test_octaves_up_to_the_nyquist_frequency():
    assert sharpness.octaves(64) == [2, 4, 8, 16] and sharpness.octaves(256) == [2, 4, 8, 16, 32, 64]
    assert sharpness.octaves(128)[-1] == 32


@pytest.mark.parametrize("x, y, octave", [(3, 0, 0), (0, 6, 1), (11, 0, 2), (12, 14, 3), (20, 0, 3), (5, -5, 1)])
def test_a_wave_lies_in_the_octave_of_its_frequency(x, y, octave):
    power = sharpness.power_by_octave(wave(x, y))[0]
    assert power.argmax() == octave and power[octave] > 20 * power.sum() / 21


def test_power_is_the_square_of_the_amplitude_and_no_matter_of_brightness():
    power = sharpness.power_by_octave(wave(6, 0))
    half = sharpness.power_by_octave(wave(6, 0, amplitude=0.5) + 0.3)
    torch.testing.assert_close(half, power / 4, atol=1e-4, rtol=1e-5)


def test_white_noise_has_the_same_power_everywhere():
    """For noise of variance 1 it is the sum of the squared window, (3/8 side)² for Hann in two dimensions."""
    noise = torch.randn(300, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    power = sharpness.power_by_octave(noise).mean(0)
    torch.testing.assert_close(power, torch.full_like(power, 0.25 * (3 / 8 * 64) ** 2), rtol=0.05, atol=0)


def test_a_blur_takes_what_its_transfer_function_says():
    """A mean over 3 pixels in x passes (1 + 2 cos(2 pi f / side)) / 3 of a wave of f cycles."""
    image = wave(6, 0) + wave(20, 0)
    blurred = F.conv2d(F.pad(image, (1, 1, 0, 0), mode="circular"), torch.full((1, 1, 1, 3), 1 / 3))
    ratio = (sharpness.power_by_octave(blurred) / sharpness.power_by_octave(image))[0]
    for octave, cycles in ((1, 6), (3, 20)):
        transfer = (1 + 2 * torch.cos(torch.tensor(2 * torch.pi * cycles / 64))) / 3
        assert ratio[octave].item() == pytest.approx(transfer.item() ** 2, rel=0.02)


def test_pca_of_blocks_that_have_low_rank_loses_nothing():
    rng = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 64, generator=rng)
    rows = torch.randn(20 * 16, 3, generator=rng) @ basis + 0.5
    images = sharpness.rearrange(rows, "(n h w) (p q) -> n 1 (h p) (w q)", n=20, h=4, p=8)
    mean, directions = sharpness.fit_pca(images[:12], 8, 3)
    torch.testing.assert_close(directions @ directions.T, torch.eye(3).double())
    torch.testing.assert_close(sharpness.through_pca(images, mean, directions, 8), images, atol=1e-4, rtol=1e-4)
    mean, directions = sharpness.fit_pca(images, 8, 2)               # what two of three directions leave
    left = sharpness.through_pca(images, mean, directions, 8) - images
    values = torch.linalg.eigvalsh(torch.cov(rows.double().T, correction=0))
    assert left.double().square().sum(1).mean().item() * 64 == pytest.approx(values[-3].item(), rel=1e-3)


def test_the_table(tmp_path, capsys, monkeypatch):
    """One row for each way, and the samples, here the held-out images themselves, with a ratio of 1."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "images").mkdir(parents=True)
    out.mkdir()
    records, rng = [], torch.Generator().manual_seed(0)
    for i in range(12):
        image = F.interpolate(torch.randn(1, 1, 16, 16, generator=rng), (64, 64), mode="bicubic")[0] / 3
        records.append({"path": f"images/{i}.png", "patient": f"p{i}", "split": ("train", "test")[i % 2]})
        save_image(image, source / records[i]["path"])
        if i % 2:
            save_image(image, out / f"{i}.png")
    write_csv(source / "index.csv", COLUMNS, map(index_row, records))
    arguments = ["--data", str(source), "--vae", str(ROOT / "weights/demo/vae"), "--samples", str(out)]
    monkeypatch.setattr(sharpness.sys, "argv", ["sharpness.py", *arguments])
    sharpness.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 and lines[1][-4:] == ["2-4", "4-8", "8-16", "16-32"]
    assert [line[0] for line in lines[2:]] == ["real,", "real,", "samples"] and "PCA" in lines[3]
    assert lines[4][-6:] == ["6", "-", "1.00", "1.00", "1.00", "1.00"]
    with pytest.raises(InputError, match="where the held-out images have 99x99"):
        sharpness.load_samples(out, 99)
