"""The tools that a request offers, and what it wants of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.tools import MAX_DESCRIPTION, MAX_SCHEMAS, MAX_TOOLS, Tool, Toolbox, toolbox
from llamaserve.errors import InvalidRequest, UnsupportedParameter

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
EMPTY = {"type": "object", "properties": {}}


def tool(name: Any = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def box(**fields: Any) -> Toolbox | None:
    empty = dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"))
    return toolbox(**{**empty, **fields})


def offered(**fields: Any) -> Toolbox:
    found = box(**fields)
    assert found is not None
    return found


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        box(**fields)
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    caught.value.message.encode()
    return caught.value


def test_a_tool_in_full() -> None:
    entry = tool("weather", description="What it is like outside.", parameters=SCHEMA, strict=True)
    found = offered(tools=[entry])
    assert found == Toolbox(
        tools=(Tool("weather", "What it is like outside.", SCHEMA, True, "tools[0].function"),),
        forced=False,
        names=frozenset({"weather"}),
        several=None,
        legacy=False,
    )
    assert found.tools[0].for_template() == {
        "type": "function",
        "function": {"name": "weather", "description": "What it is like outside.", "parameters": SCHEMA},
    }


def test_what_a_tool_may_leave_out() -> None:
    nulls = dict.fromkeys(("description", "parameters", "strict"))
    for entry in (tool(), tool(**nulls), tool(description="", parameters=EMPTY, strict=False, colour="red")):
        (found,) = offered(tools=[entry]).tools
        assert found == Tool("f", "", EMPTY, False, "tools[0].function")
        assert found.for_template()["function"] == {"name": "f", "description": "", "parameters": EMPTY}


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        ({}, {"type": "object"}),
        ({"type": "object"}, {"type": "object"}),
        ({"type": None, "properties": None, "required": None}, {"type": "object"}),
        ({"anyOf": [SCHEMA, EMPTY]}, {"type": "object", "anyOf": [SCHEMA, EMPTY]}),
        ({"properties": {"a": True}, "default": None}, {"type": "object", "properties": {"a": True}, "default": None}),
    ],
)
def test_a_schema_is_one_of_objects_even_where_it_does_not_say_so(
    parameters: dict[str, Any], schema: dict[str, Any]
) -> None:
    before = json.dumps(parameters)
    (found,) = offered(tools=[tool(parameters=parameters)]).tools
    assert found.parameters == schema
    assert found.for_template()["function"]["parameters"] == {"properties": {}, **schema}
    assert json.dumps(parameters) == before


def test_tools_of_the_responses_api_are_flat() -> None:
    entry = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    assert offered(tools=[entry]).tools == (Tool("f", "d", SCHEMA, True, "tools[0]"),)
    assert offered(tools=[entry | {"function": None}]).tools[0].place == "tools[0]"
    assert refused(tools=[entry | {"parameters": 5}]).param == "tools[0].parameters"


def test_functions_of_before_there_were_tools() -> None:
    functions = [{"name": "f", "description": "d", "parameters": SCHEMA}, {"name": "g"}]
    found = offered(functions=functions)
    assert found.tools == (Tool("f", "d", SCHEMA, False, "functions[0]"), Tool("g", "", EMPTY, False, "functions[1]"))
    assert (found.forced, found.names, found.several, found.legacy) == (False, {"f", "g"}, False, True)
    named = offered(functions=functions, function_call={"name": "g"})
    assert (named.forced, named.names, len(named.tools)) == (True, {"g"}, 2)
    assert offered(functions=functions, function_call="auto", parallel_tool_calls=False) == found
    assert box(functions=functions, function_call="none") is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": []},
        {"tools": [], "functions": [], "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "auto", "function_call": "auto"},
        {"tool_choice": "none", "function_call": "none"},
        {"tools": [tool()], "tool_choice": "none"},
    ],
)
def test_no_tools(fields: dict[str, Any]) -> None:
    assert box(**fields) is None


def test_tools_that_are_not_used_are_checked() -> None:
    assert refused(tools=[tool(5)], tool_choice="none").param == "tools[0].function.name"


def test_either_list_may_be_empty_beside_the_other() -> None:
    assert not offered(tools=[tool()], functions=[]).legacy
    assert offered(tools=[], functions=[{"name": "f"}]).legacy


@pytest.mark.parametrize(
    ("choice", "forced", "names"),
    [
        (None, False, {"f", "g", "h"}),
        ("auto", False, {"f", "g", "h"}),
        ("required", True, {"f", "g", "h"}),
        ("any", True, {"f", "g", "h"}),
        (tool("g"), True, {"g"}),
        ({"type": "function", "name": "g"}, True, {"g"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("f")]}}, False, {"f"}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("f"), tool("h")]}},
            True,
            {"f", "h"},
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "h"}, tool("h")]},
            True,
            {"h"},
        ),
    ],
)
@pytest.mark.parametrize("several", [None, True, False])
def test_choices(choice: Any, forced: bool, names: set[str], several: bool | None) -> None:
    found = offered(tools=[tool("f"), tool("g"), tool("h")], tool_choice=choice, parallel_tool_calls=several)
    assert [each.name for each in found.tools] == ["f", "g", "h"]  # the model sees them all
    assert (found.forced, found.names, found.several, found.legacy) == (forced, names, several, False)


@pytest.mark.parametrize(
    ("choice", "param", "said"),
    [
        ("maybe", "tool_choice", "one of none, auto, required, any"),
        ("", "tool_choice", "one of"),
        ("\ud800", "tool_choice", "half a surrogate pair"),
        (7, "tool_choice", "must be auto, none"),
        (True, "tool_choice", "must be auto, none"),
        ([], "tool_choice", "must be auto, none"),
        ({}, "tool_choice", "have a type"),
        ({"name": "f"}, "tool_choice", "have a type"),
        ({"type": 7}, "tool_choice", "have a type"),
        (tool("x"), "tool_choice", "'x' is not among the tools"),
        ({"type": "function", "name": "x"}, "tool_choice", "'x' is not among the tools"),
        ({"type": "function"}, "tool_choice.name", "missing"),
        ({"type": "function", "name": 7}, "tool_choice.name", "a string"),
        ({"type": "function", "function": "f"}, "tool_choice.function", "an object"),
        ({"type": "function", "function": {}}, "tool_choice.function.name", "missing"),
        (tool("a b"), "tool_choice.function.name", "can't be in a name"),
        ({"type": "allowed_tools"}, "tool_choice.mode", "missing"),
        ({"type": "allowed_tools", "allowed_tools": []}, "tool_choice.allowed_tools", "an object"),
        ({"type": "allowed_tools", "allowed_tools": {}}, "tool_choice.allowed_tools.mode", "missing"),
        ({"type": "allowed_tools", "mode": "none", "tools": [tool()]}, "tool_choice.mode", "must be one of"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools", "at least one"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.tools", "at least one"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [tool()] * 513}, "tool_choice.tools", "at most 512"),
        ({"type": "allowed_tools", "mode": "auto", "tools": ["f"]}, "tool_choice.tools[0]", "an object"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]}, "tool_choice.tools[0].type", "missing"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [tool(), tool("x")]}, "tool_choice", "'x' is not among"),
    ],
)
def test_wrong_choices_are_refused(choice: Any, param: str, said: str) -> None:
    error = refused(tools=[tool()], tool_choice=choice)
    assert (type(error), error.param) == (InvalidRequest, param)
    assert said in error.message


@pytest.mark.parametrize(
    ("choice", "param", "said"),
    [
        ("required", "function_call", "must be auto, none"),
        (7, "function_call", "must be auto, none"),
        ({}, "function_call", "must be auto, none"),
        ({"name": None}, "function_call.name", "missing"),
        ({"name": 7}, "function_call.name", "a string"),
        ({"name": "x"}, "function_call", "'x' is not among the functions"),
    ],
)
def test_wrong_function_calls_are_refused(choice: Any, param: str, said: str) -> None:
    error = refused(functions=[{"name": "f"}], function_call=choice)
    assert (type(error), error.param) == (InvalidRequest, param)
    assert said in error.message


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice", "offers no tools"),
        ({"tool_choice": "any", "tools": []}, "tool_choice", "offers no tools"),
        ({"tool_choice": tool()}, "tool_choice", "offers no tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [tool()]}}, "tool_choice", "no tools"),
        ({"tool_choice": "required", "functions": [{"name": "f"}]}, "tool_choice", "offers no tools"),
        ({"function_call": {"name": "f"}}, "function_call", "offers no functions"),
        ({"function_call": {"name": "f"}, "tools": [tool()]}, "function_call", "offers no functions"),
        ({"tools": [tool()], "functions": [{"name": "g"}]}, "functions", "both"),
        ({"tools": [tool()], "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "true or false"),
        ({"functions": [{"name": "f"}], "parallel_tool_calls": True}, "parallel_tool_calls", "use tools"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], param: str, said: str) -> None:
    error = refused(**fields)
    assert (type(error), error.param) == (InvalidRequest, param)
    assert said in error.message


@pytest.mark.parametrize(
    ("entry", "param", "said"),
    [
        (None, "", "missing"),
        ("f", "", "an object"),
        ([], "", "an object"),
        ({}, ".type", "missing"),
        ({"function": {"name": "f"}}, ".type", "missing"),
        ({"type": 7, "function": {"name": "f"}}, ".type", "a string"),
        ({"type": "function"}, ".function", "missing"),
        ({"type": "function", "function": 7}, ".function", "an object"),
        ({"type": "function", "function": {}}, ".function.name", "missing"),
        ({"type": "function", "name": 7}, ".name", "a string"),
        (tool(""), ".function.name", "1 to 256"),
        (tool("f" * 257), ".function.name", "1 to 256"),
        (tool("a b"), ".function.name", "can't be in a name"),
        (tool("\ud800"), ".function.name", "half a surrogate pair"),
        (tool("first"), ".function.name", "tools[0].function has the name 'first' already"),
        (tool(description=7), ".function.description", "a string"),
        (tool(description="\ud800"), ".function.description", "half a surrogate pair"),
        (tool(description="x" * (MAX_DESCRIPTION + 1)), ".function.description", "at most 65536"),
        (tool(strict="yes"), ".function.strict", "true or false"),
        (tool(parameters=[]), ".function.parameters", "a JSON schema"),
        (tool(parameters="{}"), ".function.parameters", "a JSON schema"),
        (tool(parameters=True), ".function.parameters", "a JSON schema"),
        (tool(parameters={"type": "string"}), ".function.parameters.type", "'string', but arguments are always"),
        (tool(parameters={"type": ["object", "null"]}), ".function.parameters.type", "always an object"),
        (tool(parameters={"properties": []}), ".function.parameters.properties", "an object"),
        (tool(parameters={"properties": {"": 7}}), ".function.parameters.properties", "that of ''"),
        (tool(parameters={"required": "city"}), ".function.parameters.required", "a list of names"),
        (tool(parameters={"required": [7]}), ".function.parameters.required", "a list of names"),
        (tool(parameters={"title": "\ud800"}), ".function.parameters", "half a surrogate pair"),
        (tool(parameters={"\ud800": 1}), ".function.parameters", "half a surrogate pair"),
        (tool(parameters={"default": float("nan")}), ".function.parameters", "not finite"),
        (tool(parameters={"default": 2**64}), ".function.parameters", "64 bits"),
        (tool(parameters={"title": "x" * MAX_SCHEMAS}), ".function.parameters", "more than 1048576"),
    ],
)
def test_wrong_tools_are_refused_with_their_place(entry: Any, param: str, said: str) -> None:
    error = refused(tools=[tool("first"), entry])
    assert (type(error), error.param) == (InvalidRequest, f"tools[1]{param}")
    assert said in error.message


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [tool(), {"type": "web_search"}]}, "tools[1].type", "'web_search'"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "'custom'"),
        ({"tools": [tool()], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type", "custom"),
        ({"tools": [tool()], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "'file_search'"),
        (
            {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            "tool_choice.tools[0].type",
            "'mcp'",
        ),
    ],
)
def test_tools_that_are_no_functions_are_not_offered(fields: dict[str, Any], param: str, said: str) -> None:
    error = refused(**fields)
    assert (type(error), error.param) == (UnsupportedParameter, param)
    assert said in error.message


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    assert refused(tools=[tool(parameters=schema)]).param == "tools[0].function.parameters"


@pytest.mark.parametrize("field", ["tools", "functions"])
def test_lists_are_lists_and_not_too_long(field: str) -> None:
    assert refused(**{field: {"type": "function"}}).param == field
    assert refused(**{field: "f"}).param == field
    many = [tool(f"f{i}") | {"name": f"f{i}"} for i in range(MAX_TOOLS + 1)]
    assert "at most 512" in refused(**{field: many}).message
    assert len(offered(**{field: many[:-1]}).tools) == MAX_TOOLS


def test_schemas_are_measured_together() -> None:
    half = {"title": "x" * (MAX_SCHEMAS // 2 - 100)}
    assert offered(tools=[tool("a", parameters=half), tool("b", parameters=half)])
    error = refused(tools=[tool(name, parameters=half) for name in "abc"])
    assert error.param == "tools[2].function.parameters"


def test_functions_name_their_own_places() -> None:
    functions = [{"name": "f"}, {"name": "f"}]
    assert refused(functions=functions).param == "functions[1].name"
    assert refused(functions=[{"name": "f", "parameters": {"type": 7}}]).param == "functions[0].parameters.type"
    assert refused(functions=[{"function": {"name": "f"}}]).param == "functions[0].name"


# Values that are nearly right, so that many are accepted and the others fail late.
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda number: _ANY if number == 15 else right)


_NAMES = mostly(st.sampled_from(["f", "g"]))
_SCHEMAS = st.fixed_dictionaries(
    {},
    optional={
        "type": mostly(st.just("object")),
        "properties": mostly(st.none() | st.dictionaries(st.text(max_size=2), mostly(st.just({})), max_size=2)),
        "required": mostly(st.none() | st.lists(st.text(max_size=2))),
        "title": mostly(st.text(max_size=2)),
    },
)
_FUNCTIONS = st.fixed_dictionaries(
    {"name": _NAMES},
    optional={
        "description": mostly(st.text(max_size=3)),
        "parameters": mostly(_SCHEMAS),
        "strict": mostly(st.booleans()),
    },
)
_TOOLS = st.fixed_dictionaries({"type": st.just("function"), "function": mostly(_FUNCTIONS)})
_CHOICES = st.sampled_from(["auto", "none", "required", tool("f"), {"type": "function", "name": "g"}]) | st.builds(
    lambda mode, tools: {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}},
    mostly(st.sampled_from(["auto", "required"])),
    mostly(st.lists(mostly(st.builds(tool, _NAMES)), max_size=2)),
)
_NEW = st.fixed_dictionaries(
    {"tools": mostly(st.lists(mostly(_TOOLS), max_size=2))},
    optional={"tool_choice": mostly(_CHOICES), "parallel_tool_calls": mostly(st.booleans())},
)
_OLD = st.fixed_dictionaries(
    {"functions": mostly(st.lists(mostly(_FUNCTIONS), max_size=2))},
    optional={"function_call": mostly(st.sampled_from(["auto", "none", {"name": "f"}]))},
)
_FIELDS = _NEW | _OLD | st.builds(lambda new, old: new | old, _NEW, _OLD)


def outcome(fields: dict[str, Any]) -> Toolbox | InvalidRequest | None:
    try:
        return box(**fields)
    except InvalidRequest as error:
        return error


@given(_FIELDS)
def test_anything_is_refused_with_its_place_or_can_be_used(fields: dict[str, Any]) -> None:
    found = outcome(fields)
    if isinstance(found, InvalidRequest):
        assert type(found) in (InvalidRequest, UnsupportedParameter)
        assert found.param is not None
        assert found.param.split(".")[0].split("[")[0] in fields
        found.message.encode()
    elif found is not None:
        assert found.names <= {each.name for each in found.tools}
        assert found.names
        for each in found.tools:
            json.dumps(each.for_template(), ensure_ascii=False, allow_nan=False).encode()
            assert each.parameters["type"] == "object"
        again = offered(tools=[each.for_template() for each in found.tools])
        assert [each.for_template() for each in again.tools] == [each.for_template() for each in found.tools]
