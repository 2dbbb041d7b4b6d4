"""The layer table and what follows from the same units: rows by layer, aggregates, ranks; no torch."""
