"""Building the model that a manifest describes, proving that it is that model, and comparing it."""
