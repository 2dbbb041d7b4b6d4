"""The matrix as lines of a terminal and as a page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qprobe.system.files import write_atomic
from tests.benchmarks.hardware import made_with

STEPS = (
    "plan", "scan weights", "scan", "select", "load", "verify", "quantize", "audit", "reload", "compare",
    "finetune",
)  # fmt: skip
ORACLES = ("modules", "weight", "activation", "KL", "bytes", "loss", "adapter")
BAD = ("traceback", "refused late")
COMMAND = "python -m tests.benchmarks.architectures --report --jobs 2"

METHOD = """\
Each model has random weights, a hidden size of 32 to 128 and two to four layers, and reads six samples (four
to measure on, two held out), one at a time. `refused` is a sentence before transformers is asked for weights,
`refused late` one after that; `-` did not apply, or a step before it had refused. Where the default scan
refuses, the steps after it go on from the scan of the weights.

The columns behind the steps are oracles that share no rule with qprobe:

- modules: which hold 4-bit codes after loading and reloading, and that every linear is a row of the table;
- weight, activation: the errors of each layer, the second one on its own inputs, through bitsandbytes' own
  functions (within 0.01 % and 0.1 %; the activation error of fused experts has its oracle in
  `tests/measure/test_experts.py`);
- KL: on held-out samples from logits, of 4-bit weights put into the 16-bit model (within 0.5 %) and of the
  models as loaded (within 10 %, since their products round otherwise);
- bytes: from the tensors of the 16-bit, the loaded and the reloaded model;
- loss: of the held-out answers ahead of the first of two LoRA steps, from logits of the loaded model (within
  1 %);
- adapter: the tensors of its file, which two steps have moved, against those of the model that
  `load_finetuned` gives.

Seconds are those of the clock, on a machine that was busy with other work."""


def table_line(found: dict[str, Any]) -> str:
    """One model in a line of the terminal."""
    cells = " ".join(f"{_short(state):9}" for state in _states(found))
    return f"{found['name'][:38]:38} {cells} {found['seconds']:5.1f} s"


def _states(found: dict[str, Any]) -> list[str]:
    steps = [found["cells"][step][0] for step in STEPS]
    told = found["oracles"]
    if "oracles" in told:
        return [*steps, *("failed" for _ in ORACLES)]
    return [*steps, *("-" if x not in told else "untrue" if told[x] else "true" for x in ORACLES)]


def _short(state: str) -> str:
    return {"refused late": "late", "traceback": "TRACE"}.get(state, state)


def failures(outcomes: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence per cell that falls, disagrees, or refuses only after weights were read."""
    found = []
    for one in outcomes:
        for step, (state, said) in one["cells"].items():
            if state in BAD:
                found.append(f"{one['name']}, {step}: {state}: {said}")
        for oracle, said in one["oracles"].items():
            if said:
                more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
                found.append(f"{one['name']}, {oracle}: untrue: {said[0]}{more}")
    return found


def write_report(
    folder: Path, outcomes: Sequence[dict[str, Any]], wrong: Sequence[str], missing: Sequence[str] = ()
) -> None:
    """Writes `folder`/README.md. missing: names of models that did not run."""
    states = Counter(state for one in outcomes for state in _states(one))
    whole = sum(all(one["cells"][x][0] == "ok" for x in STEPS) for one in outcomes)
    seconds = sum(one["seconds"] for one in outcomes)
    rows = [f"| {one['name']} | {' | '.join(_states(one))} | {one['seconds']:.0f} |" for one in outcomes]
    head = ("model", *STEPS, *ORACLES, "s")
    listed = "\n".join(f"- {_cell(x)}" for x in wrong) or "None."
    counts = (
        f"{len(outcomes)} tiny models, {seconds:.0f} s in all; {whole} go the whole road; "
        f"{states['ok']} steps ok, {states['refused']} refused, {states['refused late']} refused late, "
        f"{states['traceback']} tracebacks; oracles: {states['true']} true, {states['untrue']} untrue, "
        f"{states['failed']} failed."
    )
    table = "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])
    parts = ("# Every architecture, step by step", f"    {COMMAND}", f"{made_with('cpu')}; {counts}")
    wrong_part = ("## What is not as it should be", listed)
    refused_part = ("## What is refused, and why", _refusals(outcomes))
    rest = f"{len(missing)} models, whose rows of an earlier run the history of this page has"
    left = f"{rest}: {'; '.join(missing)}."
    missing_part = ("## What did not run this time", left) if missing else ()
    page = "\n\n".join([*parts, METHOD, table, *wrong_part, *missing_part, *refused_part])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "README.md", (page + "\n").encode())


def _refusals(outcomes: Iterable[dict[str, Any]]) -> str:
    """A line for each sentence, with the models and steps that it refuses; CLASS stands for the class."""
    models: dict[tuple[str, str], list[str]] = {}
    for one in outcomes:
        steps: dict[str, list[str]] = {}
        for step in STEPS:
            state, said = one["cells"][step]
            if state == "refused":
                steps.setdefault(said.replace(one["architecture"], "CLASS"), []).append(step)
        for said, refused in steps.items():
            models.setdefault((said, ", ".join(refused)), []).append(one["name"])
    return "\n".join(
        f"- **{steps}** of {', '.join(names)}: {_cell(said)}" for (said, steps), names in models.items()
    )


def _cell(text: str) -> str:
    """`text` in one line."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
