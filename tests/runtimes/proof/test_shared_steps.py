"""Cases that are read together: which are, that memory decides how many, and that no bit of a report changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
from PIL import Image

from arriero.export.proof.live_reference import LiveReference
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.api import load
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.memory_cap import given_bytes
from arriero.runtimes.proof import shared_steps
from arriero.runtimes.proof.parity import compare_logits, measure
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.record import ReferenceRecord
from arriero.runtimes.proof.shared_steps import MOST, SHARE, share_steps, tokens_together
from arriero.runtimes.session import Session

GIB = 1 << 30


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], []),
        ([40, 30, 30, 1], [[40, 30, 30], [1]]),
        ([3, 9, 9, 200, 9, 9], [[3], [9, 9], [200], [9, 9]]),  # one too short for others, one too long
        ([60, 60, 60, 40, 1, 100], [[60], [60], [60, 40], [1], [100]]),
    ],
)
def test_cases_share_a_step_in_their_order_as_far_as_it_goes(lengths: list[int], groups: list[list[int]]) -> None:
    assert list(share_steps(lengths, int, 9, 100)) == groups
    assert list(share_steps(lengths, int, 9, 0)) == [[length] for length in lengths]


def test_steps_are_large_only_where_each_reads_the_drive(tvm_workshop: Path) -> None:
    spec = ModelSpec.parse(ReferenceRecord.open(tvm_workshop / "bundles" / "fp32" / "reference").data["model"], "here")
    wide = replace(spec, vocab_size=200_000, hidden_size=5000, layers=spec.layers[:1] * 50)
    each = given_bytes(wide)
    assert each == 4 * 200_000 + 4 * 5000 * 50
    usual = tokens_together(wide, 10 * GIB, 6 * GIB, 20 * GIB)
    assert 100 < usual < 200
    assert tokens_together(wide, 10 * GIB, 6 * GIB, None) == usual
    assert tokens_together(wide, 40 * GIB, 6 * GIB, 20 * GIB) == 6 * GIB // SHARE // each
    assert tokens_together(wide, 40 * GIB, None, 7 * GIB) == 7 * GIB // SHARE // each
    assert tokens_together(wide, 40 * GIB, None, 20 * GIB) == MOST // each
    assert tokens_together(wide, 40 * GIB, GIB // 64, 20 * GIB) == usual  # a small budget shrinks no usual piece


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_report_is_the_same_whatever_cases_share_a_step(workshop: Path, tvm_workshop: Path, name: str) -> None:
    bundle, found, shared = tvm_workshop / "bundles" / name, [], list[int]()
    prompts = ["What is seventeen and", "Which gate", "Describe the path to the pass", "Say no", "Count to four, then"]
    cases = [ParityCase(prompt, "text", prompt) for prompt in prompts]
    cases.append(ParityCase("seen", "image", "this?", (Image.new("RGB", (32, 32), "red"),)))
    with load(bundle) as session:
        reference = LiveReference(Session(TorchBackend(workshop / "scout"), session.processor), cases, "forced")
        own = session.backend.forward_packed

        def packed(_self: object, embeds: object, counts: list[int], *rest: object, **named: object) -> object:
            shared.append(len(counts))
            return own(embeds, counts, *rest, **named)

        session.backend.forward_packed = MethodType(packed, session.backend)
        for together in (1, None, 40):
            shared.clear()
            report = measure(session, reference, {}, together=together)
            kl = [figures.token_kl.tolist() for figures in compare_logits(session, reference, together)]
            found.append((report.rows, report.layers, report.cases, kl))
            assert bool(shared) == (together != 1)
            assert together == 1 or max(shared) > 1
    assert found[0] == found[1] == found[2]


def test_what_is_too_short_or_crosses_a_chunk_is_read_alone(tvm_workshop: Path, monkeypatch) -> None:
    bundle = tvm_workshop / "bundles" / "fp32"
    record, seen = ReferenceRecord.open(bundle / "reference"), []

    def share(items, tokens, least, most):
        seen.append((least, most))
        return share_steps(items, tokens, least, most)

    monkeypatch.setattr(shared_steps, "share_steps", share)
    with load(bundle) as session:
        few, chunk = session.backend.few_rows, session.spec.attention_chunk_size
        assert not session.backend.packs
        list(compare_logits(session, record, 100_000))
        session.backend.packs = True  # as where no sum depends on how many rows there are
        list(compare_logits(session, record, 100_000))
        del session.backend.packs  # as of a backend that takes rows of one length alone
        list(compare_logits(session, record, 100_000))
    assert seen == [(few + 1, chunk), (2, chunk), (few + 1, 0)]
