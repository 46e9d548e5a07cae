r"""How log-probabilities look to clients: OpenAI's forms for chat and for completions, and the seed API's map.

A token that is no whole character is written as its bytes, ``\xe2\x80``, as OpenAI does: as text it would be U+FFFD,
like many others. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llamaserve.engine.events import TokenLogprob, TokenLogprobs

_IMPOSSIBLE = -9999.0  # JSON has no infinity; OpenAI's own number for it


def for_chat(logprobs: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat choice."""
    content = [
        _chat_token(each.chosen) | {"top_logprobs": [_chat_token(other) for other in each.top]} for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(each: TokenLogprob) -> dict[str, Any]:
    return {"token": _name(each.data), "logprob": _number(each.logprob), "bytes": list(each.data)}


def for_completion(
    logprobs: Sequence[TokenLogprobs], *, prompt: Sequence[TokenLogprobs] = (), offset: int = 0
) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion, those of the echoed prompt's tokens first. ``offset`` is where the
    answer begins, in characters.
    """
    tokens = [*prompt, *logprobs]
    known = [number >= bool(prompt) for number in range(len(tokens))]  # nothing is before a prompt's first token
    return {
        "tokens": [_legacy_name(each.chosen) for each in tokens],
        "token_logprobs": [_number(each.chosen.logprob) if k else None for each, k in zip(tokens, known, strict=True)],
        "text_offset": [each.offset for each in prompt] + [offset + each.offset for each in logprobs],
        "top_logprobs": [_texts(each.top) if k else None for each, k in zip(tokens, known, strict=True)],
        "top_logprobs_ids": [_ids(each.top) if k else None for each, k in zip(tokens, known, strict=True)],
    }


def probabilities(tokens: Iterable[TokenLogprob]) -> Mapping[str, float]:
    """Return the seed API's map from tokens to probabilities; those of tokens with the same text are added up."""
    found: dict[str, float] = {}
    for each in tokens:
        name = "".join(repr(letter)[1:-1] if letter < " " else letter for letter in _name(each.data))
        found[name] = found.get(name, 0.0) + math.exp(each.logprob)
    return found


def _texts(tokens: Iterable[TokenLogprob]) -> dict[str, float]:
    """Return a map from tokens to log-probabilities; of tokens with the same text the most probable counts."""
    found: dict[str, float] = {}
    for each in tokens:
        found.setdefault(_legacy_name(each), _number(each.logprob))
    return found


def _ids(tokens: Iterable[TokenLogprob]) -> dict[str, float]:
    return {str(each.token): _number(each.logprob) for each in tokens}


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def _legacy_name(each: TokenLogprob) -> str:
    name = _name(each.data)
    return name if name.encode() == each.data else f"bytes:{name}"


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
