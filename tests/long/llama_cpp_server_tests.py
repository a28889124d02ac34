"""llama.cpp's own server tests, run against `arriero serve` as a server that somebody else started.

    python -m tests.long.llama_cpp_server_tests BUNDLE [--only basic chat_completion]

The tests come in the source archive of `llama-cpp-python`, with the hook that leaves starting the server to others.
They run in a copy, where what belongs to their own tiny model is ours: names, words, counts of tokens (`ADAPTED`).
Files that ask for what no server of ours is (`ELSEWHERE`) are left out. Prints what passed, and what failed by its
reason: a path or a field that is llama.cpp's own, or what the test expected. The bundle's chat template has to take
tools. Needs the packages filelock, openai, requests and wget.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.long.released_package import unpacked
from tests.test_serve_command import free_port

VERSION = "0.3.36"
FOLDER = "vendor/llama.cpp/tools/server/tests"
NAME = "tinyllama-2"  # what the tests call their model
KEY = "sk-this-is-the-secret-key"
SECONDS = 1800  # for one file of tests

# What a copy has instead, and why.
ADAPTED = (
    (r'model="(?:gpt|davinci)[^"]*"', f'model="{NAME}"', "the model that is served"),
    (r'"model": "(?:test|gpt[^"]*)"', f'"model": "{NAME}"', "the model that is served"),
    (r'server\.model_alias = "llama-test-model"', f'server.model_alias = "{NAME}"', "the model that is served"),
    (r'"llama-test-model"', f'"{NAME}"', "the model that is served"),
    (r'"/chat/completions', '"/v1/chat/completions', "paths without /v1 are llama.cpp's own"),
    (r'"/(completions|models|responses)"', r'"/v1/\1"', "paths without /v1 are llama.cpp's own"),
    (r'base_url=f"http://\{server.server_host\}:\{server.server_port\}"', r'base_url=server.make_url("/v1")', "so too"),
    (r'\.startswith\("b"\)', '.startswith("arriero-")', "the program that answers"),
    (r"return \(\n\s+re\.compile", "return isinstance(text, str) or (re.compile", "its model's words"),
    (r'_tokens"\] == n_prompt', r'_tokens"] > 0', "its tokenizer's counts"),
    (r'_tokens"\] == n_predicted', r'_tokens"] <= n_predicted', "when its model ends"),
    (r'(finish_reason(?:"\])?) == (?:finish_reason\b|"length")', r'\1 in ("stop", "length")', "so too"),
    (r'\["content"\] is None', '["content"] in (None, "")', "a first chunk has an empty text as OpenAI's has"),
    (r"assert len\(choice\['delta'\]\['content'\]\) > 0.*", "pass", "a first chunk has an empty text as OpenAI's has"),
)
# What a failed test says, and what it asks for; the first that matches counts.
REASONS = (
    (r"There is no such path|404 ==", "a path of llama.cpp's own"),
    (r"([\w.\[\]]{1,60}) is not known here", r"a field of llama.cpp's own: \1"),
    (r"cors|static_assets", "pages of other origins; they are shut out"),
    (r"local_media|fetches nothing|huggingface\.co", "a picture from a file or the network"),
    (r"Template file .* does not exist|chat_template_file", "a chat template that llama.cpp makes"),
    (r"__verbose|timings|'content' in|KeyError: '(?:models|aliases|timings)'", "a field of answers of llama.cpp's own"),
    (r"context_size", "a context of 512 tokens"),
    (r"thinking is not possible|reasoning_content", "a model that thinks"),
)
ELSEWHERE = {
    "the model's kind": ("embedding", "infill", "rerank"),
    "the program's own tools, proxy and router": ("gcp", "mcp_servers", "proxy", "router", "sleep", "tools_builtin"),
    "slots and their files": ("ctx_shift", "kv_keep_only_active", "slot_save"),
    "files in GGUF": ("lora", "speculative"),
}
FILES = (
    *("basic", "chat_completion", "compat_anthropic", "compat_oai_responses", "completion", "ignore_eos", "metrics"),
    *("security", "stream", "template", "tokenize", "tool_call", "vision_api"),
)


def adapt(folder: Path) -> None:
    """Change the copy of the tests as `ADAPTED` says."""
    for file in (folder / "utils.py", *(folder / "unit").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for pattern, replacement, _ in ADAPTED:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        file.write_text(text, encoding="utf-8")


@contextmanager
def serving(bundle: Path, key: str | None) -> Iterator[int]:
    """`arriero serve` with the key; gives its port."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "ARRIERO_API_KEY"}
    if key is not None:
        environment["ARRIERO_API_KEY"] = key
    command = [sys.executable, "-m", "arriero.export", "serve", str(bundle), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit(f"the server ended with code {process.returncode}")
        yield port
    finally:
        process.terminate()
        process.wait()


def run(folder: Path, file: str, port: int) -> list[tuple[str, str | None]]:
    """Run one file of the tests: each test's name, and why it failed; None where it passed."""
    report = folder / f"{file}.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"unit/test_{file}.py", f"--junitxml={report}"]
    command += ["-o", "junit_logging=system-out", "-p", "no:cacheprovider"]
    environment = os.environ | {"DEBUG_EXTERNAL": "1", "PORT": str(port)}
    try:
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [(f"{file}: all", f"the file takes more than {SECONDS} s")]
    results = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        if case.find("skipped") is None:
            results.append((f"{file}: {case.get('name')}", None if bad is None else reason_of(case, bad)))
    return results


def reason_of(case: ElementTree.Element, bad: ElementTree.Element) -> str:
    """Why a test failed: what our server refused last, or else what the test expected."""
    text = f"{case.get('name')}\n{case.findtext('system-out') or ''}\n{bad.text or ''}\n{bad.get('message') or ''}"
    for pattern, reason in REASONS:
        if match := re.search(pattern, text):
            return match.expand(reason)
    said = re.findall(r"[\"']message[\"']: [\"'](.*?)[\"'],", text)
    expected = (bad.get("message") or "").partition("\n")[0]
    return f"expects {expected:.150}" + (f", answered {said[-1]:.150}" if said else "")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="*", default=FILES, choices=FILES, metavar="FILE")
    parser.add_argument("--json", type=Path, help="also write every test's reason there")
    options = parser.parse_args()
    source = unpacked("llama-cpp-python", VERSION, FOLDER)
    results: list[tuple[str, str | None]] = []
    with tempfile.TemporaryDirectory() as place:
        folder, bundle = Path(place) / "tests", Path(place) / NAME
        shutil.copytree(source, folder)
        shutil.copytree(options.bundle, bundle)
        adapt(folder)
        for key, files in ((None, [file for file in options.only if file != "security"]), (KEY, ["security"])):
            if not set(files) & set(options.only):
                continue
            with serving(bundle, key) as port:
                for file in files:
                    results += (of_file := run(folder, file, port))
                    reasons = [reason for _, reason in of_file]
                    print(f"{file}: {reasons.count(None)} of {len(reasons)} pass", flush=True)
                    for reason, count in Counter(reason for reason in reasons if reason).most_common():
                        print(f"  {count:3} {reason}", flush=True)
    print(f"{sum(reason is None for _, reason in results)} of {len(results)} pass")
    if options.json:
        options.json.write_text(json.dumps(dict(results), indent=1))


if __name__ == "__main__":
    main()
