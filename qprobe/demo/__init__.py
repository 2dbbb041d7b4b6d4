"""The embedded demo model, its scenes, its training recipe, and the model with planted outliers."""
