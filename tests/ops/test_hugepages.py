"""Huge pages for the gradients that the fallback writes."""

import re
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae.fallback.hugepages import advise_huge_pages

SMAPS = Path("/proc/self/smaps")


def flags_of(tensor):
    """Of the mapping that the tensor's middle lies in."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    flags, inside = [], False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    return flags


@pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
def test_large_gradients_ask_for_huge_pages():
    before = torch.empty(1 << 24)
    assert "hg" not in flags_of(before)
    advise_huge_pages(before)
    assert "hg" in flags_of(before)
    small = torch.empty(1 << 10)
    advise_huge_pages(small)
    assert "hg" not in flags_of(small)


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    advise_huge_pages(torch.empty(1 << 24))
    advise_huge_pages(torch.empty(1 << 24, device="meta"))


@pytest.mark.parametrize("n", [(1 << 23) + 3, 1 << 23])
def test_large_losses_are_right(n):
    """Several pieces, the last one short."""
    recon, target = torch.rand(2, n).requires_grad_(), torch.rand(2, n)
    with fastvae.use_backend("torch"):
        loss = fastvae.reconstruction_loss(recon, target, reduction="sum")
        loss.backward()
    expected = (recon.detach().double() - target.double()).square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=3e-7)
    torch.testing.assert_close(recon.grad, 2 * (recon.detach() - target), rtol=1e-6, atol=0)
