"""``/v1/chat/completions`` as the openai SDK sees it, on the real starter model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, END_TOKENS, MODEL, all_events, assert_error, length_of, streamed
from running_server import RunningServer

Messages = list[dict[str, Any]]
COUNT: Messages = [{"role": "user", "content": "Count from 1 to 20."}]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def streamed_texts(client: openai.OpenAI, choices: int = 1, **request: Any) -> list[str]:
    texts = [""] * choices
    for chunk in client.chat.completions.create(model=MODEL, stream=True, **request):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


def text_of(client: openai.OpenAI, **request: Any) -> str:
    content = client.chat.completions.create(model=MODEL, **request).choices[0].message.content
    assert content is not None
    return content


def test_an_answer_has_openais_shape(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=COUNT, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.refusal is None
    prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nCount from 1 to 20.<|im_end|>\n"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == length_of(server, prompt + "<|im_start|>assistant\n")
    assert answer.usage.completion_tokens == 8 == length_of(server, choice.message.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_an_answer_that_ends_by_itself_stops(client: openai.OpenAI) -> None:
    messages: Messages = [{"role": "user", "content": "Say only the word yes."}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=100, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
def test_a_stream_has_the_same_text_as_the_whole(client: openai.OpenAI, sampling: dict[str, float]) -> None:
    request = {"messages": COUNT, "max_tokens": 30, **sampling}
    assert streamed_texts(client, **request) == [text_of(client, **request)]


@pytest.mark.parametrize("choices", [1, 3])
def test_the_role_comes_first_and_done_last(server: RunningServer, choices: int) -> None:
    body = {"messages": COUNT, "max_tokens": 4, "n": choices, "stream_options": {"include_usage": True}}
    body |= {"logit_bias": END_TOKENS}
    *chunks, last, done = all_events(server, CHAT, body)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4 * choices
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert last["id"].startswith("chatcmpl-")
    for index in range(choices):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert own[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]


def test_a_stream_without_the_option_has_no_usage(server: RunningServer) -> None:
    *chunks, done = all_events(server, CHAT, {"messages": COUNT, "max_tokens": 2})
    assert done == "[DONE]"
    assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    request = {"messages": COUNT, "max_tokens": 16, "temperature": 1.5, "top_p": 1, "seed": 1, "n": 3}
    answer = client.chat.completions.create(model=MODEL, **request)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert streamed_texts(client, choices=3, **request) == texts


@pytest.mark.parametrize(
    "limit",
    [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}],
)
def test_both_names_limit_the_answer(client: openai.OpenAI, limit: dict[str, int]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=COUNT, logit_bias=END_TOKENS, **limit)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("limit", [{}, {"max_tokens": -1}, {"max_completion_tokens": None, "max_tokens": None}])
def test_without_a_limit_the_context_is_the_limit(small_server: RunningServer, limit: dict[str, Any]) -> None:
    response = small_server.post(CHAT, {"messages": COUNT, "logit_bias": END_TOKENS, **limit})
    assert response.json()["usage"]["total_tokens"] == 96
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_a_conversation_over_the_context_is_refused(small_server: RunningServer) -> None:
    messages = [{"role": "user", "content": "word " * 200}]
    for extra in ({}, {"stream": True}):
        response = small_server.post(CHAT, {"messages": messages, **extra})
        message = assert_error(response, 400, "context_length_exceeded", "messages")
        assert "96 tokens" in message
        assert "the prompt has 23" in message


@pytest.mark.parametrize("stop", ["2", ["x", "2"], [f"stop{i}" for i in range(99)] + ["2"]])
def test_stop_strings(client: openai.OpenAI, stop: str | list[str]) -> None:
    request = {"messages": COUNT, "max_tokens": 20, "temperature": 0}
    whole = text_of(client, **request)
    assert "2" in whole
    assert text_of(client, stop=stop, **request) == whole[: whole.index("2")]
    assert streamed_texts(client, stop=stop, **request) == [whole[: whole.index("2")]]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Count from 1 to 20."}]}],
        [{"role": "developer", "content": SYSTEM}, *COUNT],
        [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, *COUNT],
    ],
)
def test_other_ways_to_write_the_same_messages(client: openai.OpenAI, messages: Messages) -> None:
    request = {"max_tokens": 10, "temperature": 0}
    one = client.chat.completions.create(model=MODEL, messages=COUNT, **request)
    other = client.chat.completions.create(model=MODEL, messages=messages, **request)
    assert other.choices[0].message.content == one.choices[0].message.content
    assert one.usage is not None
    assert other.usage is not None
    assert other.usage.prompt_tokens == one.usage.prompt_tokens


def test_the_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    messages: Messages = [{"role": "user", "content": "Tell me of the quiet village of Umbrella by the sea."}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20, temperature=0)
    assert first.usage is not None
    messages = [*messages, {"role": "assistant", "content": first.choices[0].message.content}]
    messages = [*messages, {"role": "user", "content": "Go on."}]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens


def test_fields_without_effect_are_named_in_a_header(server: RunningServer) -> None:
    body = {"messages": COUNT, "max_tokens": 1, "moods": 1, "user": "x", "metadata": {}, "store": False}
    body |= {"mode": "instruct", "greeting": "Hi", "echo": True, "parallel_tool_calls": True}
    response = server.post(CHAT, body)
    names = response.headers["x-llamaserve-ignored"].split(", ")
    assert sorted(names) == ["echo", "greeting", "moods", "parallel_tool_calls"]
    stream = server.post(CHAT, {**body, "stream": True})
    assert stream.headers["x-llamaserve-ignored"] == response.headers["x-llamaserve-ignored"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("field", [{"modalities": ["audio"]}, {"audio": {"voice": "x"}}])
def test_what_is_not_offered_is_refused(server: RunningServer, field: dict[str, Any]) -> None:
    for extra in ({}, {"stream": True}):
        response = server.post(CHAT, {"messages": COUNT, **extra, **field})
        assert_error(response, 400, "unsupported_parameter", next(iter(field)))


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True, "reasoning_effort": "low", "service_tier": "auto"},
    ],
)
def test_what_asks_for_nothing_special_is_taken(client: openai.OpenAI, field: dict[str, Any]) -> None:
    assert text_of(client, messages=COUNT, max_tokens=1, **field)


def test_an_image_is_refused(server: RunningServer) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    response = server.post(CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert_error(response, 400, "unsupported_parameter", "messages[0].content[0]")


def test_eight_clients_at_once_get_what_each_gets_alone(fresh_server: RunningServer) -> None:
    subjects = ("cat", "river", "king", "robot", "garden", "ship", "dragon", "teacher")
    prompts = [f"Once upon a time there was a {subject} who" for subject in subjects]

    def answer(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 30, "temperature": 0, "logit_bias": END_TOKENS}
        return str(fresh_server.post(COMPLETIONS, body).json()["choices"][0]["text"])

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        for _ in range(2):
            assert list(threads.map(answer, prompts)) == alone


def test_sixteen_clients_share_four_slots(server: RunningServer) -> None:
    def whole(number: int) -> int:
        body = {"messages": [{"role": "user", "content": f"Say {number}."}], "max_tokens": 10, "logit_bias": END_TOKENS}
        return int(server.post(CHAT, body).json()["usage"]["completion_tokens"])

    def stream(number: int) -> int:
        body = {"messages": [{"role": "user", "content": f"Say {number}."}], "max_tokens": 10, "logit_bias": END_TOKENS}
        body["stream_options"] = {"include_usage": True}
        return int(all_events(server, CHAT, body)[-2]["usage"]["completion_tokens"])

    kinds: list[Callable[[int], int]] = [whole, stream]
    with ThreadPoolExecutor(16) as threads:
        futures = [threads.submit(kinds[number % 2], number) for number in range(16)]
        assert [future.result() for future in futures] == [10] * 16


def test_a_waiting_stream_says_so(small_server: RunningServer) -> None:
    """A heartbeat is a comment line; it comes before the first token while another request has the only slot."""
    long = {"messages": COUNT, "n": 3, "logit_bias": END_TOKENS}
    with streamed(small_server, CHAT, long) as ahead:
        next(ahead)
        body = {"messages": COUNT, "max_tokens": 1, "stream": True}
        text = small_server.post(CHAT, body).text
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert len(comments) >= 3
    places = [comment for comment in comments if comment.startswith(": queued, place ")]
    assert len(places) >= 2
    assert sorted(places, reverse=True) == places, "the place only gets better"
    lines = [line for line in text.splitlines() if line]
    contents = [number for number, line in enumerate(lines) if '"content":"' in line and '"content":""' not in line]
    assert lines.index(": working") < contents[0]
    assert lines[-1] == "data: [DONE]"


def test_answers_depend_neither_on_neighbours_nor_on_what_is_cached(server: RunningServer) -> None:
    questions = ["Name three rivers and say where they end.", "What is 7 times 8?", "List five birds.", "Hi"]

    def ask(question: str) -> str:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
        return str(server.post(CHAT, body).json()["choices"][0]["message"]["content"])

    alone = [ask(question) for question in questions]
    for _ in range(2):
        with ThreadPoolExecutor(len(questions)) as threads:
            assert list(threads.map(ask, questions)) == alone
    assert [ask(question) for question in reversed(questions)] == alone[::-1]
