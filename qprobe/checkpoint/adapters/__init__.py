"""Adapters as peft writes them: what they change, and whether a checkpoint holds it."""
