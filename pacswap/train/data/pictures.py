"""Reading one picture or mask from a file, and saying plainly what is wrong with it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pacswap.errors import DataError
from pacswap.train.data.labels import Labels

Pixels: TypeAlias = NDArray[np.uint8]
Raw: TypeAlias = NDArray[np.generic]  # what a mask file holds: whole numbers [H, W]

_T = TypeVar("_T")

# What Pillow's decoders are known to raise on damaged bytes, beside OSError; warnings are raised
# where a filter says so.
_DAMAGE = (
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    UserWarning,
    struct.error,
    zlib.error,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_ORIENTATION = 0x0112  # EXIF
_COLOURS = ("RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class Sample:
    """One labelled picture.

    Attributes:
        name: unique within its split; the path below the pictures' folder without the ending.
        image: the picture's file; None where it is drawn.
        mask: the mask's file; None where it is drawn or made from outlines.
        number: of a drawn scene its seed, of a COCO picture its id.
    """

    name: str
    image: Path | None = None
    mask: Path | None = None
    number: int = 0


class Reader(Protocol):
    """What turns a sample into its pixels; copied into the processes that read ahead."""

    @property
    def on_disk(self) -> bool:
        """Whether there are files that can be damaged."""

    def read(self, sample: Sample) -> tuple[Pixels, Raw]:
        """The picture [H, W, 3], RGB, and its labels [H, W], class indices or `ignore_index`.

        Raises:
            Flaw: a file is damaged or its numbers mean nothing.
        """


class Flaw(DataError):
    """One damaged or mislabelled sample.

    Attributes:
        kind: which of `KINDS`.
        file: what is damaged, and in which way, in a few words.
    """

    def __init__(self, kind: str, file: str, detail: str = "") -> None:
        self.kind, self.file, self.detail = kind, file, detail
        one, _, hint = KINDS[kind]
        super().__init__(f"'{file}' {one}: {detail}. {hint}")

    def __reduce__(self) -> tuple[type[Flaw], tuple[str, str, str]]:
        return Flaw, (self.kind, self.file, self.detail)


# kind: (said of one, said of several, what to do)
KINDS = {
    "unreadable": (
        "cannot be read",
        "files cannot be read",
        "Replace what is damaged, or leave it out of the split.",
    ),
    "size": (
        "is not as large as its mask",
        "pictures are not as large as their masks",
        "Pair each picture with its own mask.",
    ),
    "colour": (
        "is a colour picture, not a mask of class numbers",
        "masks are colour pictures, not masks of class numbers",
        "Say in finetune.data.palette which colour is which class.",
    ),
    "number": (
        "holds numbers that are no class",
        "masks hold numbers that are no class",
        "Correct the masks, finetune.data.classes or ignore_index; of masks that hold colours or "
        "greys, say in palette which is which class.",
    ),
    "fraction": (
        "does not hold whole numbers",
        "masks do not hold whole numbers",
        "Save masks as 8-bit or 16-bit PNG.",
    ),
}


def read_picture(path: Path, *, upright: bool = True) -> Pixels:
    """The pixels of a picture file of any kind that Pillow reads.

    Args:
        path: the file.
        upright: turn it as its EXIF orientation says, as viewers show it.

    Returns:
        [H, W, 3], RGB in 0..255; transparency is dropped, 16 bits are brought to 8.

    Raises:
        Flaw: there is no file, or it is damaged, not a picture or too large to be one.
    """

    def pixels(picture: Image.Image) -> Pixels:
        if upright and _orientation(picture) > 1:
            picture = ImageOps.exif_transpose(picture)
        return _rgb(picture)

    return _opened(path, pixels)


def read_mask(path: Path, labels: Labels) -> Raw:
    """The class numbers of an index mask, or of a colour picture by the palette of `labels`.

    Args:
        path: a file of one 8-bit or 16-bit number per pixel, or of colours.
        labels: what its numbers or colours mean.

    Returns:
        [H, W], class indices or `labels.ignore_index`, in `labels.dtype`.

    Raises:
        Flaw: the file is damaged, or holds what is neither a class nor to be ignored.
    """

    def decoded(picture: Image.Image) -> Raw:
        if picture.mode == "F":
            raise Flaw("fraction", str(path), "its pixels are fractions")
        if labels.by_colour or (labels.palette is not None and picture.mode in _COLOURS):
            return labels.of_colours(_rgb(picture))
        if picture.mode in _COLOURS:
            raise Flaw("colour", str(path), f"its mode is {picture.mode}")
        if picture.mode in ("LA", "La", "PA"):
            picture = picture.getchannel(0)
        raw = np.asarray(picture)
        return meant(raw.astype(np.uint8) if raw.dtype == bool else raw, labels, path)

    return _opened(path, decoded)


def meant(raw: Raw, labels: Labels, file: Path | str) -> Raw:
    """The classes that the numbers of a mask stand for.

    Raises:
        Flaw: some stand for none.
    """
    found, wrong = labels.of_numbers(raw)
    if wrong:
        numbers = ", ".join(map(str, wrong[:3])) + (" ..." if len(wrong) > 3 else "")
        raise Flaw("number", str(file), numbers)
    return found


def has_size_of(picture: Pixels, mask: Raw) -> bool:
    """Whether both have the same height and width."""
    return picture.shape[:2] == mask.shape[:2]


def require_one_size(picture: Pixels, mask: Raw, sample: Sample) -> None:
    """Refuse a pair that cannot lie on one another.

    Raises:
        Flaw: the sizes differ.
    """
    if not has_size_of(picture, mask):
        sizes = [f"{side[0]}×{side[1]}" for side in (picture.shape, mask.shape)]
        raise Flaw("size", str(sample.image), f"picture {sizes[0]}, mask {sizes[1]}")


@dataclass(frozen=True)
class FileReader:
    """Samples that are a picture file and a mask file each."""

    labels: Labels
    load_mask: Callable[[Path, Labels], Raw] = read_mask
    on_disk: bool = True

    def read(self, sample: Sample) -> tuple[Pixels, Raw]:
        """See `Reader`."""
        if sample.image is None or sample.mask is None:
            raise AssertionError(f"{sample.name} has no files")
        mask = self.load_mask(sample.mask, self.labels)
        picture = read_picture(sample.image)
        if not has_size_of(picture, mask):
            # Some label the picture as it is stored, not as its EXIF orientation turns it.
            stored = read_picture(sample.image, upright=False)
            picture = stored if has_size_of(stored, mask) else picture
        require_one_size(picture, mask, sample)
        return picture, mask


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch calculate with a single thread, as the processes that read ahead do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def own_palette(path: Path) -> Sequence[tuple[int, int, int]] | None:
    """The colours that a palette PNG brings along; None where it has none or they are greys."""

    def colours(picture: Image.Image) -> Sequence[tuple[int, int, int]] | None:
        levels = picture.getpalette() if picture.mode == "P" else None
        if levels is None:
            return None
        rgb = [(levels[at], levels[at + 1], levels[at + 2]) for at in range(0, len(levels) - 2, 3)]
        return None if all(red == green == blue for red, green, blue in rgb) else rgb

    try:
        return _opened(path, colours)
    except Flaw:
        return None  # The scan says so.


def _opened(path: Path, take: Callable[[Image.Image], _T]) -> _T:
    """What `take` finds in a picture file; whatever Pillow makes of damage becomes a `Flaw`."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return take(picture)
    except Flaw:
        raise
    except _BOMBS:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        why = f"more pixels than Pillow's limit of {most:,}"
    except UnidentifiedImageError:
        empty = path.is_file() and path.stat().st_size == 0
        why = "an empty file" if empty else "not a picture that Pillow reads"
    except OSError as error:
        # With a file's name it comes from opening it, without from decoding what is in it.
        opening = error.filename is not None
        why = str(error.strerror).lower() if opening else "damaged or cut off"
    except _DAMAGE:
        why = "damaged or cut off"
    raise Flaw("unreadable", str(path), why)


def _orientation(picture: Image.Image) -> int:
    try:
        found = picture.getexif().get(_ORIENTATION, 1)
    except (OSError, *_DAMAGE):
        return 1  # Damaged EXIF leaves the pixels whole.
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _rgb(picture: Image.Image) -> Pixels:
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("fractions are no colours")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))
