"""Which process of several goes on to choose; `tests/scanning/resume/test_shards.py` runs them."""

from pathlib import Path

import pytest

from qprobe.errors import RunError
from qprobe.runs.shards import finishing
from qprobe.system.processes import Shard


def test_a_lock_that_cannot_be_written_is_explained_in_words(tmp_path: Path):
    (tmp_path / ".lock-selection").mkdir()
    with pytest.raises(RunError, match=r"cannot be written \([A-Z][^\[\]]*\)\. Make room"):  # no errno in it
        with finishing(tmp_path, Shard(), 0, "+10%"):
            pass
