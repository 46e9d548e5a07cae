"""What clients ask: a fixed set of questions whose answers are known before anything goes wrong.

All are short, greedy, and asked of models in settings of the exact level, so that an answer depends on nothing but its
question. This module knows nothing of HTTP clients and of what was answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

CHAT_MODEL, SMALL_MODEL, VECTOR_MODEL, HUGE_MODEL = "talk", "small", "vectors", "huge"

Kind = Literal["chat", "completion", "embedding", "tokens", "odd"]

_PATHS: Mapping[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "tokens": "/v1/internal/encode",
}
_SUBJECTS = ("the moon", "bread", "a lighthouse", "rain")
_BEGINNINGS = ("The capital of France is", "Once upon a time, a fox", "def area(width, height):")
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
}


@dataclass(frozen=True)
class Question:
    """A request. ``name`` is that of its reference: the same question streamed or whole has the same answer."""

    name: str
    kind: Kind
    path: str
    body: Mapping[str, Any]
    streamed: bool = False
    constrained: bool = False  # whether a grammar is compiled for it

    @property
    def as_stream(self) -> Question:
        """The same, with its answer in pieces and the usage at the end."""
        body = {**self.body, "stream": True, "stream_options": {"include_usage": True}}
        return replace(self, body=body, streamed=True)

    @property
    def can_stream(self) -> bool:
        """Whether its answer can come in pieces."""
        return self.kind in ("chat", "completion")


def questions(*, vectors: bool) -> Sequence[Question]:
    """Return all questions, none of them streamed; those about vectors only where there is a model for them."""
    found = [question for model in (CHAT_MODEL, SMALL_MODEL) for question in _of_model(model)]
    return [*found, *(_embeddings() if vectors else ())]


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


def _embeddings() -> Iterator[Question]:
    yield _question("vectors/one", "embedding", {"model": VECTOR_MODEL, "input": "A cat sits on the mat."})
    texts = [f"This is a text about {subject}." for subject in _SUBJECTS]
    yield _question("vectors/many", "embedding", {"model": VECTOR_MODEL, "input": texts, "dimensions": 64})


def _question(name: str, kind: Kind, body: Mapping[str, Any]) -> Question:
    return Question(name, kind, _PATHS[kind], body)
