"""Functionary 3.1: JSON in ``<function=…>`` tags.

Source: the chat template of meetkai/functionary-medium-v3.1.
"""

from __future__ import annotations

from llamaserve.chat.formats.json_calls import JsonCalls

FUNCTIONARY_31 = JsonCalls(name="functionary-v3.1", before="<function=", between=">", after="</function>")
