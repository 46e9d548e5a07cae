"""From chat messages to the prompt text a model expects."""
