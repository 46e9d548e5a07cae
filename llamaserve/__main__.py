"""``python -m llamaserve`` is the command line."""

from llamaserve.cli import main

main()
