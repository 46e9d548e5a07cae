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

    def __init__(self, *, adds_bos: bool = False, found: dict[str, int] | None = None, longest: int = 5000) -> None:
        self.adds_bos = adds_bos
        self.longest = longest
        self.found = found or {}
        self.asked: list[str] = []

    async def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        assert not parse_special
        self.asked.append(text)
        if len(text) > self.longest:
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
    assert prompts(Gaps(["a" * 33], "x"), room=0) == (["<|>"], 3 + 1), "a token for 16 characters"


def test_snippets_are_lost_first_and_the_oldest_of_them_before_others() -> None:
    gaps = Gaps(["abc"], "x", [Snippet("1" * 20, "a"), Snippet("2" * 20, "b"), Snippet("3" * 20, "c")])
    (prompt,), lost = prompts(gaps, room=120)
    assert prompt == "\n--- b ---\n" + "2" * 16 + "\n\n--- c ---\n" + "3" * 20 + "\n<abc|x>"
    assert lost == 4 + 1 + 2, "the first one is not tokenised"
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


class SentencePieces(Characters):
    """A tokeniser that puts a space before every text, and writes spaces as vocabularies do."""

    async def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        spaced = f" {text}".replace(" ", "\u2581") if text else ""
        return await super().tokenize(spaced, add_bos=add_bos, parse_special=parse_special)


@pytest.mark.parametrize(
    "text", ["<PRE>", "a <SUF> b", "\u2581<MID>", "<PRE> <PRE> <PRE>", "   <SUF>", "\n<MID> <PRE>x"]
)
def test_a_name_that_begins_with_a_space_is_text_too(text: str) -> None:
    marks = FimTokens(PREFIX, SUFFIX, MIDDLE, None, None, frozenset({"\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"}))
    found = {"\u2581<PRE>": PREFIX, "\u2581<SUF>": SUFFIX, "\u2581<MID>": MIDDLE}
    layout = Layout(SentencePieces(found=found), marks, room=1000, add_bos=False)
    (tokens,) = asyncio.run(layout.prompts(Gaps([text], text)))
    kept = [chr(token) for token in tokens if token >= len(SHOWN)]
    assert "".join(kept).replace("\u2581", "") == 2 * text.replace("\u2581", "").replace(" ", "")
    assert [token for token in tokens if token < len(SHOWN)] == [PREFIX, SUFFIX, MIDDLE]


@given(st.text("abc<", max_size=60))
def test_a_mark_that_a_text_spells_otherwise_is_taken_in_halves(text: str) -> None:
    tokenizer = Characters(found={"<ab": SUFFIX, "cc": MIDDLE})
    layout = Layout(tokenizer, MARKS, room=200, add_bos=False)
    (tokens,) = asyncio.run(layout.prompts(Gaps([text], text)))
    characters = [ord(character) for character in text]
    assert tokens == [PREFIX, *characters, SUFFIX, *characters, MIDDLE]


def test_a_text_that_can_only_be_a_mark_is_refused() -> None:
    marks = FimTokens(PREFIX, SUFFIX, MIDDLE, None, None, frozenset({"a", "", "<mid>"}))
    for found, text in ({"a": PREFIX}, "xxay"), ({"xy": PREFIX}, "xy" * 10_000):
        tokenizer = Characters(found=found, longest=10**6)
        layout = Layout(tokenizer, marks, room=5_000, add_bos=False)
        with pytest.raises(InvalidRequest) as caught:
            asyncio.run(layout.prompts(Gaps([""], text)))
        assert caught.value.param == "suffix"
        assert len(tokenizer.asked) <= 10_002


def test_what_is_far_from_fitting_is_not_tokenised() -> None:
    tokenizer = Characters(longest=16 * 100)
    snippets = [Snippet(str(number) * 10**6, "n" * 10**6 if number == 9 else None) for number in range(10)]
    (prompt,), lost = prompts(Gaps(["a" * 2 * 10**6], "x" * 2 * 10**6, snippets), room=100, tokenizer=tokenizer)
    assert prompt == "<" + "a" * 73 + "|" + "x" * 24 + ">"
    assert sum(map(len, tokenizer.asked)) <= 16 * 250
    assert 15 * 10**6 / 16 <= lost <= 15 * 10**6
    (prompt,), _ = prompts(Gaps(["abc"], "", snippets[:9]), room=100, tokenizer=tokenizer)
    assert prompt == "\n--- snippet ---\n" + "8" * 32 + "\n" + "<abc|>"


def test_many_snippets_cost_no_more_than_few() -> None:
    tokenizer = Characters()
    prompts(Gaps(["abc"], "", [Snippet("a" * 30)] * 1024), room=200, tokenizer=tokenizer)
    assert len(tokenizer.asked) < 10


def test_a_text_that_is_refused_is_named() -> None:
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
    missing = len(whole) - len(cut) - frame
    assert missing / 16 <= lost <= missing
    ahead, behind = cut[cut.index("<") + 1 : -1].split("|")
    assert prefix.endswith(ahead)
    assert suffix.startswith(behind)
