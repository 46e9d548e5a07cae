"""Instruction templates: how conversations are written for models of one family, by name, ours and the operator's.

Most are Jinja sources. The older form of text-generation-webui, five keys in a YAML file, is turned into one; requests
may replace single keys of it. This module does not render, and knows nothing of modes or characters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llamaserve.chat.named_files import NamedFiles
from llamaserve.chat.values import shown, text
from llamaserve.errors import InvalidRequest

NONE = "Alpaca"  # what the name "None" stands for
ENDINGS = (".jinja", ".jinja2", ".yaml", ".yml", ".json")

_SHIPPED = Path(__file__).resolve().parent.parent / "instruction_templates"
_PLACES = ("<|user|>", "<|user-message|>", "<|bot|>", "<|bot-message|>")
_SYSTEM = "<|system-message|>"
_AFTER_SYSTEM = "\n\n"  # after a system text for which the context has no place
_DELIMITERS = str.maketrans({"'": "\\'", "{": "\\x7b", "}": "\\x7d", "%": "\\x25", "#": "\\x23"})


@dataclass(frozen=True)
class FiveKeys:
    """A template in the older form. White space counts; a line may also end with a backslash and an n.

    ``turn_template`` is one question and its answer, with ``<|user|>``, ``<|user-message|>``, ``<|bot|>`` and
    ``<|bot-message|>`` in this order. ``context`` stands before all turns, with ``<|system-message|>`` where the system
    text goes; ``system_message`` is the text for conversations without one. When that is None, they have no context.
    """

    turn_template: str
    user: str = ""
    bot: str = ""
    context: str = ""
    system_message: str | None = None

    def jinja(self) -> str:
        """Return the template as a Jinja source. Raises ``ValueError`` when the turn lacks what it must have."""
        before_user, after_user, before_bot, after_bot = self._turn()
        context = _newlines(self.context)
        before_system, place, after_system = context.partition(_SYSTEM)
        opening = ""
        if not place:
            opening = _print(context)
            before_system, after_system = "", _AFTER_SYSTEM
        elif self.system_message is not None:
            default = _print(before_system + self.system_message.strip() + after_system)
            opening = f"{{% if not messages | selectattr('role', 'equalto', 'system') | list %}}{default}{{% endif %}}"
        return (
            f"{opening}{{% for message in messages %}}"
            f"{{% if message.role == 'system' %}}{_print_content(before_system, after_system)}"
            f"{{% elif message.role == 'user' %}}{_print_content(before_user, after_user)}"
            "{% elif message.role == 'assistant' and not message.tool_calls %}"
            f"{_print_content(before_bot, after_bot)}"
            "{% else %}{{ raise_exception('this instruction template has no form for tools') }}{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{_print(before_bot.rstrip(' '))}{{% endif %}}"
        )

    def _turn(self) -> tuple[str, str, str, str]:
        """Return what is before and after the user's text, and before and after the model's."""
        parts, rest = [], _newlines(self.turn_template)
        for place in _PLACES:
            part, found, rest = rest.partition(place)
            if not found:
                raise ValueError(f"the turn must have {', '.join(_PLACES)} in this order")
            parts.append(part)
        if any(place in rest or any(place in part for part in parts) for place in (*_PLACES, "<|round|>")):
            raise ValueError(f"the turn must have each of {', '.join(_PLACES)} once, and no <|round|>")
        before, user, between, bot = parts
        return before + _newlines(self.user) + user, between, _newlines(self.bot) + bot, rest


@dataclass(frozen=True)
class Overrides:
    """What a request has to say in place of single keys, by the request's names; empty is as good as not given."""

    turn_template: str | None = None
    name1_instruct: str | None = None
    name2_instruct: str | None = None
    context_instruct: str | None = None
    system_message: str | None = None

    def given(self) -> dict[str, str]:
        """Return those that are given."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: text(value, name) for name, value in fields.items() if value}


@dataclass(frozen=True)
class InstructionTemplate:
    """A Jinja source, None for the model's own; and the system text for conversations without one, if the source
    does not have it.
    """

    source: str | None = None
    system: str = ""


OWN = InstructionTemplate()


class InstructionTemplates:
    """The templates of a server. A file in the operator's folder stands before one of ours with the same name."""

    def __init__(self, folder: Path | None = None) -> None:
        folders = [folder for folder in (_SHIPPED, folder) if folder is not None]
        self._files = NamedFiles("instruction template", "instruction_template", folders, ENDINGS)

    def names(self) -> list[str]:
        """Return the names there are."""
        return self._files.names()

    def get(self, name: str | None, overrides: Overrides | None = None) -> InstructionTemplate:
        """Return the template with the name, that of the model for None, with what the request says in its place.

        Without a name a ``turn_template`` makes one. Else overrides need a template in five keys, but for
        ``system_message``, which goes with any.

        Raises ``InvalidRequest`` when there is no such template or an override can't be, and ``RegistryError`` when the
        file is wrong.
        """
        given = {} if overrides is None else overrides.given()
        loaded = None if name is None else self._load(NONE if name == "None" else name)
        if loaded is None and "turn_template" in given:
            loaded = FiveKeys(given["turn_template"])
        if isinstance(loaded, FiveKeys):
            return InstructionTemplate(_overridden(loaded, given))
        system = given.pop("system_message", "")
        if given:
            which = "the model's own" if name is None else f"instruction template {shown(name)}"
            raise InvalidRequest(
                f"{min(given)} replaces a part of a template in five keys, which {which} is not; "
                "name another as instruction_template, or give a turn_template and no instruction_template",
                param=min(given),
            )
        return InstructionTemplate(loaded, system)

    def _load(self, name: str) -> str | FiveKeys:
        path = self._files.find(name)
        if path.suffix.lower() in (".jinja", ".jinja2"):
            return self._files.read(path)
        values = self._files.read_mapping(path)
        source = self._files.text(path, values, "instruction_template")
        if source:
            return source
        five = FiveKeys(
            turn_template=self._files.text(path, values, "turn_template"),
            user=self._files.text(path, values, "user"),
            bot=self._files.text(path, values, "bot"),
            context=self._files.text(path, values, "context"),
            system_message=self._files.text(path, values, "system_message") if "system_message" in values else None,
        )
        try:
            five.jinja()
        except ValueError as error:
            raise self._files.broken(path, f"turn_template: {error}") from error
        return five


def _overridden(five: FiveKeys, given: dict[str, str]) -> str:
    changed = FiveKeys(
        turn_template=given.get("turn_template", five.turn_template),
        user=given.get("name1_instruct", five.user),
        bot=given.get("name2_instruct", five.bot),
        context=given.get("context_instruct", five.context),
        system_message=given.get("system_message", five.system_message),
    )
    try:
        return changed.jinja()
    except ValueError as error:
        raise InvalidRequest(f"turn_template: {error}", param="turn_template") from error


def _newlines(value: str) -> str:
    return value.replace("\\n", "\n")


def _print(value: str) -> str:
    return f"{{{{ {_literal(value)} }}}}" if value else ""


def _print_content(before: str, after: str) -> str:
    return f"{{{{ {_literal(before)} + message.content + {_literal(after)} }}}}"


def _literal(value: str) -> str:
    """Return the text as a string of Jinja's, in which nothing could be taken for the end of it or of its block."""
    return f"'{value.encode('unicode_escape').decode('ascii').translate(_DELIMITERS)}'"
