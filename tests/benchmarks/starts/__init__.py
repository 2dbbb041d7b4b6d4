"""The study of where adapters begin, see `tests.benchmarks.starts.__main__`."""
