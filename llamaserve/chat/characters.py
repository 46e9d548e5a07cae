"""Characters: who speaks in the chat modes, from YAML and JSON files and from the PNG cards of TavernAI.

The forms of the files are those of text-generation-webui, Pygmalion and the character cards of versions 1 to 3. Of a
card only what these have in common is read: no lore books, no further greetings, no system prompts. This module knows
nothing of conversations.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llamaserve.chat.named_files import NamedFiles
from llamaserve.errors import InvalidRequest

DEFAULT = "Assistant"
ENDINGS = (".yml", ".yaml", ".json", ".png")
MAX_NAME = 256  # characters; a name stands before every message
MAX_FILLED = 4 * 1024 * 1024  # characters of a text whose placeholders are filled
MAX_FIELD = 256 * 1024  # characters of one field of a card, as in a text file
MAX_PNG = 64 * 1024 * 1024  # bytes
MAX_CARD = 8 * 1024 * 1024  # bytes of the JSON of a card in base64; books of lore make some long
MAX_CHUNKS = 100_000  # of a PNG

_SHIPPED = Path(__file__).resolve().parent.parent / "characters"
_PNG = b"\x89PNG\r\n\x1a\n"
_CARD_KEYWORDS = ("ccv3", "chara")  # the later version of the card first
_CARD_KEYS = {
    "name": "char_name",
    "description": "char_persona",
    "first_mes": "char_greeting",
    "mes_example": "example_dialogue",
    "scenario": "world_scenario",
}


@dataclass(frozen=True)
class Character:
    """Who speaks: ``name`` is the model's, ``user`` the user's if the file has one.

    The texts are as they are in the file: ``filled`` puts names for placeholders. No white space is around them.
    """

    name: str
    user: str = ""
    context: str = ""
    greeting: str = ""


UNNAMED = Character("AI")


class Characters:
    """The characters of a server. A file in the operator's folder stands before one of ours with the same name."""

    def __init__(self, folder: Path | None = None) -> None:
        folders = [folder for folder in (_SHIPPED, folder) if folder is not None]
        self._files = NamedFiles("character", "character", folders, ENDINGS)

    def names(self) -> list[str]:
        """Return the names there are."""
        return self._files.names()

    def get(self, name: str | None) -> Character:
        """Return the character with the name of its file, the default one for None and for "None".

        Raises ``InvalidRequest`` when there is none, and ``RegistryError`` when its file is wrong.
        """
        path = self._files.find(DEFAULT if name in (None, "None") else name)
        values = self._card(path) if path.suffix.lower() == ".png" else self._files.read_mapping(path)
        return self._character(path, values)

    def _card(self, path: Path) -> dict[str, object]:
        try:
            if path.stat().st_size > MAX_PNG:
                raise self._files.broken(path, f"it has more than {MAX_PNG} bytes")
            with path.open("rb") as file:
                texts = dict(_card_texts(file))
            keyword = next((each for each in _CARD_KEYWORDS if each in texts), None)
            if keyword is None:
                raise self._files.broken(path, "no character is in this image")
            card = json.loads(base64.b64decode(b"".join(texts[keyword].split()), validate=True))
        except (OSError, EOFError, ValueError, RecursionError, zlib.error, binascii.Error) as error:
            raise self._files.broken(path, f"its card can't be read: {error}") from error
        return self._files.mapping(path, card)

    def _character(self, path: Path, values: dict[str, object]) -> Character:
        inner = values.get("data")
        if isinstance(inner, dict):
            values = self._from_card(path, self._files.mapping(path, inner))
        elif "first_mes" in values or path.suffix.lower() == ".png":
            values = self._from_card(path, values)
        name = self._field(path, values, "name", "bot", "<|bot|>", "char_name", limit=MAX_NAME) or path.stem
        in_form = "context" not in values and "char_persona" in values
        return Character(
            name=name,
            user=self._field(path, values, "your_name", "user", "<|user|>", limit=MAX_NAME),
            context=self._pygmalion(path, values, name) if in_form else self._field(path, values, "context"),
            greeting=self._field(path, values, "char_greeting" if in_form else "greeting"),
        )

    def _from_card(self, path: Path, card: dict[str, object]) -> dict[str, object]:
        """Return the fields of a card by the names that Pygmalion has for them; its personality joins the persona."""
        values: dict[str, object] = {ours: self._field(path, card, key) for key, ours in _CARD_KEYS.items()}
        personality = self._field(path, card, "personality")
        parts = (str(values["char_persona"]), personality and f"Personality: {personality}")
        return values | {"char_persona": "\n".join(filter(None, parts))}

    def _pygmalion(self, path: Path, values: dict[str, object], name: str) -> str:
        persona = self._field(path, values, "char_persona")
        scenario = self._field(path, values, "world_scenario")
        example = self._field(path, values, "example_dialogue")
        lines = (persona and f"{name}'s Persona: {persona}", scenario and f"Scenario: {scenario}", example)
        return "\n".join(filter(None, lines))

    def _field(self, path: Path, values: dict[str, object], *keys: str, limit: int = MAX_FIELD) -> str:
        value = self._files.text(path, values, *keys).strip()
        if len(value) > limit:
            raise self._files.broken(path, f"{keys[0]} has more than {limit} characters")
        return value


def filled(text: str, *, user: str, bot: str, param: str) -> str:
    """Put the names in place of ``{{user}}``, ``{{char}}``, ``<USER>`` and ``<BOT>``, in this order."""
    for placeholder, name in (("{{user}}", user), ("{{char}}", bot), ("<USER>", user), ("<BOT>", bot)):
        text = replaced(text, placeholder, name, param=param)
    return text


def replaced(text: str, old: str, new: str, *, param: str) -> str:
    """Replace every ``old``. Raises ``InvalidRequest`` when what comes out would be too long."""
    if len(text) + text.count(old) * max(0, len(new) - len(old)) > MAX_FILLED:
        raise InvalidRequest(f"{param} has more than {MAX_FILLED} characters with its placeholders filled", param=param)
    return text.replace(old, new)


def _card_texts(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Find the texts in a PNG that may be cards, with their keywords. Anything else in it is skipped unread."""
    if file.read(len(_PNG)) != _PNG:
        raise ValueError("this is no PNG")
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack(">I4s", _exactly(file, 8))
        if kind == b"IEND":
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(length + 4, 1)  # what is in it, and its checksum
            continue
        if length > MAX_CARD:
            raise ValueError(f"a text of {length} bytes is over the limit of {MAX_CARD}")
        keyword, _, rest = _exactly(file, length).partition(b"\0")
        file.seek(4, 1)
        name = keyword.decode("latin-1").lower()
        if name in _CARD_KEYWORDS:
            yield name, _text_of(kind, rest)
    raise ValueError(f"it has more than {MAX_CHUNKS} parts")


def _text_of(kind: bytes, rest: bytes) -> bytes:
    """Return the text after the keyword of a chunk: as it is, compressed, or after a language."""
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _inflated(rest[1:])  # after the method, of which there is one
    compressed, rest = rest[:1] == b"\1", rest[2:]
    text = rest.split(b"\0", 2)[-1]  # after the language and the translated keyword
    return _inflated(text) if compressed else text


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, MAX_CARD)
    if not inflater.eof:
        raise ValueError(f"its compressed text is damaged, or has more than {MAX_CARD} bytes")
    return text


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError("the file ends too early")
    return data
