"""Model files on the Hugging Face Hub: which file a reference means, whether it is here, and fetching it.

Files lie in huggingface_hub's own cache, where other programs find them too. huggingface_hub is imported in the
functions that need it: the import takes longer than all the rest of a start.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

import msgspec

from llamaserve import errors
from llamaserve.registry.cache import is_file, lock, recall, refuse_to_wait, remember, require_space, verify
from llamaserve.registry.sources import WEIGHTS, HubSource, Progress
from llamaserve.registry.split import part_names, part_of

# What a repository is asked for when no quantisation is named: first the best compromise, then what runs fast on a CPU.
PREFERRED_QUANTS: Final = ("Q4_K_M", "Q4_0", "Q8_0")
_DEFAULT_REVISION: Final = "main"
_PART: Final = ".llamaserve-part"  # ends the name of a blob that grows
_NAME_ONE: Final = "Name the file: hf:OWNER/REPO/FILE.gguf"


class _Choice(msgspec.Struct, frozen=True):
    """What a source stood for when it was fetched: its (first) file, and the commit."""

    source: str
    file: str
    revision: str | None = None


class _Growing(msgspec.Struct, frozen=True):
    """Which file of its repository a growing blob becomes, and for which source it was begun."""

    file: str
    source: str


class _Bar:
    """What huggingface_hub expects of a progress bar (tqdm's methods that it calls); draws nothing."""

    progress: Progress

    def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
        self.n = initial
        self.total = total
        if initial:
            self.progress(self.n, self.total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        self.progress(self.n, self.total)

    def ignore(self, *_: object, **__: object) -> None:
        """Take a call that only matters on a screen, or that counts the same bytes once more."""

    close = refresh = update_transfer = set_description = set_postfix_str = set_transfer_postfix_str = ignore


def cached_file(source: HubSource) -> Path | None:
    """Return the (first) file of a source if it is here with all its parts: the version that was fetched for this very
    source, else the one that huggingface_hub's cache has for its revision.
    """
    return next(iter(cached_versions(source)), None)


def cached_versions(source: HubSource) -> list[Path]:
    """Return the (first) file of every version that ``cached_file`` would find in turn, were the others deleted."""
    choice = recall("choices", str(source), _Choice)
    chosen = None
    if choice is not None and choice.revision is not None:
        chosen = _cached(replace(source, revision=choice.revision), choice.file)
    file = source.file or (choice.file if choice else None)
    if file is None and source.quant is not None:  # fetched by another program; a bare name is not enough to pick one
        snapshot = _folder(source.repo) / "snapshots" / _known_commit(source)
        there = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if is_file(path)]
        with contextlib.suppress(errors.SourceError):
            file = pick(there, source)
    known = None if file is None else _cached(source, file)
    return list(dict.fromkeys(path for path in (chosen, known) if path is not None))


def _cached(source: HubSource, file: str) -> Path | None:
    """Return a file of the cache if all its parts are there."""
    snapshot = _folder(source.repo) / "snapshots" / _known_commit(source)
    parts = [snapshot / name for name in part_names(file)]
    return parts[0] if all(is_file(part) for part in parts) else None


def cache_root() -> Path:
    """Return the folder of huggingface_hub's cache. Nothing is imported for it: a look at what is on this machine must
    be quick.
    """
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return Path(constants.HF_HUB_CACHE)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def _folder(repo: str) -> Path:
    return cache_root() / f"models--{repo.replace('/', '--')}"


def _known_commit(source: HubSource) -> str:
    """Return the commit that a source's revision was when it was last asked for, or the revision itself."""
    revision = source.revision or _DEFAULT_REVISION
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (_folder(source.repo) / "refs" / revision).read_text("utf-8").strip()
    return revision


def origin(path: Path) -> HubSource | None:
    """Return which file of which commit lies at this place in the cache; None for a place outside of it."""
    with contextlib.suppress(ValueError):
        match path.relative_to(cache_root()).parts:
            case (folder, "snapshots", commit, *inner) if folder.startswith("models--") and inner:
                repo = folder.removeprefix("models--").replace("--", "/")
                return HubSource(repo, "/".join(inner), revision=commit)
    return None


def promised_sum(path: Path) -> str | None:
    """Return the SHA-256 that the hub promised for a file of the cache, if it did: large files are named by it."""
    name = path.resolve().name
    return name if origin(path) is not None and re.fullmatch(r"[0-9a-f]{64}", name) else None


def choose(source: HubSource, path: Path) -> None:
    """Let a source stand for this file of the cache from now on."""
    place = origin(path)
    if place is not None and place.file is not None:
        remember("choices", str(source), _Choice(str(source), place.file, place.revision))


def pick(files: Sequence[str], source: HubSource) -> str:
    """Return the one of a repository's files that a source without a file name means, or its first part; never a guess.
    A file in one piece is preferred to one in parts.
    """
    weights = [file for file in files if file.lower().endswith(".gguf") and not _is_companion(file)]
    models = _without_later_parts(weights)
    for quant in (source.quant,) if source.quant else PREFERRED_QUANTS:
        named = [file for file in models if _is_of(quant, file)]
        named = [file for file in named if not part_of(file)] or named
        if len(named) == 1:
            return _complete(source, named[0], weights)
        if named:
            raise errors.SourceError(f"{source.repo} has several files for {quant}: {', '.join(named)}", hint=_NAME_ONE)
    if source.quant is None and len(models) == 1:
        return _complete(source, models[0], weights)
    wanted = source.quant or " or ".join(PREFERRED_QUANTS)
    listed = f"it has {', '.join(models)}" if models else "it has no GGUF file at all"
    raise errors.SourceError(f"{source.repo} has no file for {wanted}; {listed}", hint=_NAME_ONE)


def _is_of(quant: str, file: str) -> bool:
    """Whether a file's name has a quantisation's name as a word."""
    word = rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])"
    return re.search(word, PurePosixPath(file).name, re.IGNORECASE) is not None


def _without_later_parts(weights: Sequence[str]) -> list[str]:
    """Return the files with each model in parts once, as its first part, even if just that one is missing."""
    parts = {file: part_of(file) for file in weights}
    return list(dict.fromkeys(part.sibling(1) if part else file for file, part in parts.items()))


def _complete(source: HubSource, file: str, there: Sequence[str]) -> str:
    absent = [name for name in part_names(file) if name not in there]
    if absent:
        raise errors.SourceError(f"{source.repo} lacks a part of a model: {absent[0]}", hint=_NAME_ONE)
    return file


def _is_companion(file: str) -> bool:
    """Whether a GGUF file holds no language model: an image encoder, or the statistics of a quantisation."""
    return PurePosixPath(file).name.lower().startswith(("mmproj", "imatrix"))


def fetch_file(source: HubSource, progress: Progress, *, newest: bool = False) -> Path:
    """Download the file, or all its parts, unless it is here, and return the (first) file. A download that was cut goes
    on where it ended. With ``newest`` the hub is asked whether there is a newer one.
    """
    with _hub_errors(source):
        file = source.file or pick(_hub_files(source), source)
    named = HubSource(source.repo, file, revision=source.revision)
    path = None if newest else _cached(named, file)
    if path is None:
        with _hub_errors(named):
            path = _download(named, file, progress, str(source))
    choose(source, path)
    return path


def _download(source: HubSource, file: str, progress: Progress, wanted: str) -> Path:
    """Put the file and its other parts into huggingface_hub's cache, all of the same commit, and return the first.
    ``wanted`` is what the source was called.

    ``hf_hub_download`` starts again from nothing in every process, so the bytes are fetched here, with its own function
    for that, into a file that the next attempt continues. It then finds the blob and links it into the snapshot.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # Also because hf_hub_download would retry for half a minute when there is no network.
    abouts = [get_hf_file_metadata(hf_hub_url(source.repo, file, revision=source.revision))]
    commit = abouts[0].commit_hash or source.revision
    others = part_names(file)[1:]
    for other in others:
        with _hub_errors(replace(source, file=other)):
            abouts.append(get_hf_file_metadata(hf_hub_url(source.repo, other, revision=commit)))
    blobs = _folder(source.repo) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    growing: list[tuple[Any, Path]] = []
    for name, about in zip((file, *others), abouts, strict=True):
        if about.etag is not None:
            growing.append((about, blob := blobs / about.etag))
            remember("growing", str(blob), _Growing(name, wanted))
    _download_blobs(growing, progress)
    first, *_ = [Path(hf_hub_download(source.repo, name, revision=commit)) for name in (file, *others)]
    _remember_commit(source, commit)
    return first


def _download_blobs(wanted: Sequence[tuple[Any, Path]], progress: Progress) -> None:
    """Fetch what is not here; the progress is that of all files together."""
    sizes = [about.size for about, _ in wanted]
    total = None if None in sizes else sum(sizes)
    if total is not None:
        require_space(wanted[0][1].parent, total - sum(_size_here(blob) for _, blob in wanted))
    before = 0
    for about, blob in wanted:
        report = _after(before, total, progress)
        with lock(f"hub {blob}", functools.partial(_report_growth, blob, report)):
            if about.size is not None and not _is_whole(blob, functools.partial(report, about.size, about.size)):
                _download_blob(about, blob, report)
        before += about.size or 0


def _is_whole(blob: Path, meanwhile: Callable[[], None]) -> bool:
    """Whether a blob is here as it was promised; one that was damaged here is to be fetched anew."""
    if not blob.exists():
        return False
    try:
        _check_sum(blob, blob.name, meanwhile)
    except errors.ChecksumMismatch:
        return False
    return True


def _after(before: int, total: int | None, progress: Progress) -> Progress:
    return lambda done, _: progress(before + done, total)


def _report_growth(blob: Path, progress: Progress) -> None:
    """Report how far another process is that fetches the blob."""
    progress(_size_here(blob), None)


def _size_here(blob: Path) -> int:
    for path in (blob, _part(blob)):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0


def _part(blob: Path) -> Path:
    """Return where a blob grows."""
    return blob.with_name(blob.name + _PART)


def _blob(part: Path) -> Path:
    """Return what grows there."""
    return part.with_name(part.name.removesuffix(_PART))


def _remember_commit(source: HubSource, commit: str | None) -> None:
    """Note which commit a branch was, where huggingface_hub looks for it. Written last, so that a model whose parts are
    not all here yet does not take the place of one that is whole.
    """
    from huggingface_hub import constants

    revision = source.revision or constants.DEFAULT_REVISION
    if commit is None or commit == revision:
        return
    reference = _folder(source.repo) / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=reference.parent, delete=False) as file:
        file.write(commit)
    Path(file.name).replace(reference)


def _download_blob(about: Any, blob: Path, progress: Progress) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part = _part(blob)
    bar = type("_ThisBar", (_Bar,), {"progress": staticmethod(progress)})
    headers = build_hf_headers()
    if urlsplit(about.location).netloc != urlsplit(_endpoint()).netloc:
        headers.pop("authorization", None)  # a file store's own address, which must not see the token
    with part.open("ab") as output:
        if (done := output.tell()) > about.size:
            output.truncate(done := 0)
        require_space(part.parent, about.size - done)
        http_get(
            about.location,
            output,
            resume_size=done,
            headers=headers,
            expected_size=about.size,
            displayed_filename=blob.name,
            tqdm_class=cast("Any", bar),
        )
        output.flush()
        os.fsync(output.fileno())
    try:
        _check_sum(part, blob.name, functools.partial(progress, about.size, about.size))
    except errors.ChecksumMismatch:
        part.unlink()
        raise
    part.replace(blob)


def _check_sum(path: Path, etag: str, meanwhile: Callable[[], None]) -> None:
    """Check a file against the sum that the hub promised for it: a large file's ETag is its SHA-256.

    huggingface_hub itself compares no more than the size when it downloads over plain HTTP.
    """
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        verify(path, etag, meanwhile)


def cut_downloads(source: HubSource) -> tuple[Path, ...]:
    """Return what is here of files of a source that were not fetched to the end."""
    choice = recall("choices", str(source), _Choice)
    file = source.file or (choice.file if choice else None)
    names = part_names(file) if file is not None else []

    def belongs(part: Path) -> bool:
        grows = recall("growing", str(_blob(part)), _Growing)
        if grows is None:
            return False
        of_quant = source.quant is not None and _is_of(source.quant, grows.file)
        return of_quant or grows.source == str(source) or grows.file in names

    return tuple(part for part in sorted((_folder(source.repo) / "blobs").glob(f"*{_PART}")) if belongs(part))


def delete_files(paths: Sequence[Path]) -> int:
    """Delete files of the cache that are of one repository, and cut downloads; return the bytes that this freed. What
    another commit or another name needs, too, stays; nothing outside the repository's folder is touched.

    Raises ``InvalidRequest`` while one of them is being fetched.
    """
    cut = [path for path in paths if path.name.endswith(_PART)]
    whole = [path for path in paths if path not in cut]
    freed = sum(_delete_part(path) for path in cut)
    return freed + (_delete_whole(whole) if whole else 0)


def require_idle(paths: Sequence[Path]) -> None:
    """Raise ``InvalidRequest`` while one of these files, as ``delete_files`` takes them, is being fetched."""
    for path in paths:
        if path.name.endswith(_PART):
            with lock(f"hub {_blob(path)}", refuse_to_wait):
                pass


def _delete_part(part: Path) -> int:
    with lock(f"hub {_blob(part)}", refuse_to_wait):
        try:
            size = part.stat().st_size
            part.unlink()
        except FileNotFoundError:  # it was fetched to the end
            return 0
    return size


def _delete_whole(paths: Sequence[Path]) -> int:
    places = [place for place in map(origin, paths) if place is not None and place.revision is not None]
    if len(places) < len(paths):
        raise errors.SourceError(f"{paths[0]} is not in huggingface_hub's cache {cache_root()}")
    folder = _folder(places[0].repo)
    snapshots = folder / "snapshots"
    kept = {path.resolve() for path in snapshots.rglob("*") if path not in paths and path.is_symlink()}
    blobs = {path.resolve() for path in paths} - kept
    freed = 0
    for path in paths:
        freed += 0 if path.is_symlink() else path.stat().st_size
        path.unlink()
    for blob in blobs:
        if blob.parent == (folder / "blobs").resolve():
            freed += blob.stat().st_size
            blob.unlink()
    for commit in {place.revision for place in places if place.revision is not None}:
        _forget_if_empty(folder, commit)
    return freed


def _forget_if_empty(folder: Path, commit: str) -> None:
    """Remove a commit's empty folders, and the names for a commit that has nothing left. Another program that fetches
    has made such folders in advance.
    """
    if any((folder / "blobs").glob("*.incomplete")):
        return
    snapshot = folder / "snapshots" / commit
    inner = [path for path in snapshot.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in (*sorted(inner, reverse=True), snapshot):
        with contextlib.suppress(OSError):  # something is in it
            path.rmdir()
    if snapshot.exists():
        return
    for name in (folder / "refs").rglob("*"):
        with contextlib.suppress(OSError):  # a name that cannot be read stays
            if name.is_file() and name.read_text("utf-8", "replace").strip() == commit:
                name.unlink()


def _hub_files(source: HubSource) -> list[str]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(source.repo, revision=source.revision, timeout=10)
    return [sibling.rfilename for sibling in info.siblings or ()]


@contextlib.contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """Turn what huggingface_hub raises into a SourceError with the next thing to do."""
    from huggingface_hub import errors as hub

    # Its own errors, those of its HTTP library (httpx, or httpx2 in newer versions), and hf_xet's, which are
    # RuntimeErrors. A ValueError is what it raises for a response that makes no sense.
    transport: Any = vars(hub)["HTTPError"]
    try:
        yield
    except hub.RemoteEntryNotFoundError as error:
        raise _no_such_file(source) from error
    except hub.HfHubHTTPError as error:
        raise _hub_refused(source, error) from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise _unreachable(source, "the hub is in offline mode, or out of reach") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise errors.SourceError(f"the disk is full: {error}", hint="Free some space, then try again") from error
        raise errors.SourceError(f"{source}: {error}", hint="Try again") from error
    except transport as error:
        raise _unreachable(source, str(error) or type(error).__name__) from error
    except (ValueError, RuntimeError) as error:
        raise errors.SourceError(f"{source}: {error}", hint="Try again") from error


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _unreachable(source: HubSource, reason: str) -> errors.SourceError:
    return errors.SourceError(
        f"{source} is not on this machine, and {_endpoint()} cannot be reached: {reason}",
        hint="Check the network (HF_ENDPOINT, HTTPS_PROXY, HF_HUB_OFFLINE), or use a file: source",
    )


def _hub_refused(source: HubSource, error: Any) -> errors.SourceError:
    """Say what an HTTP status means for this source."""
    from huggingface_hub import errors as hub

    page = f"{_endpoint()}/{source.repo}"
    status = error.response.status_code
    if isinstance(error, hub.GatedRepoError):
        return errors.SourceError(
            f"{source.repo} is gated: its owner wants a licence accepted first",
            hint=f"Accept the licence at {page} and set HF_TOKEN",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return errors.SourceError(f"{source.repo} has no revision {source.revision or 'main'}", hint=f"See {page}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return errors.SourceError(
            f"there is no repository {source.repo}, or it is private",
            hint=f"Check the name at {page}; for a private repository set HF_TOKEN",
        )
    if status in (401, 403):
        return errors.SourceError(
            f"{source.repo} was refused with HTTP {status}", hint=f"Check HF_TOKEN and your access to {page}"
        )
    if status == 429:
        return errors.SourceError("the hub allows no more downloads just now", hint="Wait, or set HF_TOKEN")
    return errors.SourceError(f"{source} failed with HTTP {status}", hint="Try again later")


def _no_such_file(source: HubSource) -> errors.SourceError:
    """Say that a repository has no such file, and which ones it has."""
    try:
        with _hub_errors(source):
            files = [file for file in _hub_files(source) if file.lower().endswith(WEIGHTS)]
    except errors.SourceError:
        files = []
    near = difflib.get_close_matches(source.file or "", files, n=3, cutoff=0.5) or files[:10]
    there = f"; it has {', '.join(near)}" if near else ""
    return errors.SourceError(
        f"{source.repo} has no file {source.file}{there}", hint=f"See {_endpoint()}/{source.repo}/tree/main"
    )
