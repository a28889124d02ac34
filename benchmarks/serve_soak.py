"""Hours of a server under clients that behave and clients that do not: no wrong answer, no 5xx, nothing that grows.

    python benchmarks/serve_soak.py BUNDLE --minutes 60 --log serve_soak.log

A server of the bundle answers `--clients` at once, who ask for text, pictures, forms and calls of tools, whole and
streamed, greedily and drawn; who leave in the middle, read slowly, send bodies too large, cut short, malformed or
forbidden. Each request is answered alone first, and every later answer to it must be the same, as TVM's kernels
promise: bit for bit with `--prefix-cache 0`. Where a prompt may go on from an answer, log probabilities are within
2e-5, for attention of one token sums in another order than that of many. Memory, threads and open files of the server
are read when all have been quiet after the first fifth of the time, and at the end. The log has a line for each minute.
The exit code is 1 where an answer differs, a status is not the one expected, or something grew by more than its limit.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from free_port import free_port
from PIL import Image

# Growth from the first fifth to the end, both quiet.
LIMITS = {"memory_mib": 16.0, "threads": 4, "files": 0}  # the threads of a pool, which come as they are needed
SETTLE_S = 10.0  # quiet before a reading counts
TOLERANCE = 2e-5  # of log probabilities behind a prefix that was read before
BODY = 32 << 20  # bytes of a body that a server takes
CHAT = "/v1/chat/completions"
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
FORM: dict[str, Any] = {"type": "object", "properties": {"x": {"enum": ["red", "blue"]}}, "required": ["x"]}
FORM |= {"additionalProperties": False}


def serve(bundle: Path, port: int, threads: int, batch: int, prefix_cache: int) -> None:
    """Serve the bundle; its template takes tools even where it writes none, for forced calls need none."""
    from arriero.runtimes.server.options import ServerOptions
    from arriero.runtimes.server.serve import open_bundles
    from arriero.runtimes.server.serve import serve as serve_bundles

    bundles = open_bundles([bundle], threads, batch, prefix_cache)
    for opened in bundles.by_name.values():
        assert opened.session is not None
        source = opened.session.processor._templates["default"].source
        if "tools" not in source.text:
            object.__setattr__(source, "text", source.text + "{# tools #}")
    serve_bundles(bundles, ServerOptions(port=port, most_body_bytes=BODY))


def make_bodies(count: int) -> list[dict[str, Any]]:
    """So many requests of every kind, no two alike."""
    bodies = []
    for number in range(count):
        draw = random.Random(number)
        body: dict[str, Any] = {"max_tokens": draw.randint(1, 48), "seed": number}
        body["temperature"] = draw.choice([0, 0.7, 1.5])
        content: Any = f"What is {draw.randint(0, 99)} + {draw.randint(0, 99)}?" + " And then?" * draw.choice(
            [0, 3, 60]
        )
        kind = number % 6
        if kind == 1:
            content = [picture(draw.choice([40, 90, 300]), draw), {"type": "text", "text": content}]
        elif kind == 2:
            body |= {"tools": [ADD], "tool_choice": "required", "max_tokens": 200}
        elif kind == 3:
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": FORM}}}
        elif kind == 4:
            body |= {"logprobs": True, "top_logprobs": 3, "n": 2, "stop": ["7"]}
        body["messages"] = [{"role": "user", "content": content}]
        bodies.append(body)
    return bodies


def picture(side: int, draw: random.Random) -> dict[str, Any]:
    """A picture of random pixels as a request has it."""
    pixels = np.random.default_rng(draw.randint(0, 9)).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


BAD: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[" * 5000, 400),
    (b'{"messages": "x"}', 400),
    (b"\xff\xfe", 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 100000000}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "colour": 1}', 400),
    (b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404),
    (
        b'{"messages": [{"role": "user", "content": "x"}], "response_format":'
        b' {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}',
        400,
    ),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":'
        b' {"url": "data:image/png;base64,iVBORw0KGgo="}}]}]}',
        400,
    ),
    (b" " * (BODY + 1), 413),
)


class Soak:
    """The clients, what they saw, and the server that they ask."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, bodies: list[dict[str, Any]], exact: bool) -> None:
        self.process, self.port, self.bodies = process, port, bodies
        self.tolerance = 0.0 if exact else TOLERANCE
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.alone: list[list[dict[str, Any]]] = []
        self._lock = threading.Lock()

    def web(self) -> httpx.Client:
        """A client of the server."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=600)

    def ask_alone(self) -> None:
        """Answer every request by itself; what comes is what must always come."""
        with self.web() as web:
            for body in self.bodies:
                answer = web.post(CHAT, json=body)
                if answer.status_code != 200:
                    raise SystemExit(f"a request alone: {answer.status_code} {answer.text}")
                self.alone.append([kept(choice) for choice in answer.json()["choices"]])

    def run(self, clients: int, seconds: float, seed: int) -> None:
        """Let so many clients ask for so long."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(seed + n, end)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, seed: int, end: float) -> None:
        draw = random.Random(seed)
        ways = {self._whole: 8, self._streamed: 8, self._leave: 3, self._read_slowly: 1, self._refused: 4, self._cut: 1}
        with self.web() as web:
            while time.monotonic() < end:
                way = draw.choices([*ways], [*ways.values()])[0]
                try:
                    way(web, draw)
                except Exception as error:
                    self._fault(f"{way.__name__}: {type(error).__name__}: {error}")
                with self._lock:
                    self.counts[way.__name__.strip("_")] += 1

    def _fault(self, sentence: str) -> None:
        with self._lock:
            self.faults.append(sentence)

    def _check(self, number: int, choices: list[dict[str, Any]]) -> None:
        if not same(choices, self.alone[number], self.tolerance):
            self._fault(f"request {number} is answered {choices!r:.300}, alone {self.alone[number]!r:.300}")

    def _whole(self, web: httpx.Client, draw: random.Random) -> None:
        number = draw.randrange(len(self.bodies))
        answer = web.post(CHAT, json=self.bodies[number])
        if answer.status_code == 200:
            self._check(number, [kept(choice) for choice in answer.json()["choices"]])
        else:
            self._fault(f"request {number}: {answer.status_code} {answer.text:.200}")

    def _streamed(self, web: httpx.Client, draw: random.Random, pause: float = 0.0) -> None:
        number = draw.randrange(len(self.bodies))
        with web.stream("POST", CHAT, json={**self.bodies[number], "stream": True}) as answer:
            if answer.status_code != 200:
                self._fault(f"request {number}, streamed: {answer.status_code}")
                return
            self._check(number, joined(events(answer.iter_lines(), pause), len(self.alone[number])))

    def _read_slowly(self, web: httpx.Client, draw: random.Random) -> None:
        self._streamed(web, draw, pause=draw.uniform(0.05, 0.3))

    def _leave(self, web: httpx.Client, draw: random.Random) -> None:
        body = {**draw.choice(self.bodies), "stream": True, "max_tokens": 200}
        with web.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(draw.randint(0, 12)):
                next(lines, None)

    def _refused(self, web: httpx.Client, draw: random.Random) -> None:
        content, status = draw.choice(BAD)
        answer = web.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        if answer.status_code != status:
            self._fault(f"{content!r:.80} is answered {answer.status_code} {answer.text:.200}, not {status}")

    def _cut(self, _: httpx.Client, draw: random.Random) -> None:
        """A body that ends in the middle: the client leaves after a while."""
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + b'{"messages": [')
            time.sleep(draw.uniform(0, 1))

    def state(self) -> dict[str, float]:
        """What the server holds now: MiB that are its own, threads, open files."""
        at = Path("/proc") / str(self.process.pid)
        status = dict(line.split(":", 1) for line in (at / "status").read_text().splitlines() if ":" in line)
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        return {"memory_mib": kib / 1024, "threads": len(os.listdir(at / "task")), "files": len(os.listdir(at / "fd"))}

    def quiet_state(self) -> dict[str, float]:
        """The least of each while nobody asks."""
        states = []
        for _ in range(int(SETTLE_S)):
            time.sleep(1)
            states.append(self.state())
        return {name: min(state[name] for state in states) for name in LIMITS}


def kept(choice: dict[str, Any]) -> dict[str, Any]:
    """What must be the same of a choice: its ids are its own."""
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    logprobs = (choice.get("logprobs") or {}).get("content") or None  # of an answer that is only closed
    return {"text": message["content"] or "", "calls": calls, "reason": choice["finish_reason"], "logprobs": logprobs}


def same(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two values of JSON are the same, numbers within `tolerance`."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other, [tolerance] * len(one)))
    return one == other


def events(lines: Iterator[str], pause: float) -> Iterator[dict[str, Any]]:
    """The events of a stream, read with a pause after each."""
    for line in lines:
        if line.startswith("data: {"):
            time.sleep(pause)
            yield json.loads(line.removeprefix("data: "))


def joined(chunks: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """What the chunks of a stream come to, in the form of `kept`."""
    choices: list[dict[str, Any]] = [{"text": "", "calls": [], "reason": None, "logprobs": None} for _ in range(count)]
    for chunk in chunks:
        if "error" in chunk:
            raise ValueError(chunk["error"])
        for part in chunk["choices"]:
            choice, delta = choices[part["index"]], part["delta"]
            choice["text"] += delta.get("content") or ""
            choice["calls"] += [call["function"] for call in delta.get("tool_calls") or ()]
            choice["reason"] = part["finish_reason"] or choice["reason"]
            if part.get("logprobs"):
                choice["logprobs"] = (choice["logprobs"] or []) + part["logprobs"]["content"]
    return choices


def grown(early: dict[str, float], end: dict[str, float]) -> list[str]:
    """What grew by more than its limit, as sentences."""
    return [
        f"{name} grew from {early[name]:.1f} to {end[name]:.1f}"
        for name, limit in LIMITS.items()
        if end[name] - early[name] > limit
    ]


def main() -> int:
    """Soak the server, write the log, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48, help="different ones")
    parser.add_argument("--threads", type=int, default=2, help="threads of the backend")
    parser.add_argument("--prefix-cache", type=int, default=64 << 20, help="bytes; few, so that it is full early")
    parser.add_argument("--log", type=Path, help="write the log there as well")
    parser.add_argument("--worker", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.bundle, options.worker, options.threads, options.clients, options.prefix_cache)
        return 0
    port = free_port()
    command = [sys.executable, __file__, str(options.bundle), "--worker", str(port)]
    command += ["--threads", str(options.threads), "--clients", str(options.clients)]
    command += ["--prefix-cache", str(options.prefix_cache)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        return soak(Soak(process, port, make_bodies(options.requests), not options.prefix_cache), options)
    finally:
        process.terminate()
        process.wait()


def soak(soak: Soak, options: argparse.Namespace) -> int:
    """Run the legs, tell of them, and give the exit code."""
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        print(lines[-1], flush=True)
        if options.log:
            options.log.write_text("\n".join(lines) + "\n")

    def show(state: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in state.items())

    def leg(minutes: float) -> dict[str, float]:
        left, seed = minutes * 60, len(lines)
        while left > 0:
            seconds = min(60.0, left)
            soak.run(options.clients, seconds, 1000 * seed)
            left, seed = left - seconds, seed + 1
            tell(f"{soak.counts.total()} requests {dict(soak.counts)}, {len(soak.faults)} faults; {show(soak.state())}")
        return soak.quiet_state()

    with soak.web() as web:
        while soak.process.poll() is None:
            try:
                web.get("/health")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            raise SystemExit("the server ended")
    soak.ask_alone()
    tell(f"{options.bundle.name}: {len(soak.bodies)} requests answered alone; {show(soak.state())}")
    early = leg(options.minutes / 5)
    tell(f"quiet after the first fifth: {show(early)}")
    end = leg(options.minutes * 4 / 5)
    tell(f"quiet at the end: {show(end)}")
    for sentence in [*soak.faults[:20], *(growths := grown(early, end))]:
        tell(sentence)
    tell(f"{soak.counts.total()} requests, {len(soak.faults)} faults, {len(growths)} of {len(LIMITS)} grew")
    return int(bool(soak.faults or growths))


if __name__ == "__main__":
    sys.exit(main())
