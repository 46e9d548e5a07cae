"""What became of a request as its client saw it, and whether that is right.

An answer is right if it equals its reference, or if it is an error that is documented and that a fault explains. This
module reads bodies and events; it knows nothing of connections.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faults.calendar import Excuses
from faults.questions import Question
from llamaserve import errors

_SIMILAR = 0.9999  # cosine of two vectors of one text: those of other steps differ in their last bits
_DONE = "[DONE]"
_NO_CODE = ""  # of what is no error object


@dataclass(frozen=True)
class Usage:
    """Tokens as an answer reports them."""

    prompt: int
    completion: int
    cached: int

    @classmethod
    def read(cls, usage: Mapping[str, Any]) -> Usage:
        """Read OpenAI's usage object."""
        details = usage.get("prompt_tokens_details") or {}
        return cls(usage["prompt_tokens"], usage.get("completion_tokens", 0), details.get("cached_tokens", 0))


@dataclass(frozen=True)
class Failure:
    """An error that a client was told of, as the status or within a stream."""

    status: int
    code: str | None
    message: str


@dataclass
class Answer:
    """What a client got. ``status`` is None as long as no response has begun."""

    status: int | None = None
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    vectors: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    usage: Usage | None = None
    failure: Failure | None = None
    broken: str | None = None  # how its connection ended, if not as it should
    late: bool = False  # it was given up, since it took too long
    complete: bool = False

    @property
    def answered(self) -> bool:
        """Whether the client has all of an answer."""
        return self.complete and self.failure is None and self.broken is None


def read_body(question: Question, status: int, content: bytes) -> Answer:
    """Read a whole answer."""
    answer = Answer(status)
    try:
        body = json.loads(content)
    except ValueError:
        answer.broken = f"its body is no JSON: {content[:200]!r}"
        return answer
    if status != 200:
        answer.failure = _failure(status, body)
    else:
        _take_body(answer, question, body)
    answer.complete = True
    return answer


def _take_body(answer: Answer, question: Question, body: Mapping[str, Any]) -> None:
    if question.kind == "tokens":
        answer.tokens = body["tokens"]
    elif question.kind == "embedding":
        answer.vectors = [item["embedding"] for item in body["data"]]
    elif question.kind == "rerank":
        answer.vectors = [[each["relevance_score"] for each in sorted(body["results"], key=lambda one: one["index"])]]
    elif question.kind == "moderation":
        answer.vectors = [list(each["category_scores"].values()) for each in body["results"]]
        answer.texts = {number: str(each["flagged"]) for number, each in enumerate(body["results"])}
    elif question.kind == "transcription":
        answer.texts = {0: body["text"]}
    elif question.kind != "odd":
        for choice in body["choices"]:
            answer.texts[choice["index"]] = _text(choice)
            answer.reasons[choice["index"]] = choice["finish_reason"]
    if isinstance(usage := body.get("usage"), dict) and question.kind not in ("odd", "transcription"):
        answer.usage = Usage.read(usage)


def _text(choice: Mapping[str, Any]) -> str:
    holder = choice.get("delta") or choice.get("message") or choice
    return str(holder.get("content") or holder.get("text") or "")


class StreamReader:
    """Puts an answer together from the lines of a stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def line(self, line: str) -> None:
        """Take the next line, without its end."""
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == _DONE:
            self.answer.complete = True
            return
        self.chunk(json.loads(data))

    def chunk(self, chunk: Mapping[str, Any]) -> None:
        """Take a chunk."""
        if "error" in chunk:
            self.answer.failure = _failure(self.answer.status or 0, chunk)
            return
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            self.answer.texts[index] = self.answer.texts.get(index, "") + _text(choice)
            if choice.get("finish_reason"):
                self.answer.reasons[index] = choice["finish_reason"]
        if chunk.get("usage"):
            self.answer.usage = Usage.read(chunk["usage"])


def _failure(status: int, body: object) -> Failure:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= error.keys():
        return Failure(status, _NO_CODE, f"no error object: {str(body)[:200]}")
    return Failure(status, error["code"], str(error["message"]))


def _documented(kind: type[errors.LlamaserveError]) -> Iterable[tuple[int, str | None]]:
    yield kind.status, kind.code
    for each in kind.__subclasses__():
        yield from _documented(each)


def documented() -> frozenset[tuple[int, str | None]]:
    """Return the status and the code of each error that a client may be told of."""
    return frozenset(_documented(errors.LlamaserveError)) - {(500, "internal_error")}


_DOCUMENTED = documented()
_CODES = frozenset(code for _, code in _DOCUMENTED)
_CANT = frozenset({(429, "queue_full"), (501, "not_supported"), (507, "insufficient_memory")})  # for nobody's fault


def problem_with(answer: Answer, reference: Answer | None, excuses: Excuses) -> str | None:
    """Return what is wrong with an answer; None where nothing is. Without a reference any answer is as good as another,
    and so is any error that tells the client that it is to blame, or that nobody is.
    """
    if answer.late:
        return "it was not answered within the limit"
    if answer.broken is not None:
        if excuses.down or (excuses.ending and answer.status is None):
            return None
        when = "while the server lived" if answer.status is None else "after its answer had begun"
        return f"its connection broke {when}: {answer.broken}"
    if answer.failure is not None:
        return _problem_with_failure(answer.failure, reference, excuses, streamed=answer.status == 200)
    if not answer.complete:
        return None if excuses.down else "its stream ended without [DONE] and without an error"
    return None if reference is None else _difference(answer, reference, cut=excuses.ending)


def _problem_with_failure(
    failure: Failure, reference: Answer | None, excuses: Excuses, *, streamed: bool
) -> str | None:
    described = f"{failure.status} {failure.code}: {failure.message[:300]}"
    known = failure.code in _CODES if streamed else (failure.status, failure.code) in _DOCUMENTED
    to_blame = failure.status in range(400, 500) and failure.status != 429 and failure.code != _NO_CODE
    if reference is None and (to_blame or (failure.status, failure.code) in _CANT):
        return None
    if not known:
        return f"it failed with an error that is not documented: {described}"
    if failure.code not in excuses.codes:
        return f"it failed, and no fault explains that: {described}"
    return None


def _difference(answer: Answer, reference: Answer, *, cut: bool) -> str | None:
    """Return how an answer differs from its reference; where it may have been cut, it may be a beginning of it."""
    if answer.tokens != reference.tokens:
        return f"its tokens are {answer.tokens}, not {reference.tokens}"
    if len(answer.vectors) != len(reference.vectors):
        return f"it has {len(answer.vectors)} vectors, not {len(reference.vectors)}"
    for number, (one, other) in enumerate(zip(answer.vectors, reference.vectors, strict=True)):
        if (similarity := _cosine(one, other)) < _SIMILAR:
            return f"its vector {number} is another one: {similarity=:.6f}"
    if answer.texts != reference.texts or answer.reasons != reference.reasons:
        if cut and _is_cut(answer, reference):
            return None
        return f"its text is {answer.texts} {answer.reasons}, not {reference.texts} {reference.reasons}"
    return _usage_difference(answer.usage, reference.usage)


def _usage_difference(usage: Usage | None, reference: Usage | None) -> str | None:
    """What was cached depends on what came before, so it is not compared."""
    if (usage is None) != (reference is None):
        return f"its usage is {usage}, not {reference}"
    if usage is None or reference is None:
        return None
    if (usage.prompt, usage.completion) != (reference.prompt, reference.completion):
        return f"its usage is {usage}, not {reference}"
    return None if 0 <= usage.cached <= usage.prompt else f"its usage is {usage}, which can't be"


def _is_cut(answer: Answer, reference: Answer) -> bool:
    """Whether each choice is a beginning of what it should be, and says that it has come to its end."""
    return (
        answer.texts.keys() <= reference.texts.keys()
        and answer.reasons.keys() == reference.reasons.keys()
        and all(
            reference.texts[index].startswith(text := answer.texts.get(index, ""))
            and (reason == "stop" or (reason, text) == (reference.reasons[index], reference.texts[index]))
            for index, reason in answer.reasons.items()
        )
    )


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other):
        return 0.0
    lengths = math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0
