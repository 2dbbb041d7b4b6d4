"""Each peer in a process of its own, under the Python that knows it, with a time limit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.peers.declared import Peer

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Machine:
    """pythons: the Python of a tool by its import name; any other tool has to be importable here."""

    pythons: Mapping[str, Path]
    device: str
    threads: int
    limit_s: float


def python_of(tool: str, machine: Machine) -> str | None:
    """The Python that can import `tool`, None if there is none."""
    python = str(machine.pythons.get(tool, sys.executable))
    found = subprocess.run([python, "-c", f"import {tool}"], capture_output=True, cwd=ROOT)
    return python if found.returncode == 0 else None


def run(peer: Peer, task: Path, out: Path, machine: Machine) -> str | None:
    """None where the peer handed back its results under `out`, else why not."""
    python = python_of(peer.tool, machine)
    if python is None:
        return f"{peer.tool} cannot be imported"
    command = [
        python, "-m", f"tests.benchmarks.peers.workers.{peer.worker}",
        str(task), str(out), json.dumps(peer.options),
        "--device", machine.device, "--threads", str(machine.threads),
    ]  # fmt: skip
    with (out.parent / f"{out.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=machine.limit_s
            )
        except subprocess.TimeoutExpired:
            return f"took more than {machine.limit_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = Path(log.name).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exited with {done.returncode}"
