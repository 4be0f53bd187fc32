"""Which values the parts of a request may have; every breach is noted, none raises."""

from __future__ import annotations

import math
from typing import Any, get_args

from pacswap.errors import quoted
from pacswap.surgery.spec import (
    Compatibility,
    CRFSpec,
    Distance,
    FilterSpec,
    FilterWeights,
    Form,
    KernelSpec,
    LayerQuery,
    Normalize,
    Smoothing,
)


def check_query(query: LayerQuery, where: str, faults: list[str]) -> None:
    """Of the properties of a query."""
    for key in ("kernel_size", "stride", "dilation"):
        value = getattr(query, key)
        sizes = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(type(size) is int and size >= 1 for size in sizes):
            faults.append(f"{where}.{key}: expected an int or a pair of ints, got {value!r}.")
    for key in ("name", "exclude"):
        value = getattr(query, key)
        patterns = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(isinstance(text, str) for text in patterns):
            faults.append(f"{where}.{key}: expected a pattern or a list of them, got {value!r}.")
    check_flag(f"{where}.last_of_stage", query.last_of_stage, faults)
    if query.depthwise is not None:
        check_flag(f"{where}.depthwise", query.depthwise, faults)


def check_kernel(spec: KernelSpec, where: str, faults: list[str]) -> None:
    """Of a kernel's specification."""
    check_word(f"{where}.form", spec.form, get_args(Form), faults)
    if spec.normalize is not None:
        check_word(f"{where}.normalize", spec.normalize, get_args(Normalize), faults)
    check_word(f"{where}.distance", spec.distance, get_args(Distance), faults)
    check_word(f"{where}.smoothing", spec.smoothing, get_args(Smoothing), faults)
    for key in ("standardize", "asymmetric", "channel_wise", "learnable", "recompute"):
        check_flag(f"{where}.{key}", getattr(spec, key), faults)
    for key in ("blend", "alpha", "lambd"):
        check_number(f"{where}.{key}", getattr(spec, key), faults)
    if spec.bandwidth != "auto" and not (is_number(spec.bandwidth) and spec.bandwidth > 0):
        faults.append(
            f"{where}.bandwidth: expected a positive number or 'auto', got {spec.bandwidth!r}."
        )
    check_odd(f"{where}.smoothing_size", spec.smoothing_size, faults)
    if spec.smoothing == "gaussian" and spec.smoothing_size != 3:
        faults.append(
            f"{where}.smoothing_size: the gaussian has size 3, got {spec.smoothing_size!r}."
        )
    for key in ("alpha", "lambd"):
        if getattr(spec, key) != getattr(KernelSpec, key) and spec.form in (
            "gaussian",
            "laplacian",
        ):
            faults.append(f"{where}.{key}: belongs to form 'inverse', got {spec.form!r}.")
    if spec.smoothing == "none" and spec.smoothing_size != KernelSpec.smoothing_size:
        faults.append(
            f"{where}.smoothing_size: there is no smoothing. Set smoothing, or leave it out."
        )
    if spec.asymmetric is True and spec.form != "inverse":
        faults.append(f"{where}.asymmetric: belongs to form 'inverse', got {spec.form!r}.")


def check_filter(spec: FilterSpec, where: str, faults: list[str]) -> None:
    """Of a filter behind an interpolation."""
    check_odd(f"{where}.kernel_size", spec.kernel_size, faults, least=3)
    check_whole(f"{where}.dilation", spec.dilation, faults)
    check_whole(f"{where}.steps", spec.steps, faults)
    check_whole(f"{where}.blur", spec.blur, faults)
    check_word(f"{where}.weights", spec.weights, get_args(FilterWeights), faults)


def check_crf(spec: CRFSpec, where: str, faults: list[str]) -> None:
    """Of a CRF and its pairwise terms."""
    check_whole(f"{where}.steps", spec.steps, faults)
    check_flag(f"{where}.shared_steps", spec.shared_steps, faults)
    check_number(f"{where}.unary_weight", spec.unary_weight, faults)
    for i, kernel in enumerate(spec.kernels):
        inner = f"{where}.kernels[{i}]"
        check_odd(f"{inner}.kernel_size", kernel.kernel_size, faults, least=3)
        check_whole(f"{inner}.dilation", kernel.dilation, faults)
        check_whole(f"{inner}.blur", kernel.blur, faults)
        check_word(f"{inner}.compatibility", kernel.compatibility, get_args(Compatibility), faults)
        check_flag(f"{inner}.spatial_filter", kernel.spatial_filter, faults)
        check_flag(f"{inner}.guided", kernel.guided, faults)
        check_number(f"{inner}.weight", kernel.weight, faults)
        if kernel.compatibility == "4d" and kernel.spatial_filter is False:
            faults.append(
                f"{inner}.spatial_filter: '4d' has a matrix at every tap, which is its filter. "
                "Leave it at True, or use compatibility '2d'."
            )
        if kernel.position is not None and not (is_number(kernel.position) and kernel.position > 0):
            faults.append(
                f"{inner}.position: expected a positive number or None, got {kernel.position!r}."
            )
    if not any(kernel.guided is True for kernel in spec.kernels):
        faults.append(
            f"{where}.kernels: no kernel looks at the guidance. Set guided: true on one of them."
        )


def check_flag(where: str, value: Any, faults: list[str]) -> None:
    """True or False."""
    if not isinstance(value, bool):
        faults.append(f"{where}: expected True or False, got {value!r}.")


def check_word(where: str, value: Any, known: tuple[str, ...], faults: list[str]) -> None:
    """One of a few words."""
    if value not in known:
        faults.append(f"{where}: expected one of {quoted(known)}, got {value!r}.")


def check_number(where: str, value: Any, faults: list[str]) -> None:
    """A finite number."""
    if not is_number(value):
        faults.append(f"{where}: expected a finite number, got {value!r}.")


def check_whole(where: str, value: Any, faults: list[str]) -> None:
    """A whole number of at least 1."""
    if type(value) is not int or value < 1:
        faults.append(f"{where}: expected a positive int, got {value!r}.")


def check_odd(where: str, value: Any, faults: list[str], *, least: int = 1) -> None:
    """The side of a window that has a middle."""
    if type(value) is not int or value < least or value % 2 == 0:
        faults.append(f"{where}: expected an odd int of at least {least}, got {value!r}.")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
