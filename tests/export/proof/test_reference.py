"""The reference backend against the bare reference model: caches, batches, images, captures, margins."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError, Problems
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.rotary import rotation_table
from tests.toys import IMAGE_TOKEN, make_maverick_toy, make_scout_toy

# Relative to the largest value: both sides are fp32 and differ only in the order of summation.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def scout(tmp_path_factory) -> TorchBackend:
    return TorchBackend(make_scout_toy(tmp_path_factory.mktemp("scout"), seed=3))


@pytest.fixture(scope="module")
def maverick(tmp_path_factory) -> TorchBackend:
    return TorchBackend(make_maverick_toy(tmp_path_factory.mktemp("maverick"), seed=4))


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max())


def draw_ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 150, (batch, length))


def embed(backend: TorchBackend, ids: np.ndarray) -> np.ndarray:
    return backend.embed(ids, np.zeros((0, backend.spec.hidden_size), np.float32))


def step(backend: TorchBackend, ids: np.ndarray, cache, captures: bool = False):
    positions = cache.lengths[:, None] + np.arange(ids.shape[1])
    return backend.forward(embed(backend, ids), positions, cache, np.arange(ids.shape[1]), captures)


def bare(backend: TorchBackend, ids: np.ndarray):
    """One pass of the bare model over whole rows of one length."""
    batch, length = ids.shape
    model = backend.model.language_model
    none = torch.zeros(batch, 0, dtype=torch.int64)
    with torch.no_grad():
        return model(
            torch.from_numpy(embed(backend, ids)),
            torch.arange(length).expand(batch, -1),
            none,
            none,
            torch.arange(length),
            model.empty_cache(batch),
        )


def test_weights_keep_the_checkpoints_dtype_and_compute_is_float32(scout):
    assert {parameter.dtype for parameter in scout.model.parameters()} == {torch.bfloat16}
    assert step(scout, draw_ids(1, 4), scout.new_cache(1, 8)).logits.dtype == np.float32


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_prefill_in_pieces_then_decode_equals_the_whole(name, request):
    backend = request.getfixturevalue(name)
    ids = draw_ids(1, 40)  # two and a half chunks of 16
    cache = backend.new_cache(1, 40)
    parts = [
        step(backend, ids[:, a:b], cache).logits for a, b in [(0, 16), (16, 30), *((n, n + 1) for n in range(30, 40))]
    ]
    assert close(np.concatenate(parts, axis=1), bare(backend, ids).logits.numpy())
    assert cache.lengths.tolist() == [40]


def test_rows_filled_one_by_one_then_decoded_together(scout):
    lengths, ids = [5, 21, 16], draw_ids(3, 24)
    cache = scout.new_cache(3, 24)
    for row, length in enumerate(lengths):
        step(scout, ids[row : row + 1, :length], cache.rows(row, row + 1))
    assert cache.lengths.tolist() == lengths
    together = step(scout, np.stack([ids[row, n : n + 1] for row, n in enumerate(lengths)]), cache).logits
    for row, length in enumerate(lengths):
        alone = bare(scout, ids[row : row + 1, : length + 1]).logits.numpy()
        assert close(together[row, 0], alone[0, length])
    assert cache.lengths.tolist() == [6, 22, 17]


def test_a_copied_row_goes_its_own_way(scout):
    ids = draw_ids(1, 12)
    cache = scout.new_cache(2, 16)
    step(scout, ids[:, :10], cache.rows(0, 1))
    cache.copy_row(0, 1)
    step(scout, ids[:, 10:11], cache.rows(0, 1))
    assert cache.lengths.tolist() == [11, 10]
    assert close(
        step(scout, ids[:, 11:12], cache.rows(1, 2)).logits[0, 0],
        bare(scout, np.concatenate([ids[:, :10], ids[:, 11:12]], axis=1)).logits[0, 10].numpy(),
    )


def test_taps_are_those_of_the_bare_model(maverick):
    ids = draw_ids(1, 9)
    output = step(maverick, ids, maverick.new_cache(1, 9), captures=True)
    expected = bare(maverick, ids)
    assert list(output.hiddens) == [0, 1, 2, 3]
    assert list(output.expert_ids) == [1, 3]  # Maverick's dense layers route nothing
    assert all(close(output.hiddens[n], expected.hiddens[n].numpy()) for n in range(4))
    assert np.array_equal(output.expert_ids[3][0], expected.expert_ids[1].numpy())
    assert not step(maverick, ids, maverick.new_cache(1, 9)).hiddens


def test_images_take_the_place_of_their_tokens(scout):
    tiles = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    features = scout.vision(tiles)
    assert features.shape == (2 * scout.spec.vision.tokens_per_tile, 64)
    ids = draw_ids(1, 20)
    ids[0, 3:11] = IMAGE_TOKEN
    embeds = scout.embed(ids, features)
    assert np.array_equal(embeds[0, 3:11], features)


def test_margins_are_noted_for_this_threads_forwards_only(scout):
    ids = draw_ids(1, 20)
    with scout.router_margins() as noted:
        other = threading.Thread(target=lambda: step(scout, ids, scout.new_cache(1, 20)))
        other.start()
        other.join()
        assert not noted
        cache = scout.new_cache(1, 20)
        step(scout, ids[:, :12], cache)
        step(scout, ids[:, 12:], cache)
    step(scout, ids, scout.new_cache(1, 20))
    assert sorted(noted) == [0, 1, 2, 3]
    assert [len(piece) for piece in noted[0]] == [12, 8]
    hidden = torch.from_numpy(embed(scout, ids))  # layer 0's router, worked out again from its parts
    layer = scout.model.language_model.model.layers[0]
    with torch.no_grad():
        model, none = scout.model.language_model, torch.zeros(1, 0, dtype=torch.int64)
        positions = torch.arange(20)[None]
        rotation = rotation_table(positions, model.config)
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), rotation, model.empty_cache(1)[0], positions, none)
        logits = layer.feed_forward.router(layer.post_attention_layernorm(hidden + attended)[0])
    best = logits.sort(dim=-1, descending=True).values
    assert np.allclose(np.concatenate(noted[0]), (best[:, 0] - best[:, 1]).numpy(), atol=1e-5)


def test_what_cannot_be_done_is_refused(scout, maverick, tmp_path):
    with pytest.raises(ArrieroError, match="no vision tower"):
        maverick.vision(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(ArrieroError, match="do not fit a cache of 4"):
        step(scout, draw_ids(1, 5), scout.new_cache(1, 4))
    with pytest.raises(ValueError, match="continue the cache"):
        scout.forward(np.zeros((1, 1, 64), np.float32), np.array([[7]]), scout.new_cache(1, 9), np.array([0]))
    with pytest.raises(ArrieroError, match="no such folder"):
        TorchBackend(tmp_path / "nothing")


def test_a_checkpoint_with_a_tensor_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_scout_toy(tmp_path / "toy", seed=5, vision=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Problems, match=r"norm\.weight"):
        TorchBackend(folder)
