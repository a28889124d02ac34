"""Walks samples through the reference's decoder, one layer at a time: what calibration sees and the record keeps.

Between two layers the hidden states of all samples lie in a memory-mapped file, and so does what was routed to experts.
All samples go through a layer up to its router, then the experts follow one by one, each over all rows that were routed
to it: every weight is read and widened once. In memory there is one sample's step and a layer without its experts, or
one expert, and for calibration the moments of a layer's matrices. Matrices are multiplied by numpy's library, which on
processors of AMD is half as fast again as PyTorch's.
Legend: S tokens of a sample, T tokens of all samples, H hidden, F expert width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arriero.export.proof.decoded_memory import VOCABULARY
from arriero.export.proof.routed_rows import ROUTED, Routed, expert_activation
from arriero.graphs.config import TextConfig
from arriero.graphs.model import KeyValue, Linear, MoE
from arriero.graphs.rotary import rotation_table
from arriero.profiles.journal import Journal, Region, Tell, keep_silent
from arriero.profiles.kv_cache import CacheRange
from arriero.profiles.moments import ROWS, Moments, check_finite
from arriero.profiles.reserved_array import create_array

if TYPE_CHECKING:
    from arriero.runtimes.proof.parity_case import ParityCase
    from arriero.runtimes.session import Session

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]
# What a sample shows: its number, ids [S], pixels [n, 3, h, w] or None, image features [M, H].
Embedded = Callable[[int, NDArray[np.int64], Floats | None, Floats], None]
ROUTER = "feed_forward.router"
# Which matrices of a layer read which input: the module that is watched -> the matrices it stands for.
DENSE = {"gate_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
WATCHED = {
    "self_attn.q_proj": tuple(f"self_attn.{name}_proj" for name in "qkv"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    **{f"feed_forward.{site}": tuple(f"feed_forward.{name}" for name in names) for site, names in DENSE.items()},
    **{
        f"feed_forward.shared_expert.{site}": tuple(f"feed_forward.shared_expert.{name}" for name in names)
        for site, names in DENSE.items()
    },
}


@dataclass
class LayerInputs:
    """One layer's inputs: moments by tensor name (matrices with one input share one), the routed rows of a MoE, and the
    range of the keys and values that it caches.
    """

    layer: int
    moments: dict[str, Moments]
    routed: Routed | None
    cache: CacheRange


@dataclass
class Step:
    """One sample through one layer: what its watched matrices read and gave, keys and values."""

    number: int
    seen: dict[str, tuple[Floats, Floats]]
    present: KeyValue  # [1, K, S, D] each

    def choices(self, per_token: int) -> tuple[NDArray[np.int64], Floats | None]:
        """Of a MoE layer: expert ids [S, k], and how clear each choice was, [S]; None if k is all."""
        logits = torch.from_numpy(self.seen[ROUTER][1])
        chosen = logits.topk(per_token, dim=-1).indices.numpy()
        if logits.shape[-1] == per_token:
            return chosen, None
        best = logits.topk(per_token + 1, dim=-1).values
        return chosen, (best[:, -2] - best[:, -1]).numpy()


class Walk:
    """The samples' way through the decoder. `bounds` [samples + 1] says which rows of a hidden file are whose."""

    def __init__(
        self,
        session: Session,
        samples: Sequence[ParityCase],
        folder: Path,
        second: bool = True,
        what: str = "calibration sample",
        tell: Tell = keep_silent,
    ) -> None:
        """Encode `samples`, prompt and answer, as the reference `session` does; its files will lie in `folder`.

        `second`: whether second moments are wanted, or counts and ranges only. `what` a sample is called in errors.
        What is kept for a resume is in the folder's journal; `tell` as there.
        """
        self.second, self.what = second, what
        self.model: Any = session.backend.model.language_model  # type: ignore[attr-defined]
        self.session, self.folder, self.journal = session, folder, Journal(folder, tell)
        self.text: TextConfig = self.model.config
        self.samples = samples
        self.routed: Routed | None = None
        # Pixels are made again when they are embedded: those of all samples at once may not fit memory.
        self.prompts = [replace(session.encode(s.prompt, s.images), pixel_values=None) for s in samples]
        self.answers = [session.processor.tokenize(sample.answer) for sample in samples]
        lengths = [len(p.input_ids) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])

    @property
    def tokens(self) -> int:
        """T, the tokens of all samples."""
        return int(self.bounds[-1])

    def hidden_file(self, layer: int) -> Path:
        """The hidden states f32 [T, H] that go into `layer`."""
        return self.folder / f"hidden-{layer:03}.npy"

    def has_hidden(self, layer: int) -> bool:
        """Whether the file of `layer` is there, as it was written."""
        return self.journal.holds(self.hidden_file(layer).name)

    def drop_hidden(self, layer: int) -> None:
        """Delete the file of `layer`, which nobody needs any more."""
        self.journal.forget(self.hidden_file(layer).name)
        self.hidden_file(layer).unlink(missing_ok=True)

    def embed(self, progress: Progress | None = None, seen: Embedded | None = None) -> None:
        """Write the hidden states that go into layer 0: embedded ids, with images in their places.

        `seen(number, ids, pixels, features)` is called with what each sample shows.
        """
        out = self._create_hidden(0)
        backend = self.session.backend
        tell = progress or _tell_nobody
        tell(0, len(self.prompts))
        for number, sample in enumerate(self.samples):
            pixels = self.session.encode(sample.prompt, sample.images).pixel_values
            features = np.zeros((0, self.text.hidden_size), np.float32) if pixels is None else backend.vision(pixels)
            ids = self.ids(number)
            embeds = backend.embed(ids[None], features)[0]
            check_finite(embeds, "embeddings", sample.name, self.what)
            out[self.bounds[number] : self.bounds[number + 1]] = embeds
            if seen:
                seen(number, ids, pixels, features)
            tell(number + 1, len(self.prompts))
        self._finish_hidden(out, 0)

    def ids(self, number: int) -> NDArray[np.int64]:
        """The ids [S] of a sample, prompt and answer."""
        return np.concatenate([self.prompts[number].input_ids, self.answers[number]])

    def steps(self, layer: int, progress: Progress | None = None, inner: bool = False) -> Iterator[Step]:
        """Run `layer` over all samples in turn, and write the hidden states after it when the last is taken.

        What a MoE layer sends to its experts is in `routed` then, of which `inner` is kept if it is asked for. Progress
        counts samples, and experts after them.
        """
        module = self.model.model.layers[layer]
        hidden = np.load(self.hidden_file(layer), mmap_mode="r")
        out = self._create_hidden(layer + 1)
        moe = isinstance(module.feed_forward, MoE)
        self.routed = self._new_routed(inner) if moe else None
        total = len(self.prompts) + (self.text.experts if moe else 0)
        tell = progress or _tell_nobody
        tell(0, total)
        with self.session.backend.holding(layer), _widened(module):  # type: ignore[attr-defined]
            for number in range(len(self.prompts)):
                rows = slice(*self.bounds[number : number + 2])
                with _watched(module) as seen:
                    after, present = self._reach_router(layer, np.array(hidden[rows]), rows)
                yield Step(number, seen, present)
                out[rows] = after
                tell(number + 1, total)
        if self.routed is not None:
            self._add_experts(layer, self.routed, out, lambda expert: tell(len(self.prompts) + expert + 1, total))
            for written in (self.routed.rows, *([self.routed.inner] if inner else [])):
                written.flush()  # for other machines that read them
        self._finish_hidden(out, layer + 1)

    def _create_hidden(self, layer: int) -> Any:
        self.drop_hidden(layer)
        return _create(self.hidden_file(layer), self.tokens, self.text.hidden_size)

    def _finish_hidden(self, array: Any, layer: int) -> None:
        """Flush what `_create_hidden` made and give it its name, so that a file of that name is whole; keep it."""
        array.flush()
        file = self.hidden_file(layer)
        file.with_suffix(".partial").replace(file)
        self.journal.keep(file.name, Region.whole(self.folder, file.name))

    def _new_routed(self, inner: bool) -> Routed:
        self.forget_routed()
        rows = self.tokens * self.text.experts_per_token
        samples = np.repeat(np.arange(len(self.prompts)), np.diff(self.bounds) * self.text.experts_per_token)
        file, inner_file = (self.folder / name for name in ROUTED)
        made = _create(file, rows, self.text.hidden_size)
        kept = _create(inner_file, rows, self.text.expert_ffn) if inner else None
        names = [sample.name for sample in self.samples]
        return Routed(file, made, inner_file, kept, np.zeros(rows, np.int64), samples, names)

    @torch.inference_mode()
    def _reach_router(self, layer: int, hidden: Floats, rows: slice) -> tuple[Floats, KeyValue]:
        """A sample [S, H] through `layer`, without its experts if it has any; what these read goes into `routed`."""
        if self.routed is None:
            return self.step(layer, hidden)
        module, per_token = self.model.model.layers[layer], self.text.experts_per_token
        x, present = module.attend(*self._step_inputs(hidden))
        y = module.post_attention_layernorm(x)[0]
        chosen, score = module.feed_forward.route(y)
        sent = slice(rows.start * per_token, rows.stop * per_token)
        self.routed.rows[sent] = (y[:, None] * score[..., None]).flatten(0, 1).numpy()
        self.routed.expert[sent] = chosen.flatten().numpy()
        return (x[0] + module.feed_forward.shared_expert(y)).numpy(), present

    @torch.inference_mode()
    def _add_experts(self, layer: int, routed: Routed, out: Any, tell: Callable[[int], None]) -> None:
        """Add what each expert of `layer` makes of its rows to the hidden states `out` [T, H]."""
        for expert in range(self.text.experts):
            every = np.flatnonzero(routed.expert == expert)
            if len(every):
                gate_up, down = self.session.backend.expert(layer, expert)  # type: ignore[attr-defined]
                for start in range(0, len(every), ROWS):
                    rows = every[start : start + ROWS]
                    inner = expert_activation(np.asarray(routed.rows[rows]), gate_up.numpy().T)
                    if routed.inner is not None:
                        routed.inner[rows] = inner
                    out[rows // self.text.experts_per_token] += inner @ down.numpy()
            tell(expert)

    def observe(self, layer: int, progress: Progress | None = None) -> LayerInputs:
        """Run `layer` over all samples, give what its matrices read, and write the hidden states after it.

        Raises ArrieroError naming layer, input or expert, and sample when an activation is not finite.
        """
        moments: dict[str, Moments] = {}
        cache = CacheRange(self.text.kv_heads, self.text.head_dim, self.text.layers[layer].rope)
        for step in self.steps(layer, progress, inner=True):
            cache.add(*(one[0].transpose(0, 1).numpy() for one in step.present))
            for site, (x, _) in step.seen.items():
                if site == ROUTER:
                    continue
                check_finite(x, f"layer {layer}, input of {site}", self.samples[step.number].name)
                for name in WATCHED[site]:
                    tensor = f"language_model.model.layers.{layer}.{name}.weight"
                    moments.setdefault(
                        tensor, moments.get(self._shared(layer, site)) or Moments(x.shape[-1], self.second)
                    )
                moments[self._shared(layer, site)].add(x)
        return LayerInputs(layer, moments, self.routed, cache)

    @torch.inference_mode()
    def logits(self, hidden: Floats) -> Floats:
        """The logits f32 [S, V] of the hidden states [S, H] after the last layer, `VOCABULARY` of them at a time."""
        last, vocabulary = self.normed(hidden), self.text.vocab_size
        logits = np.empty((len(hidden), vocabulary), np.float32)
        for start in range(0, vocabulary, VOCABULARY):
            stop = min(start + VOCABULARY, vocabulary)
            logits[:, start:stop] = last @ self.head(start, stop).T
        return logits

    @torch.inference_mode()
    def normed(self, hidden: Floats) -> Floats:
        """What the head reads of the hidden states [S, H] after the last layer: [S, H]."""
        normed: Floats = self.model.model.norm(torch.from_numpy(hidden)).numpy()
        return normed

    @torch.inference_mode()
    def head(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` of the head [V, H]."""
        rows: Floats = self.session.backend.head(start, stop).numpy()  # type: ignore[attr-defined]
        return rows

    def forget_routed(self) -> None:
        """Delete what the last layer sent to its experts."""
        self.routed = None
        for name in ROUTED:
            (self.folder / name).unlink(missing_ok=True)

    def _shared(self, layer: int, site: str) -> str:
        return f"language_model.model.layers.{layer}.{WATCHED[site][0]}.weight"

    @torch.inference_mode()
    def step(self, layer: int, hidden: Floats) -> tuple[Floats, KeyValue]:
        """`layer` over one whole sample [S, H]: the hidden states after it [S, H], its keys and values [1, K, S, D]."""
        after, present, _ = self.model.model.layers[layer](*self._step_inputs(hidden))
        return after[0].numpy(), present

    def _step_inputs(self, hidden: Floats) -> tuple[Tensor, tuple[Tensor, Tensor], KeyValue, Tensor, Tensor]:
        """What a decoder layer takes for a sample [S, H] from its first position on."""
        x = torch.from_numpy(hidden)[None]
        positions = torch.arange(x.shape[1])[None]
        empty = torch.zeros(1, self.text.kv_heads, 0, self.text.head_dim)
        no_past = torch.zeros(1, 0, dtype=torch.int64)
        cos, sin = self._rotation
        return x, (cos[:, : x.shape[1]], sin[:, : x.shape[1]]), (empty, empty), positions, no_past

    @cached_property
    def _rotation(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine [1, S, D/2] for the longest sample."""
        return rotation_table(torch.arange(int(np.diff(self.bounds).max(initial=0)))[None], self.text)


def _tell_nobody(done: int, total: int) -> None:
    """Keep silent."""


@contextmanager
def _widened(module: nn.Module) -> Iterator[None]:
    """Within the block, the module's matrices are float32 and multiplied by numpy; experts, whose weights no `Linear`
    holds, stay as stored.
    """
    linears = [part for part in module.modules() if isinstance(part, Linear)]
    stored = [part.weight for part in linears]
    try:
        for part in linears:
            part.weight = nn.Parameter(part.weight.float(), requires_grad=False)
            part.forward = partial(_multiply, part.weight.numpy())  # type: ignore[method-assign]
        yield
    finally:
        for part, weight in zip(linears, stored, strict=True):
            part.weight = weight
            vars(part).pop("forward", None)


def _multiply(weight: Floats, x: Tensor) -> Tensor:
    """What `Linear` gives: [..., in] -> [..., out]."""
    return torch.from_numpy(x.numpy() @ weight.T)


@contextmanager
def _watched(module: nn.Module) -> Iterator[dict[str, tuple[Floats, Floats]]]:
    """Within the block, note the input [S, K] and output [S, N] of each watched linear layer and of the router."""
    seen: dict[str, tuple[Floats, Floats]] = {}

    def note(site: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[site] = (inputs[0].flatten(0, -2).numpy(), output.flatten(0, -2).numpy())

        return hook

    sites = {*WATCHED, ROUTER}
    hooks = [part.register_forward_hook(note(name)) for name, part in module.named_modules() if name in sites]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _create(path: Path, rows: int, columns: int) -> Any:
    return create_array(path.with_suffix(".partial"), np.float32, (rows, columns))
