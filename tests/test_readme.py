"""The README's Python runs as it stands there, in one session from top to bottom."""

import re
from pathlib import Path

import pytest
import torch

from fastvae.presets import PRESETS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def loss_of(name, session):
    if name == "lightning":
        return session["module"].trainer.callback_metrics["loss"]
    return session["loss"]


@pytest.mark.parametrize("name", ["plain", "lightning", "accelerate", "diffusers"])
@pytest.mark.filterwarnings("ignore")  # what the other libraries warn of among themselves
def test_trainers_learn(name, monkeypatch, tmp_path):
    if name != "plain":
        pytest.importorskip(name, reason=f"this example needs {name}, of the extra [test]", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(rf"```python {name}\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    session, before = {}, {}
    # the same, stopped after its first batch
    first = re.sub(r"range\(\d+\)", "range(1)", re.sub(r"max_steps=\d+", "max_steps=1", block))
    assert first != block
    for text, found in ((first, before), (block, session)):
        exec(compile(text, "README.md", "exec"), found)
    assert list(tmp_path.iterdir()) == []
    assert 0 < loss_of(name, session) < 0.9 * loss_of(name, before)


def test_every_preset_has_its_row():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    for preset in PRESETS:
        assert any(f'VAELoss.preset("{preset}"' in row for row in rows), preset
