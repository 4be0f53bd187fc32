"""Why a model or a layer cannot be changed; what is not understood is refused."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from pacswap.errors import quoted
from pacswap.nn import Adaptive
from pacswap.nn.adaptive_conv import why_not_adapt
from pacswap.nn.variants import variant_of

# Wrappers by class name: importing FSDP for an isinstance check costs a second.
_WRAPPERS = {
    "DataParallel": "swap before wrapping the model for several devices",
    "DistributedDataParallel": "swap before wrapping the model for several devices",
    "FullyShardedDataParallel": "swap before wrapping the model for several devices",
    "OptimizedModule": "swap before torch.compile",
    "RecursiveScriptModule": "swap before torch.jit.script",
    "TopLevelTracedModule": "swap before torch.jit.trace",
}

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def why_not_network(model: object) -> str | None:
    """Why something is no network that can be looked at, or None."""
    if not isinstance(model, nn.Module):
        return f"expected a torch.nn.Module, got {type(model).__name__}"
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        return f"'{lazy[0]}' is lazy and has no value yet: run the model once first"
    return None


def why_not_model(model: nn.Module) -> str | None:
    """Why no layer of this model can be swapped, or None."""
    reason = why_not_network(model)
    if reason is not None:
        return reason
    for name, module in model.named_modules():
        remedy = _WRAPPERS.get(type(module).__name__)
        if remedy is not None:
            where = f"'{name}' is" if name else "the model is"
            return f"{where} wrapped in {type(module).__name__}: {remedy}"
    swapped = [name for name, m in model.named_modules() if isinstance(m, Adaptive)]
    if swapped:
        return (
            f"the model is upgraded already ({len(swapped)} layers, the first is '{swapped[0]}'). "
            "Name all groups in one call, or pacswap.revert the model first"
        )
    return None


def why_not_conv(conv: _ConvNd) -> str | None:
    """Why this convolution cannot become a pixel-adaptive one, or None."""
    kind = type(conv).__name__
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        return (
            f"it is a {kind}, which enlarges. Name it in an upsampling: operation='upsample', or "
            "upsample: in a recipe"
        )
    reason = _why_not_own(conv)
    if reason is not None:
        return reason
    unknown = why_not_adapt(type(conv))
    if unknown is not None:
        return unknown
    variant = variant_of(type(conv))
    assert variant is not None
    reason = _why_holding_more(conv, ("weight", "bias", *variant.parameters))
    if reason is not None:
        return reason
    if max(conv.kernel_size) == 1:
        return (
            f"it is {'×'.join('1' * len(conv.kernel_size))}: a single tap has no neighbours to "
            "weigh. Name the spatial convolutions only"
        )
    return None


def why_not_plain(module: nn.Module, parameters: tuple[str, ...] = ()) -> str | None:
    """Why a module of a plain torch class is more than its class says, or None.

    Args:
        module: about to be replaced.
        parameters: those that its class has.
    """
    return _why_not_own(module) or _why_holding_more(module, parameters)


def _why_not_own(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return (
            "its weight is parametrized, and a swap would freeze what the parametrization "
            "computes. Remove it first: torch.nn.utils.parametrize.remove_parametrizations"
        )
    if any(hasattr(module, f"weight_{part}") for part in ("g", "orig")):
        return (
            "its weight is recomputed by a hook (weight_norm, spectral_norm or pruning). Remove it "
            "first: torch.nn.utils.remove_weight_norm and its siblings"
        )
    hooks = why_hooked(module)
    if hooks is not None:
        return f"{hooks}, which would be lost. Remove it and register it again after the swap"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward was replaced on the instance, which would be lost"
    return None


def _why_holding_more(module: nn.Module, parameters: tuple[str, ...]) -> str | None:
    own = [*module._buffers, *module._modules, *(module._parameters.keys() - set(parameters))]
    if not own:
        return None
    words = "a weight and a bias" if parameters else "its options"
    return f"it holds more than {words}, which would be lost: {quoted(own)}"


def why_hooked(module: nn.Module) -> str | None:
    """Which kind of hook a module has, in words, or None."""
    for attribute, words in _HOOKS.items():
        if getattr(module, attribute):
            return f"it has {words}"
    return None


def why_not_entered(module: nn.Module) -> str | None:
    """Why a module's forward cannot be replaced by its trace, or None."""
    hooks = why_hooked(module)
    if hooks is not None:
        return f"{hooks}, which would not run any more. Remove it first"
    return None
