"""What is noted of one request: which, when, by whom, for how much, and how it ended; never its prompt or answer.

This module knows nothing of where records are kept.
"""

from __future__ import annotations

from typing import Literal

import msgspec

# answered: the client got its answer. refused: 4xx, before any work. cancelled: the client left, or somebody ended it.
# failed: an error of the server, also one within a stream that had begun.
Outcome = Literal["answered", "refused", "cancelled", "failed"]


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``at`` is when it came, in Unix seconds, and ``key`` the name of its API key; ``first_token`` and
    ``seconds`` are how long the beginning of its answer and all of it took, from when it came.
    """

    request_id: str
    at: float
    key: str | None
    endpoint: str
    model: str | None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    audio_seconds: float = 0
    images: int = 0
    first_token: float | None
    seconds: float
    streamed: bool
    status: int
    outcome: Outcome
