"""A plan as text that fits a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pacswap.surgery.plan import Plan, PlannedGuidance, PlannedKernel, PlannedScope


def plan_table(plan: Plan) -> str:
    """The plan as a newcomer reads it: layers, guidance, kernels, what is rewired, the cost."""
    size = "×".join(map(str, plan.input_shape[1:]))
    count = len(plan.layers)
    many = len(plan.guidances) > 1
    rows = []
    for layer in plan.layers:
        kernel = plan.kernels[layer.kernel]
        row = [layer.name, layer.conv, "×".join(map(str, kernel.output_size))]
        row.append(", ".join(plan.guidance_of(layer).sources))
        rows.append(row)
    lines = [
        f"{plan.model}, input {size}: {count} convolution{'s' if count > 1 else ''} "
        f"become{'' if count > 1 else 's'} pixel-adaptive",
        "",
        *columns(["layer", "convolution", "output", "guided by"], rows),
        "",
    ]
    for index, guidance in enumerate(plan.guidances):
        kernels = [kernel for kernel in plan.kernels if kernel.guidance == index]
        title = f"guidance {index + 1}" if many else "guidance"
        lines.append(f"  {title:<12}{_guidance_in_words(guidance)}")
        lines.append(f"  {'kernel':<12}{_kernel_in_words(kernels)}")
    lines += [f"  {'rewired':<12}{_scope_in_words(scope)}" for scope in plan.scopes]
    cost = plan.cost
    lines += [
        f"  {'parameters':<12}{_plus(cost.parameters, cost.added_parameters)}",
        f"  {'MACs':<12}{_plus(cost.macs, cost.added_macs)}",
        f"  {'memory':<12}+ {quantity(cost.added_bytes, 'B')} of activations for one image",
    ]
    return "\n".join(lines)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns under a ruled head."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "  " + "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()

    return [line(head), line(["─" * width for width in widths]), *map(line, rows)]


def quantity(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix.

    >>> quantity(4_210), quantity(26_530_000_000), quantity(1_200_000, "B"), quantity(3)
    ('4.21 k', '26.5 G', '1.2 MB', '3')
    """
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _plus(before: int, added: int) -> str:
    share = 100 * added / before if before else 0.0
    shown = f"{share:.2g} %" if share >= 0.01 else "under 0.01 %"
    return f"{quantity(before)} + {quantity(added)} ({shown})"


def _guidance_in_words(guidance: PlannedGuidance) -> str:
    parts = []
    for name, shape in zip(guidance.sources, guidance.shapes, strict=True):
        if shape is None:
            parts.append(f"{name}, the keyword argument guidance=")
        else:
            parts.append(f"{name}, {shape[1]} channels at {shape[2]}×{shape[3]}")
    text = " and ".join(parts)
    if guidance.spec.source == "input+position":
        text += ", with the position of each pixel"
    if guidance.spec.channels is not None:
        text += f" → {guidance.spec.channels} (learned 1×1 projection)"
    if guidance.spec.detach:
        text += ", no gradient"
    return text


def _kernel_in_words(kernels: Sequence[PlannedKernel]) -> str:
    spec = kernels[0].spec
    words: list[str] = [spec.form]
    if spec.normalize != "none":
        words.append(f"normalised by the {spec.normalize}")
    start = "0 (starts as the plain convolution)" if spec.blend == 0 else f"{spec.blend:g}"
    words.append(f"blend {start}")
    words.append(f"bandwidth {spec.bandwidth}")
    count = len(kernels)
    shared = f"; {count} kernels computed, each once" if count > 1 else "; computed once"
    return ", ".join(words) + shared


def _scope_in_words(scope: PlannedScope) -> str:
    where = f"{scope.module}.{scope.method}" if scope.module else scope.method
    graphs = "" if scope.evaluate is None else ", one graph for train and one for eval mode"
    return f"{where} ({scope.kind}){graphs}; all around it keeps its own code"
