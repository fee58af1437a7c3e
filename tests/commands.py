"""The ``edgetrain`` command for tests: each in a process of its own, forked off one that has imported torch already.

What is read when Python starts or torch is imported has to be so from the start: such commands get a new interpreter.
As a script, this file is that process: it reads one request a line, and answers with the exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

_EARLY = ("OMP_", "PYTHON")


def run(
    words: tuple[str, ...], folder: Path, environment: dict[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``edgetrain words`` in ``folder``; ``environment`` is all that it sees.

    Raises:
        TimeoutExpired: it took longer.
    """
    here = os.environ
    if any(environment.get(name) != here.get(name) for name in {*environment, *here} if name.startswith(_EARLY)):
        return subprocess.run(
            [sys.executable, "-m", "edgetrain", *words], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        request = {"words": words, "folder": str(folder), "environment": environment, "out": str(out), "err": str(err)}
        code = _server().ask(request, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(words), timeout)
        return subprocess.CompletedProcess(list(words), code, out.read_text(), err.read_text())


class _Server:
    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], timeout: float) -> int | None:
        """The exit code; ``None``: it was killed as it took longer."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        late = threading.Event()

        def kill() -> None:
            late.set()
            os.kill(child, signal.SIGKILL)

        clock = threading.Timer(timeout, kill)
        clock.start()
        code = int(self._process.stdout.readline())
        clock.cancel()
        return None if late.is_set() else code

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


_servers: dict[int, _Server] = {}


def _server() -> _Server:
    """This process's own, started when it is first needed."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _Server()
    return _servers[os.getpid()]


def _serve() -> None:
    import edgetrain  # noqa: F401, I001 (before torch)
    import torch  # noqa: F401
    from edgetrain.cli import cells, data, doctor, evaluate, fit, main, methods, nets, plan, predict, profile, report  # noqa: F401
    from edgetrain import api  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _carry_out(request, main.main)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _carry_out(request: dict[str, Any], main: Any) -> None:
    for target, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv, sys.path[0], code = ["edgetrain", *request["words"]], request["folder"], 70
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
