"""A small plain segmentation network, built as torchvision builds an FCN on a ResNet."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from pacswap.scenes import CLASSES


class SceneNet(nn.Module):
    """Segments the drawn scenes of `pacswap.scenes`: residual stages, a head, upsampled logits.

    `stem` and `layer1` run at half the input's resolution, `layer2` and `layer3` (dilated) and
    `head` at a quarter. The logits are upsampled bilinearly, so outlines and thin structures are
    where it errs.

    Args:
        num_classes: channels of the logits.
        width: channels of `stem` and `layer1`; `layer2` has twice as many, `layer3` three times.

    Example:
        >>> import torch
        >>> SceneNet().eval()(torch.zeros(1, 3, 33, 47)).shape
        torch.Size([1, 6, 33, 47])
    """

    def __init__(self, num_classes: int = len(CLASSES), width: int = 24) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
                bn=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
            )
        )
        self.layer1 = nn.Sequential(Block(width, width), Block(width, width))
        self.layer2 = nn.Sequential(Block(width, 2 * width, stride=2), Block(2 * width, 2 * width))
        self.layer3 = nn.Sequential(
            Block(2 * width, 3 * width, dilation=2), Block(3 * width, 3 * width, dilation=4)
        )
        self.head = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3 * width, 2 * width, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(2 * width),
                relu=nn.ReLU(inplace=True),
                dropout=nn.Dropout(0.1),
                classifier=nn.Conv2d(2 * width, num_classes, 1),
            )
        )

    def forward(self, input: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            input: [B, 3, H, W], normalised as `pacswap.scenes.normalize` does, H and W ≥ 16.

        Returns:
            Logits [B, num_classes, H, W].
        """
        x = self.layer3(self.layer2(self.layer1(self.stem(input))))
        x = self.head(x)
        return F.interpolate(x, size=input.shape[-2:], mode="bilinear", align_corners=False)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut, torchvision's `BasicBlock` with dilation.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution and the shortcut.
        dilation: of both convolutions.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H/stride, W/stride]."""
        shortcut = input if self.downsample is None else self.downsample(input)
        x = self.relu(self.bn1(self.conv1(input)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)
