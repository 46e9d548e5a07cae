"""Judging texts: OpenAI's categories, and how the answers of guard models and classifiers become scores in them."""
