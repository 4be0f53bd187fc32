"""Runs the Triton kernels of the distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pacswap.ops.gpu import distance
from pacswap.ops.gpu.geometry import Geometry, empty, is_last
from pacswap.ops.gpu.launch import (
    Given,
    blocks,
    channels_last,
    phases,
    run,
    sizes,
    without_bfloat16,
)
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
    given |= {"d": made, "M": M, "size": size_class(M)}
    run(distance.forward, lambda m: (blocks(M, m["BP"]),), guidance, given)
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
    made = empty(guidance, (B, D, H, W), True)
    pixels = (B, D, geometry.HO, geometry.WO)
    # Where it is a sum on its way to the guidance, it is kept in float32.
    like = guidance.new_empty(0, dtype=torch.float32) if centre is None else centre
    grad_centre = empty(like, pixels, True)
    if grad.numel() and guidance.numel():
        given = _call(guidance, centre, geometry, measure, each)
        given |= {"grad": grad.contiguous(), "dat": grad_centre, "df": made, "B": B}
        M = B * geometry.HO * geometry.WO
        of_pixels = {"M": M, "size": size_class(M)}

        def by_pixels(m: Mapping[str, int]) -> tuple[int, int]:
            return blocks(M, m["BP"]), blocks(D, m["BC"])

        run(distance.centre_gradient, by_pixels, grad, given | of_pixels)
        rows, strides = phases(guidance, geometry)
        block = channel_block(D, 32)
        given |= {"BC": block, "size": size_class(rows)}

        def by_owner(m: Mapping[str, int]) -> tuple[int, int]:
            return blocks(rows, m["BP"]) * strides, blocks(D, block)

        run(distance.guidance_gradient, by_owner, grad, given)
    else:
        made.zero_()
        grad_centre.zero_()
    made = made if is_last(guidance) else made.contiguous()
    return made, guidance.new_empty(0) if centre is None else grad_centre.contiguous()


def _call(
    guidance: Tensor, centre: Tensor | None, geometry: Geometry, measure: str, each: bool
) -> Given:
    """The arguments that all of the Triton kernels take."""
    given = {**sizes(guidance, geometry), "EACH": each, "MEASURE": measure}
    given["f"] = channels_last(guidance)
    if centre is None:
        return given | {"at": given["f"], "SKIP": geometry.centre}
    return given | {"at": channels_last(centre), "SKIP": -1}
