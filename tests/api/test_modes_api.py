"""The modes, characters and instruction templates of text-generation-webui on the wire, and answers that go on."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_helpers import CHAT, END_TOKENS, all_events, assert_error, write_models_file
from chat_helpers import PAINT, PROMPT, both, called, said, whole
from running_server import RunningServer

BOLT = """\
name: Bolt
context: |-
  Bolt is a terse repair robot who calls <USER> 'boss'.

  {{user}}: Can you fix a lamp?
  {{char}}: <BOT> can fix anything.
"""
DEMO = r"""
user: "USER:"
bot: "BOT:"
turn_template: "<|user|> <|user-message|>\n<|bot|> <|bot-message|></s>\n"
context: "<|system-message|>\n\n"
system_message: "Be useful."
"""
DEMO_TURN = r"<|user|> <|user-message|>\n<|bot|> <|bot-message|></s>\n"
CARD = {"name": "Nut", "description": "Nut is {{char}}.", "first_mes": "Hi.", "personality": "", "mes_example": ""}
CARD |= {"scenario": ""}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def folders(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose operator has folders of characters and instruction templates."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "characters").mkdir()
    (folder / "characters" / "Bolt.yaml").write_text(BOLT)
    (folder / "characters" / "Plain.yaml").write_text("name: Bolt\n")
    (folder / "characters" / "Broken.yaml").write_text("name: [\n")
    card = base64.b64encode(json.dumps(CARD).encode())
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"tEXt", b"chara\0" + card) + _chunk(b"IEND", b"")
    (folder / "characters" / "Nut.png").write_bytes(png)
    (folder / "templates").mkdir()
    (folder / "templates" / "Demo.yaml").write_text(DEMO)
    (folder / "secret.yaml").write_text("name: Secret\n")
    path = write_models_file(folder, starter_model, "context: 1024, parallel: 4")
    environment = {
        "LLAMASERVE_CHARACTERS_DIR": str(folder / "characters"),
        "LLAMASERVE_INSTRUCTION_TEMPLATES_DIR": str(folder / "templates"),
    }
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path), environment=environment) as running:
        yield running


CTX = "Bolt is a terse repair robot who calls Ada 'boss'.\n\nAda: Can you fix a lamp?\nBolt: Bolt can fix anything.\n"
M1 = said(("user", "Hi there"), ("assistant", "Beep. Hello."), ("user", "Fix my radio?"))
M = [*said(("system", "Answer in French.")), *M1]
SURE = [*M1, *said(("assistant", "Sure, first"))]
MIXED = said(("user", " a "), ("user", "b"), ("system", "S2"), ("assistant", "c"), ("assistant", "d"), ("user", "e"))
RADIO = "Ada: Hi there\nBolt: Beep. Hello.\nAda: Fix my radio?\n"
QUESTION = "USER: Hi there\nBOT: Beep. Hello.</s>\nUSER: Fix my radio?\n"
STYLE: dict[str, Any] = {
    "character": "Bolt",
    "name1": "Ada",
    "instruction_template": "Demo",
    "chat_instruct_command": "Speak next as <|character|>.\n\n<|prompt|>",
}


def in_mode(mode: str, messages: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {**STYLE, "mode": mode, "messages": messages, **others}


# By the numbers of the specification's test vectors; what differs from them is said in tests/chat/test_modes.py.
VECTORS: dict[str, tuple[dict[str, Any], str]] = {
    "1": (in_mode("instruct", M), f"Answer in French.\n\n{QUESTION}BOT:"),
    "2": (in_mode("instruct", M1), f"Be useful.\n\n{QUESTION}BOT:"),
    "3": (in_mode("chat", M1), f"{CTX}\n{RADIO}Bolt:"),
    "3, with a system message": (in_mode("chat", M), f"{CTX}\nAnswer in French.\n\n{RADIO}Bolt:"),
    "4": (
        in_mode("chat-instruct", M),
        f"Answer in French.\n\nUSER: Speak next as Bolt.\n\n{CTX}\n{RADIO}\nBOT: Bolt:",
    ),
    "6": (in_mode("instruct", SURE, continue_=True), f"Be useful.\n\n{QUESTION}BOT: Sure, first"),
    "7": (in_mode("chat", SURE, continue_=True), f"{CTX}\n{RADIO}Bolt: Sure, first"),
    "8": (
        in_mode("chat-instruct", SURE, continue_=True),
        f"Be useful.\n\nUSER: Speak next as Bolt.\n\n{CTX}\n{RADIO}\nBOT: Bolt: Sure, first",
    ),
    "9": (in_mode("instruct", SURE), f"Be useful.\n\n{QUESTION}BOT: Sure, first</s>\nBOT:"),
    "10": (in_mode("instruct", MIXED), "USER: a\nUSER: b\nS2\n\nBOT: c</s>\nBOT: d</s>\nUSER: e\nBOT:"),
    "11": (in_mode("chat", MIXED), f"{CTX}\nAda: a\nAda: b\nS2\n\nBolt: c\nBolt: d\nAda: e\nBolt:"),
    "12": (
        in_mode("instruct", said(("system", "S1"), ("system", "S2"), ("user", "q"))),
        "S1\nS2\n\nUSER: q\nBOT:",
    ),
    "13": (
        in_mode("chat", M1, user_bio="{{user}} is an engineer."),
        f"{CTX}\nAda is an engineer.\n\n{RADIO}Bolt:",
    ),
    "14": (in_mode("chat", M1, character="Plain"), f"{RADIO}Bolt:"),
    "names under other names": (
        in_mode("chat", M1, character=None, name1=None, user_name="Ada", bot_name="Bolt", context="{{char}}"),
        f"Bolt\n\n{RADIO}Bolt:",
    ),
    "a card": (
        in_mode("chat", M1[:1], character="nut"),
        "Nut's Persona: Nut is Nut.\n\nAda: Hi there\nNut:",
    ),
    "one key of five": (
        in_mode("instruct", M1[:1], name2_instruct="ROBOT:"),
        "Be useful.\n\nUSER: Hi there\nROBOT:",
    ),
    "five keys of its own": (
        in_mode("instruct", M1[:1], instruction_template=None, context_instruct="C\n")
        | {"turn_template": DEMO_TURN, "name1_instruct": "U", "name2_instruct": "B"},
        "C\nU Hi there\nB",
    ),
    "a system text": (
        in_mode("instruct", M1[:1], instruction_template=None, system_message="S."),
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    ),
    "a dialogue of its own": (
        in_mode("chat", M1[:1], chat_template_str="{% for m in messages %}{{ name1 }}> {{ m.content }}{% endfor %}"),
        "Ada> {CONTEXT}Ada> Hi there",
    ),
    "no turn opened": (
        in_mode("instruct", M1[:1], instruction_template=None, system_message="S.", add_generation_prompt=False),
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n",
    ),
    "a shipped one": (
        in_mode("instruct", M1[:1], instruction_template="ChatML", system_message="S."),
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize(("body", "expected"), VECTORS.values(), ids=VECTORS)
def test_prompts_are_those_of_the_specification(folders: RunningServer, body: dict[str, Any], expected: str) -> None:
    response = folders.post(PROMPT, body)
    assert response.status_code == 200, response.text
    assert response.json()["prompt"] == expected.replace("{CONTEXT}", CTX.removesuffix("\n"))


STOPS = {"instruct": ["\nBOT:", "</s>"], "chat": ["\nBolt:", "\nAda:"]}
STOPS["chat-instruct"] = [*STOPS["instruct"], "\nAda:", "\nBolt:"]


@pytest.mark.parametrize(("mode", "expected"), STOPS.items())
def test_texts_that_end_the_answer(folders: RunningServer, mode: str, expected: list[str]) -> None:
    assert folders.post(PROMPT, in_mode(mode, M)).json()["stop"] == expected
    assert folders.post(PROMPT, in_mode(mode, M, stop=["x"])).json()["stop"] == ["x", *expected]


def test_the_model_s_own_template_adds_no_stop_texts(folders: RunningServer) -> None:
    assert folders.post(PROMPT, {"messages": M1}).json()["stop"] == []


FORCED = {
    "the user's name ends it": (" Beep.\nAda: And now?", "Beep."),
    "the model's own name ends it": (" Beep.\nBolt: More.", "Beep."),
    "the speaker's name is no part": (" Bolt: Beep.", "Beep."),
    "the name on a line of its own": ("\nBolt: Beep.", ""),
    "a name in the text": (" Beep, Bolt: Beep.", "Beep, Bolt: Beep."),
}


@pytest.mark.parametrize(("forced", "expected"), FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("mode", ["chat", "chat-instruct"])
def test_a_reply_is_only_that(folders: RunningServer, mode: str, forced: str, expected: str) -> None:
    (choice,) = both(folders, in_mode(mode, M1, guided_choice=[forced], max_tokens=30))
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")


def test_every_mode_answers(folders: RunningServer) -> None:
    for mode in ("instruct", "chat", "chat-instruct"):
        body = in_mode(mode, M, max_tokens=12, seed=1, n=2)
        for choice in both(folders, body):
            assert choice["finish_reason"] in ("stop", "length")
            for stop in STOPS[mode]:
                assert stop not in choice["message"]["content"]


def test_the_default_character(folders: RunningServer) -> None:
    default = folders.post(PROMPT, {"messages": M1[:1], "mode": "chat"}).json()
    assert default["prompt"].endswith("\nYou: Hi there\nAI:")
    for name in ("Assistant", "assistant", "None"):
        assert folders.post(PROMPT, {"messages": M1[:1], "mode": "chat", "character": name}).json() == default


# Names


PATHS = ["../secret", "..", ".", "", "/etc/passwd", "Bolt.yaml", "characters/Bolt", "..\\secret", "x" * 500, "\0", "~"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("field", ["character", "instruction_template"])
def test_no_name_becomes_a_path(folders: RunningServer, field: str, name: str) -> None:
    for path in (CHAT, PROMPT):
        message = assert_error(folders.post(path, {"messages": M1, "mode": "chat", field: name}), 400, None, field)
        assert "Secret" not in message


def test_an_unknown_name_is_answered_with_the_nearest(folders: RunningServer) -> None:
    response = folders.post(CHAT, {"messages": M1, "mode": "chat", "character": "Bolt2"})
    assert "Bolt" in assert_error(response, 400, None, "character")
    response = folders.post(CHAT, {"messages": M1, "instruction_template": "Alpacca"})
    assert "Alpaca" in assert_error(response, 400, None, "instruction_template")


def test_a_broken_file_is_the_server_s_fault(folders: RunningServer) -> None:
    response = folders.post(CHAT, {"messages": M1, "mode": "chat", "character": "Broken"})
    assert response.status_code == 500
    assert "Broken.yaml" in response.json()["error"]["message"]
    assert whole(folders, {"messages": M1, "max_tokens": 1})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an odd mode": ({"mode": "notebook"}, "mode"),
    "a long name": ({"mode": "chat", "name1": "x" * 257}, "name1"),
    "a text that is none": ({"mode": "chat", "context": 5}, "context"),
    "a part of no such template": ({"name1_instruct": "U:"}, "name1_instruct"),
    "a turn without places": ({"turn_template": "x"}, "turn_template"),
    "nothing to continue": ({"continue_": True}, "messages"),
    "both ways to begin": (
        {"messages": SURE, "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
    ),
    "too much to fill in": ({"mode": "chat", "context": "<USER>" * 200_000, "name1": "x" * 256}, "context"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused(folders: RunningServer, body: dict[str, Any], param: str) -> None:
    for path in (CHAT, PROMPT):
        assert_error(folders.post(path, {"messages": M1, **body}), 400, None, param)


def test_what_a_mode_does_not_use_is_named(folders: RunningServer) -> None:
    body = {"messages": M1, "max_tokens": 1, "greeting": "Hi", "user_bio": "x", "chat_instruct_command": "y"}
    names = folders.post(CHAT, body).headers["x-llamaserve-ignored"].split(", ")
    assert set(names) == {"greeting", "user_bio", "chat_instruct_command"}
    assert folders.post(CHAT, {**body, "mode": "chat-instruct"}).headers["x-llamaserve-ignored"] == "greeting"
    assert_error(folders.post(CHAT, {**body, "strict": True}), 400, "unsupported_parameter", "greeting")


# Answers that go on


BEGUN = said(("user", "Count from 1 to 9."), ("assistant", "1, 2, 3,"))


@pytest.mark.parametrize("mode", ["instruct", "chat", "chat-instruct"])
def test_an_answer_goes_on(folders: RunningServer, mode: str) -> None:
    body = {"messages": BEGUN, "mode": mode, "max_tokens": 8, "temperature": 0, "logit_bias": END_TOKENS}
    (full,) = both(folders, {**body, "continue_": True})
    (new,) = both(folders, {**body, "continue_final_message": True})
    assert full["message"]["content"] == "1, 2, 3," + new["message"]["content"]
    assert new["message"]["content"].startswith(" 4, 5")
    (echoed,) = both(folders, {**body, "continue_final_message": True, "echo": True})
    assert echoed["message"]["content"] == full["message"]["content"]
    plain = {**body, "continue_final_message": True, "add_generation_prompt": False}
    assert both(folders, plain)[0]["message"] == new["message"]


def test_the_old_text_comes_first_in_a_stream(folders: RunningServer) -> None:
    body = {"messages": BEGUN, "continue_": True, "max_tokens": 4, "temperature": 0, "n": 2, "logprobs": True}
    events = all_events(folders, CHAT, body)
    for index in range(2):
        own = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == index]
        assert own[0]["delta"]["content"] == ""
        assert own[1]["delta"]["content"] == "1, 2, 3,"
        assert own[1]["logprobs"] is None
        assert sum(len(each["logprobs"]["content"]) for each in own if each["logprobs"]) == 4


def test_the_white_space_of_what_is_continued_stays(folders: RunningServer) -> None:
    messages = said(("user", "Count."), ("assistant", "  1,\n2,\n"))
    body = {"messages": messages, "continue_": True, "max_tokens": 3, "temperature": 0}
    assert folders.post(PROMPT, body).json()["prompt"].endswith("<|im_start|>assistant\n  1,\n2,\n")
    assert both(folders, body)[0]["message"]["content"].startswith("  1,\n2,\n")


def test_a_form_holds_for_what_is_new(folders: RunningServer) -> None:
    body = {"messages": BEGUN, "continue_final_message": True, "guided_choice": [" 4!"], "max_tokens": 10}
    assert both(folders, body)[0]["message"]["content"] == " 4!"


@pytest.mark.parametrize("text", ["  ", "a <", "a\n", "{"])
def test_only_what_is_new_is_new(folders: RunningServer, text: str) -> None:
    body = {"messages": said(("user", "Go."), ("assistant", text)), "max_tokens": 4, "temperature": 0, "tools": [PAINT]}
    (new,) = both(folders, {**body, "continue_final_message": True})
    (full,) = both(folders, {**body, "continue_": True})
    assert full["message"]["content"] == text + new["message"]["content"]


@pytest.mark.parametrize("message", [{"content": '<tool_call>\n{"name": "paint"'}, called("paint", {})])
def test_a_call_does_not_go_on(folders: RunningServer, message: dict[str, Any]) -> None:
    body = {"messages": [*M1, {"role": "assistant", **message}], "tools": [PAINT], "max_tokens": 4}
    for way in ("continue_", "continue_final_message"):
        assert_error(folders.post(CHAT, {**body, way: True}), 400, None, "messages")


def test_usage_does_not_count_what_is_put_before(folders: RunningServer) -> None:
    body = {"messages": BEGUN, "max_tokens": 4, "temperature": 0, "logit_bias": END_TOKENS, "continue_": True}
    usage = folders.post(CHAT, body).json()["usage"]
    assert usage["completion_tokens"] == 4
