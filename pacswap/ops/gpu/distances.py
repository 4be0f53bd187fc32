"""Runs the Triton kernels of the distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pacswap.ops.gpu import distance
from pacswap.ops.gpu.geometry import Geometry, empty, is_last
from pacswap.ops.gpu.launch import blocks, laid, phases, run, sizes, without_bfloat16
from pacswap.ops.gpu.tuning import channel_block, size_class


@without_bfloat16
def tap_distance(
    guidance: Tensor, centre: Tensor | None, geometry: Geometry, measure: str, each: bool
) -> Tensor:
    """The distances, [B, 1 or D, KH*KW, H_out, W_out]; `each` leaves the channels apart."""
    B, D = guidance.shape[:2]
    M = B * geometry.HO * geometry.WO
    T = geometry.KH * geometry.KW
    made = guidance.new_empty(B, D if each else 1, T, geometry.HO, geometry.WO)
    if not (M and D):
        return made.zero_()
    given = _call(guidance, centre, geometry, measure, each)
    run(
        distance.forward,
        lambda m: (blocks(M, m["BP"]), 1),
        guidance,
        **given,
        d=made,
        M=M,
        size=size_class(M),
    )
    return made


@without_bfloat16
def gradients(
    grad: Tensor,
    guidance: Tensor,
    centre: Tensor | None,
    geometry: Geometry,
    measure: str,
    each: bool,
) -> tuple[Tensor, Tensor]:
    """Of the guidance, and of the centre where there is one, else empty."""
    B, D, H, W = guidance.shape
    last = is_last(guidance)
    made = empty(guidance, (B, D, H, W), last)
    pixels = (B, D, geometry.HO, geometry.WO)
    if centre is None:  # a sum on its way to the guidance: kept in float32
        grad_centre = guidance.new_empty(pixels, dtype=torch.float32)
    else:
        grad_centre = guidance.new_empty(pixels)
    if grad.numel() and guidance.numel():
        given = _call(guidance, centre, geometry, measure, each)
        given |= {"grad": grad.contiguous(), "dat": grad_centre, "df": made, "D_LAST": last}
        M = B * geometry.HO * geometry.WO
        run(
            distance.centre_gradient,
            lambda m: (blocks(M, m["BP"]), blocks(D, m["BC"])),
            grad,
            **given,
            M=M,
            size=size_class(M),
        )
        rows, strides = phases(guidance, geometry)
        block = min(channel_block(D), 32)
        run(
            distance.guidance_gradient,
            lambda m: (blocks(rows, m["BP"]) * strides, blocks(D, block)),
            grad,
            **given,
            **geometry.lift,
            B=B,
            BC=block,
            size=size_class(rows),
        )
    else:
        made.zero_()
        grad_centre.zero_()
    return made, guidance.new_empty(0) if centre is None else grad_centre


def _call(
    guidance: Tensor, centre: Tensor | None, geometry: Geometry, measure: str, each: bool
) -> dict[str, Any]:
    """The arguments that all of the Triton kernels take."""
    f, last = laid(guidance)
    own = centre is None
    given = {**sizes(guidance, geometry), "f": f, "LAST": last, "EACH": each, "MEASURE": measure}
    at = f if centre is None else centre.contiguous()
    return given | {"at": at, "SKIP": geometry.centre if own else -1}
