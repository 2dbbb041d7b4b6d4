"""Rankings that `tests.benchmarks.ranking` compares; only the default is the library's own."""
