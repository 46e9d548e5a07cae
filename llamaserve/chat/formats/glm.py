"""GLM 4.5 and 4.6, and GLM 4.7 and 5, which write the same without line breaks: names and values in tags.

Sources: the chat templates of zai-org/GLM-4.6 and zai-org/GLM-4.7.
"""

from __future__ import annotations

from llamaserve.chat.formats.tagged import TaggedCalls

GLM45 = TaggedCalls(
    name="glm-4.5",
    before="<tool_call>",
    between="\n",
    key="<arg_key>",
    value="</arg_key>\n<arg_value>",
    closing="</arg_value>\n",
    after="</tool_call>",
    separator="\n",
)
GLM47 = TaggedCalls(
    name="glm-4.7",
    before="<tool_call>",
    between="",
    key="<arg_key>",
    value="</arg_key><arg_value>",
    closing="</arg_value>",
    after="</tool_call>",
)
