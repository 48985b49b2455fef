"""Which modules may import which, what the wheel contains, and what importing fastvae needs."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"fastvae": ROOT / "fastvae", "fastvae_kernels": ROOT / "kernels/fastvae_kernels"}

# a package or module may import those on lower lines; those on one line do not import each other
LAYERS = [
    {"__main__"},
    {"cli"},
    {"training", "integrations"},
    {"evaluation"},
    {"models", "data", "loss", "distributions", "iwae", "capture"},
    {"nn"},
    {"functional", "statistics", "input_checks", "norms"},
    {"_count_terms"},
    {"_batch_terms", "sampling", "presets"},
    {"ops"},
    {"likelihoods", "regularizers", "schedules", "parametrizations", "noise_state"},
    {"fallback", "fastvae_kernels"},
    {"_seeds", "likelihood_counts"},
    {"reference", "reference_counts", "reference_norms", "_checks", "_backend", "_distributed", "_files", "_modules"},
    {"_elementwise", "_argument_checks"},
    {"_custom"},
    {"_likelihood_base"},
    {"_strides", "_dtypes", "_numbers", "_graphs"},
    {"types"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    """fastvae.ops.elbo -> ops; fastvae_kernels.elbo -> fastvae_kernels."""
    parts = module.split(".")
    if parts[0] == "fastvae_kernels" and parts[1:2] in (["types"], ["count_types"]):
        return "types"  # the tuples that ops and backends exchange
    return parts[0] if parts[0] == "fastvae_kernels" else (parts[1] if len(parts) > 1 else "fastvae")


def imports():
    """(file, importing module, imported module), from every import statement, lazy ones included."""
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            base = module if parts[-1] == "__init__" else module.rpartition(".")[0]
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    targets = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    if node.level:
                        parents = base.split(".")[: len(base.split(".")) - node.level + 1]
                        source = ".".join([*parents, *([node.module] if node.module else [])])
                    else:
                        source = node.module
                    names = [f"{source}.{alias.name}" for alias in node.names]
                    targets = names if source in PACKAGES else [source]
                else:
                    continue
                yield from ((file, module, t) for t in targets if t.split(".")[0] in PACKAGES)


def test_imports_go_to_lower_layers_only():
    seen = list(imports())
    assert len(seen) > 30
    wrong = []
    for file, source, target in seen:
        a, b = layer_of(source), layer_of(target)
        if a in ("fastvae", b):  # fastvae/__init__.py; modules of one package
            continue
        public = (
            source.startswith("fastvae.") and b not in LEVEL and LEVEL[a] <= LEVEL["loss"]
        )  # `import fastvae` above
        if not public and not LEVEL.get(a, 99) < LEVEL.get(b, -1):
            wrong.append(f"{file.relative_to(ROOT)}: {source} -> {target}")
    assert not wrong


def test_kernels_never_import_fastvae_and_no_op_imports_another():
    for file, source, target in imports():
        assert not (source.startswith("fastvae_kernels") and target.split(".")[0] == "fastvae"), file
        if source.startswith("fastvae.ops.") and target.startswith("fastvae.ops."):
            assert target.split(".")[2].startswith("_"), f"{file} imports {target}: only what ops share may be imported"


def test_kernels_is_a_folder_and_not_a_package():
    """PyPI's `kernels` owns that name: with an __init__.py here it could not be imported from a checkout."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_wheel_holds_the_two_packages(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastvae", "fastvae_kernels"}
    for needed in (
        "fastvae/py.typed",
        "fastvae_kernels/py.typed",
        "fastvae/data/fashion_mnist.npz",
        "fastvae/evaluation/report.html",
    ):
        assert needed in names
    assert any(name.endswith("fashion_mnist.LICENSE") for name in names)


def test_import_and_train_step_without_triton():
    """Neither `import fastvae` nor the fallback touches Triton."""
    script = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, fastvae
mu = torch.zeros(2, 3, requires_grad=True)
z, kl = fastvae.reparameterize_kl(mu, mu, seed=1)
fastvae.VAELoss()(z, torch.zeros(2, 3), kl=kl).backward()
assert mu.grad is not None
assert {m for m in sys.modules if m.startswith("fastvae_kernels.")} == {
    "fastvae_kernels.types", "fastvae_kernels.count_types"}
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_package_shows_its_public_names_only():
    script = """
import sys, fastvae
assert sorted(dir(fastvae)) == sorted([*fastvae.__all__, "__version__"])
modules = {"fastvae.data", "fastvae.evaluation", "fastvae.models", "fastvae.training"}
assert not modules & set(sys.modules)
assert all(hasattr(fastvae, name) for name in fastvae.__all__)
assert modules <= set(sys.modules)
assert not hasattr(fastvae, "no_such_name")
from fastvae import *
assert VAELoss and models.VAE and data.load
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_importing_fastvae_imports_no_kernels_and_no_extras():
    script = """
import sys, fastvae
heavy = {"fastvae_kernels.elbo", "triton.language", "matplotlib", "PIL", "safetensors", "rich"}
heavy &= set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy - {"triton.language"} else 0)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
