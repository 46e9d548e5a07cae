"""Log-probabilities on the wire, as the openai SDK sees them, and the seed API's map of the next token."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, MODEL, all_events, assert_error, length_of
from running_server import RunningServer

from llamaserve.api.logprobs import Echo, for_chat, for_completion, probabilities
from llamaserve.engine.events import TokenLogprob, TokenLogprobs

_FRANCE = "The capital of France is"
_HELLO = [{"role": "user", "content": "Say hello."}]
_LOGITS = "/v1/internal/logits"


# Chat


@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_chat_answer_has_those_of_each_token(client: openai.OpenAI, count: int) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=_HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=count
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert answer.usage is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert (
        bytes(byte for each in choice.logprobs.content for byte in each.bytes or ()).decode() == choice.message.content
    )
    for each in choice.logprobs.content:
        assert each.logprob <= 0
        assert len(each.top_logprobs) == count
        assert [other.logprob for other in each.top_logprobs] == sorted(
            (other.logprob for other in each.top_logprobs), reverse=True
        )
        if count:  # the most probable token is the one that is taken
            assert (each.token, each.logprob) == (each.top_logprobs[0].token, each.top_logprobs[0].logprob)


def test_a_chat_stream_carries_the_same(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": _HELLO, "max_tokens": 12, "temperature": 1, "seed": 4, "n": 2}
    request |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request)
    texts: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.content or []
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert choice.logprobs is not None
        assert [each.model_dump() for each in tokens[choice.index]] == [
            each.model_dump() for each in choice.logprobs.content or []
        ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
    ],
)
def test_what_makes_no_sense_in_a_chat(server: RunningServer, body: dict[str, Any], param: str) -> None:
    assert_error(server.post(CHAT, {"messages": _HELLO, **body}), 400, None, param)


def test_without_asking_there_are_none(server: RunningServer) -> None:
    for body in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": None}, {"top_logprobs": 0}):
        answer = server.post(CHAT, {"messages": _HELLO, "max_tokens": 2, **body}).json()
        assert answer["choices"][0]["logprobs"] is None


# Completions


def _completion(server: RunningServer, **body: Any) -> dict[str, Any]:
    response = server.post(COMPLETIONS, {"prompt": _FRANCE, "temperature": 0, "max_tokens": 5, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_a_completion_has_openais_lists(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=_FRANCE, max_tokens=5, temperature=0, logprobs=3)
    (choice,) = answer.choices
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:number])) for number in range(5)]
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())


def test_ids_tell_what_texts_can_not(server: RunningServer) -> None:
    found = _completion(server, logprobs=4)["logprobs"]
    for top, ids in zip(found["top_logprobs"], found["top_logprobs_ids"], strict=True):
        assert sorted(top.values()) == sorted(ids.values())
        for text, token in zip(top, ids, strict=True):
            assert server.post("/v1/internal/decode", {"tokens": [int(token)]}).json()["text"] == text


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_an_echoed_prompt_is_scored(server: RunningServer, max_tokens: int) -> None:
    choice = _completion(server, logprobs=2, echo=True, max_tokens=max_tokens)
    found = choice["logprobs"]
    count = length_of(server, _FRANCE) + max_tokens
    assert {len(each) for each in found.values()} == {count}
    assert "".join(found["tokens"]) == choice["text"]
    assert choice["text"].startswith(_FRANCE)
    assert [found[name][0] for name in ("token_logprobs", "top_logprobs", "top_logprobs_ids")] == [None] * 3
    assert all(logprob <= 0 for logprob in found["token_logprobs"][1:])
    assert found["text_offset"] == [len("".join(found["tokens"][:number])) for number in range(count)]
    again = _completion(server, logprobs=2, max_tokens=max_tokens)["logprobs"]
    start = length_of(server, _FRANCE)
    assert found["tokens"][start:] == again["tokens"]
    for one, other in zip(found["token_logprobs"][start:], again["token_logprobs"], strict=True):
        assert abs(one - other) < 1e-4  # the exact level


def test_scoring_tells_sense_from_nonsense(server: RunningServer) -> None:
    def score(text: str) -> float:
        found = _completion(server, prompt=text, logprobs=0, echo=True, max_tokens=0)["logprobs"]
        return sum(found["token_logprobs"][1:]) / len(found["token_logprobs"])

    assert score("The sky is blue and the grass is green.") > score("Green sky the the is blue grass and is.") + 1


def test_several_prompts_are_scored_each(server: RunningServer) -> None:
    body = {"prompt": ["The cat sat", "On the mat there"], "logprobs": 1, "echo": True, "max_tokens": 0, "n": 2}
    answer = server.post(COMPLETIONS, body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["The cat sat"] * 2 + ["On the mat there"] * 2
    for choice in answer["choices"]:
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 6])
def test_a_stream_of_completions_carries_the_same(server: RunningServer, echo: bool, max_tokens: int) -> None:
    body = {"prompt": [_FRANCE, "x"], "max_tokens": max_tokens, "seed": 3, "logprobs": 2, "echo": echo}
    whole = server.post(COMPLETIONS, body).json()["choices"]
    streamed: dict[int, dict[str, Any]] = {}
    for event in all_events(server, COMPLETIONS, body):
        for choice in event["choices"] if event != "[DONE]" else ():
            found = streamed.setdefault(choice["index"], {"text": "", "logprobs": {}})
            found["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                found["logprobs"].setdefault(name, []).extend(values)
    for choice in whole:
        found = streamed[choice["index"]]
        assert found["text"] == choice["text"]
        assert found["logprobs"] == (choice["logprobs"] if choice["logprobs"]["tokens"] else {})


def test_nothing_may_be_generated_at_all(server: RunningServer) -> None:
    choice = _completion(server, max_tokens=0)
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)
    assert _completion(server, max_tokens=0, echo=True)["text"] == _FRANCE


# The next token


def test_the_next_token_is_a_bare_map(server: RunningServer) -> None:
    found = server.post(_LOGITS, {"prompt": _FRANCE}).json()
    assert len(found) == 50
    assert next(iter(found)) == " Paris"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert 0.5 < sum(found.values()) <= 1
    (logprob, *_) = _completion(server, logprobs=1)["logprobs"]["token_logprobs"]
    assert math.isclose(found[" Paris"], math.exp(logprob), rel_tol=1e-3)


def test_the_next_token_after_the_samplers(server: RunningServer) -> None:
    body = {"prompt": _FRANCE, "use_samplers": True, "top_k": 3, "temperature": 2, "top_p": 1}
    raw = server.post(_LOGITS, {"prompt": _FRANCE, "top_logits": 3}).json()
    found = server.post(_LOGITS, body).json()
    assert list(found) == list(raw)
    roots = [math.sqrt(value) for value in raw.values()]
    for value, root in zip(found.values(), roots, strict=True):
        assert math.isclose(value, root / sum(roots), rel_tol=1e-3)
    assert server.post(_LOGITS, {**body, "temperature": 0}).json() == {" Paris": 1.0}
    ignoring = server.post(_LOGITS, {**body, "use_samplers": False, "top_logits": 3}).json()
    assert ignoring == raw


@pytest.mark.parametrize("count", [1, 7, 10**6])
def test_as_many_as_are_asked_for(server: RunningServer, count: int) -> None:
    found = server.post(_LOGITS, {"prompt": "x", "top_logits": count}).json()
    assert len(found) <= count
    assert count < 10 or len(found) > 40_000


def test_a_wrong_question_for_the_next_token(server: RunningServer) -> None:
    assert_error(server.post(_LOGITS, {}), 400, None, "prompt")
    for body, param in (({"prompt": ""}, "prompt"), ({"prompt": "x", "top_logits": 0}, "top_logits")):
        assert server.post(_LOGITS, body).json()["error"]["param"] == param


# Forms


def _entry(data: bytes, logprob: float, *others: tuple[bytes, float], offset: int = 0) -> TokenLogprobs:
    top = tuple(TokenLogprob(number, each, value) for number, (each, value) in enumerate(others))
    return TokenLogprobs(TokenLogprob(9, data, logprob), top, offset)


def test_half_a_character_is_written_as_its_bytes() -> None:
    entry = _entry(b"\xe2\x80", -1.0, (b"\xe2\x80", -1.0), (b"\xe2\x82", -2.0))
    assert for_chat([entry])["content"][0]["token"] == "\\xe2\\x80"
    assert for_chat([entry])["content"][0]["bytes"] == [0xE2, 0x80]
    found = for_completion([entry])
    assert found["tokens"] == ["bytes:\\xe2\\x80"]
    assert list(found["top_logprobs"][0]) == ["bytes:\\xe2\\x80", "bytes:\\xe2\\x82"]


def test_what_can_not_be_is_a_number_all_the_same() -> None:
    entry = _entry(b"a", -math.inf, (b"b", -math.inf))
    assert for_chat([entry])["content"][0]["logprob"] == -9999.0
    assert for_completion([entry])["top_logprobs"] == [{"b": -9999.0}]


def test_tokens_of_the_same_text() -> None:
    tokens = [TokenLogprob(1, b"a", math.log(0.5)), TokenLogprob(2, b"a", math.log(0.25)), TokenLogprob(3, b"\n", -1.0)]
    assert probabilities(tokens) == pytest.approx({"a": 0.75, "\\n": math.exp(-1)})
    found = for_completion([TokenLogprobs(tokens[0], tuple(tokens))])
    assert found["top_logprobs"] == [{"a": math.log(0.5), "\n": -1.0}]
    assert len(found["top_logprobs_ids"][0]) == 3


@pytest.mark.parametrize(
    ("prompt", "tokens", "text", "names", "offsets"),
    [
        ("ab", ["ab"], "ab", ["ab"], [0]),
        ("ab cd", ["ab", " cd"], "ab cd", ["ab", " cd"], [0, 2]),
        ("ab", ["<s>", "ab"], "ab", ["", "ab"], [0, 0]),
        ("<s>ab", ["<s>", "ab"], "<s>ab", ["<s>", "ab"], [0, 3]),
        ("ab cd", [" ab", " cd"], "ab cd", [" ab", " cd"], [0, 2]),  # a tokeniser's own space
        ("ab cd ef", [" cd", " ef"], " cd ef", [" cd", " ef"], [0, 3]),  # cut
        ("ab cd ef", ["<s>", " cd", " ef"], " cd ef", ["", " cd", " ef"], [0, 0, 3]),
        ("ab", [], "ab", [], []),
    ],
)
def test_an_echo_and_its_tokens(
    prompt: str, tokens: list[str], text: str, names: list[str], offsets: list[int]
) -> None:
    starts = [len("".join(tokens[:number])) for number in range(len(tokens))]
    entries = [_entry(token.encode(), -1.0, offset=start) for token, start in zip(tokens, starts, strict=True)]
    echo = Echo(prompt, entries)
    assert echo.text == text
    found = for_completion([_entry(b"!", -2.0)], echo)
    assert found["tokens"] == [*names, "!"]
    assert found["text_offset"] == [*offsets, len(text)]
    assert found["token_logprobs"] == [None, *[-1.0] * (len(tokens) - 1), -2.0][bool(not tokens) :]


def test_offsets_lead_to_the_tokens(server: RunningServer) -> None:
    for prompt, extra in (
        ("The sky is blue.", {}),
        ("<|im_start|>user\nHi<|im_end|>", {"skip_special_tokens": False}),
        ("<|im_start|> one two three four five six seven", {"truncation_length": 8}),
        ("日本 é 😀", {}),
    ):
        for stream in (False, True):
            body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0, **extra}
            if stream:
                choices = [c for e in all_events(server, COMPLETIONS, body) if e != "[DONE]" for c in e["choices"]]
            else:
                choices = server.post(COMPLETIONS, body).json()["choices"]
            text = "".join(choice["text"] for choice in choices)
            tokens = [token for choice in choices for token in (choice["logprobs"] or {"tokens": []})["tokens"]]
            offsets = [at for choice in choices for at in (choice["logprobs"] or {"text_offset": []})["text_offset"]]
            assert len(tokens) > 3
            for token, offset in zip(tokens, offsets, strict=True):
                assert token.startswith("bytes:") or text[offset:].startswith(token), (text, token, offset)
