"""Measuring how well speech is understood."""
