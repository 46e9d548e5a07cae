"""From what an answer must be to llguidance's grammar for it, and how much that may take to compile.

A constraint with parts becomes several grammars, the first of which refers to the others by their names. Knows nothing
of vocabularies, and needs no llama.cpp: the check of a request runs it in a process without a model, where every marker
is a text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llamaserve.engine import lark
from llamaserve.engine.markers import Controls, no_controls, prelude
from llamaserve.engine.params import Constraint, ConstraintKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between JSON's tokens a space, or a line break and an indentation: enough for every style, and no small model can get
# lost in it. Nothing in a schema changes what an answer that does not fit it would be.
_WHITESPACE = r" |\n[ \t]{0,32}"
_SHOWN = 200  # characters at the beginning and at the end of llguidance's words, which say what is wrong last
_MARK = "<non-verbose/>"  # what llguidance says instead of showing the whole grammar
# The lines of a message that show the place of an error: the grammar's own, and the carets under them.
_EXCERPT = re.compile(r"^ *(\d+ \|.*|\^+) *$", re.MULTILINE)
_NULL = msgspec.Raw(b"null")
_MAX_PARTS = 512  # some 200 tools, with 3 kB of schema each, take a sixth of a second

# Symbols of a grammar at most. Objects may have some 1,500 optional properties, which take a quarter of a second to
# compile; all parts together may be as large as some of those.
_MAX_SIZE = {"lark": 40_000}
_MAX_SIZE_OF_ONE = 15_000


class _Named(msgspec.Struct):
    """One of the grammars that a constraint becomes."""

    name: str = "main"
    json_schema: msgspec.Raw = _NULL
    lark_grammar: str | None = None


class _Grammars(msgspec.Struct):
    grammars: list[_Named]


def compiled(constraint: Constraint, tokenizer: LLTokenizer, controls: Controls = no_controls) -> LLMatcher:
    """Return what keeps answers to a constraint, with its first mask computed: much of the work is put off until then.
    ``controls`` tells the vocabulary's control tokens. Raises ``ValueError`` in llguidance's words for one that is
    wrong or that no answer could meet.
    """
    text = grammar_text(constraint, controls)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits(constraint.kind))
    possible = not matcher.is_error() and any(matcher.compute_bitmask())
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    if not possible:
        raise ValueError("no answer could meet it")
    return matcher


def grammar_text(constraint: Constraint, controls: Controls = no_controls) -> str:
    """Return llguidance's form of a constraint. Raises ``ValueError`` where it can't be read; what it means is only
    checked when it is compiled.
    """
    match constraint.kind:
        case "json_schema":
            return _schema(constraint.text, lenient=constraint.lenient)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            return LLMatcher.grammar_from_lark(lark.from_choices(msgspec.json.decode(constraint.text, type=list[str])))
        case "grammar":
            return LLMatcher.grammar_from_lark(lark.from_gbnf(constraint.text))
        case "lark":
            return _with_parts(constraint, controls)


def _with_parts(constraint: Constraint, controls: Controls) -> str:
    """Return the grammars of a constraint with parts, the whole one first."""
    parts = constraint.parts
    if len(parts) > _MAX_PARTS:
        raise ValueError(f"it has {len(parts)} parts; at most {_MAX_PARTS} are taken")
    if any(part.kind == "lark" for part in parts):
        raise ValueError("a part can't have parts")
    rules = [prelude(constraint.markers, constraint.text, controls)]
    rules += [f"part{number}: @part{number}" for number in range(len(parts))]
    grammars = [_Named(lark_grammar="\n".join([*rules, constraint.text]))]
    grammars += [_named(f"part{number}", grammar_text(part)) for number, part in enumerate(parts)]
    return msgspec.json.encode(_Grammars(grammars)).decode()


def _named(name: str, text: str) -> _Named:
    """Give a grammar, which is Lark's text or a list of one, a name."""
    if not text.startswith("{"):
        return _Named(name, lark_grammar=text)
    (grammar,) = msgspec.json.decode(text, type=_Grammars).grammars
    return _Named(name, grammar.json_schema, grammar.lark_grammar)


def _schema(text: str, *, lenient: bool) -> str:
    """Return the grammar of a schema; true allows any JSON, and false none."""
    if text == "false":
        raise ValueError("no answer could meet it: it is false")
    # what a schema says of these itself does not count
    options: JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": lenient, "coerce_one_of": False}
    return LLMatcher.grammar_from_json_schema("{}" if text == "true" else text, overrides=options)


def left_out(matcher: LLMatcher) -> str:
    """Return what a lenient constraint does not enforce, in llguidance's words; nothing if that is empty."""
    return words("; ".join(matcher.get_grammar_warnings()))


def limits(kind: ConstraintKind) -> LLParserLimits:
    """Return what compiling a constraint and each token may take at most. What is over a step's limits is an error."""
    return LLParserLimits(
        max_items_in_row=20_000,
        step_max_items=50_000,
        step_lexer_fuel=50_000,
        max_grammar_size=_MAX_SIZE.get(kind, _MAX_SIZE_OF_ONE),
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
