"""The documentation: examples run, commands exist, links resolve, figures are those of the results."""

import importlib.util
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fastvae.cli.commands import COMMANDS
from fastvae.cli.parsing import parse
from fastvae.data import load
from fastvae.models import VAE, VAEConfig
from fastvae.presets import COUNT_PRESETS, PRESETS
from fastvae.training import TrainConfig, train

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
BLOCK = re.compile(r"^```(.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATTERNS = "| pattern |"  # head of the table whose cells are compared
pages = pytest.mark.parametrize("page", PAGES)


def blocks(page, language):
    return [text for name, text in BLOCK.findall(PAGES[page]) if name == language]


def prose(page):
    return BLOCK.sub("", PAGES[page])


def table(page, head):
    """The cells of the rows of the table that begins like this."""
    lines = PAGES[page].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("`") for cell in line.strip("| ").split(" | ")])
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that holds what the examples read."""
    folder = tmp_path_factory.mktemp("docs")
    subset = torch.utils.data.Subset(load("fashion-mnist"), range(64))
    config = TrainConfig(out=folder / "runs" / "first", backbone="mlp", hidden=8, batch_size=16, epochs=1, device="cpu")
    train(config, dataset=subset)
    sizes = {"width": 8, "width_multipliers": (1, 1), "blocks": 1, "mid_attention": False}
    vae = VAE(VAEConfig(image_size=(64, 64), channels=3, backbone="autoencoder_kl", **sizes))
    vae.save_diffusers(folder / "sd-vae", scaling_factor=1.0)
    shutil.copytree(ROOT / "tests" / "data", folder / "tests" / "data")
    return folder


@pytest.fixture
def in_folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def leaves(session):
    """Tensors of the session that want a gradient, those of its modules among them."""
    found = [value for value in session.values() if isinstance(value, torch.Tensor) and value.is_leaf]
    for value in session.values():
        found += list(value.parameters()) if isinstance(value, torch.nn.Module) else []
    return [tensor for tensor in found if tensor.requires_grad]


def assert_same_loss(theirs, ours, session):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    inputs = leaves(session)
    wanted, found = (torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in (theirs, ours))
    assert any(gradient is not None for gradient in wanted)
    for gradient, reference in zip(found, wanted, strict=True):
        if reference is None:
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pages
def test_examples_run(page, in_folder, capsys):
    """In one session from top to bottom. Where a block has both, `textbook` and `loss` are the same."""
    session = {}
    for text in blocks(page, "python"):
        exec(compile(text, page, "exec"), session)
        if "textbook" in session:
            assert_same_loss(session.pop("textbook"), session["loss"], session)


@pages
def test_no_example_is_left_out(page):
    known = {"", "bash", "diff", "text", "python", *(f"python {name}" for name in TRAINERS)}
    assert {name for name, _ in BLOCK.findall(PAGES[page])} <= known


def test_patterns_are_the_same_number():
    session = {}
    for text in blocks("docs/losses.md", "python"):
        exec(compile(text, "losses.md", "exec"), session)
        if "betas = " in text:
            break
    rows = table("docs/losses.md", PATTERNS)
    assert len(rows) >= 8
    for _, theirs, ours in rows:
        assert_same_loss(eval(theirs, session), eval(ours, session), session)


TRAINERS = ["plain", "captured", "lightning", "accelerate", "diffusers"]


def loss_of(name, session):
    if name == "lightning":
        return session["module"].trainer.callback_metrics["loss"]
    return session["terms"].loss if name == "captured" else session["loss"]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.filterwarnings("ignore")  # what the other libraries warn of among themselves
def test_trainers_learn(name, monkeypatch, tmp_path):
    if name not in ("plain", "captured"):
        pytest.importorskip(name, reason=f"this example needs {name}, of the extra [test]", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/training.md", f"python {name}")
    torch.manual_seed(0)
    session, before = {}, {}
    # the same, stopped after its first batch
    first = re.sub(r"range\(\d+\)", "range(1)", re.sub(r"max_steps=\d+", "max_steps=1", block))
    assert first != block
    for text, found in ((first, before), (block, session)):
        exec(compile(text, "training.md", "exec"), found)
    assert list(tmp_path.iterdir()) == []
    assert 0 < loss_of(name, session) < 0.9 * loss_of(name, before)


def test_the_table_of_a_run_names_every_file(trained):
    rows = table("docs/training.md", "| file |")
    named = {name.rstrip("/") for files, _ in rows for name in re.findall(r"[\w./]+", files)}
    assert named == {path.name for path in (trained / "runs" / "first").iterdir()}


def flags(command):
    names = [field.name.replace("_", "-") for field in fields(COMMANDS[command].options)]
    return {f"--{prefix}{name}" for name in names for prefix in ("", "no-")}


def check_command(line, *, whole):
    """Raise if a command does not exist. Without `whole`, arguments that a run would need may be missing."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # environment
        words.pop(0)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    match words:
        case ["make", target, *variables]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
            assert all(re.search(rf"^{v.split('=')[0]} \?=", makefile, re.MULTILINE) for v in variables), line
        case ["fastvae", *arguments] if whole:
            parse(arguments)
        case ["fastvae", command, *arguments]:
            if command != "COMMAND":
                assert {word for word in arguments if word.startswith("--")} <= flags(command), line
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), line
        case ["pytest", *arguments]:
            paths = [word for word in arguments if word.startswith(("tests", "benchmarks")) and "results" not in word]
            assert all((ROOT / path).exists() for path in paths), line
        case ["pip", "install", package]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"[a-z]+", package.partition("[")[2])) <= extras.keys(), line
        case _:
            raise AssertionError(f"a command that nobody checks: {line}")


@pages
def test_commands_exist(page, in_folder):
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            check_command(line, whole=True)
    for span in re.findall(r"`([^`]+)`", prose(page)):
        if re.match(r"(make|fastvae|python|pytest|pip|torchrun) [a-z-]", span) and "..." not in span:
            check_command(span, whole=False)


@pages
def test_flags_exist(page):
    benchmarks = (ROOT / "benchmarks" / "conftest.py").read_text()
    known = set().union(*map(flags, COMMANDS)) | set(re.findall(r'"(--[a-z-]+)"', benchmarks))
    for span in re.findall(r"`(--[^`]+)`", prose(page)):
        assert span.split()[0] in known, span


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pages
def test_links_and_paths_resolve(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link
    for path in re.findall(r"`((?:benchmarks|docs|fastvae|kernels|tests)/[\w./]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 160


def test_pictures_are_small():
    for path in (ROOT / "docs" / "images").glob("*.png"):
        assert path.stat().st_size < 150_000, path.name


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    lines = [line for line in PAGES["README.md"].splitlines() if re.match(r"\| (loss|step) ", line)]
    assert len(lines) == 5
    assert set(lines) <= set(PAGES["docs/benchmarks.md"].splitlines())


def test_every_preset_has_its_row():
    rows = [line for line in PAGES["docs/losses.md"].splitlines() if line.startswith("|")]
    for preset in [*PRESETS, *COUNT_PRESETS]:
        assert any(f'VAELoss.preset("{preset}"' in row for row in rows), preset


def test_docstrings_become_pages(tmp_path):
    pdoc = pytest.importorskip("pdoc", reason="pages of the API need pdoc, of the extra [docs]")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("fastvae.functional", output_directory=tmp_path)
    assert "negative evidence lower bound" in (tmp_path / "fastvae" / "functional.html").read_text()
