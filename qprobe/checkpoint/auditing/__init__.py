"""What is really in 4-bit in a checkpoint: its files, the loaded model, and what disagrees."""
