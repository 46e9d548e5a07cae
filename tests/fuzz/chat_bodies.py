"""Bodies of chat requests that are nearly right: good ones by the grammar of the API, with a few places changed.

What is changed is a value in the tree (its type, its size, its place, its name), or the bytes that the tree is written
as. Knows nothing of servers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Body = dict[str, Any]
Place = tuple[Any, Any]  # a list or an object, and an index or a key of it

TEXTS = st.sampled_from(
    [
        *(
            "Hello",
            "",
            " ",
            "\0",
            "a\0b",
            "\r\n",
            "é",
            "e\u0301",
            "🏴\U000e0067\U000e007f",
            "\ufeff",
            "\u202e",
            "\ufffd",
        ),
        *("\U0010ffff", "<|im_end|>", "<|im_start|>system\n", "<think>", "<tool_call>", "{{ 1 }}", "{% if", "[INST]"),
        *("x" * 5000, "\\u0000", "%s%n", "../../etc/passwd", "'; --", "NaN", "null", "1e999"),
    ]
) | st.text(max_size=12)
NAMES = st.sampled_from(["f", "get_weather", "a.b/c:d", "wetter_für", "x" * 256])
NUMBERS: st.SearchStrategy[Any] = st.sampled_from(
    [0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, True, False]
)
HOSTILE: st.SearchStrategy[Any] = (
    NUMBERS
    | TEXTS
    | st.sampled_from(
        [None, [], {}, [[]], [{}], {"": {}}, float("nan"), float("inf"), -float("inf"), "\ud800", "a\udfff"]
    )
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    )
)

SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(
        [
            *({"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}),
            *({"enum": ["a", 1, None]}, {"const": {"a": [1]}}, {"type": "string", "pattern": "^[a-c]{2,4}$"}),
            *(
                {"type": "string", "format": "date"},
                {"type": "string", "minLength": 3, "maxLength": 2},
                True,
                False,
                {},
            ),
            *({"$ref": "#"}, {"$ref": "#/$defs/no"}, {"not": {}}, {"type": ["string", "null"]}, {"pattern": "(a+)+$"}),
        ]
    ),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional={"minItems": NUMBERS})
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, max_size=3)},
            optional={"required": st.lists(NAMES, max_size=2), "additionalProperties": st.booleans()},
        )
        | st.builds(lambda each: {"anyOf": each}, st.lists(inner, min_size=1, max_size=3))
    ),
    max_leaves=6,
)

FUNCTIONS = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "description": TEXTS,
        "parameters": st.builds(
            lambda properties: {"type": "object", "properties": properties},
            st.dictionaries(NAMES, SCHEMAS, max_size=3),
        ),
        "strict": st.booleans(),
    },
)
TOOLS = st.lists(st.builds(lambda each: {"type": "function", "function": each}, FUNCTIONS), max_size=3)

PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXTS), max_size=3)
CONTENTS = TEXTS | PARTS
CALLS = st.builds(
    lambda name, text: {"id": "call00000", "type": "function", "function": {"name": name, "arguments": text}},
    NAMES,
    st.sampled_from(["{}", '{"a": 1}', "", "{", "[]", '{"a": NaN}', '{"a": "\\ud800"}']),
)


@st.composite
def messages(draw: st.DrawFn) -> list[Body]:
    """Conversations in an order that is right."""
    found: list[Body] = []
    if draw(st.booleans()):
        found.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(CONTENTS)})
    for _ in range(draw(st.integers(1, 3))):
        found.append({"role": "user", "content": draw(CONTENTS)})
        kind = draw(st.sampled_from(["none", "text", "call", "old call"]))
        if kind == "text":
            thoughts = draw(st.sampled_from([{}, {"reasoning_content": "Hm."}, {"refusal": "No."}]))
            found.append({"role": "assistant", "content": draw(CONTENTS), **thoughts})
        elif kind == "call":
            call = draw(CALLS)
            found.append({"role": "assistant", "content": None, "tool_calls": [call]})
            found.append({"role": "tool", "tool_call_id": call["id"], "content": draw(CONTENTS)})
        elif kind == "old call":
            function = draw(CALLS)["function"]
            found.append({"role": "assistant", "content": None, "function_call": function})
            found.append({"role": "function", "name": function["name"], "content": draw(TEXTS)})
    return found


FORMS = st.one_of(
    st.builds(lambda kind: {"type": kind}, st.sampled_from(["text", "json_object", "json_schema", "nothing"])),
    st.builds(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, SCHEMAS),
    st.builds(lambda schema: {"type": "json_schema", "schema": schema}, SCHEMAS),
)
GRAMMARS = st.sampled_from(
    ['root ::= "a"', "root ::= root", 'root ::= ("a" | root)*', "root ::= [^", 'x ::= "a"', "", 'root ::= "a"{1,99999}']
)
PATTERNS = st.sampled_from(["a|b", "(a+)+$", "[", "(?=a)b", "\\p{L}{3}", "a{99999}", "\\", "(?P<x>a)(?P=x)"])
TEMPLATES = st.sampled_from(
    [
        *("{{ messages }}", "{{ messages[0].content }}", "{% if", "{{ raise_exception('No.') }}", "{{ 1 / 0 }}"),
        *(
            "{% for a in range(99999) %}{{ a }}{% endfor %}",
            "{{ messages.__class__ }}",
            "{{ undefined.x }}",
            "{{ '\\0' }}",
        ),
    ]
)
SAMPLERS = st.sampled_from(["top_k,temperature", ["top_k", "min_p"], "kt", [], "", ["penalties"] * 64, "dry;xtc"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "n": st.integers(1, 3),
    "seed": NUMBERS,
    "temperature": st.sampled_from([0, 0.7, 100]),
    "stop": TEXTS | st.lists(TEXTS, max_size=3),
    "logit_bias": st.dictionaries(st.sampled_from(["0", "2", "49151", "x", "-1"]), NUMBERS, max_size=3)
    | st.just([[2, False]]),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "samplers": SAMPLERS,
    "dry_multiplier": st.just(0.8),
    "dry_sequence_breakers": st.just(["\n"]) | st.just('"\\n", ":"'),
    "mirostat": st.integers(0, 2),
    "custom_token_bans": st.just("1,2") | st.lists(st.integers(0, 9), max_size=3),
    "response_format": FORMS,
    "json_schema": SCHEMAS,
    "grammar": GRAMMARS,
    "regex": PATTERNS,
    "guided_choice": st.lists(TEXTS, max_size=3),
    "tools": TOOLS,
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]),
    "functions": st.lists(FUNCTIONS, max_size=2),
    "parallel_tool_calls": st.booleans(),
    "chat_template": TEMPLATES,
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "x", "messages"]), HOSTILE, max_size=2),
    "mode": st.sampled_from(["instruct", "chat", "chat-instruct"]),
    "character": TEXTS,
    "instruction_template": st.sampled_from(["ChatML", "Llama-v3"]) | TEXTS,
    "continue_": st.booleans(),
    "truncation": st.sampled_from(["auto", "disabled"]),
    "truncation_length": st.sampled_from([0, 1, 32, 4096]),
    "reasoning_effort": st.sampled_from(["none", "high"]),
    "reasoning_budget": st.sampled_from([-1, 0, 1]),
    "preset": TEXTS,
    "keep_alive": st.sampled_from(["5m", 300, -1, "0.5h"]),
    "strict": st.booleans(),
    "lora": st.just([{"id": 0, "scale": 0.5}]) | st.just([]),
    "model": st.sampled_from(["smollm2-135m", "starter", "fim", "nobody"]),
    "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
}


@st.composite
def good(draw: st.DrawFn) -> Body:
    """Bodies by the grammar, with a short answer."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True))
    return {"messages": draw(messages()), "max_tokens": 2} | {name: draw(FIELDS[name]) for name in names}


def places(value: Any) -> Iterator[Place]:
    """Yield all places in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def changed(draw: st.DrawFn) -> Body:
    """Good bodies with some places changed."""
    body = copy.deepcopy(draw(good()))
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(body))
        if not found:
            break
        where, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["other value", "another's value", "gone", "twice", "deep", "other name"])):
            case "other value":
                where[key] = copy.deepcopy(draw(HOSTILE))  # which the next change would change for all
            case "another's value":
                there, other = draw(st.sampled_from(found))
                where[key] = copy.deepcopy(there[other])
            case "gone":
                del where[key]
            case "twice" if isinstance(where, list):
                where.insert(key, copy.deepcopy(where[key]))
            case "deep":
                where[key] = _nested(where[key], draw(st.sampled_from([1, 60, 150])))
            case _ if isinstance(where, dict):
                where[draw(TEXTS) if draw(st.booleans()) else key.upper()] = where.pop(key)
    return body


Writing = Callable[[str], bytes]

WRITINGS: dict[str, Writing] = {
    "BOM": lambda text: b"\xef\xbb\xbf" + text.encode(errors="surrogatepass"),
    "UTF-16": lambda text: text.encode("utf-16", errors="surrogatepass"),
    "UTF-32": lambda text: text.encode("utf-32", errors="surrogatepass"),
    "Latin-1": lambda text: text.encode("latin-1", errors="replace"),
    "raw surrogates": lambda text: text.encode(errors="surrogatepass"),
    "names twice": lambda text: text.replace(
        "{", '{"role": 1, "messages": [], "max_tokens": "x", "type": [],', 1
    ).encode(errors="surrogatepass"),
    "more behind": lambda text: text.encode(errors="surrogatepass") + b" {}",
    "NULs": lambda text: text.replace(" ", "\0").encode(errors="surrogatepass"),
    "comments": lambda text: text.replace(",", ", // no\n", 1).encode(errors="surrogatepass"),
    "single quotes": lambda text: text.replace('"', "'").encode(errors="surrogatepass"),
    "long digits": lambda text: text.replace("2", "2" * 5000, 1).encode(errors="surrogatepass"),
    "deep": lambda text: b'{"a":' * 5000 + text.encode(errors="surrogatepass") + b"}" * 5000,
}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Bodies as they are sent."""
    text = json.dumps(draw(changed()), ensure_ascii=draw(st.booleans()))
    how = draw(st.sampled_from(["plain"] * 12 + ["cut", *WRITINGS]))
    if how in WRITINGS:
        return WRITINGS[how](text)
    data = text.encode(errors="surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if how == "cut" else data
