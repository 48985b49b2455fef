"""`fastvae doctor`: what is installed, which backend each device gets, and what is wrong."""

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

import fastvae
from fastvae import _backend

HELP = """Show versions, devices, the backend that each gets and why, and what is wrong with the installation.

Exit status 1 if there is something to mend.

Examples:
  fastvae doctor
"""

# import name and distribution of what the extra [train] installs
TRAIN_EXTRA = {"PIL": "pillow"} | {name: name for name in ("matplotlib", "safetensors", "rich")}

SEEDS_NOTE = (
    "fastvae never mixes the rank of a process into a seed: with several processes, give each rank's default generator "
    "a seed of its own, torch.manual_seed(seed + rank), or all draw the same noise"
)


@dataclass(frozen=True)
class Doctor:
    """Options of `fastvae doctor`: none."""


def run(options: Doctor) -> int:
    """Print the report; 1 if something needs mending."""
    print(f"fastvae     {fastvae.__version__} ({fastvae.__path__[0]})")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "numpy"):
        print(f"{name:<11} {_version(name) or 'not installed'}")
    print("\ndevices and their backend:")
    for device, description in _devices():
        print(f"  {device!s:<9} {description}; backend {_backend.explain(device)}")
    print("\nextra [train], for everything but the loss and the sampling:")
    versions = {name: _version(name) for name in TRAIN_EXTRA.values()}
    for name, version in versions.items():
        print(f"  {name:<11} {version or 'not installed'}")
    if None in versions.values():
        print('  install what is missing with: pip install "fastvae-triton[train]"')
    print(f"\nseeds: {SEEDS_NOTE}")
    clash = name_clash()
    print(f"\nname: {clash or 'no other project named fastvae is installed'}")
    return 1 if clash else 0


def name_clash() -> str | None:
    """What to do if PyPI's `fastvae`, another project with the same import name, is installed; None if it is not."""
    version = _version("fastvae")
    if version is None:
        return None
    return (
        f"PROBLEM: the PyPI project fastvae {version} is installed. It is another project, whose files overwrite or "
        "hide those of fastvae-triton. Run: pip uninstall fastvae, then pip install --force-reinstall fastvae-triton"
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[torch.device, str]]:
    devices = [(torch.device("cpu"), f"{torch.get_num_threads()} threads")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            device = torch.device(accelerator.type, index)
            devices.append((device, torch.cuda.get_device_name(index) if device.type == "cuda" else device.type))
    return devices
