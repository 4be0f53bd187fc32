"""What a swap promises, measured with plain torch: `pacswap.verify` is not asked.

Each check is a function of a `Subject` in `CHECKS`; `check` runs it, and an error of what is
checked is a failure with the error's words.
"""

from __future__ import annotations

import copy
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from zoo_models import Example, tensors

import pacswap
from pacswap.zoo import identify

AWAKE = 0.5  # the blend of layers that adapt
BOUND = 1e-5  # of a difference, relative to the largest value of its tensor; float32


class Check(NamedTuple):
    """One measured statement.

    Attributes:
        name: what was checked, a key of `CHECKS`.
        passed: whether it holds; None where it does not apply.
        figure: what was measured, in words.
    """

    name: str
    passed: bool | None
    figure: str


@dataclass(frozen=True)
class Subject:
    """A network before and after a swap.

    Attributes:
        original: before.
        upgraded: after.
        layers: the names of what was swapped.
        example: what both are called with.
    """

    original: nn.Module
    upgraded: nn.Module
    layers: tuple[str, ...]
    example: Example

    def output(self, network: nn.Module, training: bool) -> tuple[Any, dict[str, Tensor]]:
        """Output under one seed and the buffers afterwards; train mode runs on a copy."""
        twin = copy.deepcopy(network).train() if training else network.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            output = twin(*self.example.of(training))
        return output, dict(twin.named_buffers())

    @contextmanager
    def awake(self) -> Iterator[nn.Module]:
        """The upgraded network with layers that adapt, which they don't right after a swap."""
        blends = [self.upgraded.get_submodule(name).blend for name in self.layers]
        before = [blend.detach().clone() for blend in blends]
        with torch.no_grad():
            for blend in blends:
                blend.fill_(AWAKE)
        try:
            yield self.upgraded
        finally:
            with torch.no_grad():
                for blend, value in zip(blends, before, strict=True):
                    blend.copy_(value)


Verdict = tuple[bool | None, str]


def difference(before: Any, after: Any) -> float:
    """The largest difference of two outputs, each relative to its tensor's largest value.

    Other containers, types, shapes, or values that are not finite, differ infinitely.
    """
    if type(before) is not type(after):
        return math.inf
    if isinstance(before, Tensor):
        return _tensor_difference(before, after)
    if isinstance(before, Mapping):
        pairs = [(before[k], after[k]) for k in before] if list(before) == list(after) else None
    elif isinstance(before, list | tuple):
        pairs = list(zip(before, after, strict=True)) if len(before) == len(after) else None
    else:
        return 0.0 if before == after else math.inf
    if pairs is None:
        return math.inf
    return max((difference(a, b) for a, b in pairs), default=0.0)


def _tensor_difference(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.inf
    if before.numel() == 0:
        return 0.0
    x, y = before.detach().double(), after.detach().double()
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.inf
    scale = max(x.abs().max().item(), torch.finfo(torch.float32).tiny)
    return (x - y).abs().max().item() / scale


def _within(error: float) -> Verdict:
    return error <= BOUND, f"relative difference {error:.1e}"


def same_in_eval(subject: Subject) -> Verdict:
    """Promise 1."""
    before, _ = subject.output(subject.original, False)
    after, _ = subject.output(subject.upgraded, False)
    return _within(difference(before, after))


def same_in_train(subject: Subject) -> Verdict:
    """Promise 1, with the running statistics that the step leaves."""
    before, statistics = subject.output(subject.original, True)
    after, others = subject.output(subject.upgraded, True)
    error = difference(before, after)
    for name, value in statistics.items():
        error = max(error, difference(value, others.get(name)))
    return _within(error)


def every_layer_learns(subject: Subject) -> Verdict:
    """Promise 2: `blend` of every swapped layer has a gradient that is finite and not zero."""
    twin = copy.deepcopy(subject.upgraded).train()
    blends = [twin.get_submodule(name).blend for name in subject.layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = twin(*subject.example.of(True))
        generator = torch.Generator().manual_seed(1)
        total = sum(
            (leaf * torch.randn(leaf.shape, generator=generator)).mean()
            for leaf in tensors(output)
            if leaf.requires_grad
        )
        total.backward()
    sizes = [0.0 if b.grad is None else b.grad.abs().max().item() for b in blends]
    alive = [math.isfinite(size) and size > 0 for size in sizes]
    figure = f"{sum(alive)} of {len(alive)} have a gradient; the smallest is {min(sizes):.1e}"
    dead = [name for name, lives in zip(subject.layers, alive, strict=True) if not lives]
    return all(alive), figure + (f"; none: {', '.join(dead)}" if dead else "")


def layers_are_adaptive(subject: Subject) -> Verdict:
    """Each layer that was named is another than before, and only those."""
    before, after = (
        {name: type(module) for name, module in network.named_modules(remove_duplicate=False)}
        for network in (subject.original, subject.upgraded)
    )
    left = [name for name in subject.layers if not hasattr(_layer(subject, name), "blend")]
    # The network itself is of a class of its own.
    changed = [n for n in before if n and not issubclass(after.get(n, object), before[n])]
    others = sorted(set(changed) - set(subject.layers) - _aliases(subject))
    figure = f"{len(subject.layers) - len(left)} of {len(subject.layers)} swapped"
    return not left and not others, figure + (
        f"; changed too: {', '.join(others)}" if others else ""
    )


def _layer(subject: Subject, name: str) -> nn.Module:
    return subject.upgraded.get_submodule(name)


def _aliases(subject: Subject) -> set[str]:
    """Every name of the swapped layers."""
    swapped = {id(subject.original.get_submodule(name)) for name in subject.layers}
    everything = subject.original.named_modules(remove_duplicate=False)
    return {name for name, module in everything if id(module) in swapped}


def keys_are_kept(subject: Subject) -> Verdict:
    """Promise 3."""
    before, after = subject.original.state_dict(), subject.upgraded.state_dict()
    bad = [key for key, value in before.items() if not _equal(value, after.get(key))]
    figure = f"{len(before) - len(bad)} of {len(before)} kept"
    return not bad, figure + (f"; not: {', '.join(bad[:3])}" if bad else "")


def checkpoint_loads(subject: Subject) -> Verdict:
    """Promise 3."""
    twin = copy.deepcopy(subject.upgraded)
    twin.load_state_dict(subject.original.state_dict(), strict=True)
    return True, "strictly"


def class_is_kept(subject: Subject) -> Verdict:
    """The upgraded network is one of the original's class."""
    wanted = type(subject.original)
    return isinstance(subject.upgraded, wanted), f"isinstance of {wanted.__name__}"


def attributes_are_kept(subject: Subject) -> Verdict:
    """All public attributes and methods are there."""
    public = {name for name in dir(subject.original) if not name.startswith("_")}
    lost = sorted(name for name in public if not hasattr(subject.upgraded, name))
    figure = f"{len(public) - len(lost)} of {len(public)}"
    return not lost, figure + (f"; lost: {', '.join(lost[:3])}" if lost else "")


def revert_undoes_it(subject: Subject) -> Verdict:
    """Promise 4: keys in their order, values, the class, and the classes of the layers."""
    plain = pacswap.revert(subject.upgraded)
    before, after = subject.original.state_dict(), plain.state_dict()
    if list(before) != list(after):
        return False, f"{len(before)} keys before, {len(after)} after, or another order"
    bad = [key for key, value in before.items() if not _equal(value, after[key])]
    if bad:
        return False, f"{len(bad)} tensors differ, first '{bad[0]}'"
    kinds, others = ([type(m) for m in net.modules()] for net in (subject.original, plain))
    if kinds != others:
        return False, f"modules are of other classes, the network a {type(plain).__name__}"
    return True, f"{len(before)} tensors"


def layers_adapt(subject: Subject) -> Verdict:
    """Promise 5: with `blend` at ½ the output is another one: its sameness before says something.

    In train mode, in which heads run that rest in eval mode.
    """
    before, _ = subject.output(subject.original, True)
    with subject.awake() as upgraded:
        after, _ = subject.output(upgraded, True)
    moved = difference(before, after)
    return BOUND < moved < math.inf, f"relative difference {moved:.1e}"


def pickling_keeps_it(subject: Subject) -> Verdict:
    """`torch.save` and `torch.load`."""
    with subject.awake() as upgraded:
        file = io.BytesIO()
        torch.save(upgraded, file)
        file.seek(0)
        return _same_again(subject, torch.load(file, weights_only=False))


def copying_keeps_it(subject: Subject) -> Verdict:
    """`copy.deepcopy`."""
    with subject.awake() as upgraded:
        return _same_again(subject, copy.deepcopy(upgraded))


def saving_keeps_it(subject: Subject) -> Verdict:
    """`pacswap.save` and `pacswap.load`."""
    if identify(subject.original) is None:
        return None, "pacswap.zoo.identify does not know the network"
    with tempfile.TemporaryDirectory() as folder, subject.awake() as upgraded:
        pacswap.save(upgraded, Path(folder) / "model")
        return _same_again(subject, pacswap.load(Path(folder) / "model"))


def _same_again(subject: Subject, again: nn.Module) -> Verdict:
    before, _ = subject.output(subject.upgraded, False)
    after, _ = subject.output(again, False)
    return _within(difference(before, after))


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


CHECKS: Mapping[str, Callable[[Subject], Verdict]] = {
    "same output in eval mode": same_in_eval,
    "same output in train mode": same_in_train,
    "every swapped layer learns": every_layer_learns,
    "the named layers are swapped": layers_are_adaptive,
    "state_dict keys and values kept": keys_are_kept,
    "the original checkpoint loads": checkpoint_loads,
    "the class is kept": class_is_kept,
    "attributes and methods are kept": attributes_are_kept,
    "revert gives the original back": revert_undoes_it,
    "output moves with the blends": layers_adapt,
    "torch.save and torch.load": pickling_keeps_it,
    "copy.deepcopy": copying_keeps_it,
    "pacswap.save and pacswap.load": saving_keeps_it,
}
SWAP = "pacswap.swap"  # itself, the check before the others
PROMISES = {
    1: ("same output in eval mode", "same output in train mode"),
    2: ("every swapped layer learns",),
}


def check(name: str, subject: Subject) -> Check:
    """Run one of the checks."""
    try:
        return Check(name, *CHECKS[name](subject))
    except Exception as error:  # whatever the network's code or pacswap raises is the finding
        return Check(name, False, in_words(error))


def checks(subject: Subject, names: Iterable[str] = CHECKS) -> list[Check]:
    """Run all, or some."""
    return [check(name, subject) for name in names]


def in_words(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
