"""pytest plugin: run device-independent tests on a GPU, split among several processes.

Tensors that name no device are made on `--tensor-device`; `--shard 2/6` runs every sixth test from the second on.
"""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tensor-device", default="cpu", help="default device of new tensors")
    parser.addoption("--shard", default="1/1", help="part of the tests to run: number/of")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_device(config.getoption("tensor_device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, of = map(int, config.getoption("shard").split("/"))
    items[:] = items[number - 1 :: of]
