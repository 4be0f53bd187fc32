"""`torch.export` and ONNX: one program for every batch, height and width, without pacswap in it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from ecosystem import NETWORKS, images
from same import assert_differ, assert_same
from torch import nn
from torch.export import Dim, ExportedProgram

from pacswap.export import export

SIZES = [(3, 19, 23), (1, 16, 32), (2, 31, 18)]
GATHERING = ("unfold", "im2col", "col2im")


def program(name: str, blend: float) -> tuple[nn.Module, ExportedProgram]:
    model = NETWORKS[name].upgraded(blend).requires_grad_(False)
    sides = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    return model, torch.export.export(model, (images(),), dynamic_shapes=(sides,))


def operators(exported: ExportedProgram) -> list[str]:
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


def foreign(names: list[str]) -> list[str]:
    """Those that gather windows, and those that are Python's and not torch's."""
    known = ("aten.", "_operator.", "<built-in function", "torch.sym_", "<function sym_")
    return [n for n in names if any(g in n for g in GATHERING) or not n.startswith(known)]


@pytest.mark.parametrize("name", ["same", "scaled", "strided", "pool", "upsample", "relayed"])
def test_one_program_runs_at_every_size_and_blend(name: str) -> None:
    model, exported = program(name, 0.0)
    assert foreign(operators(exported)) == []
    module = exported.module()
    plain = model(images())
    for blend in (0.0, 0.5):
        for part in (model, module):
            moved = [p for key, p in part.named_parameters() if key.endswith("blend")]
            assert moved
            for parameter in moved:
                parameter.fill_(blend)
        for batch, height, width in SIZES:
            given = images(height, width, batch)
            assert_same(model(given), module(given))
    assert_differ(plain, model(images()))


@pytest.mark.parametrize(
    "name",
    ["depthwise", "grouped", "dilated", "two_roundings", "transposed", "append", "relayed_image"],
)
def test_what_is_adapted_exports_too(name: str) -> None:
    model, exported = program(name, 0.5)
    assert foreign(operators(exported)) == []
    given = images(19, 23, 3)
    assert_same(model(given), exported.module()(given))
    assert_differ(model(given), NETWORKS[name].upgraded(0.0)(given))


def test_a_gathering_operator_is_seen() -> None:
    exported = torch.export.export(nn.Unfold(3), (images(),))
    assert len(foreign(operators(exported))) == 1


# ---- ONNX


def written(name: str, folder: Path) -> tuple[nn.Module, Path]:
    model, path = NETWORKS[name].upgraded(0.5), folder / f"{name}.onnx"
    export(model, path)
    return model, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


ONNX = ["same", "relayed_image", "upsample"]


@pytest.mark.parametrize("name", ONNX)
def test_the_file_gives_the_same_with_standard_operators(name: str, folder: Path) -> None:
    """In one test, for a file takes as long to write as all the rest."""
    model, path = written(name, folder)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, height, width in SIZES:
        given = images(height, width, batch)
        (found,) = session.run(None, {"images": given.numpy()})
        expected = model(given).detach()
        assert_same(expected, torch.from_numpy(found), tolerance=1e-4)
        assert_differ(expected, NETWORKS[name].upgraded(0.0)(given).detach())
    assert_standard(onnx.load(path))


def assert_standard(stored: onnx.ModelProto) -> None:
    """Standard operators that gather no windows, and named axes."""
    onnx.checker.check_model(stored, full_check=True)
    assert {node.domain for node in stored.graph.node} <= {"", "ai.onnx"}
    assert [(o.domain, o.version) for o in stored.opset_import if o.domain in ("", "ai.onnx")] == [
        ("", 18)
    ]
    assert not {"Col2Im"} & {node.op_type for node in stored.graph.node}
    sides = stored.graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in sides] == ["batch", 3, "height", "width"]
