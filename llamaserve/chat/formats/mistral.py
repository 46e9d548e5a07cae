"""Mistral: a list of JSON objects after ``[TOOL_CALLS]``; since 2025 names before their arguments.

Sources: the chat templates of mistralai/Mistral-7B-Instruct-v0.3 and mistralai/Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import ID, JsonCalls

MISTRAL_LIST = JsonCalls(
    name="mistral",
    begin="[TOOL_CALLS] [",
    before='{"name": "',
    between='", "arguments": ',
    after=f', "id": "{ID}"}}',
    separator=", ",
    end="]",
)
MISTRAL = JsonCalls(name="mistral-v11", before="[TOOL_CALLS]", between="[ARGS]", after="")
