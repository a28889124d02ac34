"""A short run of the fuzz; the long one is `python -m tests.long.fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.long import fuzz
from tests.long.fuzz import Outcome

ROOT = Path(__file__).parents[1]


def test_damaged_inputs_end_in_an_answer_or_a_clear_error(tmp_path):
    command = [sys.executable, "-m", "tests.long.fuzz", str(tmp_path / "fuzz"), "--cases", "12", "--seed", "20000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 cases from seed 20000" in done.stdout
    assert " 0 failed" in done.stdout


def test_what_the_fuzz_takes_for_a_fault():
    def fault(code: int = 0, out: str = "{}", err: str = "", sound: str | None = None) -> str | None:
        return Outcome(code, out, err, 0.1).fault(sound)

    assert fault(2, err="error: here: what") is None
    assert fault(0, '{"token_ids": [1]}', sound='{"token_ids": [1], "ttft_s": 1}') is None
    assert fault(0, '{"token_ids": [2]}', sound='{"token_ids": [1]}') == "another answer, and nothing said"
    assert fault(2, err="Traceback (most recent call last):\nKeyError: 1") == "traceback: KeyError: 1"
    assert fault(fuzz.UNMEANT, err="unexpected") == "exit code 70: unexpected"
    assert fault(2) == "exit code 2 without a word"
    assert fault(-24) == "took more than 10 s of processor time"
    assert fault(-11) == "died by SIGSEGV"
