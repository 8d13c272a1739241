"""Reply tokens are the most likely ones, unless the user asks for chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import UsageError
from edge.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def drawn(settings: Sampling, count: int = 4000) -> np.ndarray:
    """Share of each token in `count` draws."""
    sampler = Sampler(settings)
    tokens = [sampler.choose(LOGITS) for _ in range(count)]
    return np.bincount(tokens, minlength=len(LOGITS)) / count


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30))
def test_greedy_takes_the_first_of_the_most_likely(values: list[float]) -> None:
    assert Sampler(Sampling()).choose(np.array(values, np.float32)) == int(np.argmax(values))


def test_temperature_one_draws_with_the_models_probabilities() -> None:
    np.testing.assert_allclose(drawn(Sampling(temperature=1)), np.exp(LOGITS), atol=0.03)


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    cold, hot = drawn(Sampling(temperature=0.3)), drawn(Sampling(temperature=5))
    assert cold[0] > 0.75 > 0.5 > hot[0]


def test_top_k_keeps_the_k_most_likely() -> None:
    shares = drawn(Sampling(temperature=1, top_k=2))
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    shares = drawn(Sampling(temperature=1, top_p=0.7))
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)


def test_the_same_seed_gives_the_same_tokens() -> None:
    first, second = (Sampler(Sampling(temperature=1, seed=3)) for _ in range(2))
    assert [first.choose(LOGITS) for _ in range(50)] == [second.choose(LOGITS) for _ in range(50)]


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"temperature": 11}, {"top_k": -1}, {"top_p": 0}])
def test_a_setting_out_of_range_is_refused_with_the_range(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="should be"):
        Sampling(**setting)  # type: ignore[arg-type]
