"""The benchmark's protocol: re-identification with the fraud it is there to find, distances and tables by hand."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import pictures

from benchmarks import chexgenbench
from common import cli
from common.cli import InputError
from radiographs.index import COLUMNS, index_row


def patients(n=60, images=3, width=12, noise=0.3, seed=0):
    """Features of n patients with some images each: a patient's own vector and noise."""
    rng = torch.Generator().manual_seed(seed)
    identity = torch.randn(n, 1, width, generator=rng).expand(-1, images, -1)
    features = (identity + noise * torch.randn(n, images, width, generator=rng)).reshape(-1, width)
    return [{"patient": f"p{i}"} for i in range(n) for _ in range(images)], features


def test_pairs_of_one_patient_and_of_two():
    names = ["a", "a", "a", "b", "c", "c"]
    pairs, same = chexgenbench.pairs_of(names, np.random.default_rng(0))
    found = sorted(tuple(sorted(pair)) for pair in pairs[same].tolist())
    assert found == [(0, 1), (0, 2), (1, 2), (4, 5)] and len(pairs) == 8
    assert all(names[i] != names[j] for i, j in pairs[~same].tolist())
    assert chexgenbench.pairs_of(names, np.random.default_rng(0), most=2)[1].sum() == 3


def test_a_verifier_tells_patients_apart_only_where_features_do():
    _, area = chexgenbench.fit_verifier(*patients(noise=0.3))
    assert area > 0.95
    records, features = patients(noise=0.3)
    nothing = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    _, area = chexgenbench.fit_verifier(records, nothing)
    assert 0.35 < area < 0.65


def test_a_verifier_is_logistic_regression():
    """At the optimum the gradient of the penalised likelihood, written out here, is zero."""
    records, features = patients(20, 2, 4, noise=1.0)
    pairs, same = chexgenbench.pairs_of([record["patient"] for record in records], np.random.default_rng(0))
    verifier = chexgenbench.Verifier(features, pairs, same, penalty=0.1)
    a, b = (features[pairs[:, side]].double().numpy() for side in (0, 1))
    x = np.abs(a - b) / np.abs(a - b).mean(0)
    weights, said = verifier.weights.numpy(), verifier(features[pairs[:, 0]], features[pairs[:, 1]]).numpy()
    error = said - same.numpy()
    np.testing.assert_allclose(x.T @ error / len(x) + 0.2 * weights[1:], 0, atol=1e-5)
    assert abs(error.mean()) < 1e-5 and (weights[1:] < 0).any()


def test_copies_are_re_identified(monkeypatch):
    """A model that adds a little noise to training images, beside images of new patients."""
    training, z = patients(width=24)
    verifier, _ = chexgenbench.fit_verifier(training, z)
    monkeypatch.setattr(chexgenbench, "pixel_distance", lambda path, other: 0.0)
    training = [record | {"path": ""} for record in training]
    copies = z[::3] + 0.05 * torch.randn(60, 24, generator=torch.Generator().manual_seed(3))
    _, new = patients(60, 1, width=24, seed=9)
    found = [chexgenbench.privacy([{"path": ""}] * 60, f, training, z, verifier) for f in (copies, new)]
    assert found[0]["Max_reid_scores"] > 0.9 and found[1]["Max_reid_scores"] < 0.5
    assert found[0]["Mean_latent_distance"] == pytest.approx(0.05, rel=0.1)
    assert found[1]["Min_latent_distance"] > 5 * found[0]["Mean_latent_distance"]


def test_means_and_extremes_of_the_images_of_one_prompt(tmp_path):
    """Two synthetic images of one prompt, one of another, whose nearest training image is the first's."""
    for name, value in (("t0", 10), ("t1", 20), ("a", 13), ("b", 15), ("c", 20)):
        Image.fromarray(np.full((70, 70), value, np.uint8)).save(tmp_path / f"{name}.png")
    training = [{"path": tmp_path / f"t{i}.png", "prompt": f"prompt {i}"} for i in range(2)]
    z = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    records = [{"path": tmp_path / f"{name}.png", "prompt": f"prompt {i}"}
               for name, i in (("a", 0), ("b", 0), ("c", 1))]
    features = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    found = chexgenbench.privacy(records, features, training, z)
    assert found["Mean_pixel_distance"] == (4 + 0) / 2 and found["Min_pixel_distance"] == (3 + 0) / 2
    assert found["Min_latent_distance"] == pytest.approx((1 + 50 ** 0.5) / 2)
    assert found["Mean_latent_distance"] == pytest.approx(((5 ** 0.5 + 1) / 2 + 50 ** 0.5) / 2)
    assert found["Mean_reid_scores"] == "not measured"
    records[2].pop("prompt")                                         # without one, the nearest
    assert chexgenbench.partners(records, features, training, z) == [0, 0, 0]


def test_utility_is_the_mean_over_labels(tmp_path):
    rows = [{"field": "edema", "auroc": 0.7}, {"field": "fracture", "auroc": 0.6}, {"field": "sex", "auroc": 0.9},
            {"field": "pneumonia", "auroc": None}, {"field": "age", "mae": 9.0}]
    cli.write_json(tmp_path / "u.json", {"real": rows, "synthetic": rows[:1], "both": []})
    original, synthetic, mixed = chexgenbench.utility(tmp_path / "u.json")
    assert original["auc_macro"] == pytest.approx(0.65) and original["auc_Edema"] == 0.7
    assert "auc_Pneumonia" not in original
    assert synthetic["auc_macro"] == 0.7 and mixed["auc_macro"] == "not measured"
    cli.write_json(tmp_path / "bad.json", {"real": 3})
    with pytest.raises(InputError, match="bad.json: not what python -m diagnosis utility"):
        chexgenbench.utility(tmp_path / "bad.json")


def test_too_few_patients_are_no_verifier():
    with pytest.raises(InputError, match="0 patients with two training images"):
        chexgenbench.fit_verifier(*patients(60, 1))


def test_the_tables(tmp_path, encoder, monkeypatch, capsys):
    for name, seed in (("real", 0), ("fake", 1)):
        pictures(tmp_path / name / "images", 60, seed)
        cli.write_csv(tmp_path / name / "index.csv", COLUMNS, (index_row(
            {"path": f"images/{i:03}.png", "patient": f"p{i // 2}", "split": ("train", "test")[i >= 44],
             "edema": ("negative", "positive")[i % 2]}) for i in range(60)))
    arguments = ["--real", tmp_path / "real", "--split", "test", "--synthetic", tmp_path / "fake",
                 "--train", tmp_path / "real", "--encoder", encoder, "--out", tmp_path / "table"]
    monkeypatch.setattr(chexgenbench.sys, "argv", ["chexgenbench.py", *map(str, arguments)])
    chexgenbench.main()
    report, text = json.loads((tmp_path / "table.json").read_text()), (tmp_path / "table.md").read_text()
    assert [row["Pathology"] for row in report["fidelity"]] == ["all", "Edema"]
    assert [row["real"] for row in report["fidelity"]] == [16, 8] and report["fidelity"][0]["FID"] == "not measured"
    assert [(row["who"], row["images"]) for row in report["privacy"]] == [("held-out real", 16), ("synthetic", 60)]
    assert all(0 <= row["Mean_reid_scores"] <= row["Max_reid_scores"] <= 1 for row in report["privacy"])
    assert report["utility"] == "not measured" and "## Utility\n\nnot measured\n" in text
    for column in ("FID (RadDino)", "KID (RadDino)", "Precision", "Coverage", "Max_reid_scores", "Min_pixel_distance"):
        assert f"| {column} |" in text
    row = report["fidelity"][0]
    assert f"| all | 16 | 60 | {row['FID (RadDino)']:.4g} | {row['KID (RadDino)']:.4g} |" in text
    notes = report["protocol"]["warnings"]
    assert any("AUROC of the re-identification on pairs of other patients" in note for note in notes)
