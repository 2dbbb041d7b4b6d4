"""Fine-tuning: conversations, their encoding, the training run, its adapter, and the memory it takes."""
