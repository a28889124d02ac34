"""Log-probabilities as OpenAI's API has them: the chosen token and the likeliest, each as text, bytes and number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from arriero.runtimes.generation import TokenLogprobs
from arriero.runtimes.processor.processor import Processor


def logprob_entries(processor: Processor, entries: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    """Give those of `entries` that the answer's text says, with the texts of their tokens."""

    def token(number: int, logprob: float) -> dict[str, Any]:
        text = processor.decode([number], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        {**token(entry.token_id, entry.logprob), "top_logprobs": [token(*top) for top in entry.top]}
        for entry in entries
        if entry.in_text
    ]
