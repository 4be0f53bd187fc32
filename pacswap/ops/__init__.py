"""The mathematics on tensors: one public function per operation, several backends behind it."""

from pacswap.ops.backends import explain
from pacswap.ops.conv import attach_kernel_gradient, pac_conv2d
from pacswap.ops.kernel import adapting_kernel, blended, squared_distance, standardized
from pacswap.ops.precision import compute_dtype
from pacswap.ops.window import Window, make_window

__all__ = [
    "Window",
    "adapting_kernel",
    "attach_kernel_gradient",
    "blended",
    "compute_dtype",
    "explain",
    "make_window",
    "pac_conv2d",
    "squared_distance",
    "standardized",
]
