"""From what an answer must be to llguidance's grammar for it, and how much that may take to compile.

Knows nothing of vocabularies, and needs no llama.cpp: the check of a request runs it in a process without a model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llamaserve.engine import lark
from llamaserve.engine.params import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between JSON's tokens a space, or a line break and an indentation: enough for every style, and no small model can get
# lost in it. Nothing in a schema changes what an answer that does not fit it would be.
_WHITESPACE = r" |\n[ \t]{0,32}"
_SHOWN = 200  # characters at the beginning and at the end of llguidance's words, which say what is wrong last
_MARK = "<non-verbose/>"  # what llguidance says instead of showing the whole grammar
# The lines of a message that show the place of an error: the grammar's own, and the carets under them.
_EXCERPT = re.compile(r"^ *(\d+ \|.*|\^+) *$", re.MULTILINE)
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}


def compiled(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    """Return what keeps answers to a constraint, with its first mask computed: much of the work is put off until then.
    Raises ``ValueError`` in llguidance's words for one that is wrong or that no answer could meet.
    """
    matcher = LLMatcher(tokenizer, grammar_text(constraint), log_level=0, limits=limits())
    possible = not matcher.is_error() and any(matcher.compute_bitmask())
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    if not possible:
        raise ValueError("no answer could meet it")
    return matcher


def grammar_text(constraint: Constraint) -> str:
    """Return llguidance's form of a constraint. Raises ``ValueError`` where it can't be read; what it means is only
    checked when it is compiled.
    """
    match constraint.kind:
        case "json_schema":
            return _schema(constraint.text)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            return LLMatcher.grammar_from_lark(lark.from_choices(msgspec.json.decode(constraint.text, type=list[str])))
        case "grammar":
            return LLMatcher.grammar_from_lark(lark.from_gbnf(constraint.text))


def _schema(text: str) -> str:
    """Return the grammar of a schema; true allows any JSON, and false none."""
    if text == "false":
        raise ValueError("no answer could meet it: it is false")
    return LLMatcher.grammar_from_json_schema("{}" if text == "true" else text, overrides=_JSON_OPTIONS)


def limits() -> LLParserLimits:
    """Return what compiling and each token may take at most: objects may have some 1,500 optional properties, which
    take a quarter of a second to compile. What is over a step's limits is an error.
    """
    return LLParserLimits(
        max_items_in_row=20_000,
        step_max_items=50_000,
        step_lexer_fuel=50_000,
        max_grammar_size=15_000,
        verbose_errors=False,
    )


def words(message: str) -> str:
    """Put llguidance's words on one line that is not too long. A panic's are for its authors."""
    if message.startswith("panic: "):
        return "it is too complex"
    if message.startswith("NoExtension"):
        return "no answer could meet it"
    line = " ".join(_EXCERPT.sub("", message.replace(_MARK, "")).split())
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]} … {line[-_SHOWN:]}"
