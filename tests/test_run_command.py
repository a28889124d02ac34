"""`arriero run`: what its options do to an answer."""

from __future__ import annotations

import json

import pytest

from tests.command import arriero

PROMPT = "What is 17 + 25?"


@pytest.fixture(scope="module")
def ask(workshop):
    """Ask the exact bundle with options, and give the answer as JSON."""

    def run(*options):
        done = arriero("run", workshop / "bundles" / "fp32", PROMPT, "--json", "--max-tokens", "6", *options)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


def test_options_reach_the_answer(ask):
    plain = ask()
    assert plain["logprobs"] is None
    first, *_ = plain["token_ids"]
    assert ask("--stop-token-id", first)["token_ids"] == [first]
    drawn = ask("--temperature", "3", "--seed", "1")
    assert ask("--temperature", "3", "--seed", "1", "--min-p", "1")["token_ids"] == plain["token_ids"]
    assert drawn["token_ids"] != plain["token_ids"]
    unlike = ask("--presence-penalty", "2", "--frequency-penalty", "2", "--repetition-penalty", "50")
    assert len(set(unlike["token_ids"])) == len(unlike["token_ids"])


def test_log_probabilities_are_told_per_token(ask):
    told = ask("--logprobs", "2")
    assert [entry["token_id"] for entry in told["logprobs"]] == told["token_ids"]
    for entry in told["logprobs"]:
        assert entry["top"][0] == [entry["token_id"], pytest.approx(entry["logprob"])]  # greedy takes the likeliest
        assert len(entry["top"]) == 2


def test_a_document_is_shown_as_its_pages(workshop, tmp_path):
    pypdfium2 = pytest.importorskip("pypdfium2", reason="needs the package pypdfium2")
    written = pypdfium2.PdfDocument.new()
    for _ in range(2):
        written.new_page(200, 100)
    written.save(tmp_path / "a.pdf")
    bundle = workshop / "bundles" / "fp32"
    done = arriero("run", bundle, PROMPT, "--json", "--max-tokens", "2", "--document", tmp_path / "a.pdf")
    assert done.code == 0, done.err
    alone = arriero("run", bundle, PROMPT, "--json", "--max-tokens", "2")
    pages = [json.loads(each.out)["prompt_tokens"] for each in (done, alone)]
    assert pages[0] > pages[1] + 2
    (tmp_path / "b.pdf").write_bytes(b"no PDF")
    refused = arriero("run", bundle, PROMPT, "--document", tmp_path / "b.pdf")
    assert refused.code == 2
    assert "b.pdf: this is not a readable PDF" in refused.err


def test_a_document_or_video_of_more_than_the_context_is_refused_before_it_is_drawn(workshop, tmp_path, monkeypatch):
    pypdfium2 = pytest.importorskip("pypdfium2", reason="needs the package pypdfium2")
    written = pypdfium2.PdfDocument.new()
    for _ in range(1000):
        written.new_page(200, 100)
    written.save(tmp_path / "a.pdf")
    monkeypatch.setattr("arriero.runtimes.processor.documents._drawn", lambda *_: pytest.fail("a page was drawn"))
    bundle = workshop / "bundles" / "fp32"
    refused = arriero("run", bundle, PROMPT, "--document", tmp_path / "a.pdf")
    assert refused.code == 2
    assert "the document has 1,000 pages; expected at most" in refused.err
    (tmp_path / "a.mp4").touch()
    refused = arriero("run", bundle, PROMPT, "--video", tmp_path / "a.mp4", "--frames", "1000")
    assert refused.code == 2
    assert "num_frames is 1,000; expected at most" in refused.err
