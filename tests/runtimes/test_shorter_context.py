"""Bundles that are opened for shorter sequences than they were built for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.memory_cap import cache_bytes
from arriero.runtimes.server.serve import open_bundles
from tests.command import arriero as arriero_command

SHORT = 40


def test_a_session_takes_no_more_than_it_is_opened_for(workshop: Path) -> None:
    bundle = workshop / "bundles" / "fp32"
    with arriero.load(bundle) as session:
        expected = session.generate("What is 17 + 25?", max_tokens=8).token_ids
        longer = "What is 17 + 25? " * 6
        assert session.encode(longer).input_ids.size > SHORT
    with arriero.load(bundle, context=SHORT) as session:
        assert session.context == SHORT
        assert session.generate("What is 17 + 25?", max_tokens=8).token_ids == expected
        answer = session.generate("What is 17 + 25?")
        assert answer.prompt_tokens + len(answer.token_ids) <= SHORT
        with pytest.raises(ArrieroError, match=rf"expected at most {SHORT} tokens"):
            session.generate(longer)


@pytest.mark.parametrize("context", [0, -3, 10_000_000])
def test_a_context_that_it_was_not_built_for_is_refused(workshop: Path, context: int) -> None:
    bundle = workshop / "bundles" / "fp32"
    most = open_manifest(bundle).target.context
    with pytest.raises(ArrieroError, match=rf"context is {context}.*expected 1 to {most} tokens"):
        arriero.load(bundle, context=context)
    with pytest.raises(ArrieroError, match="context is 'much'"):
        arriero.load(bundle, context="much")  # type: ignore[arg-type]


def test_a_cap_sets_memory_aside_for_so_many_tokens_alone(tvm_workshop: Path) -> None:
    bundle = tvm_workshop / "bundles" / "int8"
    manifest = open_manifest(bundle)

    def kept(**settings: int) -> float:
        with pytest.raises(ArrieroError, match="too small") as refused:
            arriero.load(bundle, memory="1MiB", batch=64, **settings)
        number, unit = re.findall(r"([\d.]+) (KiB|MiB) of keys and values", str(refused.value))[0]
        return float(number) * (1 << 10 if unit == "KiB" else 1 << 20)

    for context in (manifest.target.context, manifest.target.context // 2, SHORT):
        assert kept(context=context) == pytest.approx(64 * cache_bytes(manifest.model, context, 4), rel=0.02)


@pytest.mark.parametrize("memory", [None, 4 << 30])
def test_a_server_opens_it_so_too(workshop: Path, memory: int | None) -> None:
    opened = open_bundles([workshop / "bundles" / "fp32"], 1, None, 0, memory, context=SHORT)
    try:
        (bundle,) = opened.by_name.values()
        assert bundle.context == SHORT
        bundle.open()
        assert bundle.session is not None
        assert bundle.session.context == SHORT
    finally:
        opened.close()


def test_the_commands_say_what_was_asked(workshop: Path) -> None:
    refused = arriero_command("run", workshop / "bundles" / "fp32", "What is 17 + 25? " * 6, "--context", SHORT)
    assert refused.code == 2
    assert f"at most {SHORT} tokens" in " ".join(refused.err.split())
