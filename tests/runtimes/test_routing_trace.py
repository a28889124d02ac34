"""Traces of experts: what is written is read back, and the curve is that of a cache which is stepped through them."""

from __future__ import annotations

import json

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.routing_trace import Routes, hit_rates, read_trace, trace_routes
from tests.command import arriero as command


def stepped(ids, slots):
    """Hits of a cache of so many experts, in the words of its definition."""
    held, hits = [], 0
    for expert in ids:
        hits += expert in held
        held = [*(one for one in held if one != expert), expert][-slots:]
    return hits


def lists(experts):
    return {layer: ids.tolist() for layer, ids in experts.items()}


def test_the_curve_is_that_of_a_cache_that_is_stepped_through_the_trace():
    draw = np.random.default_rng(0)
    ids = draw.zipf(1.5, 300) % 16
    rates = hit_rates([Routes(100, {4: ids[:200, None]}), Routes(0, {4: ids[200:, None]})], 16)
    for slots in range(1, 17):
        hits = stepped(ids, slots) - stepped(ids[:100], slots)  # what the first prompt reads is not counted
        assert rates[4][slots - 1] == pytest.approx(hits / 200)


def test_several_experts_of_a_token_are_named_at_once():
    rates = hit_rates([Routes(0, {0: np.array([[1, 2], [2, 1], [3, 1], [2, 3]])})], 4)
    assert rates[0] == [0.25, 0.5, 0.625, 0.625]


def test_a_trace_without_answers_counts_every_token():
    assert hit_rates([Routes(3, {0: np.array([[1], [1], [2]])})], 2)[0] == [1 / 3, 1 / 3]


def test_a_trace_is_read_as_it_was_written(tmp_path):
    routes = [Routes(2, {1: np.array([[0], [3], [2]]), 3: np.array([[1], [1], [0]])}), Routes(1, {1: np.array([[2]])})]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(line for number, one in enumerate(routes) for line in one.lines(number)))
    for before, after in zip(routes, read_trace(file), strict=True):
        assert before.read == after.read
        assert lists(before.experts) == lists(after.experts)


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", "no json"])
def test_what_is_no_trace_is_refused(tmp_path, text):
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(ArrieroError, match=r"trace\.jsonl.*arriero trace"):
        read_trace(tmp_path / "trace.jsonl")
    with pytest.raises(ArrieroError, match="no such trace"):
        read_trace(tmp_path / "none")


def test_a_session_is_traced_as_it_routes(workshop):
    with arriero.load(workshop / "bundles" / "fp32", threads=1) as session:
        routes = trace_routes(session, "What is 17 + 25?", None, 9)
        encoded = session.encode("What is 17 + 25?")
        ids = np.concatenate([encoded.input_ids, session.generate(encoded, max_tokens=9).token_ids[:-1]])
        captured = session.logits(ids, captures=True).expert_ids
    assert routes.read == len(encoded.input_ids)
    assert lists(routes.experts) == lists({n: one[0] for n, one in captured.items()})


def test_the_command_writes_a_trace_of_texts_and_files(workshop, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "What is 3 + 4?"}) + "\n")
    file, bundle = tmp_path / "trace.jsonl", workshop / "bundles" / "fp32"
    done = command("trace", bundle, "What is 17 + 25?", questions, "--output", file, "--max-tokens", 5, "--json")
    assert done.code == 0, done.err
    summary, lines = done.json, [json.loads(line) for line in file.read_text().splitlines()]
    assert summary["lines"] == len(lines)
    assert {line["prompt"] for line in lines} == {0, 1}
    assert {line["layer"] for line in lines} == {n for n, _ in enumerate(read_trace(file)[0].experts)}
    assert len(summary["hit_rates"]) == summary["experts"]
    assert summary["hit_rates"] == sorted(summary["hit_rates"])
    shown = command("trace", bundle, "What is 17 + 25?", "--output", file, "--max-tokens", 5)
    assert "experts in memory" in shown.out
