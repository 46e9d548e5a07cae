"""The parts of ``scripts/bench.py``: what is asked, of whom, how it is timed, and how it is told."""
