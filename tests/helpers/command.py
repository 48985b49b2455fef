"""The command `fastvae` in tests: in this process, and in one of its own."""

import os
import subprocess
import sys
from typing import Any

from fastvae.cli import main

TINY = ["--backbone", "mlp", "--hidden", "8", "--latent-dim", "3", "--batch-size", "8", "--device", "cpu"]
MAIN = "import sys; from fastvae.cli import main; sys.exit(main())"


def error_of(capsys: Any, *arguments: str, status: int = 2) -> str:
    """The one line that `fastvae ARGUMENTS` prints on stderr before it exits with `status`."""
    capsys.readouterr()
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("fastvae: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return str(captured.err)


def fastvae(
    *arguments: Any,
    code: str = MAIN,
    environment: dict[str, str] | None = None,
    shell: str | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start the command in a process; `shell` gets it as "$@"."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if shell is not None:
        command = ["bash", "-c", shell, "bash", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, env=os.environ | (environment or {}), **pipes)
