"""Characters: each form of their files, and files that are wrong."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from llamaserve.chat import characters, named_files
from llamaserve.chat.characters import Character, Characters, filled
from llamaserve.errors import InvalidRequest, RegistryError

CARD = {
    "name": "Bolt",
    "description": "A robot.",
    "personality": "terse",
    "scenario": "A garage.",
    "first_mes": "Beep.",
    "mes_example": "<START>\n{{user}}: Hi\n{{char}}: Beep.",
}
CARD_CONTEXT = (
    "Bolt's Persona: A robot.\nPersonality: terse\nScenario: A garage.\n<START>\n{{user}}: Hi\n{{char}}: Beep."
)
V2 = {"spec": "chara_card_v2", "name": "old", "data": CARD | {"alternate_greetings": ["No"], "system_prompt": "No"}}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    pixels = chunk(b"IDAT", b"x" * 5000)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + b"".join(chunks) + chunk(b"IEND", b"")


def encoded(card: object) -> bytes:
    return base64.b64encode(json.dumps(card).encode())


def plain(card: object, keyword: bytes = b"chara") -> bytes:
    return chunk(b"tEXt", keyword + b"\0" + encoded(card))


FORMS: dict[str, tuple[str, str | bytes, Character]] = {
    "yaml": (
        "a.yaml",
        "name: Bolt\nyour_name: Ada\ngreeting: Beep.\ncontext: |\n  {{char}} is a robot.\n\n  Hi.\n",
        Character("Bolt", "Ada", "{{char}} is a robot.\n\nHi.", "Beep."),
    ),
    "other keys": ("a.yml", "bot: Bolt\nuser: Ada\n", Character("Bolt", "Ada")),
    "oldest keys": ("a.yml", '"<|bot|>": Bolt\n"<|user|>": Ada\n', Character("Bolt", "Ada")),
    "first that is not empty": ("a.yaml", 'name: ""\nbot:\nchar_name: Bolt\ncontext: c', Character("Bolt", "", "c")),
    "without a name": ("Ro.bot.yaml", "context: c", Character("Ro.bot", "", "c")),
    "byte order mark": ("a.yaml", b"\xef\xbb\xbfname: B\xc3\xb6lt", Character("B\u00f6lt")),
    "pygmalion": (
        "a.json",
        json.dumps(
            {
                "char_name": "Bolt",
                "char_persona": "A robot.",
                "char_greeting": "Beep.",
                "world_scenario": "A garage.",
                "example_dialogue": "You: Hi\nBolt: Beep.\n",
            }
        ),
        Character("Bolt", "", "Bolt's Persona: A robot.\nScenario: A garage.\nYou: Hi\nBolt: Beep.", "Beep."),
    ),
    "pygmalion with little": (
        "a.yaml",
        'char_name: Bolt\nchar_persona: ""\nexample_dialogue: Hi\ngreeting: No',
        Character("Bolt", "", "Hi"),
    ),
    "a context is stronger than a persona": (
        "a.yaml",
        "name: Bolt\nchar_persona: No\ncontext: c\ngreeting: g\nchar_greeting: No",
        Character("Bolt", "", "c", "g"),
    ),
    "json": ("a.json", '{"name": "Bolt", "context": "c"}', Character("Bolt", "", "c")),
    "card as json": ("a.json", json.dumps(CARD), Character("Bolt", "", CARD_CONTEXT, "Beep.")),
    "card of version 2 as json": ("a.json", json.dumps(V2), Character("Bolt", "", CARD_CONTEXT, "Beep.")),
    "card": ("a.png", png(plain(CARD)), Character("Bolt", "", CARD_CONTEXT, "Beep.")),
    "card of version 2": ("a.PNG", png(plain(V2)), Character("Bolt", "", CARD_CONTEXT, "Beep.")),
    "the later card counts": (
        "a.png",
        png(plain({"name": "old"}), plain(V2, b"ccv3"), plain({"name": "x"}, b"Comment")),
        Character("Bolt", "", CARD_CONTEXT, "Beep."),
    ),
    "compressed card": (
        "a.png",
        png(chunk(b"zTXt", b"Chara\0\0" + zlib.compress(encoded(CARD)))),
        Character("Bolt", "", CARD_CONTEXT, "Beep."),
    ),
    "international card": (
        "a.png",
        png(chunk(b"iTXt", b"chara\0\0\0en\0Figur\0" + encoded(CARD))),
        Character("Bolt", "", CARD_CONTEXT, "Beep."),
    ),
    "compressed international card": (
        "a.png",
        png(chunk(b"iTXt", b"chara\0\1\0\0\0" + zlib.compress(encoded(CARD)))),
        Character("Bolt", "", CARD_CONTEXT, "Beep."),
    ),
    "card with little": ("Bolt.png", png(plain({"description": None})), Character("Bolt")),
    "card in lines": (
        "a.png",
        png(chunk(b"tEXt", b"chara\0" + base64.encodebytes(json.dumps(CARD).encode()))),
        Character("Bolt", "", CARD_CONTEXT, "Beep."),
    ),
}


@pytest.mark.parametrize(("name", "content", "expected"), FORMS.values(), ids=FORMS)
def test_forms(tmp_path: Path, name: str, content: str | bytes, expected: Character) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert Characters(tmp_path).get(Path(name).stem) == expected


@pytest.mark.parametrize("name", [None, "None", "assistant"])
def test_the_default_is_the_assistant(name: str | None) -> None:
    character = Characters().get(name)
    assert (character.name, character.user) == ("AI", "")
    assert character.context
    assert character.greeting


def test_files_are_read_anew_and_the_operator_s_stand_before_ours(tmp_path: Path) -> None:
    known = Characters(tmp_path)
    assert known.names() == ["Assistant"]
    (tmp_path / "ASSISTANT.json").write_text('{"name": "Hal"}')
    assert known.get(None).name == "Hal"
    (tmp_path / "assistant.yml").write_text("name: Eve")
    assert known.get(None).name == "Eve"
    (tmp_path / "assistant.yml").write_text("name: Eva")
    assert known.get(None).name == "Eva"
    (tmp_path / "notes.txt").write_text("no character")
    assert known.names() == ["assistant"]


@pytest.mark.parametrize(
    "name", ["Asistant", "../characters/Assistant", "Assistant.yaml", "", "\ud800", "x" * 9999, "/etc/passwd", "a\0b"]
)
def test_an_unknown_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"there is no character .*; there is Assistant") as caught:
        Characters().get(name)
    assert caught.value.param == "character"
    assert len(caught.value.message) < 200


def test_a_folder_that_is_missing_has_no_characters(tmp_path: Path) -> None:
    assert Characters(tmp_path / "none").names() == ["Assistant"]


WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "no mapping": ("a.yaml", "- 1", "it must have keys and values"),
    "no text keys": ("a.yaml", "1: a", "it must have keys and values"),
    "empty": ("a.yaml", "", "it must have keys and values"),
    "no yaml": ("a.yaml", "a: [", "it can't be read: while parsing"),
    "no utf-8": ("a.yaml", b"name: \xff", "it can't be read: 'utf-8'"),
    "no json": ("a.json", "name: a", "it can't be read: Expecting value"),
    "nested yaml": ("a.yaml", "[" * 2000, "it can't be read: "),
    "nested json": ("a.json", "[" * 100_000, "it can't be read: "),
    "a number": ("a.yaml", "name: 7", "name must be a text"),
    "a list": ("a.yaml", "context: [a]", "context must be a text"),
    "half a surrogate pair": ("a.json", r'{"name": "\ud800"}', "name holds half a surrogate pair at position 0"),
    "long": ("a.yaml", "context: " + "x" * named_files.MAX_FILE, "it has more than 262144 bytes"),
    "a long name": ("a.yaml", "name: " + "x" * 257, "name has more than 256 characters"),
    "a long card": ("a.png", png(plain({"scenario": "x" * 300_000})), "scenario has more than 262144 characters"),
    "no png": ("a.png", b"GIF89a", "this is no PNG"),
    "no card": ("a.png", png(plain({}, b"Comment")), "no character is in this image"),
    "cut": ("a.png", png(plain(CARD))[:-20], "its card can't be read: the file ends too early"),
    "cut in the card": ("a.png", png(plain(CARD))[:5200], "the file ends too early"),
    "cut in the image": ("a.png", png(plain(CARD))[:100], "the file ends too early"),
    "length that can't be": ("a.png", png()[:33] + b"\xff\xff\xff\xfftEXt", "a text of 4294967295 bytes is over"),
    "no base64": ("a.png", png(chunk(b"tEXt", b"chara\0{}")), "its card can't be read"),
    "no json in the card": ("a.png", png(chunk(b"tEXt", b"chara\0" + base64.b64encode(b"{"))), "can't be read"),
    "no utf-8 in the card": ("a.png", png(chunk(b"tEXt", b"chara\0" + base64.b64encode(b'"\xff"'))), "can't be read"),
    "no mapping in the card": ("a.png", png(plain([1])), "it must have keys and values"),
    "no zlib": ("a.png", png(chunk(b"zTXt", b"chara\0\0abc")), "its card can't be read: Error -3"),
    "cut zlib": (
        "a.png",
        png(chunk(b"zTXt", b"chara\0\0" + zlib.compress(encoded(CARD))[:-9])),
        "damaged, or has more",
    ),
    "zip bomb": (
        "a.png",
        png(chunk(b"zTXt", b"chara\0\0" + zlib.compress(b"A" * (characters.MAX_CARD + 1)))),
        "has more than 8388608 bytes",
    ),
    "chunks without end": ("a.png", png(*[chunk(b"IDAT", b"")] * characters.MAX_CHUNKS), "more than 100000 parts"),
}


@pytest.mark.parametrize(("name", "content", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RegistryError) as caught:
        Characters(tmp_path).get("a")
    assert caught.value.message.startswith(f"character {name}: ")
    assert reason in caught.value.message


def test_a_huge_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(characters.MAX_PNG + 1)
    with pytest.raises(RegistryError, match="more than 67108864 bytes"):
        Characters(tmp_path).get("a")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 5900), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_card_is_a_character_or_an_error(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    content = bytearray(png(plain(V2)))
    for position, byte in damage:
        content[position % len(content)] = byte
    (tmp_path / "a.png").write_bytes(content)
    with contextlib.suppress(RegistryError):
        assert isinstance(Characters(tmp_path).get("a"), Character)


FILLED: list[tuple[str, str]] = [
    ("{{user}} <USER> {{char}} <BOT>", "Ada Ada Bolt Bolt"),
    ("{{User}} <user> { {char}} <BOT", "{{User}} <user> { {char}} <BOT"),
]


@pytest.mark.parametrize(("text", "expected"), FILLED)
def test_placeholders(text: str, expected: str) -> None:
    assert filled(text, user="Ada", bot="Bolt", param="context") == expected


def test_placeholders_are_filled_in_their_order() -> None:
    assert filled("{{user}}", user="{{char}}", bot="<USER>", param="context") == "{{char}}"
    assert filled("{{char}}", user="Ada", bot="<USER>", param="context") == "Ada"


def test_a_text_does_not_grow_without_end() -> None:
    with pytest.raises(InvalidRequest, match="context has more than 4194304 characters") as caught:
        filled("<USER>" * 100_000, user="x" * 50, bot="", param="context")
    assert caught.value.param == "context"
    assert len(filled("<USER>" * 100_000, user="x" * 40, bot="", param="context")) == 4_000_000
