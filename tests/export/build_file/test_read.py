"""Build files: good ones become a frozen config, each bad one is refused with file:line, key, and what to do."""

import json
import re
from pathlib import Path

import pytest

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.build_file.read import load_build
from arriero.export.build_file.schema import json_schema
from arriero.graphs.sources.synthetic import SyntheticModel

GOOD = """\
version: 1
model: model
modalities: [text, image]
output: out
targets:
  - name: portable-int8
    backend: onnxruntime
    profile: int8
    context: 4096
    batch: 1
  - {name: exact, backend: onnxruntime, profile: fp32}
calibration: {set: embedded, samples: 96, seed: 11}
parity:
  cases: {set: embedded, samples: 48, seed: 29}
  thresholds: {router_agreement: 0.995, task_accuracy_drop.recall: 0}
budgets: {host_memory: 8GiB, disk: 2 GB}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "build.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ArrieroError) as caught:
        load_build(write(folder, text))
    return str(caught.value)


def test_a_good_file(folder):
    build = load_build(write(folder, GOOD))
    assert build.model == folder / "model"
    assert build.output == folder / "out"
    assert [t.name for t in build.targets] == ["portable-int8", "exact"]
    assert (build.targets[1].context, build.targets[1].batch) == (4096, 1)
    assert (build.budgets.host_memory, build.budgets.disk) == (8 << 30, 2 * 10**9)
    assert build.parity.thresholds == {"router_agreement": 0.995, "task_accuracy_drop.recall": 0}
    with pytest.raises(ValueError, match="frozen"):
        build.version = 2


def test_paths_start_at_the_build_file(folder, monkeypatch):
    (folder / "own.yaml").write_text("name: own")
    file = write(folder, GOOD.replace("profile: int8", "profile: own.yaml"))
    monkeypatch.chdir("/")
    assert load_build(file).targets[0].profile == str(folder / "own.yaml")


def test_sets_of_ones_own(folder):
    (folder / "data").mkdir()
    (folder / "data" / "seen.jsonl").write_text("{}")
    text = GOOD.replace("{set: embedded, samples: 96, seed: 11}", "{set: data/seen.jsonl}")
    build = load_build(write(folder, text.replace("{set: embedded, samples: 48", "{set: data, samples: 5")))
    assert (build.calibration.set, build.calibration.samples) == (str(folder / "data" / "seen.jsonl"), None)
    assert (build.parity.cases.set, build.parity.cases.samples) == (str(folder / "data"), 5)


def test_a_synthetic_model(folder):
    build = load_build(write(folder, GOOD.replace("model: model", "model: synthetic://maverick?layers=2")))
    assert build.model == SyntheticModel("maverick", 2, 0)
    assert str(build.model) == "synthetic://maverick?layers=2&seed=0"


def test_short_file_has_defaults(folder):
    text = "version: 1\nmodel: model\nmodalities: [text]\ntargets: [{name: a, backend: onnxruntime, profile: fp32}]\n"
    build = load_build(write(folder, text))
    assert (build.calibration.samples, build.parity.cases.samples) == (96, 48)
    assert (build.calibration.seed, build.parity.cases.seed, build.budgets.disk) == (11, 29, None)
    # The output's default is relative to the build file too.
    assert build.output == folder / "bundles"


# case: (what to replace in GOOD, with what, what the message must say)
BAD = {
    "unknown key": (
        "modalities:",
        "modalites:",
        r"build.yaml:3: modalites: unknown key; .*Did you mean 'modalities'\?",
    ),
    "missing key": ("modalities: [text, image]\n", "", r"build.yaml:1: modalities: is missing\. What the bundles take"),
    "nested unknown": ("context: 4096", "contxt: 4096", r":9: targets\[0\].contxt: unknown key.*mean 'context'"),
    "nested missing": ("    backend: onnxruntime\n", "", r":6: targets\[0\].backend: is missing\. The runtime"),
    "version": ("version: 1", "version: 2", r":1: version: 2 is not valid; expected 1"),
    "version quoted": (
        "version: 1",
        'version: "1"',
        r":1: version: '1' is not valid; expected 1. Write it without quo",
    ),
    "version text": ("version: 1", "version: one", r":1: version: 'one' is not valid; expected 1"),
    "model folder": ("model: model", "model: modle", r":2: model: there is no folder .*modle; .*Did you mean model\?"),
    "model file": ("model: model", "model: build.yaml", r":2: model: build.yaml is a file; .* Write the folder: \."),
    "model number": ("model: model", "model: 7", r":2: model: 7 names no model; expected a folder, hf://"),
    "model none": ("model: model", "model:", r":2: model: has no value; expected a folder, hf://"),
    "model half a character": ("model: model", 'model: "\\ud800"', r":2: model: holds half of a surrogate pair"),
    "model a zero": ("model: model", 'model: "mo\\0del"', r":2: model: holds the character U\+0000; expected text"),
    "output a zero": ("output: out", 'output: "o\\0ut"', r":4: output: holds the character U\+0000; expected text"),
    "model of nobody": (
        "model: model",
        "model: ~nobody-has-this-name/model",
        r":2: model: ~nobody-has-this-name/model begins with a home folder that is not known; .* Write the path in ful",
    ),
    "output of nobody": (
        "output: out",
        "output: ~nobody-has-this-name/out",
        r":4: output: ~nobody-has-this-name/out begins with a home folder that is not known",
    ),
    "model hub climbs": ("model: model", "model: hf://a/b@../../c", r"'hf://a/b@\.\./\.\./c' is malformed"),
    "model hub": ("model: model", "model: hf://scout", r"'hf://scout' is malformed; .*For example hf://meta-llama"),
    "model synthetic": (
        "model: model",
        "model: synthetic://scuot",
        r":2: model: there is no synthetic model 'scuot'; .*Did you mean 'scout'\?",
    ),
    "no text": ("[text, image]", "[image]", r":3: modalities: text is missing: .* Write `modalities: \[text, image\]`"),
    "modality": ("[text, image]", "[text, imge]", r":3: modalities\[1\]: 'imge' .*expected 'text' or 'image'.*'image'"),
    "modality twice": ("[text, image]", "[text, text]", r"modalities: names a modality twice; expected each of"),
    "modalities text": ("[text, image]", "text", r"modalities: 'text' is not valid; expected a list, as in \[a, b\]"),
    "modalities empty": ("[text, image]", "[]", r"modalities: \[\] is not valid; expected a list of 1 or more"),
    "output number": ("output: out", "output: 3", r":4: output: 3 is not a path; expected the path of a folder"),
    "output file": (
        "output: out",
        "output: build.yaml",
        r":4: output: .*build.yaml is a file; expected the path of a f",
    ),
    "no value": ("output: out", "calibration:", r":4: calibration: has no value; .*Give one, or remove the key"),
    "backend": (
        "onnxruntime\n",
        "onnxruntim\n",
        r":7: targets\[0\].backend: 'onnxruntim' .*Did you mean 'onnxruntime'",
    ),
    "profile": (
        "profile: int8",
        "profile: in8",
        r":8: .*no profile 'in8'; expected one of as-stored, bf16, .*int8, .*mean 'int8'\?",
    ),
    "profile path": (
        "profile: int8",
        "profile: a/b.yaml",
        r":8: .*there is no profile 'a/b.yaml'; .*path of a profile",
    ),
    "cache type": (
        "profile: int8",
        "profile: int8\n    kv_cache: int4",
        r":9: targets\[0\].kv_cache: 'int4' is not valid; expected 'float32', 'float16' or 'int8'.*mean 'int8'",
    ),
    "cache as a profile": (
        "profile: int8",
        "profile: int8+kv8",
        r":8: .*no profile 'int8\+kv8'; .* name any profile, and write `kv_cache: int8` beside it",
    ),
    "name twice": ("name: exact", "name: Portable-int8", r":11: targets\[1\].name: .*targets\[0\]; .*Rename one"),
    "name slash": ("name: exact", "name: a/b", r":11: targets\[1\].name: 'a/b' cannot be a folder.*example `a-b`"),
    "name dots": (
        "name: exact",
        "name: '..'",
        r"targets\[1\].name: '..' cannot be a folder.*For example `portable-int8`",
    ),
    "name hidden": ("name: exact", "name: .work", r"targets\[1\].name: '.work' cannot be a folder name"),
    "name reserved": ("name: exact", "name: a.partial", r"targets\[1\].name: 'a.partial' cannot be a folder name"),
    "name number": ("name: exact", "name: 8", r"targets\[1\].name: 8 is not valid; expected text"),
    "context zero": ("context: 4096", "context: 0", r":9: targets\[0\].context: 0 is not valid; expected more than 0"),
    "context text": ("context: 4096", "context: '4096'", r":9: targets\[0\].context: '4096' .*expected a whole number"),
    "context 4k": (
        "context: 4096",
        "context: 4k",
        r":9: targets\[0\].context: '4k' is not valid; expected a whole numbe",
    ),
    "context bool": (
        "context: 4096",
        "context: true",
        r"targets\[0\].context: True is not valid; expected a whole numb",
    ),
    "batch fraction": ("batch: 1\n", "batch: 1.5\n", r":10: targets\[0\].batch: 1.5 is not valid; expected a whole"),
    "targets mapping": ("targets:\n", "targets: {}\nrest:\n", r":5: targets: {} is not valid; expected a list"),
    "target a name": (
        "{name: exact, backend: onnxruntime, profile: fp32}",
        "exact",
        r":11: targets\[1\]: 'exact' .*mapping",
    ),
    "set": (
        "{set: embedded, samples: 96",
        "{set: embeded, samples: 96",
        r":12: calibration.set: there is no data set 'embeded'.*'embedded'",
    ),
    "samples": ("samples: 96", "samples: -1", r":12: calibration.samples: -1 is not valid; expected more than 0"),
    "seed": ("seed: 11", "seed: -1", r":12: calibration.seed: -1 is not valid; expected at least 0"),
    "same seed": ("seed: 29", "seed: 11", r":14: parity.cases.seed: seed 11 is also the calibration's.*Change one"),
    "one set for both": (
        GOOD[GOOD.index("calibration:") : GOOD.index("parity:")] + "parity:\n  cases: {set: embedded",
        "calibration: {set: a.jsonl}\nparity:\n  cases: {set: ./a.jsonl",
        r":14: parity.cases.set: this set is also the calibration's, so .*; expected another set. Split it in two",
    ),
    "metric": (
        "router_agr",
        "rooter_agr",
        r":15: parity.thresholds.rooter_agreement: no such parity metric.*router_agr",
    ),
    "threshold text": (
        "0.995",
        "high",
        r":15: parity.thresholds.router_agreement: 'high' is not valid; expected a number",
    ),
    "threshold nan": ("0.995", ".nan", r":15: parity.thresholds.router_agreement: nan .*expected a finite number"),
    "size unit": (
        "8GiB",
        "8GiG",
        r":16: budgets.host_memory: '8GiG' is not a size; expected a size such as 8GiB. Write",
    ),
    "size bare": ("8GiB", "8", r":16: budgets.host_memory: 8 is less than 1 MiB; is the unit missing\?"),
    "size word": ("8GiB", "plenty", r":16: budgets.host_memory: 'plenty' is not a size"),
    "size bool": ("8GiB", "true", r":16: budgets.host_memory: True is not a size"),
    "size list": ("8GiB", "[8]", r":16: budgets.host_memory: \[8\] is not a size"),
    "key twice": ("budgets:", "output: b\nbudgets:", r":16: output: is there twice, first on line 4. Remove one"),
    "tab": ("  - name: portable", "\t- name: portable", r":6: is not YAML: found character '\\t'.*replace the tab"),
    "bracket": ("[text, image]", "[text, image", r"build.yaml:4: is not YAML: .*while parsing a flow sequence"),
    "colon": ("output: out", "output: a: b", r"build.yaml:4: is not YAML: mapping values are not allowed"),
    "two documents": ("targets:", "---\ntargets:", r"build.yaml:5: is not YAML: but found another document"),
    "alias": ("output: out", "output: *x", r"build.yaml:4: is not YAML: found undefined alias 'x'"),
    "number that is none": ("context: 4096", "context: !!int many", r"context: 'many' is not valid; .*whole number"),
    "number too long": ("context: 4096", f"context: {'9' * 5000}", r"context: '9+\.\.\. is not valid; .*whole number"),
    "tag": ("output: out", "output: !env OUT", r"build.yaml:4: output: the YAML tag !env has no meaning in this file"),
    "key a list": ("output: out", "[a]: out", r"build.yaml:4: a list or mapping cannot be a key; expected text"),
    "yes for a number": ("batch: 1\n", "batch: yes\n", r":10: targets\[0\].batch: 'yes' .*expected a whole number"),
    "a time for a number": ("seed: 11", "seed: 11:30", r":12: calibration.seed: '11:30' .*expected a whole number"),
    "loop": ("parity:\n", "parity: &p\n  more: *p\n", r":14: parity.more: an alias contains itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_its_place(folder, case):
    old, new, message = BAD[case]
    assert old in GOOD
    text = refused(folder, GOOD.replace(old, new, 1))
    assert re.search(message, text), text
    assert str(folder / "build.yaml") in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "build.yaml:1: is empty; expected `key: value` lines. Start from the example"),
        (b"- a\n- b\n", "build.yaml:1: is not a mapping at its top"),
        (b"version: 1\0", r"build.yaml: is not YAML: unacceptable character #x0000"),
        (
            b"version: " + b"[" * 2000,
            r"build.yaml:1: nests too deep; expected at most 32 lists and mappings in each other",
        ),
        (b"version: \xff", r"build.yaml: is not UTF-8 text \(byte 9\). Save it as UTF-8"),
    ],
)
def test_not_a_build_file(folder, content, message):
    assert re.search(message, refused(folder, content))


def test_no_such_file_lists_what_there_is(folder):
    write(folder, GOOD)
    with pytest.raises(ArrieroError, match=r"biuld.yaml: there is no such build file\. The folder holds build.yaml"):
        load_build(folder / "biuld.yaml")
    with pytest.raises(ArrieroError, match=r"is a folder, not a build file\. Give the file, such as"):
        load_build(folder)


def test_all_mistakes_at_once_in_the_file_s_order(folder):
    text = GOOD.replace("version: 1", "version: 3").replace("8GiB", "8").replace("name: exact", "name: a/b")
    text = text.replace("router_a", "rooter_a").replace("output: out", "outptu: out")
    with pytest.raises(Problems) as caught:
        load_build(write(folder, text))
    keys = [str(p.where).split(": ")[1] for p in caught.value.problems]
    assert keys == ["version", "outptu", "targets[1].name", "parity.thresholds.rooter_agreement", "budgets.host_memory"]
    assert caught.value.exit_code == 2


def test_entries_that_are_all_wrong_are_still_entries(folder):
    with pytest.raises(Problems) as caught:
        load_build(write(folder, GOOD.replace("name: exact", "name: a/b").replace("name: portable-int8", "name: .a")))
    assert ["cannot be a folder name" in problem.what for problem in caught.value.problems] == [True, True]


def test_schema_agrees_with_the_models_and_describes_every_field():
    schema = json_schema()
    assert schema["required"] == ["version", "model", "modalities", "targets"]
    json.dumps(schema)
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        assert section["additionalProperties"] is False
        for field in section["properties"].values():
            assert field["description"].endswith(".")
    name = schema["$defs"]["Target"]["properties"]["name"]["pattern"]
    names = ("int8", "a.b-c_d", "x" * 64, "a/b", ".a", "a.", "a.partial", "a.old-1", "ñ", "x" * 65)
    assert [bool(re.search(name, one)) for one in names] == [True] * 3 + [False] * 7
    metric = schema["$defs"]["Parity"]["properties"]["thresholds"]["propertyNames"]["pattern"]
    assert re.search(metric, "router_agreement")
    assert not re.search(metric, "rooter_agreement")


# --- models in the Hugging Face cache ---------------------------------------------------------------------------


def put_in_cache(hub: Path, commit: str = "abc123", *, config: bool = True) -> Path:
    repository = hub / "models--meta-llama--Scout"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit + "\n")
    if config:
        (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize(
    "model", ["hf://meta-llama/Scout", "hf://meta-llama/Scout@abc123", "hf://meta-llama/Scout@main"]
)
def test_model_from_the_cache(folder, model):
    snapshot = put_in_cache(folder / "hub")
    assert load_build(write(folder, GOOD.replace("model: model", f"model: {model}"))).model == snapshot


@pytest.mark.parametrize(
    ("variable", "hub"),
    [("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub")],
)
def test_cache_folders_follow_the_environment(folder, monkeypatch, variable, hub):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(folder / "elsewhere"))
    snapshot = put_in_cache(folder / "elsewhere" / hub)
    assert load_build(write(folder, GOOD.replace("model: model", "model: hf://meta-llama/Scout"))).model == snapshot


def test_model_not_in_the_cache_says_how_to_get_it(folder):
    with pytest.raises(MachineLacks) as caught:
        load_build(write(folder, GOOD.replace("model: model", "model: hf://meta-llama/Scout@v2")))
    assert "build.yaml:2: model: hf://meta-llama/Scout@v2 is not in the Hugging Face cache" in str(caught.value)
    assert "run `hf download meta-llama/Scout --revision v2`" in str(caught.value)
    assert caught.value.exit_code == 3


def test_other_revision_and_incomplete_download(folder):
    put_in_cache(folder / "hub", config=False)
    with pytest.raises(MachineLacks, match=r"does not hold revision v2; it holds abc123.*--revision v2`"):
        load_build(write(folder, GOOD.replace("model: model", "model: hf://meta-llama/Scout@v2")))
    with pytest.raises(MachineLacks, match=r"is incomplete: no config.json.*`hf download meta-llama/Scout`"):
        load_build(write(folder, GOOD.replace("model: model", "model: hf://meta-llama/Scout")))


def test_links_and_revisions_that_leave_the_cached_model_are_refused(folder):
    snapshot = put_in_cache(folder / "hub")
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")  # as the cache itself does
    text = GOOD.replace("model: model", "model: hf://meta-llama/Scout")
    assert load_build(write(folder, text)).model == snapshot
    (folder / "secret").mkdir()
    (folder / "secret" / "config.json").write_text("{}")
    with pytest.raises(ArrieroError, match="is malformed"):
        load_build(write(folder, text.replace("Scout", "Scout@../../../secret")))
    (snapshot / "model.safetensors").symlink_to(folder / "secret" / "config.json")
    with pytest.raises(ArrieroError, match=r"model\.safetensors leads out of the cached model's folder"):
        load_build(write(folder, text))
    (snapshot / "model.safetensors").unlink()
    (snapshot.parents[1] / "refs" / "main").write_text("../../../secret")
    with pytest.raises(ArrieroError, match="leads out of"):
        load_build(write(folder, text))


def test_missing_model_among_other_mistakes_is_one_of_them(folder):
    text = GOOD.replace("model: model", "model: hf://meta-llama/Scout").replace("version: 1", "version: 2")
    with pytest.raises(Problems) as caught:
        load_build(write(folder, text))
    assert len(caught.value.problems) == 2


def test_processors_of_a_target(folder):
    def targets(cpu: str) -> str:
        return GOOD.replace("backend: onnxruntime, profile: fp32}", f"backend: tvm, profile: fp32, cpu: {cpu}}}")

    build = load_build(write(folder, targets("raspberry-pi-5")))
    assert (build.targets[1].backend, build.targets[1].cpu) == ("tvm", "raspberry-pi-5")
    assert load_build(write(folder, targets("aarch64-linux-gnu cortex-a72 +crc"))).targets[1].cpu is not None
    said = refused(folder, targets("raspberry-pi-9"))
    assert re.search(r"build.yaml:\d+: targets\[1\].cpu: there is no processor 'raspberry-pi-9'.*raspberry-pi-5", said)
