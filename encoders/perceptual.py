"""The Rad-DINO perceptual loss: two images are alike if an encoder's tokens are, in every layer.

    loss(x, y) = mean over layers l = 1 ... L and tokens of |n(h_l(x)) - n(h_l(y))|²,  n(h) = h / max(|h|, 1e-6)

which is the mean of 2 (1 - cosine) of the two images' tokens: from 0 to 4, whatever the encoder's width.

Source: the DINO perceptual loss (2025), as the paper's Rad-VAE uses it. Every token is scaled to length 1 on its own,
so that a few tokens and channels with large values do not outweigh the rest. The published loss is the mean over
Rad-DINO's 768 channels too and has the weight 250 beside a Charbonnier loss of 1; here channels are summed, because a
mean would give a narrow encoder a larger weight, so the same weight reads 250 / 768 = 0.33.
Gradients reach y only. Memory: each layer's activations are computed again in the backward pass (gradient
checkpointing), so that those of one layer are held at a time.

On the pixels that a flow predicts, the last layer alone served best, with the weight 0.01 for 1 - cosine: PixelGen (Ma
et al. 2026, arXiv 2602.02493), where LPIPS stood beside it; LPIPS is not offered here.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

PUBLISHED_WEIGHT = 250 / 768  # of the VAE's loss: 250 for a mean over 768 channels
FLOW_WEIGHT = 0.01 / 2        # of the flow's loss: 0.01 for 1 - cosine


def to_encoder_input(encoder, images):
    """Images (N, 1, H, W) in [-1, 1] as the encoder expects them, sides resampled to whole patches: 512 becomes 518."""
    sides = [max(1, round(side / encoder.config.patch)) * encoder.config.patch for side in images.shape[2:]]
    if sides != list(images.shape[2:]):
        images = F.interpolate(images, sides, mode="bicubic", antialias=True)
    return encoder.normalise(images)                                 # N C H W


def perceptual_loss(encoder, x, y, last_only=False):
    """The distance of each reconstruction y from its original x, both (N, 1, H, W) in [-1, 1]: (N,). With `last_only`
    that in the last layer, not the mean over all layers."""
    with torch.no_grad():
        target = encoder.embed(to_encoder_input(encoder, x))                     # N T D
    tokens, distance = encoder.embed(to_encoder_input(encoder, y)), 0            # N T D
    for block in encoder.blocks:
        with torch.no_grad():
            target = block(target)                                   # N T D
        tokens = recompute(block, tokens, use_reentrant=False)      # N T D
        if last_only and block is not encoder.blocks[-1]:
            continue
        with torch.autocast(tokens.device.type, enabled=False):      # squares of small differences: float32
            difference = F.normalize(tokens.float(), dim=-1, eps=1e-6) - F.normalize(target.float(), dim=-1, eps=1e-6)
            distance = distance + difference.square().sum(2).mean(1)         # N
    return distance if last_only else distance / len(encoder.blocks)
