"""A plan as a newcomer reads it: layers, guidance, kernels, what is rewired, the cost."""

from __future__ import annotations

from collections.abc import Sequence

from pacswap.surgery.plan import Plan, PlannedGuidance, PlannedKernel, PlannedScope
from pacswap.surgery.spec import CRFSpec, FilterSpec, Group
from pacswap.surgery.table import columns, plus, quantity
from pacswap.surgery.targets import KINDS


def plan_in_words(plan: Plan) -> str:
    """A table that fits a terminal."""
    size = "×".join(map(str, plan.input_shape[1:]))
    many = len(plan.guidances) > 1
    swaps = all(layer.operation == "swap" for layer in plan.layers)
    head = ["layer", "convolution" if swaps else "what it is", "output", "guided by"]
    rows = []
    for layer in plan.layers:
        kernel = plan.kernels[layer.kernel]
        row = [layer.name, layer.what, "×".join(map(str, kernel.output_size))]
        row.append(", ".join(plan.guidance_of(layer).sources))
        rows.append(row if swaps else [layer.operation, *row])
    lines = [
        f"{plan.model}, input {size}: {_deed(plan)}",
        "",
        *columns(head if swaps else ["operation", *head], rows),
        "",
    ]
    for index, guidance in enumerate(plan.guidances):
        kernels = [kernel for kernel in plan.kernels if kernel.guidance == index]
        group = plan.groups[guidance.group]
        title = f"guidance {index + 1}" if many else "guidance"
        lines.append(f"  {title:<12}{_guidance_in_words(guidance)}")
        plain = "the plain convolution" if group.operation == "swap" else "as it was"
        lines.append(f"  {'kernel':<12}{_kernel_in_words(kernels, guidance.is_external, plain)}")
        lines += [f"  {title:<12}{text}" for title, text in _options_in_words(plan, group)]
    for scope in plan.scopes:
        lines.append(f"  {'rewired':<12}{_scope_in_words(scope)}")
        if scope.untraced is not None:
            lines.append(f"  {'':<12}because {scope.untraced.split('. ')[0].rstrip('.')}")
    cost = plan.cost
    lines += [
        f"  {'parameters':<12}{plus(cost.parameters, cost.added_parameters)}",
        f"  {'MACs':<12}{plus(cost.macs, cost.added_macs)}",
        f"  {'memory':<12}+ {quantity(cost.added_bytes, 'B')} of activations for one image",
    ]
    return "\n".join(lines)


def deed(plan: Plan) -> str:
    """What is done, in a few words: `3 convolutions swapped`."""
    parts = []
    for operation, kind in KINDS.items():
        count = sum(layer.operation == operation for layer in plan.layers)
        if count and operation == "append":
            parts.append(f"{count} CRF{'s' if count > 1 else ''} appended")
        elif count:
            verb = "guided" if operation == "upsample" else "swapped"
            parts.append(f"{count} {kind.nouns if count > 1 else kind.noun} {verb}")
    return ", ".join(parts)


def _deed(plan: Plan) -> str:
    parts = []
    changed = 0
    for operation, kind in KINDS.items():
        count = sum(layer.operation == operation for layer in plan.layers)
        if count and operation != "append":
            parts.append(f"{count} {kind.nouns if count > 1 else kind.noun}")
            changed += count
    words = []
    if parts:
        become = "become" if changed > 1 else "becomes"
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
        words.append(f"{listed} {become} pixel-adaptive")
    appended = sum(layer.operation == "append" for layer in plan.layers)
    if appended:
        words.append(f"{appended} CRF{'s are' if appended > 1 else ' is'} appended")
    return ", ".join(words)


def _guidance_in_words(guidance: PlannedGuidance) -> str:
    parts = []
    for name, shape in zip(guidance.sources, guidance.shapes, strict=True):
        if shape is None:
            parts.append(f"{name}, the keyword argument guidance=")
        else:
            parts.append(f"{name}, {shape[1]} channels at {'×'.join(map(str, shape[2:]))}")
    text = " and ".join(parts)
    if guidance.spec.source == "input+position":
        text += ", with the position of each pixel"
    if guidance.projection is not None:
        text += f" → {guidance.projection} (1×1 projection)"
    if guidance.spec.detach:
        text += ", no gradient"
    return text


def _kernel_in_words(kernels: Sequence[PlannedKernel], external: bool, plain: str) -> str:
    spec = kernels[0].spec
    constant = spec.form == "constant"
    words: list[str] = ["constant (a control: nothing adapts)" if constant else spec.form]
    divisors = dict.fromkeys(k.spec.normalize for k in kernels if k.spec.normalize != "none")
    if divisors:
        words.append(f"normalised by the {' or the '.join(map(str, divisors))}")
    start = f"0 ({plain})" if spec.blend == 0 else f"{spec.blend:g}"
    words.append(f"blend {start}")
    unset = external and spec.bandwidth == "auto"
    if not constant:
        words.append("bandwidth 1 (not calibrated)" if unset else f"bandwidth {spec.bandwidth}")
    if spec.recompute:
        words.append("recomputed in the backward pass")
    count = len(kernels)
    shared = f"; {count} of them" if count > 1 else "; one for all"
    return ", ".join(words) + shared


def _scope_in_words(scope: PlannedScope) -> str:
    where = f"{scope.module}.{scope.method}" if scope.module else scope.method
    if scope.untraced is not None:
        return f"{where} ({scope.kind}) keeps its code, features are handed on while it runs"
    graphs = "" if scope.evaluate is None else ", a graph for each mode"
    return f"{where} ({scope.kind}){graphs}, the rest keeps its code"


def _options_in_words(plan: Plan, group: Group) -> list[tuple[str, str]]:
    """(title, text) of what an operation has beside guidance and kernel."""
    inserted = [
        layer for layer in plan.layers if plan.groups[layer.group] is group and layer.is_inserted
    ]
    if not inserted:
        return []
    if group.operation == "upsample":
        spec = group.filter or FilterSpec()
        what = "one spatial filter" if spec.weights == "filter" else "a C×C matrix at every tap"
        steps = f", {spec.steps} steps" if spec.steps > 1 else ""
        return [("filter", f"{_size(spec.kernel_size, spec.dilation, spec.blur)}, {what}{steps}")]
    crf = group.crf or CRFSpec()
    own = "" if crf.shared_steps else " with weights of their own"
    lines = [("CRF", f"{crf.steps} mean-field steps{own}")]
    for kernel in crf.kernels:
        words = [_size(kernel.kernel_size, kernel.dilation, kernel.blur), kernel.compatibility]
        if not kernel.guided:
            words.append("smoothness only")
        if kernel.position is not None:
            words.append(f"position within {kernel.position:g} px")
        lines.append(("", ", ".join(words)))
    return lines


def _size(side: int, dilation: int, blur: int) -> str:
    dilated = f" dilation {dilation}" if dilation > 1 else ""
    return f"{side}×{side}{dilated}" + (f" blurred by {blur}" if blur > 1 else "")
