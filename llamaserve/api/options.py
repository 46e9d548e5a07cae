"""The fields that all generating endpoints have in common, and what they become for the engine.

Fields that are not offered yet but would change the answer are refused when they are in use; what else has no effect is
accepted and reported in a response header, or refused if the request is ``strict``. docs/options.md has all fields.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from llamaserve.api.adapters import AdapterWishes
from llamaserve.api.constraints import ConstraintOptions
from llamaserve.api.fields import check_text, names_of, whole
from llamaserve.api.presets import Presets
from llamaserve.api.sampling_options import SamplingOptions
from llamaserve.engine.params import Generation
from llamaserve.errors import InvalidRequest, ModelNotCapable, UnsupportedParameter
from llamaserve.registry.spec import LONGEST, parse_duration

IGNORED_HEADER = "x-llamaserve-ignored"
TRUNCATED_HEADER = "x-llamaserve-truncated"  # what was cut
WARNING_HEADER = "x-llamaserve-warning"  # what is not just as it was asked for, or not all that was sent
MAX_SEQUENCES = 128  # prompts times choices of one request
_MAX_STOPS = 1024
_MAX_STOP_CHARACTERS = 65536  # of all stop strings together
_MAX_BANS = 65536
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1
_ANSWER_TOKENS = ("max_tokens", "max_completion_tokens")

# Accepted without a word: they ask for nothing that shows in the answer.
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
)
# In use when not empty; an answer without them would not be what was asked for.
_NOT_OFFERED = {
    **dict.fromkeys(("tools", "functions"), "only chats offer tools: /v1/chat/completions"),
    "modalities": "only text is offered",
    "audio": "only text is offered",
}
_EMPTY: tuple[Any, ...] = ("", [], {})
# Other values of the above that ask for nothing but what is offered.
_PLAIN: dict[str, tuple[Any, ...]] = {"modalities": (["text"],)}

_BAN: Literal["ban"] = "ban"  # among biases
_DURATION = {
    "anyOf": [
        {"type": "number", "maximum": LONGEST},
        {
            "type": "string",
            "maxLength": 40,
            "pattern": r"^-?([0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+)$",
            "examples": ["5m", "1h30m"],
        },
    ]
}
KeepAlive = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(_DURATION)]  # seconds; -1: for ever
_STOP_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": _MAX_STOPS}],
}
_BIAS = {"anyOf": [{"type": "number", "minimum": -100, "maximum": 100}, {"const": False}]}
_TOKEN = {"type": "integer", "minimum": 0, "maximum": _INT32}
_BIAS_SCHEMA = {
    "anyOf": [
        {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,9}$"}, "additionalProperties": _BIAS},
        {
            "type": "array",
            "items": {"type": "array", "prefixItems": [_TOKEN, _BIAS], "items": False, "minItems": 2},
        },
    ]
}
_BANS_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": _TOKEN, "maxItems": _MAX_BANS},
        {"type": "string", "pattern": r"^([0-9]{1,9}(,[0-9]{1,9})*)?$"},
    ]
}
TokenId = Annotated[int, Field(ge=0, le=_INT32)]


def _stops(value: Any) -> Any:
    """Take one string for a list of one, and drop empty strings, which stop nothing."""
    values = [value] if isinstance(value, str) else value
    return [stop for stop in values if stop != ""] if isinstance(values, list) else values


def _check_stops(stops: list[str]) -> list[str]:
    if sum(map(len, stops)) > _MAX_STOP_CHARACTERS:
        raise ValueError(f"the strings have more than {_MAX_STOP_CHARACTERS} characters together")
    for stop in stops:
        check_text(stop)
    return stops


def _biases(value: Any) -> Any:
    """Take llama-server's list of pairs for the mapping, and its false for a ban; biases of one token add up."""
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        pairs = [(whole(token), bias) for token, bias in value]
        if any(type(token) is not int for token, _ in pairs):
            raise ValueError("each pair must begin with a token id")
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        return value
    biases: dict[Any, Any] = {}
    for token, bias in pairs:
        if bias is True or bias == _BAN:
            raise ValueError("a bias must be a number, or false for a ban")
        if bias is False or biases.get(token) == _BAN:
            biases[token] = _BAN
        elif isinstance(bias, int | float):
            biases[token] = biases.get(token, 0) + bias
        else:
            biases[token] = bias
    return biases


def _bans(value: Any) -> Any:
    """Take numbers between commas for the list."""
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def header_words(names: Iterable[str]) -> list[str]:
    """Return names, each once, in a form that may stand in a header."""
    return [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] or "?" for name in dict.fromkeys(names)]


def ignored_header(words: Sequence[str]) -> dict[str, str]:
    """Return the header that names what has no effect; none if there is nothing."""
    return {IGNORED_HEADER: ", ".join(words[:64])} if words else {}


@contextlib.contextmanager
def asked_of(name: str | None) -> Iterator[None]:
    """Have an error that says that a model can't do this be about the field ``model``, if the request has named it."""
    try:
        yield
    except ModelNotCapable as error:
        if name is not None and error.param is None:
            error.param = "model"
        raise


class StreamOptions(BaseModel):
    """What a stream contains besides the answer."""

    include_usage: Annotated[bool, BeforeValidator(lambda value: False if value is None else value)] = False


class GenerationOptions(ConstraintOptions, SamplingOptions):
    """Request fields of every generating endpoint."""

    may_generate_nothing: ClassVar[bool] = False  # with max_tokens 0
    _effective: SamplingOptions | None = PrivateAttr(None)  # with the preset's, once that is read

    model: str | None = Field(None, max_length=512, description="A served model's name or alias; default: the first.")
    max_tokens: int | None = Field(
        None,
        ge=-1,
        le=_INT64,
        validation_alias=AliasChoices("max_tokens", "n_predict"),
        description="Null or -1: until the context ends.",
    )
    max_completion_tokens: int | None = Field(None, ge=-1, le=_INT64, description="Newer name of max_tokens.")
    auto_max_new_tokens: bool = Field(default=False, description="As many tokens as the context has room for.")
    stop: Annotated[list[str], BeforeValidator(_stops), AfterValidator(_check_stops), WithJsonSchema(_STOP_SCHEMA)] = (
        Field([], max_length=_MAX_STOPS, description="Texts before which the answer ends.")
    )
    n: int = Field(1, ge=1, le=MAX_SEQUENCES, description="Answers to each prompt.")
    stream: bool = Field(default=False, description="Send the answer in pieces, as it is made.")
    stream_options: StreamOptions | None = Field(None, description="include_usage: the usage at the end.")
    time_limit: float | None = Field(None, gt=0, le=_INT32, description="Seconds until the answer is cut short.")
    max_tokens_second: int = Field(0, ge=0, le=_INT32, description="Slow a stream down to so many tokens; 0: don't.")
    seed: int | None = Field(None, ge=-_INT64, le=_INT64, description="Null or -1: a random one.")
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)] | Literal["ban"]],
        BeforeValidator(_biases),
        WithJsonSchema(_BIAS_SCHEMA),
    ] = Field({}, max_length=_MAX_BANS, description="Added to the logits of tokens.")
    custom_token_bans: Annotated[list[TokenId], BeforeValidator(_bans), WithJsonSchema(_BANS_SCHEMA)] = Field(
        [], max_length=_MAX_BANS, description="Tokens that never come."
    )
    ban_eos_token: bool = Field(
        default=False,
        validation_alias=AliasChoices("ban_eos_token", "ignore_eos"),
        description="Never end by the model's own wish.",
    )
    truncation_length: int = Field(
        0, ge=0, le=_INT32, description="Tokens of prompt and answer together; 0: the model's."
    )
    add_bos_token: bool = Field(default=True, description="Begin with the begin token, if the model has one.")
    skip_special_tokens: bool = Field(default=True, description="Leave control tokens out of the text.")
    preset: str | None = Field(None, max_length=512, description="A named set of sampling options.")
    preset_mode: Literal["overwrite", "defaults"] = Field(
        "overwrite", description="Whether a preset wins over the request's options, or stands behind them."
    )
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays loaded after this: seconds, or such as 5m; 0: not at all, -1: for ever.",
    )
    lora: AdapterWishes | None = Field(
        None, description="Adapters by place in the model's list or by name, with scales; others are off."
    )
    strict: bool = Field(default=False, description="Refuse what would have no effect.")
    prompt_lookup_num_tokens: int = Field(0, description="Drafts are of the length that pays; not honoured.")
    static_cache: bool = Field(default=False, description="Not honoured.")

    @field_validator(*_ANSWER_TOKENS)
    @classmethod
    def _check_answer_tokens(cls, value: int | None) -> int | None:
        if value == 0 and not cls.may_generate_nothing:
            raise ValueError("must not be 0, as an answer has at least one token")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = super().__get_pydantic_json_schema__(schema, handler)
        if not cls.may_generate_nothing:
            properties = handler.resolve_ref_schema(found)["properties"]
            for name in (called for field in _ANSWER_TOKENS for called in names_of(cls, field)):
                properties[name] = properties[name] | {"not": {"const": 0}}
        return found

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @cached_property
    def effective_seed(self) -> int:
        """The seed that is used: a random one if the request has none."""
        return random.getrandbits(31) if self.seed in (None, -1) else self.seed

    def generation(self, presets: Presets, prompts: int = 1, **others: Any) -> Generation:
        """Return what the engine shall do; raises for what is not offered. ``others`` are fields of the endpoint's."""
        self._refuse_what_is_not_offered()
        if prompts * self.n > MAX_SEQUENCES:
            raise InvalidRequest(f"{prompts} prompts with n={self.n} are over the limit of {MAX_SEQUENCES}", param="n")
        if self.strict and (ignored := self.ignored(presets)):
            raise UnsupportedParameter(f"strict: {', '.join(ignored)} would have no effect", param=ignored[0])
        generation = Generation(
            sampling=self._with_preset(presets).sampling(
                self.effective_seed,
                logit_bias={token: -math.inf if bias == _BAN else bias for token, bias in self.logit_bias.items()},
                banned_tokens=tuple(self.custom_token_bans),
                ban_eos=self.ban_eos_token,
            ),
            constraint=self.constraint(),
            choices=self.n,
            max_tokens=self._max_tokens(),
            stop=tuple(self.stop),
            time_limit=self.time_limit,
            stream=self.stream,
            context=self.truncation_length or None,
            add_bos=self.add_bos_token,
            special=not self.skip_special_tokens,
        )
        return msgspec.structs.replace(generation, **others)

    def ignored_header(self, presets: Presets) -> dict[str, str]:
        """Return the header that names the given fields which have no effect here; empty when there are none."""
        return ignored_header(self.ignored(presets))

    def ignored(self, presets: Presets) -> list[str]:
        """Return the names of the given fields that have no effect."""
        extra = (name for name in self.model_extra or {} if name not in _WITHOUT_EFFECT and name not in _NOT_OFFERED)
        idle = [*self._idle_sampling_options(presets), *self._idle()]
        return header_words([*extra, *(self.called(name) for name in idle if name not in self._filled)])

    def _idle_sampling_options(self, presets: Presets) -> Iterator[str]:
        """Yield the sampling options of this request that its preset replaces by others, or that change nothing."""
        own = self.changes(SamplingOptions)
        effective = self._with_preset(presets)
        if self.preset is None or self.preset_mode == "defaults":
            yield from effective.without_effect(own)
        else:
            yield from (name for name, value in own.items() if getattr(effective, name) != value)

    def _idle(self) -> Iterator[str]:
        """Yield what else does nothing."""
        for name in ("prompt_lookup_num_tokens", "static_cache"):
            if getattr(self, name):
                yield name
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            yield "max_completion_tokens"
        if self.auto_max_new_tokens and self.max_tokens not in (None, -1):
            yield "max_tokens"
        if self.max_tokens_second and not self.stream:
            yield "max_tokens_second"
        if self.include_usage and not self.stream:
            yield "stream_options"

    @property
    def answer_tokens(self) -> int | None:
        """How many tokens an answer may have; None if that is not said."""
        return self._max_tokens()

    def _max_tokens(self) -> int | None:
        value = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return None if self.auto_max_new_tokens or value == -1 else value

    def _with_preset(self, presets: Presets) -> SamplingOptions:
        """Return this request's sampling options together with its preset's, which is read once."""
        if self._effective is None:
            self._effective = self if self.preset is None else self._merged(presets.get(self.preset))
        return self._effective

    def _merged(self, preset: Mapping[str, Any]) -> SamplingOptions:
        own = self.unusual(SamplingOptions) if self.preset_mode == "defaults" else {}
        try:
            return SamplingOptions.model_validate({"top_p": 1.0, **preset, **own})
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidRequest(f"preset and request do not go together: {problem}", param="preset") from error

    def _refuse_what_is_not_offered(self) -> None:
        extra = self.model_extra or {}
        for name, why in _NOT_OFFERED.items():
            value = extra.get(name)
            if (name, "none") in (("tools", extra.get("tool_choice")), ("functions", extra.get("function_call"))):
                continue  # an answer without tools is what is asked for
            plain = (None, *_EMPTY, *_PLAIN.get(name, ()))
            if not any(type(value) is type(each) and value == each for each in plain):
                raise UnsupportedParameter(f"{name}: {why}", param=name)
