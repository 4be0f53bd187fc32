"""pacswap: convolutions of a pretrained network become pixel-adaptive, and nothing breaks.

>>> import pacswap, torchvision
>>> net = torchvision.models.resnet18()
>>> upgraded = pacswap.swap(net, layers="layer4.*.conv2", guidance="layer1")
>>> type(pacswap.revert(upgraded)) is type(net)
True
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

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

if _TYPE_CHECKING:
    from pacswap import hub
    from pacswap.checkpoint import load, save
    from pacswap.upgrade import apply

__version__ = _version("pacswap")

# Loaded when first asked for: they bring pydantic, and timm or torchvision's models; `hub` brings
# huggingface_hub.
_LATER = {"apply": "pacswap.upgrade", "load": "pacswap.checkpoint", "save": "pacswap.checkpoint"}

__all__ = [
    "Group",
    "GuidanceSpec",
    "KernelSpec",
    "LayerQuery",
    "Plan",
    "Verification",
    "__version__",
    "apply",
    "disabled",
    "errors",
    "hub",
    "layers",
    "load",
    "nn",
    "ops",
    "plan",
    "revert",
    "rewrite",
    "save",
    "swap",
    "verify",
]


def __getattr__(name: str) -> _Any:
    if name == "hub":
        return _import_module("pacswap.hub")
    if name in _LATER:
        return getattr(_import_module(_LATER[name]), name)
    raise AttributeError(f"module 'pacswap' has no attribute {name!r}")
