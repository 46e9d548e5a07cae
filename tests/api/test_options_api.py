"""What a request may say beside the prompt: names and aliases, presets, and that nothing is ignored in silence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, END_TOKENS, MODEL, all_events, assert_error, tokens_of
from running_server import RunningServer

from llamaserve.api.options import GenerationOptions
from llamaserve.api.presets import Presets
from llamaserve.api.sampling_options import NOT_HONOURED, SamplingOptions
from llamaserve.engine.params import STAGES, Sampling
from llamaserve.errors import InvalidRequest, RegistryError, UnsupportedParameter

_STORY = "Once upon a time"
_IGNORED = "x-llamaserve-ignored"


def _options(**body: Any) -> GenerationOptions:
    return GenerationOptions.model_validate(body)


def _sampling(**body: Any) -> Sampling:
    return _options(**{"seed": 7, **body}).generation(Presets()).sampling


def _changes(**body: Any) -> dict[str, Any]:
    """Return what a body changes for the engine."""
    plain = _sampling()
    return {
        name: value
        for name in Sampling.__struct_fields__
        if (value := getattr(_sampling(**body), name)) != getattr(plain, name)
    }


# What a name means for the engine


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": "0.5"}, {"temperature": 0.5}),
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5, "dynatemp_exponent": 2},
            {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
        ),
        ({"dynatemp_low": 0.5, "dynatemp_high": 1.5}, {}),
        ({"temperature": 0.8, "dynatemp_range": 0.3}, {"temperature": 0.8, "dynatemp_range": 0.3}),
        ({"smoothing_factor": 0.3, "smoothing_curve": 2}, {"smoothing_factor": 0.3, "smoothing_curve": 2.0}),
        ({"top_k": -1}, {}),
        ({"top_k": 40, "top_p": 0.5, "min_p": 0.1}, {"top_k": 40, "top_p": 0.5, "min_p": 0.1}),
        ({"typical_p": 0.4}, {"typical_p": 0.4}),
        ({"typ_p": 0.4}, {"typical_p": 0.4}),
        ({"top_n_sigma": -1}, {}),
        ({"top_n_sigma": 1.5}, {"top_n_sigma": 1.5}),
        ({"top_a": 0.2, "tfs": 0.9}, {"top_a": 0.2, "tfs": 0.9}),
        ({"tfs_z": 0.9}, {"tfs": 0.9}),
        ({"epsilon_cutoff": 3, "eta_cutoff": 4}, {"epsilon_cutoff": 3.0, "eta_cutoff": 4.0}),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, {"xtc_probability": 0.5, "xtc_threshold": 0.2}),
        (
            {"mirostat_mode": 2, "mirostat_tau": 4, "mirostat_eta": 0.2},
            {"mirostat_mode": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2},
        ),
        ({"mirostat": 1}, {"mirostat_mode": 1}),
        ({"adaptive_target": -1}, {}),
        ({"adaptive_target": 0.5, "adaptive_decay": 0.8}, {"adaptive_target": 0.5, "adaptive_decay": 0.8}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"frequency_penalty": 0.5, "presence_penalty": -1}, {"frequency_penalty": 0.5, "presence_penalty": -1.0}),
        (
            {"repeat_penalty": 1.2, "repeat_last_n": 64},
            {"repetition_penalty": 1.2, "repetition_penalty_range": 64},
        ),
        (  # llama-server: the whole context; here that is 0
            {"repeat_penalty": 1.2, "repeat_last_n": -1},
            {"repetition_penalty": 1.2, "repetition_penalty_range": 0},
        ),
        ({"repeat_penalty": 1.2, "presence_penalty": 1, "repeat_last_n": 0}, {"repetition_penalty_range": 0}),
        ({"repetition_penalty_range": 0}, {"repetition_penalty_range": 0, "dry_range": 0}),
        ({"repetition_penalty_range": 99}, {"repetition_penalty_range": 99, "dry_range": 99}),
        ({"encoder_repetition_penalty": 1.1}, {"encoder_repetition_penalty": 1.1}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        (
            {"dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": -1},
            {"dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_range": 0},
        ),
        ({"dry_multiplier": 0.8, "dry_penalty_last_n": 0}, {"dry_range": 0}),
        ({"dry_sequence_breakers": '"\\n", "x"'}, {"dry_sequence_breakers": ("\n", "x")}),
        ({"dry_sequence_breakers": '["\\n", "x"]'}, {"dry_sequence_breakers": ("\n", "x")}),
        ({"dry_sequence_breakers": ["y"]}, {"dry_sequence_breakers": ("y",)}),
        ({"min_length": 5}, {"min_tokens": 5}),
        ({"min_tokens": 5}, {"min_tokens": 5}),
        ({"logit_bias": {"5": 1.5}}, {"logit_bias": {5: 1.5}}),
        ({"logit_bias": [[5, 1.5], [6, False], [5.0, 1], [6, 2]]}, {"logit_bias": {5: 2.5, 6: float("-inf")}}),
        ({"custom_token_bans": "5, 6"}, {"banned_tokens": (5, 6)}),
        ({"custom_token_bans": [5]}, {"banned_tokens": (5,)}),
        ({"ban_eos_token": True}, {"ban_eos": True}),
        ({"ignore_eos": True}, {"ban_eos": True}),
        ({"top_k": None, "repeat_penalty": None, "mirostat": None}, {}),
    ],
    ids=str,
)
def test_a_field_reaches_the_engine(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _changes(**body) == expected


def test_every_option_of_the_engine_can_be_reached() -> None:
    """The table above has each of the engine's options at least once, but for those that have tests of their own."""
    (mark,) = (
        each
        for each in test_a_field_reaches_the_engine.pytestmark
        if each.name == "parametrize"  # type: ignore[attr-defined]
    )
    reached = {name for _, expected in mark.args[1] for name in expected}
    assert reached | {"stages", "seed"} == set(Sampling.__struct_fields__)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, STAGES),
        ({"sampler_priority": ["top_k", "temperature"]}, ("top_k", "temperature")),
        ({"samplers": ["top_k", "typ_p", "temp"]}, ("top_k", "typical_p", "temperature")),
        ({"sampler_priority": "dry\ntop_p\n\nmin_p"}, ("dry", "top_p", "min_p")),
        ({"sampler_priority": "dry, top_p;min_p"}, ("dry", "top_p", "min_p")),
        ({"samplers": "edskypmxt"}, tuple(name for name in STAGES if name in _ALL_LETTERS)),
        ({"samplers": "kt"}, ("top_k", "temperature")),
        ({"samplers": "xtc"}, ("xtc",)),
        ({"samplers": []}, ()),
        (
            {
                "sampler_priority": [
                    "presence_penalty",
                    "top_k",
                    "repetition_penalty",
                    "dynamic_temperature",
                    "adaptive_p",
                ]
            },
            ("penalties", "top_k", "temperature"),
        ),
        ({"sampler_priority": ["temperature", "top_k"], "temperature_last": True}, ("top_k", "temperature")),
        ({"sampler_priority": ["top_k"], "temperature_last": True}, ("top_k",)),
    ]
    if (
        _ALL_LETTERS := {
            "penalties",
            "dry",
            "top_n_sigma",
            "top_k",
            "typical_p",
            "top_p",
            "min_p",
            "xtc",
            "temperature",
        }
    )
    else [],
    ids=str,
)
def test_the_order_of_the_stages(body: dict[str, Any], expected: tuple[str, ...]) -> None:
    actual = _sampling(**body).stages
    if body.get("samplers") == "edskypmxt":
        assert set(actual) == set(expected)
        assert actual == (
            "penalties",
            "dry",
            "top_n_sigma",
            "top_k",
            "typical_p",
            "top_p",
            "min_p",
            "xtc",
            "temperature",
        )
    else:
        assert actual == expected


def test_temperature_last_puts_smoothing_last_too() -> None:
    *_, before, last = _sampling(temperature_last=True).stages
    assert (before, last) == ("temperature", "quadratic_sampling")
    assert set(_sampling(temperature_last=True).stages) == set(STAGES)


def test_a_random_seed_is_drawn_once() -> None:
    for seed in (None, -1):
        options = _options(seed=seed)
        seeds = {options.generation(Presets()).sampling.seed for _ in range(3)}
        assert len(seeds) == 1
    assert len({_options().generation(Presets()).sampling.seed for _ in range(5)}) == 5


def test_low_over_high_is_refused() -> None:
    with pytest.raises(ValueError, match="dynatemp_low"):
        _options(dynamic_temperature=True, dynatemp_low=2, dynatemp_high=1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 5}, 5),
        ({"n_predict": 5}, 5),
        ({"max_tokens": -1}, None),
        ({"n_predict": -1}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 5),
        ({"max_tokens": 5, "auto_max_new_tokens": True}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_length_of_an_answer(body: dict[str, Any], expected: int | None) -> None:
    assert _options(**body).generation(Presets()).max_tokens == expected


# What has no effect


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"temperature": 0.5, "top_k": 3, "mirostat_mode": 0}, []),
        (
            {"mirostat_mode": 2, "top_k": 40, "min_p": 0.1, "temperature": 0.7, "presence_penalty": 1},
            ["top_k", "min_p"],
        ),
        ({"mirostat_mode": 2, "adaptive_target": 0.5}, ["adaptive_target"]),
        ({"mirostat_mode": 2, "top_k": 0}, []),
        ({"samplers": ["top_k"], "top_k": 5, "min_p": 0.1, "dry_multiplier": 1}, ["min_p", "dry_multiplier"]),
        ({"samplers": ["top_k"], "temperature": 0.4, "typ_p": 0.3, "top_k": 2}, ["temperature", "typ_p"]),
        ({"samplers": ["top_k"], "top_k": 2, "temperature": 0}, ["top_k", "samplers"]),
        ({"temperature": 0, "top_p": 0.5, "top_k": 40, "repeat_penalty": 1.1}, ["top_k", "top_p"]),
        ({"temperature": 0.3, "dynamic_temperature": True, "dynatemp_high": 2}, ["temperature"]),
        ({"dynatemp_low": 0.5, "dynatemp_high": 2}, ["dynatemp_low", "dynatemp_high"]),
        ({"xtc_threshold": 0.2, "smoothing_curve": 2, "dry_base": 2}, ["smoothing_curve", "xtc_threshold", "dry_base"]),
        ({"repeat_penalty": 1.3, "repeat_last_n": 0}, ["repeat_penalty", "repeat_last_n"]),
        ({"dry_multiplier": 1, "dry_penalty_last_n": 0}, ["dry_multiplier", "dry_penalty_last_n"]),
        ({"guidance_scale": 1.5, "negative_prompt": "x"}, ["guidance_scale", "negative_prompt"]),
        ({"guidance_scale": 1, "negative_prompt": "", "penalty_alpha": 0, "num_beams": 1}, []),
        (
            {"early_stopping": True, "length_penalty": 2, "num_beams": 4},
            ["num_beams", "length_penalty", "early_stopping"],
        ),
        ({"prompt_lookup_num_tokens": 5, "static_cache": True}, ["prompt_lookup_num_tokens", "static_cache"]),
        ({"max_tokens_second": 5, "stream_options": {"include_usage": True}}, ["max_tokens_second", "stream_options"]),
        ({"max_tokens_second": 5, "stream_options": {"include_usage": True}, "stream": True}, []),
        ({"max_tokens": 5, "max_completion_tokens": 6}, ["max_completion_tokens"]),
        ({"max_tokens": 5, "max_completion_tokens": 5}, []),
        ({"n_predict": 5, "auto_max_new_tokens": True}, ["n_predict"]),
        ({"unknown": 1, "other": None, "user": "me", "metadata": {"a": "b"}}, ["unknown"]),
        ({"foo bar": 1, "x\r\ny: z": 2, "": 3}, ["foo?bar", "x??y??z", "?"]),
        ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, ["repeat_penalty"]),
        ({"preset": "Deterministic", "temperature": 0.7, "do_sample": False}, ["temperature"]),
        ({"preset": "Deterministic", "max_tokens": 5, "seed": 3, "stop": "x"}, []),
        ({"preset": "Creative", "preset_mode": "defaults", "temperature": 0.7}, []),
        ({"preset": "Mirostat", "preset_mode": "defaults", "repeat_penalty": 1.1, "top_k": 5}, ["top_k"]),
        *(({"preset": name}, []) for name in Presets().names()),
    ],
    ids=str,
)
def test_what_has_no_effect_is_named(body: dict[str, Any], names: list[str]) -> None:
    options = _options(**body)
    assert options.ignored(Presets()) == names
    assert options.ignored_header(Presets()) == ({_IGNORED: ", ".join(names)} if names else {})
    strict = _options(**body, strict=True)
    if names:
        with pytest.raises(UnsupportedParameter) as caught:
            strict.generation(Presets())
        assert caught.value.param == names[0]
    else:
        strict.generation(Presets())


def test_what_is_not_honoured_is_typed_all_the_same(server: RunningServer) -> None:
    for name in NOT_HONOURED:
        wrong: Any = [] if name != "negative_prompt" else 5
        assert_error(server.post(COMPLETIONS, {"prompt": "x", name: wrong}), 400, None, name)


def test_strict_on_the_wire(server: RunningServer) -> None:
    body = {"prompt": _STORY, "max_tokens": 1, "tempratur": 1}
    assert server.post(COMPLETIONS, body).headers[_IGNORED] == "tempratur"
    for stream in (False, True):
        response = server.post(COMPLETIONS, {**body, "strict": True, "stream": stream})
        message = assert_error(response, 400, "unsupported_parameter", "tempratur")
        assert "tempratur" in message


# Presets


def test_a_preset_replaces_all_sampling_options() -> None:
    assert _changes(preset="Deterministic", top_k=5, repetition_penalty=1.3) == {"temperature": 0.0, "top_p": 1.0}
    assert _changes(preset="Mirostat") == {"mirostat_mode": 2, "top_p": 1.0}
    kept = {"logit_bias": {"5": 1.0}, "custom_token_bans": [6], "ban_eos_token": True}
    changed = _changes(preset="Top-P", **kept)
    assert changed == {"logit_bias": {5: 1.0}, "banned_tokens": (6,), "ban_eos": True}


def test_a_preset_may_stand_behind_the_request() -> None:
    behind = _changes(preset="Precise", preset_mode="defaults", temperature=1.5, repeat_penalty=1.3)
    assert behind == {"temperature": 1.5, "top_p": 0.5, "top_k": 40, "repetition_penalty": 1.3}


@pytest.mark.parametrize("name", Presets().names())
def test_every_preset_can_be_used(name: str) -> None:
    for spelling in (name, name.upper(), name.lower()):
        assert Presets().get(spelling) == Presets().get(name)
    assert _options(preset=name).generation(Presets())
    assert set(Presets().get(name)) <= set(SamplingOptions.model_fields)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../presets/Creative", "/etc/passwd", "Creative.yaml", "x" * 500, "\0"]
)
def test_no_name_becomes_a_path(name: str) -> None:
    with pytest.raises(InvalidRequest, match="no preset"):
        Presets().get(name)


def test_a_preset_and_a_request_that_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "moving.yaml").write_text("dynamic_temperature: true\ndynatemp_low: 0.5\ndynatemp_high: 1\n")
    options = _options(preset="moving", preset_mode="defaults", dynatemp_low=2)
    with pytest.raises(InvalidRequest, match="dynatemp_low") as caught:
        options.generation(Presets(tmp_path))
    assert caught.value.param == "preset"


def test_an_unknown_preset_is_answered_with_the_nearest(server: RunningServer) -> None:
    message = assert_error(server.post(COMPLETIONS, {"prompt": "x", "preset": "Creativ"}), 400, None, "preset")
    assert "Creative" in message


def test_the_operators_presets_win_and_are_read_anew(tmp_path: Path) -> None:
    presets = Presets(tmp_path)
    (tmp_path / "Creative.yaml").write_text("temperature: 0.3\n")
    (tmp_path / "mine.yaml").write_text("repeat_penalty: 1.5\n")
    assert presets.get("creative") == {"temperature": 0.3}
    assert presets.get("Mine") == {"repetition_penalty": 1.5}
    (tmp_path / "mine.yaml").write_text("")
    assert presets.get("mine") == {}
    assert {"mine", "Top-P"} <= set(presets.names())


@pytest.mark.parametrize("text", ["temperature: hot", "temprature: 1", "[]", "{", "\0", "top_p: 2", "5"])
def test_a_preset_that_is_wrong_says_where(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RegistryError, match=r"bad\.yaml"):
        Presets(tmp_path).get("bad")


# On the wire


def test_the_seed_is_returned_and_repeats_the_answer(server: RunningServer) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": _STORY}), (CHAT, {"messages": [{"role": "user", "content": "Hi"}]})):
        body = {**prompt, "max_tokens": 12, "temperature": 1.2, "n": 2}
        first = server.post(path, body).json()
        again = server.post(path, {**body, "seed": first["seed"]}).json()
        assert first["choices"] == again["choices"]
        assert again["seed"] == first["seed"]
        chunks = [each for each in all_events(server, path, {**body, "seed": 5}) if each != "[DONE]"]
        assert {chunk["seed"] for chunk in chunks} == {5}


def test_aliases_do_the_same_as_the_names(server: RunningServer) -> None:
    def text(**options: Any) -> str:
        body = {"prompt": _STORY, "max_tokens": 20, "seed": 3, "logit_bias": END_TOKENS, **options}
        answer = server.post(COMPLETIONS, body).json()
        return str(answer["choices"][0]["text"])

    assert text(typ_p=0.5, repeat_penalty=1.3) == text(typical_p=0.5, repetition_penalty=1.3)
    assert text(do_sample=False) == text(temperature=0)
    assert text(preset="Deterministic", temperature=1.5) == text(temperature=0)
    assert text(n_predict=5, max_tokens=None) == text(max_tokens=5)


def test_banned_tokens_never_come(server: RunningServer) -> None:
    body = {"prompt": _STORY, "max_tokens": 30, "temperature": 0}
    first = tokens_of(server, server.post(COMPLETIONS, body).json()["choices"][0]["text"])[0]
    for ban in ({"custom_token_bans": str(first)}, {"logit_bias": [[first, False]]}):
        other = server.post(COMPLETIONS, {**body, **ban}).json()["choices"][0]["text"]
        assert tokens_of(server, other)[0] != first


def test_control_tokens_are_shown_when_asked_for(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 2, "logit_bias": {"1": 100}, "temperature": 0}  # <|im_start|>
    assert server.post(COMPLETIONS, body).json()["choices"][0]["text"] == ""
    shown = server.post(COMPLETIONS, {**body, "skip_special_tokens": False}).json()
    assert shown["choices"][0]["text"] == "<|im_start|>" * 2


def test_a_prompt_is_cut_to_what_is_asked_for(server: RunningServer, client: openai.OpenAI) -> None:
    prompt = "one two three four five six seven eight nine ten"
    body = {"prompt": prompt, "max_tokens": 4, "truncation_length": 9, "echo": False, "temperature": 0}
    usage = server.post(COMPLETIONS, body).json()["usage"]
    assert usage["prompt_tokens"] == 5
    assert usage["prompt_tokens_details"]["truncated_tokens"] == 5
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 10
    cut = server.post(COMPLETIONS, {**body, "prompt": " six seven eight nine ten", "truncation_length": 0}).json()
    assert cut["choices"] == server.post(COMPLETIONS, body).json()["choices"]
    assert "truncated_tokens" not in cut["usage"]["prompt_tokens_details"]
    assert_error(server.post(COMPLETIONS, {**body, "max_tokens": 9}), 400, "context_length_exceeded", "prompt")


def test_a_chat_over_its_own_limit_is_refused(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "one two three"}], "truncation_length": 10, "max_tokens": 2}
    message = assert_error(server.post(CHAT, body), 400, "context_length_exceeded", "messages")
    assert "truncation_length is 10" in message


def test_an_answer_ends_at_the_requests_own_limit(server: RunningServer) -> None:
    body = {"prompt": _STORY, "truncation_length": 14, "logit_bias": END_TOKENS}
    answer = server.post(COMPLETIONS, body).json()
    assert answer["usage"]["total_tokens"] == 14
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.fixture
def slow_stream(server: RunningServer) -> Iterator[httpx.Response]:
    body = {"prompt": _STORY, "max_tokens": 12, "stream": True, "max_tokens_second": 10, "logit_bias": END_TOKENS}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=30) as response:
        yield response


def test_a_stream_can_be_slowed_down(slow_stream: httpx.Response) -> None:
    begin = time.monotonic()
    lines = [line for line in slow_stream.iter_lines() if line.startswith("data: ")]
    assert time.monotonic() - begin > 0.9
    assert lines[-1] == "data: [DONE]"
