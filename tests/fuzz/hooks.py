"""What Schemathesis is told of this API: how to keep its requests small, and what no schema can say of them.

It loads this module itself (SCHEMATHESIS_HOOKS), in a process of its own.
"""

from __future__ import annotations

import base64
import io
import re
import wave
import zlib
from typing import Any

import requests
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis import Case, GenerationMode, HookContext, Response
from schemathesis.core.failures import AcceptedNegativeData, Failure, ServerError
from schemathesis.openapi.checks import RejectedPositiveData

STARTER = "smollm2-135m"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# The most of what takes time; a number that is no good is left as it is.
MOST = {"max_tokens": 2, "max_completion_tokens": 2, "n_predict": 2, "n": 2, "steps": 1, "batch_count": 1}
MOST |= {"batch_size": 1, "max_length": 2}
SIZE = r"auto|\d{2,4}[x*]\d{2,4}"

# Good by the schema, and refused all the same, for what a schema can't say. Matched is the message.
REFUSED = re.compile(
    "|".join(
        (
            # Names of what is not on this machine. (That of a model gets 404, which is fine by itself.)
            r"there is no (LoRA adapter|preset|character|instruction template|download) ['\"]",
            r"the model has no adapter|is no language that Whisper knows|is no model of models\.yaml and no hf:",
            # What a model is for, how many tokens it knows, and how many it takes
            r"this request needs a model|knows English only|the model's vectors have",
            r"the scheduler \w+ (is not for|needs)",
            r"token id -?\d+ is not between|the prompt is empty; the model needs|the prompt has (at least )?\d+ tokens",
            # Ids that are written with a point, which JSON schemas take for integers
            r"^input(\[\d+\])+: must be a (token id|string or a list of token ids)",
            r"^prompt: must be a string, a list of strings, a list of token ids",
            # `strict` refuses what would have no effect, which hangs on the other fields.
            r"^strict: .* would have no effect",
            # Fields that don't go together
            r"can't be combined|can't both be true|; give one$|needs logprobs to be true|dynatemp_low is over",
            r"prompts with n=\d+ are over the limit|pictures are wanted|the last picture's seed|in all at most$",
            r"is the old name of|is another name of|the request offers no|is not among the (tools|functions)",
            r"scales: there are|is there twice|has the (name|id) .* already|stream goes with|only be cut at their end",
            r"parallel_tool_calls can't be true|is for texts, and input",
            # The order of messages, and the JSON in them
            r"^messages\[\d+\]\.(tool_call_id|name|function_call)|arguments (is no JSON|holds|has|must)",
            r"^only a last message of the assistant's can be continued",
            # Texts in languages of their own: Jinja, GBNF, regular expressions, JSON schemas; and characters
            r"the turn must have <\|user\|>|the (chat|instruction) template|template: ",
            r"replaces a part of a template in five keys, which",
            r"^(grammar|grammar_string|guided_grammar|regex|guided_regex|structured_outputs|response_format): ",
            r"^(json_schema|guided_json|guided_choice|tools\[\d+\]|functions\[\d+\])[\w.]*: ",
            r"^dry_sequence_breakers: (must be a list of strings, or the inside|a breaker must have)",
            r"^chat_template_kwargs|must not contain (the character|characters)|is half of a surrogate pair",
            # What must come next has a character that the model has no token for.
            r"^the answer can't be kept to its form: .* forced bytes: got",
            # Paths that end with a line break, and bodies over the limit, which is a small one here
            r"^the path ends with a line break|^the request body is larger than",
            # Durations of more than thirty years, and texts that are too long together
            r"should be seconds or a text such as|characters together",
            # Files that are none
            r"the file is (empty|text|no|a)|the audio |the picture ",
            # What is not deleted, and settings of models
            r"lies outside the models folder|^(args|settings)[.:]",
            # An update of what is being fetched without
            r"is being fetched as models\.lock says",
            # Periods, and what usage is grouped by
            r"should be a date|is no moment|the period ends|is none of day",
        )
    )
)
# Texts and numbers that stand for true, false or a number, as they do in forms, are taken in JSON as well. The schemas
# don't say so, since programs that are made from them would have unions in place of every number.
MEANT = re.compile(r"\s*(|true|false|t|f|yes|no|y|n|on|off|[-+]?\d+(\.\d*)?(e[-+]?\d+)?)\s*", re.IGNORECASE)


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """Have requests take little time; and more of those that are good get through, with models and files there are."""
    body = case.body
    if not isinstance(body, dict):
        return
    for name, most in MOST.items():
        value = body.get(name)
        if type(value) in (int, float) and (most < value < 2**31 or (value == -1 and "max" in name)):
            body[name] = most
    if "completions" in case.path or case.path == "/infill":
        body.setdefault("max_tokens", 2)
    if "images" in case.path:
        body.setdefault("steps", 1)
        if re.fullmatch(SIZE, str(body.get("size", "auto"))):
            body["size"] = "64x64"
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE:
        _have_it_get_through(case.path, body)


def _have_it_get_through(path: str, body: dict[str, Any]) -> None:
    chance = zlib.crc32(repr(sorted(map(str, body))).encode()) % 8
    if chance and isinstance(body.get("model"), str) and "/internal/model" not in path:
        del body["model"]
    if "fim" in path or path == "/infill":
        body.setdefault("model", "fim")
    if chance % 2 and isinstance(body.get("file"), bytes | str):
        body["file"] = _silence()
    for name in ("image", "mask"):
        if chance % 2 and isinstance(body.get(name), list):
            body[name] = [PIXEL for _ in body[name]]


def _silence() -> bytes:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(8_000))
    return data.getvalue()


@schemathesis.hook
def after_call(context: HookContext, case: Case, response: Response) -> None:
    """Have a current model again, as other requests need one."""
    if re.search("/internal/model/(un)?load|/delete", case.path) and response.status_code == 200:
        url = response.request.url.partition(case.formatted_path)[0]
        requests.post(f"{url}/v1/internal/model/load", json={"model_name": STARTER}, timeout=60)


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """Drop what is no failure of this API."""
    error = _error(response)
    if isinstance(failure, ServerError):  # status and code are documented, which other checks look at; but no bug is
        hung = error.get("code") == "time_limit_exceeded" and not _limits_itself(case)
        return hung or error.get("code") in (
            None,
            "internal_error",
            "engine_crashed",
            "engine_error",
            "model_quarantined",
        )
    if isinstance(failure, RejectedPositiveData):
        return REFUSED.search(error.get("message", "")) is None
    if isinstance(failure, AcceptedNegativeData):
        # A form has nothing but texts and files: once it is sent, most of what is wrong looks like what is right.
        return case.media_type != "multipart/form-data" and not _is_meant(case)
    return True


def _limits_itself(case: Case) -> bool:
    return isinstance(case.body, dict) and "time_limit" in case.body


def _error(response: Response) -> dict[str, Any]:
    try:
        return dict(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return {}


def _is_meant(case: Case) -> bool:
    """Whether all that is wrong with a body are values that stand for others, or that are not looked at."""
    definition = case.operation.definition.raw.get("requestBody", {}).get("content", {}).get(case.media_type)
    if definition is None or not isinstance(case.body, dict):
        return False
    document = case.operation.schema.raw_schema
    validator = Draft202012Validator({"components": document["components"], **definition["schema"]})
    errors = [leaf for error in validator.iter_errors(case.body) for leaf in _leaves(error)]
    names = _other_names(definition["schema"], document)
    return bool(errors) and all(_stands_for_another(error) or _is_ignored(error, case.body, names) for error in errors)


def _stands_for_another(error: Any) -> bool:
    value = error.instance
    if error.validator in ("enum", "const") and isinstance(value, str):  # names are taken in any spelling
        return True
    return not isinstance(value, dict | list) and MEANT.fullmatch(str(value)) is not None


def _is_ignored(error: Any, body: dict[str, Any], names: dict[str, str]) -> bool:
    """Whether it is about another name of a field that is given by its own, which is named as ignored."""
    return bool(error.absolute_path) and body.get(names.get(str(error.absolute_path[0]), "")) is not None


def _other_names(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, str]:
    """Return the fields' other names, and which is theirs."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    found = {
        name: re.fullmatch(r"Another name of (\w+)\.", field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    }
    return {name: match[1] for name, match in found.items() if match}


def _leaves(error: Any) -> list[Any]:
    return [leaf for each in error.context for leaf in _leaves(each)] if error.context else [error]
