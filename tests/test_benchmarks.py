"""The benchmarks themselves, without a look at their times, and what torch.compile would move on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as runner
import fastvae
from benchmarks import comparison, results
from benchmarks.cases import BACKWARD, LOSS, LOSSES, PHASES, SCALES, TINY, OpCase, Trial, suite
from benchmarks.memory import peak_mib
from benchmarks.precision import AUTOCAST, BF16, BYTES, FP32
from benchmarks.providers import COMPILED, EAGER, FALLBACK, IN_PLACE, KERNELS, function_of, on_backend, skip_reason
from benchmarks.results import Results
from benchmarks.train_step import check_step
from benchmarks.truth import WrongResult
from tests.helpers import inductor

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def _as_users_have_it(monkeypatch):
    """The tests' own poison in new tensors moves bytes, too."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(inductor.skip_reason() is not None, reason=str(inductor.skip_reason()))
@pytest.mark.usefixtures("_as_users_have_it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("op", "precision", "theirs", "ours"),
    [("recon", FP32, 20, 12), ("recon", AUTOCAST, 14, 8), ("sample", FP32, 40, 32)],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes_of_torch_compile_on_a_gpu(op, precision, theirs, ours):
    """What the documentation says of both, per element of the image or latent, forward and backward."""
    from tests.helpers.peers_report import SHAPE, cost

    case = OpCase(op, SHAPE, precision, BACKWARD)
    assert cost(case, COMPILED).bytes_per_element == pytest.approx(theirs, rel=0.01)
    assert cost(case, KERNELS).bytes_per_element == pytest.approx(ours, rel=0.01)


def wrong_results(op, precision, function):
    """Of each output and gradient in turn, one element is moved by a fifth: how many of them the check notices."""
    trial = Trial(OpCase(op, TINY, precision, BACKWARD), CPU)
    outputs, gradients = trial.caller(function)(0)
    trial.check((outputs, gradients))
    right = [t.detach().clone() for t in (*outputs, *gradients)]
    noticed = 0
    for i, tensor in enumerate(right):
        moved = [t.clone() for t in right]
        moved[i].view(-1)[-1] += 0.2 * tensor.abs().max() + 0.1
        with pytest.raises(WrongResult):
            trial.check((moved[: len(outputs)], moved[len(outputs) :]))
        noticed += 1
    return noticed


@pytest.mark.parametrize("op", ["sample", "moments", "recon", "whole"])
@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST, BYTES], ids=lambda p: p.name)
def test_a_wrong_result_has_no_speed(op, precision):
    noticed = wrong_results(op, precision, function_of(FALLBACK, op))
    assert noticed == {"sample": 4, "moments": 3, "recon": 2, "whole": 5}[op]


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_loss_has_no_speed(name):
    learned = {"prior": 2} | {row: 1 for row in LOSSES if "log_scale" in str(LOSSES[row].needs)}
    assert wrong_results(LOSS + name, FP32, function_of(FALLBACK, LOSS + name)) == 4 + learned.get(name, 0)


def test_every_option_is_in_the_table():
    """A likelihood, a mode or an argument that is added to the library is missed here."""
    import inspect

    from fastvae.likelihoods import NAMED
    from fastvae.regularizers import CAPACITY_MODES, FREE_BITS_MODES

    modes = [f"free_bits_{mode}" for mode in FREE_BITS_MODES] + [f"capacity_{mode}" for mode in CAPACITY_MODES]
    assert set(LOSSES) >= {*NAMED, *modes}
    arguments = set(inspect.signature(fastvae.vae_loss).parameters)
    elsewhere = {"recon", "target", "mu", "logvar", "kl", "likelihood", "reduction", "recon_reduction", "kl_reduction"}
    elsewhere |= {"recon_weight", "one_pass", "inplace", "free_bits", "capacity", "likelihood_args"}
    assert set(LOSSES) >= arguments - elsewhere


def test_in_place_is_judged_by_inputs_that_it_leaves_alone():
    trial = Trial(OpCase("whole", TINY, BYTES, BACKWARD), CPU)
    recon = trial.inputs[0][0].clone()
    call = trial.caller(function_of(IN_PLACE, "whole"), overwrites=True)
    trial.check(call(0))
    assert torch.equal(trial.inputs[0][0], recon)
    for _ in range(200):  # what is overwritten again and again stays normal: subnormals would be slow
        _, (drecon, *_) = call(0)
    assert drecon.abs().min() > torch.finfo(torch.float32).tiny


def test_a_provider_runs_on_its_backend():
    seen = on_backend(lambda i: fastvae._backend.choice(), KERNELS)
    assert seen(0) == "triton"
    assert on_backend(seen, EAGER) is seen


def test_skip_reason_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "g++" in skip_reason(COMPILED, CPU)
    monkeypatch.setattr("benchmarks.providers.find_spec", lambda name: None)
    assert skip_reason("pythae", CPU) == "pythae is not installed"
    assert skip_reason(EAGER, CPU) is None


def test_peak_memory_counts_what_lives_at_once():
    n = 1 << 18  # elements of a MiB

    def call(_):
        torch.empty(2 * n)  # gone before the next
        return [torch.empty(n) for _ in range(3)]

    assert peak_mib(call, CPU) == pytest.approx(3, abs=0.01)


class Sums:
    """A case of three providers, of which one is wrong and one does not run."""

    name, providers, moved_bytes = "sum", (FALLBACK, EAGER, "broken"), 12

    def setup(self, device):
        def check(result):
            if result != 4:
                raise WrongResult(f"{result} is not 4")

        calls = {FALLBACK: lambda i: 4, EAGER: lambda i: 5, "broken": lambda i: 1 / 0}
        return lambda provider: comparison.Run(calls[provider], check)


def test_who_is_wrong_is_not_timed():
    figures = comparison.compare(Sums(), CPU, seconds=0.01)
    assert set(figures["us"]) == set(figures["peak_mib"]) == {FALLBACK}
    assert figures["failed"][EAGER] == "WrongResult: 5 is not 4"
    assert figures["failed"]["broken"].startswith("ZeroDivisionError")
    assert figures["rounds"] >= 5


def figures(ours, eager, **more):
    spread = {"median": 2.0, "low": 1.5, "high": 2.5}
    us = {FALLBACK: spread | {"median": ours}, EAGER: spread | {"median": eager}}
    ratio = {FALLBACK: {EAGER: spread | {"median": eager / ours}}}
    return {"us": us, "ratio": ratio, "peak_mib": {FALLBACK: 3.0}, "failed": {}} | more


def test_the_report_has_the_best_and_the_worst_and_what_failed(tmp_path):
    cases = {"A": figures(1000.0, 2000.0), "B": figures(2.0, 1.0, failed={"pythae": "WrongResult: off"})}
    assert results.extremes(cases) == ["fastvae fallback against eager: best 2.00x (A), worst 0.50x (B)"]
    assert results.failures(cases) == ["B: pythae: WrongResult: off"]
    recorded = Results(tmp_path / "new" / "cpu.json", {"date": "2026-01-02", "commit": "a"})
    for case, found in cases.items():
        recorded.record(case, found)
    table = recorded.write_markdown()
    assert (tmp_path / "new" / "cpu.md").read_text() == table
    for line in (
        "- date: 2026-01-02",
        "| A | fastvae fallback | 1.00 ms | 2.00x (1.50-2.50) |",
        "| B | fastvae fallback | 2.0 us | 0.50x (1.50-2.50) |",
        "| A | 3.00 |",
        "- B: pythae: WrongResult: off",
    ):
        assert line in table.splitlines()


@pytest.mark.parametrize("scale", SCALES)
def test_the_suite_names_every_case_once(scale):
    names = [case.name for case in suite(scale, CPU)]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} == {"sample", "moments", "recon", "whole", "loss", "step"}
    assert all(any(name.startswith(f"loss {loss} ") for name in names) for loss in LOSSES)


def test_the_full_scale_holds_the_default_one_and_every_loss_at_every_size():
    full = {case.name for case in suite("full", CPU)}
    assert full >= {case.name for case in suite("default", CPU)}
    sizes = [
        (batch, p, phase)
        for batch in (8, 32, 200)
        for p in ("fp32", "bf16")
        for phase in ("forward", BACKWARD, "evaluation")
    ]
    assert full >= {f"loss {name} {b}x3x64x64 {p} {phase}" for name in LOSSES for b, p, phase in sizes}


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_wrong_training_step_is_noticed(overwritten):
    images, recon = torch.rand(4, 6), torch.rand(4, 6)
    mu = logvar = torch.zeros(4, 2)
    loss = (recon - images).square().sum() / 4
    shown = (recon - images) / 2 if overwritten else recon
    check_step(images, FP32, (loss, shown, mu, logvar), overwritten=overwritten)
    with pytest.raises(WrongResult):
        check_step(images, FP32, (1.001 * loss, shown, mu, logvar), overwritten=overwritten)


def run_main(*arguments):
    return runner.main(["--scale", "tiny", *arguments])


def test_the_runner_chooses_cases(capsys):
    assert run_main("--list", "--cases", "loss mask fp32", "--cases", "step compiled") == 0
    names = "mask", "mask_normalize", "kl_mask", "free_bits_dim_mask"
    losses = [f"loss {name} 8x1x8x8 fp32 {BACKWARD}" for name in names]
    assert capsys.readouterr().out.splitlines() == ["step mlp 8 fp32 compiled", *losses]
    assert run_main("--cases", "nothing like it") == 2
    assert "--list shows them" in capsys.readouterr().err


def test_a_run_is_recorded_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(
        comparison, "skip_reason", lambda name, device: None if name in (EAGER, FALLBACK) else "not here"
    )
    monkeypatch.setattr(runner, "environment", lambda *_: {"date": "2026-01-02", "command": "x", "commit": "a"})
    arguments = "--cases", "recon fp32", "--seconds", "0.001", "--record", "cpu"
    assert run_main(*arguments) == 0
    content = json.loads((tmp_path / "cpu.json").read_text())
    names = [f"recon 8x64 fp32 {phase}" for phase in PHASES]
    assert list(content["cases"]) == names
    assert content["environment"]["date"] == "2026-01-02"
    for found in content["cases"].values():
        assert set(found["us"]) == set(found["peak_mib"]) == {EAGER, FALLBACK}
        assert found["ratio"][FALLBACK][EAGER]["median"] > 0
    assert (tmp_path / "cpu.md").exists()
    assert "fastvae fallback against eager: best" in capsys.readouterr().out

    monkeypatch.setattr(runner, "compare", lambda *_, **__: pytest.fail("it is recorded"))
    assert run_main(*arguments) == 0


def test_a_wrong_provider_fails_the_run(monkeypatch):
    monkeypatch.setattr(runner, "suite", lambda *_: [Sums()])
    assert run_main("--seconds", "0.001") == 1


def test_results_of_another_commit_are_measured_again(tmp_path):
    def of(commit):
        return Results(tmp_path / "cpu.json", {"date": "2026-01-02", "commit": commit})

    first = of("a")
    first.record("right", figures(1.0, 2.0))
    first.record("wrong", figures(1.0, 2.0, failed={EAGER: "no"}))
    assert of("a").has("right")
    assert not of("a").has("wrong")
    assert not of("b").has("right")


def test_pytest_benchmark_times_real_calls(tmp_path):
    """The command of the README, on tiny shapes, one case of it."""
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need it")
    options = [
        "--benchmark-only",
        "--scale",
        "tiny",
        "--benchmark-max-time",
        "0.001",
        "--benchmark-json",
        str(tmp_path / "all.json"),
    ]
    options += ["-k", "recon-8x64-fp32-forward and not compile"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks/", *options],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    timed = json.loads((tmp_path / "all.json").read_text())["benchmarks"]
    groups = {f"recon 8x64 fp32 {phase}" for phase in ("forward", BACKWARD)}
    assert {figures["group"] for figures in timed} == groups
    assert all({"torch", "allocator", "commit"} <= set(figures["extra_info"]) for figures in timed)
    assert [figures["stats"]["rounds"] >= 5 for figures in timed] == [True] * 6
