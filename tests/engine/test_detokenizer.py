from __future__ import annotations

from hypothesis import given, strategies as st

from llamaserve.engine.detokenizer import Detokenizer

_DAMAGED = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5"]
_some_bytes = st.lists(
    st.one_of(st.binary(max_size=4), st.sampled_from(_DAMAGED), st.text(max_size=3).map(str.encode)), max_size=12
).map(b"".join)


@st.composite
def _cut_bytes(draw: st.DrawFn, source: st.SearchStrategy[bytes] = _some_bytes) -> tuple[bytes, list[bytes]]:
    data = draw(source)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return data, [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(_cut_bytes())
def test_any_cut_gives_the_text_of_all_bytes(cut: tuple[bytes, list[bytes]]) -> None:
    data, pieces = cut
    detokenizer = Detokenizer(())
    text = "".join(map(detokenizer.push, pieces)) + detokenizer.finish()
    assert text == data.decode("utf-8", "replace")
    assert not detokenizer.stopped


@given(_cut_bytes())
def test_at_most_an_unfinished_character_is_held_back(cut: tuple[bytes, list[bytes]]) -> None:
    _, pieces = cut
    detokenizer = Detokenizer(())
    seen, released = b"", ""
    for piece in pieces:
        released += detokenizer.push(piece)
        seen += piece
        assert seen.decode("utf-8", "replace").startswith(released)
        held = min(len(seen), 3)
        assert any(seen[: len(seen) - n].decode("utf-8", "replace") == released for n in range(held + 1))


@given(st.text(), st.data())
def test_whole_characters_are_released_at_once(text: str, data: st.DataObject) -> None:
    detokenizer = Detokenizer(())
    for character in text:
        assert detokenizer.push(character.encode()) == character
    assert detokenizer.finish() == ""


@given(
    _cut_bytes(st.lists(st.sampled_from([b"a", b"b", "é".encode(), b"\xc3", b"\xe2\x82"]), max_size=20).map(b"".join)),
    st.lists(st.text(alphabet="abé\ufffd", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_any_cut_gives_the_text_before_the_first_stop_string(cut: tuple[bytes, list[bytes]], stops: list[str]) -> None:
    data, pieces = cut
    whole = Detokenizer(stops)
    expected = whole.push(data) + whole.finish()
    detokenizer = Detokenizer(stops)
    assert "".join(map(detokenizer.push, pieces)) + detokenizer.finish() == expected
    assert detokenizer.stopped == whole.stopped
    text = data.decode("utf-8", "replace")
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        assert whole.stopped
        assert text[: min(ends)].startswith(expected)
        assert text[len(expected) : min(ends)] in stops
    else:
        assert expected == text


def test_a_stop_string_split_inside_a_character_is_found() -> None:
    detokenizer = Detokenizer(["é!"])
    assert detokenizer.push(b"caf\xc3") == "caf"
    assert detokenizer.push(b"\xa9") == ""
    assert not detokenizer.stopped
    assert detokenizer.push(b"! more") == ""
    assert detokenizer.stopped
    assert detokenizer.push(b"text") == ""
    assert detokenizer.finish() == ""


def test_the_beginning_of_a_stop_string_is_released_at_the_end() -> None:
    detokenizer = Detokenizer(["###"])
    assert detokenizer.push(b"one ##") == "one "
    assert detokenizer.finish() == "##"
