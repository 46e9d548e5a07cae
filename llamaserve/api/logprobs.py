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


class Echo:
    """A prompt that is put before its answer, together with the log-probabilities of its tokens.

    The tokens' texts are not always the prompt: the server may have put a begin token before it, some tokenisers put a
    space there, and of a prompt that was cut only the end was evaluated.
    """

    def __init__(self, prompt: str, logprobs: Sequence[TokenLogprobs]) -> None:
        texts = [each.chosen.data for each in logprobs]
        joined = b"".join(texts).decode("utf-8", "replace")
        begin = texts[0].decode("utf-8", "replace") if texts else ""
        rest = joined[len(begin) :]
        self.text = prompt
        self.logprobs = list(logprobs)
        self._before = 0  # characters of the tokens' texts that are not in the prompt's
        if joined.endswith(prompt):
            self._before = len(joined) - len(prompt)
        elif prompt.endswith(joined):
            self.text = joined or prompt
        elif rest and prompt.endswith(rest):
            self.text, self._before = rest, len(begin)
        else:
            self.text = joined
        self._hides_begin = bool(begin) and self._before >= len(begin) and not begin.isspace()

    def name(self, number: int) -> str:
        """Return the text of one of its tokens; the begin token that the server has put there has none."""
        return "" if number == 0 and self._hides_begin else _legacy_name(self.logprobs[number].chosen)

    def offset(self, number: int) -> int:
        """Return where one of its tokens begins in the text."""
        return max(0, self.logprobs[number].offset - self._before)


def for_completion(logprobs: Sequence[TokenLogprobs], echo: Echo | None = None, *, after: int = 0) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion, those of an echo first. Without one, the answer begins ``after`` so many
    characters.
    """
    prompt = echo.logprobs if echo is not None else []
    names = [echo.name(number) for number in range(len(prompt))] if echo is not None else []
    offsets = [echo.offset(number) for number in range(len(prompt))] if echo is not None else []
    start = len(echo.text) if echo is not None else after
    tokens = [*prompt, *logprobs]
    known = [number >= bool(prompt) for number in range(len(tokens))]  # nothing is before a prompt's first token
    return {
        "tokens": names + [_legacy_name(each.chosen) for each in logprobs],
        "token_logprobs": [_number(each.chosen.logprob) if k else None for each, k in zip(tokens, known, strict=True)],
        "text_offset": offsets + [start + each.offset for each in logprobs],
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
