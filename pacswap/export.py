"""Upgraded networks as one file that runs without pacswap: ONNX, or torch.export's `.pt2`."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pacswap.errors import ExportError
from pacswap.surgery import pac_layers, plan_of

Format: TypeAlias = Literal["onnx", "pt2"]

FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2"}
OPSET = 18
# Relative to the largest output.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
AXES = {0: "batch", 2: "height", 3: "width"}

Run: TypeAlias = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how it was checked.

    Attributes:
        path: the file.
        format: `"onnx"` or `"pt2"`.
        input_shape: [B, C, H, W], a name where any number will do.
        differences: by the shape of the images, the largest difference to the network relative to
            its largest output; empty where the file could not be run.
        unchecked: why it could not be run, or None.
    """

    path: Path
    format: Format
    input_shape: tuple[int | str, ...]
    differences: dict[tuple[int, ...], float]
    unchecked: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        checks = [{"shape": list(s), "difference": d} for s, d in self.differences.items()]
        return {
            "written": str(self.path),
            "format": self.format,
            "input_shape": list(self.input_shape),
            "checks": checks,
            "unchecked": self.unchecked,
        }

    def __str__(self) -> str:
        shape = "×".join(str(side) for side in self.input_shape)
        lines = [f"written: {self.path} ({self.format}, images of {shape})"]
        for size, difference in self.differences.items():
            lines.append(f"checked at {'×'.join(map(str, size))}: off by {difference:.1e}")
        return "\n".join(lines if self.unchecked is None else [*lines, self.unchecked])


def export(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    format: Format | None = None,
    static: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write an upgraded network as one file, and check the file against the network.

    Args:
        model: an upgraded network that takes one batch of images; it is left as it is.
        file: what to write. It appears whole or not at all.
        format: `"onnx"` or `"pt2"`, which `torch.export.load` reads; by the file's suffix if left
            out.
        static: only images of the size that the network was planned for, one at a time, instead of
            any batch, height and width.
        overwrite: replace an existing file.

    Returns:
        Where it lies and how far its outputs are from the network's, at two sizes.

    Raises:
        PlanError: the model was not upgraded by pacswap.
        ExportError: a package is missing, the network cannot be exported, the file gives other
            outputs or cannot be written.
    """
    path = Path(file)
    kind = _format_of(path, format)
    shape = plan_of(model).input_shape
    _refuse(model, kind, path, overwrite)
    parameter = next(model.parameters())
    network = copy.deepcopy(model).eval().requires_grad_(False)

    def images(size: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(size, generator=generator).to(parameter)

    # Of a batch of one, or sides that agree, an exporter concludes that they always are so.
    more = 32 if shape[-1] == shape[-2] else 0
    example = (1, *shape[1:]) if static else (2, *shape[1:-1], shape[-1] + more)
    with _draft(path) as draft:
        write = _write_onnx if kind == "onnx" else _write_pt2
        try:
            with torch.no_grad(), _quiet():
                write(network, images(example), draft, None if static else AXES)
        except Exception as error:  # whatever an exporter meets in a network
            raise ExportError(_why_not(model, images(example), static, error)) from error
        run, unchecked = _runner(kind, draft)
        found = {}
        if run is not None:
            other = example if static else _another(network, shape, images)
            for size in dict.fromkeys((example, other)):
                found[size] = _difference(network, run, images(size), path)
    named = tuple(side if static else AXES.get(i, side) for i, side in enumerate(example))
    return Exported(path, kind, named, found, unchecked)


def _another(
    model: nn.Module, shape: tuple[int, ...], images: Callable[[tuple[int, ...]], Tensor]
) -> tuple[int, ...]:
    """A second size to check at: odd sides, or multiples of 32 for a network that wants those."""
    odd = (1, shape[1], shape[2] + 3, shape[3] + 5)
    try:
        with torch.no_grad():
            model(images(odd))
    except Exception:  # a network's own words for a size that it does not take
        return 1, shape[1], shape[2] + 32, shape[3] + 64
    return odd


def _format_of(path: Path, format: Format | None) -> Format:
    if format is None and path.suffix in FORMATS:
        return FORMATS[path.suffix]
    if format is None or format not in FORMATS.values():
        raise ExportError(
            f"'{path}': expected a name that ends in .onnx or .pt2, or format 'onnx' or 'pt2', got "
            f"{path.suffix if format is None else format!r}."
        )
    return format


def _refuse(model: nn.Module, format: Format, path: Path, overwrite: bool) -> None:
    """Raise if there is no point in beginning."""
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    if format == "onnx" and missing:
        raise ExportError(
            f"ONNX needs {' and '.join(missing)}, which is not installed. "
            'Install: pip install "pacswap[onnx]". Or write .pt2, which needs nothing.'
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise ExportError(
            f"'{path}' exists. Name another file, or replace it: --overwrite on the command line, "
            "overwrite=True in Python."
        )
    if not path.parent.is_dir():
        raise ExportError(f"'{path.parent}' is no folder. Make it, or name another file.")
    if any(guidance.is_external for guidance in plan_of(model).guidances):
        raise ExportError(
            f"this {type(model).__name__} takes an external guidance, whose shape is not known "
            "here. Export it yourself: torch.export.export(model, (images,), {'guidance': …})."
        )


def _write_onnx(model: nn.Module, images: Tensor, path: Path, axes: dict[int, str] | None) -> None:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        dynamic_shapes=None if axes is None else (axes,),
        verbose=False,
    )
    assert program is not None
    program.save(path)


def _write_pt2(model: nn.Module, images: Tensor, path: Path, axes: dict[int, str] | None) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = None if axes is None else (dict.fromkeys(axes, dynamic),)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file)


def _runner(format: Format, path: Path) -> tuple[Run | None, str | None]:
    """What runs a written file, or why nothing does."""
    if format == "pt2":
        with path.open("rb") as file:
            module = torch.export.load(file).module()
        return lambda images: _tensors(module(images)), None
    try:
        import onnxruntime
    except ImportError:
        return None, (
            "not checked: onnxruntime is not installed, so nothing here can run the file. "
            'Install: pip install "pacswap[onnx]".'
        )
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [
            torch.from_numpy(array) for array in session.run(None, {name: images.cpu().numpy()})
        ]

    return run, None


def _difference(model: nn.Module, run: Run, images: Tensor, path: Path) -> float:
    """How far a file is from its network, relative to the largest output.

    Raises:
        ExportError: by more than rounding.
    """
    size = "×".join(map(str, images.shape))
    with torch.no_grad():
        wanted = _tensors(model(images.clone()))  # which it may overwrite
        try:
            found = run(images.clone())
        except Exception as error:  # the runtime's own kinds
            raise ExportError(
                f"'{path}' would not run on images of {size}: {_first_line(error)}. The network "
                "goes another way for other sizes. Export it for one: --static on the command "
                "line, static=True in Python."
            ) from error
    shapes, others = ([list(t.shape) for t in given] for given in (wanted, found))
    off = _farthest(wanted, found) if shapes == others else math.inf
    bound = TOLERANCE[images.dtype]
    if not off <= bound:
        raise ExportError(
            f"'{path}' would give other outputs than the network on images of {size}: off by "
            f"{off:.1e}, expected {bound:.0e}; shapes {others}, expected {shapes}. Export it for "
            "one size: --static on the command line, static=True in Python."
        )
    return off


def _farthest(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to the largest of each tensor."""
    offs = [0.0]
    for a, b in zip(wanted, found, strict=True):
        if a.numel():
            scale = a.double().abs().max().clamp(min=1e-12)
            offs.append(((a.double() - b.double()).abs().max() / scale).item())
    return max(offs, key=lambda off: (math.isnan(off), off))


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # an exporter wraps what went wrong in advice
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:300].rstrip(".!")


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _why_not(model: nn.Module, images: Tensor, static: bool, error: Exception) -> str:
    """Whose limit it is that a network cannot be exported: its own, or pacswap's."""
    from pacswap.surgery import revert

    said = _first_line(error)
    name = type(model).__name__
    way_out = (
        ""
        if static
        else (" For one size it may go: --static on the command line, static=True in Python.")
    )
    axes = None if static else dict.fromkeys(AXES, torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad(), _quiet():
            plain = revert(model).eval()
            torch.export.export(plain, (images,), dynamic_shapes=None if static else (axes,))
    except Exception:  # the same, without pacswap
        return (
            f"this {name} cannot be exported, and neither can the network before the swap: "
            f"{said}.{way_out}"
        )
    layers = ", ".join(f"'{layer}'" for layer in list(pac_layers(model))[:3])
    return f"this {name} cannot be exported with {layers} swapped: {said}.{way_out}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|onnx|copyreg)")
        yield


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place if all goes well.

    Raises:
        ExportError: it cannot be written.
    """
    draft = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise ExportError(
            f"cannot write '{path}': {error.strerror or error}. Name another file."
        ) from error
    finally:
        for left in (draft, draft.with_name(f"{draft.name}.data")):
            with suppress(OSError):
                left.unlink()
