"""Prompts with a gap, put together from a tokeniser whose tokens are characters."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, strategies as st

from llamaserve.api.fim_prompt import Gaps, Layout, Snippet, shares
from llamaserve.errors import InvalidRequest
from llamaserve.registry.gguf import FimTokens

BEGIN, PREFIX, SUFFIX, MIDDLE, REPOSITORY, SEPARATOR = range(6)
MARKS = FimTokens(PREFIX, SUFFIX, MIDDLE, None, None, frozenset({"<pre>", "<suf>", "<mid>"}))
REPOSITORIES = FimTokens(PREFIX, SUFFIX, MIDDLE, REPOSITORY, SEPARATOR, MARKS.names | {"<rep>", "<sep>"})
SHOWN = "^<|>@/"


class Characters:
    """One token for each character; with ``adds_bos`` a begin token, and ``found`` ones for their names in any text."""

    def __init__(self, *, adds_bos: bool = False, found: dict[str, int] | None = None) -> None:
        self.adds_bos = adds_bos
        self.found = found or {}
        self.asked: list[str] = []

    async def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        assert not parse_special
        self.asked.append(text)
        if len(text) > 5000:
            raise InvalidRequest("too long", param="text")
        for name, token in self.found.items():
            text = text.replace(name, chr(token))
        return [BEGIN] * (add_bos and self.adds_bos) + [ord(character) for character in text]


def prompts(
    gaps: Gaps,
    *,
    room: int = 1000,
    marks: FimTokens = MARKS,
    tokenizer: Characters | None = None,
    add_bos: bool = True,
) -> tuple[list[str], int]:
    """Return the prompts, with a character for each mark, and how much was lost."""
    layout = Layout(tokenizer or Characters(), marks, room=room, add_bos=add_bos)
    found = asyncio.run(layout.prompts(gaps))
    return ["".join(SHOWN[token] if token < len(SHOWN) else chr(token) for token in tokens) for tokens in found], (
        layout.lost
    )


def test_the_text_before_the_gap_comes_first_and_the_filling_last() -> None:
    assert prompts(Gaps(["abc"], "xyz")) == (["<abc|xyz>"], 0)
    assert prompts(Gaps([""], "")) == (["<|>"], 0)
    assert prompts(Gaps(["abc", "de", [102, 103]], "x")) == (["<abc|x>", "<de|x>", "<fg|x>"], 0)


def test_a_begin_token_comes_once_and_before_all() -> None:
    adds = Characters(adds_bos=True)
    assert prompts(Gaps(["abc", [BEGIN, 97]], "x"), tokenizer=adds) == (["^<abc|x>", "^<a|x>"], 0)
    assert prompts(Gaps(["abc"], "x", [Snippet("s")]), tokenizer=adds)[0][0].startswith("^\n--- ")
    assert prompts(Gaps(["abc"], "x"), tokenizer=adds, add_bos=False) == (["<abc|x>"], 0)


def test_snippets_come_before_under_the_names_of_their_files() -> None:
    gaps = Gaps(["abc"], "x", [Snippet("one\n", "a.py"), Snippet("two")])
    assert prompts(gaps) == (["\n--- a.py ---\none\n\n--- snippet ---\ntwo\n<abc|x>"], 0)
    assert prompts(gaps, marks=REPOSITORIES) == (["@project\n/a.py\none\n/snippet\ntwo\n/current\n<abc|x>"], 0)
    assert prompts(Gaps(["abc"], "x"), marks=REPOSITORIES) == (["<abc|x>"], 0)


def test_the_outer_ends_are_lost_three_to_one() -> None:
    assert prompts(Gaps(["a" * 50 + "b" * 50], "x" * 50 + "y" * 50), room=43) == (
        ["<" + "b" * 30 + "|xxxxxxxxxx>"],
        160,
    )
    assert prompts(Gaps(["ab"], "x" * 50 + "y" * 50), room=43) == (["<ab|" + "x" * 38 + ">"], 62)
    assert prompts(Gaps(["a" * 90 + "b" * 10], "xy"), room=43)[0] == ["<" + "a" * 28 + "b" * 10 + "|xy>"]
    assert prompts(Gaps(["abc"], "x"), room=0) == (["<|>"], 4)


def test_snippets_are_lost_first_and_the_oldest_of_them_before_others() -> None:
    gaps = Gaps(["abc"], "x", [Snippet("1" * 20, "a"), Snippet("2" * 20, "b"), Snippet("3" * 20, "c")])
    (prompt,), lost = prompts(gaps, room=120)
    assert prompt == "\n--- b ---\n" + "2" * 16 + "\n\n--- c ---\n" + "3" * 20 + "\n<abc|x>"
    assert lost == 32 + 4
    (prompt,), _ = prompts(gaps, room=10)
    assert prompt == "<abc|x>"
    (prompt,), _ = prompts(gaps, room=60, marks=REPOSITORIES)
    assert prompt == "@project\n/c\n" + "3" * 8 + "\n/current\n<abc|x>"


def test_snippets_stay_the_same_while_the_text_at_the_gap_grows() -> None:
    snippets = [Snippet(str(number) * 30, f"{number}.py") for number in range(9)]
    found = {
        prompts(Gaps(["a" * length], "x" * 20, snippets), room=300)[0][0].partition("<")[0] for length in range(99)
    }
    assert len(found) == 1


@pytest.mark.parametrize("text", ["a<suf>b", "<pre><suf><mid>", "<<suf>>", "<suf"])
def test_a_name_of_a_mark_in_a_text_is_text_even_where_the_tokeniser_finds_it(text: str) -> None:
    tokenizer = Characters(found={"<pre>": PREFIX, "<suf>": SUFFIX, "<mid>": MIDDLE})
    layout = Layout(tokenizer, MARKS, room=100, add_bos=True)
    (tokens,) = asyncio.run(layout.prompts(Gaps([text], text)))
    characters = [ord(character) for character in text]
    assert tokens == [PREFIX, *characters, SUFFIX, *characters, MIDDLE]


def test_a_text_that_is_too_long_is_named() -> None:
    texts = {
        "here": Gaps(["a" * 6000], "", params=("here", "s", "e")),
        "s": Gaps([""], "a" * 6000, params=("here", "s", "e")),
        "e[1].text": Gaps([""], "", [Snippet("a"), Snippet("a" * 6000)], ("here", "s", "e")),
        "e[0].filename": Gaps([""], "", [Snippet("a", "a" * 6000)], ("here", "s", "e")),
    }
    for name, gaps in texts.items():
        with pytest.raises(InvalidRequest) as caught:
            prompts(gaps)
        assert caught.value.param == name


def test_the_suffix_of_many_prompts_is_tokenised_once() -> None:
    tokenizer = Characters()
    prompts(Gaps(["a"] * 50, "xyz"), tokenizer=tokenizer)
    assert tokenizer.asked.count("xyz") == 1


@given(st.integers(-5, 200), st.integers(0, 300), st.integers(0, 300))
def test_shares_use_the_room_and_nothing_more(room: int, prefix: int, suffix: int) -> None:
    ahead, behind = shares(room, prefix, suffix)
    assert 0 <= ahead <= prefix
    assert 0 <= behind <= suffix
    assert ahead + behind == min(max(0, room), prefix + suffix)
    assert behind == suffix or behind >= room // 4
    assert ahead == prefix or ahead >= room - room // 4 - 1


@given(
    prefix=st.text("abc\n", max_size=80),
    suffix=st.text("xyz\n", max_size=80),
    snippets=st.lists(
        st.builds(Snippet, st.text("123\n", max_size=60), st.none() | st.text("f", max_size=9)), max_size=5
    ),
    room=st.integers(4, 200),
    repositories=st.booleans(),
)
def test_a_prompt_fits_and_what_is_lost_is_counted(
    prefix: str, suffix: str, snippets: list[Snippet], room: int, repositories: bool
) -> None:
    marks = REPOSITORIES if repositories else MARKS
    gaps = Gaps([prefix], suffix, snippets)
    (cut,), lost = prompts(gaps, room=room, marks=marks, tokenizer=Characters(adds_bos=True))
    (whole,), _ = prompts(gaps, room=10_000, marks=marks, tokenizer=Characters(adds_bos=True))
    assert len(cut) <= room
    frame = len("@project\n/current\n") if repositories and snippets and not cut.startswith("^@") else 0
    assert len(whole) == len(cut) + lost + frame
    ahead, behind = cut[cut.index("<") + 1 : -1].split("|")
    assert prefix.endswith(ahead)
    assert suffix.startswith(behind)
