"""Hermes and Qwen: JSON in ``<tool_call>`` tags. Also what models are told of which the template knows no tools.

Sources: the chat templates of NousResearch/Hermes-3-Llama-3.1-8B and Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import JsonCalls

HERMES = JsonCalls(
    name="hermes",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n",
)
