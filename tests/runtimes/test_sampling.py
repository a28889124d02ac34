import numpy as np
import pytest

from arriero.runtimes.sampling import Sampling

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))


def frequencies(sampling, count=4000):
    random = np.random.default_rng(0)
    return np.bincount([sampling.choose(LOGITS, random) for _ in range(count)], minlength=4) / count


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    random = np.random.default_rng(0)
    assert Sampling().choose(LOGITS, random) == 1
    assert Sampling().choose(np.array([1, 3, 3], np.float32), random) == 1
    assert Sampling(temperature=5.0, top_k=1).choose(LOGITS, random) == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(temperature=1.0, top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=1.0, top_p=0.79), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=1.0, top_p=0.81), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        (Sampling(temperature=1.0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [0, 1, 0, 0]),
        (Sampling(temperature=1e-320), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), np.array([0.0025, 0.25, 0.0225, 0.09]) / 0.365),
    ],
)
def test_draws_have_the_right_frequencies(sampling, expected):
    # 4000 draws: a standard error below 0.008, and the seed is fixed
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.025)


def test_an_impossible_token_is_never_drawn():
    logits = LOGITS.copy()
    logits[1] = -np.inf
    random = np.random.default_rng(0)
    assert {Sampling(temperature=3.0).choose(logits, random) for _ in range(500)} == {0, 2, 3}
