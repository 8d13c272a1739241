"""The choice of a token on a GPU, through the launcher, in Triton's interpreter: against numpy and `edge.sampling`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

from edge import gpu_operations as operations
from edge.backends.place import DevicePlace
from edge.errors import KernelError
from edge.gpu import DeviceArray, Gpu
from edge.sampling import Sampler, Sampling, largest

pytestmark = [needs_kernels, needs_triton, needs_compiler]

TOLERANCE = 1e-5
"""Random numbers this near to the border between two tokens may choose either."""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    with FakeCuda(tmp_path_factory.mktemp("cuda")).open() as opened:
        yield opened


def chosen(gpu: Gpu, logits: np.ndarray, **settings: float) -> int:
    return int(gpu.numpy(operations.sample(gpu, gpu.array(logits), **settings))[0])


def host_choice(logits: np.ndarray, random: float, **settings: float) -> int:
    """What `Sampler` says for a given random number."""
    sampler = Sampler(Sampling(**settings))

    class Fixed:
        def random(self) -> float:
            return random

    sampler._random = Fixed()
    return sampler.choose(logits)


@pytest.mark.parametrize("vocabulary", [1, 2, 2047, 2049, 5000])
def test_greedy_is_numpys_argmax(gpu: Gpu, vocabulary: int):
    random = np.random.default_rng(vocabulary)
    logits = random.standard_normal(vocabulary).astype(np.float32)
    assert chosen(gpu, logits) == logits.argmax()
    assert chosen(gpu, -np.abs(logits) - 5) == (-np.abs(logits)).argmax()


@pytest.mark.parametrize("places", [(4000, 30), (2047, 2048, 4999), (0, 4999)])
@pytest.mark.parametrize("largest", [9.0, -0.0, np.inf, np.nan, -3e38])
def test_the_first_of_equal_logits_is_chosen(gpu: Gpu, places: tuple[int, ...], largest: float):
    logits = np.full(5000, -np.inf, np.float32)
    logits[list(places)] = largest
    if largest == 0:
        logits[places[0]] = 0.0  # equal to -0.0
    assert chosen(gpu, logits) == np.argmax(logits) == min(places)


def test_all_logits_equal_gives_the_first(gpu: Gpu):
    assert chosen(gpu, np.zeros(3000, np.float32)) == 0
    assert chosen(gpu, np.full(3000, -np.inf, np.float32)) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 40},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
        {"temperature": 10.0, "top_k": 100_000, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-4},
    ],
    ids=str,
)
def test_samples_are_the_hosts(gpu: Gpu, settings: dict[str, float]):
    random = np.random.default_rng(5)
    logits = (3 * random.standard_normal(3000)).astype(np.float32)
    numbers = [0.0, 0.25, 0.999999]
    numbers += [random.random()]
    order = np.argsort(-logits, kind="stable").tolist()
    agreed = 0
    for number in numbers:
        first, expected, last = (
            host_choice(logits, min(max(number + shift, 0), 1 - 1e-12), **settings)
            for shift in (-TOLERANCE, 0, TOLERANCE)
        )
        found = chosen(gpu, logits, random=number, **settings)
        assert order.index(first) <= order.index(found) <= order.index(last)
        agreed += found == expected
    assert agreed >= len(numbers) - 1


def test_ties_are_taken_in_the_order_of_the_tokens(gpu: Gpu):
    """Few different logits: every border lies among equal ones."""
    random = np.random.default_rng(6)
    logits = random.integers(0, 4, 3000).astype(np.float32)
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 1200}, {"temperature": 2.0, "top_p": 0.61}):
        for number in (0.1234, 0.7777):
            found, expected = chosen(gpu, logits, random=number, **settings), host_choice(logits, number, **settings)
            # One token is 0.0003 or more of the probability here: the next one at most.
            assert logits[found] == logits[expected]
            same = np.flatnonzero(logits == logits[expected])
            assert abs(np.searchsorted(same, found) - np.searchsorted(same, expected)) <= 1


def test_far_smaller_logits_are_never_chosen(gpu: Gpu):
    logits = np.full(2100, -1000, np.float32)
    logits[[7, 2099]] = 5
    assert {chosen(gpu, logits, temperature=1.0, random=number) for number in (0.0, 0.4, 0.6, 0.99999)} == {7, 2099}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 11}, "temperature from 0 to 10, found 11"),
        ({"temperature": 1, "top_k": -1}, "top_k 0 or more, found -1"),
        ({"temperature": 1, "top_p": 0}, "top_p above 0 and at most 1, found 0"),
        ({"temperature": 1, "random": 1}, "from 0 to below 1, found 1"),
    ],
)
def test_settings_out_of_range_are_refused(gpu: Gpu, settings: dict[str, float], said: str):
    with pytest.raises(KernelError, match=said):
        chosen(gpu, np.zeros(4, np.float32), **settings)


def test_a_sampler_gives_the_same_tokens_for_logits_on_the_device_as_for_an_array(gpu: Gpu):
    place = DevicePlace(gpu, None, ("cuda", 0), frozenset(), "")
    row = place.result("logits", (1, 500))
    settings = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=3)
    here, there = Sampler(settings), Sampler(settings)
    random = np.random.default_rng(1)
    for _ in range(8):
        logits = 2 * random.standard_normal((1, 500)).astype(np.float32)
        gpu.write(row, logits)
        assert there.choose(place.logits(row)) == here.choose(logits[0])
        assert largest(place.logits(row)) == logits.argmax()
        assert np.array_equal(np.asarray(place.logits(row)), logits[0])


def test_logits_that_are_not_aligned_are_refused_before_they_are_read(gpu: Gpu):
    """A row of a table whose width is odd: on a device its loads of 16 bytes would end the process's use of it."""
    table = gpu.array(np.zeros((2, 4097), np.float32))
    row = DeviceArray(table.pointer + 4 * 4097, (4097,), table.dtype, (4,), table.owner)
    with pytest.raises(KernelError, match="Sample: expected addresses that are multiples of 16 bytes"):
        operations.sample(gpu, row)
