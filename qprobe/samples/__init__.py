"""Images, prompts and answers: where they come from, and how they become model inputs."""
