"""From the fields of a request that offer tools to the model to values, checked first.

Accepted is what OpenAI's chat API documents for functions: ``tools`` and ``tool_choice``, and ``functions`` and
``function_call`` of before. Every refusal names the place in the request. This module knows nothing of HTTP, templates
or models, nor of how a model is brought to call: it says what is offered and what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamaserve.chat.values import function_name, mapping, shown, text, written
from llamaserve.errors import InvalidRequest, UnsupportedParameter

MAX_TOOLS = 512
MAX_DESCRIPTION = 64 * 1024  # characters of one; agents' longest have some ten thousand
MAX_SCHEMAS = 1024 * 1024  # characters of all schemas of a request, written as JSON

_NULL_IS_NOT_GIVEN = frozenset({"type", "properties", "required"})  # of a schema, at its root

# What a choice may be called, and whether an answer must call then. "any" is what Mistral and Anthropic call it.
_MODES = {"auto": False, "required": True, "any": True}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. ``parameters`` is a JSON schema of type object; ``place`` is in the request.

    ``strict`` says that the client wants the arguments to fit the schema in every detail.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool
    place: str

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates read it: OpenAI's form, complete."""
        parameters = {"properties": {}, **self.parameters}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request and what is wanted of them.

    ``forced``: an answer must call. ``names``: those that may be called, all or some of the tools. ``several``: whether
    an answer may have more than one call; None leaves it to the server. ``legacy``: the request is of before there were
    tools, and its answer has one ``function_call`` instead of ``tool_calls``.
    """

    tools: tuple[Tool, ...]
    forced: bool
    names: frozenset[str]
    several: bool | None
    legacy: bool


@dataclass(frozen=True)
class _Choice:
    """What is wanted: ``names`` is None for all tools; ``off`` takes them away."""

    forced: bool = False
    names: frozenset[str] | None = None
    off: bool = False


def toolbox(
    *, tools: object, tool_choice: object, parallel_tool_calls: object, functions: object, function_call: object
) -> Toolbox | None:
    """Return what the fields say; None when the model shall see no tools. A field that is None is not given.

    A tool is ``{"type": "function", "function": {"name", "description", "parameters", "strict"}}``, or the same without
    the inner object, as in OpenAI's Responses API. A tool's schema must be one of objects; its ``properties`` and
    ``required`` may be null, which is how programs in Go write empty ones.

    ``tool_choice`` is auto, none, required (or any), one function, or some ``allowed_tools``, and ``function_call`` is
    auto, none or one function. With none the tools are checked, and then the model does not see them.

    Raises ``InvalidRequest`` for what can't be right and ``UnsupportedParameter`` for tools that are no functions.
    """
    several = _flag(parallel_tool_calls, "parallel_tool_calls")
    found, old = _tools(tools, "tools"), _tools(functions, "functions")
    if found and old:
        raise InvalidRequest("functions is the old name of tools, and both are given", param="functions")
    choice = _checked(_choice(tool_choice), found, "tool_choice", "tools")
    old_choice = _checked(_old_choice(function_call), old, "function_call", "functions")
    if old and several:
        raise InvalidRequest(
            "parallel_tool_calls can't be true with functions: a function_call is a single one; use tools",
            param="parallel_tool_calls",
        )
    return _toolbox(found, choice, several, legacy=False) or _toolbox(old, old_choice, False, legacy=True)


def _toolbox(tools: tuple[Tool, ...], choice: _Choice, several: bool | None, *, legacy: bool) -> Toolbox | None:
    if not tools or choice.off:
        return None
    names = frozenset(tool.name for tool in tools) if choice.names is None else choice.names
    return Toolbox(tools, choice.forced, names, several, legacy)


def _flag(value: object, place: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{place} must be true or false", param=place)
    return value


def _tools(values: object, field: str) -> tuple[Tool, ...]:
    if values is None:
        return ()
    if not isinstance(values, list):
        raise InvalidRequest(f"{field} must be a list", param=field)
    if len(values) > MAX_TOOLS:
        raise InvalidRequest(f"{field} has {len(values)} entries; at most {MAX_TOOLS} are taken", param=field)
    tools: dict[str, Tool] = {}
    room = MAX_SCHEMAS
    for i, value in enumerate(values):
        function, place = _function(value, f"{field}[{i}]", bare=field == "functions")
        tool = _tool(function, place)
        if tool.name in tools:
            raise InvalidRequest(
                f"{place}.name: {tools[tool.name].place} has the name {shown(tool.name)} already", param=f"{place}.name"
            )
        room -= len(written(tool.parameters, f"{place}.parameters"))
        if room < 0:
            raise InvalidRequest(
                f"{place}.parameters: the schemas up to this one have more than {MAX_SCHEMAS} characters",
                param=f"{place}.parameters",
            )
        tools[tool.name] = tool
    return tuple(tools.values())


def _function(value: object, place: str, *, bare: bool) -> tuple[Mapping[str, Any], str]:
    """Return the part of an entry that describes the function, and its place. A bare entry is only that part."""
    entry = mapping(value, place)
    if bare:
        return entry, place
    kind = text(entry.get("type"), f"{place}.type")
    if kind != "function":
        raise UnsupportedParameter(
            f"{place}.type: only tools of type 'function' are offered, not {shown(kind)}", param=f"{place}.type"
        )
    if entry.get("function") is None and entry.get("name") is not None:
        return entry, place
    return mapping(entry.get("function"), f"{place}.function"), f"{place}.function"


def _tool(function: Mapping[str, Any], place: str) -> Tool:
    name = function_name(function.get("name"), f"{place}.name")
    description = function.get("description")
    description = "" if description is None else text(description, f"{place}.description")
    if len(description) > MAX_DESCRIPTION:
        raise InvalidRequest(
            f"{place}.description has {len(description)} characters; at most {MAX_DESCRIPTION} are taken",
            param=f"{place}.description",
        )
    parameters = _parameters(function.get("parameters"), f"{place}.parameters")
    return Tool(name, description, parameters, bool(_flag(function.get("strict"), f"{place}.strict")), place)


def _parameters(value: object, place: str) -> dict[str, Any]:
    """Return the schema of a function's arguments with its type, "object", even where that was left out."""
    if value is None:
        return {"type": "object", "properties": {}}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place} must be a JSON schema, which is an object", param=place)
    schema = {key: each for key, each in value.items() if each is not None or key not in _NULL_IS_NOT_GIVEN}
    if schema.setdefault("type", "object") != "object":
        raise InvalidRequest(
            f"{place}.type is {shown(schema['type'])}, but arguments are always an object", param=f"{place}.type"
        )
    properties = mapping(schema.get("properties", {}), f"{place}.properties")
    for key, each in properties.items():
        if not isinstance(each, dict | bool):
            raise InvalidRequest(
                f"{place}.properties: that of {shown(key)} is no JSON schema", param=f"{place}.properties"
            )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise InvalidRequest(f"{place}.required must be a list of names", param=f"{place}.required")
    return schema


def _choice(value: object) -> _Choice:
    place = "tool_choice"
    match value:
        case None:
            return _Choice()
        case "none":
            return _Choice(off=True)
        case str():
            return _Choice(_forced(value, place))
        case {"type": "function"}:
            return _Choice(True, frozenset({_chosen(mapping(value, place), place)}))
        case {"type": "allowed_tools", "allowed_tools": inner} if inner is not None:
            return _allowed(mapping(inner, f"{place}.allowed_tools"), f"{place}.allowed_tools")
        case {"type": "allowed_tools"}:
            return _allowed(mapping(value, place), place)
        case {"type": str(kind)}:
            raise UnsupportedParameter(
                f"{place}.type: a tool of type {shown(kind)} can't be chosen, only functions", param=f"{place}.type"
            )
    raise InvalidRequest(
        f"{place} must be auto, none, required, a function or allowed_tools, and the last two have a type", param=place
    )


def _old_choice(value: object) -> _Choice:
    place = "function_call"
    match value:
        case None | "auto":
            return _Choice()
        case "none":
            return _Choice(off=True)
        case {"name": name}:
            return _Choice(True, frozenset({function_name(name, f"{place}.name")}))
    raise InvalidRequest(f"{place} must be auto, none or an object with the name of a function", param=place)


def _forced(value: object, place: str) -> bool:
    mode = text(value, place)
    if mode not in _MODES:
        raise InvalidRequest(f"{place} is {shown(mode)}, but must be one of none, {', '.join(_MODES)}", param=place)
    return _MODES[mode]


def _chosen(value: Mapping[str, Any], place: str) -> str:
    """Return the name in ``{"type": "function", "function": {"name"}}`` or ``{"type": "function", "name"}``."""
    if value.get("function") is None:
        return function_name(value.get("name"), f"{place}.name")
    return function_name(mapping(value["function"], f"{place}.function").get("name"), f"{place}.function.name")


def _allowed(value: Mapping[str, Any], place: str) -> _Choice:
    forced = _forced(value.get("mode"), f"{place}.mode")
    tools = value.get("tools")
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest(f"{place}.tools must be a list of at least one tool", param=f"{place}.tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"{place}.tools has {len(tools)} entries; at most {MAX_TOOLS} are taken", param=f"{place}.tools"
        )
    return _Choice(forced, frozenset(_names_of_allowed(tools, f"{place}.tools")))


def _names_of_allowed(tools: list[object], place: str) -> Iterator[str]:
    for i, value in enumerate(tools):
        tool = mapping(value, f"{place}[{i}]")
        kind = text(tool.get("type"), f"{place}[{i}].type")
        if kind != "function":
            raise UnsupportedParameter(
                f"{place}[{i}].type: only tools of type 'function' are offered, not {shown(kind)}",
                param=f"{place}[{i}].type",
            )
        yield _chosen(tool, f"{place}[{i}]")


def _checked(choice: _Choice, tools: tuple[Tool, ...], field: str, offers: str) -> _Choice:
    """Return a choice that the tools allow."""
    if not tools and (choice.forced or choice.names):
        raise InvalidRequest(f"{field} asks for a call, but the request offers no {offers}", param=field)
    unknown = (choice.names or frozenset()).difference(tool.name for tool in tools)
    if unknown:
        raise InvalidRequest(f"{field}: {shown(min(unknown))} is not among the {offers}", param=field)
    return choice
