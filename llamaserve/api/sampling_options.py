"""The request fields that say how tokens are chosen: names, aliases, bounds, and what they become for the engine.

These are the fields that a preset may set. docs/options.md has all of them in one table. Bounds are wide: they refuse
what can't be meant, not what is unusual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, WithJsonSchema, model_validator

from llamaserve.api.fields import RequestFields, check_text
from llamaserve.engine.params import STAGES, Sampling

_INT32 = 2**31 - 1
_MAX_BREAKERS = 32  # each is looked for in the whole vocabulary
_MAX_BREAKER = 40  # bytes; llama.cpp cuts longer ones
_BREAKERS = ["\n", ":", '"', "*"]

# What else a stage is called: by text-generation-webui, and by llama-server, also in its one-letter form.
_STAGE_NAMES = {name: name for name in STAGES} | {
    "repetition_penalty": "penalties",
    "frequency_penalty": "penalties",
    "presence_penalty": "penalties",
    "dynamic_temperature": "temperature",
    "temp": "temperature",
    "typ_p": "typical_p",
    "typical": "typical_p",
    "top-k": "top_k",
    "top-p": "top_p",
    "nucleus": "top_p",
    "min-p": "min_p",
    "typ-p": "typical_p",
    "typical-p": "typical_p",
    "top-n-sigma": "top_n_sigma",
}
_ALWAYS_LAST = ("mirostat", "adaptive_p", "adaptive-p")  # they replace the draw, wherever they are listed
_STAGE_LETTERS = {
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typical_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
    "a": "adaptive_p",
}
# Taken with the right type, but not to be had from llama.cpp.
NOT_HONOURED = (
    "penalty_alpha",
    "guidance_scale",
    "negative_prompt",
    "num_beams",
    "length_penalty",
    "early_stopping",
)


def quoted_texts(value: Any) -> Any:
    """Take a JSON list, or the inside of one, for the list."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        texts = json.loads(text if text.startswith("[") else f"[{text}]")
    except (ValueError, RecursionError):
        texts = [None]
    if not all(isinstance(each, str) for each in texts):
        raise ValueError('must be a list of strings, or the inside of a JSON list: "\\n", ":"')
    return texts


def _check_breakers(breakers: list[str]) -> list[str]:
    for breaker in breakers:
        if not 0 < len(breaker.encode(errors="replace")) <= _MAX_BREAKER or "\0" in breaker:
            raise ValueError(f"a breaker must have 1 to {_MAX_BREAKER} bytes, and none of them 0")
        check_text(breaker)
    return breakers


def _order(value: Any) -> Any:
    """Take names on lines or between commas, or llama-server's letters, for the list of names."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in re.split(r"[\n,;]", value) if name.strip()]
    if len(names) == 1 and names[0] not in _STAGE_NAMES and all(letter in _STAGE_LETTERS for letter in names[0]):
        return [_STAGE_LETTERS[letter] for letter in names[0]]
    return names


def _stages(names: list[str]) -> list[str]:
    """Return the stages of these names, each at its first place."""
    unknown = [name for name in names if name not in _STAGE_NAMES and name not in _ALWAYS_LAST]
    if unknown:
        raise ValueError(f"there is no sampler {unknown[0][:64]!r}; there are {', '.join(STAGES)}")
    return list(dict.fromkeys(_STAGE_NAMES[name] for name in names if name in _STAGE_NAMES))


_BREAKERS_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"type": "string", "pattern": "^[^\\u0000]{1,10}$"}, "maxItems": _MAX_BREAKERS},
        {"type": "string", "examples": ['"\\n", ":"']},
    ]
}
_STAGE_NAME = "|".join((*_STAGE_NAMES, *_ALWAYS_LAST))
_ORDER_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"enum": [*_STAGE_NAMES, *_ALWAYS_LAST]}, "maxItems": 64},
        {
            "type": "string",
            "pattern": rf"^(({_STAGE_NAME})([,;\n]({_STAGE_NAME}))*|[{''.join(_STAGE_LETTERS)}]*)$",
            "examples": ["top_k,temperature", "kt"],
        },
    ]
}
Order = Annotated[list[str], BeforeValidator(_order), AfterValidator(_stages), WithJsonSchema(_ORDER_SCHEMA)]


class SamplingOptions(RequestFields):
    """How tokens are chosen."""

    temperature: float = Field(1.0, ge=0, le=100, description="Divides the logits; 0: always the most probable token.")
    dynamic_temperature: bool = Field(default=False, description="Use dynatemp_low and dynatemp_high.")
    dynatemp_low: float = Field(1.0, ge=0, le=100, description="Temperature where the model is certain.")
    dynatemp_high: float = Field(1.0, ge=0, le=100, description="Temperature where all tokens are equally probable.")
    dynatemp_range: float = Field(0.0, ge=0, le=100, description="Let the temperature move so far to either side.")
    dynatemp_exponent: float = Field(1.0, ge=0, le=100, description="Shape of the way from low to high.")
    temperature_last: bool = Field(default=False, description="Temperature and smoothing after all other stages.")
    smoothing_factor: float = Field(0.0, ge=0, le=100, description="Quadratic reshaping of the logits; 0: off.")
    smoothing_curve: float = Field(1.0, ge=0, le=100, description="Its cubic part; 1: none.")
    top_k: int = Field(0, ge=-1, le=_INT32, description="Keep so many of the most probable; 0 or -1: all.")
    top_p: float = Field(0.95, ge=0, le=1, description="Keep the most probable that sum up to this; 1: all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Keep those with this share of the best one's probability.")
    typical_p: float = Field(
        1.0,
        ge=0,
        le=1,
        validation_alias=AliasChoices("typical_p", "typ_p", "typical"),
        description="Keep those about as surprising as expected, up to this sum; 1: all.",
    )
    top_n_sigma: float = Field(
        0.0, ge=-1, le=1e6, description="Keep logits within so many standard deviations of the best; 0 or -1: all."
    )
    top_a: float = Field(0.0, ge=0, le=100, description="Keep those with this share of the best probability squared.")
    tfs: float = Field(
        1.0,
        ge=0,
        le=1,
        validation_alias=AliasChoices("tfs", "tfs_z"),
        description="Cut the flat tail; 1: nothing.",
    )
    epsilon_cutoff: float = Field(0.0, ge=0, le=10_000, description="Least probability, in 1/10,000; 0: off.")
    eta_cutoff: float = Field(
        0.0, ge=0, le=10_000, description="Least probability that falls with uncertainty; 0: off."
    )
    xtc_probability: float = Field(0.0, ge=0, le=1, description="How often the top choices are excluded.")
    xtc_threshold: float = Field(0.1, ge=0, le=1, description="What a top choice is: at least this probable.")
    mirostat_mode: int = Field(
        0,
        ge=0,
        le=2,
        validation_alias=AliasChoices("mirostat_mode", "mirostat"),
        description="1 or 2: in place of cuts.",
    )
    mirostat_tau: float = Field(5.0, ge=0, le=100, description="Surprise to keep to, in bits.")
    mirostat_eta: float = Field(0.1, ge=0, le=10, description="How fast it learns.")
    adaptive_target: float = Field(0.0, ge=-1, le=1, description="Prefer tokens about so probable; 0 or -1: off.")
    adaptive_decay: float = Field(0.9, ge=0, le=1, description="How long past draws count.")
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=100,
        validation_alias=AliasChoices("repetition_penalty", "repeat_penalty"),
        description="Divides positive logits of tokens that occurred, multiplies negative ones.",
    )
    frequency_penalty: float = Field(0.0, ge=-100, le=100, description="Taken off for each time a token occurred.")
    presence_penalty: float = Field(0.0, ge=-100, le=100, description="Taken off once if a token occurred.")
    repetition_penalty_range: int = Field(
        1024, ge=-1, le=_INT32, description="Last tokens that the penalties and DRY look at; 0 or -1: all."
    )
    repeat_last_n: int | None = Field(
        None, ge=-1, le=_INT32, description="llama-server's repetition_penalty_range: -1: all, 0: no penalties."
    )
    encoder_repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="Over 1: prefer the prompt's tokens.")
    no_repeat_ngram_size: int = Field(0, ge=0, le=_INT32, description="No so many tokens in a row twice; 0: off.")
    dry_multiplier: float = Field(
        0.0, ge=0, le=1000, description="Strength of DRY, against repeated sequences; 0: off."
    )
    dry_base: float = Field(1.75, ge=1, le=100, description="How fast its penalty grows with the sequence.")
    dry_allowed_length: int = Field(2, ge=1, le=_INT32, description="Longest repetition that costs nothing more.")
    dry_penalty_last_n: int | None = Field(
        None, ge=-1, le=_INT32, description="Last tokens that DRY looks at; -1: all, 0: DRY off."
    )
    dry_sequence_breakers: Annotated[
        list[str],
        BeforeValidator(quoted_texts),
        AfterValidator(_check_breakers),
        WithJsonSchema(_BREAKERS_SCHEMA),
    ] = Field(_BREAKERS, max_length=_MAX_BREAKERS, description="Texts across which nothing counts as repeated.")
    sampler_priority: Order | None = Field(
        None,
        max_length=64,
        validation_alias=AliasChoices("sampler_priority", "samplers"),
        description="The stages in their order; those not named are off.",
    )
    do_sample: bool = Field(default=True, description="False: always the most probable token.")
    min_length: int = Field(
        0,
        ge=0,
        le=_INT32,
        validation_alias=AliasChoices("min_length", "min_tokens"),
        description="No end before that.",
    )
    penalty_alpha: float = Field(0.0, description="Contrastive search; not honoured.")
    guidance_scale: float = Field(1.0, description="Classifier-free guidance; not honoured.")
    negative_prompt: str = Field("", description="Its other prompt; not honoured.")
    num_beams: int = Field(1, description="Beam search; not honoured.")
    length_penalty: float = Field(1.0, description="Of beam search; not honoured.")
    early_stopping: bool = Field(default=False, description="Of beam search; not honoured.")

    @model_validator(mode="after")
    def _low_is_not_over_high(self) -> Self:
        if self.dynamic_temperature and self.dynatemp_low > self.dynatemp_high:
            raise ValueError("dynatemp_low is over dynatemp_high")
        return self

    def stages(self) -> tuple[str, ...]:
        """Return the stages in the order in which they run."""
        order = STAGES if self.sampler_priority is None else tuple(self.sampler_priority)
        if not self.temperature_last:
            return order
        last = [name for name in ("temperature", "quadratic_sampling") if name in order]
        return (*(name for name in order if name not in last), *last)

    def without_effect(self, given: Mapping[str, Any]) -> Iterator[str]:
        """Yield which of some given options could be left out without changing a thing."""
        wanted = self.sampling(0).effective()
        kept = self.unusual(SamplingOptions)
        for name in given:
            others = {other: value for other, value in kept.items() if other != name}
            if name in NOT_HONOURED or _sampling_options(others).sampling(0).effective() == wanted:
                kept = others
                yield name

    def sampling(self, seed: int, **others: Any) -> Sampling:
        """Return what the engine shall do; ``others`` are its fields that no preset sets."""
        temperature, reach = self._temperatures()
        penalties_range = _range(self.repetition_penalty_range, self.repeat_last_n)
        dry_range = _range(self.repetition_penalty_range, self.dry_penalty_last_n)
        penalised = penalties_range is not None
        return Sampling(
            seed=seed,
            stages=self.stages(),
            temperature=temperature,
            dynatemp_range=reach,
            dynatemp_exponent=self.dynatemp_exponent,
            smoothing_factor=self.smoothing_factor,
            smoothing_curve=self.smoothing_curve,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            top_n_sigma=max(0.0, self.top_n_sigma),
            epsilon_cutoff=self.epsilon_cutoff,
            eta_cutoff=self.eta_cutoff,
            tfs=self.tfs,
            top_a=self.top_a,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            mirostat_mode=self.mirostat_mode,
            mirostat_tau=self.mirostat_tau,
            mirostat_eta=self.mirostat_eta,
            adaptive_target=max(0.0, self.adaptive_target),
            adaptive_decay=self.adaptive_decay,
            repetition_penalty=self.repetition_penalty if penalised else 1.0,
            frequency_penalty=self.frequency_penalty if penalised else 0.0,
            presence_penalty=self.presence_penalty if penalised else 0.0,
            repetition_penalty_range=penalties_range or 0,
            encoder_repetition_penalty=self.encoder_repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            dry_multiplier=self.dry_multiplier if dry_range is not None else 0.0,
            dry_base=self.dry_base,
            dry_allowed_length=self.dry_allowed_length,
            dry_range=dry_range or 0,
            dry_sequence_breakers=tuple(self.dry_sequence_breakers),
            min_tokens=self.min_length,
            **others,
        )

    def _temperatures(self) -> tuple[float, float]:
        """Return the temperature, and how far it moves to either side."""
        if not self.do_sample:
            return 0.0, 0.0
        if self.dynamic_temperature:
            return (self.dynatemp_low + self.dynatemp_high) / 2, (self.dynatemp_high - self.dynatemp_low) / 2
        return self.temperature, self.dynatemp_range


def _sampling_options(values: Mapping[str, Any]) -> SamplingOptions:
    return SamplingOptions.model_construct(set(values), **values)


def _range(ours: int, llama_servers: int | None) -> int | None:
    """Return the number of last tokens to look at, 0 for all; None for not looking at all."""
    if llama_servers is None:
        return max(0, ours)
    return None if llama_servers == 0 else max(0, llama_servers)
