"""Liquid's LFM2: a list of calls in Python, between tokens.

Source: the chat template of LiquidAI/LFM2.5-8B-A1B.
"""

from __future__ import annotations

from llamaserve.chat.formats.python_calls import PythonCalls

LFM2 = PythonCalls("lfm2", begin="<|tool_call_start|>", end="<|tool_call_end|>")
