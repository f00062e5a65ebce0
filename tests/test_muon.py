"""training/muon.py: orthogonal steps beside the singular value decomposition and torch's Muon; the rest is AdamW."""
import copy

import pytest
import torch

import vae
from training import checkpoint
from training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (16, 16)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    levelled = u.T @ orthogonal(matrix) @ v.T
    assert (levelled - levelled.diagonal().diag()).abs().max() < 1e-4
    kept = levelled.diagonal()[s > 0.05 * s.max()]
    assert kept.min() > 0.6 and kept.max() < 1.3


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(24, 8), torch.nn.Linear(8, 32)])
        self.head = torch.nn.Linear(32, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


def test_steps_beside_torch_optim():
    """Three steps: the blocks' matrices as torch.optim.Muon, which rounds to bfloat16; all others as AdamW."""
    model, x = Model(), torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    peer, start = copy.deepcopy(model), copy.deepcopy(model)
    ours = Muon(model, 0.01, (0.9, 0.99))
    checkpoint.start_moments(ours)
    matrices = [block.weight for block in peer.blocks]
    rest = [p for p in peer.parameters() if all(p is not matrix for matrix in matrices)]
    theirs = [torch.optim.Muon(matrices, 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW(rest, 0.01, (0.9, 0.99), weight_decay=0.0, fused=True)]
    for _ in range(3):
        for net, optimizers in ((model, [ours]), (peer, theirs)):
            net.zero_grad()
            net(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    for (name, a), b, before in zip(model.named_parameters(), peer.parameters(), start.parameters()):
        assert (a - b).norm() < 0.03 * (a - before).norm(), name


def test_convolutions_are_matrices_and_the_ends_are_not():
    """A convolution's step, made orthogonal as (out, in 9): all its singular values are near the factor."""
    torch.manual_seed(0)
    model = vae.RadVAE(vae.VAEConfig(1, 4, (8, 8), 1, 4))
    optimizer = Muon(model, 0.01, (0.9, 0.99))
    checkpoint.start_moments(optimizer)
    taken = {name for name, p in model.named_parameters() if any(p is matrix for matrix in optimizer.matrices)}
    assert "encoder.mid_block.resnets.0.conv1.weight" in taken and "decoder.mid_block.attentions.0.to_q.weight" in taken
    assert not taken & {"encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight",
                        "encoder.mid_block.resnets.0.conv1.bias"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(4, 1, 16, 16)
    reconstruction, mean, logvar = model(x, torch.randn(4, 16, 4, 4))
    vae.vae_loss(x, reconstruction, mean, logvar)[0].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        step = before[name] - p.detach()
        if name in taken and "conv" in name:
            values = torch.linalg.svdvals(step.flatten(1)) / (0.01 * 0.2 * 72 ** 0.5)
            assert values.max() < 1.3, name
            assert values.median() > 0.6, name
