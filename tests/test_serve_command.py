"""`arriero serve` as a process: it answers, refuses what is not safe, and stops when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from arriero.runtimes.api import load
from tests.command import arriero

MAIN = [sys.executable, "-m", "arriero.export"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_bundle_is_served_until_the_process_is_told_to_stop(workshop: Path, tmp_path: Path, how: int) -> None:
    bundle = workshop / "bundles" / "fp32"
    (tmp_path / "key").write_text("sesame\n")
    with serving(bundle, "--api-key-file", tmp_path / "key", "--threads", "1") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)
        answer = client.chat.completions.create(
            model="fp32", messages=[{"role": "user", "content": "What is 17 + 25?"}], max_tokens=5, temperature=0
        )
        with load(bundle, threads=1) as session:
            assert answer.choices[0].message.content == session.generate("What is 17 + 25?", max_tokens=5).text
        assert httpx.get(f"{url}/v1/models").status_code == 401
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"Serving fp32 at {url}/v1; chat in a browser at {url}/" in err
    assert "POST /v1/chat/completions 200" in err
    assert "17 + 25" not in err
    assert "Traceback" not in err


def test_bundles_are_opened_when_they_are_needed_within_a_memory(workshop: Path) -> None:
    bundles = [workshop / "bundles" / name for name in ("fp32", "int8")]
    with serving(*bundles, "--threads", "1", "--memory", "2GiB") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["fp32", "int8"]
        for number, name in enumerate(("fp32", "int8")):
            opened = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "bundle_open{" in line]
            assert sum(line.endswith(" 1.0") for line in opened) == number
            assert client.completions.create(model=name, prompt="What", max_tokens=3).usage.completion_tokens == 3
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert "opening int8" in err
    assert "Traceback" not in err


@contextmanager
def serving(*arguments: object, stderr: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`arriero serve` with `arguments` as a process that answers, and its URL."""
    port = free_port()
    command = [*MAIN, "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(command, stderr=stderr, text=True)
    try:
        for _ in range(600):
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.1)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()


def test_what_is_not_safe_or_not_there_is_refused(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARRIERO_API_KEY", raising=False)
    bundle = workshop / "bundles" / "fp32"
    for arguments, sentence in (
        (("--host", "0.0.0.0"), "could use the model without a key"),
        (("--api-key-file", tmp_path / "none"), "the key cannot be read"),
        (("--prefix-cache", "lots"), "is not a size"),
        (("--memory", "lots"), "is not a size"),
        (("--memory", "1MiB"), "there is no room for fp32"),
    ):
        done = arriero("serve", bundle, *arguments)
        assert (done.code, sentence in " ".join(done.err.split())) == (2, True), done.err
    twice = arriero("serve", bundle, bundle)
    assert (twice.code, "two bundles are called fp32" in twice.err) == (2, True)
    assert arriero("serve", tmp_path / "none").code == 2
    assert os.environ.get("ARRIERO_API_KEY") is None
