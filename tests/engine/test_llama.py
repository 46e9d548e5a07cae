from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from loud_model import write_loud_model
from sliding_model import write_sliding_model

from llamaserve.engine import llama
from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.events import Device
from llamaserve.engine.llama import Batch, Context, Model, NativeSampler, Vocab
from llamaserve.engine.params import DRAFTED_ROWS, SCORED_ROWS, Generation, LoadParams, Sampling
from llamaserve.errors import EngineError, InvalidRequest, ModelLoadFailed, OutOfCells

_ABSURD_TOKENS = [-1, -(2**31), 49152, 2**31 - 1, 2**31, 2**32, 2**63, 2**70]
_ODD_TEXTS = [
    "",
    "\0",
    "a\0b",
    "\0" * 100,
    "👩‍👩‍👧‍👦",
    "\u202e\ufffd\uffff",
    " " * 300,
    "\r\n\t",
    "ﷺ" * 50,
    "a" * 100_000,
]


def _changed(params: LoadParams, **changes: Any) -> LoadParams:
    return msgspec.structs.replace(params, **changes)


# Settings


@pytest.mark.parametrize(
    ("setting", "with_gpu", "without"), [("auto", -1, 0), ("all", -1, -1), ("none", 0, 0), (0, 0, 0), (17, 17, 17)]
)
def test_gpu_layers(
    monkeypatch: pytest.MonkeyPatch, load_params: LoadParams, setting: str | int, with_gpu: int, without: int
) -> None:
    params = _changed(load_params, gpu_layers=setting)
    monkeypatch.setattr(llama, "supports_gpu_offload", lambda: True)
    assert llama.model_params(params).n_gpu_layers == with_gpu
    monkeypatch.setattr(llama, "supports_gpu_offload", lambda: False)
    assert llama.model_params(params).n_gpu_layers == without


def test_gpu_offload_is_what_the_library_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr(lib, "llama_supports_gpu_offload", lambda answer=answer: answer)
        assert llama.supports_gpu_offload() is answer


def test_sizes_and_threads(load_params: LoadParams) -> None:
    params = _changed(load_params, context=300, parallel=3, kv_cells=700, kv_unified=True, batch=96, threads=5)
    native = llama.context_params(params)
    assert (native.n_ctx, native.n_batch, native.n_ubatch) == (700, 96, 96)
    assert (native.n_seq_max, native.n_outputs_max) == (4, 4 + DRAFTED_ROWS + SCORED_ROWS)
    assert llama.context_params(_changed(params, prefix_cache=False)).n_seq_max == 3, "nothing is saved or restored"
    assert llama.context_params(_changed(params, speculation=False)).n_outputs_max == 4 + SCORED_ROWS
    assert (native.n_threads, native.n_threads_batch) == (5, 5)
    assert native.kv_unified
    assert not llama.context_params(_changed(params, kv_unified=False)).kv_unified


@pytest.mark.parametrize(("setting", "native"), [("auto", -1), ("off", 0), ("on", 1)])
def test_flash_attention(load_params: LoadParams, setting: str, native: int) -> None:
    assert llama.context_params(_changed(load_params, flash_attention=setting)).flash_attn_type == native


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_key_and_value_types(load_params: LoadParams, name: str) -> None:
    number = 30 if name == "bf16" else getattr(lib, f"GGML_TYPE_{name.upper()}")  # GGML_TYPE_BF16 is not in the module
    native = llama.context_params(_changed(load_params, key_type=name))
    assert (native.type_k, native.type_v) == (number, lib.GGML_TYPE_F16)
    native = llama.context_params(_changed(load_params, value_type=name))
    assert (native.type_k, native.type_v) == (lib.GGML_TYPE_F16, number)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_every_key_and_value_type_runs(load_params: LoadParams, model: Model, name: str) -> None:
    """A quantised V cache needs flash attention."""
    params = _changed(load_params, key_type=name, value_type=name, flash_attention="auto", kv_cells=256, batch=8)
    context = Context(model, params)
    try:
        assert np.isfinite(_logits(context, [1, 2, 3])).all()
    finally:
        context.close()


def test_what_llama_cpp_refuses_in_a_context_is_said(load_params: LoadParams, model: Model) -> None:
    with pytest.raises(ModelLoadFailed, match="requires flash_attn"):
        Context(model, _changed(load_params, value_type="q8_0", flash_attention="off"))


def test_a_step_may_be_computed_in_parts_and_with_other_threads(load_params: LoadParams) -> None:
    native = llama.context_params(_changed(load_params, batch=256, micro_batch=100, threads=3, batch_threads=7))
    assert (native.n_batch, native.n_ubatch) == (256, 100)
    assert (native.n_threads, native.n_threads_batch) == (3, 7)
    assert llama.context_params(_changed(load_params, batch=64, micro_batch=128)).n_ubatch == 64


def test_what_else_a_context_may_be_told(load_params: LoadParams) -> None:
    native = llama.context_params(load_params)
    assert (native.offload_kqv, native.swa_full) == (True, False)
    assert (native.rope_freq_base, native.rope_freq_scale) == (0, 0)
    changed = _changed(load_params, gpu_cache=False, full_window=True, rope_freq_base=1e6, rope_freq_scale=0.25)
    native = llama.context_params(changed)
    assert (native.offload_kqv, native.swa_full) == (False, True)
    assert (native.rope_freq_base, native.rope_freq_scale) == (1e6, 0.25)


@pytest.mark.parametrize(
    ("mmap", "mlock", "native"),
    [
        (True, False, lib.LLAMA_LOAD_MODE_AUTO),
        (False, False, lib.LLAMA_LOAD_MODE_NONE),
        (False, True, lib.LLAMA_LOAD_MODE_MLOCK),
        (True, True, lib.LLAMA_LOAD_MODE_MMAP_MLOCK),
    ],
)
def test_how_the_file_is_read(load_params: LoadParams, mmap: bool, mlock: bool, native: int) -> None:
    params = _changed(load_params, mmap=mmap, mlock=mlock)
    assert llama.model_params(params).load_mode == native
    engine = LoadedEngine(_changed(params, kv_cells=256, context=64), lambda fraction: True)
    engine.close()


@pytest.mark.parametrize(
    ("mode", "native"),
    [("none", lib.LLAMA_SPLIT_MODE_NONE), ("layer", lib.LLAMA_SPLIT_MODE_LAYER), ("row", lib.LLAMA_SPLIT_MODE_ROW)],
)
def test_what_is_divided_among_gpus(load_params: LoadParams, mode: str, native: int) -> None:
    assert llama.model_params(_changed(load_params, split_mode=mode)).split_mode == native


def _pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(llama, "list_gpus", lambda: [Device(f"GPU{i}", "", 0, 0) for i in range(count)])


def test_the_shares_of_gpus(monkeypatch: pytest.MonkeyPatch, load_params: LoadParams) -> None:
    assert not llama.model_params(load_params).tensor_split
    _pretend_gpus(monkeypatch, 3)
    native = llama.model_params(_changed(load_params, tensor_split=(3.0, 0.5)))
    gc.collect()
    assert native.tensor_split[: lib.llama_max_devices()] == [3.0, 0.5, *[0.0] * (lib.llama_max_devices() - 2)]


@pytest.mark.parametrize(("gpus", "shares"), [(0, (1.0,)), (2, (1.0, 0.0, 0.0)), (20, (1.0,) * 17), (2, (0.0, 0.0))])
def test_shares_that_no_gpu_could_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, load_params: LoadParams, gpus: int, shares: tuple[float, ...]
) -> None:
    _pretend_gpus(monkeypatch, gpus)
    with pytest.raises(ModelLoadFailed, match="tensor_split"):
        Model(_changed(load_params, tensor_split=shares), lambda fraction: True)


@pytest.mark.parametrize(("strategy", "native"), [("off", []), ("distribute", [1]), ("isolate", [2]), ("numactl", [3])])
def test_numa_is_set_up_before_the_load(
    monkeypatch: pytest.MonkeyPatch, load_params: LoadParams, strategy: str, native: list[int]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(lib, "llama_numa_init", calls.append)
    monkeypatch.setattr(lib, "llama_model_load_from_file", lambda path, params: calls.append(-1))
    with pytest.raises(ModelLoadFailed):
        Model(_changed(load_params, numa=strategy), lambda fraction: True)
    assert calls == [*native, -1]


def test_fewer_threads_are_fewer_for_batches_too(
    monkeypatch: pytest.MonkeyPatch, load_params: LoadParams, model: Model
) -> None:
    calls: list[tuple[int, int]] = []
    for most, expected in ((8, [(4, 8), (3, 3), (1, 1), (4, 8)]), (2, [(4, 2), (3, 2), (1, 1), (4, 2)])):
        context = Context(model, _changed(load_params, kv_cells=256, batch=8, threads=4, batch_threads=most))
        with monkeypatch.context() as patched:
            patched.setattr(lib, "llama_set_n_threads", lambda _, one, many: calls.append((one, many)))
            for threads in (4, 3, 1, 4):
                context.set_threads(threads)
        context.close()
        assert calls == expected
        calls.clear()


_MEMLOCK = """
import os, resource, sys, msgspec
from llamaserve.engine import llama
from llamaserve.engine.params import LoadParams
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
llama.start_backend()
weights = open(msgspec.json.decode(sys.argv[1], type=LoadParams).path, "rb")
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
params = msgspec.json.decode(sys.argv[1], type=LoadParams)
params = msgspec.structs.replace(params, path=f"/proc/self/fd/{weights.fileno()}")
llama.Model(params, lambda fraction: True).close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such limit")
def test_memory_that_can_not_be_locked_is_said_and_no_more(load_params: LoadParams) -> None:
    params = msgspec.json.encode(_changed(load_params, mlock=True)).decode()
    done = subprocess.run([sys.executable, "-c", _MEMLOCK, params], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed to mlock" in done.stderr
    assert all("mlock" in line or "MEMLOCK" in line for line in done.stderr.splitlines())


# Loading


def test_a_missing_file_is_named(backend: None, load_params: LoadParams, tmp_path: Path) -> None:
    path = str(tmp_path / "missing.gguf")
    with pytest.raises(ModelLoadFailed, match=r"missing\.gguf.*(No such file|failed to open)"):
        Model(_changed(load_params, path=path), lambda fraction: True)


@pytest.mark.parametrize("length", [0, 3, 4, 24, 1000, 100_000, 5_000_000])
def test_a_truncated_file_is_refused_with_a_reason(
    backend: None, load_params: LoadParams, starter_model: Path, tmp_path: Path, length: int
) -> None:
    path = tmp_path / "cut.gguf"
    with starter_model.open("rb") as source:
        path.write_bytes(source.read(length))
    with pytest.raises(ModelLoadFailed, match=r"cut\.gguf") as caught:
        LoadedEngine(_changed(load_params, path=str(path)), lambda fraction: True)
    assert "no reason" not in caught.value.message


def test_a_file_that_is_no_model_is_refused_with_a_reason(
    backend: None, load_params: LoadParams, tmp_path: Path
) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is no model" * 100)
    with pytest.raises(ModelLoadFailed, match="invalid magic"):
        Model(_changed(load_params, path=str(path)), lambda fraction: True)


def test_the_reason_is_that_of_this_file(backend: None, load_params: LoadParams, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with pytest.raises(ModelLoadFailed) as caught:
            Model(_changed(load_params, path=str(tmp_path / name)), lambda fraction: True)
    assert "/one" not in caught.value.message


@pytest.mark.skipif(os.name != "posix", reason="file names are text elsewhere")
def test_a_file_name_that_is_no_utf8(
    backend: None, load_params: LoadParams, starter_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    try:
        path.symlink_to(starter_model)
    except OSError:
        pytest.skip("this file system takes no such name")
    Model(_changed(load_params, path=str(path)), lambda fraction: True).close()


def test_loading_reports_progress_and_can_be_given_up(backend: None, load_params: LoadParams) -> None:
    seen: list[float] = []
    Model(load_params, lambda fraction: seen.append(fraction) is None).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with pytest.raises(ModelLoadFailed):
        Model(load_params, lambda fraction: False)


def test_closing_twice_is_harmless(backend: None, load_params: LoadParams) -> None:
    engine = LoadedEngine(load_params, lambda fraction: True)
    engine.submit(1, [engine.encode("Hello")], Generation(sampling=Sampling(seed=0)))
    engine.step()
    engine.close()
    engine.close()


# Vocabulary


@pytest.mark.parametrize("token", _ABSURD_TOKENS)
def test_no_absurd_token_reaches_the_library(
    monkeypatch: pytest.MonkeyPatch, backend: None, model: Model, token: int
) -> None:
    vocab = Vocab(model.handle)
    monkeypatch.setattr(lib, "llama_token_to_piece", lambda *arguments: pytest.fail("it reached the library"))
    with pytest.raises(InvalidRequest, match=str(token)):
        vocab.piece(token)
    with pytest.raises(InvalidRequest):
        vocab.piece(token, special=True)
    with pytest.raises(InvalidRequest):
        vocab.detokenize([0, token], special=False)
    with pytest.raises(InvalidRequest):
        vocab.check([token], "logit_bias")


def test_a_negative_token_is_refused_whatever_was_asked_before(model: Model) -> None:
    vocab = Vocab(model.handle)
    vocab.piece(0, special=True)
    with pytest.raises(InvalidRequest):
        vocab.piece(-1)
    vocab.piece(0)
    with pytest.raises(InvalidRequest):
        vocab.piece(-1, special=True)


# This vocabulary lacks tokens for some bytes, which llama.cpp then leaves out: six control characters, and the first
# byte of characters from U+40000 to U+BFFFF, none of which is assigned.
_MISSING = frozenset([0x4, 0x6, 0x13, 0x14, 0x16, 0x1D, *range(0x40000, 0xC0000)])
_spellable = st.characters(codec="utf-8").filter(lambda character: ord(character) not in _MISSING)


@settings(max_examples=200, deadline=None)
@given(text=st.text(_spellable))
def test_text_survives_being_tokenised(vocab: Vocab, text: str) -> None:
    tokens = vocab.tokenize(text, add_bos=False, parse_special=False)
    assert vocab.detokenize(tokens, special=True) == text


@pytest.mark.parametrize("text", _ODD_TEXTS, ids=range(len(_ODD_TEXTS)))
@pytest.mark.parametrize("parse_special", [True, False])
def test_odd_text_survives_being_tokenised(vocab: Vocab, text: str, parse_special: bool) -> None:
    tokens = vocab.tokenize(text, add_bos=False, parse_special=parse_special)
    assert vocab.detokenize(tokens, special=True) == text


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", " ", "a", "\n", "<|im_"])))
def test_names_of_control_tokens_survive_and_are_counted(vocab: Vocab, parts: list[str]) -> None:
    text = "".join(parts)
    for parse_special in (True, False):
        tokens = vocab.tokenize(text, add_bos=False, parse_special=parse_special)
        assert vocab.detokenize(tokens, special=True) == text


def test_control_tokens_are_read_only_when_asked_and_shown_only_when_asked(vocab: Vocab) -> None:
    parsed = vocab.tokenize("<|im_start|>", add_bos=False, parse_special=True)
    assert len(parsed) == 1
    assert len(vocab.tokenize("<|im_start|>", add_bos=False, parse_special=False)) > 1
    assert vocab.piece(parsed[0]) == b""
    assert vocab.piece(parsed[0], special=True) == b"<|im_start|>"
    assert vocab.detokenize(parsed, special=False) == ""


def test_a_lone_surrogate_is_a_bad_request(vocab: Vocab) -> None:
    """JSON can carry one; it has no UTF-8."""
    with pytest.raises(InvalidRequest):
        vocab.tokenize("a\ud800", add_bos=False, parse_special=False)


def test_pieces_are_bytes_that_join_to_the_text(vocab: Vocab) -> None:
    text = "naïve 😀 日本語"
    pieces = [vocab.piece(token) for token in vocab.tokenize(text, add_bos=False, parse_special=False)]
    assert b"".join(pieces) == text.encode()
    assert any(_is_cut(piece) for piece in pieces)  # a character spread over tokens


def _is_cut(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return True
    return False


def test_every_token_has_a_piece(vocab: Vocab) -> None:
    longest = max(range(vocab.size), key=lambda token: len(vocab.piece(token, special=True)))
    assert len(vocab.piece(longest, special=True)) > 64  # longer than the first buffer
    buffer = ctypes.create_string_buffer(1000)
    for token in (0, 1, longest, vocab.size - 1):
        count = lib.llama_token_to_piece(vocab.handle, token, buffer, 1000, 0, True)
        assert vocab.piece(token, special=True) == buffer.raw[:count]


def test_the_begin_token_is_added_once_where_the_model_wants_one(model: Model) -> None:
    vocab = Vocab(model.handle)
    begin = vocab.piece(vocab.bos, special=True).decode()
    plain = vocab.tokenize("Hello", add_bos=False, parse_special=True)
    assert vocab.bos not in plain
    assert vocab.tokenize("Hello", add_bos=True, parse_special=True) == plain  # this model wants none
    vocab.add_bos = True
    assert vocab.tokenize("Hello", add_bos=True, parse_special=True) == [vocab.bos, *plain]
    assert vocab.tokenize(begin + "Hello", add_bos=True, parse_special=True) == [vocab.bos, *plain]
    assert vocab.tokenize("Hello", add_bos=False, parse_special=True) == plain
    assert vocab.tokenize("", add_bos=True, parse_special=True) == [vocab.bos]


@pytest.fixture
def spelling(backend: None, load_params: LoadParams, tmp_path: Path) -> Iterator[Vocab]:
    """A sentencepiece vocabulary of bytes that wants a begin token."""
    path = tmp_path / "loud.gguf"
    write_loud_model(path)
    model = Model(_changed(load_params, path=str(path)), lambda fraction: True)
    yield model.vocab
    model.close()


def test_a_sentencepiece_model_gets_its_begin_token_once(spelling: Vocab) -> None:
    assert spelling.add_bos
    plain = spelling.tokenize("Hi", add_bos=False, parse_special=True)
    assert spelling.bos not in plain
    assert spelling.tokenize("Hi", add_bos=True, parse_special=True) == [spelling.bos, *plain]
    marked = spelling.tokenize("<s>Hi", add_bos=True, parse_special=True)
    assert marked[0] == spelling.bos
    assert marked.count(spelling.bos) == 1
    assert spelling.tokenize("", add_bos=True, parse_special=True) == [spelling.bos]


def test_sentencepiece_text_survives_but_for_the_space_it_begins_with(spelling: Vocab) -> None:
    for text in ("Hi", "a\0b", "é😀", "  two", "x" * 10_000, "\x04\U00040000"):
        tokens = spelling.tokenize(text, add_bos=False, parse_special=False)
        assert spelling.detokenize(tokens, special=False).replace("▁", " ").removeprefix(" ") == text


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("<repo_name>", 3),
        ("<|im_start|>", 1),
        ("<|im_end|>", None),  # ends an answer
        ("<repo_name> ", None),
        ("<repo_name><repo_name>", None),
        ("<think>", None),
        ("Hello", None),
        ("", None),
    ],
)
def test_control_tokens_have_names(vocab: Vocab, name: str, token: int | None) -> None:
    assert vocab.control(name) == token


def test_end_of_generation(vocab: Vocab) -> None:
    (end,) = vocab.tokenize("<|im_end|>", add_bos=False, parse_special=True)
    assert vocab.is_end_of_generation(end)
    assert not any(map(vocab.is_end_of_generation, vocab.tokenize("Hello", add_bos=False, parse_special=False)))


# Evaluating


@pytest.fixture
def context(model: Model, load_params: LoadParams) -> Any:
    context = Context(model, _changed(load_params, kv_cells=256, batch=64))
    yield context
    context.close()


def _logits(context: Context, tokens: list[int], *, at: int = 0, sequence: int = 0) -> np.ndarray[Any, Any]:
    batch = Batch(len(tokens))
    row = batch.add(tokens, at, sequence, logits=True)
    context.evaluate(batch)
    return context.logits(row).copy()


@pytest.mark.parametrize("changes", [{"mmap": False}, {"batch_threads": 1}], ids=str)
def test_where_weights_lie_and_how_many_threads_compute_changes_nothing(
    context: Context, load_params: LoadParams, changes: dict[str, Any]
) -> None:
    expected = _logits(context, [1, 2, 3, 4])
    params = _changed(load_params, kv_cells=256, batch=64, **changes)
    other_model = Model(params, lambda fraction: True)
    other = Context(other_model, params)
    try:
        assert (_logits(other, [1, 2, 3, 4]) == expected).all()
    finally:
        other.close()
        other_model.close()


def test_a_step_in_parts_gives_the_same(load_params: LoadParams, model: Model) -> None:
    """But for rounding: a matrix of other shape is multiplied in another order."""
    tokens = list(range(100, 200))
    found = []
    for size in (None, 32, 33):
        context = Context(model, _changed(load_params, kv_cells=512, batch=128, micro_batch=size))
        try:
            assert lib.llama_n_ubatch(context.handle) == (size or 128)
            found.append(_logits(context, tokens))
        finally:
            context.close()
    for each in found[1:]:
        assert np.abs(each - found[0]).max() < 0.3


@pytest.mark.parametrize("changes", [{"rope_freq_base": 1e6}, {"rope_freq_scale": 0.5}], ids=str)
def test_other_frequencies_of_positions_change_what_is_computed(
    context: Context, load_params: LoadParams, model: Model, changes: dict[str, Any]
) -> None:
    tokens = list(range(100, 150))
    other = Context(model, _changed(load_params, kv_cells=256, batch=64, **changes))
    try:
        assert np.abs(_logits(other, tokens) - _logits(context, tokens)).max() > 1
    finally:
        other.close()


def test_a_full_window_can_be_cut_anywhere(backend: None, load_params: LoadParams, tmp_path: Path) -> None:
    path = tmp_path / "sliding.gguf"
    write_sliding_model(path)
    tokens = [3 + i % 200 for i in range(800)]
    for full, kept in ((False, 0), (True, 20)):
        params = _changed(load_params, path=str(path), kv_cells=1024, batch=32, full_window=full, kv_unified=True)
        model = Model(params, lambda fraction: True)
        context = Context(model, params)
        try:
            expected = [_logits(context, tokens[at : at + 20], at=at) for at in range(0, len(tokens), 20)]
            assert context.truncate(0, 20) == kept
            for at in range(kept, 100, 20):
                again = _logits(context, tokens[at : at + 20], at=at)
                assert np.abs(again - expected[at // 20]).max() < 1e-3
        finally:
            context.close()
            model.close()


def test_a_cut_sequence_goes_on_as_if_it_had_never_been_longer(context: Context) -> None:
    expected = _logits(context, [1, 2, 3, 4])
    context.clear()
    _logits(context, [1, 2, 9, 9, 9])
    assert context.truncate(0, 2) == 2
    assert np.array_equal(_logits(context, [3, 4], at=2), expected)
    assert context.truncate(0, 0) == 0
    assert np.array_equal(_logits(context, [1, 2, 3, 4]), expected)


def test_sequences_do_not_see_each_other(context: Context) -> None:
    expected = _logits(context, [1, 2, 3])
    _logits(context, [7, 8, 9, 10], sequence=1)
    assert np.array_equal(_logits(context, [1, 2, 3], sequence=2), expected)


def test_rows_of_one_batch_belong_to_their_sequences(context: Context) -> None:
    one, two = _logits(context, [1, 2, 3]), _logits(context, [4, 5], sequence=1)
    context.clear()
    batch = Batch(16)
    batch.add([1, 2], 0, 0, logits=False)
    other = batch.add([4, 5], 0, 1, logits=True)
    mine = batch.add([3], 2, 0, logits=True)
    context.evaluate(batch)
    assert np.array_equal(context.logits(mine), one)
    assert np.array_equal(context.logits(other), two)


def test_a_full_cache_is_told_and_the_rest_goes_on(model: Model, load_params: LoadParams) -> None:
    context = Context(model, _changed(load_params, kv_cells=256, kv_unified=True, batch=256))
    try:
        before = _logits(context, [1, 2, 3])
        batch = Batch(256)
        batch.add([5] * 256, 0, 1, logits=True)
        with pytest.raises(OutOfCells):
            context.evaluate(batch)
        assert context.truncate(0, 2) == 2
        assert np.array_equal(_logits(context, [3], at=2), before)
    finally:
        context.close()


def test_an_empty_or_gappy_batch_is_an_engine_error(context: Context) -> None:
    with pytest.raises(EngineError):
        context.evaluate(Batch(1))
    with pytest.raises(EngineError):
        _logits(context, [1], at=0, sequence=4)  # there are sequences 0 to 3
    _logits(context, [1, 2])
    with pytest.raises(EngineError):
        _logits(context, [3], at=7)


def test_a_row_without_logits_is_an_engine_error(context: Context) -> None:
    batch = Batch(4)
    batch.add([1, 2, 3], 0, 0, logits=False)
    last = batch.add([4], 3, 0, logits=True)
    context.evaluate(batch)
    context.logits(last)
    for row in (0, 1, 2, 99):
        with pytest.raises(EngineError):
            context.logits(row)


def test_a_sampler_that_llama_cpp_refuses_is_an_engine_error() -> None:
    with pytest.raises(EngineError):
        NativeSampler(None)


def test_a_sampler_can_be_closed_twice(vocab: Vocab) -> None:
    sampler = NativeSampler.penalties(vocab, 8, 1.1, 0.0, 0.0)
    clone = sampler.clone()
    sampler.close()
    sampler.close()
    clone.accept(5)
    logits = np.ones(2, np.float32)
    clone.apply(np.array([5, 6], np.int32), logits)
    assert logits[0] < logits[1] == 1
    clone.close()


def test_parts_of_a_sequence_that_were_saved_and_restored_go_on_the_same(load_params: LoadParams, model: Model) -> None:
    """Also of one that lies under an id that can't be evaluated, where finished sequences are kept."""
    params = _changed(load_params, kv_unified=True, flash_attention="auto", context=256, kv_cells=1024, spill=1 << 30)
    context = Context(model, params)
    try:
        tokens = model.vocab.tokenize("Once upon a time there was a fox who", add_bos=True, parse_special=False)
        batch = Batch(16)
        row = batch.add([*tokens, 28], 0, 0, logits=1)
        context.evaluate(batch)
        expected = context.logits(row).copy()
        assert context.truncate(0, len(tokens)) == len(tokens)
        assert context.copy(0, 40, len(tokens)) == len(tokens)
        context.truncate(0, 0)
        states = [context.save(40, 0, 5), context.save(40, 5, len(tokens))]
        assert all(len(state) > 1000 * 4 for state in states)
        context.clear()
        assert context.restore(2, states[0], 0, 4)
        assert context.restore(2, states[0], 4, 5)
        assert context.restore(2, states[1], 5, len(tokens))
        batch.clear()
        row = batch.add([28], len(tokens), 2, logits=1)
        context.evaluate(batch)
        assert np.abs(context.logits(row) - expected).max() < 1.0
        assert context.logits(row).argmax() == expected.argmax()
    finally:
        context.close()


def test_a_state_that_has_no_room_is_not_restored(load_params: LoadParams, model: Model) -> None:
    params = _changed(load_params, kv_unified=True, flash_attention="auto", context=256, kv_cells=256, spill=1 << 30)
    context = Context(model, params)
    try:
        batch = Batch(200)
        batch.add([5] * 200, 0, 0, logits=0)
        context.evaluate(batch)
        state = context.save(0, 0, 200)
        assert not context.restore(1, state, 0, 200)
        assert context.truncate(0, 0) == 0
        assert context.restore(1, state, 0, 200)
    finally:
        context.close()
