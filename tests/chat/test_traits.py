"""What chat templates can do, found out by trying: those of published models, and some that want odd things."""

from __future__ import annotations

import asyncio
import json
from string import ascii_letters, digits
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings, strategies as st
from msgspec.structs import asdict, replace
from published_templates import BOS, PUBLISHED, Published

from llamaserve.chat import traits as traits_module
from llamaserve.chat.answer import THINKING_TAGS, AnswerReader
from llamaserve.chat.formats.deepseek import DEEPSEEK, DEEPSEEK_31
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.formats.json_calls import ID, JsonCalls
from llamaserve.chat.formats.llama3 import LLAMA3
from llamaserve.chat.formats.mistral import MISTRAL, MISTRAL_LIST
from llamaserve.chat.reading import Arguments, CallBegins, Content, Reasoning
from llamaserve.chat.renderer import answer
from llamaserve.chat.template import TemplateRenderer
from llamaserve.chat.traits import CallTexts, ProbeJob, TraitFinder, Traits
from llamaserve.errors import ChatTemplateError
from llamaserve.sandbox import Budget


def probe(template: str, eos: str = "<eos>") -> Traits:
    """Return the traits of a template."""
    result, _ = answer(ProbeJob(template, BOS, eos))
    assert result.error is None
    assert result.traits is not None
    return result.traits


def texts(calls: JsonCalls) -> CallTexts:
    return CallTexts(calls.before, calls.between, calls.after, calls.begin, calls.separator, calls.end, lone=calls.lone)


def json_calls(found: CallTexts | None) -> JsonCalls:
    assert found is not None
    return JsonCalls("found", **asdict(found))


NO_TOOLS = Traits(results=True)  # they show messages of any role
ALL = Traits(tools=True, calls=True, several=True, results=True)
HERMES_LIKE = replace(ALL, call_texts=texts(HERMES))
LLAMA_TEXTS = replace(ALL, several=False, call_texts=texts(LLAMA3))
LLAMA_LIKE = replace(LLAMA_TEXTS, text_apart=True)
MISTRAL_OLD = replace(ALL, text_apart=True, id_length=9, call_texts=texts(MISTRAL_LIST))
MISTRAL_NEW = replace(ALL, call_texts=texts(MISTRAL))
THINKS: dict[str, Any] = {"thinking": "<think>", "thoughts": "reasoning_content"}
WITHOUT_SPACE = replace(texts(MISTRAL_LIST), begin="[TOOL_CALLS][")
WITH_ID = replace(texts(MISTRAL), between=f"[CALL_ID]{ID}[ARGS]")
FUNCTION_TAGS = CallTexts("<function=", ">", "</function>", "", "", "", lone=False)
PHI = CallTexts('<|tool_call|>{"name": "', '", "arguments": ', "}<|/tool_call|>", "", "", "", lone=False)

EXPECTED = {
    "command-r7b": replace(  # it numbers calls
        ALL, text_apart=True, thinking="<|START_THINKING|>", thoughts="reasoning_content"
    ),
    "deepseek-r1": Traits(
        calls=True,
        several=True,
        results=True,
        arguments="text",
        null_content=True,
        call_texts=texts(DEEPSEEK),
        thinking="<think>",
    ),
    "deepseek-v3": replace(ALL, arguments="text", null_content=True, call_texts=texts(DEEPSEEK)),
    "deepseek-v3.1": replace(ALL, arguments="text", call_texts=texts(DEEPSEEK_31), thinking="<think>"),
    "functionary3.1": replace(ALL, arguments="text", call_texts=FUNCTION_TAGS),
    "functionary3.2": replace(ALL, arguments="text"),
    "functiongemma": ALL,
    "gemma3": NO_TOOLS,
    "gemma4": replace(ALL, thinking="<|channel>thought"),
    "glm4.5": replace(ALL, **THINKS),
    "gpt-oss": replace(ALL, several=False, text_apart=True, thoughts="thinking"),
    "granite4": HERMES_LIKE,
    "hermes3": replace(HERMES_LIKE, text_apart=True),
    "kimi-k2": replace(ALL, ids_name=True),
    "lfm2": Traits(tools=True, results=True),
    "lfm2.5": replace(ALL, **THINKS),
    "llama3.1": LLAMA_LIKE,
    "llama3.2": LLAMA_LIKE,
    "llama4": replace(ALL, call_texts=replace(texts(LLAMA3), lone=False)),
    "magistral": replace(MISTRAL_NEW, thinking="[THINK]"),
    "minimax-m2": replace(ALL, **THINKS),
    "ministral3": MISTRAL_NEW,
    "mistral-7b-v0.3": MISTRAL_OLD,
    "mistral-nemo": replace(MISTRAL_OLD, call_texts=WITHOUT_SPACE),
    "mistral-small-3.1": MISTRAL_OLD,  # it takes the last nine characters of longer ids
    "mistral-small-3.2": replace(MISTRAL_OLD, call_texts=WITH_ID),
    "phi4-mini": NO_TOOLS,
    "phi4-mini-tools": replace(ALL, call_texts=PHI),
    "qwen2.5": HERMES_LIKE,
    "qwen3": replace(HERMES_LIKE, **THINKS),
    "qwen3-coder": ALL,
    "qwen3-instruct-2507": HERMES_LIKE,
    "qwen3.5": replace(ALL, **THINKS),
    "smollm2": NO_TOOLS,
    "smollm3": Traits(tools=True, results=True, thinking="<think>"),
}


def test_each_template_has_its_traits() -> None:
    assert EXPECTED.keys() == {template.name for template in PUBLISHED}


@pytest.mark.parametrize("template", PUBLISHED, ids=lambda template: template.name)
def test_the_traits_of_published_templates_are_found(template: Published) -> None:
    assert probe(template.source, template.eos) == EXPECTED[template.name]


@pytest.mark.parametrize("template", PUBLISHED, ids=lambda template: template.name)
def test_the_end_of_answers_need_not_be_known(template: Published) -> None:
    """Some files name another token than the one that ends answers."""
    assert probe(template.source, "").call_texts == EXPECTED[template.name].call_texts


# --- Templates made up ---------------------------------------------------------------------------

# Shows the tools, and calls in the texts of a format.
MADE_UP = """{%- if tools %}[{{ tools | tojson }}]{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|assistant|>' + (message.content or '') + BEGIN }}
        {%- for call in message.tool_calls %}
            {%- if not loop.first %}{{- SEPARATOR }}{% endif %}
            {{- BEFORE | replace(ID, call.id) + call.function.name + BETWEEN | replace(ID, call.id) }}
            {{- call.function.arguments | tojson + AFTER | replace(ID, call.id) }}
        {%- endfor %}
        {{- END + '<|fin|>\n' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content + '<|fin|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""


def made_up(calls: JsonCalls) -> str:
    """Return a template that writes calls like this."""
    names = ("begin", "before", "between", "after", "separator", "end")
    values = {name.upper(): getattr(calls, name) for name in names} | {"ID": ID}
    return "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in values.items()) + MADE_UP


PIECES = [
    "<call>",
    "</call>",
    "<|x|>",
    "[CALLS]",
    "[",
    "]",
    "{",
    "}",
    '"',
    '{"name": "',
    '", "args": ',
    ":",
    ",",
    "call",
]
PIECES += ["\n", " ", "\t", "é", "'"]


def some_text(*more: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*PIECES, *more]), max_size=4).map("".join)


FORMATS = st.builds(
    JsonCalls,
    name=st.just("made up"),
    begin=some_text(),
    before=some_text(ID),
    between=some_text(ID),
    after=some_text(ID),
    separator=some_text(),
    end=some_text(),
)


@settings(max_examples=60, deadline=None)
@given(FORMATS)
def test_any_texts_around_names_and_json_are_found(calls: JsonCalls) -> None:
    assume((calls.begin + calls.before).strip() and calls.between.strip())
    texts_found = probe(made_up(calls)).call_texts
    if texts_found is None:
        assert not is_read_back(calls) or begins_oddly(calls) or ends_oddly(calls)
        return
    found = json_calls(texts_found)
    assert is_read_back(found)
    for number in range(1, 5):
        assert found.write(named(number)).strip() == calls.write(named(number)).strip()


def named(number: int) -> list[tuple[str, str]]:
    return [(f"get_{n}", f'{{"n": {n}}}') for n in range(number)]


def is_read_back(calls: JsonCalls) -> bool:
    """Say whether calls that are written like this are read as what they are."""
    return all(
        said(calls, pieces) == wanted
        for wanted in map(named, (1, 2, 3))
        for text in [calls.write(wanted).replace(ID, ascii_letters + digits)]
        for pieces in ([text], list(text))
    )


def said(calls: JsonCalls, pieces: list[str]) -> list[tuple[str, str]] | None:
    """Return the calls in an answer, and nothing if there is text in it."""
    reader = AnswerReader(
        thinking=THINKING_TAGS, calls=calls, names=frozenset({"get_0", "get_1", "get_2"}), whole=len(pieces) == 1
    )
    found: list[tuple[str, str]] = []
    for part in [*(part for piece in pieces for part in reader.push(piece)), *reader.finish()]:
        match part:
            case CallBegins():
                found.append((part.name, ""))
            case Arguments():
                found[-1] = (found[-1][0], found[-1][1] + part.text)
            case Content() | Reasoning():
                return None
    return found


def begins_oddly(calls: JsonCalls) -> bool:
    """Say whether it does not show at once that an answer is a call, and what shows it are tokens or ids; or whether
    what shows it is cut.
    """
    if calls.marker is not None and calls.marker not in calls.shown:
        return True
    return calls.marker is None and any(
        mark in calls.begin + calls.before + calls.between for mark in (*calls.shown, ID)
    )


def ends_oddly(calls: JsonCalls) -> bool:
    """Say whether a call begins like something in what is behind calls: where one ends may not be clear then."""
    starts = {text.strip()[:1] for text in (calls.begin + calls.before, calls.separator + calls.before)}
    return any(start in calls.after + calls.end for start in starts)


@pytest.mark.parametrize(
    "calls",
    [
        JsonCalls("a zero", before="<call>\0", between=":", after="</call>"),
        JsonCalls("a zero between", before="<call>", between="\0:", after="</call>"),
        JsonCalls("an end of thoughts", before="</think><call>", between=":", after="</call>"),
        JsonCalls("thoughts", before="<think></think>", between=":", after=""),
        JsonCalls("an end of turn", begin="<call>", before="<x>", between=":", after="", separator="<|eot_id|>"),
        JsonCalls("the end of answers", before="<call><|fin|>", between=":", after="", separator=";"),
        JsonCalls("a token in what begins as text", before="call ", between="<args>", after=";"),
        JsonCalls("two names", before="<call>", between="probe_one", after=""),
    ],
    ids=lambda calls: calls.name,
)
def test_calls_that_could_not_be_read_are_not_found(calls: JsonCalls) -> None:
    template = made_up(calls).replace(f"{{%- set ID = {json.dumps(ID)} %}}", '{%- set ID = "no id" %}')
    traits = probe(template, "<|fin|>")
    assert traits.calls
    assert traits.call_texts is None


def test_an_id_that_nothing_ends_is_not_found() -> None:
    for after in (ID, f"{ID}x", f"{ID} \n"):
        assert probe(made_up(JsonCalls("ids", before="<call>", between=":", after=after))).call_texts is None


@pytest.mark.parametrize("calls", [HERMES, MISTRAL_LIST, MISTRAL, DEEPSEEK, DEEPSEEK_31], ids=lambda calls: calls.name)
def test_the_texts_of_a_known_format_are_found_as_they_are(calls: JsonCalls) -> None:
    assert probe(made_up(calls)) == replace(ALL, call_texts=texts(calls))


def test_a_format_of_one_call_is_found() -> None:
    refusing = "{% if message.tool_calls | length > 1 %}{{ raise_exception('one call, please') }}{% endif %}"
    template = made_up(LLAMA3).replace("{{- '<|assistant|>' + (m", refusing + "{{- '<|assistant|>' + (m")
    assert probe(template) == LLAMA_TEXTS


def test_a_template_may_want_a_system_message() -> None:
    wanting = "{% if messages[0].role != 'system' %}{{ raise_exception('I need instructions') }}{% endif %}"
    assert probe(wanting + made_up(HERMES)) == HERMES_LIKE


def test_a_template_may_want_results_right_after_calls() -> None:
    wanting = (
        "{% for message in messages %}{% if message.tool_calls and (loop.last or loop.nextitem.role != 'tool') %}"
        "{{ raise_exception('a call without a result') }}{% endif %}{% endfor %}"
    )
    assert probe(wanting + made_up(HERMES), "<|fin|>") == HERMES_LIKE
    assert probe(wanting + made_up(HERMES)) == ALL  # where calls end is not to be seen


def test_arguments_that_python_would_write_are_wanted_as_text() -> None:
    printing = made_up(HERMES).replace("call.function.arguments | tojson", "call.function.arguments | string")
    assert probe(printing) == replace(HERMES_LIKE, arguments="text")
    refusing = made_up(HERMES).replace("call.function.arguments | tojson", "call.function.arguments")
    assert probe(refusing) == replace(HERMES_LIKE, arguments="text")


@pytest.mark.parametrize(
    ("refused", "length"),
    [("length != 9", 9), ("length < 9", 9), ("length > 9", 9), ("length < 2", None), ("length > 99", None)],
)
def test_the_length_that_ids_must_have_is_found(refused: str, length: int | None) -> None:
    refusing = f"{{%- if call.id | {refused} %}}{{{{ raise_exception('an id') }}}}{{% endif %}}{{{{- BEFORE"
    assert probe(made_up(HERMES).replace("{{- BEFORE", refusing)).id_length == length


def test_a_text_that_is_not_shown_beside_calls_is_wanted_apart() -> None:
    dropping = made_up(HERMES).replace("(message.content or '')", "''")
    assert probe(dropping) == replace(HERMES_LIKE, text_apart=True)
    with_thoughts = (
        "{% if message.tool_calls and message.content and message.thinking %}{{ raise_exception('either') }}"
    )
    refusing = made_up(HERMES).replace(
        "{%- if message.role", with_thoughts + "{% endif %}{{ message.thinking }}{%- if message.role", 1
    )
    assert probe(refusing) == replace(HERMES_LIKE, text_apart=True, thoughts="thinking")


def test_a_text_stays_beside_calls_where_two_answers_in_a_row_are_not_shown() -> None:
    strict = (
        "{% if loop.previtem and loop.previtem.role == message.role %}{{ raise_exception('once each') }}{% endif %}"
    )
    dropping = made_up(HERMES).replace("(message.content or '')", "''")
    assert probe(dropping.replace("{%- if message.role", strict + "{%- if message.role", 1)) == HERMES_LIKE


def test_a_text_may_be_apart_where_results_are_the_users() -> None:
    dropping = made_up(HERMES).replace("(message.content or '')", "''")
    strict = "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{%- if message.role"
    found = probe(dropping.replace("{%- if message.role", strict, 1))
    assert found == replace(HERMES_LIKE, text_apart=True, results=False)


def test_content_that_is_null_is_wanted_only_where_it_matters() -> None:
    printing = made_up(HERMES).replace("(message.content or '')", "message.content | string")
    assert not probe(printing).null_content
    needing = made_up(HERMES).replace("and message.tool_calls", "and message.content is none")
    assert probe(needing) == replace(HERMES_LIKE, null_content=True)


def test_calls_that_are_counted_are_not_found() -> None:
    counting = made_up(HERMES).replace("{{- BEFORE", "{{- loop.index }}{{- BEFORE")
    assert probe(counting) == ALL


def test_calls_in_an_order_of_their_own_are_not_found() -> None:
    reverse = made_up(HERMES).replace("in message.tool_calls %}", "in message.tool_calls | reverse %}")
    assert probe(reverse) == ALL


def test_the_name_after_the_arguments_is_not_found() -> None:
    turned = """{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content }}
    {%- for call in message.tool_calls %}
        {{- '<call>' + call.function.arguments | tojson + 'for ' + call.function.name + '</call>' }}
    {%- endfor %}{% endfor %}{{ tools | tojson if tools }}"""
    assert probe(turned) == ALL


def test_empty_thoughts_are_no_part_of_calls() -> None:
    thinking = made_up(HERMES).replace("'<|assistant|>' + (m", "'<|assistant|><think>\\n\\n</think>\\n\\n' + (m")
    assert probe(thinking) == replace(HERMES_LIKE, thinking="<think>")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_found_under_any_of_their_names(
    key: Literal["reasoning_content", "thinking", "reasoning"],
) -> None:
    source = f"{{{{ messages[-1].{key} and '[THINK]' + messages[-1].{key} + '[/THINK]' }}}}"
    assert probe(source) == Traits(thinking="[THINK]", thoughts=key)


def test_a_template_that_shows_nothing_has_no_traits() -> None:
    assert probe("") == Traits()
    assert probe("{{ raise_exception('no') }}") == Traits()
    assert probe("{{ messages[0].content }}") == Traits()


@given(st.text(st.sampled_from("<>[]{}|/AZaz_ \n"), max_size=60), st.text(st.sampled_from("<|>[]AZ\n"), max_size=9))
def test_no_text_breaks_the_search(text: str, eos: str) -> None:
    template = made_up(HERMES).replace("'<|fin|>\\n'", json.dumps(text))
    found = probe(template, eos).call_texts
    assert found is None or found.before.lstrip().startswith("<tool_call>")


# --- Remembering ----------------------------------------------------------------------------------


class Prober:
    """Says of each template that it has its number, and counts."""

    def __init__(self) -> None:
        self.asked: list[ProbeJob] = []

    async def probe(self, job: ProbeJob, budget: Budget | None = None) -> Traits:
        self.asked.append(job)
        if job.template == "broken":
            raise ChatTemplateError("it is broken", param="messages")
        return Traits(thinking=job.template + job.bos_token + job.eos_token)


def test_each_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        monkeypatch.setattr(traits_module, "REMEMBERED", 2)
        prober = Prober()
        finder = TraitFinder(prober)
        for template in ("a", "b", "a", "c", "a"):
            assert (await finder.of(template, "+", "-")).thinking == f"{template}+-"
        assert [job.template for job in prober.asked] == ["a", "b", "c"]
        assert (await finder.of("b", "+", "-")).thinking == "b+-"  # the one that was not asked for longest is forgotten
        assert (await finder.of("a", "+", "_")).thinking == "a+_"
        assert len(prober.asked) == 5

    asyncio.run(ask())


def test_failures_are_not_remembered() -> None:
    async def ask() -> None:
        prober = Prober()
        finder = TraitFinder(prober)
        for _ in range(2):
            with pytest.raises(ChatTemplateError):
                await finder.of("broken", "", "")
        assert len(prober.asked) == 2

    asyncio.run(ask())


def test_a_renderer_process_finds_traits() -> None:
    async def ask() -> None:
        async with TemplateRenderer(size=1) as renderer:
            finder = TraitFinder(renderer)
            published = next(template for template in PUBLISHED if template.name == "qwen3")
            assert await finder.of(published.source, BOS, published.eos) == EXPECTED["qwen3"]
            with pytest.raises(ChatTemplateError, match="syntax error"):
                await finder.of("{% if %}", "", "")

    asyncio.run(ask())
