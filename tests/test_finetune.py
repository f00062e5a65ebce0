"""A run that starts from trained weights: RadiT on another grid and with new data sets, a VAE with more latent
channels."""
import dataclasses
import json
import shutil

import numpy as np
import phantom
import pytest
import torch

import radit
import sample
import train
from autoencoder import lora
from autoencoder.load import load_vae
from autoencoder.widen import widen
from common import cli, hub
from radiographs import fields, pixels
from radiographs.index import COLUMNS, index_row
from radit import RadiT, RadiTConfig
from training import finetune
from vae import RadVAE, VAEConfig

COVERED = {"dataset": {"PadChest": 5, "own": 2}, "sex": {"male": 4}, "age": [20, 50]}
BASE = RadiTConfig(channels=8, grid=(4, 4), width=64, depth=2, heads=2, datasets=(*fields.DATASETS, "own"),
                   covered=COVERED, vae="0123456789abcdef")
RECORDS = [{"age": 30.0, "sex": "male", "dataset": "own"}, {"dataset": "PadChest"}, {}]


@pytest.fixture
def base():
    """Random weights, as bfloat16 stores them."""
    torch.manual_seed(0)
    model = RadiT(BASE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.1).bfloat16())
    return model


def extended(base, shape=(8, 4, 4), datasets=("PadChest", "new", "own", "newer")):
    return finetune.extend_config(base.config, shape, base.config.vae, datasets=list(datasets), covered={}, examples=[])


def test_without_a_step_the_pictures_are_those_of_the_base(base):
    model = finetune.extend(base, extended(base)).eval()
    assert model.config.datasets == (*fields.DATASETS, "own", "new", "newer")
    for records in (RECORDS, [{"dataset": "own", "edema": "positive"}] * 3):
        pictures = [sample.generate(net, None, records, [0, 1, 2], steps=3)[0] for net in (base, model)]
        assert pictures[0].std() > 0.1 and torch.equal(*pictures)
    # A new data set starts as an unknown one.
    new = sample.generate(model, None, [{"dataset": "newer", "sex": "male"}], [0], steps=3)[0]
    assert torch.equal(new, sample.generate(base, None, [{"sex": "male"}], [0], steps=3)[0])
    rows = model.metadata.tables["dataset"].weight
    assert len(rows) == 1 + len(fields.DATASETS) + 3 and torch.equal(rows[:-2], base.metadata.tables["dataset"].weight)


def test_another_grid_has_the_same_weights(base):
    model = finetune.extend(base, extended(base, (8, 8, 6), ()))
    assert model.config.grid == (8, 6) and model.config.datasets == BASE.datasets and model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert sample.generate(model.eval(), None, [{}], [0], steps=1)[0].shape[2:] == (8, 6)


def test_other_images_than_the_bases_are_refused(base):
    for shape, vae, message in (((8, 4, 4), "fedcba9876543210", "VAE 0123456789abcdef, .* VAE fedcba9876543210"),
                                ((8, 4, 4), "", "the VAE 0123456789abcdef, and the new images are pixels"),
                                ((4, 4, 4), BASE.vae, "made for 8 channels, and the new images have 4")):
        with pytest.raises(cli.InputError, match=message):
            finetune.extend_config(BASE, shape, vae, datasets=[], covered={})


def test_coverage_is_of_both():
    new = {"dataset": {"own": 3, "new": 1}, "view": {"PA": 4}, "age": [1, 30]}
    config = finetune.extend_config(BASE, (8, 4, 4), BASE.vae, datasets=["own", "new"], covered=new)
    assert config.covered == {"dataset": {"PadChest": 5, "own": 5, "new": 1}, "sex": {"male": 4}, "age": [1, 50],
                              "view": {"PA": 4}}
    assert BASE.covered == COVERED and COVERED["dataset"] == {"PadChest": 5, "own": 2}


def test_the_same_images_at_another_size_are_counted_once():
    """As the demo weights were trained, first at 128 and then at 256 pixels."""
    records = [{"dataset": "own", "sex": "male", "view": "PA", "age": 40}, {"dataset": "own", "sex": "male", "age": 50}]
    counted = {"covered": fields.coverage(records), "pairs": fields.count_pairs(records)}
    stored = json.loads(json.dumps(counted))                         # as a config.json holds it
    base = dataclasses.replace(BASE, datasets=(*fields.DATASETS, "own"), **stored)
    config = finetune.extend_config(base, (8, 8, 8), BASE.vae, datasets=["own"], **counted)
    assert config.grid == (8, 8) and config.covered["sex"] == {"male": 2}
    assert json.loads(json.dumps({"covered": config.covered, "pairs": config.pairs})) == stored


def adapt(base):
    """The extended base with adapters that do something."""
    model = finetune.extend(base, extended(base)).eval()
    model.fingerprint = "of its file"
    lora.add(model, 2, 4)
    for adapter in lora.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    return model


@torch.no_grad()
def test_lora_of_radit_equals_peft(base):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, peer = adapt(base), finetune.extend(base, extended(base)).eval()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "out", "up", "down"])
    peft.inject_adapter_in_model(config, peer)
    theirs = {name.removeprefix("blocks."): m for name, m in peer.named_modules() if hasattr(m, "lora_A")}
    ours = lora.adapters(model)
    assert ours.keys() == theirs.keys() and len(ours) == 4 * BASE.depth
    for name, adapter in ours.items():
        theirs[name].lora_A["default"].weight.copy_(adapter.A)
        theirs[name].lora_B["default"].weight.copy_(adapter.B)
    torch.manual_seed(1)
    inputs = torch.randn(3, 8, 4, 4), torch.rand(3), *fields.encode_metadata(RECORDS, model.config.datasets)
    expected = peer(*inputs)
    assert torch.allclose(model(*inputs), expected, atol=1e-5)
    assert (expected - base(*inputs)).abs().mean() > 0.01
    lora.merge(model)
    assert torch.allclose(model(*inputs), expected, atol=1e-5)


def test_only_adapters_and_data_sets_are_trained(base):
    model = finetune.extend(base, extended(base))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.add(model, 2, 4)
    age, codes = fields.encode_metadata([{"dataset": "new"}, {"dataset": "own"}], model.config.datasets)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):                                               # A moves only after B has
        model(torch.randn(2, 8, 4, 4), torch.rand(2), age, codes).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name.replace("parametrizations.weight.original", "weight"): t for name, t in model.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {finetune.TABLE}
    for adapter in lora.adapters(model).values():
        assert adapter.B.abs().max() > 0


def test_saved_adapters_of_radit_are_merged_for_sampling(base, tmp_path):
    folder = tmp_path / "weights/radit"
    net = finetune.extend(base, dataclasses.replace(extended(base), channels=8))
    hub.save_model(net, folder)
    alone = hub.fingerprint(folder)
    net.fingerprint = alone
    lora.add(net, 2, 4)
    with torch.no_grad():
        for adapter in lora.adapters(net).values():
            torch.nn.init.normal_(adapter.B, std=0.1)
        net.metadata.tables["dataset"].weight[-1] += 1
    lora.save(net, folder)
    torch.manual_seed(0)
    hub.save_model(RadVAE(VAEConfig(1, 2, (8, 8), 1, 4)), tmp_path / "weights/vae")
    with pytest.raises(cli.InputError, match="is not the VAE"):      # as for weights without adapters
        sample.load_weights(tmp_path / "weights")
    again = hub.load_model(RadiT, RadiTConfig, folder)
    again.fingerprint = alone
    lora.load(again, folder)
    lora.merge(again)
    assert set(again.state_dict()) == set(base.state_dict())
    pictures = [sample.generate(n, None, [{"dataset": "newer"}], [0], steps=2)[0] for n in (net.eval(), again)]
    assert torch.allclose(*pictures, atol=0.05)                      # A and B were rounded to bfloat16
    assert (pictures[1] - sample.generate(base, None, [{}], [0], steps=2)[0]).abs().max() > 0.1
    assert hub.fingerprint(folder) != alone                          # pictures of other adapters are not mixed up
    assert hub.fingerprint(folder / "model.safetensors") == alone


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    model = RadVAE(VAEConfig(1, 3, (8, 16), 1, 4)).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


@torch.no_grad()
def test_a_widened_vae_reconstructs_as_its_base_does(autoencoder):
    x, old = torch.rand(2, 1, 16, 16) * 2 - 1, 4 * 3
    same = widen(autoencoder).eval()
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in autoencoder.state_dict().items())
    assert torch.equal(same.decode(same.encode(x)[0]), autoencoder.decode(autoencoder.encode(x)[0]))
    wide = widen(autoencoder, 5).eval()
    for ours, theirs in zip(wide.encode(x), autoencoder.encode(x)):
        assert ours.shape == (2, 20, 4, 4) and torch.allclose(ours[:, :old], theirs, atol=1e-5)
    z = wide.encode(x)[0]
    assert z[:, old:].std() > 0.01                                   # the new channels are alive
    z[:, old:] = torch.randn(2, 8, 4, 4)                             # and the image does not depend on them
    assert torch.allclose(wide.decode(z), autoencoder.decode(z[:, :old]), atol=1e-5)
    with pytest.raises(cli.InputError, match="--latent-channels 2: the base has 3"):
        widen(autoencoder, 2)


def test_new_channels_are_put_to_use(autoencoder):
    wide = widen(autoencoder, 5)
    x, noise = torch.rand(2, 1, 16, 16), torch.randn(2, 20, 4, 4)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wide(x, noise)[0].square().mean().backward()
        optimizer.step()
    assert wide.decoder.conv_in.weight[:, 3:].abs().max() > 0 and wide.quant_conv.weight.grad[3:5].abs().max() > 0


# ---------------------------------------------------------------------------------------------------------
# The commands

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two small prepared sources, of 32 and of 64 pixels, and a VAE."""
    root = tmp_path_factory.mktemp("sources")
    rng = torch.Generator().manual_seed(0)
    for name, side in (("old", 32), ("new", 64)):
        (root / name / "images").mkdir(parents=True)
        rows = []
        for i in range(12):
            image = torch.rand(1, side, side, generator=rng) * 2 - 1
            pixels.save_image(image, root / name / f"images/{i}.png")
            record = {"path": f"images/{i}.png", "patient": f"p{i}", "split": "train" if i < 9 else "valid"}
            rows.append(index_row(record | {"dataset": name, "age": 30.0 + i}))
        cli.write_csv(root / name / "index.csv", COLUMNS, rows)
    return root


QUICK = ["--images", "8", "--batch", "4", "--log-every", "1", "--save-every", "2", "--warmup", "1", "--lr", "0.03",
         "--no-compile"]


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    train.main()


@pytest.fixture
def pixel_base(sources, tmp_path, monkeypatch):
    """The weights of a short run on pixels."""
    monkeypatch.setitem(radit.SIZES, "XS", (64, 1, 1))
    monkeypatch.setattr(train.RadiTTask, "preview", lambda *_: None)
    call(monkeypatch, "radit", "--data", sources / "old", "--pixels", "--patch", 8, "--size", "XS",
         "--out", tmp_path / "base", *QUICK)
    return tmp_path / "base/weights"


def test_images_are_trained_under_the_rows_of_their_data_sets(sources, pixel_base, tmp_path, monkeypatch):
    """"later" comes before "old" in the alphabet, and after it in the model's table."""
    shutil.copytree(sources / "old", tmp_path / "later")
    index = tmp_path / "later/index.csv"
    index.write_text(index.read_text().replace("old,", "later,"))
    seen = []
    monkeypatch.setattr(train, "train", lambda task, model, examples, *_, **__: seen.append((task, model, examples)))
    call(monkeypatch, "radit", "--data", tmp_path / "later", sources / "old", "--pixels", "--init", pixel_base,
         "--out", tmp_path / "run")
    (task, model, examples), = seen
    names = [{"dataset": name} for name in ["later"] * 9 + ["old"] * 9 + ["later"] * 3 + ["old"] * 3]
    _, codes = fields.encode_metadata(names, model.config.datasets)
    assert torch.equal(torch.cat([examples.codes.long(), task.held_out[3]])[:, 0], codes[:, 0])
    assert len(codes[:, 0].unique()) == 2


@pytest.mark.parametrize("more", [[], ["--lora-rank", 2]], ids=["whole", "lora"])
def test_a_run_starts_from_weights(sources, pixel_base, tmp_path, monkeypatch, more):
    tuned, options = tmp_path / "tuned", ["radit", "--data", sources / "new", "--pixels", "--init", pixel_base]
    call(monkeypatch, *options, "--out", tuned, *QUICK, *more)
    base, _ = sample.load_weights(pixel_base)
    model, _ = sample.load_weights(tuned / "weights")
    assert model.config.grid == (64, 64) and base.config.grid == (32, 32) and model.config.patch == 8
    assert model.config.datasets == (*base.config.datasets, "new") and base.config.datasets[-1] == "old"
    assert model.config.covered["dataset"] == {"old": 9, "new": 9}
    moved = {name for name, tensor in base.state_dict().items() if tensor.shape == model.state_dict()[name].shape
             and not torch.equal(tensor, model.state_dict()[name])}
    assert "blocks.0.qkv.weight" in moved and ("embed.weight" in moved) == (not more)
    assert (tuned / "weights/radit/lora.json").exists() == bool(more)
    for flag, value in (("--size", "XS"), ("--patch", 8), ("--shift", 2)):
        with pytest.raises(SystemExit):
            call(monkeypatch, *options, "--out", tmp_path / "no", flag, value)
    call(monkeypatch, *options, "--out", tuned, *QUICK, *more)      # the same command again: finished already


def test_adapters_without_weights_are_refused(sources, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "radit", "--data", sources / "old", "--pixels", "--lora-rank", 2, "--out", tmp_path / "run")
    assert "name these with --init" in capsys.readouterr().err


def test_a_vae_is_trained_on_with_more_channels_on_squares(sources, autoencoder, tmp_path, monkeypatch):
    hub.save_model(autoencoder, tmp_path / "base")
    sizes = []
    forward = RadVAE.forward
    monkeypatch.setattr(RadVAE, "forward", lambda model, x, noise: sizes.append(x.shape) or forward(model, x, noise))
    options = ["vae", "--data", sources / "new", "--init", tmp_path / "base", *QUICK]
    call(monkeypatch, *options, "--latent-channels", 5, "--crop", 16, "--out", tmp_path / "run")
    assert load_vae(tmp_path / "run/weights/vae").config == dataclasses.replace(autoencoder.config, latent_channels=5)
    assert (4, 1, 16, 16) in sizes and (4, 1, 64, 64) not in sizes[:2]   # the held-out images stay whole
    for more, message in ((["--crop", 10], "--crop 10: not a multiple of 4"),
                          (["--crop", 128], "more than the images' 64"),
                          (["--latent-channels", 2], "the base has 3")):
        with pytest.raises(cli.InputError, match=message):
            call(monkeypatch, *options, "--out", tmp_path / "no", *more)
    with pytest.raises(SystemExit):
        call(monkeypatch, *options, "--out", tmp_path / "no", "--widths", "8,8")
    assert not (tmp_path / "no").exists()


def test_squares_are_parts_of_their_images():
    x = torch.arange(2 * 6 * 8.0).view(2, 1, 6, 8)
    squares = train.random_squares(x, 4, torch.tensor([[0.0, 0.0], [0.999, 0.999]]))
    assert torch.equal(squares[0], x[0, :, :4, :4]) and torch.equal(squares[1], x[1, :, 2:, 4:])
    starts = train.random_squares(x[:1].expand(500, -1, -1, -1), 4, torch.rand(500, 2))[:, 0, 0, 0]
    assert set(starts.tolist()) == {8.0 * i + j for i in range(3) for j in range(5)}


@pytest.mark.slow
def test_a_new_data_set_is_learnt_and_the_old_one_stays(phantom_weights, tmp_path, monkeypatch):
    """The new data set's images have a white marker in a corner that is black in those that the base knows."""
    phantom.write_source(tmp_path / "old", 200)
    new, corner = tmp_path / "new", np.s_[..., :6, :6]
    phantom.write_source(new, 200, seed=1)
    for path in (new / "images").iterdir():
        image = pixels.load_image(path)
        image[corner] = 1
        pixels.save_image(image, path)
    index = new / "index.csv"
    index.write_text(index.read_text().replace("phantom,", "marked,"))
    call(monkeypatch, "radit", "--data", tmp_path / "old", new, "--pixels", "--init", phantom_weights,
         "--out", tmp_path / "run", "--images", 16000, "--cooldown", 4000, "--batch", 32, "--lr", 2e-3, "--warmup", 500,
         "--ema", 500, "--log-every", 25, "--save-every", 250, "--no-compile")
    model, _ = sample.load_weights(tmp_path / "run/weights")
    base, _ = sample.load_weights(phantom_weights)
    record = {"age": 20.0, "sex": "male", "cardiomegaly": "positive", "support_devices": "negative",
              "pleural_effusion": "negative"}
    rest = torch.from_numpy(phantom.draw(record, np.random.default_rng(0))).float()
    rest[corner] = 0

    def look(net, dataset):
        """The marker's grey, and how much the rest is like the phantom that was asked for."""
        images, _ = sample.generate(net, None, [record | {"dataset": dataset}] * 8, range(8), steps=10)
        mean = (images.mean((0, 1)) + 1) / 2
        marker, mean[corner] = mean[1:5, 1:5].mean().item(), 0
        return marker, torch.corrcoef(torch.stack([mean.flatten(), rest.flatten()]))[0, 1].item()

    (new_marker, new_rest), (old_marker, old_rest), (_, before) = (
        look(model, "marked"), look(model, "phantom"), look(base, "phantom"))
    assert new_marker > 0.7 and old_marker < 0.3
    assert min(new_rest, old_rest) > 0.85 and old_rest > before - 0.05
