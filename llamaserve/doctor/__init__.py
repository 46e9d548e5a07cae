"""The doctor: what on this machine keeps llamaserve from working, or working fast, and the commands that fix it."""
