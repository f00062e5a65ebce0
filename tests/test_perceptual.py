"""The perceptual loss beside a direct computation from transformers' hidden states, and by cosines."""
import pytest
import torch
import torch.nn.functional as F
from test_raddino import CONFIG, peer, randomise, write

from encoders import perceptual, raddino


@pytest.fixture
def ours():
    return randomise(raddino.Encoder(CONFIG)).requires_grad_(False)


def direct(theirs, x, y):
    """facts of the loss, written out: layers one by one, tokens one by one."""
    def states(images):
        pixels = ((images + 1) / 2 - 0.5307) / 0.2583
        return theirs(pixels.repeat(1, 3, 1, 1), output_hidden_states=True).hidden_states[1:]
    total = 0
    for a, b in zip(states(x), states(y)):
        a, b = (h / h.norm(dim=2, keepdim=True).clamp(min=1e-6) for h in (a, b))
        total = total + sum((a[:, t] - b[:, t]).square().sum(1) for t in range(a.shape[1])) / a.shape[1]
    return total / CONFIG.depth


def images(size=70):
    rng = torch.Generator().manual_seed(3)
    return torch.rand(2, 1, size, size, generator=rng) * 2 - 1, torch.rand(2, 1, size, size, generator=rng) * 2 - 1


def test_equal_to_a_direct_computation_with_its_gradient(tmp_path):
    theirs = peer()
    write(tmp_path, theirs)
    ours = raddino.load_encoder(tmp_path)
    x, y = images()
    a, b = y.clone().requires_grad_(), y.clone().requires_grad_()
    expected, loss = direct(theirs, x, a), perceptual.perceptual_loss(ours, x, b)
    torch.testing.assert_close(loss, expected, atol=1e-7, rtol=1e-5)
    expected.sum().backward()
    loss.sum().backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("width", [96, 192])
def test_the_mean_of_two_minus_two_cosines_at_any_width(width):
    """So a weight means the same beside a small encoder and beside Rad-DINO."""
    encoder = randomise(raddino.Encoder(raddino.EncoderConfig(width, 2, 3, 14, 70))).requires_grad_(False)
    x, y = images()
    pairs = zip(*(encoder.hidden_states(encoder.normalise(image))[1:] for image in (x, y)))
    expected = torch.stack([2 - 2 * F.cosine_similarity(a, b, dim=2) for a, b in pairs]).mean((0, 2))
    torch.testing.assert_close(perceptual.perceptual_loss(encoder, x, y), expected, atol=1e-6, rtol=1e-5)
    assert 0.01 < expected.min()


def test_the_weight_is_the_published_one():
    """250 times a mean over 768 channels is PUBLISHED_WEIGHT times a sum over them."""
    difference = torch.randn(5, 768, generator=torch.Generator().manual_seed(0)).double()
    assert 250 * difference.square().mean() == pytest.approx(
        perceptual.PUBLISHED_WEIGHT * difference.square().sum(1).mean().item(), rel=1e-12)


def test_gradients_go_to_the_reconstruction_only(ours):
    x, y = (image.requires_grad_() for image in images())
    perceptual.perceptual_loss(ours, x, y).sum().backward()
    assert x.grad is None and y.grad.abs().max() > 0 and all(p.grad is None for p in ours.parameters())
    assert perceptual.perceptual_loss(ours, x, x).abs().max() == 0


def test_sides_become_whole_patches(ours):
    assert perceptual.to_encoder_input(ours, torch.zeros(1, 1, 512, 40)).shape == (1, 3, 518, 42)
    x, y = images(70)
    assert torch.equal(perceptual.to_encoder_input(ours, x), ours.normalise(x))


def test_one_layer_is_held_at_a_time():
    """The activations that autograd keeps do not grow with depth beyond one token tensor a layer."""
    def kept(depth):
        encoder = raddino.Encoder(raddino.EncoderConfig(64, depth, 1, 14, 70)).requires_grad_(False)
        total = 0
        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor
        x, y = images()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            perceptual.perceptual_loss(encoder, x, y.requires_grad_())
        return total
    per_layer = (kept(6) - kept(2)) / 4
    assert per_layer < 12 * 2 * 26 * 64                              # without checkpointing more than twice that
