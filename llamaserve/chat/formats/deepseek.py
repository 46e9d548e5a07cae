"""DeepSeek V3 and R1, which write arguments in a fence, and V3.1, which does not.

Sources: the chat templates of deepseek-ai/DeepSeek-V3-0324 and deepseek-ai/DeepSeek-V3.1.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import JsonCalls

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001

DEEPSEEK = JsonCalls(
    name="deepseek",
    begin=_BEGIN,
    before=f"{_CALL}function{_SEPARATOR}",
    between="\n```json\n",
    after=f"\n```{_CALL_END}",
    separator="\n",
    end=_END,
)
DEEPSEEK_31 = JsonCalls(name="deepseek-v3.1", begin=_BEGIN, before=_CALL, between=_SEPARATOR, after=_CALL_END, end=_END)
