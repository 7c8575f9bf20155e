"""Residual blocks of image networks."""

import subprocess
import sys

import torch
import torch.nn.functional as F

from everysat.nn.image_unet import Residual

FEW_CHANNELS = """
import torch
from everysat.nn.image_unet import Residual
torch.set_num_threads(2)
block = Residual(8, 16, 2)
for _ in range(10):
    x = torch.randn(3, 8, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    block(x).square().sum().backward()
"""


def test_its_projection_is_the_strided_convolution():
    torch.manual_seed(0)
    block, x = Residual(4, 6, 2).eval(), torch.randn(2, 4, 9, 8)
    assert block.downsample is not None
    torch.testing.assert_close(block.downsample[0](x[..., ::2, ::2]), F.conv2d(x, block.downsample[0].weight, stride=2))
    assert block(x).shape == (2, 6, 5, 4)


def test_few_channels_train_with_two_threads():
    """oneDNN's gradient of a strided 1 x 1 convolution of 8 channels, channels last, writes beyond its memory: the process died."""
    subprocess.run([sys.executable, "-c", FEW_CHANNELS], check=True, timeout=120)
