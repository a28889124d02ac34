"""The reference record says what the whole model says, and a candidate measured against it fares the same."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arriero.errors import ArrieroError, Problems
from arriero.export.build_file.schema import Cases
from arriero.export.proof import decoded_memory
from arriero.export.proof import write_record as writing
from arriero.export.proof.against import find_differences
from arriero.export.proof.live_reference import LiveReference
from arriero.export.proof.reference import TorchBackend, open_reference
from arriero.export.proof.write_record import Origin, write_record
from arriero.export.samples.cases import draw_cases
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.journal import Tell, keep_silent
from arriero.runtimes.backend import StepOutput
from arriero.runtimes.manifest import file_sha256
from arriero.runtimes.proof import cases as kept_cases
from arriero.runtimes.proof import logits as kept_logits
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.logits import SampledLogits
from arriero.runtimes.proof.parity import measure, measure_kl, top_tokens
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.record import KEYS, ReferenceRecord
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.session import Session
from arriero.thresholds import FORCED, AnswerMode
from tests.flip import flip
from tests.small import small_scout

BOTH = ("text", "image")
CHASQUI = Path(__file__).parents[3] / "models" / "chasqui"
LONG = "a mule that walks over the pass with two sacks of salt, a bell and a red ribbon"
ANSWERS = {"task_accuracy_reference", "task_accuracy_candidate", "task_accuracy_drop", "greedy_prefix_length"}


@pytest.fixture(scope="module", autouse=True)
def few_answer_tokens() -> Iterator[None]:
    """A random model never ends an answer; all but the embedded one's would be as long as they may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_cases, "MAX_ANSWER_TOKENS", 24)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return open_reference(Checkpoint.open(small_scout(tmp_path_factory.mktemp("scout"))), False)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[ParityCase]:
    """One of each embedded family, one with messages and a picture of the user's own, one without an answer."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "own.jpg")
    entries = [{"type": "image", "path": str(folder / "own.jpg")}, {"type": "text", "text": "What is it?"}]
    own = ParityCase("own", "image", [{"role": "user", "content": entries}], (), LONG, "same_answer")
    return [*draw_cases(Cases(samples=10, seed=29), BOTH), own, ParityCase("open", "text", "Hello")]


def write(
    reference: Session,
    cases: list[ParityCase],
    folder: Path,
    answers: AnswerMode,
    watch: Any = None,
    tell: Tell = keep_silent,
) -> None:
    folder.mkdir(exist_ok=True)
    origin = Origin("c0ffee", BOTH, answers, {"set": "embedded", "seed": 29}, {"numpy": np.__version__})
    write_record(reference, cases, origin, folder, watch or (lambda *_: None), tell)


@pytest.fixture(scope="module")
def record(reference: Session, cases: list[ParityCase], tmp_path_factory: pytest.TempPathFactory) -> ReferenceRecord:
    folder = tmp_path_factory.mktemp("record")
    write(reference, cases, folder, "generated")
    return ReferenceRecord.open(folder)


@pytest.fixture(scope="module")
def forced(reference: Session, cases: list[ParityCase], tmp_path_factory: pytest.TempPathFactory) -> ReferenceRecord:
    folder = tmp_path_factory.mktemp("forced")
    write(reference, cases, folder, "forced")
    return ReferenceRecord.open(folder)


def rows(report: ParityReport) -> dict[str, Any]:
    return {row.metric: row for row in report.rows}


def rounded(reference: Session, step: float = 0.01) -> Session:
    """A candidate: the reference with the decoder's matrices rounded to multiples of `step`."""
    model = copy.deepcopy(reference.backend.model)  # type: ignore[attr-defined]
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight") and "vision" not in name:
            weight.data = (torch.round(weight.data.float() / step) * step).to(weight.dtype)
    return Session(TorchBackend.of(model), reference.processor)


def test_it_says_what_the_whole_model_says(reference, cases, record):
    assert len(record) == len(cases) == 12
    for number, case in enumerate(cases):
        kept = record.case(number)
        prompt = reference.encode(case.prompt, list(case.images))
        fed = np.concatenate([prompt.input_ids, reference.processor.tokenize(case.answer)])
        np.testing.assert_array_equal(kept.fed_ids, fed)
        with reference.backend.router_margins() as margins:
            whole = reference.logits(fed, prompt.pixel_values, captures=True)
        logits = whole.logits[0]
        # float32 on both sides: one pass in pieces over the cache, one layer by layer over the whole case
        np.testing.assert_allclose(kept.logits.values, logits, atol=2e-5 * np.abs(logits).max())
        np.testing.assert_array_equal(kept.top_tokens, top_tokens(logits, reference.spec.image_token_id))
        for layer, hidden in whole.hiddens.items():
            assert kept.hiddens[layer].errors(hidden).relative_l2 < 1e-5
            np.testing.assert_array_equal(kept.expert_ids[layer], whole.expert_ids[layer][0])
            np.testing.assert_allclose(kept.margins[layer], np.concatenate(margins[layer]), atol=1e-4)
        if case.answer:
            assert kept.forced_ids[-1] in reference.spec.eos_token_ids
            assert len(kept.forced_ids) == len(fed) + 1
        else:
            np.testing.assert_array_equal(kept.forced_ids, fed)
        expected = len(reference.processor.tokenize(case.answer))
        said = reference.generate(prompt, max_tokens=max(24, 2 * expected))
        assert len(kept.generated_ids) == max(24, 2 * expected)  # a random model never ends
        assert expected > 12 or case.answer != LONG
        assert (list(kept.generated_ids), kept.generated_text) == (said.token_ids, said.text)


def test_pictures_travel_with_it(reference, cases, record):
    """Arrays as lossless PNG, the user's own file as it is; both make the same pixels as the originals."""
    names = sorted(path.name for path in (record.folder / "pictures").iterdir())
    (own,) = [name for name in names if name.endswith(".jpg")]
    original = cases[10].prompt[0]["content"][0]["path"]
    assert (record.folder / "pictures" / own).read_bytes() == Path(original).read_bytes()
    for number, case in enumerate(cases):
        kept = record.case(number).case
        again, first = (reference.encode(one.prompt, list(one.images)).pixel_values for one in (kept, case))
        assert (again is None) == (first is None)
        if first is not None:
            np.testing.assert_array_equal(again, first)
            assert record.case(number).pixels.errors(first).noise == 0.0
    assert str(Path(original).parent) not in (record.folder / "record.json").read_text()


def test_the_same_cases_give_the_same_record(reference, cases, record, tmp_path):
    write(reference, cases, tmp_path / "again", "generated")
    assert ReferenceRecord.open(tmp_path / "again").hash == record.hash


def test_an_array_whose_header_is_nonsense_is_refused_where_it_is_read(record, tmp_path):
    shutil.copytree(record.folder, tmp_path / "copy")
    array, listed = tmp_path / "copy" / "forced_ids.npy", tmp_path / "copy" / "record.json"
    array.write_bytes(array.read_bytes().replace(b",)", b",(", 1))
    data = json.loads(listed.read_text())
    data["files"]["forced_ids.npy"]["sha256"] = file_sha256(array)
    listed.write_text(json.dumps(data))
    with pytest.raises(ArrieroError, match=r"forced_ids\.npy: holds no array .*Copy the record again"):
        ReferenceRecord.open(tmp_path / "copy").case(0)


@pytest.mark.parametrize("stop", ["embed cases", "layer 2 (3 of 4)", "logits", "answers"])
def test_a_killed_run_goes_on_at_the_layer(reference, cases, record, tmp_path, stop):
    steps: list[str] = []

    def killed(step: str, done: int, total: int, unit: str) -> None:
        if step == f"reference record: {stop}" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(reference, cases, tmp_path, "generated", killed)
    write(
        reference, cases, tmp_path, "generated", lambda step, *_: steps.append(step.removeprefix("reference record: "))
    )
    order = ["embed cases", *(f"layer {n} ({n + 1} of 4)" for n in range(4)), "logits", "answers", "hash files"]
    assert list(dict.fromkeys(steps)) == order[order.index(stop) :]
    assert ReferenceRecord.open(tmp_path).hash == record.hash
    assert not [path.name for path in tmp_path.rglob("*") if "partial" in path.name or "hidden" in path.name]


FLIPS = {  # what is changed after a kill in `stop`, and where a resumed run begins
    "hidden states": ("layer 2 (3 of 4)", "hidden-002.npy", "embed cases"),
    "embeddings": ("layer 2 (3 of 4)", "embeddings.sketch.npy", "embed cases"),
    "routing": ("layer 2 (3 of 4)", "layer-001.expert_ids.npy", "embed cases"),
    "logits": ("answers", "logits.npy", "embed cases"),
}


@pytest.mark.parametrize("what", FLIPS)
def test_nothing_that_was_changed_since_the_kill_is_used(reference, cases, record, tmp_path, what):
    stop, file, first = FLIPS[what]
    steps, told = list[str](), list[str]()

    def killed(step: str, done: int, total: int, unit: str) -> None:
        if step == f"reference record: {stop}" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(reference, cases, tmp_path, "generated", killed)
    flip(tmp_path / file, -1)
    write(reference, cases, tmp_path, "generated", lambda step, *_: steps.append(step), told.append)
    assert steps[0] == f"reference record: {first}"
    assert [line.startswith(f"{tmp_path / file}: ") and line.endswith("it is made again") for line in told] == [True]
    assert ReferenceRecord.open(tmp_path).hash == record.hash


def test_a_candidate_fares_as_against_the_reference_itself(reference, cases, record):
    candidate = rounded(reference)
    recorded, live = (measure(candidate, one, {}) for one in (record, LiveReference(reference, cases)))
    assert [row.metric for row in recorded.rows] == [row.metric for row in live.rows]
    for name, row in rows(live).items():
        found = rows(recorded)[name]
        if row.value is None or name in ("nonfinite_values", "same_prompt"):
            assert found.value == row.value
        elif found.error:
            assert abs(found.value - row.value) < 4 * found.error, name  # of a dozen rows, four errors: one in 1,000
            assert row.error == 0
        else:
            assert found.value == pytest.approx(row.value, rel=1e-3, abs=1e-5), name
    assert rows(live)["layer_relative_l2_highest"].value > 0.01
    assert [case.candidate_text for case in recorded.cases] == [case.candidate_text for case in live.cases]
    total = measure_kl(candidate, record, lambda *_: None)
    assert total.mean == pytest.approx(rows(recorded)["logits_kl_mean"].value)


def test_the_head_is_read_once_for_as_many_cases_as_fit(reference, cases, record, tmp_path, monkeypatch):
    """Whether cases go through it together or one by one, their logits are the same but for the order of sums."""
    heads, head = [], reference.backend.head
    monkeypatch.setattr(reference.backend, "head", lambda *rows: heads.append(rows) or head(*rows))
    longest = max(len(case.top_tokens) for case in record)
    for most, name in ((2 * longest, "pairs"), (0, "single")):
        heads.clear()
        monkeypatch.setattr(decoded_memory, "LOGITS", most * 4 * reference.spec.vocab_size)
        write(reference, cases, tmp_path / name, "generated")
        assert (len(heads) == len(cases)) == (name == "single")
        again = ReferenceRecord.open(tmp_path / name)
        for number, known in enumerate(record):
            logits = again.case(number).logits.values
            np.testing.assert_allclose(logits, known.logits.values, atol=1e-5 * np.abs(known.logits.values).max())


def test_parts_stay_apart(reference, cases, record):
    """A fault of the vision tower does not show in the embeddings, and one of the image merge not in the vision."""
    model = reference.backend.model

    class Wrong(TorchBackend):
        def vision(self, pixel_values):
            return super().vision(pixel_values) * 1.1

    backend = Wrong.of(model)
    found = rows(measure(Session(backend, reference.processor), record, {}))
    assert found["vision_relative_l2"].value == pytest.approx(0.1, abs=0.02)
    assert found["embeddings_relative_l2"].value == 0.0

    class Turned(TorchBackend):
        def embed(self, input_ids, image_features):
            return super().embed(input_ids, image_features[::-1])

    found = rows(measure(Session(Turned.of(model), reference.processor), record, {}))
    assert found["vision_relative_l2"].value < 1e-5
    assert found["embeddings_relative_l2"].value > 0.1


class Shifted(TorchBackend):
    """The right logits until an answer's third token, then those of the next id."""

    def forward(self, inputs_embeds, positions, cache, logits_index, captures=False):
        output = super().forward(inputs_embeds, positions, cache, logits_index, captures)
        return StepOutput(np.roll(output.logits, 1, -1), output.expert_ids, output.hiddens)


def test_forced_answers_have_names_of_their_own(reference, forced, record):
    report = measure(reference, forced, {"task_accuracy_forced_drop": 0.0, "greedy_prefix_forced_length": 1.0})
    assert not report.failed
    assert report.answers == "forced"
    assert not ANSWERS & {row.metric.partition(".")[0] for row in report.rows}
    generated = measure(reference, record, {})
    assert generated.answers == "generated"
    assert not set(FORCED.values()) & {row.metric.partition(".")[0] for row in generated.rows}
    asked = measure(reference, forced, {"task_accuracy_drop": 1.0})
    assert [row.detail for row in asked.failed] == ["not measured: the reference's answers are forced"]


@pytest.fixture(scope="module")
def embedded() -> Session:
    return open_reference(Checkpoint.open(CHASQUI), False)


@pytest.fixture(scope="module")
def learned(embedded: Session) -> list[ParityCase]:
    return draw_cases(Cases(samples=20, seed=29), BOTH)


def test_forced_and_generated_answers_of_the_embedded_model(embedded, learned, tmp_path):
    """It knows its tasks, so every forced position leads to the answer and its closing token; a wrong head does not."""
    write(embedded, learned, tmp_path / "forced", "forced")
    write(embedded, learned, tmp_path / "generated", "generated")
    forced, generated = (ReferenceRecord.open(tmp_path / name) for name in ("forced", "generated"))
    by_force, by_word = (rows(measure(embedded, one, {})) for one in (forced, generated))
    right = by_word["task_accuracy_reference"].value
    assert by_force["task_accuracy_forced_reference"].value == by_force["task_accuracy_forced_candidate"].value == right
    assert right >= 0.95
    assert by_force["greedy_prefix_forced_length"].value == by_word["greedy_prefix_length"].value == 1.0
    for number, case in enumerate(measure(embedded, forced, {}).cases):
        if case.reference_right:
            assert case.reference_text.strip().startswith(learned[number].answer)
    wrong = measure(Session(Shifted.of(embedded.backend.model), embedded.processor), forced, {})
    found = rows(wrong)
    assert found["task_accuracy_forced_candidate"].value == found["greedy_prefix_forced_length"].value == 0.0
    assert found["task_accuracy_forced_drop"].value == right
    assert forced.hash != generated.hash


def test_a_closing_token_that_does_not_come_is_a_wrong_forced_answer(embedded, learned, tmp_path):
    class Endless(TorchBackend):
        def forward(self, *given, **named):
            output = super().forward(*given, **named)
            output.logits[..., list(self.spec.eos_token_ids)] = -1e4
            return output

    write(embedded, learned[:3], tmp_path, "forced")
    endless = Session(Endless.of(embedded.backend.model), embedded.processor)
    report = measure(endless, ReferenceRecord.open(tmp_path), {})
    assert [case.candidate_right for case in report.cases] == [False] * 3
    assert all(0.5 < case.greedy_prefix < 1 for case in report.cases)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies of more than 512 are sampled, so that the embedded model's 1,024 are."""
    for module in (kept_logits, writing):
        monkeypatch.setattr(module, "WHOLE_VOCABULARY", 512)


def test_the_embedded_model_sampled_and_whole(embedded, learned, tmp_path, sampled):
    write(embedded, learned, tmp_path, "forced")
    record = ReferenceRecord.open(tmp_path)
    assert isinstance(record.case(0).logits, SampledLogits)
    assert not (tmp_path / "logits.npy").exists()
    candidate = rounded(embedded, 0.02)
    exact = rows(measure(candidate, LiveReference(embedded, learned, "forced"), {}))
    found = rows(measure(candidate, record, {"logits_kl_mean": 10.0}))
    kl, bound = found["logits_kl_mean"], found["logits_kl_lower_bound"]
    assert 0 < kl.error < 0.2 * kl.value
    assert abs(kl.value - exact["logits_kl_mean"].value) <= 3 * kl.error
    assert bound.value <= exact["logits_kl_mean"].value
    assert found["same_top_token"].value == exact["same_top_token"].value
    largest = exact["logits_max_abs_error"].value
    assert 0.5 * largest < found["logits_max_abs_error"].value < largest + 1e-4  # another order of float32 sums
    relative = found["logits_relative_l2"]
    assert abs(relative.value - exact["logits_relative_l2"].value) <= 3 * relative.error
    # the gate is held against the estimate and two errors
    limit = kl.value + kl.error
    assert rows(measure(candidate, record, {"logits_kl_mean": limit}))["logits_kl_mean"].status == "fail"


# --- what is refused


@pytest.fixture
def broken(record: ReferenceRecord, tmp_path: Path) -> Path:
    """A copy of the record, to damage."""
    import shutil

    shutil.copytree(record.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_damaged_record_is_refused_with_every_file(broken):
    (broken / "top_tokens.npy").unlink()
    content = bytearray((broken / "logits.npy").read_bytes())
    content[-1] ^= 1
    (broken / "logits.npy").write_bytes(content)
    with pytest.raises(Problems, match=r"2 problems") as caught:
        ReferenceRecord.open(broken)
    assert {problem.where for problem in caught.value.problems} == {"logits.npy", "top_tokens.npy"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "1" * 5000 + "}", "not valid JSON"),
        ("{}", "has format None"),
        (json.dumps({**dict.fromkeys(KEYS), "format": 2, "files": [], "cases": []}), "files and cases are malformed"),
        ('{"format": 9}', "has format 9; expected format 2"),
        (None, "there is no reference record"),
    ],
)
def test_what_is_no_record_is_refused(broken, text, told):
    (broken / "record.json").unlink()
    if text is not None:
        (broken / "record.json").write_text(text)
    with pytest.raises(ArrieroError, match=told):
        ReferenceRecord.open(broken)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret.png"])
def test_a_record_cannot_point_outside_itself(broken, name):
    data = json.loads((broken / "record.json").read_text())
    data["cases"][4]["images"] = [name]
    (broken / "record.json").write_text(json.dumps(data))
    with pytest.raises(ArrieroError, match="holds no picture"):
        ReferenceRecord.open(broken).case(4)
    data["files"][name] = {"bytes": 1, "sha256": ""}
    (broken / "record.json").write_text(json.dumps(data))
    with pytest.raises(Problems, match="points outside the record"):
        ReferenceRecord.open(broken)


def test_a_reference_that_is_not_finite_is_named(reference, cases, tmp_path):
    model = copy.deepcopy(reference.backend.model)
    model.language_model.model.layers[1].input_layernorm.weight.data[3] = math.inf
    broken = Session(TorchBackend.of(model), reference.processor)
    with pytest.raises(ArrieroError, match=r"layer 1, parity case recall-0"):
        write(broken, cases, tmp_path, "forced")


def test_the_live_reference_says_what_the_record_says_and_notices_what_was_changed(reference, cases, record):
    live: Reference = LiveReference(reference, [record.case(number).case for number in range(len(record))])
    for recorded, whole in zip(record, live, strict=True):
        assert list(find_differences(recorded, whole)) == []
    other = LiveReference(rounded(reference), cases[:1])
    assert "layer 0" in list(find_differences(record.case(0), next(iter(other))))
