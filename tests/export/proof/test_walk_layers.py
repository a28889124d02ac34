"""What calibration sees, against an explicit recomputation from the reference's own parts; and how a build uses it."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arriero.errors import ArrieroError
from arriero.export.calibration.calibrate import Calibration, fallbacks
from arriero.export.calibration.round_matrices import expert_matrices
from arriero.export.proof import decoded_memory
from arriero.export.proof.reference import TorchBackend
from arriero.export.proof.walk_layers import Walk
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.model import Llama4
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.journal import Tell, keep_silent
from arriero.profiles.quantize import dequantize, quantize
from arriero.profiles.quantized_weights import QuantizedWeights, RoundingRecord
from arriero.profiles.recipe import Profile
from arriero.runtimes.processor.processor import Prompt
from tests.flip import flip
from tests.toys import VOCABULARY, load_reference, make_guard_toy, make_maverick_toy, make_scout_toy

LAYER = "language_model.model.layers"
SAMPLES, LENGTH = 5, 40  # each crosses two chunk boundaries of 16
TOYS: dict[str, Any] = {
    "scout": lambda folder: make_scout_toy(folder, 1, vision=False),
    "maverick": lambda folder: make_maverick_toy(folder, 2),
    "guard": lambda folder: make_guard_toy(folder, 4),
    "top-2": lambda folder: make_scout_toy(folder, 3, vision=False, num_experts_per_tok=2),
}


class FakeSession:
    """As much of a session as a walk asks for: ids are drawn, not tokenised."""

    def __init__(self, model: Llama4) -> None:
        self.backend, self.processor = TorchBackend.of(model), self

    @classmethod
    def over(cls, backend: TorchBackend) -> Any:
        """A session over a backend that is there."""
        session = cls.__new__(cls)
        session.backend, session.processor = backend, session
        return session

    def encode(self, messages: Any, images: Any) -> Prompt:
        draw = np.random.default_rng(messages)
        return Prompt(draw.integers(3, VOCABULARY - 10, LENGTH - 2), None)

    def tokenize(self, text: str) -> np.ndarray:
        return np.array([5, 6], np.int64)


class FakeSample:
    def __init__(self, number: int) -> None:
        self.name, self.prompt, self.answer = f"set.jsonl:{number}", number, "x"
        self.images: list[Any] = []


def walk_over(model: Llama4, folder: Path, second: bool = True, tell: Tell = keep_silent) -> Walk:
    folder.mkdir(exist_ok=True)
    samples: Any = [FakeSample(number) for number in range(SAMPLES)]
    session: Any = FakeSession(model)
    return Walk(session, samples, folder, second, tell=tell)


def profile(below: str = "nearest", minimum: int = 8) -> Profile:
    scheme = {"kind": "int_block", "bits": 4, "block": 16, "accuracy_level": 0, "rounding": "gptq"}
    matrices = r"re:language_model\.model\.layers\.\d+\.(self_attn|feed_forward)\.(?!router).*"
    return Profile.model_validate(
        {
            "name": "toy4",
            "version": 1,
            "description": "d",
            "thresholds": {"kl_over_rtn": 0.9},
            "calibration": {"damping": 0.03, "minimum_tokens": minimum, "below": below, "reason": "r"},
            "keep": [{"match": r"re:.*(router|norm|embed_tokens|lm_head).*", "reason": "r"}],
            "rules": [{"match": matrices, "scheme": scheme, "reason": "r"}],
        }
    )


@pytest.mark.parametrize("name", TOYS)
def test_a_walk_gives_the_references_hidden_states_and_inputs(tmp_path: Path, name: str) -> None:
    model = load_reference(TOYS[name](tmp_path / "toy"))
    walk = walk_over(model, tmp_path / "walk")
    walk.embed()
    seen = [walk.observe(layer) for layer in range(4)]
    for number in range(SAMPLES):
        ids = np.concatenate([walk.prompts[number].input_ids, walk.answers[number]])[None]
        backend = walk.session.backend
        embeds = backend.embed(ids, np.zeros((0, 64), np.float32))
        whole = backend.forward(
            embeds, np.arange(LENGTH)[None], backend.new_cache(1, LENGTH), np.arange(1), captures=True
        )
        rows = slice(walk.bounds[number], walk.bounds[number + 1])
        for layer in range(4):
            hidden = np.load(walk.hidden_file(layer + 1))[rows]
            np.testing.assert_allclose(hidden, whole.hiddens[layer][0], atol=1e-5)
            routed = seen[layer].routed
            if routed is not None:
                per_token = whole.expert_ids[layer].shape[-1]
                here = routed.expert[rows.start * per_token : rows.stop * per_token]
                np.testing.assert_array_equal(here, whole.expert_ids[layer].reshape(-1))
                assert (routed.sample[rows.start * per_token : rows.stop * per_token] == number).all()


@pytest.mark.parametrize("name", sorted(TOYS.keys() - {"guard"}))  # which has no MoE layer
@torch.inference_mode()
def test_statistics_are_those_of_an_explicit_recomputation(tmp_path: Path, name: str) -> None:
    folder = TOYS[name](tmp_path / "toy")
    model = load_reference(folder)
    walk = walk_over(model, tmp_path / "walk")
    walk.embed()
    layer = 1  # a MoE layer of each toy
    for before in range(layer):
        walk.observe(before)
    seen = walk.observe(layer)
    module: Any = model.language_model.model.layers[layer]
    hidden = torch.from_numpy(np.load(walk.hidden_file(layer)))
    x = module.input_layernorm(hidden).numpy()
    moments = seen.moments[f"{LAYER}.{layer}.self_attn.k_proj.weight"]
    assert moments.count == SAMPLES * LENGTH
    np.testing.assert_allclose(moments.moment, x.T.astype(np.float64) @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(moments.largest, np.abs(x).max(0), rtol=1e-5)
    # What the experts read: the normalised stream after attention, times the router's score.
    attended = np.concatenate([_attended(walk, layer, number) for number in range(SAMPLES)])
    y = module.post_attention_layernorm(torch.from_numpy(attended))
    value, chosen = module.feed_forward.router(y).topk(walk.text.experts_per_token, -1)
    assert seen.routed is not None
    counts = seen.routed.counts(walk.text.experts)
    assert sum(counts) == SAMPLES * LENGTH * walk.text.experts_per_token
    calibration = Calibration(walk, Checkpoint.open(folder), {"p": profile()}, tmp_path, lambda *_: None)
    matrices = [one for job in calibration._jobs(layer, seen.routed) for one in expert_matrices(job)]
    for expert in range(walk.text.experts):
        token, slot = torch.nonzero(chosen == expert, as_tuple=True)
        rows = y[token] * value[token, slot].sigmoid()[:, None]
        gate, up = (rows @ module.feed_forward.experts.gate_up_proj[expert].float()).chunk(2, -1)
        inner = F.silu(gate) * up
        for (_, _, _, moments), want in zip(matrices[2 * expert : 2 * expert + 2], (rows, inner), strict=True):
            assert moments.count == counts[expert] == len(want)
            np.testing.assert_allclose(moments.moment, (want.T @ want).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TOYS)
def test_cache_ranges_are_those_of_the_references_own_cache(tmp_path: Path, name: str) -> None:
    model = load_reference(TOYS[name](tmp_path / "toy"))
    walk = walk_over(model, tmp_path / "walk")
    walk.embed()
    seen = [walk.observe(layer).cache for layer in range(4)]
    backend: Any = walk.session.backend
    held = []
    for prompt, answer in zip(walk.prompts, walk.answers, strict=True):
        ids = np.concatenate([prompt.input_ids, answer])[None]
        cache = backend.new_cache(1, LENGTH)
        backend.forward(backend.embed(ids, np.zeros((0, 64), np.float32)), np.arange(LENGTH)[None], cache, np.arange(1))
        held.append(cache.padded()[0])
    for layer, found in enumerate(seen):
        keys, values = (torch.cat([past[layer][which] for past in held], 2)[0].numpy() for which in (0, 1))  # [K, T, D]
        assert found.tokens == keys.shape[1] == SAMPLES * LENGTH
        np.testing.assert_allclose(found.value, np.abs(values).max(1), rtol=1e-4)
        if walk.text.layers[layer].rope:
            keys = np.repeat(np.hypot(keys[..., 0::2], keys[..., 1::2]), 2, -1)
        np.testing.assert_allclose(found.key, np.abs(keys).max(1), rtol=1e-4)


def _attended(walk: Walk, layer: int, number: int) -> np.ndarray:
    """The residual stream between attention and feed-forward: the layer without what its feed-forward adds."""
    module: Any = walk.model.model.layers[layer]
    hidden = np.load(walk.hidden_file(layer))[walk.bounds[number] : walk.bounds[number + 1]]
    kept = module.feed_forward.forward
    module.feed_forward.forward = lambda y: (torch.zeros_like(y), torch.zeros(len(y), 1, dtype=torch.int64))
    try:
        return walk.step(layer, np.array(hidden))[0]
    finally:
        module.feed_forward.forward = kept


@pytest.mark.parametrize("name", TOYS)
def test_every_expert_is_calibrated_or_listed_and_no_scale_is_made_up(tmp_path: Path, name: str) -> None:
    folder = TOYS[name](tmp_path / "toy")
    checkpoint, mine = Checkpoint.open(folder), profile()
    stage = tmp_path / "stage"
    walk = walk_over(load_reference(folder), stage)
    counted = Calibration(walk, checkpoint, {"p": mine}, stage, lambda *_: None).run()
    coverage = {int(layer): counts for layer, counts in counted.items()}
    assert set(coverage) == set(walk.text.moe_layers)
    roundings = QuantizedWeights(stage / "p")
    thin = [(layer, e, n) for layer, counts in coverage.items() for e, n in enumerate(counts) if n < 8]
    listed = fallbacks(mine, roundings.notes())
    assert [(one.layer, one.expert, one.tokens) for one in listed] == thin
    ranges = json.loads((stage / "ranges.json").read_text())
    for tensor, scheme in mine.assign(checkpoint.tensors).items():
        if scheme.kind == "exact":
            assert tensor not in roundings
            continue
        assert tensor in ranges
        rounded = roundings.read(tensor, scheme)
        assert np.isfinite(rounded.scales).all()
        assert not (rounded.scales == 1).any()
        weight = checkpoint.read_float32(tensor)
        weight = weight.swapaxes(-1, -2) if weight.ndim == 3 else weight
        assert np.abs(dequantize(rounded) - weight).max() < 0.5 * np.abs(weight).max()
        for layer, expert, _ in thin:
            if tensor.startswith(f"{LAYER}.{layer}.feed_forward.experts"):
                plain = quantize(np.ascontiguousarray(weight[expert]), bits=4, block=16, name="w")
                np.testing.assert_array_equal(rounded.packed[expert], plain.packed)
    if name == "maverick":
        assert thin  # 200 tokens cannot fill 128 experts
    assert [one["tokens"] for one in json.loads((stage / "cache.json").read_text())] == [SAMPLES * LENGTH] * 4
    assert not list(stage.glob("hidden-*")) + list(stage.glob("routed.*"))


def static_profile(smooth: float | None) -> Profile:
    data = profile().model_dump()
    data["calibration"] |= {"damping": None, "below": "widest"}
    data["rules"][0]["scheme"] = {"kind": "int8_static", "smooth": smooth}
    return Profile.model_validate(data)


@pytest.mark.parametrize("smooth", [None, 0.5])
@pytest.mark.parametrize("name", TOYS)
def test_every_static_scale_comes_from_rows_that_were_seen(tmp_path: Path, name: str, smooth: float | None) -> None:
    folder = TOYS[name](tmp_path / "toy")
    checkpoint, mine = Checkpoint.open(folder), static_profile(smooth)
    stage = tmp_path / "stage"
    walk = walk_over(load_reference(folder), stage, second=mine.rounds_by_gptq)
    Calibration(walk, checkpoint, {"p": mine}, stage, lambda *_: None).run()
    ranges = json.loads((stage / "ranges.json").read_text())
    roundings = QuantizedWeights(stage / "p")
    listed = {(one.layer, one.expert) for one in fallbacks(mine, roundings.notes())}
    for tensor, scheme in mine.assign(checkpoint.tensors).items():
        if not scheme.calibrates:
            assert tensor not in roundings
            continue
        inputs = roundings.read_inputs(tensor)
        entries = ranges[tensor] if isinstance(ranges[tensor], list) else [ranges[tensor]]
        divisors = inputs.divisors.reshape(len(entries), -1)
        assert np.isfinite(divisors).all()
        assert (divisors > 0).all()
        widest = max(entry["largest"] for entry in entries)
        layer = int(tensor.split(".layers.")[1].split(".")[0])
        for expert, (entry, largest, divisor) in enumerate(zip(entries, inputs.largest.ravel(), divisors, strict=True)):
            thin = len(entries) > 1 and entry["tokens"] < 8
            assert ((layer, expert) in listed) == thin or len(entries) == 1
            if thin or smooth is None:
                assert (divisor == 1).all()
                assert largest == pytest.approx(widest if thin else entry["largest"])
            else:
                assert 0 < largest <= entry["largest"] / divisor.min() * 1.0001
                assert len(set(divisor)) > 1
    if name == "maverick":
        assert listed


def test_a_killed_calibration_goes_on_after_its_last_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TOYS["scout"](tmp_path / "toy")
    checkpoint, model = Checkpoint.open(folder), load_reference(folder)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    coverage = Calibration(walk_over(model, whole), checkpoint, {"p": profile()}, whole, lambda *_: None).run()

    def killed(step: str, done: int, total: int, unit: str) -> None:
        if step == "calibrate: layer 2 (3 of 4), matrices" and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calibration(walk_over(model, parts), checkpoint, {"p": profile()}, parts, killed).run()
    left = {(note.tensor, note.expert) for note in QuantizedWeights(parts / "p").notes()}
    assert {expert for tensor, expert in left if ".layers.2." in tensor} == {None, 0, 1}
    steps: list[str] = []
    rounded: list[RoundingRecord] = []

    def write(*written: Any) -> None:
        rounded.append(written[-1])
        write_weights(*written)

    write_weights = QuantizedWeights.write
    monkeypatch.setattr(QuantizedWeights, "write", write)
    again = Calibration(
        walk_over(model, parts), checkpoint, {"p": profile()}, parts, lambda step, *_: steps.append(step)
    )
    assert again.run() == coverage
    assert {step.split(",")[0] for step in steps} == {"calibrate: layer 2 (3 of 4)", "calibrate: layer 3 (4 of 4)"}
    new = {(note.tensor, note.expert) for note in rounded}
    assert new.isdisjoint(left)
    assert new | left == {(note.tensor, note.expert) for note in QuantizedWeights(whole / "p").notes()}
    for file in (
        "ranges.json",
        "cache.json",
        *(f"p/{path.name}" for path in (whole / "p").glob("*.npy")),
    ):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()


def test_a_profile_may_stop_the_build_for_thin_experts(tmp_path: Path) -> None:
    folder = TOYS["maverick"](tmp_path / "toy")
    walk = walk_over(load_reference(folder), tmp_path)
    strict = profile(below="stop", minimum=3)
    told = r"layer 1: too few calibration tokens reached experts .*2 \(0\).* as profile `toy4` says"
    with pytest.raises(ArrieroError, match=told):
        Calibration(walk, Checkpoint.open(folder), {"p": strict}, tmp_path, lambda *_: None).run()


def test_an_expert_that_overflows_is_named_with_layer_and_sample(tmp_path: Path) -> None:
    folder = TOYS["scout"](tmp_path / "toy")
    model: Any = load_reference(folder)
    walk = walk_over(model, tmp_path / "walk")
    walk.embed()
    hidden = np.load(walk.hidden_file(0), mmap_mode="r+")
    hidden[walk.bounds[3] + 4, 7] = np.inf
    hidden.flush()
    with pytest.raises(
        ArrieroError, match=r"layer 0, input of self_attn.q_proj, calibration sample set.jsonl:3: 1 of 40"
    ):
        walk.observe(0)


def test_an_expert_whose_inner_activation_overflows_is_named(tmp_path: Path) -> None:
    folder = TOYS["scout"](tmp_path / "toy")
    walk = walk_over(load_reference(folder), tmp_path / "walk")
    walk.embed()
    routed = walk.observe(0).routed
    assert routed is not None
    expert = int(routed.expert[90])
    routed.inner[90] = np.inf
    calibration = Calibration(walk, Checkpoint.open(folder), {}, tmp_path, lambda *_: None)
    told = rf"layer 0, expert {expert}, input of down_proj, calibration sample set.jsonl:2: "
    with np.errstate(all="ignore"), pytest.raises(ArrieroError, match=told):
        list(chain.from_iterable(map(expert_matrices, calibration._jobs(0, routed))))


@pytest.mark.parametrize("name", sorted(TOYS.keys() - {"guard"}))
def test_of_a_decoded_checkpoint_each_expert_is_read_once_and_no_stack_is_held(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(TOYS[name](tmp_path / "toy"))
    read: list[tuple[str, int, int]] = []
    checkpoint.layout.tensors.update(
        {name: _decoded(source, read) for name, source in checkpoint.tensors.items() if ".experts." in name}
    )
    backend = TorchBackend(checkpoint)
    walk, plain = (
        Walk(session, [FakeSample(number) for number in range(SAMPLES)], tmp_path / kind, False)  # type: ignore[list-item]
        for kind, session in (
            ("decoded", FakeSession.over(backend)),
            ("plain", FakeSession(load_reference(tmp_path / "toy"))),
        )
    )
    for one in (walk, plain):
        one.folder.mkdir()
        one.embed()
        for layer in range(4):
            for _ in one.steps(layer):
                pass
    assert len(read) == len(set(read)) > 0
    assert {stop - start for _, start, stop in read} == {1}
    for layer in range(5):
        np.testing.assert_allclose(*(np.load(one.hidden_file(layer)) for one in (walk, plain)), atol=1e-5)


@pytest.mark.parametrize("name", TOYS)
def test_a_layer_that_runs_is_not_given_up_for_its_own_experts(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for nothing, each layer has what it needs all the same."""
    checkpoint = Checkpoint.open(TOYS[name](tmp_path / "toy"))
    checkpoint.layout.tensors.update({name: _decoded(source, []) for name, source in checkpoint.tensors.items()})
    monkeypatch.setattr(decoded_memory, "ROOM", 1)
    ids, every = np.arange(3, 3 + LENGTH)[None], np.arange(LENGTH)
    logits = []
    for backend in (TorchBackend(checkpoint), TorchBackend.of(load_reference(tmp_path / "toy"))):
        embeds = backend.embed(ids, np.zeros((0, 64), np.float32))
        logits.append(backend.forward(embeds, every[None], backend.new_cache(1, LENGTH), every).logits)
    np.testing.assert_allclose(*logits, atol=1e-5)


def _decoded(source: WeightSource, read: list[tuple[str, int, int]]) -> MadeWeight:
    """The tensor as one that is made when it is read; `read` has the name and the rows of each time."""

    def make(start: int, stop: int) -> Any:
        read.append((source.name, start, stop))
        return source.float32(start, stop)

    return MadeWeight(source.name, source.shape, "F32", source.stored, "decoded", make)


FLIPS = {
    "hidden states": ("hidden-002.npy", 300, 0),
    "a layer's record": ("layer-000.json", 20, 0),
    "an expert of a layer that was done": (f"p/{LAYER}.0.feed_forward.experts.down_proj.packed.npy", -1, 0),
    "an expert of the layer that was not": (f"p/{LAYER}.2.feed_forward.experts.down_proj.packed.npy", 130, 2),
}


@pytest.fixture(scope="module")
def killed_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A toy, the stage of a calibration that was left alone, and what one leaves that is killed in layer 2."""
    folder = TOYS["scout"](tmp_path_factory.mktemp("toy"))
    checkpoint, model = Checkpoint.open(folder), load_reference(folder)
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    Calibration(walk_over(model, whole), checkpoint, {"p": profile()}, whole, lambda *_: None).run()

    def killed(step: str, done: int, total: int, unit: str) -> None:
        if step == "calibrate: layer 2 (3 of 4), matrices" and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calibration(walk_over(model, parts), checkpoint, {"p": profile()}, parts, killed).run()
    return folder, whole, parts


@pytest.mark.parametrize("what", FLIPS)
def test_nothing_that_was_changed_since_the_kill_is_used(
    tmp_path: Path, killed_folders: tuple[Path, Path, Path], what: str
) -> None:
    folder, whole, left = killed_folders
    parts = shutil.copytree(left, tmp_path / "parts")
    file, at, first = FLIPS[what]
    flip(parts / file, at)
    steps, told = list[str](), list[str]()
    walk, checkpoint = walk_over(load_reference(folder), parts, tell=told.append), Checkpoint.open(folder)
    again = Calibration(
        walk, checkpoint, {"p": profile()}, parts, lambda step, *_: steps.append(step), tell=told.append
    )
    again.run()
    assert [line.startswith(f"{parts / file}: ") and line.endswith("it is made again") for line in told] == [True]
    layers = list(dict.fromkeys(step.split(",")[0] for step in steps if ": layer " in step))
    assert layers == [f"calibrate: layer {n} ({n + 1} of 4)" for n in range(first, 4)]
    assert len(again.files()) > 30
    for name in again.files():
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
