"""Sets of prompts from files and folders: what is read, what is drawn, what their hash covers, what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.build_file.model_spec import model_spec
from arriero.export.build_file.schema import Calibration, Cases
from arriero.export.samples.cases import content_hash, describe_set, draw_cases, encoded_sizes, modality, shortening
from arriero.export.samples.data_files import read_cases
from arriero.export.samples.image_folder import QUESTION
from arriero.graphs.config import ModelConfig
from arriero.runtimes.processor.processor import Processor
from tests.small import TILE, small_scout

BOTH = ("text", "image")


def paint(path: Path, level: int = 90, size: tuple[int, int] = (TILE, TILE)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (level, 20, 200)).save(path)
    return path


def film(path: Path, frames: int = 12) -> Path:
    """A video whose frames grow lighter."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 2 * TILE
        for number in range(frames):
            pixels = np.full((2 * TILE, 2 * TILE, 3), 20 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        file.mux(stream.encode())
    return path


def lines(*samples: Any) -> str:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in samples)


def user(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(entries)}]


PICTURE = {"type": "image", "path": "pictures/red.png"}
ASK = {"type": "text", "text": "What is this?"}
GOOD = lines(
    {"prompt": "What is 17 + 25?", "answer": "42"},
    {"messages": user(PICTURE, ASK), "answer": "a square"},
    "",
    {"messages": user({"type": "video", "path": "clip.mp4", "num_frames": 3}, ASK)},
    {"messages": [{"role": "system", "content": "Be brief."}, *user(ASK), {"role": "assistant", "content": "A test."}]},
    {"prompt": "Sort 3 1 2."},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "pictures" / "red.png")
    film(tmp_path / "clip.mp4")
    (tmp_path / "set.jsonl").write_text(GOOD)
    return tmp_path


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    model = small_scout(tmp_path_factory.mktemp("scout"))
    return Processor(model, model_spec(ModelConfig.load(model)))


def wanted(path: Path, samples: int | None = None, seed: int = 11) -> Calibration:
    return Calibration(set=str(path), samples=samples, seed=seed)


# --- what is read


def test_a_line_is_what_a_session_would_be_asked(folder: Path, processor: Processor) -> None:
    cases = read_cases(folder / "set.jsonl")
    assert [case.name for case in cases] == [f"set.jsonl:{line}" for line in (1, 2, 4, 5, 6)]
    assert [case.family for case in cases] == [modality(case) for case in cases]
    assert [case.family for case in cases] == ["text", "image", "video", "text", "text"]
    assert [case.answer for case in cases] == ["42", "a square", "", "A test.", ""]
    assert cases[3].prompt == [{"role": "system", "content": "Be brief."}, *user(ASK)]
    assert cases[0].scorer == "same_answer"
    assert (cases[0].is_right(" 42."), cases[0].is_right("41"), cases[4].is_right("x")) == (True, False, None)
    with Image.open(folder / "pictures" / "red.png") as picture:
        asked = processor.encode(user({"type": "image", "image": picture}, ASK))
    read = processor.encode(cases[1].prompt)
    np.testing.assert_array_equal(read.input_ids, asked.input_ids)
    assert read.pixel_values is not None
    np.testing.assert_array_equal(read.pixel_values, asked.pixel_values)


def test_a_video_is_so_many_frames_evenly_over_it(folder: Path, processor: Processor) -> None:
    pixels = processor.encode(read_cases(folder / "set.jsonl")[2].prompt).pixel_values
    assert pixels is not None
    per_frame = 2 * 2 + 1  # twice the tile's side each way, and the global tile
    assert len(pixels) == 3 * per_frame
    # Frames 2, 6 and 10 of 12, each 20 levels lighter than the one before; 255 levels span -1 to 1.
    levels = [(float(pixels[n * per_frame].mean()) + 1) * 127.5 for n in range(3)]
    assert levels == pytest.approx([40, 120, 200], abs=8)


def test_a_folder_asks_one_question_of_each_image(folder: Path) -> None:
    paint(folder / "pictures" / "b.JPG")
    (folder / "pictures" / "notes.txt").write_text("no picture")
    cases = read_cases(folder / "pictures")
    assert [(case.name, case.prompt, case.answer) for case in cases] == [
        ("b.JPG", QUESTION, ""),
        ("red.png", QUESTION, ""),
    ]
    assert [modality(case) for case in cases] == ["image", "image"]


def test_sizes_are_those_of_the_encoded_samples(folder: Path, processor: Processor) -> None:
    cases = read_cases(folder / "set.jsonl")
    sizes = encoded_sizes(cases, processor, 1000)
    assert [tiles for _, tiles in sizes] == [0, 1, 15, 0, 0]
    prompt = processor.encode("What is 17 + 25?")
    assert sizes[0][0] == len(prompt.input_ids) + len(processor.tokenize("42"))
    with pytest.raises(Problems, match=r"set.jsonl:4: has \d+ tokens; expected at most 60. Shorten it"):
        encoded_sizes(cases, processor, 60)


def test_nobody_is_told_to_shorten_what_we_drew() -> None:
    for one in (Cases(), Calibration()):
        own = one.model_copy(update={"set": "set.jsonl"})
        assert [" shorten it" in f" {shortening(samples).lower()}" for samples in (one, own)] == [False, True]
        assert ["context" in shortening(samples) for samples in (one, own)] == [isinstance(one, Cases)] * 2


# --- what is drawn


def test_the_seed_says_which_and_the_file_says_in_which_order(folder: Path) -> None:
    (folder / "many.jsonl").write_text(lines(*({"prompt": f"Say {number}."} for number in range(40))))
    draws = [draw_cases(wanted(folder / "many.jsonl", 10, seed), ("text",)) for seed in (1, 1, 2)]
    names = [[int(case.name.partition(":")[2]) for case in draw] for draw in draws]
    assert names[0] == names[1] != names[2]
    assert all(one == sorted(set(one)) and len(one) == 10 for one in names)
    assert len(draw_cases(wanted(folder / "many.jsonl"), ("text",))) == 40


def test_too_few_are_refused(folder: Path) -> None:
    with pytest.raises(ArrieroError, match=r"set.jsonl: 6 samples are wanted and the set holds 5; expected at most 5"):
        draw_cases(wanted(folder / "set.jsonl", 6), BOTH)


def test_pictures_in_a_build_of_text_are_refused(folder: Path) -> None:
    told = r"set.jsonl: set.jsonl:2 and 1 more: shows an image, and the build takes in text only\. Write `modalities"
    with pytest.raises(ArrieroError, match=told):
        draw_cases(wanted(folder / "set.jsonl"), ("text",))


def test_embedded_sets_hold_out_the_parity_cases() -> None:
    seen, asked = (draw_cases(kind(samples=20, seed=3), BOTH) for kind in (Calibration, Cases))
    assert content_hash(seen) != content_hash(asked)
    assert all(case.is_right(case.answer) for case in asked)
    assert (len(draw_cases(Calibration(), BOTH)), len(draw_cases(Cases(), BOTH))) == (96, 48)


# --- what the hash covers


def test_the_hash_is_of_what_is_seen_and_not_of_where_it_lies(folder: Path, tmp_path_factory: Any) -> None:
    def hashed(name: str) -> str:
        return content_hash(read_cases(folder / name))

    before, pictures = hashed("set.jsonl"), hashed("pictures")
    assert re.fullmatch("[0-9a-f]{64}", before)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    folder.rename(elsewhere)
    assert content_hash(read_cases(elsewhere / "set.jsonl")) == before
    elsewhere.rename(folder)
    paint(folder / "pictures" / "red.png", level=91)
    picture_changed = hashed("set.jsonl")
    film(folder / "clip.mp4", frames=13)
    video_changed = hashed("set.jsonl")
    (folder / "set.jsonl").write_text(GOOD.replace('"42"', '"43"'))
    assert len({before, picture_changed, video_changed, hashed("set.jsonl")}) == 4
    assert hashed("pictures") != pictures


def test_a_set_is_described_by_name_hash_and_modalities(folder: Path) -> None:
    settings = wanted(folder / "set.jsonl")
    described = describe_set(settings, draw_cases(settings, BOTH))
    assert described.set == "set.jsonl"
    assert described.samples == {"text": 3, "image": 1, "video": 1}
    assert str(described).startswith("set.jsonl, seed 11: 3 text, 1 image, 1 video samples; sha256 ")
    embedded = Calibration(samples=20)
    assert describe_set(embedded, draw_cases(embedded, BOTH)).samples == {"text": 6, "image": 12, "video": 2}


# --- what is refused

BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ('{"prompt": ', r"bad.jsonl:2: is not JSON \(.*\); expected one object per line, such as"),
    "not an object": ("[1]", r":2: is list, not an object; expected one object per line"),
    "half a character": ('{"prompt": "\\ud83d"}', r":2: is not JSON \(.*surrogates not allowed"),
    "no prompt": ({"answer": "4"}, r":2: has no prompt; expected one of `prompt` \(a text\) and `messages`"),
    "two prompts": ({"prompt": "a", "messages": user(ASK)}, r":2: has both prompt and messages"),
    "unknown key": ({"prompt": "a", "anser": "b"}, r":2: unknown key 'anser'; .* Did you mean 'answer'\?"),
    "empty prompt": ({"prompt": " "}, r':2: prompt: " " is not a text; expected some text'),
    "number": ({"prompt": 7}, r":2: prompt: 7 is not a text"),
    "no answer": ({"prompt": "a", "answer": ""}, r":2: answer: is empty; expected some text"),
    "no messages": ({"messages": []}, r':2: messages: \[\] is no conversation; expected a list of {"role"'),
    "no message": ({"messages": ["Hi"]}, r':2: messages\[0\]: "Hi" is no message'),
    "no role": ({"messages": [{"role": "bot", "content": "a"}]}, r':2: messages\[0\].role: "bot" is no role; .*user'),
    "message key": (
        {"messages": [{"role": "user", "content": "a", "nmae": 1}]},
        r":2: messages\[0\]: unknown key 'nmae'",
    ),
    "no content": ({"messages": [{"role": "user", "content": []}]}, r":2: messages\[0\].content: \[\] is not a text"),
    "no entry": ({"messages": user({"type": "imag"})}, r"content\[0\]: .*is no entry; .* Did you mean 'image'\?"),
    "entry key": (
        {"messages": user({**PICTURE, "pth": 1})},
        r"content\[0\]: unknown key 'pth'; expected one of type, path\. Did you mean 'path'",
    ),
    "no path": ({"messages": user({"type": "image"})}, r"content\[0\].path: is empty; expected some text"),
    "missing image": (
        {"messages": user({"type": "image", "path": "pictures/rod.png"})},
        r':2: messages\[0\].content\[0\].path: there is no image "pictures/rod.png"\. Did you mean \'red.png\'\?',
    ),
    "missing video": (
        {"messages": user({"type": "video", "path": "gone/a.mp4"})},
        r'there is no video "gone/a.mp4"\. Paths start at the folder of the JSONL file',
    ),
    "path with a zero": ({"messages": user({"type": "image", "path": "a\0b"})}, r"there is no image"),
    "frames": (
        {"messages": user({"type": "video", "path": "clip.mp4", "num_frames": 0})},
        r"num_frames: 0 is no number of frames; expected a whole number from 1",
    ),
    "two answers": (
        {"messages": [*user(ASK), {"role": "assistant", "content": "a"}], "answer": "b"},
        r":2: has two answers; .*Remove one",
    ),
    "only an answer": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        r":2: messages: nothing comes before the assistant's answer; expected a question",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_named_with_its_line(folder: Path, name: str) -> None:
    line, told = BAD[name]
    (folder / "bad.jsonl").write_text(lines({"prompt": "fine"}, line))
    with pytest.raises(Problems, match=r"bad.jsonl has mistakes: 1 problem\n") as caught:
        read_cases(folder / "bad.jsonl")
    assert re.search(told, str(caught.value)), str(caught.value)


def test_all_mistakes_come_at_once_in_the_order_of_lines(folder: Path) -> None:
    (folder / "pictures" / "text.png").write_text("no picture")
    broken = {"messages": user({"type": "image", "path": "pictures/text.png"}, ASK)}
    (folder / "bad.jsonl").write_text(lines({"prompt": ""}, broken, "{", {"messages": user(PICTURE, PICTURE), "x": 1}))
    with pytest.raises(Problems) as caught:
        read_cases(folder / "bad.jsonl")
    found = [str(problem) for problem in caught.value.problems]
    for text, told in zip(
        found,
        (r":1: prompt: is empty", r":2: .*text.png: this is not a read", ":3: is not JSON", ":4: unk"),
        strict=True,
    ):
        assert re.search(told, text), text


def test_what_only_the_model_finds_is_named_with_its_line_too(folder: Path, processor: Processor) -> None:
    (folder / "pictures" / "cut.png").write_bytes((folder / "pictures" / "red.png").read_bytes()[:60])
    (folder / "bad.jsonl").write_text(
        lines(
            {"prompt": "why " * 200},
            {"messages": user({"type": "image", "path": "pictures/cut.png"}, ASK)},
            {"prompt": "fine"},
        )
    )
    with pytest.raises(Problems) as caught:
        encoded_sizes(read_cases(folder / "bad.jsonl"), processor, 100)
    first, second = map(str, caught.value.problems)
    assert first.startswith("bad.jsonl:1: has ")
    assert re.search(r"bad.jsonl:2: .*cut.png: the image is truncated or corrupt", second)


def test_pictures_outside_the_sets_folder_are_refused(folder: Path) -> None:
    inner = folder / "set"
    inner.mkdir()
    (inner / "link.png").symlink_to(folder / "pictures" / "red.png")
    (inner / "own.png").write_bytes((folder / "pictures" / "red.png").read_bytes())
    outside = ("../pictures/red.png", str(folder / "pictures" / "red.png"), "link.png")
    entries = [{"messages": user({"type": "image", "path": path}, ASK)} for path in (*outside, "own.png")]
    (inner / "a.jsonl").write_text(lines(*entries))
    with pytest.raises(Problems) as caught:
        read_cases(inner / "a.jsonl")
    told = [str(problem) for problem in caught.value.problems]
    assert len(told) == 3
    assert all("lies outside the set's folder" in one for one in told)
    with pytest.raises(ArrieroError, match=r"link\.png: the image is a link that leaves the folder"):
        read_cases(inner)
    (folder / "linked.jsonl").symlink_to(inner / "a.jsonl")  # paths start where the set was named
    with pytest.raises(Problems, match="there is no image"):
        read_cases(folder / "linked.jsonl")


def test_deep_and_endless_json_of_a_set_is_a_sentence(folder: Path) -> None:
    (folder / "bad.jsonl").write_text("[" * 100_000 + "\n" + '{"prompt": ' + "1" * 5000 + "}\n")
    with pytest.raises(Problems, match=r"(?s):1: is not JSON.*:2: is not JSON"):
        read_cases(folder / "bad.jsonl")
    endless = {"type": "video", "path": "clip.mp4", "num_frames": 10**9}
    (folder / "bad.jsonl").write_text(lines({"messages": user(endless, ASK)}))
    with pytest.raises(Problems, match="1000000000 is no number of frames; expected a whole number from 1 to 1,024"):
        read_cases(folder / "bad.jsonl")


def test_a_video_without_the_package_that_reads_it(folder: Path, processor: Processor, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    told = r"set.jsonl:4: .*clip.mp4: reading a video file needs the package av\. Install it with"
    with pytest.raises(MachineLacks, match=told):
        encoded_sizes(read_cases(folder / "set.jsonl"), processor, 1000)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file holds no prompts; expected lines such as"),
        (b"\n \n", "the file holds no prompts"),
        (b"\x89PNG\xff", r"is not UTF-8 text \(byte 0\); expected JSONL"),
    ],
)
def test_files_that_hold_nothing(folder: Path, content: bytes, told: str) -> None:
    (folder / "bad.jsonl").write_bytes(content)
    with pytest.raises(ArrieroError, match=rf"bad.jsonl: {told}"):
        read_cases(folder / "bad.jsonl")


def test_a_folder_without_images(folder: Path) -> None:
    with pytest.raises(ArrieroError, match=r"the folder holds no images; expected files with .apng, .* directly in it"):
        read_cases(folder)


def test_a_set_that_is_a_device_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "set.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ArrieroError, match="is no file; expected a regular file"):
        read_cases(tmp_path / "set.jsonl")
