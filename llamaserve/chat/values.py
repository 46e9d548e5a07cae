"""What the messages and the tools of a request are made of, checked: texts, JSON values and names of functions.

Every refusal is an ``InvalidRequest`` that names the place in the request. This module knows nothing of messages,
tools, HTTP or templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from llamaserve.errors import InvalidRequest

MAX_NAME = 256  # characters of a function's name; OpenAI takes 64, gateways put the name of a server before it
MAX_DEPTH = 64  # objects and lists inside each other, in arguments and schemas

# Forms of calls are made of these, so a name with one of them could not be told from what stands around it.
_NOT_IN_NAMES = frozenset("\"'`\\<>{}[]()|=,;")

_NESTING = (dict, list)
_LONG_INTEGER = "an integer of more than 64 bits"  # which msgpack, on the way to a chat template, can't carry


def text(value: object, place: str, *, expected: str = "a string") -> str:
    """Return the value, which must be a text that can be encoded."""
    if value is None:
        raise InvalidRequest(f"{place} is missing", param=place)
    if not isinstance(value, str):
        raise InvalidRequest(f"{place} must be {expected}", param=place)
    _check_text(value, place)
    return value


def mapping(value: object, place: str) -> Mapping[str, Any]:
    """Return the value, which must be a JSON object. What is in it is not looked at."""
    if value is None:
        raise InvalidRequest(f"{place} is missing", param=place)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{place} must be an object", param=place)
    return value


def function_name(value: object, place: str) -> str:
    """Return the name of a function: 1 to 256 printable characters, without those of which the forms of calls are made.

    So there are no spaces, quotes or brackets in it. Dots, slashes, colons and letters of any language may be.
    """
    name = text(value, place)
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidRequest(f"{place} has {len(name)} characters, but must have 1 to {MAX_NAME}", param=place)
    if wrong := next((each for each in name if each == " " or not each.isprintable() or each in _NOT_IN_NAMES), None):
        raise InvalidRequest(f"{place} is {shown(name)}, but {shown(wrong)} can't be in a name", param=place)
    return name


def object_of(value: object, place: str) -> dict[str, Any]:
    """Return a JSON object that is given as such or as its text. An empty text, or only white space, is ``{}``."""
    if value is None:
        raise InvalidRequest(f"{place} is missing", param=place)
    found = _parsed(value, place) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise InvalidRequest(f"{place} must be a JSON object, or a string that holds one", param=place)
    written(found, place)
    return found


def written(value: object, place: str) -> str:
    """Return a value as JSON.

    Refused is what other readers of it could not take: NaN, infinity, long integers, half surrogate pairs, and objects
    and lists more than 64 deep.
    """
    _check_nesting(value, place)
    try:
        msgspec.msgpack.encode(value)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except OverflowError:
        raise InvalidRequest(f"{place} holds {_LONG_INTEGER}", param=place) from None
    except UnicodeEncodeError:
        raise InvalidRequest(f"{place} holds half a surrogate pair", param=place) from None
    except ValueError:
        raise InvalidRequest(
            f"{place} holds a number that is not finite, which JSON does not have", param=place
        ) from None


def shown(value: object) -> str:
    """Return a value from the request as it may stand in a message: short and in ASCII."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text_of = ascii(value[:40] if isinstance(value, str) else value)
    cut = len(text_of) > 40 or (isinstance(value, str) and len(value) > 40)
    return f"{text_of[:36]} ..." if cut else text_of


def _parsed(value: str, place: str) -> object:
    _check_text(value, place)
    try:
        return json.loads(value) if value.strip() else {}
    except RecursionError:
        raise InvalidRequest(f"{place} nests more than {MAX_DEPTH} deep", param=place) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{place} is no JSON: {error}", param=place) from None
    except ValueError:  # thousands of digits
        raise InvalidRequest(f"{place} holds {_LONG_INTEGER}", param=place) from None


def _check_nesting(value: object, place: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, _NESTING)]
        if not level:
            return
    raise InvalidRequest(f"{place} nests more than {MAX_DEPTH} deep", param=place)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_text(value: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's "\ud800" alone
        raise InvalidRequest(f"{place} holds half a surrogate pair at position {error.start}", param=place) from None
