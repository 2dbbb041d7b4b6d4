"""The command `qprobe` with no report at the end of a scan, which takes as long as all else in a tiny one.

For tests of other things that need a process of its own: python -m tests.unreported scan ...
"""

from __future__ import annotations

import qprobe.scanning.finish
from qprobe.cli import main

if __name__ == "__main__":
    qprobe.scanning.finish.write_report = lambda _run: []
    main(prog_name="qprobe")
