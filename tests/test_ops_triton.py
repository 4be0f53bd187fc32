"""The Triton backend: under the interpreter, compiled for a GPU that is not there, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import CASES, HALVES, Case, assert_as_good_as, pac, wide
from torch import Tensor

from pacswap.ops.gpu.geometry import Geometry

HERE = Path(__file__).parent
INTERPRETED = sorted(HERE.glob("triton_*.py"))

pytest.importorskip("triton", reason="triton is not installed")


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests where Triton's programs run in Python, which it must know when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-o", "addopts="]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", INTERPRETED, ids=lambda path: path.stem)
def test_under_the_interpreter(path):
    run = interpreted(str(path))
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    assert " skipped" not in run.stdout


def test_a_failure_under_the_interpreter_is_seen(tmp_path):
    file = tmp_path / "triton_wrong.py"
    file.write_text(
        "from pacswap.ops.gpu.refusal import INTERPRETS\n"
        "def test_wrong(): assert not INTERPRETS, 'interpreted'\n",
        encoding="utf-8",
    )
    run = interpreted(str(file))
    assert run.returncode == 1
    assert "AssertionError: interpreted" in run.stdout


def test_all_files_are_there():
    names = ["triton_operators", "triton_tuning", "triton_values"]
    assert [path.stem for path in INTERPRETED] == names


class Compiler:
    """Compiles the programs of a call for an NVIDIA A100 instead of running them."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}  # PTX by the program's name

    def __call__(self, program: Any, grid: Any, on: Tensor, given: dict[str, Any]) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        config, function = program.configs[0], program.function
        given = given | config.kwargs
        signature, constants = {}, {}
        for place, parameter in enumerate(function.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(place,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[
                    value.dtype
                ]
            else:
                signature[parameter.name] = "i32"
        made = triton.compile(
            ASTSource(fn=function, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 80, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        assert made.asm["cubin"]
        self.made[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = made.asm["ptx"]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    pytest.importorskip("triton", minversion="3.3", reason="ASTSource is another before 3.3")
    from pacswap.ops.gpu import distances, launch, refusal

    if refusal.INTERPRETS:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = Compiler()
    monkeypatch.setattr(launch, "run", compiler)
    monkeypatch.setattr(distances, "run", compiler)
    return compiler


def convolve_in_bfloat16(groups: int) -> None:
    """Calls everything that a training step calls; bfloat16 is what the interpreter cannot do."""
    from pacswap.ops.gpu import launch

    case = CASES["groups2" if groups == 1 else "depthwise_times_2"]
    given = case.tensors(torch.bfloat16)
    B, _, *size = case.output_shape
    kernel = torch.rand(B, 1, 9, *size).bfloat16()
    geometry = Geometry.of(case.window, *case.image[1:])
    call = given["input"], kernel, given["weight"], geometry, case.groups
    launch.pac_conv2d(*call, False)
    launch.pull(given["cotangent"], *call, True, True)
    launch.weight_gradient(given["cotangent"], *call)


@pytest.mark.parametrize("module", ["dense", "depthwise"])
def test_the_convolution_compiles_for_a_gpu(module, compiler):
    convolve_in_bfloat16(1 if module == "dense" else 4)
    names = [f"{module}.{name}" for name in ("forward", "pull", "weight_gradient")]
    assert list(compiler.made) == names
    for name, ptx in compiler.made.items():
        assert ("mma.sync" in ptx) == (module == "dense"), f"{name}: tensor cores"


def test_the_distance_compiles_for_a_gpu(compiler):
    from pacswap.ops.gpu import distances

    case = CASES["3x3_s2_d2_p2"]
    guidance = case.tensors(torch.float32)["guidance"]
    geometry = Geometry.of(case.window, *case.image[1:])
    made = distances.tap_distance(guidance, None, geometry, "asymmetric", False)
    distances.gradients(made, guidance, None, geometry, "asymmetric", False)
    names = [f"distance.{n}" for n in ("forward", "centre_gradient", "guidance_gradient")]
    assert list(compiler.made) == names


def test_a_program_that_no_gpu_takes_does_not_compile(compiler, monkeypatch):
    from triton.compiler.errors import CompilationError

    from pacswap.ops.gpu import dense

    # Tensor cores take 16 channels at least.
    monkeypatch.setitem(dense.forward.configs[0].kwargs, "BC", 8)
    with pytest.raises(CompilationError):
        convolve_in_bfloat16(1)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
ON_GPU = list(CASES) if torch.cuda.is_available() else ["3x3_p1"]  # one skip, not one for each


def programs() -> list[Any]:
    from pacswap.ops.gpu import dense, depthwise, distance

    modules = (dense, depthwise, distance)
    return [p for module in modules for p in vars(module).values() if hasattr(p, "configs")]


@pytest.fixture
def first_configuration(monkeypatch):
    """Measuring the others would take minutes; what they compute is tested below."""
    for program in programs():
        monkeypatch.setattr(program, "configs", program.configs[:1])


def assert_right(case: Case, dtype: torch.dtype) -> None:
    given = {key: value.cuda() for key, value in case.tensors(dtype).items()}
    truth, baseline = pac(case, wide(given), "reference"), pac(case, given, "reference")
    for quantity, value in pac(case, given, "triton").items():
        if quantity not in ("grad_blend", "grad_bandwidth"):
            factor = 3.0 if quantity.startswith("grad_") else 2.0
            assert_as_good_as(value, truth[quantity], baseline[quantity], factor, name=quantity)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_is_as_good_as_the_reference(name, dtype, first_configuration):
    assert_right(CASES[name], dtype)


MOST = 8  # configurations of a program


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(MOST if torch.cuda.is_available() else 1))
def test_on_a_gpu_every_configuration_is_right(number, dtype, monkeypatch):
    """On more pixels and channels than one block has, and not a multiple of it."""
    from pacswap.ops.gpu import tuning

    assert all(len(program.configs) <= MOST for program in programs())
    for program in programs():
        one = program.configs[min(number, len(program.configs) - 1)]
        if tuning.fits(one, {"BC": 128}, torch.empty(0, dtype=dtype, device="cuda")):
            monkeypatch.setattr(program, "configs", [one])
        else:  # as it would never be chosen
            monkeypatch.setattr(program, "configs", program.configs[:1])
    image = 1, 19, 31
    assert_right(Case(3, stride=2, padding=1, channels=(272, 144), image=image), dtype)
    assert_right(Case(3, padding=1, groups=72, channels=(72, 144), image=image), dtype)
