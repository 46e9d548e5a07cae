"""Which models there are, where their weights come from, and which of them run."""
