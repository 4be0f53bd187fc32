"""The five promises, measured on copies of a model and its upgraded twin."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pacswap.errors import PacswapError, VerificationError
from pacswap.nn import AdaptingKernel, Adaptive
from pacswap.surgery.hearing import Ears
from pacswap.surgery.modes import awake
from pacswap.surgery.plan import Plan
from pacswap.surgery.rewrite import pac_layers, plan_of, revert
from pacswap.surgery.skeleton import ExampleInput

# Largest difference, relative to the output's scale, that is called rounding.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class Check:
    """One measured statement.

    Attributes:
        promise: 1 … 5, as docs/promises.md numbers them.
        name: what was checked.
        passed: whether it holds.
        measured: the figure, in words.
    """

    promise: int
    name: str
    passed: bool
    measured: str


@dataclass(frozen=True)
class Verification:
    """What `verify` measured.

    Attributes:
        checks: in the order of the promises.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check does."""
        return all(check.passed for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise if a promise is broken.

        Raises:
            VerificationError: with every failed check and its figure.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            lines = "\n".join(f"  - promise {c.promise}, {c.name}: {c.measured}" for c in failed)
            raise VerificationError(
                f"{len(failed)} of {len(self.checks)} checks failed:\n{lines}\n"
                "Right after a swap this should not happen: please report it with the recipe."
            )

    def __str__(self) -> str:
        """A line for each check."""
        return "\n".join(
            f"{'ok  ' if c.passed else 'FAIL'}  {c.promise}  {c.name}: {c.measured}"
            for c in self.checks
        )


def verify(
    original: nn.Module,
    upgraded: nn.Module,
    example_input: ExampleInput,
    *,
    guidance: Tensor | None = None,
) -> Verification:
    """Measure the promises right after a swap. Neither model is changed.

    Args:
        original: the model before the swap.
        upgraded: what `swap` or `rewrite` made of it.
        example_input: a tensor or a tuple of positional arguments; for train mode, two images or
            more.
        guidance: the features of an external guidance, if the model was upgraded with one.

    Returns:
        The checks with their figures; `.passed` and `.raise_if_failed()` judge them.

    Raises:
        PlanError: `upgraded` is not an upgraded model.
        VerificationError: a model does not run on the input at all; the message has its own words.
    """
    plan = plan_of(upgraded)
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    extra = {} if guidance is None else {"guidance": guidance}
    checks: list[Check] = []
    for training in (False, True):
        checks.append(_same_output(original, upgraded, plan, args, extra, training))
    checks += _gradients(upgraded, plan, args, extra)
    checks += _state_dict(original, upgraded, plan)
    checks += _reverted(original, upgraded, args)
    checks.append(_guided(upgraded, plan, args, extra))
    return Verification(tuple(checks))


def _same_output(
    original: nn.Module,
    upgraded: nn.Module,
    plan: Plan,
    args: tuple[Any, ...],
    extra: dict[str, Any],
    training: bool,
) -> Check:
    mode = "train" if training else "eval"
    name = f"same output in {mode} mode"
    before, state_before = _run(original, args, {}, training)
    if any(kernel.spec.blend != 0 for kernel in plan.kernels):
        upgraded = _with_blends_at_zero(upgraded)
        name += " (blends set to 0)"
    after, state_after = _run(upgraded, args, extra, training)
    error, dtype = relative_error(before, after)
    if training:
        error = max(error, _statistics_error(state_before, state_after))
    bound = TOLERANCE[dtype]
    return Check(1, name, error <= bound, f"relative difference {error:.1e} (bound {bound:.0e})")


def _with_blends_at_zero(upgraded: nn.Module) -> nn.Module:
    """A copy that starts where a swap with the default blend does."""
    twin = copy.deepcopy(upgraded)
    with torch.no_grad():
        for layer in pac_layers(twin).values():
            layer.blend.zero_()
    return twin


def _run(
    model: nn.Module, args: tuple[Any, ...], extra: dict[str, Any], training: bool
) -> tuple[Any, dict[str, Tensor]]:
    """Output and buffers of a copy, under one fixed seed."""
    twin = copy.deepcopy(model).train(training)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            output = twin(*_copied(args), **extra)
        except PacswapError:
            raise
        except Exception as error:  # the model's own code
            mode = "train" if training else "eval"
            raise VerificationError(
                f"{type(model).__name__} does not run on the example input in {mode} mode: "
                f"{type(error).__name__}: {error}. Train mode usually needs two images or more."
            ) from error
    return output, dict(twin.named_buffers())


def relative_error(before: Any, after: Any) -> tuple[float, torch.dtype]:
    """Largest difference of two outputs relative to the first one's largest value, and its dtype.

    Different containers or shapes, or NaN on one side only, count as an infinite difference.
    """
    ours, structure = pytree.tree_flatten(before)
    theirs, other = pytree.tree_flatten(after)
    dtype = torch.float32
    if str(structure) != str(other) or len(ours) != len(theirs):
        return math.inf, dtype
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor):
            continue
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return math.inf, dtype
        if a.is_floating_point():
            dtype = a.dtype
        x, y = a.detach().double(), b.detach().double()
        if x.numel() == 0 or torch.equal(x, y):
            continue
        both = torch.isnan(x) & torch.isnan(y)
        difference = torch.where(both, torch.zeros_like(x), x - y).abs().max().item()
        scale = x[~torch.isnan(x)].abs().max().item() if not both.all() else 1.0
        error = difference / max(scale, torch.finfo(torch.float64).tiny)
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst, dtype


def _statistics_error(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Largest relative difference of the running statistics that a step in train mode leaves."""
    return max(
        (relative_error(value, after.get(name))[0] for name, value in before.items()), default=0.0
    )


def _gradients(
    upgraded: nn.Module, plan: Plan, args: tuple[Any, ...], extra: dict[str, Any]
) -> list[Check]:
    """Promise 2: a live gradient at once, and for everything that was added after one step."""
    twin = copy.deepcopy(upgraded).train()
    nudged = _open_zero_scales(twin)
    layers = pac_layers(twin)
    added = plan.added_parameters()
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    _backward(twin, args, extra)
    own = {name: layer.blend.grad for name, layer in layers.items()}
    dead = [name for name, grad in own.items() if not _alive(grad)]
    note = f" ({nudged} zero-initialised scales opened)" if nudged else ""
    checks = [Check(2, "every swapped layer learns", not dead, _how_many(dead, len(own)) + note)]
    own_parameters = {name: parameters[name] for name in added if name in parameters}
    _step(list({id(p): p for p in own_parameters.values()}.values()))
    twin.zero_grad()
    _backward(twin, args, extra)
    learns = [name for name in added if name in parameters]
    still = [name for name in learns if not _alive(parameters[name].grad)]
    words = _how_many(still, len(learns)) + note
    return [*checks, Check(2, "after one step everything added learns", not still, words)]


def _backward(twin: nn.Module, args: tuple[Any, ...], extra: dict[str, Any]) -> None:
    """Back-propagate a fixed random projection of all outputs."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        output = twin(*_copied(args), **extra)
        generator = torch.Generator("cpu").manual_seed(1)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for leaf in _floating(output):
            if leaf.requires_grad:
                weights = torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)
                total = total + (leaf * weights).mean().double().cpu()
        if total.requires_grad:
            total.backward()


def _step(parameters: list[nn.Parameter]) -> None:
    """One step of plain gradient descent whose longest component is 0.1."""
    grads = [p.grad for p in parameters if p.grad is not None]
    longest = max((grad.abs().max().item() for grad in grads), default=0.0)
    if longest > 0 and math.isfinite(longest):
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1 / longest)


def _open_zero_scales(model: nn.Module) -> int:
    """Set zero-initialised scales to 1: an untrained residual block passes no gradient.

    timm and torchvision initialise the last norm of a block so, timm's normaliser-free networks a
    gain; no layer inside, swapped or not, has a gradient then. Trained networks have no such ones.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Adaptive | AdaptingKernel):
            continue
        for name, scale in module.named_parameters(recurse=False):
            is_scale = scale.dim() <= 1 and scale.numel() > 0 and not name.endswith("bias")
            if is_scale and not scale.detach().any():
                nn.init.ones_(scale)
                count += 1
    return count


def _state_dict(original: nn.Module, upgraded: nn.Module, plan: Plan) -> list[Check]:
    """Promise 3: keys and values are kept, what is added has names of its own."""
    before, after = original.state_dict(), upgraded.state_dict()
    lost = [key for key in before if key not in after]
    changed = [k for k, v in before.items() if k in after and not _identical(v, after[k])]
    gained = sorted(set(after) - set(before))
    kept = Check(
        3,
        "state_dict keys and values kept",
        not lost and not changed and gained == plan.added_parameters(),
        f"{len(before) - len(lost) - len(changed)} of {len(before)} kept, {len(gained)} added",
    )
    twin = copy.deepcopy(upgraded)
    try:
        twin.load_state_dict(before)
        loaded = Check(3, "the original checkpoint loads strictly", True, "yes")
    except RuntimeError as error:
        loaded = Check(3, "the original checkpoint loads strictly", False, str(error))
    return [kept, loaded]


def _reverted(original: nn.Module, upgraded: nn.Module, args: tuple[Any, ...]) -> list[Check]:
    """Promise 4: the plain network comes back."""
    plain = revert(upgraded)
    ours, theirs = original.state_dict(), plain.state_dict()
    same_keys = list(ours) == list(theirs)
    differing = [k for k, v in ours.items() if k not in theirs or not _identical(v, theirs[k])]
    same_class = type(plain) is type(original) and not pac_layers(plain)
    before, _ = _run(original, args, {}, False)
    after, _ = _run(plain, args, {}, False)
    error, dtype = relative_error(before, after)
    passed = same_keys and not differing and same_class and error <= TOLERANCE[dtype]
    words = f"{len(differing)} tensors differ, relative difference {error:.1e}"
    return [Check(4, "revert gives the original back", passed, words)]


def _guided(upgraded: nn.Module, plan: Plan, args: tuple[Any, ...], extra: dict[str, Any]) -> Check:
    """Promise 5: every planned layer is there and answers to its guidance."""
    twin = copy.deepcopy(upgraded).eval()
    layers = pac_layers(twin)
    places = {layer.place: plan.kernels[layer.kernel].spec.form for layer in plan.layers}
    missing = [place for place in places if place not in layers]
    ears = Ears(layers)
    with torch.no_grad(), awake(twin):
        twin(*_copied(args), **extra)
        if not all(ears.heard.values()):  # a head that rests in eval mode
            twin.train()
            twin(*_copied(args), **extra)
    adaptive = [place for place, form in places.items() if form != "constant"]
    deaf = [name for name in adaptive if ears.heard.get(name) == 0]
    name = "every planned layer is in place and guided"
    if len(adaptive) < len(places):
        name += f" ({len(places) - len(adaptive)} held constant)"
    words = _how_many(missing + deaf, len(plan.layers), "answer to their guidance")
    return Check(5, name, not missing and not deaf, words)


def _alive(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad.isfinite().all()) and bool(grad.any())


def _how_many(dead: list[str], total: int, words: str = "have a gradient") -> str:
    text = f"{total - len(dead)} of {total} {words}"
    return (
        text if not dead else f"{text}; not: {', '.join(dead[:5])}{', …' if len(dead) > 5 else ''}"
    )


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _floating(output: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that a model may overwrite in place."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), args)
