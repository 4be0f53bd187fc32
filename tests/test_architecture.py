"""What the code base promises about itself: which room may use which, how large, how light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

import pacswap

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pacswap"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60  # its docstring not counted

# From the ground up: a room may import those named beside it, which all stand above it.
MAY_IMPORT = {
    "errors": set(),
    "shipped": set(),
    "fingerprint": set(),
    "scenes": {"errors"},
    "ops": {"errors"},
    "nn": {"ops", "errors"},
    "surgery": {"nn", "ops", "scenes", "fingerprint", "errors"},
    "zoo": {"scenes", "shipped", "errors"},
    "viz": {"zoo", "surgery", "ops", "errors"},
    "pacnet": {"nn", "zoo", "errors"},
    "recipes": {"surgery", "shipped", "errors"},
    "export": {"surgery", "errors"},
    "checkpoint": {"pacnet", "recipes", "zoo", "surgery", "fingerprint", "errors"},
    "hub": {"checkpoint", "recipes", "surgery", "errors"},
    "report": {"surgery", "errors"},
    "upgrade": {"checkpoint", "report", "recipes", "zoo", "surgery", "errors"},
    "train": {
        "upgrade",
        "checkpoint",
        "report",
        "recipes",
        "zoo",
        "surgery",
        "nn",
        "scenes",
        "errors",
    },
    "cli": {
        "export",
        "checkpoint",
        "train",
        "viz",
        "upgrade",
        "report",
        "recipes",
        "zoo",
        "surgery",
        "errors",
    },
    "__main__": {"cli"},
    # `import pacswap` itself; checkpoint, hub and upgrade only when they are first asked for.
    "__init__": {"surgery", "nn", "ops", "errors", "checkpoint", "hub", "upgrade"},
}

PUBLIC = {
    "pacswap": """Group GuidanceSpec KernelSpec LayerQuery Plan Verification __version__ apply
        disabled errors hub layers load nn ops plan revert rewrite save swap verify""",
    "pacswap.hub": """HubModel""",
    "pacswap.nn": """AdaptingKernel Adaptive Guidance JointBilateralUpsample JointUpsample
        KernelOptions PacCRF PacConv1d PacConv2d PacConv3d PacConvTranspose2d PacFilter2d PacPool2d
        PairwiseKernel PairwiseTerm TransposedKernel reduced resize_guidance size_of
        to_sequence why_not_project""",
    "pacswap.ops": """AnyWindow SequenceWindow Task VolumeWindow Window adapting_kernel
        attach_kernel_gradient blended compute_dtype convolve
        explain guidance_window insert_zeros inserted_mask make_sequence_window
        make_volume_window make_window masked output_mask
        pac_conv1d pac_conv2d pac_conv3d pac_conv_transpose2d pac_pool2d smoothing_filter
        standardized tap_distance transposed_window turned valid_taps""",
    "pacswap.viz": """adaptation_map guidance_image heat_image kernel_images look_into show""",
    "pacswap.zoo": """Source bare build has_trained_head identify input_size load_weights_file
        model_names normalization read_state_dict why_not_twin""",
    "pacswap.surgery": """Check Group GuidanceSpec KernelSpec LayerInfo LayerQuery Plan Verification
        calibrate carry_out default_input disabled layers pac_layers plan plan_groups plan_of
        revert rewrite swap verify""",
}

HEAVY = ("triton", "timm", "pydantic", "typer", "rich", "torchvision", "safetensors", "yaml", "PIL")
HEAVY += ("huggingface_hub",)


class Import(NamedTuple):
    """A module that a file imports, at its top, in a function, or by `import_module`."""

    name: str
    line: int


def imports(source: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (Import(f"{origin}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "_import_module", "__import__"):
                yield Import(str(node.args[0].value), node.lineno)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_ways(room: str, source: str, file: str) -> list[str]:
    """Imports of a file that go up, sideways or nowhere."""
    found = []
    for name, line in imports(source):
        first, _, rest = name.partition(".")
        if first == "":
            found.append(f"{file}:{line}: a relative import. Spell it out.")
        if first == "pacswap":
            wanted = rest.partition(".")[0]
            if wanted != room and wanted not in MAY_IMPORT[room]:
                found.append(f"{file}:{line}: {room} imports {wanted or 'pacswap itself'}")
    return found


# What the libraries have beside models, and training may use.
TOOLS = {
    "timm": ("optim", "scheduler", "layers"),
    "torchvision": ("transforms", "datasets", "tv_tensors"),
}


def forbidden_libraries(room: str, source: str, file: str) -> list[str]:
    """Imports of the libraries' models outside the zoo."""
    found = []
    for name, line in imports(source):
        first, _, rest = name.partition(".")
        if room != "zoo" and first in TOOLS and rest.partition(".")[0] not in TOOLS[first]:
            found.append(f"{file}:{line}: {room} imports {name}")
    return found


def test_the_table_goes_one_way():
    above: set[str] = set()
    for name, wanted in MAY_IMPORT.items():
        assert wanted <= above, f"{name} imports what stands below it: {wanted - above}"
        above.add(name)


def test_every_room_is_in_the_table():
    assert {room(path) for path in FILES} == set(MAY_IMPORT)


def found_by(look: Callable[[str, str, str], list[str]]) -> list[str]:
    """What a function of a room, a source and a file's name finds in all files."""
    return [
        said
        for path in FILES
        for said in look(room(path), path.read_text("utf-8"), str(path.relative_to(ROOT)))
    ]


def test_imports_go_one_way():
    assert found_by(wrong_ways) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from pacswap.surgery import plan", "f.py:1: ops imports surgery"),
        ("def f():\n    import pacswap.nn.conv", "f.py:2: ops imports nn"),
        ("from pacswap import swap", "f.py:1: ops imports swap"),
        ("import pacswap", "f.py:1: ops imports pacswap itself"),
        ("from ..nn import PacConv2d", "f.py:1: a relative import. Spell it out."),
        ("importlib.import_module('pacswap.cli')", "f.py:1: ops imports cli"),
    ],
    ids=["from", "in a function", "the root's name", "the root", "relative", "by name"],
)
def test_a_wrong_way_is_seen(source, message):
    assert wrong_ways("ops", source, "f.py") == [message]


def test_only_the_zoo_imports_model_libraries():
    assert found_by(forbidden_libraries) == []


@pytest.mark.parametrize(
    "source",
    [
        "import timm",
        "from torchvision import models",
        "import torchvision",
        "import_module('timm')",
    ],
)
def test_a_model_library_is_seen(source):
    assert len(forbidden_libraries("surgery", source, "f.py")) == 1
    assert forbidden_libraries("zoo", source, "f.py") == []


@pytest.fixture(scope="module")
def lean() -> list[list[str]]:
    """What a fresh process has loaded: after `import pacswap`, and after `pacswap.apply`."""
    code = (
        "import sys, torch, pacswap\n"
        f"def loaded(): return [n for n in {HEAVY!r} if n in sys.modules]\n"
        "print(*loaded(), 'cuda' if torch.cuda.is_initialized() else '')\n"
        "pacswap.apply\n"
        "print(*loaded())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [line.split() for line in run.stdout.splitlines()]


def test_the_import_is_lean(lean):
    assert lean[0] == []


def test_the_import_test_sees_what_is_loaded(lean):
    assert {"pydantic", "yaml"} <= set(lean[1])


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    assert sorted(importlib.import_module(module).__all__) == sorted(PUBLIC[module].split())


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist(module):
    home = importlib.import_module(module)
    assert [name for name in home.__all__ if not hasattr(home, name)] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError) as raised:
        _ = pacswap.swop
    assert str(raised.value) == "module 'pacswap' has no attribute 'swop'"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_all_modules_are_importable(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if "gpu" in parts and parts[-1] not in ("__init__", "refusal", "geometry"):
        pytest.importorskip("triton", reason="triton is not installed: Linux only")
    if parts[-1] != "__main__":  # which is the command itself
        importlib.import_module(".".join(part for part in parts if part != "__init__"))


def test_files_are_short():
    paths = [*FILES, *Path(__file__).parent.glob("*.py")]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def long_functions(_: str, source: str, file: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > MOST_LINES_OF_A_FUNCTION:
            found.append(f"{file}:{node.lineno}: {node.name} has {lines} lines")
    return found


def test_functions_are_short():
    assert found_by(long_functions) == []


def test_a_long_function_is_seen():
    body = "    x = 1\n" * MOST_LINES_OF_A_FUNCTION
    assert long_functions("ops", f"def f():\n{body}", "f.py") == ["f.py:1: f has 61 lines"]
    words = "    Words.\n" * 99
    documented = f'def f():\n    """Long.\n\n{words}    """\n{body[10:]}'
    assert long_functions("ops", documented, "f.py") == []


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_has_one_source():
    assert pacswap.__version__ == version("pacswap")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{pacswap.__version__}"\n' in pyproject
