"""Weights of the paper's reference implementation (NVlabs/pacnet), under the names used here.

The published files are plain state dicts. Their licence is CC BY-NC-SA 4.0, for research only.

Joint upsampling networks (`load_joint_upsample`), in `x4_pac_…`, `x8_paclite_…` and the like:

| reference | `pacswap.nn.JointUpsample` | |
|---|---|---|
| `branch_t.conv1..3` | `target.conv1..3` | |
| `branch_g.conv1..3` | `guidance.conv1..3` | |
| `up_convts.0..` | `stages.0..` | weights turned by 180° |
| `branch_f.conv1..2` | `head.conv1..2` | |

Layers (`load_layer`), for `PacConv2d`, `PacConvTranspose2d` and `PacPool2d`:

| reference | here | |
|---|---|---|
| `weight` | `weight` | a transposed layer's is turned by 180° |
| `bias` | `bias` | |
| `inv_alpha` | `adapting_kernel.alpha` | with form="inverse" |
| `inv_lambda` | `adapting_kernel.lambd` | with form="inverse" |
| `smooth_kernel` | `adapting_kernel.smoothing_filter` | [1, 1, k, k] becomes [k, k] |
| | `blend` = 1 | |
| | `adapting_kernel.log_bandwidth` = 0 | |

Semantic segmentation networks (`load_fcn8s`), in `fcn8s_…`. conv3_3, conv4_3 and conv5_3 are
pixel-adaptive, guided by relu(conv2_2), resized and multiplied by 10⁻⁴:

| reference | here | |
|---|---|---|
| `conv1_1` … `upscore_pool4` | the same, in `Fcn8s.network` | |
| `backbone.conv1_1` … | `conv1_1` …, in `Fcn8s.network` | of a network with a CRF |
| the constant 10⁻⁴ | bandwidth 10⁴ | with distance="sum", standardize=False, blend=1 |
| `crf.…` | `Fcn8s.crf`, for `load_layer` | |
| `feat_scales.i` | `Fcn8s.scales` | by what red, green and blue of term i's guidance are divided |

CRFs (`load_layer`), for `PacCRF` with a `color` and no `position`; w stands for
`pairwise_weights.i`, and with weights for each step every name begins with `steps.s.`:

| reference | `PacCRF` | |
|---|---|---|
| `unary_weight` | `unary_weight` | |
| `messengers.i.weight` | `kernels.i.weight` | `"4d"`: times w; `"potts"`: times −w |
| `compat.i.weight` | `kernels.i.compatibility` | `"2d"`: times w |
| `pairwise_weights.i` | `kernels.i.strength` | `"potts"` without spatial filter: −w |
| | `blend` = 1, `kernels.i.adapting_kernel.log_bandwidth` = 0 | |

A transposed layer of the reference is a PAC of the zero-inserted input with the weight as it is;
`F.conv_transpose2d`, and so ours, turns it by 180°: hence the turns above.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pacswap.errors import WeightsError, quoted
from pacswap.nn import PacConv2d, PacConvTranspose2d, PacPool2d
from pacswap.nn.crf import PacCRF
from pacswap.nn.joint import JointUpsample
from pacswap.nn.pairwise import PairwiseTerm

Weights: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
Layer: TypeAlias = PacConv2d | PacConvTranspose2d | PacPool2d | PacCRF

# The reference's by ours. Both begin names that go on alike.
_BRANCHES = {"target": "branch_t", "guidance": "branch_g"}
_BRANCHES |= {"stages": "up_convts", "head": "branch_f"}
_MOST_STAGES = 8
_BACKBONE = "backbone."
_IN_CRF = re.compile(
    r"crf\.(steps\.\d+\.)?(unary_weight|pairwise_weights\.\d+|"
    r"compat\.\d+\.weight|messengers\.(?P<term>\d+)\.weight)"
)


class Fcn8s(NamedTuple):
    """The weights of a semantic segmentation network.

    Attributes:
        network: of the FCN-8s, by the names of its layers, `conv1_1.weight` and so on.
        crf: of its PAC-CRF, for `load_layer`; empty without one.
        scales: for each pairwise term of the CRF, by what the red, green and blue of its guidance
            are divided, [3], in units of an image in 0..255.
    """

    network: dict[str, Tensor]
    crf: dict[str, Tensor]
    scales: list[Tensor]


def load_joint_upsample(weights: Weights) -> JointUpsample:
    """The joint upsampling network of a published file.

    Factor, width and channels are read off the file.

    Args:
        weights: a state dict, or a file, `.pth` or `.safetensors`; in a file also under
            `state_dict`, or with `module.` before every name.

    Returns:
        The network, in eval mode.

    Raises:
        WeightsError: no such file, or its tensors are not those of such a network; all that don't
            fit are listed.
    """
    state, origin = _read(weights)
    if any(name.startswith("branch_joint.") for name in state):
        raise WeightsError(
            f"{origin} holds a DJIF network, which has no pixel-adaptive layer and which pacswap "
            "does not build. Use a file with 'pac' or 'paclite' in its name."
        )
    stages = {name.split(".")[1] for name in state if re.match(r"up_convts\.\d+\.", name)}
    factor = 2 ** min(max(len(stages), 1), _MOST_STAGES)
    is_lite = factor in (4, 8, 16) and _size(state, "branch_t.conv1.weight", 0, 32) != 32
    width: Literal["full", "lite"] = "lite" if is_lite else "full"
    channels = _size(state, "branch_t.conv1.weight", 1, 1)
    guidance = _size(state, "branch_g.conv1.weight", 1, 3)
    with torch.device("meta"):
        network = JointUpsample(factor, channels, guidance, width)
    theirs = {}
    for name in network.state_dict():
        first, _, rest = name.partition(".")
        theirs[name] = f"{_BRANCHES[first]}.{rest}"
    wanted = {theirs[name]: list(t.shape) for name, t in network.state_dict().items()}
    what = f"the reference's joint upsampling network ({factor}×, {width})"
    _refuse_others(state, wanted, origin, what)
    made = {name: state[given] for name, given in theirs.items()}
    for name in made:
        if name.startswith("stages.") and name.endswith(".weight"):
            made[name] = made[name].flip(2, 3)
    network = network.to_empty(device="cpu")
    network.load_state_dict(made)
    return network.eval()


def load_layer(layer: Layer, weights: Weights, *, prefix: str = "") -> None:
    """Load the reference's weights of one layer into ours of the same options.

    What its file does not say is for the caller to know: stride and so on, whether K is
    normalised, of a CRF the number of steps and each term's dilation and blur. The guidance of a
    CRF is then a sequence: for each term the image divided by the term's scales.

    Args:
        layer: with distance="sum" and standardize=False; changed in place, but only if everything
            fits. Its blend becomes 1 and its bandwidth too.
        weights: a state dict or a file, as for `load_joint_upsample`.
        prefix: only names that begin so are looked at: the layer inside a network.

    Raises:
        WeightsError: no such file, or tensors or options that don't fit; all are listed.

    Example:
        >>> layer = PacConv2d(2, 4, 3, padding=1)
        >>> load_layer(layer, {"weight": torch.ones(4, 2, 3, 3), "bias": torch.zeros(4)})
    """
    state, origin = _read(weights)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    wanted = _crf_shapes(layer) if isinstance(layer, PacCRF) else _layer_shapes(layer)
    what = f"the reference's twin of this {type(layer).__name__}"
    others = [*_option_faults(layer), *_filter_faults(layer, state)]
    _refuse_others(state, wanted, origin, what, others)
    made = _crf_numbers(layer, state) if isinstance(layer, PacCRF) else _layer_numbers(layer, state)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if name == "blend" or name.endswith("log_bandwidth"):
                tensor.fill_(1 if name == "blend" else 0)
            elif name in made:
                tensor.copy_(made[name])


def load_fcn8s(weights: Weights) -> Fcn8s:
    """The weights of a published semantic segmentation network, with or without a CRF.

    `network` loads strictly into a plain FCN-8s whose layers have the reference's names. Swapped at
    conv3_3, conv4_3 and conv5_3, with relu(conv2_2) as guidance, not projected, and the kernel
    options standardize=False, distance="sum", normalize="none", bandwidth=1e4 and blend=1, it is
    the network of the paper.

    Args:
        weights: a state dict or a file, as for `load_joint_upsample`.

    Raises:
        WeightsError: no such file, or its tensors are not those of such a network; all that don't
            fit are listed.
    """
    state, origin = _read(weights)
    backbone = _BACKBONE if any(name.startswith(_BACKBONE) for name in state) else ""
    shapes = _fcn8s_shapes(_size(state, f"{backbone}score_fr.weight", 0, 21))
    network = {backbone + name: shape for name, shape in shapes.items()}
    # What of a CRF there has to be, only its layer knows: `load_layer` asks.
    crf = {name: list(t.shape) for name, t in state.items() if backbone and _IN_CRF.fullmatch(name)}
    terms = {found["term"] for found in map(_IN_CRF.fullmatch, crf) if found and found["term"]}
    scales = {f"feat_scales.{i}": [3] for i in range(len(terms))}
    _refuse_others(state, network | crf | scales, origin, "an FCN-8s of the reference")
    return Fcn8s(
        {name.removeprefix(backbone): state[name] for name in network},
        {name.removeprefix("crf."): state[name] for name in crf},
        [state[name] for name in scales],
    )


def _read(weights: Weights) -> tuple[dict[str, Tensor], str]:
    """The tensors by name, and what to call their origin."""
    if isinstance(weights, Mapping):
        state, origin = dict(weights), "the state dict"
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError("the state dict holds more than tensors. Give the tensors by name.")
    else:
        from pacswap.zoo import read_state_dict

        path = Path(weights)
        if not path.is_file():
            raise WeightsError(
                f"no weights file '{path}'. The README of NVlabs/pacnet says where the published "
                "ones are."
            )
        state, origin = read_state_dict(path), f"'{path}'"
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state, origin


def _refuse_others(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Sequence[int]],
    origin: str,
    what: str,
    others: Sequence[str] = (),
) -> None:
    """Raise unless the tensors are those wanted, and there are no other faults."""
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in wanted]
    known = {name: state[name] for name in wanted if name in state}
    misshapen = [
        f"'{name}' {list(t.shape)} (expected {list(wanted[name])})"
        for name, t in known.items()
        if list(t.shape) != list(wanted[name])
    ]
    strange = [n for n, t in known.items() if not t.is_floating_point() or t.is_sparse]
    faults = []
    for words, names in (
        ("missing", quoted(missing)),
        ("unknown", quoted(unknown)),
        ("of another shape", ", ".join(misshapen)),
        ("no floating-point numbers", quoted(strange)),
    ):
        faults += [f"{words}: {names}"] if names else []
    faults += others
    if faults:
        raise WeightsError(
            f"{origin} does not fit {what}. {'; '.join(faults)}. Give a file as it was published, "
            "or mend the options."
        )


def _size(state: Mapping[str, Tensor], name: str, axis: int, default: int) -> int:
    """The size of a tensor's axis, or the default if there is no such thing."""
    tensor = state.get(name)
    return default if tensor is None or tensor.dim() != 4 else max(1, tensor.shape[axis])


def _layer_shapes(layer: PacConv2d | PacConvTranspose2d | PacPool2d) -> dict[str, list[int]]:
    """What the reference's layer has."""
    shapes = {}
    if not isinstance(layer, PacPool2d):
        shapes["weight"] = list(layer.weight.shape)
        if layer.bias is not None:
            shapes["bias"] = list(layer.bias.shape)
    kernel = layer.adapting_kernel
    if kernel is not None and kernel.form == "inverse":
        shapes |= {"inv_alpha": list(kernel.alpha.shape), "inv_lambda": list(kernel.lambd.shape)}
    if kernel is not None and kernel.smoothing_filter is not None:
        shapes["smooth_kernel"] = [1, 1, *kernel.smoothing_filter.shape]
    return shapes


def _layer_numbers(
    layer: PacConv2d | PacConvTranspose2d | PacPool2d, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The reference's numbers under our names."""
    names = {"inv_alpha": "alpha", "inv_lambda": "lambd", "smooth_kernel": "smoothing_filter"}
    made = {f"adapting_kernel.{names[n]}" if n in names else n: t for n, t in state.items()}
    if "smooth_kernel" in state:
        made["adapting_kernel.smoothing_filter"] = state["smooth_kernel"][0, 0]
    if isinstance(layer, PacConvTranspose2d):
        made["weight"] = state["weight"].flip(2, 3)
    return made


def _steps(crf: PacCRF) -> list[str]:
    """How the names of each step's weights begin: one for all, if they are shared."""
    own = crf.unary_weight.shape[0]
    return [""] if own == 1 else [f"steps.{step}." for step in range(own)]


def _crf_shapes(crf: PacCRF) -> dict[str, list[int]]:
    """What the reference's CRF has."""
    shapes: dict[str, list[int]] = {}
    C = crf.channels
    for begin in _steps(crf):
        shapes[f"{begin}unary_weight"] = []
        for i, term in enumerate(crf.terms):
            k, kind = term.options.kernel_size, term.options.compatibility
            pairs = [C, C] if kind == "4d" else [1, 1]
            shapes[f"{begin}messengers.{i}.weight"] = [*pairs, k, k]
            if kind == "2d":
                shapes[f"{begin}compat.{i}.weight"] = [C, C, 1, 1]
            shapes[f"{begin}pairwise_weights.{i}"] = []
    return shapes


def _crf_numbers(crf: PacCRF, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's numbers under our names; ours hold the strength in one of the others."""
    begins = _steps(crf)

    def gathered(name: str) -> Tensor:
        """The steps side by side, as `PairwiseTerm` holds them."""
        return torch.stack([state[begin + name] for begin in begins])

    made = {"unary_weight": gathered("unary_weight")}
    for i, term in enumerate(crf.terms):
        filters, strength = gathered(f"messengers.{i}.weight"), gathered(f"pairwise_weights.{i}")
        along = strength[:, None, None, None, None]
        kind = term.options.compatibility
        if kind == "2d":
            matrices = gathered(f"compat.{i}.weight") * along
            made[f"kernels.{i}.compatibility"] = matrices.flatten(0, 1)
            made[f"kernels.{i}.weight"] = filters.flatten(0, 1)
        else:
            # Of Potts terms theirs is negative: they attract.
            sign = -1 if kind == "potts" else 1
            made[f"kernels.{i}.weight"] = (sign * filters * along).flatten(0, 1)
            made[f"kernels.{i}.strength"] = sign * strength
    return made


def _option_faults(layer: Layer) -> Iterator[str]:
    """The options of a layer that the reference does not have."""
    parts: list[tuple[str, Layer | PairwiseTerm]] = [("", layer)]
    if isinstance(layer, PacCRF):
        parts = [(f"kernels.{i}.", term) for i, term in enumerate(layer.terms)]
    for name, part in parts:
        kernel = part.adapting_kernel
        if kernel is None:
            yield f"{name}adapting_kernel is None, and the reference has one"
            continue
        if kernel.form not in ("gaussian", "inverse"):
            yield f"{name}form must be 'gaussian' or 'inverse', got {kernel.form!r}"
        if kernel.distance != "sum" or kernel.standardize:
            yield f"{name}distance must be 'sum' and standardize False"
        if isinstance(part, PairwiseTerm) and part.log_position is not None:
            yield f"{name}position must be None: give the positions in the guidance"
        if isinstance(part, PairwiseTerm) and part.normalize != "none":
            yield f"{name}normalize must be 'none', got {part.normalize!r}"


def _filter_faults(layer: Layer, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Filters that are no parameters of ours and have other values in the file."""
    fixed: dict[str, Tensor] = {}
    if isinstance(layer, PacCRF):
        for begin in _steps(layer):
            for i, term in enumerate(layer.terms):
                if term.weight is None:
                    ones = torch.ones(term.window.taps)
                    ones[term.window.centre] = 0
                    fixed[f"{begin}messengers.{i}.weight"] = ones
    elif layer.adapting_kernel is not None and layer.adapting_kernel.smoothing != "learned":
        smoothing = layer.adapting_kernel.smoothing_filter
        fixed |= {} if smoothing is None else {"smooth_kernel": smoothing.flatten()}
    for name, values in fixed.items():
        given = state.get(name)
        if given is None or given.numel() != values.numel():
            continue  # which is a fault already
        if not torch.allclose(given.flatten().double(), values.double().cpu(), atol=1e-6):
            yield f"'{name}' has other values than this layer's, which are fixed"


def _fcn8s_shapes(classes: int) -> dict[str, list[int]]:
    """The tensors of an FCN-8s on VGG-16."""
    convs = {"fc6": (512, 4096, 7), "fc7": (4096, 4096, 1), "score_fr": (4096, classes, 1)}
    convs |= {"score_pool3": (256, classes, 1), "score_pool4": (512, classes, 1)}
    c_in = 3
    for block, c_out in enumerate((64, 128, 256, 512, 512), start=1):
        for i in (1, 2, 3) if c_out > 128 else (1, 2):
            convs[f"conv{block}_{i}"] = (c_in, c_out, 3)
            c_in = c_out
    shapes: dict[str, list[int]] = {}
    for name, (c_in, c_out, side) in convs.items():
        shapes |= {f"{name}.weight": [c_out, c_in, side, side], f"{name}.bias": [c_out]}
    for name, side in (("upscore2", 4), ("upscore8", 16), ("upscore_pool4", 4)):
        shapes[f"{name}.weight"] = [classes, classes, side, side]
    return shapes
