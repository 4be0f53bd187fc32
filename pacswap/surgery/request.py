"""What a Python caller may write, turned into groups; what is wrong with it, all at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args

from pacswap.errors import PlanError, nearest_hint, quoted
from pacswap.surgery.spec import (
    Distance,
    Form,
    Group,
    GuidanceSpec,
    KernelSpec,
    LayerQuery,
    Layers,
    Normalize,
    Resize,
)

T = TypeVar("T")


def as_groups(
    layers: Any = None,
    guidance: Any = None,
    kernel: Any = None,
    groups: Iterable[Any] | None = None,
) -> tuple[Group, ...]:
    """Groups from the arguments of `plan` and `swap`.

    Raises:
        PlanError: with every fault of the request.
    """
    faults: list[str] = []
    if groups is None:
        if layers is None or guidance is None:
            raise PlanError(
                "name what to swap: layers=… and guidance=…, or groups=[…] for several kinds."
            )
        made = [_group({"layers": layers, "guidance": guidance, "kernel": kernel}, "", faults)]
    elif layers is not None or guidance is not None or kernel is not None:
        raise PlanError("give layers, guidance and kernel, or groups, not both.")
    elif isinstance(groups, str | Group | Mapping) or not isinstance(groups, Iterable):
        raise PlanError(f"groups: expected a list of groups, got {groups!r}.")
    else:
        made = [_group(given, f"groups[{i}].", faults) for i, given in enumerate(groups)]
        if not made:
            faults.append("groups is empty. Give at least one group.")
    if faults:
        many = f"{len(faults)} faults in the request:\n  - " if len(faults) > 1 else ""
        raise PlanError(many + "\n  - ".join(faults))
    return tuple(group for group in made if group is not None)


def _group(given: Any, where: str, faults: list[str]) -> Group | None:
    if isinstance(given, Group):
        given = {
            name: getattr(given, name) for name in ("layers", "guidance", "kernel", "override")
        }
    if not isinstance(given, Mapping):
        faults.append(f"{where.rstrip('.')}: expected a pacswap.Group or a mapping, got {given!r}.")
        return None
    known = [f.name for f in fields(Group)]
    faults += [
        f"{where}{key}: unknown key. {nearest_hint(str(key), known)}"
        for key in given
        if key not in known
    ]
    missing = [key for key in ("layers", "guidance") if given.get(key) is None]
    faults += [f"{where}{key}: missing." for key in missing]
    if missing:
        return None
    layers = _layers(given["layers"], f"{where}layers", faults)
    guidance = _guidance(given["guidance"], f"{where}guidance", faults)
    asked = KernelSpec() if given.get("kernel") is None else given["kernel"]
    kernel = _from_mapping(KernelSpec, asked, f"{where}kernel", faults)
    if kernel is not None:
        _check_kernel(kernel, f"{where}kernel", faults)
    if guidance is None or kernel is None:
        return None
    override = given.get("override", False)
    _check_flag(f"{where}override", override, faults)
    return Group(layers, guidance, kernel, override)


def _layers(given: Any, where: str, faults: list[str]) -> Layers:
    def one(part: Any) -> Any:
        if isinstance(part, Mapping):
            part = {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
            part = _from_mapping(LayerQuery, part, where, faults)
        if isinstance(part, LayerQuery):
            _check_query(part, where, faults)
        return part

    if isinstance(given, list | tuple | set):
        return tuple(one(part) for part in given)
    return one(given)


def _guidance(given: Any, where: str, faults: list[str]) -> GuidanceSpec | None:
    if isinstance(given, str):
        return GuidanceSpec(given)
    if isinstance(given, list | tuple):
        given = {"source": given}
    if isinstance(given, Mapping):
        if "from" in given and "source" in given:
            faults.append(f"{where}: from and source are one key. Leave one out.")
        given = {("source" if key == "from" else key): value for key, value in given.items()}
        source = given.get("source")
        given["source"] = tuple(source) if isinstance(source, list) else source
    spec = _from_mapping(GuidanceSpec, given, where, faults, shown={"source": "from"})
    if spec is None:
        return None
    names = (spec.source,) if isinstance(spec.source, str) else spec.source
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        faults.append(f"{where}.from: expected a name or a list of names, got {spec.source!r}.")
    if not (spec.channels is None or (type(spec.channels) is int and spec.channels >= 1)):
        faults.append(f"{where}.channels: expected a positive int or None, got {spec.channels!r}.")
    _check_word(f"{where}.resize", spec.resize, get_args(Resize), faults)
    _check_flag(f"{where}.detach", spec.detach, faults)
    return spec


def _check_query(query: LayerQuery, where: str, faults: list[str]) -> None:
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
    _check_flag(f"{where}.last_of_stage", query.last_of_stage, faults)
    if query.depthwise is not None:
        _check_flag(f"{where}.depthwise", query.depthwise, faults)


def _check_flag(where: str, value: Any, faults: list[str]) -> None:
    if not isinstance(value, bool):
        faults.append(f"{where}: expected True or False, got {value!r}.")


def _check_kernel(spec: KernelSpec, where: str, faults: list[str]) -> None:
    _check_word(f"{where}.form", spec.form, get_args(Form), faults)
    _check_word(f"{where}.normalize", spec.normalize, get_args(Normalize), faults)
    _check_word(f"{where}.distance", spec.distance, get_args(Distance), faults)
    _check_flag(f"{where}.standardize", spec.standardize, faults)
    if not _is_number(spec.blend):
        faults.append(f"{where}.blend: expected a finite number, got {spec.blend!r}.")
    if spec.bandwidth != "auto" and not (_is_number(spec.bandwidth) and spec.bandwidth > 0):
        faults.append(
            f"{where}.bandwidth: expected a positive number or 'auto', got {spec.bandwidth!r}."
        )


def _check_word(where: str, value: Any, known: tuple[str, ...], faults: list[str]) -> None:
    if value not in known:
        faults.append(f"{where}: expected one of {quoted(known)}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _from_mapping(
    spec: type[T], given: Any, where: str, faults: list[str], shown: Mapping[str, str] | None = None
) -> T | None:
    """A dataclass from a mapping, with unknown and missing keys as faults."""
    if isinstance(given, spec):
        return given
    if not isinstance(given, Mapping):
        faults.append(f"{where}: expected a {spec.__name__} or a mapping, got {given!r}.")
        return None
    shown = shown or {}
    known = [f.name for f in fields(spec)]  # type: ignore[arg-type]
    unknown = [key for key in given if key not in known]
    names = [shown.get(name, name) for name in known]
    faults += [f"{where}.{key}: unknown key. {nearest_hint(str(key), names)}" for key in unknown]
    required = [
        f.name
        for f in fields(spec)  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING
    ]
    missing = [name for name in required if given.get(name) is None]
    faults += [f"{where}.{shown.get(name, name)}: missing." for name in missing]
    if unknown or missing:
        return None
    return spec(**given)
