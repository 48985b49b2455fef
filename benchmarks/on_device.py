"""pytest plugin: run device-independent tests on a GPU, split among several processes."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tensor-device", default="cpu", help="of tensors that name no device")
    parser.addoption("--shard", default="1/1", help="2/6: every sixth test from the second on")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_device(config.getoption("tensor_device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, of = map(int, config.getoption("shard").split("/"))
    items[:] = items[number - 1 :: of]
