"""How tokens are chosen: what is drawn from, against a plain sort and transformers' own processors; penalties and bias;
what is refused.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes import draw
from arriero.runtimes.draw import draw_token, top_log_probabilities
from arriero.runtimes.sampler import Sampler
from arriero.runtimes.sampling import Sampling

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))
PROMPT = np.array([1, 5, 5, 7])
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install transformers"
)


def frequencies(sampling, count=4000):
    sampler = Sampler(sampling, np.zeros(0, np.int64), never=None)
    return np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=4) / count


def greedy(logits, **settings):
    return Sampler(Sampling(**settings), PROMPT, never=None).choose(np.asarray(logits, np.float32))


def draws(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Every token that may be drawn, with its probability: the draw is a step function of a uniform number."""
    shares: dict[int, float] = {}
    steps = 20011  # prime: no step of it falls on a boundary of the small distributions here
    for step in range(steps):
        token = draw_token(logits, temperature, top_k, top_p, min_p, lambda step=step: (step + 0.5) / steps)
        shares[token] = shares.get(token, 0.0) + 1 / steps
    return shares


def kept_by_sorting(logits, temperature, top_k, top_p, min_p):
    """The ids that the definition leaves, and their probabilities: sort, cut, cut, cut."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    depth = (logits[order].astype(np.float64) - float(logits.max())) / temperature
    weights = np.exp(depth)
    if top_p is not None and top_p < 1:
        last = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum()))
        order, weights = order[: last + 1], weights[: last + 1]
    if min_p is not None:
        order, weights = order[weights >= min_p], weights[weights >= min_p]
    return dict(zip(order.tolist(), weights / weights.sum(), strict=True))


def kept_without_sorting(monkeypatch, logits, *how):
    """What `draw_token` draws from: ids and probabilities, read where it draws."""
    seen = []
    real = draw._draw
    monkeypatch.setattr(draw, "_draw", lambda weights, uniform: seen.append(weights) or real(weights, uniform))
    probabilities = {}
    for nth in range(2):  # the first entry of what is left, and the last: a probe into the same order
        draw_token(logits, *how, lambda nth=nth: [0.0, 1 - 1e-16][nth])
    weights = seen[0]
    for index in range(len(weights)):
        monkeypatch.setattr(draw, "_draw", lambda weights, uniform, index=index: index)
        probabilities[draw_token(logits, *how, lambda: 0.0)] = weights[index] / weights.sum()
    monkeypatch.setattr(draw, "_draw", real)
    return probabilities


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert greedy(LOGITS) == 1
    assert greedy([1, 3, 3]) == 1
    assert greedy(LOGITS, temperature=5.0, top_k=1) == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(temperature=1.0, top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=1.0, top_p=0.79), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=1.0, top_p=0.81), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        (Sampling(temperature=1.0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.5), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=2.0, min_p=0.5), np.sqrt([0, 0.5, 0.15, 0.3]) / np.sqrt([0.5, 0.15, 0.3]).sum()),
        (Sampling(temperature=1.0, min_p=1.0), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.0), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(temperature=1e-320), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), np.array([0.0025, 0.25, 0.0225, 0.09]) / 0.365),
    ],
)
def test_draws_have_the_right_frequencies(sampling, expected):
    # 4000 draws: a standard error below 0.008, and the generator is seeded
    np.testing.assert_allclose(frequencies(Sampling(**{**vars(sampling), "seed": 0})), expected, atol=0.025)


def test_an_impossible_token_is_never_drawn():
    logits = LOGITS.copy()
    logits[1] = -np.inf
    assert draws(logits, 3.0).keys() == {0, 2, 3}


HOWS = [
    (1.0, None, None, None),
    (0.7, 5, None, None),
    (0.7, 200, 0.9, None),
    (1.3, None, 0.5, None),
    (1.3, None, 0.999999, None),
    (0.05, None, 0.9, None),
    (1.0, None, None, 0.1),
    (1.0, 50, 0.95, 0.05),
    (3.0, None, 0.3, 0.5),
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "equal", "deep"])
def test_sampling_without_sorting_draws_from_what_a_sort_leaves(monkeypatch, kind, how):
    random = np.random.default_rng(5)
    logits = {
        "peaked": random.normal(size=700) * 6,
        "flat": random.normal(size=700) * 0.05,
        "ties": random.integers(-4, 4, 700),
        "equal": np.full(700, 2.5),
        "deep": -np.linspace(0, 300, 700)[random.permutation(700)],
    }[kind].astype(np.float32)
    expected, kept = kept_by_sorting(logits, *how), kept_without_sorting(monkeypatch, logits, *how)
    kept = {token: share for token, share in kept.items() if share}
    expected = {token: share for token, share in expected.items() if share}
    assert kept.keys() == expected.keys()
    np.testing.assert_allclose([kept[token] for token in expected], list(expected.values()), rtol=1e-12)


@needs_transformers
@pytest.mark.parametrize("how", HOWS)
def test_what_is_drawn_from_is_what_transformers_leaves(monkeypatch, how):
    import torch
    from transformers.generation import logits_process as judge

    temperature, top_k, top_p, min_p = how
    processors = [judge.TemperatureLogitsWarper(temperature)]
    processors += [judge.TopKLogitsWarper(top_k)] if top_k else []
    processors += [judge.TopPLogitsWarper(top_p)] if top_p else []
    processors += [judge.MinPLogitsWarper(min_p)] if min_p else []
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(size=900).astype(np.float32) * 3
        scores = torch.from_numpy(logits.copy())[None].double()
        for processor in processors:
            scores = processor(torch.zeros((1, 1), dtype=torch.long), scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        ours = np.zeros(900)
        for token, share in kept_without_sorting(monkeypatch, logits, *how).items():
            ours[token] = share
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


@needs_transformers
def test_repetition_penalty_and_bias_are_those_of_transformers():
    import torch
    from transformers.generation import logits_process as judge

    bias = {3: 1.5, 7: -2.0, 9: -np.inf}
    settings = {"repetition_penalty": 1.3, "logit_bias": bias}
    seen = []
    sampler = Sampler(
        Sampling(**settings, logits_processor=lambda ids, logits: (seen.append(logits), logits)[1]), PROMPT, None
    )
    ids = PROMPT.tolist()
    for seed in range(12):
        logits = np.random.default_rng(seed).normal(size=12).astype(np.float32)
        scores, so_far = torch.from_numpy(logits.copy())[None], torch.tensor([ids])
        scores = judge.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(so_far, scores)
        scores = judge.RepetitionPenaltyLogitsProcessor(1.3)(so_far, scores)
        ids.append(sampler.choose(logits))
        np.testing.assert_array_equal(seen[-1], scores[0].numpy())


def test_presence_and_frequency_penalties_count_the_answer_alone():
    """As OpenAI's API has it: logit - count * frequency - (count > 0) * presence."""
    seen = []
    hook = lambda ids, logits: (seen.append(logits.copy()), logits)[1]  # noqa: E731
    settings = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logits_processor": hook}
    sampler = Sampler(Sampling(**settings), np.array([0, 0, 1]), None)
    logits, counts = np.array([1.0, 0.9, -3.0], np.float32), np.zeros(3)
    chosen = []
    for _ in range(6):
        chosen.append(sampler.choose(logits))
        np.testing.assert_allclose(seen[-1], logits - counts * 0.25 - (counts > 0) * 0.5, rtol=1e-6)
        counts[chosen[-1]] += 1
    assert chosen == [0, 1, 0, 1, 0, 1]


def test_a_logits_processor_sees_prompt_and_answer_and_may_change_its_copy():
    seen = []

    def ban_the_last(ids, logits):
        seen.append(ids.tolist())
        logits[ids[-1]] = -np.inf
        return logits

    logits = LOGITS.copy()
    sampler = Sampler(Sampling(logits_processor=ban_the_last), np.array([0, 1]), None)
    assert [sampler.choose(logits) for _ in range(3)] == [3, 1, 3]
    assert seen == [[0, 1], [0, 1, 3], [0, 1, 3, 1]]
    assert np.array_equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"logit_bias": dict.fromkeys(range(4), -np.inf)}, "every one is banned"),
        ({"logits_processor": lambda ids, logits: logits * np.nan}, "not finite .*logits_processor"),
        ({"logits_processor": lambda ids, logits: logits[:2]}, r"array of shape \[2\]; expected the logits \[4\]"),
        ({"logit_bias": {1: 3e38, 2: 1e39}}, "not finite"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(settings, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        Sampler(Sampling(**settings), PROMPT[:0], never=None).choose(LOGITS)


def test_log_probabilities_are_those_of_the_model():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    ids, logprobs, log_sum = top_log_probabilities(logits, 5)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert ids.tolist() == np.argsort(-logits, kind="stable")[:5].tolist()
    np.testing.assert_allclose(logprobs, expected[ids], rtol=1e-6)
    assert log_sum == pytest.approx(np.log(np.exp(logits.astype(np.float64)).sum()))
    assert top_log_probabilities(logits, 0)[0].size == 0
    assert len(top_log_probabilities(logits, 50)[0]) == 50


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; expected a share from 0 to 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"min_p": "x"}, "min_p is 'x'; expected a number"),
        ({"top_k": True}, "top_k is True; expected a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number above 0"),
        ({"repetition_penalty": None}, "repetition_penalty is None"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; expected from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; expected a mapping"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias names the token '5'"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names the token -1"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias of token 1 is inf"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan"),
        ({"logit_bias": {1: "x"}}, "logit_bias of token 1 is 'x'"),
        ({"logits_processor": 5}, "logits_processor is 5; expected a function"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        Sampling(**settings)
