"""Families that write a list of JSON objects after a token: they differ in the token.

Sources: the chat templates of ibm-granite/granite-3.3-8b-instruct, microsoft/Phi-4-mini-instruct,
CohereForAI/c4ai-command-r7b-12-2024, nvidia/NVIDIA-Nemotron-Nano-9B-v2, tencent/Hunyuan-A13B-Instruct and
ServiceNow-AI/Apriel-1.5-15b-Thinker.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import ID, JsonCalls


def _list(name: str, begin: str, end: str) -> JsonCalls:
    return JsonCalls(
        name,
        begin=f"{begin}[",
        before='{"name": "',
        between='", "arguments": ',
        after="}",
        separator=", ",
        end=f"]{end}",
    )


GRANITE = _list("granite", "<|tool_call|>", "")
PHI4_MINI = _list("phi-4-mini", "<|tool_call|>", "<|/tool_call|>")
NEMOTRON = _list("nemotron", "<TOOLCALL>", "</TOOLCALL>")
HUNYUAN = _list("hunyuan", "<tool_calls>", "</tool_calls>")  # and Apriel's
COMMAND = JsonCalls(
    name="command",
    begin="<|START_ACTION|>[\n    ",
    before=f'{{"tool_call_id": "{ID}", "tool_name": "',
    between='", "parameters": ',
    after="}",
    separator=",\n    ",
    end="\n]<|END_ACTION|>",
    id="[0-9]{1,4}",
)
