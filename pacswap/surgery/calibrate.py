"""`bandwidth: auto`: a width at which the adapting kernel says something about real images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pacswap.errors import PlanError
from pacswap.nn import AdaptingKernel, Adaptive, Guidance, PairwiseTerm, reduced
from pacswap.surgery.modes import awake, kept_modes, kept_random
from pacswap.surgery.plan import Plan
from pacswap.surgery.skeleton import ExampleInput

# exp(−½·d²/bandwidth²) = ½
_HALF = 2 * math.log(2)


class _AllSeen(Exception):
    """Every kernel has seen its guidance: the rest of the forward pass is not needed."""


def calibrate(model: nn.Module, plan: Plan, batch: ExampleInput) -> dict[str, float]:
    """Set the bandwidth of every kernel planned as `auto`, in place.

    The median off-centre K over the batch becomes ½. The model runs in eval mode, only as far as
    its last guidance, without gradients; its mode is restored.

    Args:
        model: an upgraded model.
        plan: its plan.
        batch: what the model takes; images like those it will see.

    Returns:
        The bandwidths by the name of the layer that holds them.

    Raises:
        PlanError: a guidance is constant on the batch, so that no width fits.
    """
    wanted = {kernel.owner: kernel for kernel in plan.kernels if kernel.is_calibrated}
    external = {k.owner for k in wanted.values() if plan.guidances[k.guidance].is_external}
    kernels = {name: _kernel(model, name) for name in wanted if name not in external}
    medians: dict[str, float] = {}
    handles = []
    for name in kernels:

        def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if name in medians:  # of a layer that is called again; the other groups may need more
                return
            kernel, holder = _kernel(model, name), model.get_submodule(name)
            features = args[0]
            if isinstance(holder, PairwiseTerm):
                features = reduced(args[1], holder.options.blur)
            medians[name] = _median_distance(kernel, features)
            if len(medians) == len(kernels):
                raise _AllSeen

        handles.append(_hearer(model, plan, name).register_forward_pre_hook(note))
    parameter = next(model.parameters())
    args = batch if isinstance(batch, tuple) else (batch,)
    args = pytree.tree_map_only(Tensor, lambda t: _like(t, parameter), args)
    try:
        with torch.no_grad(), kept_modes(model), kept_random(), awake(model):
            model.eval()
            if kernels:
                with _without_external(model, plan):
                    model(*args)
    except _AllSeen:
        pass
    except Exception as error:  # the model's own code, on the user's images
        raise PlanError(
            f"{type(model).__name__} does not run on the calibration images: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} Pass calibration=… as "
            "the model takes it."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _set(kernels, medians)


@contextmanager
def _without_external(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Plain convolutions where the guidance comes from outside: there is none yet."""
    fed = {i for i, guidance in enumerate(plan.guidances) if guidance.is_external}
    names = [layer.place for layer in plan.layers if plan.kernels[layer.kernel].guidance in fed]
    parts = [part for name in names for part in model.get_submodule(name).modules()]
    adaptive = [p for p in parts if isinstance(p, Adaptive | AdaptingKernel | Guidance)]
    try:
        for part in adaptive:
            part.enabled = False
        yield
    finally:
        for part in adaptive:
            part.enabled = True


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device, and in its dtype unless it holds whole numbers."""
    return value.to(parameter if value.is_floating_point() else parameter.device)


def _set(kernels: dict[str, AdaptingKernel], medians: dict[str, float]) -> dict[str, float]:
    constant = [name for name in kernels if not medians.get(name, 1.0) > 0]
    if constant:
        raise PlanError(
            f"the guidance of {', '.join(map(repr, constant))} is constant on the calibration "
            "batch, so no bandwidth fits it. Choose another guidance, pass calibration=… with your "
            "own images, or give the bandwidth as a number."
        )
    bandwidths = {}
    for name, kernel in kernels.items():
        # A kernel that rests in eval mode saw nothing: standardised features are about 1 wide.
        width = _width(medians[name], kernel.form) if name in medians else 1.0
        with torch.no_grad():
            kernel.log_bandwidth.fill_(math.log(width))
        bandwidths[name] = width
    return bandwidths


def _width(median: float, form: str) -> float:
    """The bandwidth at which a distance of `median` gives ½; in the inverse form, 1 and α."""
    if form == "laplacian":
        return median / math.log(2)
    return math.sqrt(median) if form == "inverse" else math.sqrt(median / _HALF)


def _hearer(model: nn.Module, plan: Plan, owner: str) -> nn.Module:
    """The module that receives the features: the kernel, or the CRF around it.

    A CRF does not look at its kernels while its blend is 0 and nothing learns.
    """
    if not isinstance(model.get_submodule(owner), PairwiseTerm):
        return _kernel(model, owner)
    place = next(layer.place for layer in plan.layers if owner.startswith(f"{layer.place}."))
    return model.get_submodule(place)


def _kernel(model: nn.Module, owner: str) -> AdaptingKernel:
    kernel = model.get_submodule(f"{owner}.adapting_kernel")
    assert isinstance(kernel, AdaptingKernel)
    return kernel


def _median_distance(kernel: AdaptingKernel, guidance: Tensor) -> float:
    """The median of d² over pixels and off-centre taps (of d₁ in the laplacian form).

    Their mean where most of them are 0.
    """
    window, distances = kernel.window, kernel.distances(guidance)
    off_centre = [t for t in range(window.taps) if t != window.centre]
    distances = distances[:, :, off_centre]
    median = distances.median().item()
    return median if median > 0 else distances.mean().item()
