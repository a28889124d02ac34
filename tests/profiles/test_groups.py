"""Named groups: every tensor of every shape of checkpoint is in one, and only in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.groups import GROUPS, LAYER_GROUPS, group_of, is_layer_matrix, layer_group
from tests.toys import make_maverick_toy, make_scout_toy

LAYER = "language_model.model.layers.12"


@pytest.mark.parametrize("make", [make_scout_toy, make_maverick_toy])
def test_every_tensor_is_in_one_group(tmp_path: Path, make) -> None:
    tensors = Checkpoint.open(make(tmp_path, 0)).tensors
    for tensor in tensors:
        assert [name for name, group in GROUPS.items() if re.fullmatch(group.names, tensor)] == [group_of(tensor)]
    missing = {"mlp"} if make is make_scout_toy else {"vision", "vision_layers", "projector"}
    assert {group_of(tensor) for tensor in tensors} == set(GROUPS) - missing


def test_a_layer_s_matrices_have_a_layer_and_a_group() -> None:
    assert layer_group(f"{LAYER}.feed_forward.experts.down_proj") == (12, "experts")
    assert layer_group(f"{LAYER}.feed_forward.shared_expert.up_proj.weight") == (12, "shared_expert")
    assert layer_group(f"{LAYER}.feed_forward.up_proj.weight") == (12, "mlp")
    assert layer_group(f"{LAYER}.self_attn.k_proj.weight") == (12, "attention")
    others = [f"{LAYER}.feed_forward.router.weight", f"{LAYER}.input_layernorm.weight", "vision_model.layers.0.up_proj"]
    for tensor in (*others, "model.nothing"):
        assert not is_layer_matrix(tensor)
        with pytest.raises(ValueError, match="no matrix of a decoder layer"):
            layer_group(tensor)
    assert group_of("model.nothing") is None


def test_groups_that_calibration_sees_have_no_reason_to_stay_exact() -> None:
    assert {name for name, group in GROUPS.items() if group.exact_because is None} == set(LAYER_GROUPS)
