"""Where an adapter begins: at nothing, at a correction of calibrated weights, or distilled."""
