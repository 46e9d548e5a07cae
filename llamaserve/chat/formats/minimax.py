"""MiniMax M2: parameters in tags with attributes.

Source: the chat template of MiniMaxAI/MiniMax-M2.
"""

from __future__ import annotations

from llamaserve.chat.formats.tagged import TaggedCalls

MINIMAX_M2 = TaggedCalls(
    name="minimax-m2",
    begin="<minimax:tool_call>\n",
    before='<invoke name="',
    between='">\n',
    key='<parameter name="',
    value='">',
    closing="</parameter>\n",
    after="</invoke>\n",
    end="</minimax:tool_call>",
)
