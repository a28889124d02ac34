"""The Berkeley Function Calling Leaderboard's tools with `tool_choice: required`: every call over HTTP is a valid one.

    python -m tests.long.function_calls BUNDLE [--each 400] [--clients 8]

A call is valid where its name is one of the question's tools and its arguments are as that tool's schema has them, by
the library `jsonschema`. Questions and tools come in the wheel of `bfcl-eval`, whose own table translates the types of
its schemas; what a model that small says of the questions is not judged. Ends with exit code 1 where a call is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import openai

import arriero
from arriero.runtimes.server.bundles import Bundles
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.session import Session
from tests.long.released_package import unpacked
from tests.runtimes.server.conftest import Served, open_bundle

VERSION = "2026.3.23"
SETS = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple")
MOST_TOKENS = 1000
CLOSING, BIAS = ('"', "}", "]"), 10.0  # a model that has never seen a string writes it without end


@dataclass(frozen=True)
class Question:
    """One question with the tools that may be called, in OpenAI's form."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def read_questions(name: str) -> list[Question]:
    """The questions of a set."""
    folder = unpacked("bfcl-eval", VERSION, "bfcl_eval", source=False)
    types = _type_names(folder / "constants" / "type_mappings.py")
    lines = (folder / "data" / f"BFCL_v4_{name}.json").read_text(encoding="utf-8").splitlines()
    return [
        Question(entry["id"], entry["question"][0], [_tool(function, types) for function in entry["function"]])
        for entry in map(json.loads, lines)
    ]


def _type_names(file: Path) -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("bfcl_type_mappings", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GORILLA_TO_OPENAPI


def _tool(function: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """A function of the set as OpenAI's API has it, where names have no dots."""
    parameters = _translate(function["parameters"], types)
    named = {"name": function["name"].replace(".", "_"), "description": function["description"]}
    return {"type": "function", "function": named | {"parameters": parameters}}


def _translate(schema: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """A schema with the types of JSON, an unknown or missing one a string; a float says so in its format."""
    kind = schema.get("type", "string")
    written = schema | {"type": types.get(kind, "string")}
    if kind == "float":
        written["format"] = "float"
    if isinstance(schema.get("properties"), dict):
        written["properties"] = {name: _translate(below, types) for name, below in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        written["items"] = _translate(schema["items"], types)
    return written


def fault_of(question: Question, choice: Any) -> str | None:
    """What is wrong with an answer that had to be a call."""
    if choice.finish_reason != "tool_calls" or not choice.message.tool_calls:
        return f"no call, but {choice.finish_reason}: {choice.message.content!r:.200}"
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in question.tools}
    for call in choice.message.tool_calls:
        if call.function.name not in schemas:
            return f"calls {call.function.name!r:.60}, which is none of the tools"
        validator = jsonschema.Draft202012Validator(schemas[call.function.name])
        if error := next(validator.iter_errors(json.loads(call.function.arguments)), None):
            return f"{call.function.name}: {error.message:.200}"
    return None


def ask(client: openai.OpenAI, question: Question, seed: int, bias: dict[str, float], most: int) -> str | None:
    """What is wrong with the answer to a question; None where it is a valid call."""
    fields: dict[str, Any] = {"messages": question.messages, "tools": question.tools, "tool_choice": "required"}
    fields["logit_bias"] = bias
    fields["parallel_tool_calls"] = question.name.startswith("parallel")
    try:
        answer = client.chat.completions.create(model="model", max_tokens=most, seed=seed, **fields)
    except openai.APIStatusError as error:
        return f"{error.status_code}: {error.message:.300}"
    return fault_of(question, answer.choices[0])


def run(session: Session, each: int, clients: int, seed: int = 0) -> Iterator[tuple[str, int, list[str]]]:
    """For each set its name, how many of its questions were asked, and what was wrong with answers.

    Closes the session. The template takes tools and writes none: the grammar alone makes the calls.
    """
    template = session.processor._templates["default"]
    if "tools" not in template.source.text:
        object.__setattr__(template.source, "text", template.source.text + "{# tools #}")
    most = min(MOST_TOKENS, session.context // 2)  # the rest is for the question
    bias = {str(session.processor.tokenize(text)[-1]): BIAS for text in CLOSING}
    served = Served(Bundles([open_bundle("model", session)]), ServerOptions(port=0))
    try:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=1200)
        for name in SETS:
            questions = read_questions(name)
            drawn = random.Random(seed).sample(questions, min(each, len(questions)))
            with ThreadPoolExecutor(clients) as pool:
                faults = list(
                    pool.map(
                        ask, [client] * len(drawn), drawn, range(len(drawn)), [bias] * len(drawn), [most] * len(drawn)
                    )
                )
            wrong = [f"{question.name}: {fault}" for question, fault in zip(drawn, faults, strict=True) if fault]
            yield name, len(drawn), wrong
    finally:
        served.stop()
        session.close()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--each", type=int, default=400, help="questions of each set")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    session = arriero.load(options.bundle, threads=options.threads, batch=options.clients)
    total: Counter[str] = Counter()
    for name, asked, wrong in run(session, options.each, options.clients):
        print(f"{name}: {asked - len(wrong)} of {asked} are valid calls", flush=True)
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
        total += Counter(asked=asked, wrong=len(wrong))
    print(f"{total['asked'] - total['wrong']} of {total['asked']} are valid calls")
    raise SystemExit(1 if total["wrong"] else 0)


if __name__ == "__main__":
    main()
