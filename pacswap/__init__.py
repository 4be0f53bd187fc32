"""pacswap: convolutions of a pretrained network become pixel-adaptive, and nothing breaks.

>>> import pacswap, torchvision
>>> net = torchvision.models.resnet18()
>>> upgraded = pacswap.swap(net, layers="layer4.*.conv2", guidance="layer1")
>>> type(pacswap.revert(upgraded)) is type(net)
True
"""

from importlib.metadata import version as _version

from pacswap import errors, nn, ops
from pacswap.surgery import (
    Group,
    GuidanceSpec,
    KernelSpec,
    LayerQuery,
    Plan,
    Verification,
    disabled,
    layers,
    plan,
    revert,
    rewrite,
    swap,
    verify,
)

__version__ = _version("pacswap")

__all__ = [
    "Group",
    "GuidanceSpec",
    "KernelSpec",
    "LayerQuery",
    "Plan",
    "Verification",
    "__version__",
    "disabled",
    "errors",
    "layers",
    "nn",
    "ops",
    "plan",
    "revert",
    "rewrite",
    "swap",
    "verify",
]
