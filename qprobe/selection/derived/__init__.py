"""What is derived from the units beyond the tables of `qprobe.runs`, and what was cut of all made again."""
