"""What parity is planned to hold; how near that is to a build's, `benchmarks/plan_accuracy.py` measures."""

from __future__ import annotations

from pathlib import Path

from arriero.export.pipeline.parity_plan import parity_memory
from arriero.export.pipeline.planned import PlannedTarget
from arriero.graphs.config import ModelConfig
from tests.toys import make_scout_toy


def planned(
    folder: Path, backend: str, lengths: list[int], memory: tuple[int | None, int | None] = (None, None)
) -> int:
    target = PlannedTarget(backend, backend, "any", "fp32", 256, 1, "float32", {"f32": 1000}, 1000, 0, {}, False)
    return parity_memory([], target, ModelConfig.load(folder), [(length, 0) for length in lengths], memory)


def test_steps_of_other_sizes_are_kept_on_tvm_up_to_two_of_the_largest(tmp_path: Path) -> None:
    folder = make_scout_toy(tmp_path / "toy", seed=1)
    once, two = (planned(folder, "tvm", lengths) for lengths in ([40], [40, 39, 40, 39]))
    each = two - once
    assert each > 0
    assert planned(folder, "tvm", [40, 39, 38, 37]) - once in range(int(2.8 * each), 3 * each)
    # a thousand sizes: as those that fit two steps of 512 tokens, which are twice what they compute in
    most = planned(folder, "tvm", [*range(1, 513), *range(512, 0, -1)])
    long = planned(folder, "tvm", [512])
    assert long < most < long + 2 * 512 * each / 39


def test_what_a_step_gave_lies_beside_a_step_of_the_same_size(tmp_path: Path) -> None:
    folder = make_scout_toy(tmp_path / "toy", seed=1)
    text = ModelConfig.load(folder).text
    given = 4 * (text.vocab_size + len(text.layers) * text.hidden_size)  # logits, and the hidden state after each layer
    once, again, others = (planned(folder, "tvm", lengths) for lengths in ([40], [40] * 5, [40, 39, 40, 39, 39]))
    assert again - once == 40 * given
    assert others - planned(folder, "tvm", [40, 39]) == 39 * given


def test_a_backend_without_a_pool_holds_the_largest_step_alone(tmp_path: Path) -> None:
    folder = make_scout_toy(tmp_path / "toy", seed=1)
    assert planned(folder, "onnxruntime", [40]) == planned(folder, "onnxruntime", [40, 39, 12])


def test_what_is_larger_than_memory_is_planned_with_many_cases_in_a_step(tmp_path: Path) -> None:
    folder = make_scout_toy(tmp_path / "toy", seed=1, attention_chunk_size=4096)
    fits, streamed = (planned(folder, "tvm", [100] * 30, (None, free)) for free in (2000, 500))
    assert fits == planned(folder, "tvm", [500] * 6)
    assert streamed == fits  # of 500 bytes there are none to spare
    text = ModelConfig.load(folder).text
    given = 4 * (text.vocab_size + len(text.layers) * text.hidden_size)
    budget = 4 * 1000 * given + 4
    many = planned(folder, "tvm", [100] * 30, (budget, 500))
    assert many == planned(folder, "tvm", [500] * 6, (budget, 500)) > fits
    assert planned(folder, "tvm", [100] * 30, (budget, 2000)) == fits
