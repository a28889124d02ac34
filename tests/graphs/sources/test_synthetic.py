"""Synthetic models: drawn alike whatever pieces are read, at the released shapes, with the statistics they claim."""

from __future__ import annotations

import hashlib
import math
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.export.proof.reference import TorchBackend, open_reference
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import EMBEDDING, TEXT_PREFIX, expert_tensors
from arriero.graphs.sources import synthetic
from arriero.graphs.sources.drawn_weight import CHUNK, drawn_weight
from arriero.graphs.sources.ledger import check_ledger
from arriero.graphs.sources.released_configs import RELEASED
from arriero.graphs.sources.spread import LIKELY, MASS
from arriero.graphs.sources.synthetic import SyntheticModel
from tests.command import arriero
from tests.narrow import add_narrow
from tests.test_true_size import BUILD, PARAMETERS


def drawn(shape: tuple[int, ...], name: str = "a", seed: int = 0, deviation: float = 1.0):
    return drawn_weight(name, shape, 0.0, deviation, seed, "here")


def values(bits: np.ndarray) -> np.ndarray:
    return bits.view(ml_dtypes.bfloat16).astype(np.float64)


def open_url(url: str) -> Checkpoint:
    return Checkpoint.open(SyntheticModel.parse(url))


def test_any_pieces_are_the_same_numbers():
    """Rows of 7 numbers begin anywhere in a block of the generator; the long tensor crosses its chunks."""
    for shape in ((41, 7), (3, CHUNK + 5)):
        weight = drawn(shape)
        whole = weight.rows(0, shape[0])
        for step in (1, 2, 5):
            pieces = [weight.rows(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
            assert np.array_equal(np.concatenate(pieces), whole)
    assert weight.rows(2, 2).shape == (0, CHUNK + 5)
    with pytest.raises(ValueError, match="rows 2:4"):
        weight.rows(2, 4)


def test_name_and_seed_make_other_numbers():
    rows = [drawn((100, 16), name, seed).rows(0, 100) for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(values(rows[one]).ravel(), values(rows[other]).ravel())[0, 1]) < 0.1
    assert not np.array_equal(rows[0][:50], rows[0][50:])


def test_a_seed_means_the_same_numbers_for_ever():
    """What fails here raises `DRAWING`, so that no bundle is taken for one of the old numbers."""
    digest = hashlib.sha256(drawn((64, 100), "model.norm", 3).rows(0, 64).tobytes()).hexdigest()
    assert digest[:16] == "433ba14fb0e6bc19"


def test_the_numbers_are_normal():
    sample = values(drawn((1000, 1000), deviation=0.25).rows(0, 1000)).ravel()
    count = len(sample)
    assert abs(sample.mean()) < 5 * 0.25 / math.sqrt(count)
    assert sample.std() == pytest.approx(0.25, rel=5 / math.sqrt(2 * count))
    # shares beyond one and three deviations, of which bf16 moves the edge by half a step
    for bound, share in ((1, 0.3173), (3, 0.0027)):
        assert np.mean(np.abs(sample) > bound * 0.25) == pytest.approx(share, abs=0.004)


def test_an_expert_of_true_size_takes_its_own_memory_alone():
    weight = drawn((128, 5120, 16384))
    drawn((1, 1)).rows(0, 1)  # the table
    tracemalloc.start()
    rows = weight.rows(127, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.nbytes == 2 * 5120 * 16384
    assert peak < rows.nbytes + (8 << 20)


@pytest.mark.parametrize("name", RELEASED)
def test_a_model_of_true_size_is_planned(tmp_path, name):
    (tmp_path / "nothing-here-yet").mkdir()
    (tmp_path / "samples.jsonl").write_text('{"prompt": "What is it?", "answer": "it"}\n' * 8)
    (tmp_path / "build.yaml").write_text(BUILD)
    start = time.monotonic()
    done = arriero("plan", tmp_path / "build.yaml", "--model", f"synthetic://{name}", "--json")
    assert done.code in (0, 3), done.err  # 3: of memory or disk there is too little, on most machines
    assert time.monotonic() - start < 60, "no weight is drawn for a plan"
    model = done.json["model"]
    assert (model["parameters"], model["layout"]) == (PARAMETERS[name], "synthetic")
    assert (model["folder"], model["bytes"]) == (f"synthetic://{name}?layers=48&seed=0", 0)


@pytest.mark.parametrize(
    ("url", "layers"),
    [
        ("synthetic://scout?layers=5", [(True, True)] * 3 + [(False, True), (True, True)]),
        ("synthetic://maverick?layers=4", [(True, False), (True, True), (True, False), (False, True)]),
        ("synthetic://guard?seed=1&layers=2", [(True, False)] * 2),
    ],
)
def test_a_cut_model_is_its_first_layers(url, layers):
    checkpoint = open_url(url)
    config = checkpoint.model_config()
    assert [(layer.rope, layer.moe) for layer in config.text.layers] == layers
    whole = open_url(url.partition("?")[0])
    assert all(source.shape == whole.tensors[name].shape for name, source in checkpoint.tensors.items())
    assert config.text.vocab_size == 202048
    check_ledger(checkpoint.tensors.values(), {name: source.shape for name, source in checkpoint.tensors.items()})


def test_every_tensor_has_its_spread(monkeypatch):
    checkpoint = open_url(f"synthetic://{add_narrow(monkeypatch, 'maverick')}?layers=2")

    def spread(name: str) -> float:
        return float(checkpoint.read_float32(name).std())

    gate_up, down = expert_tensors(1)
    layer, tower = f"{TEXT_PREFIX}model.layers.1", "vision_model.model.layers.0"
    expected = {
        EMBEDDING: 1,
        gate_up: 1 / math.sqrt(256),
        down: 1 / math.sqrt(128 * 2 * 2),
        f"{layer}.self_attn.q_proj.weight": 1 / math.sqrt(256),
        f"{layer}.self_attn.o_proj.weight": 1 / math.sqrt(256 * 2 * 2),
        f"{layer}.feed_forward.shared_expert.down_proj.weight": 1 / math.sqrt(128 * 2 * 2),
        f"{tower}.mlp.fc1.weight": 1 / math.sqrt(64),
        f"{tower}.mlp.fc2.weight": 1 / math.sqrt(256 * 2 * 2),
        "vision_model.vision_adapter.mlp.fc2.weight": 1 / math.sqrt(128),
        "multi_modal_projector.linear_1.weight": 1 / math.sqrt(128),
        "vision_model.positional_embedding_vlm": 1 / math.sqrt(3),
    }
    for name, deviation in expected.items():
        count = math.prod(checkpoint.tensors[name].shape)
        assert spread(name) == pytest.approx(deviation, rel=0.005 + 4 / math.sqrt(2 * count)), name
    assert np.all(checkpoint.read_float32(f"{layer}.input_layernorm.weight") == 1)
    assert np.all(checkpoint.read_float32(f"{tower}.self_attn.q_proj.bias") == 0)
    assert not np.all(checkpoint.read_float32("vision_model.class_embedding") == 1)


@pytest.mark.parametrize("released", ["scout", "maverick"])
def test_routers_decide_and_few_tokens_hold_the_mass(monkeypatch, released):
    """At the released vocabulary and numbers of experts, which are what the claims depend on."""
    backend = TorchBackend(open_url(f"synthetic://{add_narrow(monkeypatch, released)}?layers=4"), text_only=True)
    ids = np.random.default_rng(3).integers(0, 1000, (1, 96))
    with backend.router_margins() as margins:
        step = backend.forward(
            backend.embed(ids, np.zeros((0, 256), np.float32)),
            np.arange(96)[None],
            backend.new_cache(1, 96),
            np.arange(96),
            captures=True,
        )
    layers = backend.model.config.text.moe_layers
    medians = [float(np.median(margins[layer][0])) for layer in layers]
    assert 1 < min(medians) < max(medians) < 3  # 1.5 by the formula, which holds of many experts and many tokens
    for experts in step.expert_ids.values():
        assert len(np.unique(experts)) > 8, "no few experts take every token"
    logits = step.logits[0].astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mass = np.partition(shares, -LIKELY, axis=-1)[:, -LIKELY:].sum(-1)
    assert np.median(mass) >= MASS
    for hidden in step.hiddens.values():  # the residual stream stays a few embeddings large
        assert 0.5 < float(np.sqrt(np.mean(hidden**2))) < 3


def test_it_reads_pictures_and_answers(monkeypatch):
    """Token ids of config, tokenizer and processor fit each other, and a tile is as many tokens as the tower gives."""
    checkpoint = open_url(f"synthetic://{add_narrow(monkeypatch, 'scout', vocab_size=2048)}?layers=1")
    with open_reference(checkpoint, text_only=False) as session:
        answer = session.generate("What is it?", np.zeros((70, 90, 3), np.uint8), max_tokens=3)
        assert answer.prompt_tokens > 2 * 16  # two tiles or more, of a grid of 4 x 4 tokens
        assert 1 <= len(answer.token_ids) <= 3


REFUSED = {
    "name": ("synthetic://scuot", r"there is no synthetic model 'scuot'; expected .*scout, maverick.*mean 'scout'\?"),
    "key": ("synthetic://scout?layer=2", r"has the unknown key 'layer'; .*Did you mean 'layers'\?"),
    "empty": ("synthetic://scout?", r"has the unknown key ''; .*For example synthetic://scout\?layers=4"),
    "value": ("synthetic://scout?layers=two", r"layers is 'two', not a whole number"),
    "negative": ("synthetic://scout?seed=-1", r"seed is '-1', not a whole number"),
    "long": (f"synthetic://scout?seed={'9' * 5000}", r"not a whole number"),
    "none": ("synthetic://guard?layers=0", r"there are no 0 layers in guard; .* Give 1 to 48"),
    "many": ("synthetic://guard?layers=49", r"there are no 49 layers in guard; .* Give 1 to 48"),
    "twice": ("synthetic://scout?seed=1&seed=2", r"has the key 'seed' twice"),
    "slashes": ("synthetic:/scout", r"'synthetic:/scout' is malformed; expected synthetic://NAME"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_names_no_synthetic_model_is_refused(case):
    url, message = REFUSED[case]
    with pytest.raises(ArrieroError, match=message):
        SyntheticModel.parse(url)


def test_the_hash_is_that_of_the_recipe(monkeypatch):
    name = add_narrow(monkeypatch, "scout")
    urls = [f"synthetic://{name}", f"synthetic://{name}?layers=7", f"synthetic://{name}?seed=1"]
    hashes = [open_url(url).content_hash() for url in urls]
    assert open_url(f"synthetic://{name}?layers=8&seed=0").content_hash() == hashes[0]
    add_narrow(monkeypatch, "scout", rms_norm_eps=1e-6)
    hashes.append(open_url(urls[0]).content_hash())
    monkeypatch.setattr(synthetic, "DRAWING", synthetic.DRAWING + 1)
    hashes.append(open_url(urls[0]).content_hash())
    assert len(set(hashes)) == len(hashes)
