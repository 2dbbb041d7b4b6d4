"""The second of two processes that train together: does what it is told, one training after the other.

    python -m tests.training.second JOBS

JOBS is a JSON file, a list of [port, options of `qprobe.finetune`]. Prints for each what came of it: the
losses of the steps, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from qprobe.errors import QprobeError
from qprobe.training.finetune import finetune
from tests.emulation import compute_bf16_by_float32


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets for process `rank` of two on one machine."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", **here}


def main() -> None:
    """Train, and say what came of it."""
    compute_bf16_by_float32()
    for port, options in json.loads(Path(sys.argv[1]).read_text()):
        os.environ |= environment(1, port)
        try:
            print(json.dumps(finetune(**options).history), flush=True)
        except QprobeError as error:
            print(json.dumps(str(error)), flush=True)


if __name__ == "__main__":
    main()
