"""DeepLabV3 on any timm backbone, which neither timm nor torchvision offers."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP


class DeepLabV3(nn.Module):
    """Atrous spatial pyramid pooling on the last features of a timm network, upsampled.

    Chen et al., *Rethinking Atrous Convolution for Semantic Image Segmentation*, arXiv 1706.05587.
    Without atrous rates it is the light head that Google's MobileNetV2 models have.

    Args:
        backbone: a timm network with `features_only`.
        num_classes: channels of the logits.
        output_stride: of the backbone's last features: 8, 16 or 32.
        atrous_rates: of the pyramid's 3×3 convolutions; empty for none.
        channels: of the pyramid's output.
        pretrained: start from timm's weights of the backbone, which are downloaded; in a recipe,
            `weights: DEFAULT`.

    Example:
        >>> import torch
        >>> net = DeepLabV3("mobilenetv2_050", num_classes=5).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 5, 64, 96])
    """

    def __init__(
        self,
        backbone: str = "mobilenetv2_100",
        num_classes: int = 21,
        output_stride: int = 16,
        atrous_rates: Sequence[int] = (),
        channels: int = 256,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = timm.create_model(
            backbone,
            pretrained=pretrained,
            features_only=True,
            output_stride=output_stride,
            out_indices=(-1,),
        )
        features = self.backbone.feature_info.channels()[-1]
        self.classifier = nn.Sequential(
            ASPP(features, list(atrous_rates), channels), nn.Conv2d(channels, num_classes, 1)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            input: [B, 3, H, W], normalised as the backbone expects.

        Returns:
            Logits [B, num_classes, H, W].
        """
        x = self.classifier(self.backbone(input)[-1])
        return F.interpolate(x, size=input.shape[-2:], mode="bilinear", align_corners=False)
