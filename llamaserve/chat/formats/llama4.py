"""Llama 4, and others that are told to answer with a list of calls in Python: the whole answer is that list.

Sources: the prompt format of Llama 4 at llama.com, and examples/tool_chat_template_llama4_pythonic.jinja of
vllm-project/vllm.
"""

from __future__ import annotations

from llamaserve.chat.formats.python_calls import PythonCalls

LLAMA4 = PythonCalls("llama4", begin="<|python_start|>", end="<|python_end|>", optional=True)
