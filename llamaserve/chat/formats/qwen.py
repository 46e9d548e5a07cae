"""Qwen3-Coder, and Qwen3.5 after it: parameters in tags. Seed-OSS writes nearly the same.

Sources: the chat templates of Qwen/Qwen3-Coder-30B-A3B-Instruct and ByteDance-Seed/Seed-OSS-36B-Instruct.
"""

from __future__ import annotations

from llamaserve.chat.formats.tagged import TaggedCalls

QWEN3_CODER = TaggedCalls(
    name="qwen3-coder",
    before="<tool_call>\n<function=",
    between=">\n",
    key="<parameter=",
    value=">\n",
    closing="\n</parameter>\n",
    after="</function>\n</tool_call>",
    separator="\n",
)
SEED_OSS = TaggedCalls(
    name="seed-oss",
    before="<seed:tool_call>\n<function=",
    between=">\n",
    key="<parameter=",
    value=">",
    closing="</parameter>\n",
    after="</function>\n</seed:tool_call>",
    separator="\n",
)
