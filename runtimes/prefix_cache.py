"""Keys and values of prompts that were read before, by their tokens and pictures, so that none is read twice.

Shapes: K key/value heads, P slots, D head dimension, C attention chunk, H hidden.
A prefix is a chain of blocks. A block's name is a hash of the block before it, of its tokens, and of the tiles that its
image placeholders stand for; the first follows from the adapter. Blocks end at the chunk's edge at the latest; a
prefix's last block may be shorter than the others. All blocks have the global layers' keys and values; the chunked
layers' are kept from the chunk that was the current one when the block was saved, since no later chunk sees them. So a
prompt goes on from any token of a chunk whose blocks have them, else from that chunk's edge.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter

import numpy as np

from arriero.runtimes.backend import Between, Cache, Floats, Ints, ModelSpec
from arriero.runtimes.interlude import no_step
from arriero.runtimes.snapshot import Buffer, JoinedBuffers, Snapshot

BLOCK = 64  # tokens; shorter ones share more, longer ones cost less to put together


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a sequence is made of: ids i64 [S], the hash of the tile behind each image placeholder, the adapter."""

    ids: Ints
    placeholders: Ints  # positions of image placeholders, in order
    tiles: tuple[bytes, ...]  # a hash per tile
    per_tile: int  # placeholders of one tile
    adapter: int

    @property
    def root(self) -> bytes:
        """The name that the first block's follows from."""
        return b"%d" % self.adapter

    def name(self, before: bytes, start: int, stop: int) -> bytes:
        """The name of the block of tokens `start` to `stop` behind the one named `before`."""
        hashed = blake2b(before, digest_size=32)
        hashed.update(np.ascontiguousarray(self.ids[start:stop]).tobytes())
        first, end = np.searchsorted(self.placeholders, (start, stop))
        if first < end:
            for tile in self.tiles[first // self.per_tile : (end - 1) // self.per_tile + 1]:
                hashed.update(tile)
        return hashed.digest()


@dataclass(eq=False)
class _Block:
    """Tokens `start` to `stop` of every sequence that begins so."""

    before: bytes
    start: int
    stop: int
    has_chunked: bool
    keys: tuple[Buffer, ...]  # per layer [K, P, D]; P is 0 in a chunked layer whose chunk was over
    values: tuple[Buffer, ...]

    def is_short(self, end: int) -> bool:
        """Whether it ends before `end`, where a whole one would."""
        return self.stop < end

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))


class PrefixCache:
    """Blocks of prefixes and features of tiles, the least recently used of which go when the bytes are too many."""

    def __init__(self, spec: ModelSpec, most_bytes: int) -> None:
        """Keep at most `most_bytes`."""
        self.spec, self.most_bytes, self.nbytes = spec, most_bytes, 0
        self._entries: OrderedDict[bytes, _Block | Floats] = OrderedDict()
        self._short: dict[bytes, Counter[int]] = {}  # how many short blocks of which lengths are behind a block

    # --- prefixes

    def find(self, tokens: Tokens, rest: int = 1) -> Snapshot | None:
        """The longest prefix of `tokens` to go on from, short of the last `rest` tokens before its end or a chunk's.

        The logits after the last one are still asked for, and a backend may sum fewer than `rest` in another order.
        """
        chain = self._chain(tokens)
        self._touch(chain)
        length = max(min(chain[-1][1].stop if chain else 0, len(tokens.ids) - rest), 0)
        edge = self._edge(length)
        if length > edge:
            length = max(min(length, edge + self.spec.attention_chunk_size - rest), edge)
        if not all(block.has_chunked for _, block in chain if self._edge(length) <= block.start < length):
            length = self._edge(length)
        if length == 0:
            return None
        blocks = [block for _, block in chain if block.start < length]
        current = [block for block in blocks if block.start >= self._edge(length)]
        chunked = [layer.attention == "chunked" for layer in self.spec.layers]
        parts = [(current or blocks[:1]) if of_chunk else blocks for of_chunk in chunked]
        slots = [length - self._edge(length) if of_chunk else length for of_chunk in chunked]
        keys, values = (
            JoinedBuffers([[held(block)[number] for block in one] for number, one in enumerate(parts)], slots)
            for held in (attrgetter("keys"), attrgetter("values"))
        )
        return Snapshot(self.spec, length, keys, values, tokens.adapter)

    def save(self, tokens: Tokens, row: Cache, between: Between = no_step) -> None:
        """Keep what the one row of `row`, which holds `tokens`, has beyond the blocks that are there.

        `between` is called between blocks, and may take steps of other rows and save what these have.
        """
        length = len(tokens.ids)
        self._save(tokens, row, length, self._edge(length), 0, between)

    def save_piece(self, tokens: Tokens, row: Cache, fresh: int, prompt: int, between: Between = no_step) -> None:
        """As `save`, the whole blocks alone, after `fresh` more tokens of a prompt of so many were read into `row`.

        What each piece brought is copied while others wait, and not a long prompt at once.
        """
        held = len(tokens.ids)
        length, before = (count - (count - self._edge(count)) % BLOCK for count in (held, held - fresh))
        if length > before:
            self._save(tokens, row, length, self._edge(prompt), before, between)

    def _save(self, tokens: Tokens, row: Cache, length: int, edge: int, least: int, between: Between) -> None:
        """Keep the first `length` of `tokens`, chunked layers from `edge` on, where the first `least` are there."""
        chain = self._chain(tokens)
        for count, (_, block) in enumerate(chain):
            over = block.start >= edge and not block.has_chunked  # saved when its chunk was over; it is the current one
            if over or block.stop < min(self._end(block.start), length):  # or a short one that is longer now
                del chain[count:]
                break
        self._touch(chain)
        name, at = (chain[-1][0], chain[-1][1].stop) if chain else (tokens.root, 0)
        if not least <= at < length:
            return
        snapshot = row.snapshot(0, at)
        while at < length:
            between()
            if chain and name not in self._entries:
                break  # what was saved meanwhile has its place, and nobody would find what is behind it
            block = self._block(snapshot, name, at, min(self._end(at), length), edge)
            name, at = tokens.name(name, at, block.stop), block.stop
            chain.append((name, block))
            if not self._put(name, block, {of_chain for of_chain, _ in chain}):
                break
        self._touch(chain)

    def _edge(self, position: int) -> int:
        """Where the chunk of the token at `position` starts."""
        return position - position % self.spec.attention_chunk_size

    def _end(self, start: int) -> int:
        """Where a whole block from `start` ends."""
        return min(start + BLOCK, self._edge(start) + self.spec.attention_chunk_size)

    def _chain(self, tokens: Tokens) -> list[tuple[bytes, _Block]]:
        """The blocks that `tokens` begin with, by name, as far as they are there."""
        chain: list[tuple[bytes, _Block]] = []
        before, at, whole = tokens.root, 0, True
        while whole:
            stop, whole = self._end(at), False
            for end in (stop, *sorted((at + count for count in self._short.get(before, ())), reverse=True)):
                if end > len(tokens.ids):
                    continue
                name = tokens.name(before, at, end)
                if isinstance(block := self._entries.get(name), _Block):
                    chain.append((name, block))
                    before, at, whole = name, end, end == stop
                    break
        return chain

    def _touch(self, chain: list[tuple[bytes, _Block]]) -> None:
        """Make the blocks of `chain` the newest, the first the very newest: no block goes before those behind it."""
        for name, _ in reversed(chain):
            if name in self._entries:
                self._entries.move_to_end(name)

    def _block(self, snapshot: Snapshot, before: bytes, start: int, stop: int, edge: int) -> _Block:
        """Tokens `start` to `stop` of `snapshot`, in chunked layers those from `edge` on."""
        has_chunked, spans = start >= edge, []
        for layer in self.spec.layers:
            chunked = layer.attention == "chunked"
            first = max(snapshot.start, self._edge(snapshot.length) if chunked else 0)
            spans.append(slice(start - first, stop - first) if has_chunked or not chunked else slice(0, 0))
        keys, values = (
            tuple(buffer[:, span].copy() for buffer, span in zip(buffers, spans, strict=True))
            for buffers in (snapshot.keys, snapshot.values)
        )
        return _Block(before, start, stop, has_chunked, keys, values)

    # --- tiles

    def features(self, tile: bytes) -> Floats | None:
        """The features [M, H] of the tile of that hash."""
        entry = self._entries.get(tile)
        if not isinstance(entry, np.ndarray):
            return None
        self._entries.move_to_end(tile)
        return entry

    def save_features(self, tile: bytes, features: Floats) -> None:
        """Keep the features [M, H] of the tile of that hash."""
        self._put(tile, features.copy(), set())

    # --- both

    def _put(self, name: bytes, entry: _Block | Floats, kept: set[bytes]) -> bool:
        """Add `entry` in the place of the oldest ones; gives whether it fits beside those that are `kept`."""
        if name in self._entries:
            self._drop(name)
        while self.nbytes + entry.nbytes > self.most_bytes:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in kept:
                return False
            self._drop(oldest)
        self._entries[name] = entry
        self.nbytes += entry.nbytes
        if isinstance(entry, _Block) and entry.is_short(self._end(entry.start)):
            self._short.setdefault(entry.before, Counter())[entry.stop - entry.start] += 1
        return True

    def _drop(self, name: bytes) -> None:
        entry = self._entries.pop(name)
        self.nbytes -= entry.nbytes
        if isinstance(entry, _Block) and entry.is_short(self._end(entry.start)):
            lengths, length = self._short[entry.before], entry.stop - entry.start
            lengths[length] -= 1
            if not lengths[length]:
                del lengths[length]
            if not lengths:
                del self._short[entry.before]
