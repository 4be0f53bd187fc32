"""Pictures of what pixel-adaptive layers look at, and of what they make of it."""

from pacswap.viz.colours import guidance_image, heat_image
from pacswap.viz.look import adaptation_map, look_into
from pacswap.viz.show import kernel_images, show

__all__ = [
    "adaptation_map",
    "guidance_image",
    "heat_image",
    "kernel_images",
    "look_into",
    "show",
]
