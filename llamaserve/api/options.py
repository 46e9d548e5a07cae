"""The generation options that completions and chat have in common: their types, bounds and meaning.

Bounds are wide: they refuse what can't be meant, not what is unusual. Fields that are not offered yet but would change
the answer are refused when they are in use; other unknown fields are accepted and reported in a response header.
"""

from __future__ import annotations

import random
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from llamaserve.engine.params import Generation, Sampling
from llamaserve.errors import InvalidRequest, UnsupportedParameter

IGNORED_HEADER = "x-llamaserve-ignored"
MAX_SEQUENCES = 128  # prompts times choices of one request
_MAX_STOPS = 1024
_MAX_STOP_CHARACTERS = 65536  # of all stop strings together
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1

# Accepted without a word: they ask for nothing that shows in the answer.
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
)
# In use when not empty; an answer without them would not be what was asked for.
_NOT_OFFERED = {
    **dict.fromkeys(("tools", "functions"), "tool calling is not offered yet"),
    **dict.fromkeys(
        ("grammar", "grammar_string", "json_schema", "regex", "guided_json", "guided_regex", "guided_choice"),
        "constrained output is not offered yet",
    ),
    **dict.fromkeys(("logprobs", "top_logprobs"), "log-probabilities are not offered yet"),
    "suffix": "filling in the middle is not offered yet",
    "modalities": "only text is offered",
    "audio": "only text is offered",
    "response_format": "only text is offered yet",
}
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# Other values of the above that ask for nothing but what is offered.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
}


def _stops(value: Any) -> Any:
    """Take one string for a list of one, and drop empty strings, which stop nothing."""
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    return [stop for stop in values if stop != ""] if isinstance(values, list) else values


def _check_stops(stops: list[str]) -> list[str]:
    if sum(map(len, stops)) > _MAX_STOP_CHARACTERS:
        raise ValueError(f"the strings have more than {_MAX_STOP_CHARACTERS} characters together")
    for stop in stops:
        check_text(stop)
    return stops


def _or_default(default: float) -> BeforeValidator:
    """Take null for "not given", as OpenAI does."""
    return BeforeValidator(lambda value: default if value is None else value)


class StreamOptions(BaseModel):
    """What a stream contains besides the answer."""

    include_usage: Annotated[bool, _or_default(default=False)] = False


class GenerationOptions(BaseModel):
    """Request fields of every generating endpoint."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, max_length=512, description="A served model's name or alias; default: the first.")
    max_tokens: int | None = Field(None, ge=-1, le=_INT64, description="Null or -1: until the context ends.")
    max_completion_tokens: int | None = Field(None, ge=-1, le=_INT64, description="Newer name of max_tokens.")
    stop: Annotated[list[str], BeforeValidator(_stops), AfterValidator(_check_stops)] = Field([], max_length=_MAX_STOPS)
    n: Annotated[int, _or_default(1)] = Field(1, ge=1, le=MAX_SEQUENCES)
    stream: Annotated[bool, _or_default(default=False)] = False
    stream_options: StreamOptions | None = None
    time_limit: float | None = Field(None, gt=0, le=_INT32, description="Seconds until the answer is cut short.")
    seed: int | None = Field(None, ge=-_INT64, le=_INT64, description="Null or -1: a random one.")
    temperature: Annotated[float, _or_default(1.0)] = Field(1.0, ge=0, le=100, description="0: most probable token.")
    top_p: Annotated[float, _or_default(0.95)] = Field(0.95, ge=0, le=1)
    top_k: Annotated[int, _or_default(0)] = Field(0, ge=-1, le=_INT32, description="0 or -1: off.")
    min_p: Annotated[float, _or_default(0.0)] = Field(0.0, ge=0, le=1)
    repetition_penalty: Annotated[float, _or_default(1.0)] = Field(1.0, gt=0, le=100)
    repetition_penalty_range: Annotated[int, _or_default(1024)] = Field(1024, ge=-1, le=_INT32)
    frequency_penalty: Annotated[float, _or_default(0.0)] = Field(0.0, ge=-100, le=100)
    presence_penalty: Annotated[float, _or_default(0.0)] = Field(0.0, ge=-100, le=100)
    logit_bias: dict[Annotated[int, Field(ge=0, le=_INT32)], Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=65536
    )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def generation(self, prompts: int = 1) -> Generation:
        """Return what the engine shall do; raises for what is not offered."""
        self._refuse_what_is_not_offered()
        if prompts * self.n > MAX_SEQUENCES:
            raise InvalidRequest(f"{prompts} prompts with n={self.n} are over the limit of {MAX_SEQUENCES}", param="n")
        return Generation(
            sampling=self._sampling(),
            choices=self.n,
            max_tokens=self._max_tokens(),
            stop=tuple(self.stop),
            time_limit=self.time_limit,
            stream=self.stream,
        )

    def ignored_header(self) -> dict[str, str]:
        """Return the header that names the given fields which have no effect here; empty when there are none."""
        extra = self.model_extra or {}
        names = [name for name, value in extra.items() if value is not None and name not in _WITHOUT_EFFECT]
        names = [name for name in names if name not in _NOT_OFFERED and re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]
        return {IGNORED_HEADER: ", ".join(names[:64])} if names else {}

    def _sampling(self) -> Sampling:
        return Sampling(
            seed=random.getrandbits(31) if self.seed in (None, -1) else self.seed,
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            repetition_penalty_range=max(0, self.repetition_penalty_range),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias or {},
        )

    def _max_tokens(self) -> int | None:
        name = "max_tokens" if self.max_tokens is not None else "max_completion_tokens"
        value = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        if value == 0:
            raise InvalidRequest(f"{name} is 0, but an answer has at least one token", param=name)
        return None if value in (None, -1) else value

    def _refuse_what_is_not_offered(self) -> None:
        extra = self.model_extra or {}
        for name, why in _NOT_OFFERED.items():
            value = extra.get(name)
            if (name, "none") in (("tools", extra.get("tool_choice")), ("functions", extra.get("function_call"))):
                continue  # an answer without tools is what is asked for
            if not any(type(value) is type(plain) and value == plain for plain in (*_EMPTY, *_PLAIN.get(name, ()))):
                raise UnsupportedParameter(f"{name}: {why}", param=name)


def check_text(text: str) -> None:
    """Refuse text that is no Unicode: half of a surrogate pair can't be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from None
