"""The command line end to end on small random checkpoints: build, resume, prove, publish, run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from PIL import Image

import arriero as package
from arriero.export.cli.app import app
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.user_cache import VARIABLE
from tests.command import arriero, contents, write_build
from tests.conftest import workshop_profiles
from tests.small import small_guard, small_maverick, small_scout
from tests.stopping import run_and_kill, stages

PROMPT = "What is 17 + 25?"
# What the fp32 profile promises and the issue asks for.
PROVEN = {"router_agreement": 1.0, "same_top_token": 1.0, "logits_max_abs_error": 1e-4}


@pytest.fixture
def copy(workshop: Path, tmp_path: Path) -> Path:
    """The workshop with bundles and finished stages, to change. The checkpoint keeps its place, and so its stages."""
    shutil.copytree(workshop / "bundles", tmp_path / "bundles")
    write_build(
        tmp_path / "build.yaml",
        workshop / "scout",
        profiles=workshop_profiles(workshop),
        samples=8,
        answers="generated",
    )
    return tmp_path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# --- build


def test_the_fp32_bundle_equals_the_reference(workshop):
    told = arriero("parity", workshop / "bundles" / "fp32", "--json")
    assert told.code == 0
    assert told.json["passed"]
    rows = {row["metric"]: row for row in told.json["rows"]}
    assert rows["router_agreement"]["value"] == rows["same_top_token"]["value"] == 1.0
    assert rows["logits_max_abs_error"]["value"] <= PROVEN["logits_max_abs_error"]
    assert {name: rows[name]["threshold"] for name in PROVEN} == PROVEN
    assert rows["vision_relative_l2"]["value"] < 1e-5
    assert any(case["image_tiles"] > 1 for case in told.json["cases"])


def test_other_tools_take_the_onnx_files(workshop):
    """`onnx.checker` refuses weights with a second name, so a bundle shares none with the stage that made them."""
    for name in ("fp32", "int8"):
        graphs = sorted((workshop / "bundles" / name).glob("*.onnx"))
        assert [graph.name for graph in graphs] == ["embed.onnx", "text.onnx", "vision.onnx"]
        for graph in graphs:
            onnx.checker.check_model(graph)


def test_an_unchanged_build_does_nothing_and_loads_little(workshop):
    """No library that computes is imported, and each file of a bundle is read once, for its hash."""
    before, finished = contents(workshop / "bundles" / "int8"), stages(workshop / "bundles")
    script = """
import json, sys
opened = []
sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
from arriero.export.__main__ import main
sys.argv = ["arriero", "build", "build.yaml"]
try:
    main()
finally:
    print(json.dumps([opened, list(sys.modules)]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=workshop, capture_output=True, text=True, check=True)
    assert done.stdout.count("published") == 2
    assert contents(workshop / "bundles" / "int8") == before
    assert stages(workshop / "bundles") == finished
    opened, modules = json.loads(done.stdout.splitlines()[-1])
    assert not {"torch", "transformers", "onnxscript", "onnxruntime", "tvm", "tvm_ffi"} & set(modules)
    # the manifest says what the others are, so it is read before them
    reads = Counter(
        file for name in before if name != "manifest.json" for file in opened if file.endswith(f"/int8/{name}")
    )
    assert len(reads) == len(before) - 1
    assert {Path(file).name for file, count in reads.items() if count > 1} == {"parity.json"}  # its rows are shown


def test_the_plan_of_a_finished_build_says_so(workshop):
    planned = arriero("plan", workshop / "build.yaml", "--json").json
    assert planned["done"]
    assert [target["name"] for target in planned["targets"]] == ["fp32", "int8"]
    exact, rounded = (target["weights_bytes"] for target in planned["targets"])
    assert rounded < 0.75 * exact  # attention, the vision tower and the embedding table stay as they are
    assert "fp32" in arriero("plan", workshop / "build.yaml").out


@pytest.mark.parametrize("file", ["weights/text-00001.safetensors", "text.onnx", "manifest.json", "parity.json"])
def test_a_damaged_bundle_is_built_again(copy, file):
    """Where the stage shares the file by a hard link, damage in place reaches it, so that it is built again as well."""
    bundle = copy / "bundles" / "fp32"
    shared = next((copy / "bundles" / ".work").glob(f"lower-fp32-*/{file}"), None)
    if shared:
        (bundle / file).unlink()
        (bundle / file).hardlink_to(shared)
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    assert arriero("run", bundle, PROMPT, "--max-tokens", "2").code == 2
    done = arriero("build", copy / "build.yaml")
    assert done.code == 0, done.err
    assert arriero("run", bundle, PROMPT, "--max-tokens", "2").code == 0
    open_manifest(bundle, full=True)


def test_a_build_below_its_threshold_publishes_nothing(copy):
    before, finished = contents(copy / "bundles" / "fp32"), stages(copy / "bundles")
    thresholds = "{logits_max_abs_error: 0.0}"
    write_build(copy / "build.yaml", finished_model(copy), "text, image", ("fp32",), 8, thresholds, answers="generated")
    failed = arriero("build", copy / "build.yaml")
    assert failed.code == 1
    page = copy / "bundles" / "fp32.failed-parity.html"
    assert str(page) in failed.err
    assert "Logits, largest error" in failed.err
    assert "<svg" in page.read_text()
    assert contents(copy / "bundles" / "fp32") == before
    assert arriero("run", copy / "bundles" / "fp32", PROMPT, "--max-tokens", "2").code == 0
    refused = arriero("run", copy / "bundles" / "fp32.partial", PROMPT)
    assert (refused.code, "was not finished" in refused.err) == (2, True)
    refused = arriero("run", copy / "bundles" / "fp32.partial" / "new", PROMPT)
    assert (refused.code, "did not finish" in refused.err) == (2, True)
    kept = {name: at for name, at in stages(copy / "bundles").items() if not name.startswith("parity-")}
    assert kept.items() <= finished.items()
    # A threshold that can be met publishes the same weights anew, and the page of the failure goes.
    write_build(
        copy / "build.yaml",
        finished_model(copy),
        "text, image",
        ("fp32",),
        8,
        "{logits_max_abs_error: 0.01}",
        answers="generated",
    )
    assert arriero("build", copy / "build.yaml").code == 0
    assert not page.exists()
    assert contents(copy / "bundles" / "fp32")["text.onnx"] == before["text.onnx"]


def finished_model(folder: Path) -> Path:
    """The checkpoint that a build file in `folder` names."""
    return Path((folder / "build.yaml").read_text().split("model: ")[1].splitlines()[0])


def test_a_folder_that_is_no_bundle_is_never_replaced(copy):
    shutil.rmtree(copy / "bundles" / "int8")
    (copy / "bundles" / "int8").mkdir()
    (copy / "bundles" / "int8" / "thesis.txt").write_text("years of work")
    refused = arriero("build", copy / "build.yaml")
    assert refused.code == 2
    assert "is no bundle" in refused.err
    assert (copy / "bundles" / "int8" / "thesis.txt").read_text() == "years of work"


def test_what_users_keep_beside_and_in_bundles_survives_every_build(copy):
    """Whatever it is called; a file of theirs in a bundle is in the way of the next one."""
    output = copy / "bundles"
    for name in ("fp32.old-20261125", ".deleting-drafts", "int8.partial.mine"):
        (output / name).mkdir()
        (output / name / "thesis.txt").write_text("years of work")
    (output / "fp32" / "notes.txt").write_text("mine")
    mine = {str(file): file.read_text() for file in output.rglob("*.txt")}
    assert arriero("build", copy / "build.yaml").code == 0  # nothing to do
    shutil.rmtree(output / ".work")
    refused = arriero("build", copy / "build.yaml")
    assert (refused.code, "holds files that are not the bundle's: notes.txt" in refused.err) == (2, True)
    (output / "fp32" / "notes.txt").rename(copy / "notes.txt")
    assert arriero("build", copy / "build.yaml").code == 0
    assert {str(file): file.read_text() for file in output.rglob("*.txt")} | {
        str(output / "fp32" / "notes.txt"): (copy / "notes.txt").read_text()
    } == mine


def test_a_text_only_checkpoint_survives_being_killed_anywhere(tmp_path, monkeypatch):
    """`Llama4ForCausalLM`: killed while tracing, lowering and proving; then built, with every finished stage reused."""
    monkeypatch.setenv(VARIABLE, "")  # so that graphs are traced
    small_guard(tmp_path / "text", num_hidden_layers=1)
    build_file = write_build(tmp_path / "build.yaml", Path("text"), "text", samples=6)
    output, finished = tmp_path / "bundles", {}
    for started, stage in (("graph-*.partial/*.onnx", ""), ("lower-*.partial", "graph"), ("parity-*.partial", "lower")):
        run_and_kill(build_file, started)
        assert not (output / "fp32").exists()
        assert finished.items() <= stages(output).items()
        finished = stages(output)
        assert any(name.startswith(stage) for name in finished) or not stage
        assert arriero("run", output / "fp32.partial", PROMPT).code == 2
    done = arriero("build", build_file)
    assert done.code == 0, done.err
    assert finished.items() <= stages(output).items()
    assert not list(output.glob("*.partial"))
    assert "trace" not in done.err
    open_manifest(output / "fp32", full=True)
    assert arriero("run", output / "fp32", PROMPT, "--json", "--max-tokens", "4").json["prompt_tokens"] > 5
    assert not (output / "fp32" / "vision.onnx").exists()


def test_the_text_half_of_a_multimodal_checkpoint(workshop, tmp_path, picture):
    build_file = write_build(tmp_path / "build.yaml", workshop / "scout", "text", samples=3)
    built = arriero("build", build_file, "--json")
    assert built.code == 0, built.err
    bundle = tmp_path / "bundles" / "fp32"
    assert (built.json["bundles"], built.json["unproven"]) == ([str(bundle)], {})
    assert not (bundle / "vision.onnx").exists()
    answer = arriero("run", bundle, PROMPT, "--json", "--max-tokens", "8").json
    whole = arriero("run", workshop / "bundles" / "fp32", PROMPT, "--json", "--max-tokens", "8").json
    assert answer["token_ids"] == whole["token_ids"]
    refused = arriero("run", bundle, PROMPT, "--image", picture)
    assert (refused.code, "no vision tower" in refused.err, "modalities" in refused.err) == (2, True, True)


def test_maverick_s_shape(tmp_path):
    small_maverick(tmp_path / "maverick")
    build_file = write_build(tmp_path / "build.yaml", Path("maverick"), "text", samples=3)
    built = arriero("build", build_file)
    assert built.code == 0, built.err
    described = arriero("inspect", tmp_path / "bundles" / "fp32", "--json").json
    assert [layer["ffn"] for layer in described["model"]["text"]["layers"]] == ["dense", "moe"] * 2
    assert described["model"]["text"]["num_local_experts"] == 128
    assert {row["metric"]: row["value"] for row in parity_rows(tmp_path / "bundles" / "fp32")}["router_agreement"] == 1
    assert arriero("run", tmp_path / "bundles" / "fp32", PROMPT, "--max-tokens", "4").code == 0


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_a_model_without_experts_is_proven_and_published(tmp_path, backend):
    """Llama Guard 4's shape: dense layers alone. What a profile asks of routers does not apply: no such row."""
    if backend == "tvm":
        pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    small_guard(tmp_path / "guard")
    profiles = ("int8",) if backend == "onnxruntime" else ("int4",)
    build_file = write_build(
        tmp_path / "build.yaml", Path("guard"), "text", profiles, 6, backend=backend, answers="generated"
    )
    built = arriero("build", build_file)
    assert built.code == 0, built.err
    for name in profiles:
        rows = {row["metric"]: row for row in parity_rows(tmp_path / "bundles" / name)}
        assert not rows.keys() & {"router_agreement", "router_agreement_lowest", "vision_relative_l2"}
        assert rows["task_accuracy_drop"]["status"] == "pass"
        assert arriero("run", tmp_path / "bundles" / name, PROMPT, "--max-tokens", "4").code == 0


def test_license_files_travel_in_the_bundle(tmp_path):
    model, bundle = small_guard(tmp_path / "guard"), tmp_path / "bundles" / "fp32"
    build_file = write_build(tmp_path / "build.yaml", Path("guard"), "text", samples=2)
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE", "README.md"):
        (model / name).write_text(f"{name} of the model\n")
    assert arriero("build", build_file).code == 0
    names = ["licenses/LICENSE.txt", "licenses/NOTICE", "licenses/USE_POLICY.md"]
    assert arriero("inspect", bundle, "--json").json["licenses"] == names
    assert [name for name in open_manifest(bundle, full=True).files if name.startswith("licenses/")] == names
    assert ", ".join(names) in " ".join(arriero("inspect", bundle).out.split())
    (model / "NOTICE").write_text("another notice\n")
    assert arriero("build", build_file).code == 0
    assert (bundle / "licenses" / "NOTICE").read_text() == "another notice\n"
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE"):
        (model / name).unlink()
    assert arriero("build", build_file).code == 0
    assert not (bundle / "licenses").exists()
    assert "licences" not in arriero("inspect", bundle).out


def parity_rows(bundle: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = arriero("parity", bundle, "--json").json["rows"]
    return rows


# --- parity


def test_parity_shows_the_recorded_report(workshop, tmp_path):
    junit, page = tmp_path / "new" / "parity.xml", tmp_path / "parity.html"
    told = arriero("parity", workshop / "bundles" / "fp32", "--junit", junit, "--html", page)
    assert told.code == 0
    assert "judged rows passed" in told.out
    suite = ET.parse(junit).getroot()[0]
    rows = parity_rows(workshop / "bundles" / "fp32")
    judged = [row["metric"] for row in rows if row["status"] != "info"]
    assert [case.get("name") for case in suite.iter("testcase")] == judged
    assert (suite.get("failures"), suite.get("tests")) == ("0", str(len(judged)))
    assert "http" not in page.read_text().replace("http://www.w3.org", "")


def test_parity_against_the_checkpoint_measures_again(workshop, tmp_path):
    junit = tmp_path / "parity.xml"
    told = arriero(
        *("parity", workshop / "bundles" / "fp32", "--against", workshop / "scout"),
        *("--samples", "5", "--seed", "4", "--json", "--junit", junit),
    )
    assert told.code == 0, told.err
    assert told.json["passed"]
    assert len(told.json["cases"]) == 5
    assert told.json["labels"]["seed"] == "4"
    assert ET.parse(junit).getroot().get("failures") == "0"


def test_parity_against_another_checkpoint_is_refused(workshop, tmp_path):
    other = small_scout(tmp_path / "other", seed=99)
    refused = arriero("parity", workshop / "bundles" / "fp32", "--against", other)
    assert refused.code == 2
    assert "was not made from this checkpoint" in refused.err


# --- run


def test_run_streams_what_json_tells(workshop, picture):
    bundle = workshop / "bundles" / "int8"
    asked = ("run", bundle, "Describe the image.", "--image", picture, "--max-tokens", "6")
    streamed, told = arriero(*asked), arriero(*asked, "--json")
    assert (streamed.code, told.code) == (0, 0)
    assert streamed.out == told.json["text"] + "\n"
    assert f"{told.json['prompt_tokens']} prompt tokens" in streamed.err
    assert len(told.json["token_ids"]) <= 6
    assert told.json["finish_reason"] in ("length", "stop")


def test_a_prompt_may_say_where_its_pictures_are(workshop, picture):
    """Only where special tokens are asked for; otherwise pictures come before it, and what it spells is text."""
    bundle = workshop / "bundles" / "fp32"
    plain = ("run", bundle, "--json", "--max-tokens", "3", "--image", picture)
    asked = (*plain, "--special-tokens")
    placed = arriero(*asked, "What is in <|image|> here?")
    assert placed.code == 0, placed.err
    with package.load(bundle) as session:
        prompt = session.encode("What is in <|image|> here?", [picture], special_tokens=True)
        by_hand = session.generate(prompt, max_tokens=3)
    assert placed.json["token_ids"] == by_hand.token_ids
    first, before = arriero(*asked, "Here?"), arriero(*asked, "<|image|>Here?")
    assert first.json["token_ids"] == before.json["token_ids"]
    typed = arriero(*plain, "<|image|>Here?")
    assert typed.json["prompt_tokens"] > before.json["prompt_tokens"]
    refused = arriero(*asked, "Is <|image|> like <|image|>?")
    assert (refused.code, "2 image placeholders and 1 images were given" in refused.err) == (2, True)


def test_run_reads_the_prompt_from_standard_input(workshop):
    bundle = workshop / "bundles" / "fp32"
    piped = arriero("run", bundle, "-", "--json", "--max-tokens", "3", stdin=PROMPT).json
    assert piped["token_ids"] == arriero("run", bundle, PROMPT, "--json", "--max-tokens", "3").json["token_ids"]


def test_drawn_answers_repeat_with_their_seed(workshop):
    asked = ("run", workshop / "bundles" / "fp32", PROMPT, "--json", "--max-tokens", "12", "--temperature", "1")
    draws = [arriero(*asked, "--top-p", "0.9", "--seed", str(seed)).json["token_ids"] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_two_sessions_in_two_threads_answer_as_alone(workshop):
    prompts = [[f"Sort {n} 3 9 1 from low to high.", f"What is {n} + 61?"] for n in (2, 7)]
    with package.load(workshop / "bundles" / "int8", threads=1) as session:
        alone = [[session.generate(text, max_tokens=24).token_ids for text in texts] for texts in prompts]
    sessions = [package.load(workshop / "bundles" / "int8", threads=1) for _ in prompts]
    together: list[list[list[int]]] = [[], []]
    barrier = threading.Barrier(len(prompts))

    def answer(number: int) -> None:
        barrier.wait()
        together[number] = [sessions[number].generate(text, max_tokens=24).token_ids for text in prompts[number]]

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        session.close()
    assert together == alone


# --- the others


def test_inspect_tells_what_the_bundle_is(workshop):
    bundle = workshop / "bundles" / "int8"
    described = arriero("inspect", bundle, "--json").json
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert described["chain"] == manifest["chain"]
    assert described["parity"]["failed"] == []
    assert sum(described["weights"].values()) == len(manifest["weights"])
    assert set(described["coverage"]) == {"0", "1", "2", "3"}
    shown = arriero("inspect", bundle)
    assert shown.code == 0
    assert "every file as recorded" in " ".join(shown.out.split())


def test_doctor_says_what_is_here(workshop):
    told = arriero("doctor", "--json")
    assert told.code == 0
    assert told.json["can"]["onnxruntime"] == {"build": True, "run": True}
    assert "onnxruntime" in arriero("doctor").out
    assert arriero("doctor", "--backend", "abacus").code == 2


def test_schema_is_json_and_knows_every_key(workshop):
    schema = arriero("schema").json
    assert {"model", "targets", "parity", "budgets"} <= set(schema["properties"])


def commands(group, *words):
    """Each command as it is typed."""
    for name, one in group.commands.items():
        yield from commands(one, *words, name) if hasattr(one, "commands") else [(*words, name)]


@pytest.mark.parametrize("words", [(), *commands(typer.main.get_command(app))], ids=" ".join)
def test_the_lines_of_a_help_are_as_long_as_the_terminal_allows(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = arriero(*words, "--help").out.partition("\u256d")[0]
    for line, following in pairwise(line.rstrip() for line in told.splitlines()[2:]):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > 79, line


@pytest.mark.parametrize("verb", ["plan", "build", "calibrate", "parity", "run", "inspect", "doctor", "schema"])
def test_help_teaches(verb):
    told = arriero(verb, "--help")
    assert told.code == 0
    assert len(told.out.splitlines()) > 8
