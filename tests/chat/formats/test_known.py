# ruff: noqa: RUF001
"""Formats that are recognised by their names and by what is in a chat template."""

from __future__ import annotations

import pytest

from llamaserve.chat.formats import functionary_v3_2
from llamaserve.chat.formats.known import by_name, by_template, names

# What makes a family's template this family's, as the templates have it.
TEMPLATES = {
    "hermes": '\'\\n<tool_call>\\n{"name": "\' + tool_call.name + \'", "arguments": \'',
    "qwen3-coder": "'<tool_call>\\n<function=' + tool_call.name + '>\\n' }} '<parameter=' + args_name",
    "glm-4.5": "<tool_call>{{ tc.name }}\n<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n</tool_call>",
    "glm-4.7": "<tool_call>{{ tc.name }}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value></tool_call>",
    "minimax-m2": "toolcall_begin_token = '<minimax:tool_call>' '<invoke name=\"' + tool_call.name + '\">'",
    "seed-oss": 'toolcall_begin_token = \'<seed:tool_call>\' "\\n<function=" "<parameter="',
    "llama3": "'{\"name\": function name, \"parameters\": dictionary}' '<|python_tag|>'",
    "llama4": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
    "lfm2": '"<|tool_call_start|>[" + calls + "]<|tool_call_end|>"',
    "gemma4": "'<|tool_call>call:' '<|\"|>'",
    "functiongemma": "'<start_function_call>call:' '<escape>'",
    "functionary-v3.1": "'<function=' + tool_call['function']['name'] + '>' '</function>' '<|python_tag|>'",
    "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "deepseek": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '\\n```json\\n'",
    "deepseek-v3.1": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'",
    "command": "<|START_ACTION|>[ <|START_THINKING|>",
    "nemotron": "'<TOOLCALL>['",
    "hunyuan": "'<tool_calls>['",
    "mistral": "'[TOOL_CALLS] ['",
    "mistral-v11": "'[TOOL_CALLS]' + name + '[ARGS]'",
    "phi-4-mini": "'<|tool_call|>' '<|/tool_call|>'",
    "granite": "'<|tool_call|>' '<|tool|>'",
}


def test_every_format_has_a_template() -> None:
    assert set(TEMPLATES) == set(names())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_format_is_known_by_its_template_and_by_name(name: str) -> None:
    found = by_template(f"{{%- for message in messages %}}{TEMPLATES[name]}{{% endfor %}}")
    assert found is not None
    assert found.name == name
    assert by_name(name) is found
    assert found.marker is None or found.shown[0] == found.marker


def test_other_templates_are_of_no_known_family() -> None:
    assert by_template("{% for message in messages %}{{ message.content }}{% endfor %}") is None
    assert by_name("nobody") is None


def test_functionary_names_who_a_message_is_to() -> None:
    assert functionary_v3_2.matches("{{ '>>>all\\n' + message['content'] }}")
    assert not functionary_v3_2.matches(TEMPLATES["functionary-v3.1"])
    assert functionary_v3_2.begun("<|end_header_id|>\n\n>>>") == ">>>"
    assert functionary_v3_2.begun("<|end_header_id|>\n\n") == ""
