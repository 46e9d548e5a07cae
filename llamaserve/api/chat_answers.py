"""How chat answers look to clients: messages with thoughts and tool calls, whole or as a stream of deltas.

Knows how answers are read (``chat/answer.py``), and nothing of how they came about.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamaserve.api.generating import Job
from llamaserve.api.logprobs import for_chat
from llamaserve.api.sse import TextEvent, event
from llamaserve.chat.answer import AnswerReader
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content, Part, Reasoning
from llamaserve.engine.events import Delta, Finished

Reader = Callable[[], AnswerReader]
Chunk = Mapping[str, Any]


@dataclass(frozen=True)
class AnswerStyle:
    """What a request wants its answers to look like.

    ``thoughts`` are the names of the field for them, and ``legacy`` asks for a ``function_call`` in place of tool
    calls.
    """

    thoughts: tuple[str, ...] = ("reasoning_content",)
    legacy: bool = False


def answer_object(job: Job, kind: str, choices: Sequence[Chunk]) -> dict[str, Any]:
    """Return the object that holds choices."""
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model.name,
        "system_fingerprint": None,
        "seed": job.generation.sampling.seed,
        "choices": list(choices),
        **truncated(job.dropped_messages),
    }


def truncated(messages: int) -> dict[str, Any]:
    """Return what a body has besides if so many messages were left out."""
    return {"truncated_messages": messages} if messages else {}


def choice(job: Job, answer: Finished, reader: AnswerReader, begun: Sequence[Part], style: AnswerStyle) -> Chunk:
    """Return a whole answer; ``begun`` are the parts that it goes on from."""
    message = _Message(style)
    for part in (*begun, *reader.finish(answer.text, cut=answer.cut)):
        message.add(part)
    return {
        "index": answer.index,
        "message": message.fields(),
        "logprobs": for_chat(answer.logprobs) if job.generation.logprobs else None,
        "finish_reason": _reason(answer, message.called, style),
    }


def _reason(answer: Finished, called: bool, style: AnswerStyle) -> str:
    if answer.reason != "stop" or not called:
        return answer.reason
    return "function_call" if style.legacy else "tool_calls"


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class _Message:
    """Puts a message together."""

    def __init__(self, style: AnswerStyle) -> None:
        self._style = style
        self._texts: dict[type[Part], list[str]] = {Content: [], Reasoning: []}
        self._calls: list[tuple[str, list[str]]] = []
        self.called = False  # with all of its arguments: a stop text may be among them

    def add(self, part: Part) -> None:
        self.called = isinstance(part, CallEnds) or (self.called and not isinstance(part, CallBegins))
        match part:
            case CallBegins(name):
                self._calls.append((name, []))
            case Arguments(text):
                self._calls[-1][1].append(text)
            case Content(text) | Reasoning(text):
                self._texts[type(part)].append(text)

    def fields(self) -> dict[str, Any]:
        content, thoughts = "".join(self._texts[Content]), "".join(self._texts[Reasoning])
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self._calls else "")}
        message["refusal"] = None
        if thoughts:
            message |= dict.fromkeys(self._style.thoughts, thoughts)
        functions = [{"name": name, "arguments": "".join(arguments)} for name, arguments in self._calls]
        if functions and self._style.legacy:
            message["function_call"] = functions[0]
        elif functions:
            message["tool_calls"] = [{"id": _call_id(), "type": "function", "function": each} for each in functions]
        return message


class Chunks:
    """The chunks of streamed answers: the role first, then what each consists of, then the reason; ``usage: null`` on
    every one when usage is wanted at the end.
    """

    def __init__(
        self, job: Job, reader: Reader, begun: Sequence[Part], style: AnswerStyle, *, include_usage: bool
    ) -> None:
        """``begun`` are the parts that an answer goes on from, to be sent before it."""
        self._job = job
        self._reader = reader
        self._begun = begun
        self._style = style
        self._extra: dict[str, Any] = {"usage": None} if include_usage else {}
        self._streams: dict[int, _Stream] = {}

    async def start(self) -> Sequence[Chunk]:
        """See ``ChunkFormat``."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self.chunk(index, delta) for index in range(self._job.generation.choices)]

    def events(self, piece: Delta | Finished) -> Iterator[bytes]:
        """See ``ChunkFormat``."""
        stream = self._streams.get(piece.index)
        if stream is None:
            stream = self._streams[piece.index] = _Stream(self, piece.index, self._reader(), self._style)
            for part in self._begun:
                yield from stream.add(part)
        yield from stream.take(piece)

    def usage(self, usage: Mapping[str, Any]) -> Chunk:
        """See ``ChunkFormat``."""
        return answer_object(self._job, "chat.completion.chunk", []) | {"usage": usage}

    def chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> Chunk:
        """Return one chunk."""
        each = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return answer_object(self._job, "chat.completion.chunk", [each]) | self._extra


class _Stream:
    """The deltas of one answer. Log-probabilities go with the first delta of their piece, or the next one there is."""

    def __init__(self, chunks: Chunks, index: int, reader: AnswerReader, style: AnswerStyle) -> None:
        self._chunks = chunks
        self._index = index
        self._reader = reader
        self._style = style
        self._calls = 0
        self._called = False  # as in a ``_Message``
        self._logprobs: list[Any] = []
        self._text_events: dict[tuple[type[Part], int], TextEvent] = {}

    def take(self, piece: Delta | Finished) -> Iterator[bytes]:
        """Yield the events for a piece of the answer."""
        if piece.logprobs:
            self._logprobs += for_chat(piece.logprobs)["content"]
        if isinstance(piece, Finished):
            parts = self._reader.finish(piece.text, cut=piece.cut)
        else:
            parts = self._reader.push(piece.text)
        for part in parts:
            yield from self.add(part)
        if isinstance(piece, Finished):
            yield self._event({}, _reason(piece, self._called, self._style))

    def add(self, part: Part) -> Iterator[bytes]:
        """Yield the events for a part of the answer."""
        self._called = isinstance(part, CallEnds) or (self._called and not isinstance(part, CallBegins))
        match part:
            case CallBegins(name):
                self._calls += 1
                yield self._event(self._call({"name": name, "arguments": ""}, first=True))
            case CallEnds():
                pass
            case Reasoning() if not self._style.thoughts:
                pass
            case Content(text) | Reasoning(text) | Arguments(text):
                if self._logprobs or (type(part) is Reasoning and len(self._style.thoughts) > 1):
                    yield self._event(self._delta(type(part), self._calls, text))
                else:
                    yield self._text_event(type(part))(text)

    def _text_event(self, kind: type[Part]) -> TextEvent:
        """Return the event of which only the text is missing."""
        key = kind, self._calls
        if key not in self._text_events:
            self._text_events[key] = TextEvent(lambda mark: self._chunks.chunk(self._index, self._delta(*key, mark)))
        return self._text_events[key]

    def _delta(self, kind: type[Part], calls: int, text: str) -> dict[str, Any]:
        if kind is Content:
            return {"content": text}
        if kind is Reasoning:
            return dict.fromkeys(self._style.thoughts, text)
        return self._call({"arguments": text}, number=calls)

    def _call(self, function: Mapping[str, Any], *, number: int | None = None, first: bool = False) -> dict[str, Any]:
        if self._style.legacy:
            return {"function_call": function}
        head = {"id": _call_id(), "type": "function"} if first else {}
        return {"tool_calls": [{"index": (number or self._calls) - 1, **head, "function": function}]}

    def _event(self, delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        logprobs = {"content": self._logprobs, "refusal": None} if self._logprobs else None
        self._logprobs = []
        return event(self._chunks.chunk(self._index, delta, reason=reason, logprobs=logprobs))
