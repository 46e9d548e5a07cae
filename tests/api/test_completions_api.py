"""``/v1/completions`` as the openai SDK sees it, on the real starter model."""

from __future__ import annotations

import openai
import pytest
from api_helpers import COMPLETIONS, END_TOKENS, ENDLESS, MODEL, all_events, assert_error, length_of, tokens_of
from running_server import RunningServer

FRANCE = "The capital of France is"
COUNTING = "1, 2, 3, 4,"


def streamed_texts(client: openai.OpenAI, choices: int = 1, **request: object) -> list[str]:
    texts = [""] * choices
    for chunk in client.completions.create(model=MODEL, stream=True, **request):
        assert chunk.object == "text_completion"
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


def test_an_answer_has_openais_shape(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(model=MODEL, prompt=FRANCE, max_tokens=5, temperature=0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL
    assert answer.created > 1_700_000_000
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == length_of(server, FRANCE)
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


@pytest.mark.parametrize("prompt", [FRANCE, COUNTING, "def add(a, b):"])
def test_usage_counts_the_tokens_of_prompt_and_text(client: openai.OpenAI, server: RunningServer, prompt: str) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, temperature=0, logit_bias=END_TOKENS)
    assert answer.usage is not None
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == length_of(server, prompt)
    assert answer.usage.completion_tokens == 20 == length_of(server, answer.choices[0].text)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 5}])
@pytest.mark.parametrize("prompt", [FRANCE, "Once upon a time"])
def test_a_stream_has_the_same_text_as_the_whole(
    client: openai.OpenAI, prompt: str, sampling: dict[str, float]
) -> None:
    request = {"prompt": prompt, "max_tokens": 30, **sampling}
    whole = client.completions.create(model=MODEL, **request)
    assert streamed_texts(client, **request) == [whole.choices[0].text]


def test_a_stream_ends_with_usage_and_done(server: RunningServer) -> None:
    body = {"prompt": FRANCE, "max_tokens": 4, "temperature": 0, "stream_options": {"include_usage": True}}
    *chunks, last, done = all_events(server, COMPLETIONS, body)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens"] == length_of(server, FRANCE)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_a_stream_without_the_option_has_no_usage(server: RunningServer) -> None:
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}, {"stream_options": {}}):
        *chunks, done = all_events(server, COMPLETIONS, {"prompt": FRANCE, "max_tokens": 2, **options})
        assert done == "[DONE]"
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("8", " 5, 6, 7, "),
        (["8"], " 5, 6, 7, "),
        (["9", "7", "8"], " 5, 6, "),
        (", 7, 8", " 5, 6"),  # several tokens
        ("6, 7, 8, 9, x", " 5, 6, 7, 8, 9, 10,"),  # held back for long, then released
        (" ", ""),  # the very first token
        ([" 5, 6, 7"], ""),
        ([f"{number}x" for number in range(200)] + ["7"], " 5, 6, "),
        (["", "7"], " 5, 6, "),
        ("\0", " 5, 6, 7, 8, 9, 10,"),
    ],
)
def test_stop_strings(client: openai.OpenAI, stop: str | list[str], expected: str) -> None:
    request = {"prompt": COUNTING, "max_tokens": 19, "temperature": 0, "stop": stop}
    (choice,) = client.completions.create(model=MODEL, **request).choices
    assert choice.text == expected
    assert choice.finish_reason == ("length" if expected.endswith("10,") else "stop")
    assert streamed_texts(client, **request) == [expected]


def test_choices_are_numbered_and_differ(client: openai.OpenAI) -> None:
    request = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1, "seed": 11, "n": 3}
    answer = client.completions.create(model=MODEL, **request)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    assert streamed_texts(client, choices=3, **request) == texts
    second = client.completions.create(model=MODEL, **{**request, "n": 1, "seed": 12})
    assert second.choices[0].text == texts[1]


@pytest.mark.parametrize("seed", [-2, -3, 2**32 - 2, 2**63 - 2])
def test_choices_differ_for_any_seed(client: openai.OpenAI, seed: int) -> None:
    request = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1, "top_p": 1, "seed": seed, "n": 4}
    answer = client.completions.create(model=MODEL, **request)
    assert len({choice.text for choice in answer.choices}) == 4


def test_a_seed_repeats_the_answer_and_none_does_not(client: openai.OpenAI) -> None:
    def texts(**seed: int) -> set[str]:
        request = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 1.2, **seed}
        return {client.completions.create(model=MODEL, **request).choices[0].text for _ in range(3)}

    assert len(texts(seed=1)) == 1
    assert len(texts()) == 3
    assert len(texts(seed=-1)) == 3


def test_several_prompts_are_answered_in_order(client: openai.OpenAI, server: RunningServer) -> None:
    prompts = [FRANCE, COUNTING]
    request = {"max_tokens": 6, "temperature": 0}
    alone = [client.completions.create(model=MODEL, prompt=prompt, **request).choices[0].text for prompt in prompts]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2, **request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(length_of(server, prompt) for prompt in prompts)
    assert answer.usage.completion_tokens == 24
    assert streamed_texts(client, choices=4, prompt=prompts, n=2, **request) == [c.text for c in answer.choices]


def test_token_ids_are_the_same_prompt_as_their_text(client: openai.OpenAI, server: RunningServer) -> None:
    request = {"max_tokens": 6, "temperature": 0}
    tokens = [tokens_of(server, FRANCE), tokens_of(server, COUNTING)]
    texts = [client.completions.create(model=MODEL, prompt=p, **request).choices[0].text for p in (FRANCE, COUNTING)]
    one = client.completions.create(model=MODEL, prompt=tokens[0], **request)
    assert [choice.text for choice in one.choices] == texts[:1]
    two = client.completions.create(model=MODEL, prompt=tokens, **request)
    assert [choice.text for choice in two.choices] == texts


@pytest.mark.parametrize("as_tokens", [False, True])
def test_echo_puts_the_prompt_before_each_answer(client: openai.OpenAI, server: RunningServer, as_tokens: bool) -> None:
    texts = ["naïve 🎉 你好", FRANCE]
    prompts = [tokens_of(server, text) for text in texts] if as_tokens else texts
    request = {"prompt": prompts, "max_tokens": 3, "temperature": 0, "n": 2}
    plain = client.completions.create(model=MODEL, **request)
    echoed = client.completions.create(model=MODEL, echo=True, **request)
    expected = [texts[choice.index // 2] + choice.text for choice in plain.choices]
    assert [choice.text for choice in echoed.choices] == expected
    assert echoed.usage == plain.usage or echoed.usage.completion_tokens == plain.usage.completion_tokens
    assert streamed_texts(client, choices=4, echo=True, **request) == expected


@pytest.mark.parametrize("text", ["🎉", "你好"])
def test_characters_of_several_tokens_come_whole(client: openai.OpenAI, server: RunningServer, text: str) -> None:
    tokens = tokens_of(server, text)
    assert len(tokens) > 2
    request = {
        "prompt": text * 6,
        "max_tokens": 12,
        "temperature": 0,
        "logit_bias": dict.fromkeys(map(str, tokens), 100),
    }
    whole = client.completions.create(model=MODEL, **request).choices[0].text
    assert whole == text * (12 // len(tokens))
    pieces = [c.choices[0].text for c in client.completions.create(model=MODEL, stream=True, **request)]
    assert "".join(pieces) == whole
    assert not any("�" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end(client: openai.OpenAI, server: RunningServer) -> None:
    first, *_ = tokens_of(server, "🎉")
    request = {"prompt": FRANCE, "max_tokens": 1, "temperature": 0, "logit_bias": {str(first): 100}}
    assert client.completions.create(model=MODEL, **request).choices[0].text.strip() == "�"
    assert "".join(streamed_texts(client, **request)).strip() == "�"


def test_logit_bias_forces_and_forbids(client: openai.OpenAI, server: RunningServer) -> None:
    (paris,) = tokens_of(server, " Paris")
    (berlin,) = tokens_of(server, " Berlin")

    def answer(bias: dict[str, int]) -> str:
        request = {"prompt": FRANCE, "max_tokens": 1, "temperature": 0, "logit_bias": bias}
        return client.completions.create(model=MODEL, **request).choices[0].text

    assert answer({}) == " Paris"
    assert answer({str(berlin): 100}) == " Berlin"
    assert answer({str(paris): -100}) != " Paris"


def test_an_end_token_ends_the_answer_and_is_not_counted(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, logit_bias={"2": 100})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37, 1e-39, 1e-44, 1e-300])
def test_any_tiny_temperature_is_greedy(client: openai.OpenAI, temperature: float) -> None:
    request = {"prompt": FRANCE, "max_tokens": 4, "seed": 1, "top_p": 1}
    greedy = client.completions.create(model=MODEL, temperature=0, **request).choices[0].text
    assert client.completions.create(model=MODEL, temperature=temperature, **request).choices[0].text == greedy


@pytest.mark.parametrize("limit", [{"max_tokens": -1}, {"max_tokens": None}, {}, {"max_tokens": 2**62}])
def test_without_a_limit_the_context_is_the_limit(small_server: RunningServer, limit: dict[str, int | None]) -> None:
    answer = small_server.post(COMPLETIONS, {**ENDLESS, **limit}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 96


def test_the_longest_prompt_that_fits_gets_one_token(small_server: RunningServer) -> None:
    answer = small_server.post(COMPLETIONS, {"prompt": [504] * 95, "logit_bias": END_TOKENS}).json()
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (95, 1)
    message = assert_error(
        small_server.post(COMPLETIONS, {"prompt": [504] * 96}), 400, "context_length_exceeded", "prompt"
    )
    assert "maximum context length is 96 tokens" in message
    assert "96 tokens, and the answer" in message


def test_the_alias_with_a_slash_names_the_model(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="org/starter", prompt=FRANCE, max_tokens=1)
    assert answer.model == MODEL


def test_fields_without_effect_are_named_in_a_header(server: RunningServer) -> None:
    body = {"prompt": FRANCE, "max_tokens": 1, "best_of": 1, "guidance_scale": 2, "user": "me", "zz": None, "a b": 1}
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 200
    assert response.headers["x-llamaserve-ignored"] == "best_of, a?b, guidance_scale"
    assert "x-llamaserve-ignored" not in server.post(COMPLETIONS, {"prompt": FRANCE, "max_tokens": 1}).headers


@pytest.mark.parametrize("field", [{"tools": [{}]}, {"functions": [{"name": "f"}]}])
def test_what_is_not_offered_is_refused(server: RunningServer, field: dict[str, object]) -> None:
    for extra in ({}, {"stream": True}):
        response = server.post(COMPLETIONS, {"prompt": FRANCE, **extra, **field})
        assert_error(response, 400, "unsupported_parameter", next(iter(field)))


def test_what_is_not_offered_may_be_switched_off(server: RunningServer) -> None:
    off = {"suffix": None, "logprobs": None, "tools": [], "response_format": {"type": "text"}, "grammar_string": ""}
    assert server.post(COMPLETIONS, {"prompt": FRANCE, "max_tokens": 1, **off}).status_code == 200
