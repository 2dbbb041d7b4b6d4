"""Other tools' 4-bit formats and choosers beside ours, see `tests.benchmarks.peers.__main__`."""
