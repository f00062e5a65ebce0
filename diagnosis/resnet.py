"""CheXGenBench's diagnostic network, a ResNet-50 (He et al. 2016), in the place of the classifier's encoder.

It is torchvision's, which is installed separately, and it is large for a CPU. The benchmark starts it from ImageNet's
weights, which are published as pickles; here it starts from random ones.
"""
import importlib
from dataclasses import dataclass

import torch
from torch import nn

from common import check
from common.cli import InputError


@dataclass
class ResNetConfig:
    layers: int = 50          # 18, 34, 50, 101 or 152, as in torchvision.models
    image_size: int = 224     # side in pixels that images are resampled to

    def __post_init__(self):
        check.one_of(self, (18, 34, 50, 101, 152), "layers")
        check.whole(self, 32, 8192, "image_size")

    @property
    def width(self):
        return 512 if self.layers < 50 else 2048


class ResNet(nn.Module):
    """Called like encoders/raddino.py's Encoder, so that classifier.py can hold either."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        try:
            models = importlib.import_module("torchvision.models")
        except (ImportError, RuntimeError) as error:                 # missing, or made for another torch
            raise InputError("a ResNet needs the package torchvision, of the version that fits torch: pip install "
                             f"torchvision ({str(error)[:100]})") from None
        self.body = models.get_model(f"resnet{config.layers}")
        self.body.fc = nn.Identity()
        # ImageNet's mean and standard deviation of each channel.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1), persistent=False)

    def normalise(self, images):                                     # N 1 H W in [-1, 1]
        return ((images + 1) / 2 - self.mean) / self.std             # N 3 H W

    def forward(self, x, keep=None):                                 # N 3 H W
        return self.body(x), None                                    # N D
