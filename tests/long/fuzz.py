"""Damaged checkpoints, bundles, media, sample sets and build files: every one ends in an answer or a clear error.

    python -m tests.long.fuzz FOLDER [--cases 1000] [--seed 0] [--only bundle]

A case copies a sound input, damages one file of it by its seed, and gives it to the command in a process of its own. It
fails by a traceback, by an exit code that has no meaning for users, by more than 10 seconds of processor time, and,
where every byte is recorded in a manifest, by success with another answer. FOLDER is made when it is not there and can
be used again. Ends with exit code 1 and the failing seeds if there were any.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.command import arriero, write_build
from tests.long.mutations import mutate
from tests.small import small_scout

CPU_SECONDS, WALL_SECONDS = 10, 300
PROMPT = "What is 17 + 25?"
UNMEANT = 70  # the exit code of what nobody expected


@dataclass(frozen=True)
class Kind:
    """A kind of input: which files of the sound one may be damaged, and the command that reads it in folder `at`."""

    source: str
    files: Sequence[str]
    command: Callable[[Path], list[str]]
    recorded: bool = False  # every byte is in a manifest, so that success must give the same answer


def run_bundle(at: Path) -> list[str]:
    """A short answer."""
    return ["run", str(at), PROMPT, "--max-tokens", "2", "--json"]


def picture(at: Path) -> str:
    """The one picture in a folder, or a path where none is any more."""
    return str(next(at.iterdir(), at / "gone.png"))


def plan(at: Path) -> list[str]:
    """A plan of the build file beside the input."""
    return ["plan", str(at / "build.yaml"), "--json"]


LAYOUTS = {"compressed_tensors": "w4a16", "bitsandbytes": "nf4", "modelopt": "nvfp4", "gguf": "Q8_0", "meta": "2"}
KINDS = {
    "checkpoint": Kind("checkpoint", ("scout/*",), plan),
    **{name: Kind(name, ("model/*",), plan) for name in LAYOUTS},
    "adapter": Kind("adapter", ("lora/*",), plan),
    "bundle": Kind("bundles/fp32", ("*", "tokenizer/*"), run_bundle, recorded=True),
    "inspected": Kind("bundles/fp32", ("**/*",), lambda at: ["inspect", str(at), "--json"], recorded=True),
    "record": Kind("bundles/fp32", ("reference/*", "parity.json"), lambda at: ["parity", str(at), "--json"], True),
    "set": Kind("set", ("*.jsonl", "*.png"), plan),
    "build file": Kind("set", ("build.yaml", "profile.yaml"), plan),
    "media": Kind("media", ("*",), lambda at: [*run_bundle(at.parent / "sound"), "--image", picture(at)]),
}


def make_sound(folder: Path) -> None:
    """Write the sound inputs: a small checkpoint with its build file and bundles, a sample set, pictures."""
    checkpoint = folder / "checkpoint"
    small_scout(checkpoint / "scout")
    build = write_build(checkpoint / "build.yaml", Path("scout"), samples=4, output="../bundles")
    built = arriero("build", build)
    assert built.code == 0, built.err
    pixels = np.random.default_rng(3).integers(0, 256, (40, 70, 3), np.uint8)
    (folder / "media").mkdir()
    for suffix in ("png", "jpg", "gif", "webp", "tiff", "bmp"):
        Image.fromarray(pixels).save(folder / "media" / f"picture.{suffix}")
    sample = folder / "set"
    sample.mkdir()
    Image.fromarray(pixels).save(sample / "picture.png")
    shown = [{"role": "user", "content": [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What?"}]}]
    lines = [{"prompt": f"What is {n} + 4?", "answer": str(n + 4)} for n in range(6)]
    lines += [{"messages": shown, "answer": "a picture"}]
    (sample / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(Path(__file__).parents[2] / "profiles" / "int8.yaml", sample / "profile.yaml")
    write_build(sample / "build.yaml", checkpoint / "scout", profiles=("./profile.yaml",), samples=5)
    text = (sample / "build.yaml").read_text()
    (sample / "build.yaml").write_text(text.replace("{samples: 5, seed: 11}", "{set: set.jsonl}"))
    write_layouts(folder, checkpoint / "scout")
    (folder / "complete").touch()


def write_layouts(folder: Path, source: Path) -> None:
    """Write the checkpoint `source` in the layouts whose libraries are there, and an adapter for it."""
    import torch

    for name, kind in LAYOUTS.items():
        try:
            module = importlib.import_module(f"tests.layouts.{name}")
        except ImportError as error:
            print(f"without {name}: needs the package {error.name}")
            continue
        module.write(source, folder / name / "model", kind, torch.bfloat16)
        write_build(folder / name / "build.yaml", Path("model"), profiles=("as-stored",), samples=4)
    from safetensors.torch import save_file

    adapter = folder / "adapter"
    (adapter / "lora").mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False}
    (adapter / "lora" / "adapter_config.json").write_text(json.dumps(config))
    text = json.loads((source / "config.json").read_text())["text_config"]
    hidden, width = text["hidden_size"], text["intermediate_size"]
    stem = "base_model.model.language_model.model.layers.0.feed_forward.shared_expert.down_proj"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(hidden, 2)}
    save_file(factors, adapter / "lora" / "adapter_model.safetensors")
    file = write_build(adapter / "build.yaml", source, samples=4)
    file.write_text(f"adapters: [lora]\n{file.read_text()}")


def copy_sound(sound: Path, kind: Kind, into: Path, draw: random.Random) -> Path:
    """Copy the kind's sound input, large files as links to the same bytes; gives the file to damage."""
    source = sound / kind.source
    shutil.copytree(source, into, copy_function=lambda a, b: os.link(a, b), symlinks=True)
    files = [file for pattern in kind.files for file in sorted(into.glob(pattern)) if file.is_file()]
    chosen = draw.choice(files)
    if kind.source == "media":  # one picture alone, beside a sound bundle
        for file in files:
            if file != chosen:
                file.unlink()
        (into.parent / "sound").symlink_to(sound / "bundles" / "fp32")
    return chosen


@dataclass(frozen=True)
class Outcome:
    """How a case ended: exit code (negative: the signal), what was printed, and processor seconds."""

    code: int
    out: str
    err: str
    cpu: float

    def fault(self, sound: str | None) -> str | None:
        """What is wrong with it; `sound` is what the undamaged input prints, where it must be the same."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"took more than {CPU_SECONDS} s of processor time" if name == "SIGXCPU" else f"died by {name}"
        if "Traceback" in self.err:
            return "traceback: " + self.err.rstrip().splitlines()[-1]
        if self.code not in (0, 1, 2, 3):
            return f"exit code {self.code}: {self.err.rstrip()[-300:]}"
        if self.code and not self.err.strip():
            return f"exit code {self.code} without a word"
        if sound is not None and self.code == 0 and answer_of(self.out) != answer_of(sound):
            return "another answer, and nothing said"
        return None


def answer_of(out: str) -> object:
    """What must not change of a command's JSON: everything but times."""
    told = json.loads(out)
    return told.get("token_ids") or {key: told[key] for key in sorted(told) if key not in ("labels",)}


def run_case(command: list[str]) -> Outcome:
    """Run the command in a child of this process, which has loaded everything that it needs."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            signal.alarm(WALL_SECONDS)
            sys.stdin = open(os.devnull)  # noqa: SIM115
            sys.argv = ["arriero", *command]
            code = UNMEANT
            try:
                from arriero.export.__main__ import main

                main()
                code = 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, used = os.wait4(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(status), texts[0], texts[1], used.ru_utime + used.ru_stime)


def fuzz(sound: Path, cases: int, seed: int, only: Sequence[str] = ()) -> list[str]:
    """Run `cases` cases; gives a line for each that failed. The same seed gives the same cases."""
    preload()
    names = only or [name for name, kind in KINDS.items() if (sound / kind.source).exists()]
    answers: dict[str, str] = {}
    failed, ends, start = [], Counter[str](), time.monotonic()
    for number in range(seed, seed + cases):
        draw = random.Random(number)
        name = draw.choice(names)
        if name not in answers:
            answers[name] = sound_answer(sound, name)
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=sound) as place:
            at = Path(place) / "input"
            file = copy_sound(sound, KINDS[name], at, draw)
            way = mutate(file, draw)
            outcome = run_case(KINDS[name].command(at))
        ends[f"exit code {outcome.code}"] += 1
        if (fault := outcome.fault(answers[name] if KINDS[name].recorded else None)) is not None:
            failed.append(f"seed {number}: {name}, {way} of {file.relative_to(at)}: {fault}")
            print(failed[-1], flush=True)
    print(f"{cases} cases from seed {seed}, {time.monotonic() - start:.0f} s: {dict(ends)}, {len(failed)} failed")
    return failed


def sound_answer(sound: Path, name: str) -> str:
    """What the kind's command prints for the undamaged input, which it has to take."""
    with tempfile.TemporaryDirectory(prefix="sound-", dir=sound) as place:
        at = Path(place) / "input"
        copy_sound(sound, KINDS[name], at, random.Random(0))
        outcome = run_case(KINDS[name].command(at))
    assert outcome.code == 0, (name, outcome)
    return outcome.out


def preload() -> None:
    """Load what the commands load, so that a case is a fork; none of it may have started threads of its own."""
    import arriero.export.cli.app
    import arriero.export.pipeline.plan
    import arriero.export.proof.prove
    import arriero.runtimes.api  # noqa: F401


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the sound inputs are, or are to be made")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=(), choices=list(KINDS))
    arguments = parser.parse_args()
    if not (arguments.folder / "complete").exists():
        child = os.fork()  # libraries that the build starts threads in stay out of the parent of the cases
        if child == 0:
            make_sound(arguments.folder)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.wait()[1]):
            raise SystemExit("the sound inputs could not be made")
    raise SystemExit(1 if fuzz(arguments.folder.resolve(), arguments.cases, arguments.seed, arguments.only) else 0)


if __name__ == "__main__":
    main()
