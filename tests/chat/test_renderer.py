"""Chat templates: how each style renders, and how strangers' templates are kept from doing harm."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from llamaserve import sandbox
from llamaserve.chat import renderer, template
from llamaserve.chat.renderer import answer, render
from llamaserve.chat.template import RenderAnswer, RenderJob, TemplateRenderer
from llamaserve.errors import ChatTemplateError, InvalidRequest, Unavailable
from llamaserve.frames import FrameSocket

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear: ' + strftime_now('%Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {{- head + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

QWEN3 = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = messages|length - loop.index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and message.reasoning_content is defined and loop.index0 > ns.last %}
        {%- set content = '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{- content + '<|im_end|>\\n' }}{%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

TYPED = """{% for message in messages %}{{ message.role }}:
{%- for part in message.content %}{% if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}
{{ eos_token }}
{%- endfor %}{% if add_generation_prompt %} assistant:{% endif %}"""

TYPED_AFTER_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message must be first') }}{% endif %}"
    "{% for message in messages %}[{{ message.content[0]['text'] | upper }}]{% endfor %}"
)
USER_ONLY = """{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% else %}
{{ raise_exception('Only the role user is supported') }}{% endif %}{% endfor %}"""
MISTRAL_1 = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
SYSTEM_FIRST = """{% for message in messages %}{% if message.role == 'system' %}{% if not loop.first %}
{{ raise_exception('System message must be at the beginning.') }}
{% else %}{{ 'S: ' + message.content + '|' }}
{%- endif %}{% else %}{{ message.role[0] + ': ' + message.content + '|' }}{% endif %}{% endfor %}"""
TURNS_ONLY = """{% for message in messages %}
{% if message.role == 'user' and loop.index0 % 2 == 0 %}{{ 'Q ' + message.content }}
{%- elif message.role == 'assistant' and loop.index0 % 2 == 1 %}{{ ' A ' + message.content + '|' }}
{%- else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"""
EMPTY_THOUGHT = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% set text = message.content.split('</think>')[-1] %}
{%- if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ text.strip() }}
{%- else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ANSWERED_ONLY = "{{ messages[0].content + messages[1].content + messages[2].content }}"

USER = [{"role": "user", "content": " Hi "}]
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [*USER, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]


def job(source: str = CHATML, messages: list[dict[str, Any]] | None = None, **variables: Any) -> RenderJob:
    messages = TALK if messages is None else messages
    return RenderJob(source, messages, "<s>", "</s>", variables=variables)


RENDERED = {
    "chatml": (
        job(messages=USER),
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
    ),
    "chatml, system": (
        job(messages=[SYSTEM, *USER]),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama 3": (
        job(LLAMA3, [SYSTEM, *USER]),
        (
            f"<s><|start_header_id|>system<|end_header_id|>\n\nYear: {time.localtime().tm_year}\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "gemma": (
        job(GEMMA),
        (
            "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
        ),
    ),
    "mistral": (job(MISTRAL, [SYSTEM, *TALK]), "<s>[INST]  Hi [/INST] Hello!</s>[INST] Be brief.\n\nBye[/INST]"),
    "qwen 3": (
        job(QWEN3, USER),
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen 3, not thinking": (
        job(QWEN3, USER, enable_thinking=False),
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "typed": (job(TYPED), "user:  Hi </s>assistant: Hello!</s>user: Bye</s> assistant:"),
    "typed, after a system message": (job(TYPED_AFTER_SYSTEM, [SYSTEM, *USER]), "[BE BRIEF.][ HI ]"),
    "raise_exception is no variable": (job("{{ raise_exception is string }}", raise_exception="x"), "False"),
    "three messages at least": (job(ANSWERED_ONLY), " Hi Hello!Bye"),
    "unshown": (job("nothing of yours"), "nothing of yours"),
}


@pytest.mark.parametrize(("done", "expected"), RENDERED.values(), ids=RENDERED)
def test_styles(done: RenderJob, expected: str) -> None:
    assert render(done) == expected
    assert render(done) == expected  # compiled and probed already


LATER = {"role": "system", "content": "Rhyme."}
ASKS = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
ANSWER = {"role": "assistant", "content": "c"}
# Orders of roles that the templates complain about.
REARRANGED = {
    "system role not supported": (
        job(GEMMA, [SYSTEM, *USER]),
        "<s><start_of_turn>user\nBe brief.\n\n Hi<end_of_turn>\n<start_of_turn>model\n",
    ),
    "system before a greeting": (
        job(GEMMA, [SYSTEM, ANSWER, *ASKS[:1]]),
        (
            "<s><start_of_turn>model\nc<end_of_turn>\n<start_of_turn>user\nBe brief.\n\na<end_of_turn>\n"
            "<start_of_turn>model\n"
        ),
    ),
    "system alone": (job(GEMMA, [SYSTEM]), "<s><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\n"),
    "neighbours that show": (job(MISTRAL, [*ASKS, ANSWER, ANSWER]), "<s>[INST] a[/INST][INST] b[/INST] c</s> c</s>"),
    "only user and assistant": (
        job(MISTRAL_1, [SYSTEM, *ASKS, ANSWER]),
        "<s>[INST] Be brief.\n\na [/INST][INST] b [/INST]c</s>",
    ),
    "later system": (job(SYSTEM_FIRST, [SYSTEM, *ASKS, LATER, ANSWER]), "S: Be brief.|u: a|u: b|a: c|u: Rhyme.|"),
    "later system before a question": (job(SYSTEM_FIRST, [SYSTEM, LATER, *ASKS]), "S: Be brief.|u: Rhyme.\n\na|u: b|"),
    "neighbours that do not show": (
        job(TURNS_ONLY, [SYSTEM, *ASKS, ANSWER, ANSWER]),
        "Q Be brief.\n\na\n\nb A c\n\nc|",
    ),
    "the text of one is in another": (job(TURNS_ONLY, [ASKS[0], ASKS[0], ANSWER]), "Q a\n\na A c|"),
}


@pytest.mark.parametrize(("done", "expected"), REARRANGED.values(), ids=REARRANGED)
def test_complaints_about_the_order_of_roles_are_worked_around(done: RenderJob, expected: str) -> None:
    assert render(done) == expected


def test_an_order_that_can_not_be_shown_stays_refused() -> None:
    result, _ = answer(job(TURNS_ONLY, [ANSWER, *USER]))
    assert result.error is not None
    assert result.error.message == "the chat template refused the messages in line 4: roles must alternate"
    tool = [*USER, ANSWER, {"role": "tool", "tool_call_id": "1", "content": "4"}]
    assert "in line 3: Conversation roles must" in str(answer(job(MISTRAL_1, tool))[0].error)


def unfinished(source: str, text: str, *, before: list[dict[str, Any]] = USER) -> RenderJob:
    messages = [*before, {"role": "assistant", "content": text}]
    return RenderJob(source, messages, "<s>", "</s>", continue_final_message=True)


CHATML_START = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
THOUGHT_START = "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
CONTINUED = {
    "chatml": (unfinished(CHATML, " Sure, "), CHATML_START + " Sure, "),
    "empty": (unfinished(CHATML, ""), CHATML_START),
    "trimmed by the template": (unfinished(MISTRAL, "\nWell \n"), "<s>[INST]  Hi [/INST] \nWell \n"),
    "parts": (unfinished(TYPED, "We"), "user:  Hi </s>assistant: We"),
    "said before": (unfinished(GEMMA, "Hi"), "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHi"),
    "role order": (
        unfinished(GEMMA, "d", before=[ANSWER]),
        "<s><start_of_turn>model\nc<end_of_turn>\n<start_of_turn>model\nd",
    ),
    "neighbours joined": (unfinished(TURNS_ONLY, "d ", before=[ASKS[0], ANSWER]), "Q a A c\n\nd "),
    "after an empty thought": (unfinished(EMPTY_THOUGHT, "We"), THOUGHT_START + "<think>\n\n</think>\n\nWe"),
    "in a thought": (unfinished(EMPTY_THOUGHT, "<think>\nThe"), THOUGHT_START + "<think>\nThe"),
    "after a thought": (unfinished(EMPTY_THOUGHT, "<think>a</think> "), THOUGHT_START + "<think>a</think> "),
    "with a thought apart": (
        RenderJob(QWEN3, [*USER, {**ANSWER, "reasoning_content": "2+2"}], "", "", continue_final_message=True),
        THOUGHT_START + "<think>\n2+2\n</think>\n\nc",
    ),
}


@pytest.mark.parametrize(("done", "expected"), CONTINUED.values(), ids=CONTINUED)
def test_the_last_message_is_continued(done: RenderJob, expected: str) -> None:
    assert render(done) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_continued_text_is_the_end_of_the_prompt_whatever_it_is(text: str) -> None:
    prompt = render(unfinished(EMPTY_THOUGHT, text))
    assert prompt.startswith(THOUGHT_START)
    assert prompt.endswith(text)


@pytest.mark.parametrize(
    "source", ["nothing of yours", "{{ messages[-1].content * 2 }}", "{{ messages[-1].content | upper }}"]
)
def test_a_template_that_does_not_show_the_last_message_once_can_not_continue_it(source: str) -> None:
    result, spent = answer(unfinished(source, "a"))
    assert result.error is not None
    assert "does not show the last message as it is" in result.error.message
    assert not spent


def test_only_a_text_of_the_assistant_is_continued() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    for messages, param in (
        ([], "messages"),
        (USER, "messages"),
        ([*USER, {**ANSWER, "tool_calls": calls}], "messages[1]"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            asyncio.run(TemplateRenderer().render(RenderJob(CHATML, messages, "", "", continue_final_message=True)))
        assert caught.value.param == param


def test_a_process_renders_what_this_one_renders() -> None:
    expected = [*RENDERED.values(), *REARRANGED.values(), *CONTINUED.values()]

    async def all_at_once() -> list[str]:
        async with TemplateRenderer() as pool:
            return await asyncio.gather(*(pool.render(done) for done, _ in expected))

    assert asyncio.run(all_at_once()) == [text for _, text in expected]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_texts_reach_the_prompt_unchanged(texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    assert render(job("{% for m in messages %}{{ m.content }}{% endfor %}", messages)) == "".join(texts)
    parts = "{% for m in messages %}{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endfor %}"
    assert render(job(parts, messages)) == "".join(texts)


def test_reasoning_of_the_current_turn_is_kept() -> None:
    late = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    assert "<think>\n2+2\n</think>\n\n4<|im_end|>" in render(job(QWEN3, [*USER, late]))
    assert "<think>" not in render(job(QWEN3, [*USER, late, *USER]))


def test_tojson_is_that_of_transformers() -> None:
    value = {"b": "<é>&'", "a": [1, None]}
    assert render(job("{{ tools | tojson }}", tools=value)) == json.dumps(value, ensure_ascii=False)
    source = "{{ tools | tojson(ensure_ascii=True, indent=1, separators=(',', '='), sort_keys=True) }}"
    expected = json.dumps(value, indent=1, separators=(",", "="), sort_keys=True)
    assert render(job(source, tools=value)) == expected


def test_tools_and_documents_are_none_unless_given() -> None:
    source = "{{ tools is none }} {{ documents is none }} {{ other is defined }}"
    assert render(job(source)) == "True True False"
    assert render(job(source, tools=[], documents=[], other=1)) == "False False True"


def test_without_generation_prompt() -> None:
    done = RenderJob(CHATML, USER, "<s>", "</s>", add_generation_prompt=False)
    assert render(done).endswith(" Hi <|im_end|>\n")


def test_a_variable_set_inside_generation_ends_with_it() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render(job(source)) == "21"


REASONS = {
    "raised": (job(TYPED_AFTER_SYSTEM, USER), "refused the messages in line 1: a system message must be first"),
    "raised on a role": (job(USER_ONLY, TALK), "refused the messages in line 2: Only the role user is supported"),
    "syntax": (job("a\n{% if %}"), "has a syntax error in line 2: Expected an expression"),
    "unknown tag": (job("a\n\n{% frob %}"), "has a syntax error in line 3: Encountered unknown tag 'frob'"),
    "undefined": (job("\n{{ x.y }}"), "used a value that is not defined in line 2: 'x' is undefined"),
    "no such key": (job("{{ messages[9].content }}"), "is not defined in line 1: list object has no element 9"),
    "wrong type": (job("{{ messages + 1 }}"), "failed in line 1: TypeError: can only concatenate list"),
    "division": (job("\n\n{{ 1 / (messages | length - 3) }}"), "failed in line 3: ZeroDivisionError"),
    "include": (job("{% include 'passwd' %}"), "failed in line 1: TypeError: no loader"),
    "half a surrogate pair": (job("{{ '\\ud800' }}"), "failed: UnicodeEncodeError"),
    "refusal with one": (job("{{ raise_exception('\\ud800' * 9999) }}"), "in line 1: ????"),
    "nested blocks": (job("{% for a in [1] %}" * 30 + "{% endfor %}" * 30), "can't be compiled: too many statically"),
    "nested expression": (job("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}"), "nests too deeply"),
    "endless macro": (job("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}"), "nests too deeply in line 2"),
    "class": (
        job("\n{{ ''.__class__.__mro__ }}"),
        "did what no template may in line 2: access to",
    ),
    "globals": (job("{{ cycler.__init__.__globals__ }}"), "did what no template may in line 1"),
    "format": (job("{{ '{0.__class__.__mro__}'.format('') }}"), "did what no template may in line 1"),
    "mutation": (job("{{ messages.append(1) }}"), "did what no template may in line 1"),
    "range": (job("{{ range(10 ** 9) | list }}"), "failed in line 1: OverflowError: Range too big"),
    "long output": (job("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"), "wrote more than 16 MiB of text"),
    "long template": (job("{# " + "x" * 300_000 + " #}"), "failed: ValueError: it has 300006 characters"),
    "long constant": (job("{{ 'x' * 20000000 }}"), "failed: ValueError: it compiles to 20000"),
}


@pytest.mark.parametrize(("done", "reason"), REASONS.values(), ids=REASONS)
def test_each_failure_has_its_reason(done: RenderJob, reason: str) -> None:
    result, spent = answer(done)
    assert result.error is not None
    assert result.error.name == "ChatTemplateError"
    assert result.error.param == ("messages" if "refused the messages" in result.error.message else None)
    assert reason in result.error.message
    assert len(result.error.message) < 600
    assert not spent
    msgspec.msgpack.encode(result)


# What can't be tried in this process: each takes all the time or the memory that it gets.
ENDLESS = {
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "power": "{{ 10 ** (10 ** 9) }}",
    "power of a variable": "{% set ten = messages | length * 10 %}{{ ten ** (ten ** 10) }}",
}
HUGE = {
    "doubling": "\n{% set n = namespace(s='x') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "multiplication": "\n{{ 'x' * 10 ** 10 }}",
    "padding": "\n{{ '%1000000000d' % 1 }}",
    "list": "\n{% macro f(l, i) %}{% if i %}{{ f(l + l, i - 1) }}{% endif %}{% endmacro %}{{ f([1], 60) }}",
}


async def failure(pool: TemplateRenderer, done: RenderJob) -> str:
    with pytest.raises(ChatTemplateError) as caught:
        await pool.render(done)
    assert caught.value.param == ("messages" if "refused the messages" in caught.value.message else None)
    return caught.value.message


def check_hostile(source: str, time_limit: float, reason: str) -> None:
    """The template fails for the reason, its process is gone, this one has not grown, and the next template renders."""

    async def scenario() -> None:
        async with TemplateRenderer(size=1, time_limit=time_limit) as pool:
            await pool.warm()
            before = own_memory()
            started = time.monotonic()
            assert reason in await failure(pool, job(source))
            assert time.monotonic() - started < 10
            assert own_memory() - before < 50_000_000
            assert not pool.pids
            assert await pool.render(job(TYPED)) == RENDERED["typed"][1]

    asyncio.run(scenario())


def own_memory() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_is_ended(source: str) -> None:
    check_hostile(source, 1.0, "took longer than 1 s")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not keep to a limit of the address space")
@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_huge_template_is_ended(source: str) -> None:
    check_hostile(source, 4.5, "needed more than 512 MB of memory in line 2")


def test_refused_templates_do_not_cost_a_process() -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            await pool.warm()
            first = pool.pids
            for done, reason in REASONS.values():
                assert reason in await failure(pool, done)
            assert pool.pids == first

    asyncio.run(scenario())


def test_memory_of_a_failed_render_is_free_for_the_next() -> None:
    """Macros and tracebacks make cycles around what a template has built."""
    source = (
        "{% macro m() %}{{ m }}{% endmacro %}{% set big = 'x' * (messages | length * 100000000) %}"
        "{{ raise_exception('no') if messages[-1].content == 'Bye' else messages[-1].content }}"
    )

    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            await pool.warm()
            first = pool.pids
            for _ in range(3):
                assert "refused the messages in line 1: no" in await failure(pool, job(source))
            assert pool.pids == first

    asyncio.run(scenario())


def test_a_slow_template_does_not_delay_another() -> None:
    async def scenario() -> None:
        async with TemplateRenderer(time_limit=1.5) as pool:
            slow = asyncio.create_task(failure(pool, job(ENDLESS["power"])))
            for _ in range(3):
                assert await pool.render(job(TYPED)) == RENDERED["typed"][1]
            assert not slow.done()
            assert "took longer than 1.5 s" in await slow

    asyncio.run(scenario())


def test_processes_are_reused_and_no_more_than_size() -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=2) as pool:
            assert not pool.pids
            await pool.warm()
            first = pool.pids
            assert len(first) == 1
            await pool.warm()
            await pool.render(job())
            assert pool.pids == first
            await asyncio.gather(*(pool.render(job(messages=[{"role": "user", "content": str(i)}])) for i in range(20)))
            assert len(pool.pids) == 2

    asyncio.run(scenario())


def test_a_cancelled_job_leaves_no_stale_answer() -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            await pool.warm()
            for turns in range(6):  # before the job is sent, after, and later
                source = "{% for i in range(99999) %}{% endfor %}stale"
                task = asyncio.create_task(pool.render(job(source)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await pool.render(job("fresh {{ n }}", n=turns)) == f"fresh {turns}"

    asyncio.run(scenario())


def test_cancelled_while_the_process_starts() -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            for turns in range(0, 40, 4):
                task = asyncio.create_task(pool.render(job()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await pool.render(job(TYPED)) == RENDERED["typed"][1]

    assert_nothing_leaks(scenario)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def assert_nothing_leaks(scenario: Callable[[], Awaitable[None]]) -> None:
    async def counted() -> None:
        async with TemplateRenderer() as pool:
            await pool.warm()  # a loop may keep files open from its first child process on
        before = open_files()
        await scenario()
        assert open_files() == before

    asyncio.run(counted())


def gone(pid: int) -> bool:
    """Say whether the process has ended and been waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_nothing_is_left_after_close() -> None:
    async def scenario() -> None:
        pool = TemplateRenderer(time_limit=0.5)
        await asyncio.gather(*(pool.render(job()) for _ in range(4)))
        seen = pool.pids
        assert "took longer" in await failure(pool, job(ENDLESS["loops"]))
        await pool.aclose()
        await pool.aclose()
        assert seen
        assert all(gone(pid) for pid in seen)
        assert not pool.pids

    assert_nothing_leaks(scenario)


def test_jobs_that_run_or_wait_when_the_pool_closes_fail_as_unavailable() -> None:
    async def scenario() -> None:
        pool = TemplateRenderer(size=1)
        await pool.warm()
        running = asyncio.create_task(pool.render(job(ENDLESS["loops"])))
        waiting = asyncio.create_task(pool.render(job()))
        await asyncio.sleep(0)  # sends the first job; the second waits for the process
        await pool.aclose()
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        with pytest.raises(Unavailable):
            await pool.render(job())
        with pytest.raises(Unavailable):
            await pool.warm()

    assert_nothing_leaks(scenario)


def test_close_while_a_process_starts() -> None:
    async def scenario() -> None:
        for turns in range(0, 40, 4):
            pool = TemplateRenderer(size=1)
            task = asyncio.create_task(pool.render(job()))
            for _ in range(turns):
                await asyncio.sleep(0)
            await pool.aclose()
            with pytest.raises(Unavailable):
                await task

    assert_nothing_leaks(scenario)


@pytest.mark.parametrize(
    ("ending", "reason"), [(signal.SIGKILL, "more than 512 MB"), (signal.SIGSEGV, "crashed its renderer")]
)
def test_a_renderer_that_dies_during_a_job_fails_only_that_job(ending: signal.Signals, reason: str) -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            await pool.warm()
            (pid,) = pool.pids
            task = asyncio.create_task(failure(pool, job(ENDLESS["loops"])))
            await asyncio.sleep(0)  # sends the job
            os.kill(pid, ending)
            assert reason in await task
            assert await pool.render(job(TYPED)) == RENDERED["typed"][1]

    asyncio.run(scenario())


def test_a_renderer_that_died_while_idle_is_replaced() -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            await pool.warm()
            (pid,) = pool.pids
            os.kill(pid, signal.SIGKILL)
            await pool._idle[0].process.wait()
            assert await pool.render(job(TYPED)) == RENDERED["typed"][1]
            assert pid not in pool.pids

    asyncio.run(scenario())


def test_a_renderer_that_cannot_start_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            for executable in ("/nonexistent/python", "/bin/false"):
                monkeypatch.setattr(sys, "executable", executable)
                with pytest.raises(Unavailable, match="could not be started"):
                    await pool.render(job())
            monkeypatch.undo()
            assert await pool.render(job(TYPED)) == RENDERED["typed"][1]

    assert_nothing_leaks(scenario)


@pytest.mark.parametrize("name", sorted(template.RESERVED))
def test_reserved_variables_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"can't be named '{name}'"):
        asyncio.run(TemplateRenderer().render(RenderJob(CHATML, TALK, "", "", variables={name: []})))


@pytest.mark.parametrize("value", [2**70, "\ud800"])
def test_values_that_cannot_be_passed_on_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="can't be passed"):
        asyncio.run(TemplateRenderer().render(job(value=value)))


def variables_of(pid: int) -> str:
    return subprocess.run(["ps", "eww", str(pid)], check=True, capture_output=True, text=True).stdout


def test_modules_in_the_working_directory_and_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.setattr(sys, "path", [str(Path(entry).resolve()) for entry in sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")

    async def scenario() -> None:
        async with TemplateRenderer(size=1) as pool:
            assert await pool.render(job(TYPED)) == RENDERED["typed"][1]
            assert "HF_TOKEN" not in variables_of(*pool.pids)

    asyncio.run(scenario())


class Process:
    """A renderer process by itself, spoken to over its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "llamaserve.chat.renderer", str(theirs.fileno())]
            self.popen = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=sandbox.environment())
        self.frames = FrameSocket(ours)
        assert self.frames.read() == b""


def decoded(reply: bytes) -> tuple[RenderAnswer, bool]:
    """Return the answer in a frame, and whether the process is spent."""
    return msgspec.msgpack.decode(reply[9:], type=RenderAnswer), reply[0] == 1


def encoded(done: RenderJob, seconds: float = 10.0) -> bytes:
    """Return the frame of a job that may take so long."""
    return struct.pack("<d", seconds) + msgspec.msgpack.encode(done)


def test_the_process_ignores_interrupts_and_leaves_at_end_of_file() -> None:
    process = Process()
    process.popen.send_signal(signal.SIGINT)
    process.frames.write(encoded(job("{{ bos_token }}")))
    reply = process.frames.read()
    assert reply is not None
    assert decoded(reply) == (RenderAnswer(text="<s>"), False)
    process.frames.close()
    assert process.popen.wait(5) == 0


def test_the_process_leaves_quietly_when_the_parent_is_gone_before_the_answer() -> None:
    process = Process()
    process.frames.write(encoded(job("{% for i in range(99999) %}{% endfor %}" * 5 + "x" * 9999)))
    process.frames.close()
    assert process.popen.wait(5) == 0


def serve_job(monkeypatch: pytest.MonkeyPatch, done: RenderJob) -> tuple[RenderAnswer, bool]:
    """Run the process's loop here, for one job."""
    ours, theirs = socket.socketpair()
    frames, peer = FrameSocket(ours), FrameSocket(theirs)
    frames.write(encoded(done))
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: (0.0, 0.0))
    ours.shutdown(socket.SHUT_WR)
    try:
        sandbox.answer_jobs(peer, renderer.answer_bytes)
        assert frames.read() == b""
        reply = frames.read()
    finally:
        frames.close()
        peer.close()
    assert reply is not None
    return decoded(reply)


def test_the_loop_ends_when_the_memory_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(done: RenderJob) -> str:
        raise MemoryError

    assert serve_job(monkeypatch, job(TYPED)) == (RenderAnswer(text=RENDERED["typed"][1]), False)
    monkeypatch.setattr(renderer, "render", exhausted)
    result, spent = serve_job(monkeypatch, job())
    assert spent
    assert result.error is not None
    assert "needed more than 512 MB of memory" in result.error.message


def test_an_orphan_ends_by_itself() -> None:
    process = Process()
    process.frames.write(encoded(job(ENDLESS["power"]), 0.5))
    assert process.popen.wait(20) == -signal.SIGPROF
    process.frames.close()
