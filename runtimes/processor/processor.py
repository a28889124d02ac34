"""Prompts and images to what a model takes, and its ids back to text: tokenizer, chat template, image tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats, Ints, ModelSpec, no_vision
from arriero.runtimes.grammar import Grammars
from arriero.runtimes.processor.call_dialect import calls_in_python
from arriero.runtimes.processor.chat import Message, Records, as_messages, as_records, expand
from arriero.runtimes.processor.chat_template import DEFAULT, TOOL_USE
from arriero.runtimes.processor.conversation import Conversation, Rendered
from arriero.runtimes.processor.images import Tiler
from arriero.runtimes.processor.pictures import ImageLike, Images, as_list, read_image
from arriero.runtimes.processor.side_files import SideFiles
from arriero.runtimes.processor.video import MOST_FRAMES
from arriero.runtimes.processor.vocabulary import ORIGINAL, Vocabulary

IMAGE, PATCH = "<|image|>", "<|patch|>"
IMAGE_TOKENS = (IMAGE, PATCH, "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")


@dataclass(frozen=True)
class Prompt:
    """What a model takes: ids i64 [S], and f32 [n, 3, h, w] tiles for its image placeholders, or None."""

    input_ids: Ints
    pixel_values: Floats | None = None


class Processor:
    """The tokenizer folder of a checkpoint or bundle, at work. Safe to share between threads.

    What users write is text: `<|eot|>` in a message does not end it, and `<|image|>` takes no picture, unless the
    caller asks for `special_tokens`.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        """Read `folder` (tokenizer.json, its configs and templates) for the model `spec`."""
        self.spec = spec
        self._where = str(folder / "tokenizer.json")
        files = SideFiles.read(folder)
        self._vocabulary = Vocabulary(
            folder / "tokenizer.json", "".join(template.text for template in files.templates.values())
        )
        files.check_added_tokens(self._vocabulary)
        self._bos = None if spec.bos_token_id is None else self._vocabulary.token(spec.bos_token_id)
        self._templates = files.chat_templates(self._bos)
        with_tools = self._templates.get(TOOL_USE, self._templates.get(DEFAULT))
        self.grammars = Grammars(
            folder / "tokenizer.json", spec.vocab_size, spec.eos_token_ids, cache(partial(calls_in_python, with_tools))
        )
        self._starts_with_bos = files.starts_with_bos
        size = self._vocabulary.size
        if size > spec.vocab_size:
            self._refuse_tokenizer(f"the tokenizer knows {size} tokens, the model {spec.vocab_size}")
        if unknown := [token for token in spec.eos_token_ids if self._vocabulary.token(token) is None]:
            self._refuse_tokenizer(f"the tokenizer does not know the model's closing tokens {unknown}")
        self._tiler: Tiler | None = None
        if spec.vision is not None:
            self._tiler = files.tiler(spec.vision)
            self._check_image_tokens()

    def _refuse_tokenizer(self, what: str) -> None:
        remedy = "The tokenizer belongs to another model: take the files of the original checkpoint"
        raise ArrieroError(what, where=self._where, remedy=remedy)

    def _check_image_tokens(self) -> None:
        missing = [token for token in IMAGE_TOKENS if self._vocabulary.id(token) is None]
        if missing:
            raise ArrieroError(
                f"image tokens are missing: {', '.join(missing)}",
                where=self._where,
                expected="the tokenizer of a Llama 4 that sees",
                remedy=ORIGINAL,
            )
        patch = self._vocabulary.id(PATCH)
        if patch != self.spec.image_token_id:
            raise ArrieroError(
                f"{PATCH} has id {patch}",
                where=self._where,
                expected=f"{self.spec.image_token_id}, the model's image token",
                remedy=ORIGINAL,
            )

    def check_same_tokens(self, other: Processor) -> None:
        """Refuse `other`, which is to draft tokens for this one, unless all ids stand for the same in both."""
        ends = ("bos_token_id", "eos_token_ids", "image_token_id")
        differing = [
            f"its {name} is {getattr(other.spec, name)}"
            for name in ends
            if getattr(other.spec, name) != getattr(self.spec, name)
        ]
        if difference := self._vocabulary.difference(other._vocabulary) or next(iter(differing), None):
            raise ArrieroError(
                f"the draft has another tokenizer: {difference}",
                where=other._where,
                expected=f"the tokens of {self._where}",
                remedy="Draft with a bundle of the same family of models, whose tokenizer is the same",
            )

    def encode(
        self,
        prompt: str | Sequence[Message],
        images: Images = None,
        *,
        special_tokens: bool = False,
        tools: Records = None,
        documents: Records = None,
        continue_final_message: bool = False,
        context: int | None = None,
    ) -> Prompt:
        """Give ids and tiles for a text or a list of messages, ending where the answer begins.

        A plain text becomes one user message. Images are Pillow images, paths, encoded bytes or uint8 arrays
        [h, w, 3], one or a list; each needs one image entry, and those of a plain text come before it. Without a chat
        template a plain text is encoded as it stands. With `special_tokens`, control tokens that the prompt spells
        stand for themselves, and `<|image|>` for a picture: for prompts that no stranger had a hand in. `tools` are
        JSON schemas of functions, `documents` mappings with title and text, for templates that take them. With
        `continue_final_message` the answer goes on with the last message. A prompt of more than `context` tokens (the
        model's limit when None) is refused before all of it is read.
        """
        pictures = as_list(images)
        if isinstance(prompt, str) and not prompt:
            raise ArrieroError("the prompt is empty", expected="some text", remedy="Ask something")
        if not isinstance(continue_final_message, bool):
            raise ArrieroError(f"continue_final_message is {continue_final_message!r}", expected="True or False")
        if continue_final_message and isinstance(prompt, str):
            what = "continue_final_message is set, and the prompt is a text"
            raise ArrieroError(what, expected="messages, the last of them the assistant's")
        placeholder = IMAGE if special_tokens else None
        default = self._templates.get(DEFAULT)
        template = default if tools is None else self._templates.get(TOOL_USE, default)
        knows_role = template.knows_role if template is not None else bool
        most = min(context or self._most, self._most)
        frames = self.most_pictures(most)
        wrapped = as_messages(prompt, len(pictures), placeholder)
        _check_count("messages", wrapped, most)
        _check_count("tools", tools, most)
        messages, shown = expand(wrapped, pictures, placeholder, knows_role, frames)
        if not messages:
            raise ArrieroError("the list of messages is empty", expected="at least one message")
        chat = Conversation(
            messages, as_records(tools, "tools"), as_records(documents, "documents"), continue_final_message
        )
        if template is not None:
            rendered = chat.render(template, special_tokens, self._vocabulary, most)
        elif isinstance(prompt, str) and chat.tools is chat.documents is None:
            rendered = self._plain_text(prompt, len(shown), special_tokens)
        else:
            raise ArrieroError(
                "this model has no chat template, so it takes plain text only",
                remedy="Pass one string, or add chat_template.jinja to the checkpoint and rebuild",
            )
        return self._encode_rendered(rendered, shown, most)

    def encode_turn(
        self,
        messages: Sequence[Message],
        images: Images = None,
        *,
        tools: Records = None,
        documents: Records = None,
        continue_final_message: bool = False,
        context: int | None = None,
    ) -> Prompt:
        """Give what `encode` adds behind the words of the last answer in `messages`: its end, and what follows it.

        Image entries up to that answer need no pictures; `images` are those of the entries behind it.
        """
        template = self._templates.get(DEFAULT)
        template = template if tools is None else self._templates.get(TOOL_USE, template)
        last = max((n for n, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
        if template is None or last < 0:
            raise ArrieroError(
                "there is no chat template" if template is None else "the messages have no answer",
                expected="a conversation in which the assistant has answered",
                remedy="Encode the whole of it with `encode`",
            )
        most = min(context or self._most, self._most)
        frames = self.most_pictures(most)
        before, _ = expand(messages[: last + 1], [], None, template.knows_role, frames)
        added, shown = expand(messages[last + 1 :], as_list(images), None, template.knows_role, frames)
        shows = as_records(tools, "tools"), as_records(documents, "documents")
        said = Conversation(before, *shows, continued=True).render(template, False, self._vocabulary)
        whole = Conversation([*before, *added], *shows, continue_final_message).render(
            template, False, self._vocabulary, most, len(said.text)
        )
        if not whole.text.startswith(said.text.replace(said.boundary, whole.boundary)):
            raise ArrieroError(
                "the chat template shows what was said before in another way once something follows",
                where=template.source.where,
                remedy="Give the whole conversation to `generate` at every turn",
            )
        start = len(said.text)
        rendered = Rendered(whole.text[start:], whole.control[start:], whole.boundary)
        return self._encode_rendered(rendered, shown, most)

    def most_pictures(self, context: int) -> int:
        """How many frames or pages a prompt of `context` tokens has room for: each is one tile at least."""
        return MOST_FRAMES if self.spec.vision is None else max(context // self.spec.vision.tokens_per_tile, 1)

    @property
    def _most(self) -> int:
        return self.spec.max_position_embeddings

    def _plain_text(self, text: str, images: int, special_tokens: bool) -> Rendered:
        """A text without a template, behind the token that begins every text."""
        start = (self._bos or "") if self._starts_with_bos else ""
        start += "" if special_tokens and IMAGE in text else IMAGE * images
        return Rendered(start + text, start + (text if special_tokens else "\0" * len(text)))

    def _encode_rendered(self, rendered: Rendered, images: Sequence[ImageLike], most: int) -> Prompt:
        """Give ids and tiles for a rendered text whose `<|image|>`s stand for `images`, in order."""
        places = [match for match in self._vocabulary.control_tokens(rendered.control) if match.group() == IMAGE]
        if len(places) != len(images):
            raise ArrieroError(
                f"the prompt has {len(places)} image placeholders and {len(images)} images were given",
                expected="as many of one as of the other",
                remedy=f"Give one image per image entry ({IMAGE} in a text is one with special_tokens only)",
            )

        self._vocabulary.refuse_long(rendered.text, most, rendered.boundary)  # before any picture is read

        def encode(part: slice) -> list[int]:
            return self._vocabulary.encode(rendered.text[part], rendered.control[part], most, rendered.boundary)

        if not images:
            return Prompt(np.asarray(encode(slice(None)), np.int64))
        if self._tiler is None or self.spec.vision is None:
            raise no_vision()
        per_tile = self.spec.vision.tokens_per_tile
        if len(images) * per_tile > most:
            raise ArrieroError(
                f"the prompt's {len(images)} images are at least {len(images) * per_tile} tokens",
                expected=f"at most {most} tokens together",
                remedy="Show fewer images or frames, or build the bundle with a larger `context`",
            )
        ids: list[int] = []
        tiles, start = [], 0
        for place, image in zip(places, images, strict=True):
            part = self._tiler.tile(read_image(image))
            tiles.append(part.pixel_values)
            ids += encode(slice(start, place.start()))
            ids += self._layout(part.rows, part.columns, per_tile)
            start = place.end()
        ids += encode(slice(start, None))
        pixel_values = np.concatenate(tiles)
        placeholders, features = ids.count(self.spec.image_token_id or -1), len(pixel_values) * per_tile
        if placeholders != features:
            raise ArrieroError(
                f"the prompt has {placeholders} {PATCH} tokens and its images make {features}",
                remedy=f"Leave {PATCH} out of the prompt: it is the model's own placeholder",
            )
        return Prompt(np.asarray(ids, np.int64), pixel_values)

    def _layout(self, rows: int, columns: int, tokens: int) -> Iterator[int]:
        """Give the ids that stand for one image: its tiles row by row, then the global tile."""
        tile = [PATCH] * tokens
        names = ["<|image_start|>"]
        for _ in range(rows if rows * columns > 1 else 0):
            names += [*tile, *(["<|tile_x_separator|>", *tile] * (columns - 1)), "<|tile_y_separator|>"]
        for name in [*names, IMAGE, *tile, "<|image_end|>"]:
            number = self._vocabulary.id(name)
            assert number is not None  # checked when the processor was made
            yield number

    def tokenize(self, text: str, special_tokens: bool = False, context: int | None = None) -> Ints:
        """Give the ids of `text` as it stands [S]; control tokens in it are text unless `special_tokens`.

        A text of far more than `context` tokens is refused before all of it is read; None takes any.
        """
        return np.asarray(self._vocabulary.encode(text, text if special_tokens else "", context), np.int64)

    def decode(self, ids: Sequence[int] | Ints, skip_special_tokens: bool = True) -> str:
        """Give the text of `ids`."""
        return self._vocabulary.decode(ids, skip_special_tokens)


def _check_count(name: str, entries: Records, most: int) -> None:
    """Refuse more entries than tokens that there is room for, before a template shows them: each is one at least."""
    if isinstance(entries, Sized) and len(entries) > most:
        raise ArrieroError(
            f"the prompt has {len(entries):,} {name}, each of a token at least",
            expected=f"at most {most} tokens together",
            remedy="Leave some out, or build the bundle with a larger `context`",
        )
