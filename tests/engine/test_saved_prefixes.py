from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from recurrent_model import write_recurrent_model
from running_engine import RunningEngine, teacher_forced
from sliding_model import write_sliding_model

from llamaserve import heap
from llamaserve.engine import prefix_cache, saved_prefixes, spill as spilling
from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.llama import Model
from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.engine.saved_prefixes import NOTHING, PrefixFile, PrefixWriter
from llamaserve.engine.sequence import AdapterKey, common_prefix
from llamaserve.engine.spill import Spill
from llamaserve.errors import EngineError

_BLOCK = 4
_ROOM = 1 << 20
_PLENTY = 1 << 30
_GREEDY = Generation(sampling=Sampling(seed=0, temperature=0.0), max_tokens=6)
_LORA = (("digest", 0.5),)

Prefixes = Sequence[tuple[AdapterKey, list[int]]]


def _changed(params: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(params, **changes)


# The file


def _state(tokens: list[int]) -> bytearray:
    """A state that says of which tokens it is, a byte each and a few more."""
    return bytearray(b"state" + bytes(tokens))


def _write(
    path: Path, prefixes: Prefixes, *, identity: str = "this", room: int = _ROOM, extends: PrefixFile | None = None
) -> PrefixWriter:
    """Write prefixes as far as there is room for them."""
    with PrefixWriter(path, identity, block=_BLOCK, room=room, extends=extends) as writer:
        for adapters, tokens in prefixes:
            place: int | None = NOTHING
            for start in range(0, len(tokens), _BLOCK):
                part = tokens[start : start + _BLOCK]
                assert place is not None
                found = writer.find(place, adapters, part)
                place = writer.add(place, adapters, part, _state(part)) if found is None else found
                if place is None:
                    break
        size = writer.finish()
    assert size <= max(0, room)
    assert size == (path.stat().st_size if writer.tokens else 0)
    return writer


def _open(path: Path, identity: str = "this", block: int = _BLOCK) -> PrefixFile | None:
    return PrefixFile.open(path, identity, block=block)


def _adopted(path: Path) -> Spill:
    spill = Spill(0)
    file = _open(path)
    spill.adopt(file.blocks() if file else ())
    return spill


def _found(spill: Spill, adapters: AdapterKey, wanted: list[int]) -> int:
    """Return how many of the tokens can be brought back, and check that they are the right ones."""
    shared, blocks = spill.longest(wanted, adapters)
    found = 0
    for block in blocks:
        state = block.load()
        if state is None:
            return found
        assert state == _state(block.tokens)
        assert block.tokens[: shared - found] == wanted[found:shared][: len(block.tokens)]
        found = min(shared, found + len(block.tokens))
    return found


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "saved"


@pytest.fixture(autouse=True)
def short_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test of a model long enough to be worth it."""
    models = {"loud", "anything", "starter"} & set(request.fixturenames)
    monkeypatch.setattr(spilling, "BLOCK", 20 if models else _BLOCK)
    if models:
        monkeypatch.setattr(prefix_cache, "_WORTH_KEEPING", 16)


_TEXTS = st.lists(
    st.tuples(st.sampled_from([(), _LORA]), st.lists(st.integers(0, 1), min_size=1, max_size=14)), max_size=8
)


@given(prefixes=_TEXTS, wanted=st.lists(st.integers(0, 1), max_size=14))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_found_with_the_same_adapters_only(
    path: Path, prefixes: Prefixes, wanted: list[int]
) -> None:
    _write(path, prefixes)
    spill = _adopted(path)
    for adapters in ((), _LORA):
        kept = [tokens for key, tokens in prefixes if key == adapters]
        expected = max((common_prefix(tokens, wanted) for tokens in kept), default=0)
        assert _found(spill, adapters, wanted) == expected
        assert all(_found(spill, adapters, tokens) == len(tokens) for tokens in kept)
    assert spill.size == 0, "states stay in the file"


@given(prefixes=_TEXTS, room=st.integers(-10, 1500))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_never_larger_than_it_may_be(path: Path, prefixes: Prefixes, room: int) -> None:
    path.unlink(missing_ok=True)
    writer = _write(path, prefixes, room=room)
    assert writer.full or writer.tokens or not prefixes
    spill = _adopted(path)
    assert writer.full or all(_found(spill, *prefix) == len(prefix[1]) for prefix in prefixes)
    assert _names(path.parent) == [path.name] * bool(writer.tokens)


_SOME: Prefixes = [((), [1] * 10), ((), [1] * 4 + [2] * 8), (_LORA, [1] * 6)]


def test_nobody_else_can_read_it(path: Path) -> None:
    _write(path, _SOME)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, place: data[:place],
        lambda data, place: data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :],
    ],
    ids=["cut", "changed"],
)
def test_damage_anywhere_loses_no_more_than_what_is_damaged(
    path: Path, damage: Callable[[bytes, int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    _write(path, _SOME)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(damage(whole, place))
        spill = _adopted(path)
        lengths = [_found(spill, *prefix) for prefix in _SOME]
        assert lengths != [10, 12, 6], f"byte {place} is of no importance"
        if path.exists():
            assert max(lengths) >= 6, "what is before it, or beside it, is good"
        line = capsys.readouterr().err
        assert line.count(str(path)) >= 1
        assert line.startswith("a saved prefix is evaluated again" if path.exists() else "saved prefixes are discarded")


@pytest.mark.parametrize(("identity", "block"), [("that", _BLOCK), ("this", 0), ("this", 256), ("", _BLOCK)])
def test_what_is_of_other_settings_is_discarded(
    path: Path, identity: str, block: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(path, _SOME)
    assert _open(path, identity, block) is None
    assert not path.exists()
    assert capsys.readouterr().err == (
        f"saved prefixes are discarded, since it is of another model, or other settings: {path}\n"
    )


@pytest.mark.parametrize(
    "content", [b"", b"llamaserve prefixes, version 1\n\0", b"llamaserve prefixes, version 2\n\0" + bytes(80)]
)
def test_what_is_no_such_file_is_discarded(path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert _open(path) is None
    assert not path.exists()
    assert "discarded" in capsys.readouterr().err


_GOOD = saved_prefixes._Entry(NOTHING, 0, [1] * _BLOCK, saved_prefixes._STATES, 8, 0)


@pytest.mark.parametrize(
    "entry",
    [
        _changed(_GOOD, parent=1),
        _changed(_GOOD, parent=-2),
        _changed(_GOOD, parent=0, adapters=1),
        _changed(_GOOD, adapters=2),
        _changed(_GOOD, adapters=-1),
        _changed(_GOOD, tokens=[]),
        _changed(_GOOD, tokens=[1] * 5),
        _changed(_GOOD, tokens=[-1]),
        _changed(_GOOD, tokens=[2**31]),
        _changed(_GOOD, offset=0),
        _changed(_GOOD, size=0),
        _changed(_GOOD, size=-8),
        _changed(_GOOD, size=1 << 40),
        _changed(_GOOD, offset=1 << 63),
    ],
)
def test_a_catalogue_that_makes_no_sense_is_not_believed(path: Path, entry: saved_prefixes._Entry) -> None:
    with PrefixWriter(path, "this", block=_BLOCK, room=_ROOM) as writer:
        assert writer.add(NOTHING, (), [1] * _BLOCK, bytearray(8)) == 0
        writer._adapters.append(_LORA)
        writer._entries.append(entry)
        writer.finish()
    assert _open(path) is None


def test_without_prefixes_there_is_no_file(path: Path) -> None:
    _write(path, _SOME)
    assert _write(path, []).tokens == 0
    assert _names(path.parent) == []
    assert _open(path) is None


def test_a_file_stays_where_nothing_had_room(path: Path) -> None:
    _write(path, _SOME)
    former = path.read_bytes()
    for room in (0, 100):
        with PrefixWriter(path, "this", block=_BLOCK, room=room) as writer:
            assert writer.add(NOTHING, (), [1], bytearray(1000)) is None
            assert writer.finish() == 0
        assert path.read_bytes() == former
        assert _names(path.parent) == [path.name]


def _free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Have so many bytes of the disk free."""
    before = os.fstatvfs

    def almost_full(descriptor: int) -> os.statvfs_result:
        return os.statvfs_result((1, 1, *before(descriptor)[2:4], size, *before(descriptor)[5:]))

    monkeypatch.setattr(os, "fstatvfs", almost_full)


def test_a_new_file_takes_no_more_than_half_of_what_the_disk_has_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, 3000)
    with PrefixWriter(path, "this", block=_BLOCK, room=_PLENTY) as writer:
        assert writer.add(NOTHING, (), [1], bytearray(900)) is not None
        assert writer.add(NOTHING, (), [2], bytearray(900)) is None
        assert 900 < writer.finish() <= 1500
    former = path.read_bytes()
    with PrefixWriter(path, "this", block=_BLOCK, room=_PLENTY) as writer:
        assert writer.add(NOTHING, (), [3], bytearray(900)) is not None
        assert writer.add(NOTHING, (), [4], bytearray(900)) is None
        assert writer.finish() == 0, "it is cut short, and the former one is whole"
    assert path.read_bytes() == former


def test_two_processes_of_the_same_number_do_not_write_the_same_file(path: Path) -> None:
    with PrefixWriter(path, "this", block=_BLOCK, room=_ROOM) as one:
        with PrefixWriter(path, "this", block=_BLOCK, room=_ROOM) as other:
            other.add(NOTHING, (), [1], _state([1]))
            other.finish()
        one.add(NOTHING, (), [2], _state([2]))
        one.finish()
    assert _found(_adopted(path), (), [2]) == 1
    assert _names(path.parent) == [path.name]


def test_a_save_that_fails_leaves_the_former_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path, _SOME)
    former = path.read_bytes()
    file = _open(path)
    for extends in (file, None):

        def full(descriptor: int, data: memoryview, offset: int, before: Callable[..., int] = os.pwrite) -> int:
            if offset > saved_prefixes._STATES + 20:
                raise OSError(28, "No space left on device")
            return before(descriptor, data[:3], offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(EngineError, match="No space left on device"):
                _write(path, [((), [3] * 12)], extends=extends)
        assert path.read_bytes() == former
        assert _names(path.parent) == [path.name]


def test_where_there_can_be_no_file_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="prefixes can't be saved in"):
        _write(tmp_path / "file" / "saved", _SOME)


def _extend(path: Path, file: PrefixFile, more: Prefixes) -> PrefixWriter:
    """Keep what is in a file, and add to it."""
    with PrefixWriter(path, "this", block=_BLOCK, room=_ROOM, extends=file) as writer:
        for block in file.blocks():
            assert writer.holds(block.state) == (writer.extends is not None)
            state = block.state if writer.extends else block.state.read()
            assert state is not None
            writer.add(block.parent, block.adapters, block.tokens, state)
        for adapters, tokens in more:
            writer.add(NOTHING, adapters, tokens, _state(tokens))
        writer.finish()
    return writer


def test_a_file_that_is_extended_keeps_what_it_has(path: Path) -> None:
    _write(path, _SOME)
    for token in range(3, 6):
        inode, size = path.stat().st_ino, path.stat().st_size
        file = _open(path)
        assert file is not None
        assert _extend(path, file, [((), [token] * 3)]).extends
        assert (path.stat().st_ino, path.stat().st_size > size) == (inode, True)
    spill = _adopted(path)
    for adapters, tokens in [*_SOME, *(((), [token] * 3) for token in range(3, 6))]:
        assert _found(spill, adapters, tokens) == len(tokens)


def test_a_file_to_which_nothing_is_added_does_not_grow(path: Path) -> None:
    _write(path, _SOME)
    former = path.read_bytes()
    for _ in range(2):
        file = _open(path)
        assert file is not None
        assert _extend(path, file, []).extends
        assert path.read_bytes() == former


def test_what_came_to_an_end_while_it_was_extended_is_as_before(path: Path) -> None:
    _write(path, _SOME)
    with path.open("ab") as file:
        file.write(b"states, and no catalogue")
    spill = _adopted(path)
    assert [_found(spill, *prefix) for prefix in _SOME] == [10, 12, 6]


def test_what_another_process_has_changed_is_not_extended(path: Path) -> None:
    _write(path, _SOME)
    one, other = _open(path), _open(path)
    assert one is not None
    assert other is not None
    _extend(path, one, [((), [3] * 3)])
    assert not _extend(path, other, [((), [4] * 3)]).extends, "the first has extended it"
    spill = _adopted(path)
    assert [_found(spill, *prefix) for prefix in _SOME] == [10, 12, 6]
    assert [_found(spill, (), [token] * 3) for token in (3, 4)] == [0, 3]
    third = _open(path)
    assert third is not None
    _write(path, _SOME)
    assert not _extend(path, third, []).extends, "there is another file in its place"


# The engine


@pytest.fixture(scope="module", params=["unified", "recurrent", "sliding", "sliding, full"])
def anything(
    backend: None, request: pytest.FixtureRequest, loud_params: LoadParams, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, LoadParams]]:
    """A model with each kind of memory."""
    params = loud_params
    if request.param != "unified":
        path = tmp_path_factory.mktemp("models") / "tiny.gguf"
        (write_recurrent_model if request.param == "recurrent" else write_sliding_model)(path)
        params = _changed(params, path=str(path))
    if request.param.startswith("sliding"):
        params = _changed(params, kv_cells=1024)
    if request.param == "sliding, full":
        params = _changed(params, full_window=True)
    model = Model(params, lambda fraction: True)
    yield model, params
    model.close()


class Lives:
    """Engines of one model, one after the other, each of which goes on with the file of the one before."""

    def __init__(self, model: Model, params: LoadParams, path: Path) -> None:
        self.model = model
        self.path = path
        self.params = _changed(params, saved_prefixes=str(path), prefixes_identity="this")
        self.running = RunningEngine(model, self.params)
        self._asked = 0

    def ask(self, prompt: str | list[int], generation: Generation = _GREEDY) -> tuple[list[int], int]:
        """Return the answer's tokens, and how many of the prompt's were there."""
        self._asked += 1
        self.running.submit(self._asked, prompt, generation)
        self.running.run()
        answer = self.running.answers[self._asked, 0]
        assert answer.finished is not None
        self.running.check_books()
        return answer.tokens, answer.finished.cached_tokens

    def save(self, size: int = _PLENTY) -> tuple[int, int]:
        """Write the file; return its tokens and bytes."""
        saved = self.running.engine.save_prefixes(self.path, size)
        self.running.check_books()
        return saved

    def again(self, **changes: Any) -> None:
        """Begin the next life."""
        self.running.close()
        self.params = _changed(self.params, **changes)
        self.running = RunningEngine(self.model, self.params)


def _alone(model: Model, params: LoadParams, prompt: str | list[int]) -> list[int]:
    running = RunningEngine(model, _changed(params, prefix_cache=False, speculation=False))
    try:
        return running.alone(prompt, _GREEDY)[0].tokens
    finally:
        running.close()


@pytest.fixture
def lives(loud: Model, loud_params: LoadParams, path: Path) -> Iterator[Lives]:
    lives = Lives(loud, loud_params, path)
    yield lives
    lives.running.check_nothing_is_left()
    lives.running.close()


_TEXT = "The lighthouse keeper wrote down every ship that passed."
_OTHER = "Bread is made of flour, of water and of some salt; and"


@pytest.mark.parametrize("spill", [0, 1 << 20])
def test_a_conversation_goes_on_in_the_next_life(anything: tuple[Model, LoadParams], path: Path, spill: int) -> None:
    model, params = anything
    lives = Lives(model, _changed(params, spill=spill), path)
    try:
        answer, cached = lives.ask(_TEXT)
        assert cached == 0
        length = len(lives.running.engine.encode(_TEXT))
        for turn in range(3):
            prompt = [*lives.running.engine.encode(_TEXT), *answer, *[40 + turn] * 3]
            tokens, size = lives.save()
            assert tokens >= length + len(answer) - 1
            assert size == path.stat().st_size
            lives.again()
            expected = _alone(model, params, prompt)
            tokens_again, cached = lives.ask(prompt)
            assert tokens_again == expected
            assert length + len(answer) - cached in (0, 1), "all but perhaps the last token of the answer"
            assert lives.ask(prompt)[0] == expected, "and again, out of the cache"
        lives.running.check_nothing_is_left()
    finally:
        lives.running.close()


def test_the_context_and_all_that_does_not_change_a_state_may_be_others(lives: Lives) -> None:
    lives.ask(_TEXT)
    lives.save()
    lives.again(context=80, parallel=2, kv_cells=512, batch=16, spill=1 << 20, threads=2, speculation=False)
    expected = _alone(lives.model, lives.params, _TEXT + "!")
    assert lives.ask(_TEXT + "!") == (expected, len(lives.running.engine.encode(_TEXT)))


def test_what_lies_in_main_memory_is_saved_too(lives: Lives) -> None:
    lives.again(spill=1 << 20)
    lives.ask(_TEXT)
    while lives.running.engine.save_ahead():
        pass
    lives.ask(_OTHER)
    assert lives.running.engine._cache._spill.size > 0
    lives.save()
    lives.again(spill=0)
    for text in (_OTHER, _TEXT):
        assert lives.ask(text) == (_alone(lives.model, lives.params, text), len(lives.running.engine.encode(text)) - 1)


def test_beginnings_in_common_are_saved_once(lives: Lives) -> None:
    tokens, _ = _saved_of(lives, _TEXT)
    longer, _ = _saved_of(lives, _TEXT + " Again!")
    both, _ = _saved_of(lives, _TEXT, _TEXT + " Again!")
    shared = len(lives.running.engine.encode(_TEXT)) // 20 * 20
    assert both == tokens + longer - shared


def _saved_of(lives: Lives, *texts: str) -> tuple[int, int]:
    lives.path.unlink(missing_ok=True)
    lives.again()
    for text in texts:
        lives.ask(text)
    return lives.save()


def test_sequences_that_run_are_saved_as_far_as_they_are(lives: Lives) -> None:
    lives.running.submit(0, _TEXT, _changed(_GREEDY, max_tokens=20))
    lives.running.step(6)
    evaluated = lives.running.engine._scheduler.running[0].evaluated
    assert evaluated > 20
    assert lives.save()[0] == evaluated
    lives.running.run()
    assert lives.running.answers[0, 0].tokens[:6] == _alone(lives.model, lives.params, _TEXT)
    lives.again()
    prompt = lives.running.engine.encode(_TEXT)
    assert lives.ask(_TEXT)[1] == min(evaluated, len(prompt) - 1)


def test_what_was_used_last_is_saved_first(lives: Lives) -> None:
    _, one = _saved_of(lives, _TEXT)
    lives.path.unlink()
    lives.again()
    for text in (_TEXT, _OTHER, _TEXT + "?"):
        lives.ask(text)
    tokens, size = lives.save(one + one // 2)
    assert size <= one + one // 2
    lives.again()
    length = len(lives.running.engine.encode(_TEXT))
    assert lives.ask(_TEXT + "?")[1] >= length
    assert 0 < lives.ask(_OTHER)[1] < tokens - length, "its beginning had room"


def test_a_file_without_room_for_more_is_written_anew(lives: Lives) -> None:
    _, size = _saved_of(lives, _TEXT)
    inode = lives.path.stat().st_ino
    lives.again()
    lives.ask(_OTHER)
    lives.save(size)
    assert lives.path.stat().st_size <= size
    assert lives.path.stat().st_ino != inode
    lives.again()
    assert lives.ask(_OTHER)[1] > 50


def test_a_full_disk_costs_no_saved_prefixes(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    _, size = _saved_of(lives, _TEXT)
    former = lives.path.read_bytes()
    _free(monkeypatch, 1000)
    for room in (0, size, _PLENTY):
        lives.again()
        assert lives.ask(_TEXT)[1] > 50
        if room != _PLENTY:
            lives.ask(_OTHER)
        lives.save(room)
        assert lives.path.read_bytes()[saved_prefixes._STATES : size] == former[saved_prefixes._STATES :]


def test_what_goes_wrong_with_an_adapter_costs_the_saved_prefixes_of_no_others(lives: Lives) -> None:
    tokens, _ = _saved_of(lives, _TEXT)
    lives.again(spill=1 << 20)
    lives.ask(_OTHER)
    while lives.running.engine.save_ahead():
        pass
    cache = lives.running.engine._cache
    assert cache._spill.size > 0
    cache.forget_all(_LORA)
    assert cache._spill.size == 0
    lives.running.check_books()
    assert lives.save()[0] == tokens
    lives.again()
    assert lives.ask(_TEXT)[1] > 50


def test_a_file_grows_as_long_as_it_holds_little_that_is_of_no_use(lives: Lives) -> None:
    _saved_of(lives, _TEXT)
    inode = lives.path.stat().st_ino
    lives.again()
    lives.ask(_OTHER)
    lives.save()
    assert lives.path.stat().st_ino == inode
    lives.again()
    lives.running.engine._cache._spill._roots.clear()
    lives.ask(_OTHER)
    lives.save()
    assert lives.path.stat().st_ino != inode


def test_nothing_is_saved_where_prefixes_can_not_move(loud: Model, loud_params: LoadParams, path: Path) -> None:
    _write(path, _SOME)
    before = path.read_bytes()
    for changes in ({"kv_unified": False, "kv_cells": 1024}, {"prefix_cache": False}):
        lives = Lives(loud, _changed(loud_params, **changes), path)
        lives.ask(_TEXT)
        assert lives.save() == (0, 0)
        lives.running.engine.limit_spill(1 << 20)
        assert lives.running.engine._cache._spill.budget == 0
        lives.running.close()
    assert path.read_bytes() == before, "another's file, perhaps"


def test_an_unused_engine_keeps_what_it_was_given(lives: Lives) -> None:
    saved = lives.save()
    assert saved == (0, 0)
    assert not lives.path.exists()
    tokens, _ = _saved_of(lives, _TEXT)
    for _ in range(3):
        lives.again()
        assert lives.save()[0] == tokens


def test_a_damaged_block_is_evaluated_again(lives: Lives, capsys: pytest.CaptureFixture[str]) -> None:
    lives.ask(_TEXT)
    lives.save()
    file = PrefixFile.open(lives.path, "this", block=20)
    assert file is not None
    second = [*file.blocks()][1].state
    with lives.path.open("r+b") as damaged:
        damaged.seek(second.offset + second.size // 2)
        damaged.write(b"damaged")
    lives.again()
    assert lives.ask(_TEXT) == (_alone(lives.model, lives.params, _TEXT), 20)
    assert "is evaluated again, since bytes from" in capsys.readouterr().err
    assert lives.ask(_TEXT)[1] == len(lives.running.engine.encode(_TEXT)) - 1
    assert capsys.readouterr().err == ""
    lives.save()
    lives.again()
    assert lives.ask(_TEXT)[1] == len(lives.running.engine.encode(_TEXT)) - 1, "it was saved again"


def test_a_file_that_is_removed_meanwhile_serves_on(lives: Lives) -> None:
    lives.ask(_TEXT)
    lives.save()
    lives.again()
    lives.path.unlink()
    assert lives.ask(_TEXT)[1] > 50
    lives.save()
    assert lives.path.exists()


def test_a_state_that_llama_cpp_refuses_is_evaluated_again(lives: Lives, path: Path) -> None:
    with PrefixWriter(path, "this", block=20, room=_ROOM) as writer:
        writer.add(NOTHING, (), lives.running.engine.encode(_TEXT)[:20], bytearray(1000))
        writer.finish()
    lives.again()
    assert lives.ask(_TEXT) == (_alone(lives.model, lives.params, _TEXT), 0)
    assert not lives.running.engine._cache._spill._roots


def test_a_limit_of_what_is_in_main_memory(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(True))
    lives.again(spill=1 << 20)
    engine, cache = lives.running.engine, lives.running.engine._cache
    for text in (_TEXT, _OTHER):
        lives.ask(text)
        while engine.save_ahead():
            pass
    size = cache._spill.size
    engine.limit_spill(size - 1)
    assert 0 < cache._spill.size < size
    engine.limit_spill(0)
    assert cache._spill.size == 0
    assert not engine.save_ahead()
    engine.limit_spill(1 << 20)
    assert given_back == [True] * 3
    while engine.save_ahead():
        pass
    assert cache._spill.size > 0, "what is in the cache is saved ahead again"
    lives.running.check_books()


@pytest.fixture(scope="module")
def starter(model: Model, load_params: LoadParams) -> tuple[Model, LoadParams]:
    return model, _changed(load_params, kv_unified=True, flash_attention="auto", context=2560, speculation=False)


def test_a_long_conversation_goes_on_where_it_was(
    starter: tuple[Model, LoadParams], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The margin level, in a whole engine: the answer may part from the uncached one only at a near tie."""
    monkeypatch.setattr(spilling, "BLOCK", 256)
    model, params = starter
    params = _changed(params, saved_prefixes=str(path), prefixes_identity="this")
    text = "".join(f"Chapter {number}: the keeper counted {number * 7} ships in the night. " for number in range(50))
    first = LoadedEngine(params, lambda fraction: True)
    prompt = first.encode(text)[:700]
    try:
        uncached, cached = _tokens(first, prompt)
        assert cached == 0
        saved, size = first.save_prefixes(path, _PLENTY)
        assert saved >= 700
        assert 20_000 < size / saved < 30_000, "bytes a token: 23,040 are keys and values"
    finally:
        first.close()
    second = LoadedEngine(params, lambda fraction: True)
    try:
        restored, cached = _tokens(second, prompt)
        assert cached == 699
    finally:
        second.close()
    if restored != uncached:
        parting = next(i for i, (a, b) in enumerate(zip(uncached, restored, strict=False)) if a != b)
        logits = np.sort(teacher_forced(model, params, prompt + uncached[:parting]))
        assert logits[-1] - logits[-2] < 1.0, f"parted at token {parting}"


def _tokens(engine: LoadedEngine, prompt: list[int]) -> tuple[list[int], int]:
    """Return the tokens of a greedy answer, and how many of the prompt's were cached."""
    engine.submit(1, [prompt], _changed(_GREEDY, max_tokens=8))
    sequence = engine._scheduler.sequences[0]
    while not engine.idle:
        engine.step()
    return sequence.tokens[len(prompt) :], sequence.cached or 0
