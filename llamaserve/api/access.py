"""Who may call what: the seam between ordinary routes and those of whoever runs the server."""

from __future__ import annotations


async def admin() -> None:
    """Let whoever runs the server pass. The routers of routes that change the server, or show what others do, depend on
    this; every other route is for everybody. There are no keys yet, so everybody passes; the admin's is checked here.
    """
