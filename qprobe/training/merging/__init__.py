"""Merging an adapter into a checkpoint: both forms, the choice between them, the card with the proof."""
