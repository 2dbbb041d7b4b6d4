"""What is known of models: the catalogue, their towers, their linears, and how to load them."""
