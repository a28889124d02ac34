"""JSON-Schema-Test-Suite, draft 2020-12: each schema is enforced as the suite judges it, or refused with a reason.

    python -m tests.long.json_schema_suite [--bundle BUNDLE] [--samples 2]

An instance that the suite calls invalid must not pass the constraint in any spelling: compact, with other spaces and
order of names, with every character escaped, with a name written twice. One that it calls valid should pass in some.
With a bundle its model also writes answers to every enforced schema, which the library `jsonschema` judges. The suite
comes in that library's source archive. Ends with exit code 1 where a schema is not what it seems.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.grammar import Form, Grammars
from arriero.runtimes.session import Session
from tests.long.released_package import unpacked

VERSION = "4.26.0"
MODEL = Path(__file__).parents[2] / "models" / "chasqui"
MOST_TOKENS = 120
# In this draft `format` is a note; these files alone take it for a rule, as we do.
JUDGES_FORMATS = "optional/format/"


@dataclass(frozen=True)
class Case:
    """One schema of the suite with its instances."""

    file: str
    description: str
    schema: Any
    tests: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """Where it stands."""
        return f"{self.file}: {self.description}"


@dataclass
class Outcome:
    """What became of the cases."""

    enforced: list[Case] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    instances: int = 0
    unwritable: list[str] = field(default_factory=list)  # valid, and the constraint lets none of its spellings pass
    faults: list[str] = field(default_factory=list)
    samples: int = 0
    unfinished: int = 0


def read_cases() -> list[Case]:
    """Every case of the draft, the optional ones too."""
    folder = unpacked("jsonschema", VERSION, "json") / "tests" / "draft2020-12"
    return [
        Case(file.relative_to(folder).as_posix(), case["description"], case["schema"], case["tests"])
        for file in sorted(folder.rglob("*.json"))
        for case in json.loads(file.read_text(encoding="utf-8"))
    ]


class Judge:
    """Asks a constraint, token by token, whether a text may be an answer."""

    def __init__(self, model: Path = MODEL) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._closing = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
        self._grammars = Grammars(model / "tokenizer.json", self._tokenizer.get_vocab_size(), self._closing)

    def refusal(self, schema: Any) -> str | None:
        """Why the schema is not taken; None where it is."""
        try:
            self._grammars.constrain(Form(json_schema=json.dumps(schema)))
        except ArrieroError as error:
            return str(error)
        return None

    def passes(self, schema: Any, text: str) -> bool:
        """Whether `text` may be a whole answer."""
        constraint = self._grammars.constrain(Form(json_schema=json.dumps(schema)))
        for token in self._tokenizer.encode(text, add_special_tokens=False).ids:
            if constraint.forbidden()[token]:
                return False
            constraint.take(token)
        return not all(constraint.forbidden()[self._closing])


def spellings(value: Any) -> set[str]:
    """Texts that JSON reads as `value`."""
    texts = set()
    for ordered in _orders(value):
        for numbers in (ordered, _whole(ordered)):
            texts |= {json.dumps(numbers, ensure_ascii=ascii_only) for ascii_only in (True, False)}
            texts.add(json.dumps(numbers, ensure_ascii=False, indent=1))
            texts.add(json.dumps(numbers, ensure_ascii=False, separators=(",", ":")))
    return texts | {_escaped(value), _twice(value)}


def _orders(value: Any) -> Iterator[Any]:
    """`value`, and where it has few members, the same with them in every other order."""
    if isinstance(value, dict) and len(value) <= 4:
        yield from map(dict, itertools.permutations(value.items()))
    else:
        yield value


def _whole(value: Any) -> Any:
    """`value` with 1 for 1.0."""
    if isinstance(value, dict):
        return {name: _whole(below) for name, below in value.items()}
    if isinstance(value, list):
        return [_whole(below) for below in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _escaped(value: Any) -> str:
    """JSON whose texts are escapes alone."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_escaped(name)}: {_escaped(below)}" for name, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_escaped, value)) + "]"
    if isinstance(value, str):
        units = value.encode("utf-16-be", "surrogatepass").hex()
        return '"' + "".join(rf"\u{units[at : at + 4]}" for at in range(0, len(units), 4)) + '"'
    return json.dumps(value)


def _twice(value: Any) -> str:
    """JSON that writes every name twice; readers take the last."""
    if isinstance(value, dict):
        members = [f"{json.dumps(name, ensure_ascii=False)}: {_twice(below)}" for name, below in value.items()]
        return "{" + ", ".join(member for member in members for _ in range(2)) + "}"
    return "[" + ", ".join(map(_twice, value)) + "]" if isinstance(value, list) else json.dumps(value)


def reason_of(refusal: str) -> str:
    """The kind of a refusal, for counting."""
    reason = re.sub(r"^json_schema (cannot be enforced|is): ", "", refusal).split(". Change it")[0]
    if keys := re.search(r"Unimplemented keys: \[(.*)\]", reason):
        return "keywords " + keys[1].replace('"', "")
    kinds = {
        "minProperties asks": "minProperties beyond the names that are required",
        "has a control character": "a control character",
        "not disjoint": "patterns of names that overlap",
        "Expected positive integer": "a count written as 2.0",
        "Unsatisfiable": "nothing can satisfy it",
        "JSON object": "true, false, or a number beyond 64 bits",
        "too many digits": "bounds of a number",
        "oneOf": "oneOf whose members overlap",
        "Resource ": "a reference to another document",
        "Unknown format": "unknown format",
        "regex parse error": "pattern beyond the regular expressions of the library",
        "Failed to generate regex": "bounds of a number",
    }
    return next((kind for start, kind in kinds.items() if start in reason), reason)


def check(cases: list[Case], judge: Judge) -> Outcome:
    """Put every instance of the cases before the constraint."""
    outcome = Outcome()
    for case in cases:
        if (refusal := judge.refusal(case.schema)) is not None:
            outcome.refused[reason_of(refusal)] += 1
            continue
        outcome.enforced.append(case)
        for test in case.tests:
            outcome.instances += 1
            passing = [text for text in sorted(spellings(test["data"])) if judge.passes(case.schema, text)]
            if passing and not test["valid"]:
                outcome.faults.append(f"{case.title}: lets {passing[0]:.80} pass ({test['description']})")
            elif test["valid"] and not passing:
                outcome.unwritable.append(f"{case.title}: {json.dumps(test['data']):.60}")
    return outcome


def sample(session: Session, cases: list[Case], count: int, outcome: Outcome) -> None:
    """Let the model answer each case's schema `count` times, and judge what it wrote whole."""
    for number, case in enumerate(cases):
        streams = [
            session.stream(
                "An example?", json_schema=case.schema, max_tokens=MOST_TOKENS, temperature=1.0, seed=count * number + n
            )
            for n in range(count)
        ]
        for stream in streams:
            answer = stream.wait()
            outcome.samples += 1
            if answer.finish_reason == "length":
                outcome.unfinished += 1
            elif (fault := fault_of(case, answer.text)) is not None:
                outcome.faults.append(f"{case.title}: the model wrote {answer.text!r:.80}: {fault}")


def fault_of(case: Case, text: str) -> str | None:
    """What `jsonschema` says against an answer."""
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER if case.file.startswith(JUDGES_FORMATS) else None
    try:
        jsonschema.Draft202012Validator(case.schema, format_checker=formats).validate(json.loads(text))
    except (json.JSONDecodeError, jsonschema.ValidationError) as error:
        return str(error).partition("\n")[0]
    return None


def lines(outcome: Outcome) -> Iterator[str]:
    """The counts as text."""
    refused = outcome.refused.total()
    yield f"{len(outcome.enforced) + refused} schemas: {len(outcome.enforced)} enforced, {refused} refused"
    for reason, count in outcome.refused.most_common():
        yield f"  {count:4} refused: {reason}"
    yield f"{outcome.instances} instances of the enforced, {len(outcome.unwritable)} valid that cannot be written:"
    yield from (f"  {text}" for text in outcome.unwritable)
    if outcome.samples:
        yield f"{outcome.samples} answers of the model, {outcome.unfinished} cut short by their tokens"
    yield f"{len(outcome.faults)} faults"
    yield from (f"  {text}" for text in outcome.faults)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle whose model also writes answers")
    parser.add_argument("--samples", type=int, default=2, help="answers to each schema")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    outcome = check(read_cases(), Judge())
    if options.bundle:
        with arriero.load(options.bundle, threads=options.threads, batch=8) as session:
            cases = [case for case in outcome.enforced if isinstance(case.schema, dict)]
            random.Random(0).shuffle(cases)
            sample(session, cases, options.samples, outcome)
    print("\n".join(lines(outcome)))
    raise SystemExit(1 if outcome.faults else 0)


if __name__ == "__main__":
    main()
