"""The README's example runs as it stands, and its build file is a valid one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from arriero.export.build_file.read import load_build
from arriero.export.cli.app import app
from arriero.export.pipeline.build import Build
from arriero.profiles.data import make
from arriero.runtimes.proof.scorers import same_answer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models of the repo and the README's own build file, built."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").symlink_to(ROOT / "models")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (folder / "build.yaml").write_text(yaml + "parity: {cases: {set: embedded, samples: 20, seed: 29}}\n")
    Build(load_build(folder / "build.yaml"), "build.yaml", lambda *_: None).run()
    return folder


def test_the_embedding_example_answers(workplace, monkeypatch, capsys):
    (code,) = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(workplace)
    exec(compile(code, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.split(" s to the first token\n")
    assert first.startswith("42 stop")
    assert re.fullmatch(r"a \w+ \w+ at the [\w ]+\.?", second.strip())


def test_a_held_out_image_question_is_answered_by_the_command(workplace, tmp_path, capsys):
    sample = make("colour", 1, 4242)[0]
    Image.fromarray(sample.images[0]).save(tmp_path / "scene.png")
    question, bundle = sample.turns[0].question, str(workplace / "bundles" / "portable-int8")
    app(["run", bundle, question, "--image", str(tmp_path / "scene.png")], standalone_mode=False)
    assert same_answer(sample.answer, capsys.readouterr().out)
