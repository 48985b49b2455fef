import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastvae
from fastvae.noise_state import NoiseState
from tests.ops.test_autograd import attempt

# the first outputs of splitmix64.c for two states
KNOWN = {
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
}


def seeds(state, n):
    """The next n seeds mod 2^64, the present one first."""
    found = []
    for _ in range(n):
        found.append(int(state.seed) % 2**64)
        state.advance()
    return found


@pytest.mark.parametrize("seed", KNOWN)
def test_known_answers(backend, seed):
    assert seeds(NoiseState(seed), 5) == KNOWN[seed]


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, -(2**64) - 1])
def test_a_seed_counts_mod_2_to_the_64(seed):
    assert seeds(NoiseState(seed), 3) == seeds(NoiseState(2**64 - 1), 3)


def test_starts_anywhere():
    assert seeds(NoiseState(1234567, step=2), 3) == KNOWN[1234567][2:]
    assert seeds(NoiseState(7, step=2**62), 1)  # (step + 1) * increment wraps around many times


def step(mu, logvar, seed):
    """What one training step computes from its noise: sample, KL, gradients."""
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=seed)
    return z.detach(), kl.detach(), *torch.autograd.grad(z.square().sum() + kl.sum(), (mu, logvar))


def test_steps_in_place_equal_fresh_calls(backend):
    """The same tensors throughout, as the replays of a captured graph see them; bit for bit."""
    n_steps = 100 if backend == "torch" else 20  # the interpreter takes its time
    mu, logvar = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    state = NoiseState(11)
    seen = []
    for _ in range(n_steps):
        seen.append(step(mu, logvar, state.seed))
        state.advance()
    for number, found in enumerate(seen):
        fresh = step(mu, logvar, NoiseState(11, step=number).seed)
        assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
    assert len({tuple(z.flatten().tolist()) for z, *_ in seen}) == n_steps


def test_a_tensor_seed_and_the_int_that_it_holds_draw_the_same(backend):
    mu = logvar = torch.zeros(3, 5)
    expected = fastvae.reparameterize(mu, logvar, seed=KNOWN[1234567][1])
    assert torch.equal(fastvae.reparameterize(mu, logvar, seed=NoiseState(1234567, step=1).seed), expected)


def test_the_tensors_stay_while_it_advances_and_loads():
    """A captured graph reads and writes addresses."""
    state = NoiseState(3)
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in state.named_buffers()}
    state.advance()
    state.load_state_dict(NoiseState(1234567, step=1).state_dict())
    assert seeds(state, 2) == KNOWN[1234567][1:3]
    assert set(before) == {"base", "step", "seed"}
    for name, buffer in state.named_buffers():
        assert buffer is before[name][0]
        assert buffer.data_ptr() == before[name][1]
        assert (buffer.shape, buffer.dtype) == ((), torch.int64)


def test_advancing_never_reads_the_device():
    state = NoiseState(3).to("meta")  # where reading a value raises
    state.advance()
    assert state.seed.device.type == "meta"


def test_resumes_from_a_state_dict():
    state = NoiseState(1234567)
    seeds(state, 2)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert set(loaded) == {"base", "step"}
    for assign in (False, True):
        resumed = torch.nn.ModuleList([NoiseState(0)])
        resumed.load_state_dict({f"0.{name}": tensor.clone() for name, tensor in loaded.items()}, assign=assign)
        assert seeds(resumed[0], 3) == KNOWN[1234567][2:]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(duplicate):
    state = NoiseState(1234567, step=1)
    other = duplicate(state)
    assert seeds(other, 4) == KNOWN[1234567][1:]
    assert seeds(state, 4) == KNOWN[1234567][1:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_casting_a_model_leaves_it_as_it_is(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), NoiseState(1234567)).to(dtype)
    assert model[0].weight.dtype == dtype
    assert seeds(model[1], 2) == KNOWN[1234567][:2]


def test_advances_inside_a_compiled_region():
    """Neither a new step nor a new seed compiles anew."""
    state, counter = NoiseState(1234567), CompileCounter()

    def advance():
        state.advance()
        return state.seed + 0

    compiled = torch.compile(advance, backend=counter, fullgraph=True)
    assert [int(compiled()) % 2**64 for _ in range(4)] == KNOWN[1234567][1:]
    assert counter.frame_count == 1


def test_advancing_before_backward_never_gives_a_wrong_gradient(backend):
    """Where the backward pass draws the noise again it must not draw another step's: right, or autograd's error."""
    mu, logvar, state = torch.zeros(2, 5), torch.zeros(2, 5, requires_grad=True), NoiseState(0)
    z = fastvae.reparameterize(mu, logvar, seed=state.seed)
    state.advance()
    gradient, refusal = attempt(lambda: torch.autograd.grad(z.sum(), logvar)[0])
    if refusal:
        assert "modified by an inplace operation" in refusal
    else:
        torch.testing.assert_close(gradient, 0.5 * z.detach())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((True,), TypeError, "seed must be an int; got bool"),
        ((torch.tensor(3),), TypeError, "seed must be an int; got Tensor"),
        ((0, -1), ValueError, "step must be an int of at least 0; got -1"),
        ((0, 1.0), ValueError, "got 1.0"),
        ((0, 2**63), ValueError, "got 9223372036854775808"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        NoiseState(*arguments)
