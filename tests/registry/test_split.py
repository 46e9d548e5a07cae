"""Models in several files: read as one, every way in which the parts may not belong together, found and fetched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_splitter import part_name, split_gguf
from gguf_writer import F32, INT32, UINT16, UINT32, File, Tensor, Value, tiny_llama
from hypothesis import HealthCheck, given, settings, strategies as st
from local_hub import Hub, running_hub, settings_for

from llamaserve import errors
from llamaserve.registry import fetching, gguf
from llamaserve.registry.gguf import GGUFHeader, ValueType, read_header
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.sources import FileSource, parse_source
from llamaserve.registry.split import Part, part_names, part_of, stem

Split = Callable[[int], list[Path]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.gguf"
    path.write_bytes(tiny_llama())
    return path


@pytest.fixture
def split(tmp_path: Path, whole: Path) -> Split:
    return lambda count: split_gguf(whole, tmp_path / "parts", "tiny", count)


def refused(path: Path, kind: type[errors.ModelError] = errors.GGUFError) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        read_header(path)
    return caught.value.message, caught.value.hint or ""


# ---- names


def test_the_name_of_a_part_says_which_one_it_is() -> None:
    assert part_of("a/b-00002-of-00003.gguf") == Part("a/b", 2, 3)
    assert part_names("b-00001-of-00003.gguf") == (
        *("b-00001-of-00003.gguf", "b-00002-of-00003.gguf", "b-00003-of-00003.gguf"),
    )
    assert part_names("b-00001-of-00001.gguf") == ("b-00001-of-00001.gguf",)
    assert (stem("b-00001-of-00003.gguf"), stem("b.c.gguf")) == ("b", "b.c")


@pytest.mark.parametrize(
    "name",
    [
        *("b.gguf", "b-1-of-3.gguf", "b-00000-of-00003.gguf", "b-00004-of-00003.gguf", "b-00001-of-00003.bin"),
        *("-00001-of-00003.gguf", "b-00001-of-00003.GGUF", "b-\u0660\u0660\u0660\u0660\u0661-of-00003.gguf"),
    ],
)
def test_other_names_are_those_of_files_in_one_piece(name: str) -> None:
    assert part_of(name) is None
    assert part_names(name) == (name,)


def test_a_model_in_parts_is_called_without_the_number(tmp_path: Path) -> None:
    assert FileSource(tmp_path / "tiny-00001-of-00003.gguf").name == "tiny"
    assert parse_source("hf:o/r/Q8/tiny-Q8-00001-of-00003.gguf", tmp_path).name == "tiny-Q8"


# ---- reading


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 20), empty_first=st.booleans())
def test_the_parts_together_are_the_whole(whole: Path, tmp_path: Path, count: int, empty_first: bool) -> None:
    one = read_header(whole)
    paths = split_gguf(whole, tmp_path / f"{count}{empty_first}", "m", count + empty_first, empty_first=empty_first)
    header = read_header(paths[0])
    check_loadable(header)
    assert header.paths == tuple(paths)
    assert header.file_size == sum(path.stat().st_size for path in paths)
    facts = [(tensor.name, tensor.shape, tensor.type) for tensor in header.tensors]
    assert facts == [(tensor.name, tensor.shape, tensor.type) for tensor in one.tensors]
    assert (header.parameter_count, header.split_count) == (one.parameter_count, len(paths))
    assert (header.tokens(), header.bos_token, header.chat_template) == (one.tokens(), "<s>", one.chat_template)


def test_a_file_in_one_piece_has_one_path(whole: Path) -> None:
    header = read_header(whole)
    assert (header.paths, header.others) == ((whole,), ())


def test_a_later_part_names_the_first(split: Split) -> None:
    first, _, third = split(3)
    message, hint = refused(third)
    assert message == f"{third} is part 3 of 3 of a model"
    assert hint == f"name its first part: {first}"


def test_a_missing_part_is_named(split: Split) -> None:
    first, second, _ = split(3)
    second.unlink()
    message, _ = refused(first, errors.ModelFileMissing)
    assert message == f"part 2 of 3 is missing: {second}"


def test_a_part_that_was_cut_says_how_much_is_missing(split: Split) -> None:
    first, second, _ = split(3)
    second.write_bytes(second.read_bytes()[:-100])
    message, _ = refused(first)
    assert message.startswith(f"{second} is truncated: ")
    assert "100 bytes of its weights are missing" in message


def test_parts_that_changed_places_are_noticed(split: Split) -> None:
    first, second, third = split(3)
    data = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(data)
    assert "says that it is part 3, and by its name it is part 2" in refused(first)[0]


def test_names_that_llama_cpp_could_not_follow_are_refused(split: Split, tmp_path: Path) -> None:
    first, *_ = split(3)
    for name in ("model.gguf", "tiny-00001-of-00004.gguf", "tiny-00002-of-00003.gguf"):
        renamed = tmp_path / "elsewhere" / name
        renamed.parent.mkdir(exist_ok=True)
        renamed.write_bytes(first.read_bytes())
        assert "is the first of 3 parts, and its name does not say so" in refused(renamed)[0]


def part(number: int, count: int = 2, total: int = 2, *names: str, **more: Any) -> bytes:
    """Return a part with these tensors, and other metadata beside what makes it one."""
    metadata = {
        "split.no": Value(UINT16, number),
        "split.count": Value(UINT16, count),
        "split.tensors.count": Value(INT32, total),
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return File(metadata, [Tensor(name, (4,), F32) for name in names]).bytes()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (part(1, 3, 2, "b"), "it says that it is part 2 of 3"),
        (part(1, 2, 9, "b"), "is a part of another model than m-00001-of-00002.gguf: split.tensors.count"),
        (part(1, 2, 2, "b", general__architecture="qwen3"), "is a part of another model"),
        (part(1, 2, 2, "a"), "holds the tensor 'a', which is in another part, too"),
        (part(1, 2, 2), "hold 1 tensors, and it promises 2"),
        (part(1, 2, 2, "b", "c"), "hold 3 tensors, and it promises 2"),
        (File({"general.architecture": "llama"}).bytes(), "it says that it is no part of anything"),
        (b"no model", "is not a GGUF file"),
    ],
)
def test_a_part_of_something_else_is_refused(tmp_path: Path, second: bytes, said: str) -> None:
    paths = [tmp_path / part_name("m", number, 2) for number in (1, 2)]
    paths[0].write_bytes(part(0, 2, 2, "a", general__architecture="llama"))
    paths[1].write_bytes(second)
    assert said in refused(paths[0])[0]
    paths[1].write_bytes(part(1, 2, 2, "b"))
    assert len(read_header(paths[0]).tensors) == 2


@pytest.mark.parametrize(
    ("key", "kind"), [("split.no", UINT32), ("split.count", INT32), ("split.tensors.count", UINT16)]
)
@pytest.mark.parametrize("number", [1, 2])
def test_numbers_of_parts_of_another_type_are_refused(key: str, kind: int, number: int, tmp_path: Path) -> None:
    paths = [tmp_path / part_name("m", each, 2) for each in (1, 2)]
    values = [{"split.no": each, "split.count": 2, "split.tensors.count": 2} for each in (0, 1)]
    for each, (path, name) in enumerate(zip(paths, "ab", strict=True), 1):
        more = {key.replace(".", "__"): Value(kind, values[each - 1][key])} if each == number else {}
        path.write_bytes(part(each - 1, 2, 2, name, general__architecture="llama", **more))
    message, _ = refused(paths[0])
    assert message.startswith(f"{paths[number - 1]} is damaged: {key} has the type {ValueType(kind).name}")


def test_parts_with_too_many_tensors_are_not_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_TENSORS", 2)
    for number, name in enumerate("abc", 1):
        data = part(number - 1, 4, 4, name, general__architecture="llama")
        (tmp_path / part_name("m", number, 4)).write_bytes(data)
    first = tmp_path / part_name("m", 1, 4)
    assert "hold more than 2 tensors" in refused(first)[0]  # though the fourth is missing


def test_a_number_of_parts_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for count in (513, 60_000):
        path = tmp_path / part_name("m", 1, count)
        path.write_bytes(part(0, count, 2, "a", general__architecture="llama"))
        assert f"claims {count} parts" in refused(path)[0]


def test_a_vocabulary_is_read_from_the_first_part_only_if_it_is_unchanged(split: Split) -> None:
    first, *_ = split(3)
    header: GGUFHeader = read_header(first)
    assert header.token_text(1) == "<s>"
    first.write_bytes(first.read_bytes() + b"x")
    with pytest.raises(errors.GGUFError, match="changed"):
        header.token_text(1)


LOGITS = """
import hashlib, sys
import llama_cpp
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()
for path in sys.argv[1:]:
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    assert model, path
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = 64
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    tokens = (llama_cpp.llama_token * 5)(*range(3, 8))
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 5)) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = llama_cpp.llama_get_logits_ith(context, -1)[:size]
    print(hashlib.sha256(repr(logits).encode()).hexdigest())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
"""


def test_llama_cpp_computes_the_same_with_the_parts_of_the_starter_model(starter_model: Path, tmp_path: Path) -> None:
    first, *_ = split_gguf(starter_model, tmp_path, "starter", 3)
    check_loadable(read_header(first))
    command = [sys.executable, "-c", LOGITS, str(starter_model), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    one, parts = done.stdout.split()
    assert one == parts


# ---- found


def test_a_model_is_here_when_all_its_parts_are(split: Split) -> None:
    first, second, _ = split(3)
    source = FileSource(first)
    assert fetching.locate(source) == fetching.fetch(source) == first
    second.unlink()
    assert fetching.locate(source) is None
    with pytest.raises(errors.ModelFileMissing) as caught:
        fetching.fetch(source)
    assert caught.value.message == f"part 2 of 3 is missing: {second}"
    assert caught.value.hint == f"Put all 3 parts into {first.parent}"


def test_the_sum_of_one_file_is_refused_for_a_model_in_parts(split: Split) -> None:
    first, *_ = split(3)
    with pytest.raises(errors.RegistryError) as caught:
        fetching.locate(FileSource(first), hashlib.sha256(first.read_bytes()).hexdigest())
    assert "sha256 is the sum of one file, and tiny-00001-of-00003.gguf is the first of 3" in caught.value.message
    assert "models.lock" in str(caught.value.hint)


# ---- fetched


CLIENT = """\
import json, sys
from pathlib import Path
from llamaserve import errors
from llamaserve.registry import fetching, sources
seen, answer = [], {}
source = sources.parse_source(sys.argv[1], Path("/"))
try:
    answer["located"] = str(fetching.locate(source))
    answer["path"] = str(fetching.fetch(source, None, lambda *report: seen.append(report)))
except errors.LlamaserveError as error:
    answer.update(error=type(error).__name__, message=error.message)
sys.__stdout__.write(json.dumps({**answer, "seen": seen}))
"""
PARTS = [bytes([number]) * 3_000_000 for number in (1, 2, 3)]
FIRST = "tiny-Q8_0-00001-of-00003.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {part_name("tiny-Q8_0", number, 3): data for number, data in enumerate(PARTS, 1)}
    with running_hub(Hub({**files, "tiny-Q4_K_M.gguf": b"GGUF"})) as hub:
        yield hub


def fetch(hub: Hub, folder: Path, source: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-c", CLIENT, source]
    environment = {**settings_for(hub, folder), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("source", [f"hf:o/r/{FIRST}", "hf:o/r:Q8_0"])
def test_all_parts_are_fetched_with_one_progress(hub: Hub, tmp_path: Path, source: str) -> None:
    answer = fetch(hub, tmp_path, source)
    first = Path(answer["path"])
    assert (first.name, answer["located"]) == (FIRST, "None")
    assert [first.with_name(name).read_bytes() for name in part_names(FIRST)] == PARTS
    done = [report[0] for report in answer["seen"]]
    assert done == sorted(done)
    assert {report[1] for report in answer["seen"]} == {9_000_000}
    assert done[-1] == 9_000_000
    hub.asked.clear()
    again = fetch(hub, tmp_path, source, HF_HUB_OFFLINE="1")
    assert again["located"] == again["path"] == str(first)
    assert hub.asked == []


def test_a_download_goes_on_with_the_part_that_was_cut(hub: Hub, tmp_path: Path) -> None:
    blobs = Path(fetch(hub, tmp_path, "hf:o/r/tiny-Q4_K_M.gguf")["path"]).resolve().parent
    sums = [hashlib.sha256(data).hexdigest() for data in PARTS]
    (blobs / sums[0]).write_bytes(PARTS[0])
    (blobs / f"{sums[1]}.llamaserve-part").write_bytes(PARTS[1][:1_000_000])
    hub.asked.clear()
    answer = fetch(hub, tmp_path, "hf:o/r:Q8_0")
    assert answer["located"] == "None"
    assert [asked[2] for asked in hub.requests("GET") if "/resolve/" in asked[1]] == ["bytes=1000000-", None]
    done = [report[0] for report in answer["seen"]]
    assert done == sorted(done)
    assert done[0] == 3_000_000  # the first part is here, and is read once more
    assert 4_000_000 in done
    assert {report[1] for report in answer["seen"]} == {9_000_000}
    assert [Path(answer["path"]).with_name(name).read_bytes() for name in part_names(FIRST)] == PARTS


def test_all_parts_are_of_one_version_even_if_a_new_one_appears(hub: Hub, tmp_path: Path) -> None:
    second = part_name("tiny-Q8_0", 2, 3)
    whole = fetch(hub, tmp_path, "hf:o/r:Q8_0")["path"]
    hub.publish(tiny_Q8_0_00002_of_00003_gguf=b"\7" * 1000)
    answer = fetch(hub, tmp_path, "hf:o/r:Q8_0")
    assert answer["path"] == whole
    assert Path(whole).with_name(second).read_bytes() == PARTS[1]
    Path(whole).with_name(second).unlink()
    new = Path(fetch(hub, tmp_path, "hf:o/r:Q8_0")["path"])
    assert new.parent.name == hub.commit
    assert [new.with_name(name).stat().st_size for name in part_names(FIRST)] == [3_000_000, 1000, 3_000_000]


def test_a_part_that_the_repository_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    missing = part_name("tiny-Q8_0", 3, 3)
    del hub.files[missing]
    assert f"lacks a part of a model: {missing}" in fetch(hub, tmp_path, "hf:o/r:Q8_0")["message"]
    assert f"has no file {missing}" in fetch(hub, tmp_path, f"hf:o/r/{FIRST}")["message"]
    assert hub.requests("GET") != []
    assert not list((tmp_path / "hf").rglob("*.gguf"))


def test_parts_that_the_disk_cannot_hold_together_are_not_begun(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_size = 10**17
    assert fetch(hub, tmp_path, "hf:o/r:Q8_0")["message"].startswith("the file needs 300000000.00 GB")
