"""Adapters that a graph switches between by row, on both CPU backends: as the reference with each of them merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.export.build_file.model_spec import model_spec
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower import onnxruntime as lower_onnxruntime
from arriero.graphs.lower.part import Lowering
from arriero.graphs.sources.runtime_adapters import RuntimeAdapters
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes.backend import Backend
from arriero.runtimes.onnxruntime import OrtBackend
from tests.adapters import save_adapter
from tests.toys import make_guard_toy, make_maverick_toy, make_scout_toy

LENGTH = 24
TOYS = {
    "scout": lambda folder: make_scout_toy(folder, 3, vision=False),
    "maverick": lambda folder: make_maverick_toy(folder, 2),
    "guard": lambda folder: make_guard_toy(folder, 5),
}
# Of other modules, and of other ranks: where they share none, and where one is padded to the other's.
ADAPTERS = {
    "attention": {"rank": 3, "modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "all": {"rank": 8, "modules": ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")},
}


class Wearing:
    """A toy's backend with two adapters, and the reference with none, or with one of them merged, by number."""

    def __init__(self, toy: Path, out: Path, backend: str, kernels: Path | None) -> None:
        folders = {
            name: save_adapter(toy, out / name, seed=number, **settings)
            for number, (name, settings) in enumerate(ADAPTERS.items())
        }
        config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
        adapters = RuntimeAdapters.read(checkpoint.tensors, folders)
        schemes = load_profile("fp32").assign(checkpoint.tensors)
        lowering = Lowering(config, checkpoint, schemes, out / "bundle", adapters=adapters)
        lowering.out_dir.mkdir()
        self.backend: Backend
        graphs = {
            part: trace(config, checkpoint, out / f"{part}.onnx")
            for part, trace in (("text", trace_text), ("embed", trace_embed))
        }
        if kernels is None:
            for part, graph in graphs.items():
                lower_onnxruntime.lower(part, graph, lowering)
            self.backend = OrtBackend(lowering.out_dir, model_spec(config), threads=1)
        else:
            from arriero.export.compile import Device
            from arriero.export.compile.tvm import compile_graphs
            from arriero.graphs.lower import tvm as lower_tvm
            from arriero.runtimes.tvm import TvmBackend

            for part, graph in graphs.items():
                lower_tvm.lower(part, graph, lowering)
            compile_graphs(lowering.out_dir, list(graphs), Device(kernels=kernels))
            self.backend = TvmBackend(lowering.out_dir, model_spec(config), threads=2)
        merged = [Checkpoint.open(toy), *(Checkpoint.open(toy, [folder]) for folder in folders.values())]
        self.references = [TorchBackend(one, text_only=True) for one in merged]


# Maverick's shape has dense and MoE layers; to compile the others' as well would take a minute.
BUILT = [*((toy, "onnxruntime") for toy in TOYS), ("maverick", "tvm")]


@pytest.fixture(scope="module", params=BUILT, ids=str)
def wearing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wearing:
    toy, backend = request.param
    folder = tmp_path_factory.mktemp("wearing")
    kernels = request.getfixturevalue("kernels") if backend == "tvm" else None
    return Wearing(TOYS[toy](folder / "toy"), folder, backend, kernels)


def embeds(backend: Backend, rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, LENGTH, backend.spec.hidden_size), np.float32)


def expected_logits(reference: TorchBackend, row: np.ndarray) -> np.ndarray:
    every = np.arange(LENGTH)
    return reference.forward(row[None], every[None], reference.new_cache(1, LENGTH), every).logits[0]


def test_a_prompt_is_read_as_with_its_adapter_merged(wearing: Wearing) -> None:
    (row,) = embeds(wearing.backend, 1)
    answers = []
    for number, reference in enumerate(wearing.references):
        cache = wearing.backend.new_cache(1, LENGTH)
        cache.adapters[:] = number
        pieces = [
            wearing.backend.forward(
                row[None, start:stop], np.arange(start, stop)[None], cache, np.arange(stop - start)
            ).logits[0]
            for start, stop in ((0, 9), (9, 16), (16, LENGTH))  # no piece crosses a chunk of 16
        ]
        answers.append(np.concatenate(pieces))
        expected = expected_logits(reference, row)
        assert np.abs(answers[-1] - expected).max() <= 1e-5 * np.abs(expected).max()
    for number in (1, 2):
        assert np.abs(answers[number] - answers[0]).max() > 1e-2 * np.abs(answers[0]).max(), "the adapter does nothing"


def test_rows_of_a_batch_decode_each_with_its_own_adapter(wearing: Wearing) -> None:
    numbers = [2, 0, 1, 2]
    rows = embeds(wearing.backend, len(numbers))
    cache = wearing.backend.new_cache(len(numbers), LENGTH)
    cache.adapters[:] = numbers
    expected = [expected_logits(wearing.references[number], row) for number, row in zip(numbers, rows, strict=True)]
    for position in range(LENGTH):
        at = np.full((len(numbers), 1), position)
        logits = wearing.backend.forward(rows[:, position : position + 1], at, cache, np.array([0])).logits[:, 0]
        for row, known in enumerate(expected):
            assert np.abs(logits[row] - known[position]).max() <= 1e-5 * np.abs(known).max()


def test_a_row_that_is_copied_or_restored_keeps_its_adapter(wearing: Wearing) -> None:
    (row,) = embeds(wearing.backend, 1)
    cache = wearing.backend.new_cache(2, LENGTH)
    cache.adapters[0] = 1
    wearing.backend.forward(row[None, :8], np.arange(8)[None], cache.rows(0, 1), np.array([0]))
    cache.copy_row(0, 1)
    assert list(cache.adapters) == [1, 1]
    fresh = wearing.backend.new_cache(1, LENGTH)
    fresh.restore(0, cache.snapshot(1))
    assert list(fresh.adapters) == [1]
    step = [
        wearing.backend.forward(row[None, 8:9], np.array([[8]]), one, np.array([0])).logits
        for one in (cache.rows(1, 2), fresh)
    ]
    assert np.array_equal(*step)


def test_what_cannot_be_switched_is_refused_for_all_adapters_at_once(tmp_path: Path) -> None:
    toy = make_scout_toy(tmp_path / "toy", 3, vision=False)
    folders = {
        "router": save_adapter(toy, tmp_path / "router", modules=("router",)),
        "good": save_adapter(toy, tmp_path / "good"),
        "head": save_adapter(toy, tmp_path / "head", modules=("q_proj", "lm_head")),
    }
    with pytest.raises(ArrieroError) as refused:
        RuntimeAdapters.read(Checkpoint.open(toy).tensors, folders)
    said = str(refused.value)
    assert "runtime_adapters.router: changes 4 tensors that cannot be switched" in said
    assert "runtime_adapters.head: changes 1 tensors that cannot be switched while a bundle runs, as " in said
    assert "lm_head.weight" in said
    assert "runtime_adapters.good" not in said
