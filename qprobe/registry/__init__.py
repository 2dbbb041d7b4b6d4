"""What qprobe can store a weight in and what it can measure, declared as data; no torch."""
