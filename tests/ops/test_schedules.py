import copy
import io
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastvae.schedules import Cosine, Cyclical, Linear, Schedule, Sigmoid

SCHEDULES = {
    "linear": lambda: Linear(0.1, 0.7, 20),
    "falling": lambda: Linear(25.0, 0.0, 7, delay=3),
    "cosine": lambda: Cosine(0.0, 1e-6, 20, delay=2),
    "sigmoid": lambda: Sigmoid(0.2, 4.0, 20),
    "cyclical": lambda: Cyclical(0.0, 1.0, 40, cycles=4, ratio=0.5, delay=1),
    "cyclical_uneven": lambda: Cyclical(0.1, 0.9, 23, cycles=3, ratio=0.4, shape="sigmoid", zero_ratio=0.3),
    "cyclical_cosine": lambda: Cyclical(2.0, 1.0, 30, cycles=10, ratio=1.0, shape="cosine"),
}
any_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def values(schedule, n):
    """The next n values, the present one first, stepping from each to the next."""
    seen = []
    for _ in range(n):
        seen.append(schedule.value.clone())
        schedule.step()
    return torch.stack(seen)


def logistic(x):
    return 1 / (1 + math.exp(-x))


RAMPS = {
    "linear": lambda p: p,
    "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
    "sigmoid": lambda p: (logistic(12 * p - 6) - logistic(-6)) / (logistic(6) - logistic(-6)),
}


@pytest.mark.parametrize(("kind", "name"), [(Linear, "linear"), (Cosine, "cosine"), (Sigmoid, "sigmoid")])
@pytest.mark.parametrize(("start", "end", "steps", "delay"), [(0.0, 1.0, 10, 0), (0.3, 2.5, 7, 4), (5.0, 0.0, 1, 1)])
def test_single_ramp(kind, name, start, end, steps, delay):
    schedule = kind(start, end, steps, delay=delay)
    truth = [
        start + (end - start) * RAMPS[name](min(max(step - delay, 0) / steps, 1)) for step in range(delay + steps + 4)
    ]
    assert [schedule.value_at(step) for step in range(len(truth))] == pytest.approx(truth, rel=1e-14, abs=1e-15)
    seen = values(schedule, len(truth))
    assert seen[: delay + 1].tolist() == [torch.tensor(start).item()] * (delay + 1)
    assert seen[delay + steps :].tolist() == [torch.tensor(end).item()] * 4
    differences = seen.diff() * (1 if end > start else -1)
    assert (differences >= 0).all()
    assert (differences[delay : delay + steps] > 0).all()


@pytest.mark.parametrize("shape", RAMPS)
@pytest.mark.parametrize("zero_ratio", [0.0, 0.3])
@pytest.mark.parametrize(("steps", "cycles", "ratio"), [(40, 4, 0.5), (23, 3, 0.4), (49, 7, 0.7), (300, 10, 0.25)])
def test_cyclical(shape, zero_ratio, steps, cycles, ratio):
    schedule = Cyclical(0.5, 2.0, steps, cycles, ratio, shape, zero_ratio=zero_ratio, delay=5)
    truth = [0.5] * 5
    for step in range(steps):
        begun = max(cycle for cycle in range(cycles) if cycle * steps <= step * cycles)
        position = (step - begun * steps / cycles) / (steps / cycles)
        truth.append(0.5 + 1.5 * RAMPS[shape](min(max(position - zero_ratio, 0) / ratio, 1)))
    truth += [2.0] * 6
    assert [schedule.value_at(step) for step in range(len(truth))] == pytest.approx(truth, rel=1e-12)


def test_cyclical_is_the_list_of_its_source():
    """The recurrence of the paper's code: v grows by (stop - start) / (period * ratio) from where a cycle begins."""
    steps, cycles, ratio = 80, 4, 0.5
    period = steps // cycles
    expected = [1.0] * steps
    for cycle in range(cycles):
        value, i = 0.0, 0
        while value <= 1.0:
            expected[cycle * period + i] = value
            value, i = value + 1.0 / (period * ratio), i + 1
    schedule = Cyclical(0.0, 1.0, steps, cycles, ratio)
    assert [schedule.value_at(step) for step in range(steps)] == pytest.approx(expected, abs=1e-12)


def test_each_cycle_begins_at_start_however_long_the_run():
    """3 * (1 / 3 million) cycles in floating point would lie before the boundary here and there."""
    steps, cycles = 3_000_003, 1_000_001
    schedule = Cyclical(0.0, 1.0, steps, cycles, ratio=0.5)
    assert {schedule.value_at(3 * cycle) for cycle in range(0, cycles, 997)} == {0.0}
    assert schedule.value_at(2**40) == 1.0


@pytest.mark.parametrize("kind", [Linear, Cosine, Sigmoid, Cyclical])
def test_ends_at_the_end_exactly(kind):
    assert kind(1e20, 1.0, 8).value_at(8) == 1.0  # 1e20 + (1.0 - 1e20) is 0
    assert kind(1.0, 0.0, 8).value_at(8) == 0.0


@any_schedule
def test_device_value_is_the_exact_one_rounded_once(make):
    schedule = make()
    truth = torch.tensor([make().value_at(step) for step in range(60)], dtype=torch.float64)
    assert torch.equal(values(schedule, 60), truth.float())


@any_schedule
def test_value_is_one_tensor_for_the_whole_run(make):
    schedule = make()
    value, count, address = schedule.value, schedule.step_count, schedule.value.data_ptr()
    for _ in range(5):
        schedule.step()
    assert schedule.value is value
    assert schedule.step_count is count
    assert value.data_ptr() == address
    assert (value.dtype, value.shape, value.requires_grad) == (torch.float32, (), False)
    assert (count.dtype, count.tolist()) == (torch.int64, 5)


@any_schedule
def test_stepping_never_reads_the_device(make):
    schedule = make().to("meta")  # where reading a value raises
    schedule.step()
    assert schedule.value.device.type == schedule.step_count.device.type == "meta"
    assert schedule.value_at(10**9) == schedule.end


@any_schedule
def test_resumes_from_a_state_dict(make):
    schedule = make()
    values(schedule, 9)
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    resumed = make()
    value = resumed.value
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.value is value
    assert torch.equal(values(resumed, 40), values(schedule, 40))


def test_loaded_state_follows_the_arguments_of_this_run():
    short, long = Linear(0.0, 1.0, 10), torch.nn.ModuleList([Linear(0.0, 1.0, 20)])
    values(short, 5)
    long.load_state_dict({f"0.{name}": tensor for name, tensor in short.state_dict().items()})
    assert float(long[0].value) == 0.25


@any_schedule
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(make, duplicate):
    schedule = make()
    values(schedule, 4)
    other = duplicate(schedule)
    before = schedule.value.clone()
    assert torch.equal(values(other, 30), values(duplicate(schedule), 30))
    assert torch.equal(schedule.value, before)
    assert other.step_count == 34
    other.load_state_dict(schedule.state_dict())
    assert torch.equal(other.value, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_a_model_leaves_the_value_as_it_is(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Linear(0.0, 1e-6, 10))
    values(model[1], 7)
    before = model[1].value.clone()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert model[1].value.dtype == torch.float32
    assert torch.equal(model[1].value, before)
    model[1].step()
    assert model[1].value == torch.tensor(8e-7)


def test_a_new_value_does_not_recompile():
    schedule = Cyclical(0.0, 2.0, 12, cycles=2)
    x = torch.ones(3, requires_grad=True)
    counter = CompileCounter()
    loss = torch.compile(lambda x, beta: (beta * x).sum(), backend=counter, fullgraph=True)
    for _ in range(10):
        result = loss(x, schedule.value)
        assert result.detach().item() == pytest.approx(3 * schedule.value_at(int(schedule.step_count)))
        result.backward()
        schedule.step()
    assert counter.frame_count == 1


@any_schedule
def test_steps_inside_a_compiled_region(make):
    schedule, eager = make(), make()
    value = schedule.value
    counter = CompileCounter()

    def step(x):
        schedule.step()
        return schedule.value * x

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(12):
        eager.step()
        assert torch.equal(compiled(torch.tensor(3.0)), 3 * eager.value)
    assert counter.frame_count == 1
    assert schedule.value is value


def test_stepping_before_backward_raises_and_does_not_change_the_gradient():
    schedule = Linear(1.0, 2.0, 10)
    x = torch.ones((), requires_grad=True)
    loss = schedule.value * x
    schedule.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", [Linear, Cosine, Sigmoid, Cyclical])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"steps": 0}, ValueError, "steps must be an int of at least 1; got 0"),
        ({"steps": -3}, ValueError, "got -3"),
        ({"steps": 10.0}, ValueError, "got 10.0"),
        ({"delay": -1}, ValueError, "delay must be an int of at least 0; got -1"),
        ({"delay": 0.5}, ValueError, "got 0.5"),
        ({"start": math.nan}, ValueError, "start must be finite in float32; got nan"),
        ({"end": math.inf}, ValueError, "end must be finite"),
        ({"end": 1e39}, ValueError, "end must be finite"),
        ({"start": "0"}, TypeError, "start must be a number; got str"),
        ({"end": torch.tensor(1.0)}, TypeError, "end must be a number; got Tensor"),
    ],
    ids=str,
)
def test_wrong_arguments(kind, arguments, error, text):
    with pytest.raises(error, match=text):
        kind(**{"start": 0.0, "end": 1.0, "steps": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ratio": 0.0}, "ratio must be positive"),
        ({"ratio": math.nan}, "ratio must be positive"),
        ({"ratio": 1.1}, "at most 1"),
        ({"ratio": 0.8, "zero_ratio": 0.3}, "at most 1, a whole cycle; got 0.8 and 0.3"),
        ({"zero_ratio": -0.1}, "zero_ratio must be 0 or more"),
        ({"cycles": 0}, "cycles must be an int of at least 1"),
        ({"shape": "cosin"}, "Did you mean 'cosine'"),
    ],
    ids=str,
)
def test_wrong_cycles(arguments, text):
    with pytest.raises(ValueError, match=text):
        Cyclical(0.0, 1.0, 10, **arguments)
    Cyclical(0.0, 1.0, 10, ratio=0.9, zero_ratio=0.1)


def test_repr_says_what_it_is():
    assert repr(Linear(0, 1, 10)) == "Linear(0.0, 1.0, steps=10, delay=0)"
    assert "ratio=0.5, shape='linear'" in repr(Cyclical(0.0, 1.0, 10))
    assert isinstance(Cosine(0.0, 1.0, 3), Schedule)
