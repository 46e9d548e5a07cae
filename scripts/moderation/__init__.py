"""The parts of ``scripts/train_moderation.py``: its sentences, their embeddings, training, and what is measured."""
