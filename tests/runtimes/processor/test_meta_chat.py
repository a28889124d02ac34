"""Our own chat template beside Meta's `ChatFormat`: equal ids for conversations drawn from a seed, and traps."""

import io
import json
import random

import pytest
from PIL import Image

from arriero.graphs.sources.llama4_defaults import default_side_files
from tests.runtimes.processor.test_control_tokens import FORGED
from tests.runtimes.processor.test_processor import text_of

CONVERSATIONS = 50
WORDS = [
    "What is 17 + 25?",
    "  two spaces before and after  ",
    "\n\nlines before",
    "lines after \n\n",
    " \n mixed \t\r\n",
    "¿Qué tal, José? 漢字 👩‍🚀",
    "def f(a):\n    return {'k': [a, None]}\n",
    '{"type": "function", "name": "f", "parameters": {}}',
    "'s 've I'LL",
    "1234567",
    "...",
    FORGED,
    "<|image|><|patch|> <|python_start|>x<|python_end|><|eom|>",
    "",
]
ARGUMENTS = [
    {},
    {"city": "Lima", "days": 3, "metric": True, "ratio": 0.5, "extra": None},
    {"q": 'quotes " and \\ and é 漢 😀\n', "list": [1, "a", [2]], "nested": {"a": {"b": []}}},
    {"typed": "<|eot|><|header_start|>"},
]
BUILTIN = [
    ("brave_search", {"query": "Cusco"}),
    ("wolfram_alpha", {"query": "2^10"}),
    ("photogen", {"query": "a llama"}),
]
CODE = ("code_interpreter", {"code": "print('hi')\n"})


class Drawn:
    """One conversation twice: as our messages, and as Meta's."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.ours, self.metas = [], []
        if self.draw.random() < 0.5:
            self.add("system", self.draw.choice(WORDS))
        for _ in range(self.draw.randrange(1, 4)):
            self.add("user", self.question() if self.draw.random() < 0.6 else self.draw.choice(WORDS))
            if self.draw.random() < 0.5:
                calls = [self.call() for _ in range(self.draw.randrange(1, 3))]
                self.add("assistant", self.draw.choice(["", None, "I look it up.", "Wait: "]), calls)
                for _ in calls:
                    self.add("tool", self.draw.choice([json.dumps({"näme": [1]}), *WORDS]))
            self.add("assistant", self.draw.choice(WORDS))
        self.add("user", self.draw.choice(WORDS))

    def question(self):
        entries = [self.picture() if self.draw.random() < 0.4 else self.draw.choice(WORDS) for _ in range(3)]
        return entries if any(isinstance(entry, bytes) for entry in entries) else [*entries, self.picture()]

    def picture(self):
        size = self.draw.choice([(336, 336), (20, 50), (700, 300), (300, 1000), (1500, 1500), (337, 672)])
        stream = io.BytesIO()
        Image.new(self.draw.choice(["RGB", "L", "RGBA", "P"]), size).save(stream, "PNG")
        return stream.getvalue()

    def call(self):
        if self.draw.random() < 0.3:
            return self.draw.choice([*BUILTIN, CODE])
        return self.draw.choice(["get_weather", "f"]), self.draw.choice(ARGUMENTS)

    def add(self, role, content, calls=()):
        from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem, ToolCall

        ours, meta = content, content or ""
        if isinstance(content, list):
            picture = [isinstance(entry, bytes) for entry in content]
            ours = [
                {"type": "image", "image": entry} if shown else {"type": "text", "text": entry}
                for entry, shown in zip(content, picture, strict=True)
            ]
            meta = [
                RawMediaItem(data=io.BytesIO(entry)) if shown else RawTextItem(text=entry)
                for entry, shown in zip(content, picture, strict=True)
            ]
        message = {"role": role, "content": ours}
        if calls:
            as_text = self.draw.random() < 0.5  # as OpenAI's API has them
            message["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": json.dumps(a) if as_text else a}}
                for name, a in calls
            ]
        self.ours.append(message)
        tool_calls = [ToolCall(call_id="0", tool_name=name, arguments=json.dumps({})) for name, _ in calls]
        for call, (_, arguments) in zip(tool_calls, calls, strict=True):
            call.arguments = arguments  # deeper than the type that Meta declares allows
        self.metas.append(RawMessage(role=role, content=meta, tool_calls=[]))
        self.metas[-1].tool_calls = tool_calls


@pytest.mark.parametrize("seed", range(CONVERSATIONS))
def test_ids_of_a_drawn_conversation_are_those_of_metas_chat_format(meta, meta_processor, seed):
    drawn = Drawn(seed)
    expected = meta.encode_dialog_prompt(drawn.metas)
    prompt = meta_processor.encode(drawn.ours)
    assert prompt.input_ids.tolist() == expected.tokens
    tiles = sum(len(image) for image in expected.images or [])
    assert (0 if prompt.pixel_values is None else len(prompt.pixel_values)) == tiles


def test_the_drawn_conversations_hold_what_they_are_for():
    pytest.importorskip("llama_models", reason="needs llama-models")
    messages = [message for seed in range(CONVERSATIONS) for message in Drawn(seed).ours]
    roles = [message["role"] for message in messages]
    assert min(roles.count(role) for role in ("system", "user", "assistant", "tool")) > 20
    assert sum("tool_calls" in message for message in messages) > 20
    assert sum(isinstance(message["content"], list) for message in messages) > 20
    assert sum(message["content"] is None for message in messages) > 5


def test_documents_stand_where_metas_format_has_a_messages_context(meta, meta_processor):
    from llama_models.datatypes import RawMessage

    documents = [{"title": "Llamas", "text": "They hum.\n"}, {"title": "Alpacas", "text": "Ellos también."}]
    context = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    raw = [RawMessage(role="user", content="What do they do?", context=context)]
    prompt = meta_processor.encode("What do they do?", documents=documents)
    assert prompt.input_ids.tolist() == meta.encode_dialog_prompt(raw).tokens


TOOLS = [{"type": "function", "function": {"name": "f", "description": "Does <|eot|>.", "parameters": {}}}]


def test_tools_are_said_to_the_system(meta_processor):
    text = text_of(meta_processor, meta_processor.encode("a", tools=TOOLS))
    assert text.startswith("<|begin_of_text|><|header_start|>system<|header_end|>\n\nYou can call these functions:")
    assert json.dumps(TOOLS[0]) in text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    prompt = meta_processor.encode(messages, tools=TOOLS)
    assert "Be brief.\n\nYou can call these functions:" in text_of(meta_processor, prompt)
    assert prompt.input_ids.tolist().count(200008) == 2  # what a description spells ends no turn


def test_the_last_message_is_continued(meta, meta_processor):
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2, "}]
    from llama_models.datatypes import RawMessage

    whole = meta.encode_dialog_prompt([RawMessage(**message) for message in chat]).tokens
    end = len(whole) - 1 - whole[::-1].index(200008)  # the <|eot|> of the last message
    assert meta_processor.encode(chat, continue_final_message=True).input_ids.tolist() == whole[:end]


def test_the_template_is_one_that_transformers_renders(meta_folder, meta_processor):
    """There `token_boundary` is nothing: the text is the same, and tokens may reach across its places."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(meta_folder))
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}]},
        {"role": "tool", "content": "d"},
    ]
    text = tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert text_of(meta_processor, meta_processor.encode(chat, tools=TOOLS)) == text


def test_default_files_without_a_tower_say_nothing_of_images():
    assert {*default_side_files(None)} == {"tokenizer_config.json", "chat_template.jinja"}
