"""Muon: the matrices of a model's blocks take steps of momentum made orthogonal; everything else is left to AdamW.

    m <- 0.95 m + 0.05 g                  momentum of the gradient g
    u  = orthogonal(0.05 g + 0.95 m)      U V^T of the singular value decomposition U S V^T, roughly
    W <- W - lr 0.2 sqrt(max(rows, columns)) u

A matrix's gradient has a few large singular values, and Adam follows these; Muon gives all directions the same length.
The factor makes an entry's step about as long as AdamW's, so that both share one learning rate. The weight of a
convolution (out, in, 3, 3) is taken as a matrix (out, in 9).

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor is Liu et al. 2025's. torch.optim.Muon does
the same for matrices only, and in bfloat16, which took 8 to 25 times as long on a CPU without bfloat16 units.
"""
import torch

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # a s + b s^3 + c s^5 takes s in (0, 1] to 0.7 to 1.2 when applied five times


def orthogonal(matrix):
    """U f(S) V^T of matrix = U S V^T, both (rows, columns), with all of f(S) near 1, by Newton-Schulz iterations."""
    a, b, c = QUINTIC
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller product of the two
    x = wide / (wide.norm() + 1e-7)                                  # no singular value above 1
    for _ in range(5):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.AdamW):
    """Like AdamW for the trainable parameters of `model`, but for the matrices of its blocks: their momentum is in the
    state `exp_avg`, and `exp_avg_sq` stays 0."""

    def __init__(self, model, lr, betas):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(parameters.values(), lr, betas, weight_decay=0.0, fused=True)
        self.matrices = [p for name, p in parameters.items() if "block" in name and p.ndim > 1]

    @torch.no_grad()
    def step(self):
        for weight in self.matrices:
            momentum = self.state[weight]["exp_avg"].lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonal(weight.grad.lerp(momentum, MOMENTUM).flatten(1))  # out in...
            rate = self.param_groups[0]["lr"] * 0.2 * max(update.shape) ** 0.5
            weight.sub_(update.view_as(weight), alpha=rate)
            weight.grad = None                                       # so that AdamW passes over it
        super().step()
