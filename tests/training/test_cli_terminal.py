"""The command line on terminals of several widths, with colours and without, and on a pipe."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.command import TINY

pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")
for package in ("PIL", "matplotlib", "safetensors", "rich"):
    pytest.importorskip(package, reason="the command line needs the extra [train]")

WIDTHS = (20, 80, 200)
STYLES = {
    "colour": {"TERM": "xterm-256color"},
    "NO_COLOR": {"TERM": "xterm-256color", "NO_COLOR": "1"},
    "dumb": {"TERM": "dumb"},
}
COMMANDS = {
    "unknown command": ["trian"],
    "unknown option": ["train", "--epoch", "3"],
    "bad value": ["train", "--epochs", "many"],
    "missing option": ["sample"],
    "mistake": ["sample", "--model", "nowhere"],
    "overview": ["--help"],
    "help": ["train", "--help"],
    "train": ["train", "--epochs", "2", "--log-every", "1", *TINY],
}
MISTAKES = {
    "unknown command": "there is no command 'trian' (did you mean train?). The commands are train, sample, "
    "reconstruct, interpolate, evaluate, report, bench, doctor; `fastvae --help` lists them.",
    "unknown option": "unrecognized arguments: --epoch 3 (did you mean --epochs?). `fastvae train --help` explains the "
    "options.",
    "bad value": "argument --epochs: must be a whole number; got 'many'. `fastvae train --help` explains the options.",
    "missing option": "the following arguments are required: --model. `fastvae sample --help` explains the options.",
    "mistake": "no model: nowhere is not a folder. Pass a run folder, or a folder of save_pretrained.",
}

# one process that imports the command once, and gives each run a terminal of its own
PROGRAM = """
import fcntl, json, os, pty, struct, sys, termios, traceback
from fastvae.cli import main
from fastvae.cli import commands, parsing

found = []
for width, style, arguments in json.load(sys.stdin):
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ.update(style)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        os._exit(status)
    output = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(terminal)
    found.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode()])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Status and output of each command, by command, style and width."""
    folder = tmp_path_factory.mktemp("terminal")
    np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    keys = [(name, style, width) for name in COMMANDS for style in STYLES for width in WIDTHS]
    jobs = []
    for name, style, width in keys:
        data = ["--data", "noise.npy", "--out", f"run-{style}-{width}"] if name == "train" else []
        jobs.append((width, STYLES[style], COMMANDS[name] + data))
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(jobs), capture_output=True, text=True, check=True, cwd=folder
    )
    return dict(zip(keys, json.loads(process.stdout), strict=True))


@pytest.fixture(params=WIDTHS)
def width(request):
    return request.param


@pytest.fixture(params=STYLES)
def style(request):
    return request.param


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_plain_line_at_any_width(shown, name, style, width):
    assert shown[name, style, width] == [2, f"fastvae: error: {MISTAKES[name]}\r\n"]


@pytest.mark.parametrize("name", ["overview", "help"])
def test_help_fits_the_terminal(shown, name, style, width):
    status, text = shown[name, style, width]
    assert status == 0
    if style == "colour":  # argparse has colours from Python 3.14 on
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert {letter for letter in text if not letter.isprintable()} == {"\r", "\n"}
    unwrapped = ("  --", "  fastvae ", "usage: ") if width < 80 else ("  --",)  # commands can be copied
    for line in text.splitlines():
        assert len(line) <= width or len(line.split()) <= 2 or line.startswith(unwrapped), line
    needed = ["train", "doctor"] if name == "overview" else ["--learning-rate", "--beta-zero-ratio", "Examples:"]
    assert all(word in text for word in needed)


def test_training_shows_its_progress_and_its_results(shown, style, width):
    status, text = shown["train", style, width]
    assert status == 0, text
    assert "Traceback" not in text
    assert f"next: fastvae sample --model run-{style}-{width}\r\n" in text
    colours = re.findall(r"\x1b\[[0-9;]*(?:3\d|4\d|9\d)[0-9;]*m", text)
    assert bool(colours) == (style == "colour")
    assert ("\x1b" in text) == (style != "dumb")


@pytest.mark.parametrize("name", ["unknown option", "train"])
def test_pipe_gets_plain_text(name, tmp_path):
    np.save(tmp_path / "noise.npy", np.zeros((40, 8, 8), np.uint8))
    data = ["--data", "noise.npy", "--out", "run"] if name == "train" else []
    program = "import sys; from fastvae.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *COMMANDS[name], *data]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "\x1b" not in process.stdout + process.stderr
    assert process.stderr == (f"fastvae: error: {MISTAKES[name]}\n" if name in MISTAKES else "")
    assert ("next: fastvae sample --model run" in process.stdout) == (name == "train")


HANG_UP = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    program = "import sys; from fastvae.cli import main; sys.exit(main())"
    os.execv(sys.executable, [sys.executable, "-c", program, *sys.argv[1:]])
output = b""
while b" KL, " not in output:  # the line of a step
    output += os.read(terminal, 4096)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.usefixtures("hangups_not_ignored")
def test_terminal_that_is_closed_leaves_a_checkpoint(tmp_path):
    np.save(tmp_path / "noise.npy", np.zeros((40, 8, 8), np.uint8))
    arguments = ["train", "--data", "noise.npy", "--out", "run", "--epochs", "100000", "--log-every", "1", *TINY]
    command = [sys.executable, "-c", HANG_UP, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60)
    assert process.stdout == "129\n"  # 128 + SIGHUP
    assert process.stderr == ""
    assert (tmp_path / "run" / "checkpoint.pt").exists()
