"""The classifier's own work on a request: within the time limit of its model, and nothing done twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamaserve.api import moderating
from llamaserve.engine.params import Footprint
from llamaserve.errors import TimeLimitExceeded
from llamaserve.moderation.categories import Scores
from llamaserve.moderation.heads import Heads
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import load_registry

SENTENCE = "The library opens at nine, and the reading room with the large windows is on the first floor."


def classified(embedding_model: Path, folder: Path, texts: list[str], **settings: float) -> Sequence[Scores]:
    """Return the scores that the classifier gives, with a model of these settings."""
    path = folder / "models.yaml"
    fields = "".join(f", {name}: {value}" for name, value in settings.items())
    path.write_text(f"models:\n  minilm: {{source: 'file:{embedding_model}'{fields}}}\n")

    async def run() -> Sequence[Scores]:
        pool = ModelPool(load_registry(path), (), budget=lambda _devices: Footprint(1 << 40))
        model = pool.get("minilm")
        try:
            return (await moderating._by_heads(model, texts, str)).scores
        finally:
            assert (model.embedding_admission.open, model.busy) == (0, False)
            await pool.aclose()

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("slow", ["chunks", "scores"])
def test_the_classifier_s_own_work_is_within_the_time_limit(
    embedding_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    where = moderating if slow == "chunks" else Heads
    work = getattr(where, slow)

    def slowed(*given: object) -> object:
        time.sleep(0.5)
        return work(*given)

    monkeypatch.setattr(where, slow, slowed)
    with pytest.raises(TimeLimitExceeded):
        classified(embedding_model, tmp_path, [SENTENCE], time_limit=0.3)


def test_what_occurs_often_is_looked_at_once(
    embedding_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    scores = Heads.scores

    def counted(self: Heads, vector: Sequence[float], text: str) -> Scores:
        seen.append(text)
        return scores(self, vector, text)

    monkeypatch.setattr(Heads, "scores", counted)
    texts = [SENTENCE, f"{SENTENCE} " * 100, "." * 100_000, f"{SENTENCE} {'?' * 120}"]
    once, often, dots, both = classified(embedding_model, tmp_path, texts)
    assert sorted(seen) == sorted([SENTENCE, "." * 120, "." * (100_000 % 120), "?" * 120])
    assert often == once
    assert not any(each.flagged() for each in (once, dots, both))
