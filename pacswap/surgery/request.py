"""What a Python caller may write, turned into groups; what is wrong with it, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args

from pacswap.errors import PlanError, nearest_hint, quoted
from pacswap.surgery.limits import (
    check_crf,
    check_filter,
    check_flag,
    check_kernel,
    check_query,
    check_word,
)
from pacswap.surgery.spec import (
    CRFSpec,
    FilterSpec,
    Group,
    GuidanceSpec,
    KernelSpec,
    LayerQuery,
    Layers,
    Operation,
    PairwiseSpec,
    Resize,
)

T = TypeVar("T")


def as_groups(
    layers: Any = None,
    guidance: Any = None,
    groups: Iterable[Any] | None = None,
    **options: Any,
) -> tuple[Group, ...]:
    """Groups from the arguments of `plan` and `swap`.

    Args:
        layers: of one group.
        guidance: of one group.
        groups: or several groups.
        **options: the other keys of one group; those that are None count as left out.

    Raises:
        PlanError: with every fault of the request.
    """
    faults: list[str] = []
    given = {key: value for key, value in options.items() if value is not None}
    if groups is None:
        if layers is None or guidance is None:
            raise PlanError(
                "name what to change: layers=… and guidance=…, or groups=[…] for several kinds."
            )
        made = [_group({"layers": layers, "guidance": guidance, **given}, "", faults)]
    elif layers is not None or guidance is not None or given:
        one = {"layers": layers, "guidance": guidance, **given}
        names = quoted([key for key, value in one.items() if value is not None])
        raise PlanError(f"give {names} or groups, not both: a group has them itself.")
    elif isinstance(groups, str | Group | Mapping) or not isinstance(groups, Iterable):
        raise PlanError(f"groups: expected a list of groups, got {groups!r}.")
    else:
        made = [_group(part, f"groups[{i}].", faults) for i, part in enumerate(groups)]
        if not made:
            faults.append("groups is empty. Give at least one group.")
    if faults:
        many = f"{len(faults)} faults in the request:\n  - " if len(faults) > 1 else ""
        raise PlanError(many + "\n  - ".join(faults))
    return tuple(group for group in made if group is not None)


def _group(given: Any, where: str, faults: list[str]) -> Group | None:
    known = [f.name for f in fields(Group)]
    if isinstance(given, Group):
        given = {name: getattr(given, name) for name in known}
    if not isinstance(given, Mapping):
        faults.append(f"{where.rstrip('.')}: expected a pacswap.Group or a mapping, got {given!r}.")
        return None
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
        check_kernel(kernel, f"{where}kernel", faults)
    override = given.get("override", False)
    check_flag(f"{where}override", override, faults)
    operation = given.get("operation", "swap")
    check_word(f"{where}operation", operation, get_args(Operation), faults)
    filter = _only_for("upsample", FilterSpec, "filter", given, where, faults)
    crf = _only_for("append", CRFSpec, "crf", given, where, faults)
    if guidance is None or kernel is None or operation not in get_args(Operation):
        return None
    return Group(layers, guidance, kernel, override, operation, filter, crf)


def _only_for(
    operation: str, spec: type[T], key: str, given: Mapping[str, Any], where: str, faults: list[str]
) -> T | None:
    """The options that one operation has and the others have not."""
    if given.get(key) is None:
        return None
    if given.get("operation", "swap") != operation:
        faults.append(f"{where}{key}: belongs to operation {operation!r}. Leave it out.")
        return None
    asked = given[key]
    if key == "crf" and isinstance(asked, Mapping) and "kernels" in asked:
        asked = {**asked, "kernels": _pairwise(asked["kernels"], f"{where}crf.kernels", faults)}
    made = _from_mapping(spec, asked, f"{where}{key}", faults)
    if isinstance(made, FilterSpec):
        check_filter(made, f"{where}{key}", faults)
    if isinstance(made, CRFSpec):
        check_crf(made, f"{where}{key}", faults)
    return made


def _pairwise(given: Any, where: str, faults: list[str]) -> tuple[PairwiseSpec, ...]:
    if not isinstance(given, list | tuple) or not given:
        faults.append(f"{where}: expected a list of pairwise kernels, got {given!r}.")
        return (PairwiseSpec(),)
    numbered = enumerate(given)
    made = [_from_mapping(PairwiseSpec, one, f"{where}[{i}]", faults) for i, one in numbered]
    return tuple(kernel for kernel in made if kernel is not None)


def _layers(given: Any, where: str, faults: list[str]) -> Layers:
    def one(part: Any) -> Any:
        if isinstance(part, Mapping):
            part = {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
            part = _from_mapping(LayerQuery, part, where, faults)
        if isinstance(part, LayerQuery):
            check_query(part, where, faults)
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
    check_word(f"{where}.resize", spec.resize, get_args(Resize), faults)
    check_flag(f"{where}.detach", spec.detach, faults)
    return spec


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
