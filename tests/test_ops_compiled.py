"""Compiled loops on the disk: kept, and not used once what they were compiled from has changed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from numba.core.caching import CompileResultCacheImpl

from pacswap.ops.loops import threads

CALLER = """
from pacswap.ops.loops import threads
from callee import factor

@threads.compiled
def times(x):
    return factor() * x
"""
CALLEE = """
from pacswap.ops.loops import threads

@threads.compiled
def factor():
    return {}
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes the callee, and imports the caller anew."""
    (tmp_path / "caller.py").write_text(CALLER, encoding="utf-8")

    def write(factor: int) -> ModuleType:
        (tmp_path / "callee.py").write_text(CALLEE.format(factor), encoding="utf-8")
        monkeypatch.setattr(threads, "_SOURCES", f"sources of {factor}")
        for name in ("callee", "caller"):
            file = tmp_path / f"{name}.py"
            module = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            # Not imported: Python takes two files of one size and second for the same.
            exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
        return module

    return write


def test_what_is_kept_is_used_again(written):
    assert written(2).times(10) == 20
    module = written(2)
    assert module.times(10) == 20
    assert sum(module.times.stats.cache_hits.values()) == 1


def test_what_calls_changed_code_is_compiled_again(written):
    """The file of the caller itself is the same."""
    assert written(2).times(10) == 20
    module = written(3)
    assert module.times(10) == 30
    assert not module.times.stats.cache_hits


def test_without_the_fingerprint_the_old_code_is_taken(written, monkeypatch):
    """The twin: numba alone looks at one file."""
    monkeypatch.setattr(threads, "_Cache", threads.FunctionCache)
    assert written(2).times(10) == 20
    assert written(3).times(10) == 20


def test_old_code_is_written_over(written, tmp_path):
    for factor in (2, 3, 4):
        assert written(factor).times(10) == 10 * factor
    kept = sorted(file.name for file in tmp_path.rglob("*.nbc"))
    assert [name.split("-")[0] for name in kept] == ["callee.factor", "caller.times"]


def test_the_fingerprint_is_that_of_all_files(tmp_path):
    for name in ("threads.py", "vectors.py"):
        (tmp_path / name).write_text("a = 1\n", encoding="utf-8")
    before = threads._fingerprint(tmp_path)
    (tmp_path / "vectors.py").write_text("a = 2\n", encoding="utf-8")
    assert threads._fingerprint(tmp_path) != before
    assert threads._fingerprint(Path(threads.__file__).parent) == threads._SOURCES


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch):
    """Neither beside the file nor in the user's home."""
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    made = threads.compiled(lambda x: x + 1)
    assert made(2) == 3 and not made.stats.cache_path


def test_the_loops_themselves_are_kept_so():
    from pacswap.ops.loops import machine_distance

    assert isinstance(machine_distance.distances._cache, threads._Cache)
    assert Path(machine_distance.distances.stats.cache_path).is_dir()
