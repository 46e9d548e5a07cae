"""Filling in the middle, on the starter model with other names for some of its control tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import COMPLETIONS, all_events, assert_error, streamed, tokens_of, unanswered
from fim_model import MIDDLE, PAD, PREFIX, REPOSITORY, SEPARATOR, SUFFIX, write_fim_model
from running_server import RunningServer, wait_until

FIM = "/v1/fim/completions"
INFILL = "/infill"
BEFORE = "def area(width, height):\n    result = "
AFTER = "\n    return result\n"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
CURSOR: dict[str, Any] = {
    "input_prefix": "def area(width, height):\n",
    "prompt": "    result = ",
    "input_suffix": AFTER,
}
CONTEXT = 256


@pytest.fixture(scope="module")
def coder(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a model that can fill in the middle."""
    folder = tmp_path_factory.mktemp("coder")
    write_fim_model(starter_model, folder / "coder.gguf")
    models = folder / "models.yaml"
    models.write_text(
        f"defaults: {{context: {CONTEXT}, parallel: 2, flash_attention: off}}\n"
        f"models:\n  coder: {{source: 'file:{folder / 'coder.gguf'}'}}\n"
        f"  vectors: {{source: 'file:{folder / 'coder.gguf'}', task: embedding}}\n"
    )
    with RunningServer("serve", "coder", "--models-file", str(models)) as running:
        yield running


@pytest.fixture
def sdk(coder: RunningServer) -> Iterator[openai.OpenAI]:
    """The openai SDK, pointed at that server."""
    with openai.OpenAI(base_url=coder.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def answered(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def plain_tokens(server: RunningServer, text: str) -> list[int]:
    """Return the tokens of a text in which no name is a control token."""
    response = server.post("/v1/internal/encode", {"text": text, "parse_special": False})
    response.raise_for_status()
    return [int(token) for token in response.json()["tokens"]]


def around(server: RunningServer, before: str, after: str) -> list[int]:
    """Return the tokens that the model must see."""
    return [PREFIX, *plain_tokens(server, before), SUFFIX, *plain_tokens(server, after), MIDDLE]


# ---- suffix of completions


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BEFORE, AFTER),
        ("", "x"),
        ("héllo 😀", "\n"),
        ("<|fim_suffix|>no<|fim_middle|>", "<|fim_prefix|><|endoftext|>"),
        ("<fim_suffix>", "<|repo_name|>"),
    ],
)
def test_the_model_sees_prefix_suffix_and_the_marks(
    sdk: openai.OpenAI, coder: RunningServer, before: str, after: str
) -> None:
    tokens = around(coder, before, after)
    answer = sdk.completions.create(model="coder", prompt=before, suffix=after, **GREEDY)
    same = sdk.completions.create(model="coder", prompt=tokens, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.choices[0].text == same.choices[0].text
    scored = sdk.completions.create(model="coder", prompt=before, suffix=after, echo=True, logprobs=0, **GREEDY)
    assert scored.choices[0].logprobs is not None
    decoded = coder.post("/v1/internal/decode", {"tokens": tokens}).json()["text"]
    assert scored.choices[0].text == decoded + answer.choices[0].text
    expected = sdk.completions.create(model="coder", prompt=tokens, echo=True, logprobs=0, **GREEDY)
    assert expected.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == expected.choices[0].logprobs.token_logprobs


def test_an_echo_is_the_prompt(sdk: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "coder", "prompt": BEFORE, "suffix": AFTER, **GREEDY}
    text = sdk.completions.create(**request).choices[0].text
    assert sdk.completions.create(echo=True, **request).choices[0].text == BEFORE + text
    scored = sdk.completions.create(logprobs=2, **request).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.tokens is not None
    assert "".join(scored.logprobs.tokens) == scored.text == text


def test_a_suffix_is_for_each_prompt(sdk: openai.OpenAI, coder: RunningServer) -> None:
    prompts = [BEFORE, "for i in ", "print("]
    together = sdk.completions.create(model="coder", prompt=prompts, suffix=AFTER, **GREEDY)
    alone = [sdk.completions.create(model="coder", prompt=prompt, suffix=AFTER, **GREEDY) for prompt in prompts]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    tokens = [tokens_of(coder, prompt) for prompt in prompts]
    of_tokens = sdk.completions.create(model="coder", prompt=tokens, suffix=AFTER, **GREEDY)
    assert [choice.text for choice in of_tokens.choices] == [choice.text for choice in together.choices]
    assert of_tokens.usage is not None
    assert together.usage is not None
    assert of_tokens.usage.prompt_tokens == together.usage.prompt_tokens


def test_a_stream_has_the_same_text_as_the_whole(sdk: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "coder", "prompt": BEFORE, "suffix": AFTER, "max_tokens": 20, "seed": 3}
    request["logit_bias"] = {"0": -100, "2": -100}
    whole = sdk.completions.create(**request).choices[0].text
    assert "".join(c.choices[0].text for c in sdk.completions.create(stream=True, **request)) == whole


@pytest.mark.parametrize("token", [PAD, SEPARATOR, REPOSITORY, 0])
def test_tokens_of_another_file_end_the_filling(coder: RunningServer, token: int) -> None:
    body = {"prompt": BEFORE, "suffix": AFTER, "temperature": 0, "max_tokens": 5, "logit_bias": {str(token): 100}}
    answer = answered(coder, COMPLETIONS, body)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize(
    ("before", "after"), [("x = 1\n" * 400, AFTER), (BEFORE, "y = 2\n" * 400), ("x\n" * 999, "y\n" * 999)]
)
def test_what_does_not_fit_is_cut_and_counted(coder: RunningServer, before: str, after: str) -> None:
    body = {"prompt": before, "suffix": after, "temperature": 0, "max_tokens": 12}
    usage = answered(coder, COMPLETIONS, body)["usage"]
    assert usage["prompt_tokens"] == CONTEXT - 12
    lost = len(around(coder, before, after)) - usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["truncated_tokens"] == lost
    limited = answered(coder, COMPLETIONS, body | {"truncation_length": 50, "max_tokens": 4})["usage"]
    assert limited["prompt_tokens"] == 46


def test_a_suffix_may_be_put_behind_the_answer(server: RunningServer, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "starter", "prompt": "The capital of France is", **GREEDY}
    plain = client.completions.create(**request)
    behind: dict[str, Any] = {"suffix": " END", "extra_body": {"suffix_mode": "append"}}
    answer = client.completions.create(**request, **behind)
    assert answer.choices[0].text == plain.choices[0].text + " END"
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    echoed = client.completions.create(**request, **behind, echo=True, logprobs=1).choices[0]
    assert echoed.text == "The capital of France is" + answer.choices[0].text
    chunks = list(client.completions.create(**request, **behind, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert (chunks[-1].choices[0].text, chunks[-1].choices[0].finish_reason) == (" END", "length")


def test_a_mode_without_a_suffix_has_no_effect(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 1, "suffix_mode": "append"}
    assert server.post(COMPLETIONS, body).headers["x-llamaserve-ignored"] == "suffix_mode"
    assert_error(server.post(COMPLETIONS, body | {"suffix_mode": "other"}), 400, None, "suffix_mode")


# ---- models that can't


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETIONS, {"prompt": "a", "suffix": "b"}), (FIM, {"prompt": "a", "suffix": "b"}), (INFILL, CURSOR)],
)
def test_a_model_without_the_tokens_says_so(
    server: RunningServer, path: str, body: dict[str, Any], stream: bool
) -> None:
    response = server.post(path, body | {"stream": stream})
    assert response.status_code == 501
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("not_supported_error", "not_supported")
    assert "smollm2-135m can't fill in the middle" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "a"}),
        (FIM, {"prompt": "a"}),
        (FIM, {"prompt": "a", "suffix": "b"}),
        (INFILL, CURSOR),
        ("/v1/internal/logits", {"prompt": "a"}),
    ],
)
def test_a_model_that_writes_nothing_is_refused_by_the_field_that_names_it(
    coder: RunningServer, path: str, body: dict[str, Any], stream: bool
) -> None:
    response = coder.post(path, body | {"stream": stream, "model": "vectors"})
    assert "makes embeddings" in assert_error(response, 400, "model_not_capable", "model")


@pytest.mark.parametrize("path", [COMPLETIONS, FIM])
@pytest.mark.parametrize("suffix", [None, ""])
def test_without_a_suffix_any_model_goes_on(server: RunningServer, path: str, suffix: str | None) -> None:
    choice = answered(server, path, {"prompt": "The capital of France is", "suffix": suffix, **GREEDY})["choices"][0]
    assert (choice["text"] if path == COMPLETIONS else choice["message"]["content"]).startswith(" Paris")


def test_models_tell_whether_they_can(server: RunningServer, coder: RunningServer) -> None:
    assert coder.get("/v1/models/coder")["capabilities"]["fim"] is True
    assert server.get("/v1/models/starter")["capabilities"]["fim"] is False


# ---- Mistral's endpoint


def test_fim_completions_answer_as_a_chat_does(coder: RunningServer, sdk: openai.OpenAI) -> None:
    body = {"model": "coder", "prompt": BEFORE, "suffix": AFTER, "max_tokens": 8, "random_seed": 7, "n": 2}
    answer = answered(coder, FIM, body)
    expected = sdk.completions.create(model="coder", prompt=BEFORE, suffix=AFTER, max_tokens=8, seed=7, n=2)
    assert (answer["object"], answer["model"], answer["seed"]) == ("chat.completion", "coder", 7)
    assert [choice["message"]["content"] for choice in answer["choices"]] == [each.text for each in expected.choices]
    assert [choice["message"]["role"] for choice in answer["choices"]] == ["assistant", "assistant"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert expected.usage is not None
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_continue_can_read_a_stream_of_fim_completions(coder: RunningServer) -> None:
    """It adds up ``choices[0].delta.content`` of every event without a look, and sends null for what is not set."""
    body = {
        "model": "coder",
        "prompt": BEFORE,
        "suffix": AFTER,
        "max_tokens": 8,
        "temperature": 0.01,
        "top_p": None,
        "frequency_penalty": None,
        "presence_penalty": None,
        "stop": ["\n\n", "/src/", "#- coding", "```"],
        "seed": 1,
    }
    *chunks, done = all_events(coder, FIM, body)
    assert done == "[DONE]"
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    whole = answered(coder, FIM, body)["choices"][0]
    assert text == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    *_, last, _ = all_events(coder, FIM, body | {"stream_options": {"include_usage": True}})
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], len(around(coder, BEFORE, AFTER)))


# ---- llama-server's endpoint


def test_an_infill_has_llama_servers_fields(coder: RunningServer) -> None:
    extra = [{"filename": "a.py", "text": "one = 1\n", "time": 5}, {"text": "<|file_sep|>two"}]
    answer = answered(coder, INFILL, CURSOR | {"n_predict": 8, "temperature": 0, "input_extra": extra, "seed": 5})
    assert answer["prompt"] == (
        "<|repo_name|>project\n<|file_sep|>a.py\none = 1\n<|file_sep|>snippet\n<|file_sep|>two\n<|file_sep|>current\n"
        f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"
    )
    tokens = tokens_of(coder, answer["prompt"])
    assert answer["tokens_evaluated"] == len(tokens) + len(plain_tokens(coder, "<|file_sep|>")) - 1
    assert (answer["index"], answer["stop"], answer["model"], answer["id_slot"]) == (0, True, "coder", -1)
    assert (answer["truncated"], answer["stopping_word"]) == (False, "")
    assert answer["has_new_line"] == ("\n" in answer["content"])
    assert answer["generation_settings"]["seed"] == 5
    assert answer["generation_settings"]["n_predict"] == 8
    timings = answer["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == answer["tokens_evaluated"]
    assert timings["predicted_n"] == answer["tokens_predicted"]
    assert timings["prompt_ms"] > 0
    assert timings["prompt_per_second"] == pytest.approx(timings["prompt_n"] / timings["prompt_ms"] * 1000)
    assert timings["predicted_per_token_ms"] == pytest.approx(timings["predicted_ms"] / timings["predicted_n"])


def test_an_infill_fills_in_what_a_completion_does(coder: RunningServer, sdk: openai.OpenAI) -> None:
    answer = answered(coder, INFILL, CURSOR | {"n_predict": 20, "temperature": 0})
    expected = sdk.completions.create(model="coder", prompt=BEFORE, suffix=AFTER, temperature=0, max_tokens=20)
    assert answer["content"] == expected.choices[0].text
    assert expected.usage is not None
    assert answer["tokens_evaluated"] == expected.usage.prompt_tokens
    assert answer["tokens_predicted"] == expected.usage.completion_tokens


def test_a_stream_of_an_infill_ends_with_the_whole_answer(coder: RunningServer) -> None:
    body = CURSOR | {"n_predict": 12, "seed": 4, "ignore_eos": True}
    whole = answered(coder, INFILL, body)
    *pieces, last = all_events(coder, INFILL, body)
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert all(piece["stop"] is False for piece in pieces)
    assert (last["stop"], last["content"], last["stop_type"], last["tokens_predicted"]) == (True, "", "limit", 12)
    assert set(last) == set(whole)
    *pieces, last = all_events(coder, INFILL, body | {"response_fields": ["stop", "timings/predicted_n"]})
    assert all("content" in piece for piece in pieces), "the fields are those of the last event"
    assert last == {"stop": True, "timings/predicted_n": 12}


# What the editors' plugins send, as written.
VIM: dict[str, Any] = {
    **CURSOR,
    "id_slot": 0,
    "input_extra": [{"filename": "a.py", "text": "one = 1\n", "time": [0, 5]}],
    "n_predict": 16,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.90,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 20_000,
    "t_max_predict_ms": 250,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
VIM_WARMING: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "prompt": "",
    "input_extra": VIM["input_extra"],
    "n_predict": 0,
    "temperature": 0.0,
    "stream": False,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
CODE: dict[str, Any] = {
    **CURSOR,
    "input_extra": [{"filename": "b.py", "text": "two = 2\n", "time": 5}],
    "n_predict": 16,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 20_000,
    "t_max_predict_ms": 2500,
}


def test_llama_vim_is_served(coder: RunningServer) -> None:
    warmed = coder.post(INFILL, VIM_WARMING)
    assert (warmed.status_code, warmed.json()) == (200, {})
    response = coder.post(INFILL, VIM)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == VIM["response_fields"]
    assert answer["tokens_cached"] > len(plain_tokens(coder, "one = 1\n"))
    assert "samplers.infill" in response.headers["x-llamaserve-ignored"].split(", ")
    assert "n_indent" not in response.headers["x-llamaserve-ignored"]


def test_llama_vscode_is_served(coder: RunningServer) -> None:
    empty = {
        "input_prefix": "",
        "input_suffix": "",
        "prompt": "",
        "n_predict": 0,
        "samplers": [],
        "t_max_predict_ms": 1,
    }
    warmed = answered(coder, INFILL, {key: value for key, value in CODE.items() if not key.startswith("top")} | empty)
    assert (warmed["content"], warmed["tokens_predicted"], warmed["stop_type"]) == ("", 0, "limit")
    answer = answered(coder, INFILL, CODE)
    assert answer["tokens_cached"] == answer["timings"]["cache_n"] >= warmed["tokens_evaluated"] - 3
    assert answer["timings"]["predicted_n"] > 0
    assert {"content", "generation_settings", "tokens_cached", "truncated", "timings"} <= set(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_an_infill_tells_why_it_ended(coder: RunningServer, stream: bool) -> None:
    def end(**body: object) -> tuple[str, str, str]:
        request = CURSOR | {"n_predict": 20, "stream": stream} | body
        if not stream:
            answer = answered(coder, INFILL, request)
            return answer["content"], answer["stop_type"], answer["stopping_word"]
        *pieces, last = all_events(coder, INFILL, request)
        return "".join(piece["content"] for piece in pieces), last["stop_type"], last["stopping_word"]

    assert end(grammar='root ::= "one, two"', stop=["nine", ", t"]) == ("one", "word", ", t")
    assert end(grammar='root ::= "one, two"', stop=["two, three"]) == ("one, two", "eos", "")
    assert end(grammar='root ::= "1" [1]*', n_predict=5)[1:] == ("limit", "")
    assert end(grammar='root ::= "a\\n    b\\n\\n  c\\n    d"', n_indent=3) == ("a\n    b", "limit", "")
    assert end(grammar='root ::= "a\\n    b\\n"', n_indent=3) == ("a\n    b\n", "eos", "")


def test_time_for_an_answer_is_up_once_it_has_a_line(coder: RunningServer) -> None:
    body = CURSOR | {"t_max_predict_ms": 1, "n_predict": 200, "temperature": 0, "ignore_eos": True}
    answer = answered(coder, INFILL, body | {"grammar": 'root ::= "a\\n" [b]+'})
    assert answer["content"].startswith("a\nb"[: len(answer["content"])])
    assert answer["stop_type"] == "limit"
    assert answer["tokens_predicted"] < 100
    answer = answered(coder, INFILL, body | {"grammar": "root ::= [b]+", "n_predict": 30})
    assert answer["tokens_predicted"] == 30


def test_time_for_the_prompt_may_be_up_but_it_gets_further_each_time(starter_model: Path, tmp_path: Path) -> None:
    write_fim_model(starter_model, tmp_path / "coder.gguf")
    models = tmp_path / "models.yaml"
    models.write_text(
        "defaults: {context: 4096, batch: 64, parallel: 1, flash_attention: off}\n"
        f"models:\n  coder: {{source: 'file:{tmp_path / 'coder.gguf'}'}}\n"
    )
    lines = "".join(f"value_{n} = {n}\n" for n in range(450))
    body = CURSOR | {"input_prefix": lines, "n_predict": 9, "t_max_prompt_ms": 1}
    with RunningServer("serve", "coder", "--models-file", str(models)) as server:
        answers = [
            answered(server, INFILL, body),
            all_events(server, INFILL, body | {"stream": True})[-1],
            answered(server, INFILL, body),
        ]
    for answer in answers:
        assert (answer["content"], answer["stop_type"], answer["tokens_predicted"]) == ("", "limit", 0)
        timings = answer["timings"]
        assert timings["prompt_n"] + answer["tokens_cached"] == answer["tokens_evaluated"] < 450 * 8
        assert timings["prompt_per_second"] == pytest.approx(timings["prompt_n"] / timings["prompt_ms"] * 1000)
    for before, after in pairwise(answers):
        assert after["tokens_cached"] >= before["tokens_evaluated"] - 1
        assert after["tokens_evaluated"] > before["tokens_evaluated"] > 0


def test_a_prompt_that_is_late_with_its_last_step_is_answered(coder: RunningServer) -> None:
    answer = answered(coder, INFILL, CURSOR | {"n_predict": 3, "t_max_prompt_ms": 1, "ignore_eos": True})
    assert (answer["tokens_predicted"], answer["tokens_evaluated"]) == (3, len(around(coder, BEFORE, AFTER)))


def test_an_infill_that_does_not_fit_is_cut(coder: RunningServer) -> None:
    lines = "".join(f"value_{n} = {n}\n" for n in range(200))
    extra = [{"filename": f"{n}.py", "text": f"extra_{n} = {n}\n" * 9} for n in range(9)]
    body = CURSOR | {"input_prefix": lines, "n_predict": 20, "temperature": 0, "input_extra": extra}
    answer = answered(coder, INFILL, body)
    assert answer["truncated"] is True
    assert answer["tokens_evaluated"] <= CONTEXT - 20
    assert answer["prompt"].startswith("<|repo_name|>project\n<|file_sep|>")
    assert f"value_199 = 199\n    result = <|fim_suffix|>{AFTER}<|fim_middle|>" in answer["prompt"]
    assert "extra_8 = 8\n<|file_sep|>current" in answer["prompt"]
    assert "extra_0" not in answer["prompt"]


def test_an_infill_takes_texts_that_are_far_too_long(coder: RunningServer) -> None:
    long = "x = 1\n" * 300_000
    body = CURSOR | {"input_suffix": long, "input_extra": [{"text": long}] * 2, "n_predict": 2, "temperature": 0}
    answered(coder, INFILL, CURSOR | {"n_predict": 1})
    start = time.monotonic()
    answer = answered(coder, INFILL, body | {"input_prefix": long})
    assert time.monotonic() - start < 10
    assert answer["truncated"] is True
    assert answer["tokens_evaluated"] == CONTEXT - 2
    assert "x = 1\n    result = <|fim_suffix|>x = 1" in answer["prompt"]
    usage = answered(coder, COMPLETIONS, {"prompt": long, "suffix": long, "max_tokens": 2})["usage"]
    assert usage["prompt_tokens"] == CONTEXT - 2
    least = 2 * len(long) / 16 - CONTEXT
    assert least <= usage["prompt_tokens_details"]["truncated_tokens"] <= 2 * len(long)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (INFILL, CURSOR | {"n_predict": 400, "t_max_predict_ms": 60_000, "ignore_eos": True}),
        (FIM, {"prompt": BEFORE, "suffix": AFTER, "max_tokens": 400, "ignore_eos": True}),
        (COMPLETIONS, {"prompt": BEFORE, "suffix": AFTER, "max_tokens": 400, "ignore_eos": True}),
    ],
)
def test_hanging_up_ends_the_generation(coder: RunningServer, path: str, body: dict[str, Any], stream: bool) -> None:
    if stream:
        with streamed(coder, path, body) as events:
            next(events)
            assert coder.running == 1
    else:
        with unanswered(coder, path, body):
            wait_until(lambda: coder.running == 1)
    wait_until(lambda: coder.running == 0, 2)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": None}, "input_suffix"),
        ({"input_prefix": ["a"]}, "input_prefix"),
        ({"prompt": 5}, "prompt"),
        ({"input_extra": "a"}, "input_extra"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"input_extra": [{"text": "a", "filename": 5}]}, "input_extra[0].filename"),
        ({"input_extra": [{"text": "a"}] * 1025}, "input_extra"),
        ({"n_indent": -1}, "n_indent"),
        ({"t_max_predict_ms": "soon"}, "t_max_predict_ms"),
        ({"response_fields": ["a"] * 300}, "response_fields"),
        ({"samplers": ["top_k", "infil"]}, "samplers"),
        ({"n_predict": -2}, "n_predict"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_infills_are_refused(coder: RunningServer, change: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = coder.post(INFILL, CURSOR | {"n_predict": 1, "stream": stream} | change)
        assert_error(response, 400, "unsupported_parameter" if "n" in change else None, param)


@pytest.mark.parametrize("name", ["input_prefix", "input_suffix", "prompt"])
def test_half_a_surrogate_pair_is_no_text(coder: RunningServer, name: str) -> None:
    fields = {"input_prefix": '"a"', "input_suffix": '"b"', "prompt": '"c"', name: '"\\ud800"'}
    data = "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}"
    assert_error(httpx.post(coder.url + INFILL, content=data, timeout=30), 400, None, name)


def test_what_has_no_effect_on_an_infill_is_named(coder: RunningServer) -> None:
    body = CURSOR | {"n_predict": 1, "cache_prompt": False, "id_slot": 3, "zzz": 1, "samplers": ["top_k", "infill"]}
    ignored = coder.post(INFILL, body).headers["x-llamaserve-ignored"].split(", ")
    assert {"cache_prompt", "id_slot", "zzz", "samplers.infill"} <= set(ignored)
    assert_error(coder.post(INFILL, body | {"strict": True}), 400, "unsupported_parameter", "zzz")
