"""The dense and the grouped convolution: the taps of a tile's outputs in one matrix product.

K·v lies tap by tap, [C_in·taps, outputs], in the order of the weight as it is; BLAS multiplies. The
loops fill it, and share out what the product's gradient is to v and to K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.loops import machine_dense as machine
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.tiles import Channels, Tile, most, tiling
from pacswap.ops.window import Window


def convolve(
    image: Tensor, kernel: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int
) -> None:
    """Fill `output`, [B, C_out, H_out, W_out].

    Args:
        image: v, [B, C_in, H, W], contiguous like all that follow, in the weight's dtype.
        kernel: K, [B, 1, KH*KW, H_out, W_out].
        weight: W, [C_out, C_in/groups, KH, KW], float32 or float64.
        output: contiguous.
        window: the geometry, with a border of zeros.
        groups: of channels.
    """
    call = _Call(image, kernel, weight, window, groups)
    if call.one_by_one or groups > 1:
        output.zero_()  # what sees nothing of the image is in no tile
    grouped = output.unflatten(1, (groups, -1))
    for b in range(image.shape[0]):
        for tile in call.tiles:
            part = grouped[b, :, :, tile.place[0], tile.place[1]]
            if groups > 1:
                for channels in call.channels:
                    into = call.of_groups(part, channels)
                    made = bmm(call.filters(tile, channels), call.adapted(b, tile, channels))
                    into.add_(made.view(into.shape))
                continue
            sums = _flat(part[0])
            if sums is None or call.one_by_one:
                sums = part.new_empty(part.shape[1], tile.size[0] * tile.size[1])
            for channels in call.channels:
                filters, seen = call.filters(tile, channels)[0], call.adapted(b, tile, channels)[0]
                if channels[0] == 0:
                    torch.mm(filters, seen, out=sums)
                else:
                    sums.addmm_(filters, seen)
            if call.one_by_one:
                part[0].add_(sums.view(part[0].shape))


def gradients(
    image: Tensor,
    kernel: Tensor,
    weight: Tensor,
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for image, kernel and weight. Z = Wᵀ·dY serves the first two.

    Args:
        image: as in `convolve`, like `kernel`, `weight`, `window` and `groups`.
        kernel: K.
        weight: W.
        grad: of the output, [B, C_out, H_out, W_out].
        window: the window.
        groups: of channels.
        needed: which of the three are wanted.

    Returns:
        The three, each of its tensor's shape, None where not wanted.
    """
    need_image, need_kernel, need_weight = needed
    call = _Call(image, kernel, weight, window, groups)
    grouped = grad.unflatten(1, (groups, -1))
    grad_image, grad_kernel = torch.zeros_like(image), torch.zeros_like(kernel)
    grad_whole = call.whole.new_zeros(call.whole.mT.shape) if need_weight else None
    for b in range(image.shape[0]):
        for tile in call.tiles:
            pulled = grouped[b, :, :, tile.place[0], tile.place[1]].flatten(2)
            dots = call.dots(tile)
            for channels in call.channels:
                own = call.of_groups(pulled, channels)
                if grad_whole is not None:
                    seen = call.adapted(b, tile, channels)
                    _add_product(call.of_tile(grad_whole.mT, tile, channels).mT, seen, own)
                if need_image or need_kernel:
                    Z = call.back(tile, channels, own)
                    call.gather(b, tile, channels, Z, grad_image, dots)
            if need_kernel:
                call.put(dots, tile, grad_kernel[b, 0])
    return (
        grad_image if need_image else None,
        grad_kernel if need_kernel else None,
        None if grad_whole is None else call.as_weight(grad_whole.mT),
    )


class _Call:
    """One convolution, and the memory that its tiles use one after another.

    Channels are a range of the input's; of several groups, whole ones.

    Attributes:
        tiles: of one image.
        channels: that are taken together.
        one_by_one: as in `Tiling`.
        whole: the weight, [G, C_out/G, C_in/G·taps], or [taps, G, C_out/G, C_in/G].
    """

    def __init__(
        self, image: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
    ) -> None:
        size = (image.shape[2], image.shape[3])
        left, _, top, _ = window.border(*size)
        divided = tiling(window, size)
        self.tiles = [tile for block in divided.blocks for tile in block]
        self.one_by_one = divided.one_by_one
        self._each = image.shape[1] // groups
        step = 1 if groups == 1 else self._each
        outputs = kernel.shape[0] * weight.shape[0] * kernel.shape[3] * kernel.shape[4]
        numbers = most(torch.get_num_threads(), image.numel() + weight.numel() + outputs)
        self.channels = divided.channels(window, image.shape[1], step, numbers)
        self._image, self._kernel, self._weight, self._groups = image, kernel, weight, groups
        self.whole = (
            self._by_tap()
            if self.one_by_one
            else weight.view(groups, weight.shape[0] // groups, -1)
        )
        self._window = window
        self._geometry = (top, left, *window.stride, *window.dilation, window.kernel_size[1])
        widest = max((last - first for first, last in self.channels), default=0)
        each = divided.outputs * (1 if self.one_by_one else window.taps)
        self._threads = parts(max(1, widest), widest * each)
        self._room = image.new_empty(widest * each)
        self._dots = image.new_empty(self._threads * each)
        self._sizes = (*image.shape[2:], *kernel.shape[2:])

    def _by_tap(self) -> Tensor:
        """The weight as [taps, G, C_out/G, C_in/G]."""
        # Two axes, which torch transposes block by block.
        flat = self._weight.flatten(2).flatten(0, 1).T.contiguous()
        return flat.view(-1, self._groups, self._weight.shape[0] // self._groups, self._each)

    def as_weight(self, whole: Tensor) -> Tensor:
        """What lies as `whole` does, as the weight does."""
        if not self.one_by_one:
            return whole.reshape(self._weight.shape)
        return whole.flatten(1).T.contiguous().view(self._weight.shape)

    def of_groups(self, x: Tensor, channels: Channels) -> Tensor:
        """The groups of [G, …] that these channels belong to."""
        if self._groups == 1:
            return x
        return x[channels[0] // self._each : channels[1] // self._each]

    def of_tile(self, whole: Tensor, tile: Tile, channels: Channels) -> Tensor:
        """What belongs to a tile of what lies as `whole`, [groups, C_out/G, channels·taps]."""
        if self.one_by_one:
            whole = whole[tile.down[0] * self._window.kernel_size[1] + tile.across[0]]
        if self._groups > 1:
            return self.of_groups(whole, channels)
        return whole[:, :, channels[0] * tile.taps : channels[1] * tile.taps]

    def filters(self, tile: Tile, channels: Channels) -> Tensor:
        """The weight of a tile, as `of_tile` says."""
        return self.of_tile(self.whole, tile, channels)

    def adapted(self, b: int, tile: Tile, channels: Channels) -> Tensor:
        """K times what each tap sees, [groups, channels·taps of a group, outputs]."""
        seen, count = self._in(self._room, tile, channels), channels[1] - channels[0]
        given = (*self._given(b, channels), *self._flat(seen, count, tile))
        given += (*tile.numbers, *self._geometry)
        shared(machine.adapt, seen, count, min(self._threads, count), given)
        return seen

    def back(self, tile: Tile, channels: Channels, pulled: Tensor) -> Tensor:
        """Z, [groups, channels·taps of a group, outputs], where K·v was."""
        filters, Z = self.filters(tile, channels).mT, self._in(self._room, tile, channels)
        if self._groups == 1:
            torch.mm(filters[0], pulled[0], out=Z[0])
        else:
            torch.bmm(filters, pulled, out=Z)
        return Z

    def dots(self, tile: Tile) -> Tensor:
        """For each thread, zeros, [threads, taps of the tile, outputs]."""
        numbers = tile.taps * tile.size[0] * tile.size[1]
        return self._dots[: self._threads * numbers].view(self._threads, tile.taps, -1).zero_()

    def gather(
        self, b: int, tile: Tile, channels: Channels, Z: Tensor, grad_image: Tensor, dots: Tensor
    ) -> None:
        """Add to the gradients what comes from a tile."""
        count = channels[1] - channels[0]
        H, W = self._sizes[:2]
        found = (grad_image.data_ptr() + self._apart(b, channels) * Z.itemsize, count, H, W)
        given = (*self._given(b, channels), *self._flat(Z, count, tile), *found)
        given += (*described(dots), *tile.numbers, *self._geometry)
        shared(machine.gather, Z, count, min(self._threads, count), given)

    def put(self, dots: Tensor, tile: Tile, grad_kernel: Tensor) -> None:
        """Add the gradient of a tile's kernel to that of the image's, [taps, H_out, W_out]."""
        apart = grad_kernel.unflatten(0, self._window.kernel_size)
        place = (slice(*tile.down), slice(*tile.across), *tile.place)
        apart[place] += dots.sum(0).view(apart[place].shape)

    def _apart(self, b: int, channels: Channels) -> int:
        """How many numbers of the image lie before these channels."""
        H, W = self._sizes[:2]
        return (b * self._image.shape[1] + channels[0]) * H * W

    def _given(self, b: int, channels: Channels) -> tuple[int, ...]:
        """Image and kernel as loops read them."""
        size, (H, W, taps, *outputs) = self._image.itemsize, self._sizes
        image = self._image.data_ptr() + self._apart(b, channels) * size
        kernel = self._kernel.data_ptr() + b * taps * outputs[0] * outputs[1] * size
        return image, channels[1] - channels[0], H, W, kernel, taps, *outputs

    def _flat(self, x: Tensor, channels: int, tile: Tile) -> tuple[int, ...]:
        """A tile's numbers as loops read them, [channels, taps, outputs]."""
        return x.data_ptr(), channels, tile.taps, tile.size[0] * tile.size[1]

    def _in(self, room: Tensor, tile: Tile, channels: Channels) -> Tensor:
        """Memory for a tile, [groups, channels·taps of a group, outputs]."""
        count = channels[1] - channels[0]
        groups = 1 if self._groups == 1 else count // self._each
        outputs = tile.size[0] * tile.size[1]
        shape = (groups, count // groups * tile.taps, outputs)
        return room[: count * tile.taps * outputs].view(shape)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right for each of a batch; autocast would round it without `out`."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=left.new_empty(shape))


def _flat(part: Tensor) -> Tensor | None:
    """[C, rows, columns] of whole rows as a view [C, rows·columns]; None where there is none."""
    channels, rows, columns = part.shape
    if rows > 1 and part.stride(1) != columns:
        return None
    return part.as_strided((channels, rows * columns), (part.stride(0), 1))


def _add_product(found: Tensor, seen: Tensor, pulled: Tensor) -> None:
    """Add to found [G, c, o] the product of seen [G, c, outputs] and pulled [G, o, outputs].

    This way round, BLAS is up to twice as fast as the other where C_out is small.
    """
    if found.shape[0] == 1:
        found[0].addmm_(seen[0], pulled[0].T)
    else:
        found.baddbmm_(seen, pulled.mT)
