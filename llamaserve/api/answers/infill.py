"""How llama-server's answers to an editor look, whole and in pieces."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from llamaserve.api.answers.answer import EVENTS, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LACKS, WAITS, ErrorAnswer
from llamaserve.api.answers.generation import HEADERS, MODEL, Count


class InfillTimings(Answer):
    """How many tokens were evaluated and generated, and how fast."""

    cache_n: Count
    prompt_n: Count
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: Count
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class InfillSettings(Answer):
    """What was in force."""

    n_ctx: int
    n_predict: int
    max_tokens: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    samplers: list[str]
    stop: list[str]
    stream: bool
    n_indent: int
    t_max_prompt_ms: float
    t_max_predict_ms: float


class InfillPiece(Answer):
    """A piece of a streamed answer."""

    index: int
    content: str
    tokens: Annotated[list[int], Meta(max_length=0)]
    stop: Annotated[bool, Meta(description="False: more comes.")]
    id_slot: int
    tokens_predicted: Count
    tokens_evaluated: Count


class InfillAnswer(InfillPiece):
    """What stands at the cursor; in a stream the last event, without content."""

    model: str
    stop_type: Annotated[
        Literal["eos", "limit", "word"], Meta(description="eos: the model ended; word: a stop text; limit: all else.")
    ]
    stopping_word: str
    has_new_line: bool
    truncated: Annotated[bool, Meta(description="The texts were cut, or the context ended the answer.")]
    tokens_cached: Count
    prompt: Annotated[str, Meta(description="All that the model sees.")]
    generation_settings: InfillSettings
    timings: InfillTimings


SelectedFields = Annotated[dict[str, Any], Meta(description="The `response_fields` that there are, by these names.")]

_CURSOR: Final = {
    "input_prefix": "def area(width, height):\n",
    "prompt": "    result = ",
    "input_suffix": "\n    return result\n",
    "input_extra": [{"filename": "main.py", "text": "print(area(2, 3))\n"}],
    "n_predict": 32,
    "n_indent": 4,
    "t_max_predict_ms": 500,
}
_PIECE: Final = {
    "index": 0,
    "content": "width * height",
    "tokens": [],
    "stop": False,
    "id_slot": -1,
    "tokens_predicted": 3,
    "tokens_evaluated": 34,
}
_SETTINGS: Final = {
    "n_ctx": 8192,
    "n_predict": 32,
    "max_tokens": 32,
    "seed": 1711372862,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "samplers": ["penalties", "top_p", "temperature"],
    "stop": [],
    "stream": False,
    "n_indent": 4,
    "t_max_prompt_ms": 0.0,
    "t_max_predict_ms": 500.0,
}
_TIMINGS: Final = {
    "cache_n": 0,
    "prompt_n": 34,
    "prompt_ms": 61.2,
    "prompt_per_token_ms": 1.8,
    "prompt_per_second": 555.6,
    "predicted_n": 3,
    "predicted_ms": 24.3,
    "predicted_per_token_ms": 8.1,
    "predicted_per_second": 123.5,
}
_WHOLE: Final = {
    **_PIECE,
    "stop": True,
    "model": MODEL,
    "stop_type": "eos",
    "stopping_word": "",
    "has_new_line": False,
    "truncated": False,
    "tokens_cached": 0,
    "prompt": "<|fim_prefix|>def area(width, height):\n    result = <|fim_suffix|>\n    return result\n<|fim_middle|>",
    "generation_settings": _SETTINGS,
    "timings": _TIMINGS,
}

ROUTES: Final = {
    "POST /infill": Documented(
        answers=(
            Content(
                (InfillAnswer, SelectedFields), {"whole": _WHOLE, "chosen": {"content": "x", "timings/prompt_n": 34}}
            ),
            Content(
                (InfillPiece, InfillAnswer, SelectedFields, ErrorAnswer),
                {"piece": _PIECE, "last": _WHOLE},
                EVENTS,
                done=False,
            ),
        ),
        errors=(*BODY, *WAITS, *LACKS),
        requests={
            "at the cursor": _CURSOR,
            "streamed": _CURSOR | {"stream": True},
            "chosen fields": _CURSOR | {"response_fields": ["content", "timings/prompt_n"]},
        },
        headers=HEADERS,
    ),
}
