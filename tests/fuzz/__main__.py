"""Tries every reader on damaged and hostile inputs for a while: `make fuzz`.

    python -m tests.fuzz [SECONDS] [SEED]

Prints how many inputs each reader was given, and every finding: an error of another kind than the reader
explains, a message of more than 2,000 characters, or more than 5 s. Findings are kept in tests/fuzz/corpus.
An input that is still being read after a minute ends the run: it stays in tests/fuzz/hung under its reader's
name, and stderr shows where it hung.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

from tests.fuzz.trying import CORPUS, tried

HUNG = CORPUS.with_name("hung")


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        counts, findings = tried(Path(folder), seconds, seed, HUNG)
    for name, count in counts.items():
        print(f"{count:9,}  {name}")
    print(f"{sum(counts.values()):9,}  in all, {len(findings)} findings")
    for found in findings:
        path = CORPUS / found.reader / hashlib.sha256(found.data).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.data)
        print(f"{path}: {found.what}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
