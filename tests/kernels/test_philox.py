"""The noise: a pure function of (seed, element), and normal."""

import math

import pytest
import torch

import fastvae
from fastvae._seeds import int64
from fastvae.fallback import philox
from fastvae.fallback.philox import philox_words

# Random123's published known answers for philox4x32-10 with counter words (c, c, 0, 0), key words (k, k): its
# kat_vectors lists all-zero; the others there have words beyond the two that this library's counters use, so
# philox_words is asked directly
KNOWN_ZERO = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def true_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, from the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def true_normals(words: list[int]) -> list[float]:
    """Box-Muller in Python floats, with the uniform maps that the docstrings state."""
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        u = float(torch.tensor(radius_word >> 8, dtype=torch.float32) + 0.5) / 2**24
        signed = (angle_word & 0x3FFFFFFF) - (1 << 30 if angle_word & 0x20000000 else 0)
        angle = (angle_word >> 30) * math.pi / 2
        offset = signed / 2**30 * math.pi / 2
        r = math.sqrt(-2 * math.log(u))
        quarter = angle_word >> 30
        cos, sin = math.cos(offset), math.sin(offset)
        first, second = (sin, cos) if quarter & 1 else (cos, sin)
        sign = -1 if quarter & 2 else 1
        assert abs(angle - quarter * math.pi / 2) < 1e-15
        normals += [sign * r * first, sign * r * second]
    return normals


def test_the_published_answers():
    """Random123, kat_vectors, philox4x32 10: the oracle on all three, the library on the one that it can be asked
    for.
    """
    ones = [0xFFFFFFFF] * 4
    assert true_philox([0] * 4, [0] * 2) == list(KNOWN_ZERO)
    assert true_philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert true_philox(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    words = philox_words(0, torch.zeros(1, dtype=torch.int64))
    assert tuple(int(w) for w in words) == KNOWN_ZERO


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 5, -1])
@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**32 - 1, 2**32, 2**59 + 7])
def test_normals_of_a_counter(backend, seed, counter):
    """All four against the definition, far along the stream and under keys with a high word too."""
    words = true_philox([counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    assert [int(w) for w in philox_words(int64(seed), torch.tensor([counter]))] == words
    actual = fastvae.philox_normal(4, seed=seed, offset=4 * counter)
    torch.testing.assert_close(
        actual.double(), torch.tensor(true_normals(words), dtype=torch.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("seed", [7, -1, torch.tensor([2**63 - 3])], ids=str)
def test_both_libraries_of_the_fallback_agree(monkeypatch, seed):
    """NumPy makes the noise of CPUs, torch that of other devices; here torch is made to take the CPU's."""
    by_numpy = philox.philox_normal(torch.Size([3, 70_001]), seed, 5, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(philox, "_BY_NUMPY", ())
    torch.set_default_dtype(torch.bfloat16)  # which must not matter
    try:
        by_torch = philox.philox_normal(torch.Size([3, 70_001]), seed, 5, torch.float32, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(by_torch, by_numpy, rtol=0, atol=5e-7)  # an ulp of the largest


def test_draws_that_follow_each_other_read_one_stream(monkeypatch):
    """The fallback makes noise ahead for who goes on where the last draw ended; every draw is what it is alone."""
    whole = {seed: fastvae.philox_normal(200_000, seed=seed) for seed in (9, 10)}
    device, made = torch.device("cpu"), []
    make = philox._made
    monkeypatch.setattr(philox, "_made", lambda *args: made.append(args[3]) or make(*args))
    monkeypatch.setattr(philox, "_cache", ())
    sizes = [1, 3, 10, 4096, 16_384, 5, 20_000, 7]
    draws = [(9, size, 0) for size in sizes] + [(9, 64, -64), (10, 64, 0), (9, 64, 0), (9, 64, 5000), (10, 100, -30)]
    place = 0
    for seed, size, gap in draws:
        place += gap
        drawn = philox.philox_normal(torch.Size([size]), seed, place, torch.float32, device)
        torch.testing.assert_close(drawn, whole[seed][place : place + size], rtol=0, atol=0)
        drawn.zero_()  # the caller may: the result is a copy
        place += size
    assert made == [1, 65_536, 20_000, 64, 100], "once for draws in a row, and otherwise what is read"


def test_several_streams_are_read_side_by_side(monkeypatch):
    made = []
    make = philox._made
    monkeypatch.setattr(philox, "_made", lambda *args: made.append(args[1]) or make(*args))
    monkeypatch.setattr(philox, "_cache", ())
    starts = [(1, 0), (2, 0), (1, 10**6), (3, 8)]  # twice the same seed
    for step in range(5):
        for seed, start in starts:
            philox.philox_normal(torch.Size([8]), seed, start + 8 * step, torch.float32, torch.device("cpu"))
    assert made == [1, 2, 1, 3] * 2
    for step in range(4):  # beyond what was made ahead
        philox.philox_normal(torch.Size([16_384]), 2, 40 + 16_384 * step, torch.float32, torch.device("cpu"))
    fastvae.philox_normal(8, seed=1, offset=40)
    assert made[8:] == [2], "a stream that goes on takes its own place"
    made.clear()
    for seed in range(10, 20):
        fastvae.philox_normal(8, seed=seed)
        assert len(philox._cache) <= len(starts)
    fastvae.philox_normal(8, seed=1, offset=48)
    assert made == [*range(10, 20), 1], "older streams are forgotten"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 1023, 4099])
@pytest.mark.parametrize("offset", [0, 1, 6, 8])
def test_every_part_of_the_stream_is_the_same(backend, n, offset, dtype):
    whole = fastvae.philox_normal(offset + n, seed=3)
    part = fastvae.philox_normal((1, n), seed=3, offset=offset, dtype=dtype)
    if dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(part[0].float(), whole[offset:], rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(part[0], whole[offset:].to(dtype))


def test_backends_agree():
    drawn = []
    for backend in ("torch", "triton"):
        with fastvae.use_backend(backend):
            drawn.append(fastvae.philox_normal(20_000, seed=11))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-6)


# the statistics are those of one fixed stream, so they cannot flicker; the bounds are 4 standard errors
N = 1 << 22


@pytest.fixture(scope="module")
def normals():
    with fastvae.use_backend("torch"):
        return fastvae.philox_normal(N, seed=42).double()


def test_moments(normals):
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs(float((normals**power).mean()) - mean) < 4 * math.sqrt(variance / N), power


def test_distribution(normals):
    """Kolmogorov-Smirnov against the normal distribution, at the 0.1 % level."""
    cdf = torch.special.ndtr(normals.sort().values)
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    distance = max(float((cdf - steps[:-1]).abs().max()), float((cdf - steps[1:]).abs().max()))
    assert distance * math.sqrt(N) < 1.95


def test_tails(normals):
    """As many beyond k sigma as there should be, as far as 5.5."""
    for k in (3.0, 4.0, 4.5, 5.0, 5.5):
        expected = N * math.erfc(k / math.sqrt(2))
        assert abs(int((normals.abs() > k).sum()) - expected) < 4 * math.sqrt(expected) + 1, k
    assert float(normals.abs().max()) < 5.9


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 1024])
def test_neighbours_do_not_correlate(normals, lag):
    a, b = normals[:-lag], normals[lag:]
    assert abs(float((a * b).mean())) < 4 / math.sqrt(N)
    assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < 4 * 2 / math.sqrt(N)


@pytest.mark.parametrize("other", [43, 42 + 2**32, -42])
def test_seeds_do_not_correlate(normals, other):
    n = N // 8
    different = fastvae.philox_normal(n, seed=other).double()
    assert abs(float((normals[:n] * different).mean())) < 4 / math.sqrt(n)


def test_dtype_of_seed_and_device_default():
    seed = torch.tensor([7])
    assert torch.equal(fastvae.philox_normal([2, 3], seed=seed), fastvae.philox_normal((2, 3), seed=7))
    assert fastvae.philox_normal((0, 3), seed=7).shape == (0, 3)
