"""The model of speed against published times, and its parts against small programs."""

from dataclasses import replace

import pytest
import torch

import fastvae
from tests.helpers.aot import DryRun, report
from tests.helpers.kernel_cases import Case
from tests.helpers.sass import Code, Instruction
from tests.helpers.speed_model import H100, H200, busy_clocks, predict, programs_per_sm, split_at_loop

pytestmark = pytest.mark.compiled

# Liger-Kernel 0.7.0, benchmark/data/all_benchmark_data.csv: the total variation distance of [16384, V] float32 forward,
# which reads two tensors and writes the gradient as our loss does, on an H100 80GB HBM3; V -> ms
PUBLISHED = {4096: 0.2757, 8192: 0.5339, 16384: 1.0512, 32768: 2.0987, 65536: 4.2220, 131072: 8.5012}


@pytest.fixture
def predicted(monkeypatch):
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)

    def of_forward(case, gpu=H100):
        with fastvae.use_backend("triton"), DryRun("sm_90") as dry:
            case.forward("meta")
        launch = dry.launches[0]
        return predict(launch, report(launch.kernel).path, case.forward_floor.total, case.n_elements, gpu)

    return of_forward


@pytest.mark.parametrize("columns", PUBLISHED)
def test_published_times_of_the_same_traffic(predicted, columns):
    seconds = predicted(Case("loss", torch.float32, shape=(16384, columns))).seconds
    assert seconds == pytest.approx(PUBLISHED[columns] / 1000, rel=0.05)


def test_what_bounds_a_kernel(predicted):
    sample = Case("sample", torch.float32, shape=(2**15, 2**12))
    noise = replace(sample, op="noise", dtype=torch.bfloat16)
    assert predicted(sample).bound == "memory"
    assert predicted(noise).bound == "issue"
    # 1.43 times the bandwidth is of little use to what is bound by instructions
    assert predicted(noise, H200).seconds > 0.85 * predicted(noise).seconds
    assert predicted(sample, H200).seconds < 0.75 * predicted(sample).seconds
    slower = replace(H100, latency=100_000)
    assert predicted(sample, slower).bound == "latency"
    assert predicted(sample, slower).share < 0.3


IMAGES, BYTES = {"shape": (2**15, 2**12)}, torch.uint8
SHARES = {  # of an H100's peak bandwidth, at least
    Case("stats", torch.float32, shape=(2**17, 2**10)): 0.85,
    Case("stats", torch.bfloat16, shape=(2**17, 2**10)): 0.85,
    Case("loss", torch.bfloat16, BYTES, **IMAGES, options=("bernoulli_probs",)): 0.66,
    Case("loss", torch.bfloat16, BYTES, **IMAGES, options=("log_cosh",)): 0.84,
    Case("loss", torch.float32, **IMAGES, options=("log_cosh",)): 0.85,
    Case("sample_kl", torch.bfloat16, **IMAGES): 0.76,
    Case("noise", torch.bfloat16, **IMAGES): 0.48,
}


@pytest.mark.parametrize("case", SHARES, ids=str)
def test_predicted_shares_of_the_bandwidth(predicted, case):
    assert predicted(case).share >= SHARES[case]


def code_of(*opcodes):
    """`BRA 0x20` jumps to the third instruction."""
    return Code(Instruction(*opcode.split(), predicate="@P0" * opcode.startswith("BRA")) for opcode in opcodes)


def test_what_a_loop_repeats_is_told_from_what_comes_once():
    code = code_of("S2R", "FADD", "LDG.E.128", "FADD", "FADD", "BRA 0x20", "STG.E.128", "EXIT")
    once, body = split_at_loop(code, code)
    assert [step.mnemonic for step in once] == ["S2R", "FADD", "STG", "EXIT"]
    assert [step.mnemonic for step in body] == ["LDG", "FADD", "FADD", "BRA"]
    straight = code_of("S2R", "LDG.E.128", "STG.E.128", "EXIT")
    assert split_at_loop(straight, straight) == (Code(), straight)


def test_pipes():
    clocks = busy_clocks(code_of("FFMA", "IMAD.WIDE.U32", "MUFU.EX2", "LDG.E.128", "IADD3", "UMOV"))
    assert clocks == {"fma": 0.25, "multiply": 1, "special": 2, "memory": 1, "cache": 4, "alu": 0.5, "issue": 1.5}


def test_programs_of_an_sm_are_limited_by_registers_and_by_shared_memory(predicted):
    class Facts:
        registers, shared = 72, 0

        class kernel:
            class metadata:
                num_warps = 4

    assert programs_per_sm(Facts, H100) == 7  # 65536 // (72 * 128)
    Facts.shared = 100 * 1024
    assert programs_per_sm(Facts, H100) == 2
    Facts.registers, Facts.shared = 16, 0
    assert programs_per_sm(Facts, H100) == 16  # 64 warps
