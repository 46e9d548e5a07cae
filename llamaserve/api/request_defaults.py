"""What holds for requests to a model where they say nothing: the ``settings`` and templates given when it was loaded.

They are fields of a chat request, under the names that these have there or in the settings of text-generation-webui.
A request that says one thing of a matter has said all of it: with its own character, the name of the default one does
not count. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.fields import RequestFields, names_of
from llamaserve.api.sampling_options import NOT_HONOURED, SamplingOptions, quoted_texts
from llamaserve.api.services import Services
from llamaserve.errors import InvalidRequest

Body = TypeVar("Body", bound=RequestFields)

_PLACE = "settings."
_SAMPLING: Final = frozenset(SamplingOptions.model_fields) - frozenset(NOT_HONOURED)
_OF_ANSWERS = (
    *("max_tokens", "auto_max_new_tokens", "max_tokens_second", "truncation_length", "time_limit", "seed", "stop"),
    *("custom_token_bans", "ban_eos_token", "add_bos_token", "skip_special_tokens", "preset"),
)
_OF_CHATS = (
    *("mode", "character", "name1", "name2", "context", "user_bio", "chat_instruct_command", "chat_template_str"),
    *("instruction_template", "instruction_template_str", "turn_template", "name1_instruct", "name2_instruct"),
    *("context_instruct", "system_message", "enable_thinking", "reasoning_effort", "reasoning_budget"),
    *("reasoning_budget_message", "preserve_thinking", "chat_template_kwargs", "truncation"),
)
_FIELDS: Final = (*sorted(_SAMPLING), *_OF_ANSWERS, *_OF_CHATS)

# What text-generation-webui's settings call a field otherwise.
_SETTINGS = {
    "custom_stopping_strings": "stop",
    "custom_system_message": "system_message",
    "chat-instruct_command": "chat_instruct_command",
    "max_new_tokens": "max_tokens",
}
_NAMES: Final = {name: field for field in _FIELDS for name in names_of(ChatRequest, field)} | _SETTINGS

# Matters: fields that say the same thing in several ways, or belong together.
_MATTERS = (
    frozenset({"max_tokens", "max_completion_tokens", "auto_max_new_tokens"}),
    frozenset(
        {"temperature", "do_sample", "dynamic_temperature", "dynatemp_low", "dynatemp_high", "dynatemp_range"},
    ),
    frozenset({"repetition_penalty_range", "repeat_last_n"}),
    frozenset({"sampler_priority", "temperature_last"}),
    frozenset({"character", "name2", "context"}),
    frozenset({"instruction_template", "instruction_template_str", "turn_template"})
    | frozenset({"name1_instruct", "name2_instruct", "context_instruct"}),
    frozenset({"enable_thinking", "reasoning_effort", "reasoning_budget", "chat_template_kwargs"}),
)


@dataclass(frozen=True)
class RequestDefaults:
    """Values by the name of the request field, and the settings that are none."""

    values: dict[str, Any]
    ignored: tuple[str, ...] = ()


def read_settings(settings: Mapping[str, object], place: str = _PLACE) -> RequestDefaults:
    """Return the request fields that settings set; ``place`` is what comes before their names in errors. Null is as
    good as not given.

    Raises ``InvalidRequest`` for values that no request may have, and for two that contradict each other.
    """
    fields: dict[str, object] = {}
    keys: dict[str, str] = {}
    ignored = []
    for key, value in settings.items():
        field = _NAMES.get(key)
        if field is None:
            ignored.append(key)
        elif value is not None:
            read = _read(key, value, place)
            if field in fields and fields[field] != read:
                raise _mistake(place + key, f"{keys[field]} says the same thing, but otherwise")
            fields[field], keys[field] = read, key
    return RequestDefaults(_validated(fields, {name: place + key for name, key in keys.items()}), tuple(ignored))


def check_names(values: Mapping[str, Any], services: Services) -> None:
    """Refuse names of presets, characters and instruction templates that are not there."""
    if "preset" in values:
        services.presets.get(values["preset"])
    services.characters.get(values.get("character"))
    services.instruction_templates.get(values.get("instruction_template"))


def with_defaults(body: Body, defaults: Mapping[str, Any]) -> Body:
    """Return the request with the values that hold where it says nothing."""
    said = body.model_fields_set
    settled = said.union(*(matter for matter in _MATTERS if matter & said))
    if "preset" in said:  # which replaces all of them, or is their default
        settled |= _SAMPLING
    values = {name: defaults[name] for name in defaults.keys() & type(body).model_fields.keys() - settled}
    if "preset" in values:  # the request's own options win over a preset that it has not asked for
        values["preset_mode"] = "defaults"
    return body.filled(values) if values else body


def _read(key: str, value: object, place: str) -> object:
    if key != "custom_stopping_strings":
        return value
    try:
        return quoted_texts(value)
    except ValueError as error:
        raise _mistake(place + key, str(error)) from error


def _validated(fields: Mapping[str, object], places: Mapping[str, str]) -> dict[str, Any]:
    try:
        request = ChatRequest.model_validate({"messages": [], **fields})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(next(iter(problem["loc"]), ""))
        raise _mistake(places.get(name, "settings"), problem["msg"].removeprefix("Value error, ")) from error
    return {name: getattr(request, name) for name in fields}


def _mistake(place: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: {what}", param=place)
