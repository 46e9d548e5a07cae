"""The chat endpoint as programs use it: the openai SDK's helpers, LangChain, and the requests that editors send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from api_helpers import CHAT, LIMIT, MODEL, events
from chat_helpers import WEATHER, calls_of, put_together, said
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from running_server import RunningServer

PARIS = said(("user", "What is the weather in Paris?"))
SUNNY = {"guided_choice": ["It is sunny."]}


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=12)
    unit: Literal["C", "F"]


# The openai SDK


def test_the_sdk_s_streaming_helper_reports_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=PARIS,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        seed=1,
        max_tokens=80,
        stream_options={"include_usage": True},
    ) as stream:
        seen = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in seen]
    assert kinds.count("tool_calls.function.arguments.done") == 1
    deltas = [event for event in seen if event.type == "tool_calls.function.arguments.delta"]
    (done,) = (event for event in seen if event.type == "tool_calls.function.arguments.done")
    assert done.name == "GetWeather"
    assert "".join(event.arguments_delta for event in deltas) == done.arguments
    assert isinstance(done.parsed_arguments, GetWeather)
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.parsed_arguments == done.parsed_arguments
    assert choice.message.tool_calls[0].id.startswith("call_")
    assert final.usage is not None
    assert final.usage.completion_tokens > 0


def test_the_sdk_s_streaming_helper_reports_text_and_logprobs(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=PARIS,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="none",
        max_tokens=20,
        logprobs=True,
        extra_body=SUNNY,
    ) as stream:
        seen = list(stream)
        final = stream.get_final_completion()
    text = "".join(event.delta for event in seen if event.type == "content.delta")
    (done,) = (event for event in seen if event.type == "content.done")
    assert text == done.content == final.choices[0].message.content
    assert "logprobs.content.delta" in [event.type for event in seen]
    assert final.choices[0].logprobs is not None
    assert "".join(entry.token for entry in final.choices[0].logprobs.content or []) == text


def test_the_sdk_s_parse_helper_returns_arguments(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=PARIS,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice={"type": "function", "function": {"name": "GetWeather"}},
        seed=1,
        max_tokens=80,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)


async def _conversation(client: openai.AsyncOpenAI) -> str:
    messages: list[Any] = list(PARIS)
    tools = [openai.pydantic_function_tool(GetWeather)]
    async with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=tools, tool_choice="required", seed=1, max_tokens=80
    ) as stream:
        answer = (await stream.get_final_completion()).choices[0].message
    assert answer.tool_calls
    messages.append(answer.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 C."} for call in answer.tool_calls]
    async with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=tools, tool_choice="none", max_tokens=20, extra_body=SUNNY
    ) as stream:
        return (await stream.get_final_completion()).choices[0].message.content or ""


@pytest.mark.anyio
async def test_the_asynchronous_sdk_s_tool_loop(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        assert await _conversation(client) == "It is sunny."


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# LangChain


@langchain_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather in a city."""
    return f"Sunny in {city}."


@pytest.fixture
def chain(server: RunningServer) -> Iterator[ChatOpenAI]:
    with httpx.Client(timeout=LIMIT) as connections:
        yield ChatOpenAI(
            base_url=server.url + "/v1",
            api_key="none",
            model=MODEL,
            max_retries=0,
            max_tokens=60,
            seed=1,
            stream_usage=True,
            http_client=connections,
        )


def test_langchain_s_tool_loop(chain: ChatOpenAI) -> None:
    history: list[Any] = [HumanMessage("What is the weather in Paris?")]
    answer = chain.bind_tools([get_weather], tool_choice="required").invoke(history)
    assert isinstance(answer, AIMessage)
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert not answer.invalid_tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    last = chain.bind_tools([get_weather], tool_choice="none").invoke([*history, answer, result])
    assert last.content
    assert not last.tool_calls
    assert last.usage_metadata is not None
    assert last.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("choice", ["get_weather", "any", True])
def test_langchain_s_ways_to_force_a_call(chain: ChatOpenAI, choice: str | bool) -> None:
    answer = chain.bind_tools([get_weather], tool_choice=choice).invoke("What is the weather in Rome?")
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"]
    assert answer.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def test_langchain_s_chunks_add_up(chain: ChatOpenAI) -> None:
    bound = chain.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    chunks = list(bound.stream("What is the weather in Rome?"))
    names = [piece["name"] for chunk in chunks for piece in chunk.tool_call_chunks if piece["name"]]
    assert names == ["get_weather"]
    total: AIMessageChunk | None = None
    for chunk in chunks:
        assert isinstance(chunk, AIMessageChunk)
        total = chunk if total is None else total + chunk
    assert total is not None
    assert [call["name"] for call in total.tool_calls] == ["get_weather"]
    assert not total.invalid_tool_calls
    assert total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_s_structured_output(chain: ChatOpenAI, method: Literal["function_calling", "json_schema"]) -> None:
    answer = chain.with_structured_output(GetWeather, method=method).invoke("The weather in Rome, in degrees Celsius.")
    assert isinstance(answer, GetWeather)


# Editors and other programs, by the requests that they send


def sent(server: RunningServer, body: dict[str, Any], **headers: str) -> httpx.Response:
    """Send a request as a program that is no SDK does, for whose model name ours stands."""
    response = httpx.post(server.url + CHAT, json={"model": MODEL, **body}, headers=headers, timeout=LIMIT)
    assert response.status_code == 200, response.text[:500]
    return response


def streamed(server: RunningServer, body: dict[str, Any], **headers: str) -> tuple[dict[str, Any], list[Any]]:
    """Send a streamed request, and return the one choice and all chunks."""
    response = sent(server, {"stream": True, **body}, **headers)
    found = list(events(iter(response.text.splitlines())))
    (choice,) = put_together(found)
    return choice, found[:-1]


def test_copilot_s_custom_endpoint(server: RunningServer) -> None:
    """It never sends max_tokens, always wants the usage, and offers tools in agent mode."""
    body = {
        "messages": [
            *said(("system", "You are an AI programming assistant.")),
            {"role": "user", "content": [{"type": "text", "text": "Say only the word yes."}]},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "top_p": 1,
        "n": 1,
        "tools": [WEATHER],
        "tool_choice": "auto",
    }
    choice, chunks = streamed(server, body, authorization="Bearer key")
    assert choice["finish_reason"] in ("stop", "tool_calls", "length")
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] > 0


def test_cline_and_roo(server: RunningServer) -> None:
    """For what looks like a reasoning model they send the role developer, an effort and the newer limit."""
    body = {
        "messages": [{"role": "developer", "content": "You are Cline."}, *PARIS],
        "temperature": 0,
        "reasoning_effort": "medium",
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 12,
        "tools": [WEATHER],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
    }
    choice, chunks = streamed(server, body)
    assert choice["message"]["content"] or choice["message"]["tool_calls"]
    *pieces, last = chunks
    assert all(len(piece["choices"]) == 1 and piece["usage"] is None for piece in pieces)
    assert last["usage"]["completion_tokens"] <= 12
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    without = {**body, "stream_options": None}
    assert all(chunk["choices"] for chunk in streamed(server, without)[1]), "they read delta unguarded"


@pytest.mark.parametrize("content", [" ", "", [{"type": "text", "text": " "}], None])
def test_continue(server: RunningServer, content: object) -> None:
    """It may send a space as content, no key, and more stop texts than OpenAI allows."""
    assistant = {"role": "assistant", "content": content}
    body = {
        "messages": [*PARIS, assistant, {"role": "user", "content": content if content is not None else " "}],
        "max_tokens": 5,
        "stop": ["<|im_start|>", "<|im_end|>", "\n\n\n", "/src/", "#- coding: utf-8", "```", "<|endoftext|>"],
        "stream": True,
    }
    streamed(server, body, **{"authorization": "Bearer undefined", "api-key": "x", "x-api-key": "x"})
    streamed(server, {**body, "raw": False, "keep_alive": 1800})


def test_zed(server: RunningServer) -> None:
    """It streams calls, and may say whether several are welcome and under what key the prompt is cached."""
    assistant = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}},
        ],
    }
    body = {
        "messages": [*PARIS, assistant, {"role": "tool", "content": "sunny", "tool_call_id": "a1"}, *PARIS],
        "stream": True,
        "stop": [],
        "temperature": 1.0,
        "max_completion_tokens": 60,
        "parallel_tool_calls": True,
        "prompt_cache_key": "thread-1",
        "tools": [WEATHER],
        "tool_choice": "required",
        "seed": 1,
    }
    choice, chunks = streamed(server, body)
    named = [
        call
        for chunk in chunks
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])
        if call["function"].get("name")
    ]
    assert [call["index"] for call in named] == list(range(len(named)))
    if choice["finish_reason"] == "tool_calls":
        assert len(calls_of(choice, WEATHER)) == len(named)


def test_aider_and_litellm(server: RunningServer) -> None:
    body = {
        "messages": [*said(("system", "Act as an expert.")), *PARIS],
        "temperature": 0,
        "stream": True,
        "max_tokens": 8,
        "extra_headers": None,
        "num_ctx": 8192,
        "drop_params": True,
    }
    assert streamed(server, body)[0]["message"]["content"]
    message = {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": None,
        "function_call": None,
        "provider_specific_fields": {},
    }
    again = {**body, "messages": [*PARIS, message, *PARIS], "stream": False}
    assert sent(server, again).json()["choices"][0]["message"]["content"]


def test_jetbrains(server: RunningServer) -> None:
    """Its connection test wants ``created``, and its agent leaves out what it does not use as null."""
    body = {
        "messages": PARIS,
        "max_tokens": 4,
        "stream": False,
        "tools": None,
        "tool_choice": None,
        "response_format": None,
        "stop": None,
        "logprobs": None,
        "top_logprobs": None,
        "user": None,
    }
    answer = sent(server, body).json()
    assert answer["created"] > 0
    assert answer["id"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"]
    assert sent(server, {**body, "tools": [WEATHER], "tool_choice": "auto"}).json()["choices"]


def test_llama_vscode(server: RunningServer) -> None:
    body = {"messages": PARIS, "stream": True, "temperature": 0.1, "top_p": 1, "max_tokens": -1, "stop": ["."]}
    assert streamed(server, body)[0]["finish_reason"] == "stop"


def test_agents_that_send_back_what_they_got(server: RunningServer) -> None:
    """Whatever fields an answer has, the client may send the message back as it is."""
    body = {"messages": PARIS, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60, "seed": 1}
    for message in (sent(server, body).json()["choices"][0]["message"], streamed(server, body)[0]["message"]):
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in message["tool_calls"]]
        again = {**body, "messages": [*PARIS, message, *results], "tool_choice": "auto", "max_tokens": 2}
        assert sent(server, again)


def test_gateways_that_parse_arguments(server: RunningServer) -> None:
    """Some send the arguments of earlier calls as an object, and results as parts or as JSON."""
    function = {"name": "get_weather", "arguments": {"city": "Rome"}}
    for content in ([{"type": "text", "text": "sunny"}], json.dumps({"weather": "sunny"}), ""):
        history = [
            *PARIS,
            {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "a", "name": "get_weather", "content": content},
        ]
        assert sent(server, {"messages": history, "tools": [WEATHER], "max_tokens": 2})
