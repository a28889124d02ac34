"""What the docs show works: every command that can run here is run, every build file planned, every link followed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from arriero.export.build_file.read import load_build
from arriero.export.cli.app import app
from arriero.export.pipeline.plan import make_plan
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.data import make
from arriero.profiles.recipe import load_profile
from arriero.runtimes.proof.scorers import same_answer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
INSTALLS = "-m venv"  # run in a bare environment by tests/test_first_screen.py
BLOCK = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)


def blocks(page: Path, kind: str) -> list[str]:
    """The page's blocks of a kind, without those that a note takes out."""
    found = [match for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match["kind"] == kind]
    return [match["text"] for match in found if not (match["note"] or "").startswith(("not ", "a profile"))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the repository's own, with its bundles built on fewer cases, and sample sets of a user's."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "build.yaml").write_text((ROOT / "build.yaml").read_text().replace("samples: 200", "samples: 20"))
    (own,) = blocks(ROOT / "docs" / "your-own-model.md", "yaml")
    (folder / "own.yaml").write_text(own)
    (folder / "data").mkdir()
    for name, seed in (("seen", 1), ("held-out", 2)):
        samples = [sample for family in ("arithmetic", "sorting") for sample in make(family, 12, seed)]
        lines = [{"prompt": sample.turns[0].question, "answer": sample.answer} for sample in samples]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("arriero build build.yaml", folder)
    return folder


def run(commands: str, folder: Path) -> str:
    """Run shell commands with the `arriero` of this environment; gives what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, workplace):
    commands = [text for text in blocks(page, "sh") if INSTALLS not in text]
    if page.stem in ("quickstart", "your-own-model", "ci", "profiles"):
        assert commands
    for text in commands:
        run(text, workplace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_build_files_of_a_page_are_planned(page, workplace):
    for text in blocks(page, "yaml"):
        (workplace / "shown.yaml").write_text(text)
        assert make_plan(load_build(workplace / "shown.yaml")).targets
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["kind"] == "yaml" and match["note"] and match["note"].startswith("a profile"):
            (workplace / "profile.yaml").write_text(match["text"])
            profile = load_profile(str(workplace / "profile.yaml"))
            assert profile.assign(Checkpoint.open(ROOT / "models" / "chasqui").tensors)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_a_new_machine_is_given_our_wheel_by_its_place(page):
    """No registry has us, and a shell takes the brackets of an extra without quotes for a pattern."""
    for quote, rest in re.findall(r"(.)arriero\[[\w,-]+\](.{8})", page.read_text(encoding="utf-8")):
        assert (quote, rest) == ('"', " @ file:")


def test_the_embedding_example_answers(workplace, monkeypatch, capsys):
    (code,) = blocks(ROOT / "docs" / "python-api.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(workplace)
    exec(compile(code, "python-api.md", "exec"), {})
    first, second = capsys.readouterr().out.split(" s to the first token\n")
    assert first.startswith("42 stop")
    assert re.fullmatch(r"a \w+ \w+ at the [\w ]+\.?", second.strip())


def test_a_held_out_image_question_is_answered_by_the_command(workplace, tmp_path, capsys):
    sample = make("colour", 1, 4242)[0]
    Image.fromarray(sample.images[0]).save(tmp_path / "scene.png")
    question, bundle = sample.turns[0].question, str(workplace / "bundles" / "portable-int8")
    app(["run", bundle, question, "--image", str(tmp_path / "scene.png")], standalone_mode=False)
    assert same_answer(sample.answer, capsys.readouterr().out)


def build_site(pages: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(pages), str(site)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_site_builds_and_no_link_in_it_leads_nowhere(tmp_path):
    done = build_site(ROOT / "docs", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "site" / "python-api.html").read_text(encoding="utf-8")
    for name in ("load", "Session.generate", "Sampling", "MachineLacks"):
        assert f'id="arriero.{name}"' in shown


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "limits.md").open("a") as page:
        page.write("\nSee [nowhere](no-such-page.md) and [no heading](parity.md#no-such-heading).\n")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        str(tmp_path / "docs"),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no-such-page" in done.stderr
    assert "no-such-heading" in done.stderr


def test_every_file_that_the_readme_names_is_there():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text(encoding="utf-8"))
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_page_is_in_the_index_and_the_readme():
    index, readme = (path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "index.md", README))
    for page in PAGES:
        if page.stem != "index":
            assert re.search(rf"^{page.stem}$", index, re.M), page
            assert f"docs/{page.name}" in readme, page
