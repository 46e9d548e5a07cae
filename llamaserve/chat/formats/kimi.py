"""Kimi K2: JSON after an id that has the tool's name in it, and a number.

Source: the chat template and docs/tool_call_guidance.md of moonshotai/Kimi-K2-Instruct.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import ID, JsonCalls

KIMI_K2 = JsonCalls(
    name="kimi-k2",
    begin="<|tool_calls_section_begin|>",
    before="<|tool_call_begin|>functions.",
    between=f":{ID}<|tool_call_argument_begin|>",
    after="<|tool_call_end|>",
    end="<|tool_calls_section_end|>",
    id="[0-9]{1,4}",
)
