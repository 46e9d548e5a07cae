"""How chat answers look: whole, as the chunks of a stream, and the prompt that a model would be given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import EVENTS, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, WAITS, ErrorAnswer
from llamaserve.api.answers.generation import CREATED, HEADERS, MODEL, Created, Index, Seed, Usage, usage

Reason = Annotated[
    Literal["stop", "length", "tool_calls", "function_call"],
    Meta(description="stop: the model ended, or a stop text came; length: a limit was reached; or it has calls."),
]
Thoughts = Annotated[str, Meta(description="What the model thought before it answered.")]
Dropped = Annotated[int, Meta(ge=1, description="How many of the oldest messages were left out.")]


class TokenLogprob(Answer):
    """A token with its natural logarithm of probability."""

    token: Annotated[str, Meta(description=r"Its text; bytes that are no whole character as `\xe2\x80`.")]
    logprob: float
    bytes: list[int]


class ChosenToken(TokenLogprob):
    """A token of the answer, and the most probable ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """The log-probabilities of an answer's tokens."""

    content: list[ChosenToken]
    refusal: None


class CalledFunction(Answer):
    """Which function is called, and with what."""

    name: str
    arguments: Annotated[str, Meta(description="A JSON object.")]


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """A message of the model."""

    role: Literal["assistant"]
    content: Annotated[str | None, Meta(description="Null where there is nothing but calls.")]
    refusal: None
    reasoning_content: Thoughts | UnsetType = UNSET
    reasoning: Thoughts | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET


class ChatChoice(Answer):
    """One of the answers."""

    index: Index
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(Answer):
    """The next messages of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: Created
    model: str
    system_fingerprint: None
    seed: Seed
    choices: list[ChatChoice]
    usage: Usage
    truncated_messages: Dropped | UnsetType = UNSET


class FunctionDelta(Answer):
    """A piece of a call; the name comes with the first."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Answer):
    """A piece of a call of a tool; id and type come with the first."""

    index: Index
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Answer):
    """What a chunk adds to a message: the role first, nothing at the end."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: Thoughts | UnsetType = UNSET
    reasoning: Thoughts | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChatChunkChoice(Answer):
    """A piece of one of the answers."""

    index: Index
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Annotated[Reason | None, Meta(description="Null before the end.")]


class ChatCompletionChunk(Answer):
    """A chunk of a stream. The last one has the usage and no choices, if `stream_options.include_usage` is true."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Created
    model: str
    system_fingerprint: None
    seed: Seed
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    truncated_messages: Dropped | UnsetType = UNSET


class ChatPrompt(Answer):
    """What the model would be given."""

    prompt: str
    stop: Annotated[list[str], Meta(description="The texts that would end the answer.")]
    truncated_messages: Dropped | UnsetType = UNSET


_MOON: Final = {"messages": [{"role": "user", "content": "What is the moon?"}], "max_tokens": 40}
_WEATHER: Final = {
    "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                },
            },
        }
    ],
    "tool_choice": "required",
    "max_tokens": 40,
}
_FORM: Final = {
    "messages": [{"role": "user", "content": "Name a colour."}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "colour",
            "schema": {"type": "object", "properties": {"name": {"enum": ["red", "blue"]}}, "required": ["name"]},
        },
    },
    "max_tokens": 40,
}
_HEAD: Final[Mapping[str, Any]] = {
    "id": "chatcmpl-5d3f0a",
    "object": "chat.completion",
    "created": CREATED,
    "model": MODEL,
    "system_fingerprint": None,
    "seed": 1711372862,
}
_MESSAGE: Final = {"role": "assistant", "content": "The moon is the Earth's only natural satellite.", "refusal": None}
_CALL: Final = {
    "id": "call_41c6b0",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
_CALLING: Final = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [_CALL]}


def _whole(message: Mapping[str, Any], reason: str) -> dict[str, Any]:
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {**_HEAD, "choices": [choice], "usage": usage(35, 11)}


def _chunk(delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}


_CHUNKS: Final = {
    "role": _chunk({"role": "assistant", "content": "", "refusal": None}),
    "text": _chunk({"content": "The moon"}),
    "end": _chunk({}, "stop"),
}

ROUTES: Final = {
    "POST /v1/chat/completions": Documented(
        answers=(
            Content(ChatCompletion, {"text": _whole(_MESSAGE, "stop"), "call": _whole(_CALLING, "tool_calls")}),
            Content((ChatCompletionChunk, ErrorAnswer), _CHUNKS, EVENTS),
        ),
        errors=(*BODY, *WAITS),
        requests={
            "whole": _MOON,
            "streamed": _MOON | {"stream": True, "stream_options": {"include_usage": True}},
            "tools": _WEATHER,
            "form": _FORM,
        },
        headers=(*HEADERS, "x-llamaserve-truncated"),
    ),
    "POST /v1/internal/chat-prompt": Documented(
        answers=(
            Content(
                ChatPrompt,
                {
                    "prompt": {
                        "prompt": "<|im_start|>user\nWhat is the moon?<|im_end|>\n<|im_start|>assistant\n",
                        "stop": [],
                    }
                },
            ),
        ),
        errors=(*BODY, *WAITS),
        requests={"prompt": {"messages": _MOON["messages"]}},
        headers=(*HEADERS, "x-llamaserve-truncated"),
    ),
}
