"""Llama 3.1 to 3.3: the whole answer is one call, in JSON.

Source: the chat template of meta-llama/Llama-3.1-8B-Instruct.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import JsonCalls

LLAMA3 = JsonCalls(
    name="llama3", before='{"name": "', between='", "parameters": ', after="}", lone=True, prefix="<|python_tag|>"
)
