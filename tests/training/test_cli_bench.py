"""`fastvae bench`: figures for the user's own shapes."""

import re

import pytest
import torch

from fastvae.cli import bench, main

pytest.importorskip("rich", reason="the command line needs the extra [train]")
BRIEF = ["bench", "--seconds", "0.001", "--batch", "4", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "autocast"])
def test_bench_times_the_loss_in_every_storage(dtype, capsys):
    arguments = ["--image", "3", "8", "8", "--latent", "2", "4", "4", "--dtype", dtype, "--loss-only"]
    assert main([*BRIEF, *arguments]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == f"4 images 3x8x8, latents 2x4x4, {dtype}, on cpu (1 thread, CPU time)"
    names = ["eager", "fastvae", "fastvae in place"]
    assert [line.split("  ")[1] for line in lines] == (names[:2] if dtype == "fp16" else names)
    assert all("x (" in line for line in lines[1:])


@pytest.mark.parametrize("image", [["1", "8", "8"], ["30"]], ids=["picture", "vector"])
def test_bench_says_what_share_of_a_step_the_loss_is(image, capsys):
    assert main([*BRIEF, "--image", *image, "--latent", "3"]) == 0
    report = capsys.readouterr().out
    (share,) = re.findall(r"Sampling and loss are (\d+\.\d) % of the step with eager PyTorch", report)
    assert 0 < float(share) < 100
    assert report.count("  fastvae in place") == 2


def test_bench_of_torch_compile(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    assert main([*BRIEF, "--compile", "--loss-only"]) == 0
    assert "  torch.compile" in capsys.readouterr().out
    assert len(compiled) == 2


def test_bench_times_nothing_that_is_wrong(monkeypatch):
    monkeypatch.setattr(bench, "textbook_recon", lambda recon, target: 1.1 * (recon - target).square().sum() / 4)
    with pytest.raises(RuntimeError, match="the losses differ"):
        main([*BRIEF, "--loss-only"])
