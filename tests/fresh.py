"""Python programs, each in a process of its own that is forked from one which has imported torch and nothing else.

What an import of torchweld reads (the environment, the processor) is read anew, without the seconds that torch takes.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program as `python -c PROGRAM` would, with these variables in its environment."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {"program": program, "environment": dict(os.environ) | environment, "folder": folder}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        output = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(program, code, *output)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # which closes stdin, and so ends it
    return server


def _serve() -> None:
    import torch  # noqa: F401, PLC0415  (what the programs need not wait for)

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(program: str, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        os.dup2(os.open(os.path.join(folder, path), flags | os.O_CREAT), number)
    code = 1
    try:
        exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
