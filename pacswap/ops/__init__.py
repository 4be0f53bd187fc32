"""The mathematics on tensors: one public function per operation, several backends behind it."""

from pacswap.ops.backends import Task, explain
from pacswap.ops.conv import (
    attach_kernel_gradient,
    convolve,
    pac_conv1d,
    pac_conv2d,
    pac_conv3d,
)
from pacswap.ops.dimensions import (
    AnyWindow,
    SequenceWindow,
    VolumeWindow,
    make_sequence_window,
    make_volume_window,
)
from pacswap.ops.kernel import (
    adapting_kernel,
    blended,
    standardized,
    tap_distance,
)
from pacswap.ops.mask import masked, output_mask, valid_taps
from pacswap.ops.pool import pac_pool2d
from pacswap.ops.precision import compute_dtype
from pacswap.ops.smoothing import smoothing_filter
from pacswap.ops.transpose import (
    guidance_window,
    insert_zeros,
    inserted_mask,
    pac_conv_transpose2d,
    transposed_window,
    turned,
)
from pacswap.ops.window import Window, make_window

__all__ = [
    "AnyWindow",
    "SequenceWindow",
    "Task",
    "VolumeWindow",
    "Window",
    "adapting_kernel",
    "attach_kernel_gradient",
    "blended",
    "compute_dtype",
    "convolve",
    "explain",
    "guidance_window",
    "insert_zeros",
    "inserted_mask",
    "make_sequence_window",
    "make_volume_window",
    "make_window",
    "masked",
    "output_mask",
    "pac_conv1d",
    "pac_conv2d",
    "pac_conv3d",
    "pac_conv_transpose2d",
    "pac_pool2d",
    "smoothing_filter",
    "standardized",
    "tap_distance",
    "transposed_window",
    "turned",
    "valid_taps",
]
