"""What schemathesis asks by the server's own OpenAPI document: no answer is a fault of the server, or not as described.

    python -m tests.long.openapi BUNDLE [--examples 500] [--seed 0]

Serves BUNDLE on a free port and ends with schemathesis' exit code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.test_serve_command import serving

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("unsupported_method", "allow_header_conformance"),
)


def run(url: str, examples: int, seed: int) -> subprocess.CompletedProcess[str]:
    """Let schemathesis ask the server at `url`, so many requests of each kind by each path."""
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--phases", "coverage,fuzzing"]
    with tempfile.TemporaryDirectory() as folder:  # where it leaves what it remembers
        return subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)


def main() -> int:
    """Serve the bundle, ask, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with serving(arguments.bundle, "--max-tokens", "20", stderr=subprocess.DEVNULL) as (_, url):
        done = run(url, arguments.examples, arguments.seed)
    print(done.stdout, done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
