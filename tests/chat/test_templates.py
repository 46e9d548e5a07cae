"""The templates of published models: what they make of conversations, whatever is in those."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

import pytest
from msgspec.structs import replace
from published_templates import BOS, PUBLISHED, Published

from llamaserve.chat.adapting import adapted
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.messages import normalise
from llamaserve.chat.renderer import answer, render
from llamaserve.chat.tools import toolbox
from llamaserve.chat.traits import ProbeJob, Traits

Message = dict[str, Any]

SYSTEM = {"role": "system", "content": "Answer like a pirate."}
QUESTION = {"role": "user", "content": "Where is the treasure?"}
ANSWER = {"role": "assistant", "content": "Under the palm."}
MORE = {"role": "user", "content": "Which palm?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells what {name} does.",
            "parameters": {
                "type": "object",
                "properties": {"island": {"type": "string", "description": "A name."}, "depth": {"type": "integer"}},
                "required": ["island"],
            },
        },
    }
    for name in ("dig_up", "look_around")
]
THOUGHTS = "Arr, let me think."


SHOW_NO_CALLS = {"gemma3", "lfm2", "phi4-mini", "smollm2", "smollm3"}
SHOW_ONE_CALL = {"gpt-oss", "llama3.1", "llama3.2"}


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda template: template.name)
def template(request: pytest.FixtureRequest) -> Published:
    """A template; of the module, so that pytest runs all tests with one before those with the next."""
    published: Published = request.param
    return published


@cache
def traits_of(template: Published) -> Traits:
    result, _ = answer(ProbeJob(template.source, BOS, template.eos))
    assert result.traits is not None
    return result.traits


def stands_in_order(prompt: str, texts: Sequence[str]) -> bool:
    """Say whether the texts are in the prompt, each after the one before."""
    at = 0
    for text in texts:
        found = prompt.find(text, at)
        if found < 0:
            return False
        at = found + len(text)
    return True


def call(traits: Traits, number: int, name: str, island: str) -> Message:
    arguments: Any = {"island": island, "depth": number}
    if traits.arguments == "text":
        arguments = f'{{"island": "{island}", "depth": {number}}}'
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(traits: Traits, *calls: Message, **more: str) -> Message:
    content = None if traits.null_content else ""
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(called: Message, text: str) -> Message:
    return {"role": "tool", "tool_call_id": called["id"], "name": called["function"]["name"], "content": text}


def test_a_talk_is_shown_from_the_beginning_to_the_place_of_the_answer(template: Published) -> None:
    prompt = template.render([SYSTEM, QUESTION, ANSWER, MORE])
    assert prompt.startswith(template.begins)
    assert prompt.count(BOS) <= 1
    assert SYSTEM["content"] in prompt
    assert stands_in_order(prompt, [QUESTION["content"], ANSWER["content"], MORE["content"]])
    assert prompt.endswith(template.asks)


def test_no_system_message_is_needed(template: Published) -> None:
    prompt = template.render([QUESTION])
    assert prompt.startswith(template.begins)
    assert QUESTION["content"] in prompt
    assert prompt.endswith(template.asks)


def test_an_answer_begins_where_the_prompt_for_it_ends(template: Published) -> None:
    asked = template.render([QUESTION])
    answered = render(replace(template.job([QUESTION, ANSWER]), add_generation_prompt=False))
    start = asked.removesuffix("<think>\n").removesuffix("<|channel>thought\n<channel|>")
    assert answered.startswith(start)
    assert ANSWER["content"] in answered[len(start) :]


def test_system_messages_may_come_later(template: Published) -> None:
    later = {"role": "system", "content": "Whisper from now on."}
    prompt = template.render([SYSTEM, QUESTION, ANSWER, later, MORE])
    assert all(text["content"] in prompt for text in (SYSTEM, QUESTION, ANSWER, later, MORE))


def test_an_answer_can_be_continued(template: Published) -> None:
    begun = {"role": "assistant", "content": " Beyond the\n"}
    prompt = render(replace(template.job([SYSTEM, QUESTION, begun]), continue_final_message=True))
    assert prompt.endswith(begun["content"])
    assert stands_in_order(prompt, [QUESTION["content"], begun["content"]])
    opened = render(replace(template.job([QUESTION, {**begun, "content": ""}]), continue_final_message=True))
    assert prompt.endswith(opened[-8:] + begun["content"])


def test_thinking_is_switched_on_and_off(template: Published) -> None:
    for enabled in (True, False):
        prompt = template.render([QUESTION], enable_thinking=enabled)
        assert QUESTION["content"] in prompt
        if template.switched is not None:
            assert prompt.endswith(template.switched[0 if enabled else 1])
        else:
            assert prompt == template.render([QUESTION])


def test_tools_are_described(template: Published) -> None:
    prompt = template.render([SYSTEM, QUESTION], tools=TOOLS)
    assert prompt.startswith(template.begins)
    assert prompt.endswith(template.asks)
    knows = traits_of(template).tools
    for text in ("dig_up", "look_around", "Tells what dig_up does.", "island"):
        assert (text in prompt) == knows


def test_no_tools_are_as_none_at_all(template: Published) -> None:
    assert template.render([QUESTION], tools=None) == template.render([QUESTION])


def test_calls_and_their_results_are_shown_in_order(template: Published) -> None:
    traits = traits_of(template)
    if not traits.calls:
        assert template.name in SHOW_NO_CALLS
        return
    dig, look = call(traits, 1, "dig_up", "Tortuga"), call(traits, 2, "look_around", "Nassau")
    messages = [SYSTEM, QUESTION, calling(traits, dig), result(dig, "sand only")]
    messages += [calling(traits, look), result(look, "many palms"), ANSWER, MORE]
    prompt = template.render(messages, tools=TOOLS if traits.tools else None)
    assert stands_in_order(prompt, ["Tortuga", "sand only", "Nassau", "many palms", ANSWER["content"]])
    assert prompt.startswith(template.begins)
    assert prompt.endswith(template.asks)
    for each in (dig, look):
        assert each["function"]["name"] in prompt or each["id"] in prompt


def test_calls_of_one_answer_are_shown_together(template: Published) -> None:
    traits = traits_of(template)
    if not traits.several:
        assert template.name in SHOW_NO_CALLS | SHOW_ONE_CALL
        return
    dig, look = call(traits, 1, "dig_up", "Tortuga"), call(traits, 2, "look_around", "Nassau")
    messages = [QUESTION, calling(traits, dig, look), result(dig, "sand only"), result(look, "many palms")]
    prompt = template.render(messages, tools=TOOLS)
    assert stands_in_order(prompt, ["Tortuga", "Nassau", "sand only", "many palms"])
    assert prompt.count("Tortuga") == prompt.count("Nassau") == 1


def adapted_prompt(template: Published, messages: list[Message]) -> str:
    """Return the prompt of messages that are fitted to the template."""
    tools = toolbox(tools=TOOLS, tool_choice=None, parallel_tool_calls=None, functions=None, function_call=None)
    shown, offered = adapted(normalise(messages), traits_of(template), tools, HERMES)
    return template.render(shown, tools=offered)


def in_the_api(number: int, name: str, island: str) -> Message:
    return call(Traits(arguments="text"), number, name, island)


@pytest.mark.parametrize("length", [1, 5, 9, 40])
def test_an_answer_with_text_and_several_calls_is_shown_whole(template: Published, length: int) -> None:
    dig, look = (
        {**in_the_api(number, name, island), "id": f"{number}" * length}
        for number, name, island in ((1, "dig_up", "Tortuga"), (2, "look_around", "Nassau"))
    )
    calling = {"role": "assistant", "content": "Aye, I look.", "tool_calls": [dig, look], "reasoning_content": THOUGHTS}
    results = [
        {"role": "tool", "tool_call_id": each["id"], "content": f"found {n}"} for n, each in enumerate((dig, look))
    ]
    prompt = adapted_prompt(template, [SYSTEM, QUESTION, calling, *reversed(results)])
    assert stands_in_order(prompt, [QUESTION["content"], "Tortuga", "Nassau", "found 1"])
    assert stands_in_order(prompt, ["Tortuga", "found 0"])
    answered = adapted_prompt(template, [SYSTEM, QUESTION, calling, *results, ANSWER, MORE])
    assert prompt.count("Aye, I look.") == answered.count("Aye, I look.") == 1
    assert prompt.count("Tortuga") == prompt.count("Nassau") == 1
    assert stands_in_order(answered, ["Tortuga", "Nassau", "found 1", ANSWER["content"], MORE["content"]])
    for each in (prompt, answered):
        assert stands_in_order(each, ["Aye, I look.", "Tortuga"]) or template.name == "gemma4"  # it has texts last
    if template.name in SHOW_ONE_CALL:
        assert stands_in_order(prompt, ["Tortuga", "found 0", "Nassau", "found 1"])


def test_results_are_answered(template: Published) -> None:
    traits = traits_of(template)
    if not traits.calls:
        assert template.name in SHOW_NO_CALLS
        return
    dig = call(traits, 1, "dig_up", "Tortuga")
    prompt = template.render([QUESTION, calling(traits, dig), result(dig, "sand only")], tools=TOOLS)
    assert "sand only" in prompt.removesuffix(template.asks)


def test_thoughts_of_this_turn_are_shown_by_those_who_know_them(template: Published) -> None:
    traits = traits_of(template)
    if traits.thoughts is None:
        shown = template.render([QUESTION, {**ANSWER, "reasoning_content": THOUGHTS}, MORE])
        assert shown == template.render([QUESTION, ANSWER, MORE])
        return
    dig = call(traits, 1, "dig_up", "Tortuga")
    thought = calling(traits, dig, **{traits.thoughts: THOUGHTS})
    prompt = template.render([QUESTION, thought, result(dig, "sand only")], tools=TOOLS)
    assert stands_in_order(prompt, [QUESTION["content"], THOUGHTS, "Tortuga", "sand only"])


def test_thoughts_of_before_the_last_question_are_left_out(template: Published) -> None:
    for key in ("reasoning_content", "thinking"):
        prompt = template.render([QUESTION, {**ANSWER, key: THOUGHTS}, MORE])
        assert ANSWER["content"] in prompt
        assert THOUGHTS not in prompt


@pytest.mark.parametrize("name", ["gpt-oss", "llama3.2", "mistral-small-3.1", "mistral-small-3.2", "smollm3"])
def test_some_tell_the_date(name: str) -> None:
    template = next(each for each in PUBLISHED if each.name == name)
    assert str(datetime.now().year) in template.render([QUESTION])
