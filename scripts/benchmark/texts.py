"""What the models are asked: natural text and real code, in as many variations as there are rounds and streams.

Long texts are pages of the manual that ships with Python, code is that of its standard library. Everything follows from
a seed, so that two runs ask the same. Knows nothing of models; who counts tokens is given.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics as _manual

_HEROES = (
    *("a lighthouse keeper", "an old baker", "two sisters", "a train driver", "a young doctor", "a retired sailor"),
    *("a watchmaker", "the village teacher", "a tired postman", "a violin player", "a beekeeper", "a night nurse"),
)
_PLACES = (
    *("on a small island", "at the edge of a forest", "in a harbour town", "high in the mountains", "by a wide river"),
    *("in a city that never slept", "in a valley full of orchards", "near the old railway", "under the castle walls"),
)
_FINDS = (
    *("a letter without a name", "a map with one road missing", "a locked wooden box", "a bird that could not fly"),
    *("a bell that rang by itself", "a photograph of somebody unknown", "a key made of glass", "a boat without oars"),
)
_OPENINGS = (
    "This is the story of {hero} who lived {place} and one morning found {find}. It was still dark, and",
    "Nobody believed {hero} who spoke of {find}, because nothing ever happened {place}. But that winter",
    "The newspaper of Tuesday told its readers about {hero}, {find} and a strange night {place}. According to it,",
    "Dear friend, you asked me how {hero} came to keep {find} {place}. I will tell you from the beginning. First",
    "{place}, people still talk about {hero}. It began with {find}, and it ended, as such things do, when",
)
_WORDS = {"few": (1, 5), "some": (6, 14), "many": (15, 30)}  # of short texts: at least, at most
_QUESTIONS = (
    "Explain in a few sentences what a reader should remember about this.",
    "Which part of it is the hardest to understand, and why?",
    "Write a short example that shows how it is used.",
    "Name three mistakes that beginners make here.",
    "Summarise the text above for somebody who has never programmed.",
    "How would you explain this to a colleague who knows another language well?",
    "What would you ask the author of this text?",
    "Turn the most important rule of it into advice for daily work.",
    "Which sentence above would you leave out, and what would be lost?",
    "Compare the first and the last paragraph in your own words.",
)
_SUBJECTS = (
    *("growing tomatoes on a balcony", "repairing an old bicycle", "the history of lighthouses", "baking sourdough"),
    *("learning the violin as an adult", "how tides work", "planning a week in the mountains", "keeping bees"),
    *("reading maps without a phone", "the migration of swallows", "building a stone wall", "old steam engines"),
)
_TURNS = (
    "I would like to know more about {subject}. I have never done anything of the kind. Where does one start?",
    "Thank you. Which tools or books do I need for that, and what can I leave out at first to save some money?",
    "You mentioned several things at once. Please go through the first of them slowly, with a reason for each step.",
    "My neighbour, who knows a lot about {subject}, says that most people give up in a month. Is that true, and why?",
    "Suppose that everything goes well for a year. What would the next level look like, and how long does it take?",
    "Please tell me about one famous person or event that has to do with {subject}, and what we can learn from it.",
    "What changes in winter? I live in a place where it gets dark early, and the weather is rough for several months.",
    "To finish, write a short plan for my first four weeks, one line for each week, in plain words that I can pin up.",
)
_MODULES = (
    *("heapq", "shlex", "textwrap", "statistics", "fractions", "calendar", "difflib", "csv", "queue", "sched"),
    *("graphlib", "colorsys", "fnmatch", "netrc", "quopri", "reprlib", "gettext", "mimetypes", "bisect", "cmd"),
)
_SHORTEST, _LONGEST = 60, 100  # lines of a code file
_FEWEST, _MOST = 3, 8  # places in it where a name is changed
_NOT_RENAMED = {"self", "cls", *dir(builtins)}


def _random(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311 - it shall be repeatable


def story(seed: str) -> str:
    """Return the opening of a story, about 30 tokens that ask to be continued."""
    draw = _random(seed)
    hero, place, find = draw.choice(_HEROES), draw.choice(_PLACES), draw.choice(_FINDS)
    opening = draw.choice(_OPENINGS).format(hero=hero, place=place, find=find)
    return f"Chapter {draw.randint(2, 99)}\n\n{opening[0].upper()}{opening[1:]}"


def stories(seed: str, count: int) -> list[str]:
    """Return different openings."""
    found = dict.fromkeys(story(f"{seed}/{number}") for number in range(8 * count))
    return list(found)[:count]


def manual(seed: str, tokens: int, count: Callable[[str], int]) -> str:
    """Return about so many tokens of the manual, beginning somewhere else for each seed; ``count`` counts a text's."""
    names = sorted(_manual)
    _random(seed).shuffle(names)
    text = ""
    for name in names:
        text += _manual[name] + "\n\n"
        if len(text) > 8 * tokens:
            break
    while (actual := count(text)) > tokens:
        words = text[: max(1, len(text) * tokens // actual)].rsplit(" ", 1)[0]
        if words == text:
            break
        text = words
    return text


def short_texts(seed: str, count: int, words: int | None = None) -> list[str]:
    """Return different texts to be embedded: what people search with, questions, and sentences of up to 30 words; or
    the first few ``words`` of such, at most.
    """
    draw = _random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = _short_text(draw)
        found[text if words is None else " ".join(text.split()[: draw.randint(1, words)])] = None
    return list(found)


def _short_text(draw: random.Random) -> str:
    kind = draw.choice(("search", "question", "opening", "few", "some", "many"))
    match kind:
        case "search":
            return f"{draw.choice(_SUBJECTS)} {draw.choice(_PLACES)}"
        case "question":
            return draw.choice(_TURNS).format(subject=draw.choice(_SUBJECTS))
        case "opening":
            return story(str(draw.random())).partition("\n\n")[2]
        case _:
            sentence = draw.choice(_sentences()).split()
            return " ".join(sentence[: draw.randint(*_WORDS[kind])])


@cache
def _sentences() -> Sequence[str]:
    """Return the manual's sentences that have more than a few words."""
    found = re.split(r"(?<=[.:?])\s+", "\n".join(_manual[name] for name in sorted(_manual)))
    return tuple(sentence for sentence in found if len(sentence.split()) > _WORDS["few"][1])


def questions(seed: str, count: int) -> list[str]:
    """Return different questions about a text; there are ten."""
    return _random(seed).sample(_QUESTIONS, count)


def conversation(seed: str, turns: int) -> list[str]:
    """Return what a person says in the turns of a conversation."""
    draw = _random(seed)
    subject = draw.choice(_SUBJECTS)
    return [_TURNS[turn % len(_TURNS)].format(subject=subject) for turn in range(turns)]


@dataclass(frozen=True)
class CodeEdit:
    """A file of 60 to 100 lines, and a name in it that is to be replaced by another."""

    name: str
    code: str
    old: str
    new: str

    @property
    def prompt(self) -> str:
        """What a model is asked. Small models start better when they are told the first line."""
        return (
            f"```python\n{self.code}```\n\nPlease write this whole code once more. Only rename `{self.old}` to "
            f"`{self.new}`; every other line stays as it is. Begin with `{self.wanted.splitlines()[0]}`."
        )

    @property
    def wanted(self) -> str:
        """The file as it should come out."""
        return re.sub(rf"\b{self.old}\b", self.new, self.code)


@cache
def code_edits() -> Sequence[CodeEdit]:
    """Return one edit for each module of the standard library in which neighbouring definitions make up a file."""
    return tuple(edit for edit in map(_edit, _MODULES) if edit is not None)


def _edit(module: str) -> CodeEdit | None:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for first, start in enumerate(nodes):
        begin = min([start.lineno, *(each.lineno for each in start.decorator_list)]) - 1
        for last in nodes[first:]:
            assert last.end_lineno is not None
            code = "".join(lines[begin : last.end_lineno])
            if _SHORTEST <= last.end_lineno - begin <= _LONGEST and (name := _common_name(code)) is not None:
                return CodeEdit(f"{module}.py", code, name, f"{name}_new")
    return None


def _common_name(code: str) -> str | None:
    """Return the variable of this code that is written most often, but not so often that the change is no small one."""
    names = Counter(node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name))
    for name, _ in names.most_common():
        if len(name) > 1 and name not in _NOT_RENAMED and _FEWEST <= len(re.findall(rf"\b{name}\b", code)) <= _MOST:
            return name
    return None
