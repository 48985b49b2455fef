"""The README's Python runs as it stands there, in one session from top to bottom."""

import re
from pathlib import Path

from fastvae.presets import PRESETS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_every_preset_has_its_row():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    for preset in PRESETS:
        assert any(f'VAELoss.preset("{preset}"' in row for row in rows), preset
