"""What a server gives to several clients at once, ours and llama.cpp's in turn: throughput, gaps, second turns.

    python benchmarks/random_model.py bundles/mini
    arriero build benchmarks/serving.yaml
    python benchmarks/serve_load.py tvm-int4=bundles/serving/tvm-int4 --gguf Q4_0=mini-Q4_0.gguf --llama-server PROGRAM

Every server is started once and idle while another is asked; clients stream `/v1/completions` over HTTP from prompts of
random tokens that no other prompt begins with. Tokens that close an answer are forbidden, and so are those without text
of their own, control tokens and parts of characters: with the next token a server makes one piece of them, and the time
between two pieces would not be that between two tokens. Clients share the servers' processors and do little: they note
when a line came, and read it afterwards. In each round every server shows

* throughput: generated tokens/s of all clients together, from the moment that the last of them has its first token to
  the moment that the first one ends, for one client and for `--clients`;
* gaps: the 99th percentile of the time between two tokens of the other clients while a long prompt is read, over their
  median before it came; and the long prompt's time to its first token (TTFT) over that of one read alone;
* second turn: TTFT of a prompt that goes on from the long one, over the first's.

Medians over the rounds are printed. The ceiling is what the bytes that a step of so many rows reads allow: its core,
and of each layer's experts as many as rows draw on average, at the bandwidth with which the same threads read memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contenders import read_anew
from free_port import free_port
from roofline import build_probe, make_buffer, read_bandwidth
from timed_bundle import touched_bytes
from tokenizers import Tokenizer

from arriero.runtimes.manifest import Manifest

SHORT = 32  # tokens of a prompt whose answer counts
NEW = 32  # tokens of a second turn
SETTLE_S = 3.0  # others decode so long before the long prompt comes
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n"
)


@dataclass
class Answer:
    """When the pieces of one answer came (seconds of a monotonic clock), and how many tokens it has."""

    asked: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] - self.asked

    def tokens_between(self, start: float, stop: float) -> float:
        """Tokens that came in a span of time; a piece stands for its share of them all."""
        return self.tokens / len(self.times) * sum(start < at <= stop for at in self.times)


class Server:
    """One server under test."""

    def __init__(self, name: str, command: list[str], port: int, model: str, forbidden: list[int]) -> None:
        self.name, self.port, self.model, self.forbidden = name, port, model, forbidden
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        """Return once it takes requests. Raises SystemExit with what it printed where it ends instead."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        self.log.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self.log.read()}")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()

    async def ask(self, prompt: list[int], tokens: int) -> Answer:
        """Stream a completion of `prompt`, greedily and to the last of its `tokens`, each of them a piece."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in self.forbidden},
        }
        content = json.dumps(body).encode()
        answer, came = Answer(time.monotonic()), list[tuple[float, bytes]]()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(HEAD % len(content) + content)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise SystemExit(f"{self.name} answers {head.decode()}{(await reader.read()).decode()}")
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    came.append((time.monotonic(), line))
        finally:
            writer.close()
        for at, line in came:  # read when nobody waits: clients share the servers' processors
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise SystemExit(f"{self.name} ends a stream: {event['error']}")
            if event.get("choices") and event["choices"][0].get("finish_reason") is None:
                answer.times.append(at)
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
        return answer


class Prompts:
    """Prompts of ordinary tokens, no two alike."""

    def __init__(self, vocabulary: int, special: set[int]) -> None:
        self._draw = np.random.default_rng(0)
        self._ordinary = np.array([token for token in range(vocabulary) if token not in special])

    def make(self, tokens: int) -> list[int]:
        """A prompt of so many."""
        return [int(token) for token in self._draw.choice(self._ordinary, tokens)]


async def throughput(server: Server, prompts: Prompts, clients: int, tokens: int) -> float:
    """Generated tokens/s of `clients` at once, after the prompts of all and before the first of them ends."""
    answers = await asyncio.gather(*(server.ask(prompts.make(SHORT), tokens) for _ in range(clients)))
    start, stop = max(one.times[0] for one in answers), min(one.times[-1] for one in answers)
    return sum(one.tokens_between(start, stop) for one in answers) / (stop - start)


async def long_prompt(server: Server, prompts: Prompts, others: int, length: int) -> dict[str, float]:
    """What a prompt of `length` tokens does to `others`, they to it, and what a turn after it costs."""
    figures: dict[str, float] = {}
    alone = await server.ask(first := prompts.make(length), 2)
    second = await server.ask([*first, *prompts.make(NEW)], 2)
    figures |= {"ttft": alone.ttft, "second_turn": second.ttft / alone.ttft}
    # as long as the prompt is read: twice what it takes alone is allowed, tokens at half their usual time at most
    running = [asyncio.create_task(server.ask(prompts.make(SHORT), 1024)) for _ in range(others)]
    await asyncio.sleep(SETTLE_S)
    shared = await server.ask(prompts.make(length), 2)
    answers = await asyncio.gather(*running)
    came = shared.asked
    before = [gap for one in answers for at, gap in gaps(one) if at <= came]
    during = [gap for one in answers for at, gap in gaps(one) if came < at <= shared.times[0]]
    if not before or not during:
        raise SystemExit(f"{server.name}: the others had {len(before)} gaps before and {len(during)} during the prompt")
    figures["gap_before"] = statistics.median(before)
    figures["gap_p99"] = float(np.quantile(during, 0.99)) / figures["gap_before"]
    figures["ttft_shared"] = shared.ttft / alone.ttft
    return figures


def gaps(answer: Answer) -> Iterator[tuple[float, float]]:
    """The times between two pieces of an answer, each with the moment it ended."""
    for earlier, later in zip(answer.times, answer.times[1:], strict=False):
        yield later, later - earlier


def start(options: argparse.Namespace) -> tuple[dict[str, Server], dict[str, Path], Prompts]:
    """The servers by name, the bundles among them, and the prompts for the model of the first."""
    bundles = {name: Path(path) for name, _, path in (text.partition("=") for text in options.bundles)}
    files = {name: Path(path) for name, _, path in (text.partition("=") for text in options.gguf)}
    model = Manifest.read(next(iter(bundles.values()))).model
    words = Tokenizer.from_file(str(next(iter(bundles.values())) / "tokenizer" / "tokenizer.json"))
    texts = enumerate(words.decode_batch([[token] for token in range(model.vocab_size)]))
    no_piece = {token for token, text in texts if not text or "\ufffd" in text}
    forbidden, servers = sorted(no_piece | set(model.eos_token_ids)), {}
    for name, bundle in bundles.items():
        read_anew(bundle)
        port = free_port()
        command = [sys.executable, "-m", "arriero.export", "serve", str(bundle), "--port", str(port)]
        command += ["--batch", str(options.clients), "--threads", str(options.threads)]
        servers[name] = Server(name, command, port, bundle.name, forbidden)
    for name, file in files.items():
        read_anew(file)
        port, context = free_port(), options.clients * (2 * options.length + 2048)
        command = [options.llama_server, "-m", str(file), "--port", str(port), "-t", str(options.threads)]
        command += ["-np", str(options.clients), "-c", str(context), *options.llama_option]
        servers[name] = Server(name, command, port, name, forbidden)
    for server in servers.values():
        server.wait()
    return servers, bundles, Prompts(model.vocab_size, {*forbidden, model.image_token_id or 0})


def show(rounds: list[dict[str, dict[str, float]]], bandwidth: list[float], bundles: dict[str, Path], n: int) -> None:
    """Print medians over the rounds."""
    speed = statistics.median(bandwidth)
    print(f"{len(rounds)} rounds; memory read at {speed / 1e9:.1f} GB/s")
    head = f"{'':14} {'1 client':>9} {f'{n} clients':>10} {'times':>6} {'ceiling':>8} {'TTFT s':>7} {'shared':>7} "
    print(f"{head}{'gap ms':>7} {'p99':>6} {'2nd turn':>9}")
    for name in rounds[0]:
        mid = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        times = statistics.median(one[name]["all"] / one[name]["one"] for one in rounds)
        top = f"{n * speed / touched_bytes(Manifest.read(bundles[name]), n):8.0f}" if name in bundles else f"{'':8}"
        print(
            f"{name:14} {mid['one']:9.1f} {mid['all']:10.1f} {times:6.2f} {top} {mid['ttft']:7.2f} "
            f"{mid['ttft_shared']:7.2f} {1000 * mid['gap_before']:7.1f} {mid['gap_p99']:6.2f} {mid['second_turn']:9.1%}"
        )


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE", help="a peer's file for llama.cpp")
    parser.add_argument("--llama-server", default="llama-server", help="llama.cpp's program")
    parser.add_argument("--llama-option", action="append", default=[], help="one more of its options")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every server")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer whose speed counts")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every round there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        probe = build_probe(Path(folder))
    buffer = make_buffer()
    servers, bundles, prompts = start(options)
    rounds: list[dict[str, dict[str, float]]] = []
    bandwidth: list[float] = []
    try:
        for number in range(options.rounds):
            bandwidth.append(read_bandwidth(probe, buffer, options.threads))
            names = [*servers][number % len(servers) :] + [*servers][: number % len(servers)]
            figures: dict[str, Any] = {}
            for name in names:
                server = servers[name]
                asyncio.run(throughput(server, prompts, 1, 8))
                figures[name] = {
                    "one": asyncio.run(throughput(server, prompts, 1, options.tokens)),
                    "all": asyncio.run(throughput(server, prompts, options.clients, options.tokens)),
                    **asyncio.run(long_prompt(server, prompts, options.clients - 1, options.length)),
                }
                print(f"round {number + 1}, {name}: {figures[name]}", file=sys.stderr, flush=True)
            rounds.append({name: figures[name] for name in servers})
    finally:
        for server in servers.values():
            server.stop()
    show(rounds, bandwidth, bundles, options.clients)
    if options.json:
        options.json.write_text(json.dumps({"bandwidth": bandwidth, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
