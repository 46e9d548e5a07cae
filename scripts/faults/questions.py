"""What clients ask: a fixed set of questions whose answers are known before anything goes wrong.

All are greedy, all but one are short, and they are asked of models in settings of the exact level, so that an answer
depends on nothing but its question. This module knows nothing of HTTP clients and of what was answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

CHAT_MODEL, SMALL_MODEL, VECTOR_MODEL, SPEECH_MODEL, HUGE_MODEL = "talk", "small", "vectors", "hear", "huge"

Kind = Literal["chat", "completion", "embedding", "rerank", "moderation", "transcription", "tokens", "odd"]

_PATHS: Mapping[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "moderation": "/v1/moderations",
    "transcription": "/v1/audio/transcriptions",
    "tokens": "/v1/internal/encode",
}
_SUBJECTS = ("the moon", "bread", "a lighthouse", "rain")
_BEGINNINGS = ("The capital of France is", "Once upon a time, a fox", "def area(width, height):")
_OFTEN, _SELDOM, _NEVER = 20, 1, 0
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
}


@dataclass(frozen=True)
class Question:
    """A request. ``name`` is that of its reference: the same question streamed or whole has the same answer. One with
    an ``upload`` is sent as a form.
    """

    name: str
    kind: Kind
    path: str
    body: Mapping[str, Any]
    streamed: bool = False
    constrained: bool = False  # whether a grammar is compiled for it
    often: int = _OFTEN  # compared with others
    upload: bytes | None = field(default=None, repr=False)

    @property
    def as_stream(self) -> Question:
        """The same, with its answer in pieces and the usage at the end."""
        body = {**self.body, "stream": True, "stream_options": {"include_usage": True}}
        return replace(self, body=body, streamed=True)

    @property
    def is_long(self) -> bool:
        """Whether its answer takes a while to read."""
        return self.often == _NEVER

    @property
    def can_stream(self) -> bool:
        """Whether its answer can come in pieces."""
        return self.kind in ("chat", "completion")


def questions(speech: bytes | None) -> Sequence[Question]:
    """Return all questions, none of them streamed; that for a transcript only where there is speech."""
    found = [question for model in (CHAT_MODEL, SMALL_MODEL) for question in _of_model(model)]
    return [*found, _long(), *_of_vectors(), *([_transcription(speech)] if speech is not None else [])]


def _of_model(model: str) -> Iterator[Question]:
    common = {"model": model, "temperature": 0}
    for number, subject in enumerate(_SUBJECTS):
        messages = [{"role": "user", "content": f"Say one short sentence about {subject}."}]
        body = {**common, "messages": messages, "max_tokens": 4 + 4 * number}
        yield _question(f"{model}/chat/{number}", "chat", body)
    for number, beginning in enumerate(_BEGINNINGS):
        body = {**common, "prompt": beginning, "max_tokens": 3 + 4 * number}
        yield _question(f"{model}/completion/{number}", "completion", body)
    messages = [{"role": "user", "content": "Name a colour, and say why you like it."}]
    yield _question(f"{model}/choices", "chat", {**common, "messages": messages, "max_tokens": 8, "n": 2})
    yield _question(f"{model}/prompts", "completion", {**common, "prompt": list(_BEGINNINGS[:2]), "max_tokens": 6})
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA}}
    messages = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
    body = {**common, "messages": messages, "max_tokens": 24, "response_format": form}
    yield replace(_question(f"{model}/schema", "chat", body), constrained=True)
    yield _question(f"{model}/tokens", "tokens", {"model": model, "text": f"{_BEGINNINGS[1]} and {_SUBJECTS[2]}"})


def _long() -> Question:
    """Return a question whose answer takes a while to read. Only who reads slowly asks it under load."""
    messages = [{"role": "user", "content": "Write a long story about a lighthouse keeper and the sea."}]
    body = {"model": CHAT_MODEL, "temperature": 0, "messages": messages, "max_tokens": 150}
    return replace(_question(f"{CHAT_MODEL}/long", "chat", body), often=_NEVER)


def _of_vectors() -> Iterator[Question]:
    yield _question("vectors/one", "embedding", {"model": VECTOR_MODEL, "input": "A cat sits on the mat."})
    texts = [f"This is a text about {subject}." for subject in _SUBJECTS]
    yield _question("vectors/many", "embedding", {"model": VECTOR_MODEL, "input": texts, "dimensions": 64})
    body = {"model": VECTOR_MODEL, "query": "What do cats eat?", "documents": [*texts, "Cats eat fish."]}
    yield _question("vectors/rerank", "rerank", body)
    texts = ["The library opens at nine.", "You are disgusting, and everyone laughs at you."]
    yield _question("vectors/moderation", "moderation", {"model": VECTOR_MODEL, "input": texts})


def _transcription(speech: bytes) -> Question:
    body = {"model": SPEECH_MODEL, "temperature": "0"}
    return replace(_question("hear/words", "transcription", body), often=_SELDOM, upload=speech)


def _question(name: str, kind: Kind, body: Mapping[str, Any]) -> Question:
    return Question(name, kind, _PATHS[kind], body)
