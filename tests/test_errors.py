"""The error tree: every class is drawn at the top of its module, and survives the way between processes."""

from __future__ import annotations

import re

import pytest

from llamaserve import errors
from llamaserve.errors import LlamaserveError, from_value, to_value

ALL = sorted(errors._tree(LlamaserveError).values(), key=lambda cls: cls.__name__)
DRAWN = [cls for cls in ALL if cls.__module__ == "llamaserve.errors"]


@pytest.mark.parametrize("cls", DRAWN)
def test_every_error_is_drawn_with_its_status_type_and_code(cls: type[LlamaserveError]) -> None:
    assert errors.__doc__ is not None
    (line,) = re.findall(rf"^.*\b{cls.__name__} .*$", errors.__doc__, re.MULTILINE)
    assert line.split(cls.__name__)[1].split()[:3] == [str(cls.status), cls.type, cls.code or "(none)"]


@pytest.mark.parametrize("cls", DRAWN)
def test_an_error_crosses_a_process_boundary(cls: type[LlamaserveError]) -> None:
    error = from_value(to_value(cls("why", param="n", hint="do this", retry_after=2.5)))
    assert type(error) is cls
    assert (error.message, error.param, error.hint, error.retry_after) == ("why", "n", "do this", 2.5)
    assert error.body() == {"error": {"message": "why", "type": cls.type, "param": "n", "code": cls.code}}


def test_an_unknown_error_is_still_an_error() -> None:
    assert type(from_value(errors.ErrorValue("FromTheFuture", "why"))) is LlamaserveError
