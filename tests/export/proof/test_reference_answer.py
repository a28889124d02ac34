"""The ids that a case forces, in the record as in the comparison with the checkpoint."""

from dataclasses import replace

import numpy as np
import pytest

from arriero.export.proof.reference import open_reference
from arriero.export.proof.reference_answer import forced_ids
from arriero.graphs.checkpoint import Checkpoint
from tests.small import small_scout


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    checkpoint = Checkpoint.open(small_scout(tmp_path_factory.mktemp("forced") / "scout"))
    return open_reference(checkpoint, text_only=False).spec


@pytest.mark.parametrize(
    ("answer", "closing", "expected"),
    [([8], (1, 2), [7, 8, 2]), ([], (1, 2), [7, 8]), ([8], (), [7, 8])],
    ids=["the likelier closing token", "no answer", "a model without closing tokens"],
)
def test_forced_ids_end_with_the_closing_token_of_an_answer(spec, answer, closing, expected):
    last = np.array([0.0, 1.0, 3.0, 9.0], np.float32)
    fed = np.array([7, 8])
    forced = forced_ids(fed, np.array(answer, np.int64), last, replace(spec, eos_token_ids=closing))
    assert forced.tolist() == expected
