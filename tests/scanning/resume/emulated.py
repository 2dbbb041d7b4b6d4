"""`tests.unreported`, which computes in bf16 as the tests do: see `tests.emulation`."""

from __future__ import annotations

import runpy

from tests.emulation import compute_bf16_by_float32

if __name__ == "__main__":
    compute_bf16_by_float32()
    runpy.run_module("tests.unreported", run_name="__main__")
