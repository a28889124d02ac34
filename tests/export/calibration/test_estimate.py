"""What calibration is said to take, against what it takes on a layer large enough to show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from arriero.export.calibration.calibrate import Calibration
from arriero.export.calibration.estimate import (
    calibration_memory,
    embedded_size,
    process_memory,
    rounding_leaves,
    walk_disk,
)
from arriero.export.machine.memory_watch import MemoryWatch
from arriero.export.pipeline import record_plan
from arriero.export.pipeline.record_plan import record_memory
from arriero.export.proof import decoded_memory
from arriero.export.proof.decoded_memory import logit_groups
from arriero.export.proof.routed_rows import ROUTED
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.sources.released_configs import released_config
from tests.export.proof.test_walk_layers import LENGTH, SAMPLES, profile, walk_over
from tests.toys import load_reference, make_scout_toy

HIDDEN = 512
CHASQUI = Path(__file__).parents[3] / "models" / "chasqui"


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1, "num_local_experts": 1}
    return make_scout_toy(tmp_path_factory.mktemp("layer"), 1, vision=False, **sizes)


def resident() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found.group(1))


def test_memory_is_estimated_from_above_and_not_far_off(layer: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(layer)
    sizes = [(LENGTH, 0)] * SAMPLES
    infos = list(checkpoint.tensors.values())
    said = calibration_memory(ModelConfig.load(layer), infos, sizes, second=True, whole=False)
    said -= process_memory(ModelConfig.load(layer))
    walk = walk_over(load_reference(layer), tmp_path / "stage")
    before = resident()
    with MemoryWatch(interval=0.002) as memory:
        Calibration(walk, checkpoint, {"p": profile()}, tmp_path / "stage", lambda *_: None).run()
    taken = memory.peak - before
    # What earlier tests left free in the process is used again, so the measured end may be short, never long.
    assert taken < 1.1 * said
    moments = (2 * HIDDEN) ** 2
    assert said - rounding_leaves(infos) < 2 * (8 * 4.3 * moments)  # twice these and their factor
    plain = calibration_memory(ModelConfig.load(layer), infos, sizes, second=False, whole=False)
    plain -= process_memory(ModelConfig.load(layer))
    assert plain < said / 4


def test_disk_is_what_lies_there_while_a_layer_is_seen(layer: Path, tmp_path: Path) -> None:
    walk = walk_over(load_reference(layer), tmp_path / "stage")
    walk.embed()
    walk.observe(0)
    files = [*(tmp_path / "stage").glob("hidden-*.npy"), *(tmp_path / "stage" / name for name in ROUTED)]
    lying = sum(np.load(file, mmap_mode="r").nbytes for file in files)
    assert walk_disk(ModelConfig.load(layer), [(LENGTH, 0)] * SAMPLES, calibrates=True) == lying


def test_embedded_samples_are_never_larger_than_said(tmp_path: Path) -> None:
    from arriero.export.build_file.model_spec import model_spec
    from arriero.export.build_file.schema import Calibration as Wanted
    from arriero.export.samples.cases import draw_cases, encoded_sizes
    from arriero.runtimes.processor.processor import Processor
    from tests.small import small_scout

    config = ModelConfig.load(small_scout(tmp_path))
    processor = Processor(tmp_path, model_spec(config))
    sizes = encoded_sizes(draw_cases(Wanted(samples=120), ("text", "image")), processor, 10_000)
    tokens, tiles = embedded_size(config.vision)
    assert max(size[0] for size in sizes) <= tokens
    assert max(size[1] for size in sizes) <= tiles


def test_the_records_logits_are_those_of_the_cases_that_go_through_the_head_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Checkpoint.open(CHASQUI)
    config, used = checkpoint.model_config(), [*checkpoint.tensors.values()]
    vocabulary, hidden = config.text.vocab_size, config.text.hidden_size
    lengths = [400, *[100] * 99]
    sizes = [(length, 0) for length in lengths]
    beside = process_memory(config) + record_plan.LOGITS_BESIDE
    # what the head makes of its rows, all of them, before it is put where the group's logits are
    together = 4 * vocabulary * sum(lengths)
    assert record_memory(config, used, sizes, "forced") == beside + 2 * together + 8 * vocabulary * hidden
    monkeypatch.setattr(decoded_memory, "LOGITS", 4 * vocabulary * 1000)
    assert [(group.start, group.stop) for group in logit_groups(lengths, config.text)][:2] == [(0, 7), (7, 17)]
    together = 4 * vocabulary * 1000
    assert record_memory(config, used, sizes, "forced") == beside + 2 * together + 8 * vocabulary * hidden
    assert [*logit_groups([5, 2000, 5], config.text)] == [range(1), range(1, 2), range(2, 3)]
    assert [*logit_groups([], config.text)] == []
    scout = ModelConfig.from_dict(released_config("scout"), "scout").text
    # 4 bytes of 5,120 x (2 x 40 + 2 x 8) x 128 of attention and of 3 x 5,120 x 8,192 of the shared expert: 934 tokens
    assert [*logit_groups([130] * 32, scout)] == [range(start, min(start + 7, 32)) for start in range(0, 32, 7)]
