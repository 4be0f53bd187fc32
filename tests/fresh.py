"""Processes of their own for the price of a fork: what they need of others is imported once.

A process takes seconds to import torch and timm. Here one that has imported them, and nothing of
ours, makes each of the others by a fork. Where what matters is how these are imported, tests start
an interpreter of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from typing import IO, Any


class Process:
    """A process that was started, with what tests use of `subprocess.Popen`."""

    def __init__(self, line: socket.socket, streams: tuple[IO[str], IO[str]]) -> None:
        self._line, self._streams = line, streams
        self.pid = int(line.recv(99))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended, or None while it runs."""
        return self._ended(socket.MSG_DONTWAIT)

    def wait(self) -> int | None:
        return self._ended(0)

    def _ended(self, flags: int) -> int | None:
        if self.returncode is None:
            try:
                self.returncode = int(self._line.recv(99, flags))
                self._line.close()
            except BlockingIOError:
                return None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """What it printed, when it has ended."""
        self.wait()
        printed = []
        for stream in self._streams:
            stream.seek(0)
            printed.append(stream.read())
            stream.close()
        return printed[0], printed[1]


def start(*arguments: str, stdout: Any = None, **environment: str) -> Process:
    """Start Python with these arguments here: `-c CODE`, `-m MODULE` or a script, and its own.

    Args:
        arguments: as for the interpreter; `-I` before them leaves out the paths of ours.
        stdout: an open file instead of one that `communicate` reads.
        environment: variables that differ from those of this process.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    asked = {"arguments": arguments, "environment": variables, "folder": os.getcwd()}  # noqa: PTH109
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    streams = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
    handles = [theirs.fileno(), (stdout or streams[0]).fileno(), streams[1].fileno()]
    socket.send_fds(_server(), [json.dumps(asked).encode()], handles)
    theirs.close()
    return Process(ours, streams)


def run(*arguments: str, stdout: Any = None, **environment: str) -> Any:
    """Start Python as `start` does and wait for its end; as `subprocess.run` returns it."""
    process = start(*arguments, stdout=stdout, **environment)
    printed = process.communicate()
    return subprocess.CompletedProcess(arguments, process.wait(), *printed)


def run_pair(*arguments: str) -> None:
    """Run Python in two processes that meet on a free port, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [start(*arguments, **meeting, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    try:
        for process in both:
            printed = process.communicate()
            assert process.returncode == 0, printed
    finally:
        for process in both:
            process.kill()


@functools.cache
def _server() -> socket.socket:
    """The way to the process that forks; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", __file__, str(theirs.fileno())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


# ---- in the server


def serve(way: socket.socket) -> dict[str, Any]:
    """Fork for each request; only a fork returns, with what it is asked to run."""
    while True:
        asked, handles, _, _ = socket.recv_fds(way, 1 << 20, 3)
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG if asked else 0)[0]:
                pass
        if not asked:
            os._exit(0)
        if os.fork() == 0:
            way.close()
            child = os.fork()
            if child == 0:
                for number, handle in enumerate(handles[1:], 1):
                    os.dup2(handle, number)
                for handle in handles:
                    os.close(handle)
                return json.loads(asked)
            with socket.socket(fileno=handles[0]) as line:
                line.send(str(child).encode())
                _, status = os.waitpid(child, 0)
                line.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        for handle in handles:
            os.close(handle)


def become(arguments: list[str], environment: Mapping[str, str], folder: str) -> None:
    """Do what the interpreter does with its arguments."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # Those of the server know of its own files whether one can seek in them.
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    path = environment.get("PYTHONPATH", "")
    if arguments[0] == "-I":
        arguments = arguments[1:]
    else:
        script = arguments[0]
        first = os.path.dirname(os.path.abspath(script)) if script[0] != "-" else folder  # noqa: PTH100, PTH120
        sys.path[:0] = [first, *path.split(os.pathsep)] if path else [first]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    import torchvision  # noqa: F401

    become(**serve(socket.socket(fileno=int(sys.argv[1]))))
