"""Output that must have a form, against free text of the same server: what looking at every token's form costs.

Both sides are asked for as many tokens of the same prompts, so that nothing but the form differs: no answer of that
length can finish the form, and free answers may not end either. It is measured with drafts and without, since a form
makes an answer easier to guess.
"""

from __future__ import annotations

from typing import Any

from benchmark import texts
from benchmark.answers import Request, decode_rate
from benchmark.lab import OURS, PLAIN, Lab, NotPossible
from benchmark.results import Results, Row, at_least

STREAMS = 4
_BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 60},
        "year": {"type": "integer", "minimum": 1800, "maximum": 2030},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 4},
        "rating": {"enum": ["poor", "fair", "good", "excellent"]},
        "price": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["title", "year", "tags", "rating", "price"],
    "additionalProperties": False,
}
_BOOKS = {"type": "array", "items": _BOOK, "minItems": 200}
_GRAMMAR = """
root   ::= "[" book ("," space book){200,} "]"
book   ::= "{" space "\\"title\\": " string "," space "\\"year\\": " [0-9]{4} "," space "\\"more\\": " value space "}"
value  ::= string | [0-9]+ | "[" (value ("," space value)*)? "]"
string ::= "\\"" [^"\\\\\\n]{1,60} "\\""
space  ::= " " | "\\n" [ ]{0,4}
"""
FORMS: dict[str, dict[str, Any]] = {
    "JSON schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "books", "schema": _BOOKS}}},
    "GBNF grammar": {"grammar": _GRAMMAR},
}
_FREE = "free text"
_AT_RANDOM = {"temperature": 0.8, "top_p": 0.95, "seed": 1}


def run(lab: Lab) -> None:
    """Four streams with a form, and without."""
    servers = lab.present(lab.ours, lab.plain)
    ends = lab.ends()
    for number, order in lab.rounds(servers):
        prompts = [
            f"Books as a JSON list. They are about this: {story}\n\n"
            for story in texts.stories(f"constrained/{number}", STREAMS)
        ]
        for server in order:
            for drawn, sampling in (("", {}), (", at random", _AT_RANDOM)):
                for form, extra in {**FORMS, _FREE: {}}.items():
                    banned = () if extra else ends
                    requests = [
                        Request(lab.plan.tokens, prompt, banned=banned, extra=extra | sampling) for prompt in prompts
                    ]
                    try:
                        answers = lab.ask("json", server, requests)
                    except NotPossible:
                        continue
                    lab.results.add("json", server.name, f"{form}{drawn}", decode_rate(answers))


def rows(results: Results) -> list[Row]:
    """Each form's rate over that of free text."""
    found = []
    for name in (PLAIN, OURS):
        for drawn in ("", ", at random"):
            for form in FORMS:
                what = f"{STREAMS} streams, {form}{drawn}: rate / that of free text, {name}"
                pair = ("json", name, f"{form}{drawn}"), ("json", name, f"{_FREE}{drawn}")
                found.append(results.ratio(*pair, what, target=at_least(0.9)))
    return found
