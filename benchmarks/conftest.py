"""Options of `pytest benchmarks`, and its parameters: every case with every provider."""

import pytest
import torch

from .cases import SCALES, suite
from .providers import skip_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILER = ("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")  # provokes these itself


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=SCALES, default="default", help="which of fastvae's benchmarks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        disabled = metafunc.config.getoption("benchmark_disable")
        cases = suite("tiny" if disabled else metafunc.config.getoption("scale"), DEVICE)
        pairs = [
            pytest.param(c, p, id=f"{c.name}-{p}".replace(" ", "-"), marks=marks(p)) for c in cases for p in c.providers
        ]
        metafunc.parametrize(("case", "provider"), pairs)


def marks(provider: str) -> list[pytest.MarkDecorator]:
    reason = skip_reason(provider, DEVICE)
    return [pytest.mark.filterwarnings(*COMPILER), *([pytest.mark.skip(reason=reason)] if reason else [])]
