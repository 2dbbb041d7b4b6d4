"""Adapters on a loaded model, and where they begin: at nothing, or at a correction of its weights."""
