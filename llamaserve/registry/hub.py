"""Model files on the Hugging Face Hub: which file a reference means, whether it is here, and fetching it.

Files lie in huggingface_hub's own cache, where other programs find them too. huggingface_hub is imported in the
functions that need it: the import takes longer than all the rest of a start.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

import msgspec

from llamaserve import errors
from llamaserve.registry.cache import is_file, lock, recall, remember, require_space, verify
from llamaserve.registry.sources import SPLIT, WEIGHTS, HubSource, Progress

# What a repository is asked for when no quantisation is named: first the best compromise, then what runs fast on a CPU.
PREFERRED_QUANTS: Final = ("Q4_K_M", "Q4_0", "Q8_0")
_NAME_ONE: Final = "Name the file: hf:OWNER/REPO/FILE.gguf"


class _Choice(msgspec.Struct, frozen=True):
    """The file that a source without a file name stood for when it was fetched."""

    source: str
    file: str


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
    from huggingface_hub import constants, try_to_load_from_cache

    file = source.file
    if file is None:
        choice = recall("choices", str(source), _Choice)
        file = choice.file if choice else None
    if file is None and source.quant is not None:  # fetched by another program; a bare name is not enough to pick one
        folder = Path(constants.HF_HUB_CACHE) / f"models--{source.repo.replace('/', '--')}"
        revision = source.revision or constants.DEFAULT_REVISION
        with contextlib.suppress(OSError, UnicodeDecodeError):
            revision = (folder / "refs" / revision).read_text("utf-8").strip()
        snapshot = folder / "snapshots" / revision
        there = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if is_file(path)]
        with contextlib.suppress(errors.SourceError):
            file = pick(there, source)
    if file is None:
        return None
    cached = try_to_load_from_cache(source.repo, file, revision=source.revision)
    return Path(cached) if isinstance(cached, str) else None


def pick(files: Sequence[str], source: HubSource) -> str:
    """Return the one of a repository's files that a source without a file name means; never a guess."""
    weights = [file for file in files if file.lower().endswith(".gguf") and not _is_companion(file)]
    for quant in (source.quant,) if source.quant else PREFERRED_QUANTS:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        named = [file for file in weights if word.search(PurePosixPath(file).name)]
        whole = [file for file in named if not SPLIT.search(file)]
        if len(whole) == 1:
            return whole[0]
        if whole:
            raise errors.SourceError(f"{source.repo} has several files for {quant}: {', '.join(whole)}", hint=_NAME_ONE)
        if named:
            raise errors.SourceError(
                f"{source.repo} has {quant} only as a split file; only files in one piece are supported",
                hint="Use another quantisation or repository, or join the parts with llama-gguf-split --merge",
            )
    if source.quant is None and len(weights) == 1 and not SPLIT.search(weights[0]):
        return weights[0]
    wanted = source.quant or " or ".join(PREFERRED_QUANTS)
    listed = f"it has {', '.join(weights)}" if weights else "it has no GGUF file at all"
    raise errors.SourceError(f"{source.repo} has no file for {wanted}; {listed}", hint=_NAME_ONE)


def _is_companion(file: str) -> bool:
    """Whether a GGUF file holds no language model: an image encoder, or the statistics of a quantisation."""
    return PurePosixPath(file).name.lower().startswith(("mmproj", "imatrix"))


def fetch_file(source: HubSource, sha256: str | None, progress: Progress) -> Path:
    """Download the file unless it is here, and return it, checked. A download that was cut goes on where it ended."""
    with _hub_errors(source):
        file = source.file or pick(_hub_files(source), source)
    named = HubSource(source.repo, file, revision=source.revision)
    path = cached_file(named)
    if path is None:
        with _hub_errors(named):
            path = _download(named, file, progress)
    if source.file is None:
        remember("choices", str(source), _Choice(str(source), file))
    if sha256 is not None:
        verify(path, sha256)
    return path


def _download(source: HubSource, file: str, progress: Progress) -> Path:
    """Put the file into huggingface_hub's cache.

    ``hf_hub_download`` starts again from nothing in every process, so the bytes are fetched here, with its own function
    for that, into a file that the next attempt continues. It then finds the blob and links it into the snapshot.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    # Also because hf_hub_download would retry for half a minute when there is no network.
    about = get_hf_file_metadata(hf_hub_url(source.repo, file, revision=source.revision))
    if about.etag is not None and about.size is not None:
        blob = Path(constants.HF_HUB_CACHE) / f"models--{source.repo.replace('/', '--')}" / "blobs" / about.etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        with lock(f"hub {blob}"):
            if not blob.exists():
                _download_blob(about, blob, progress)
    return Path(hf_hub_download(source.repo, file, revision=source.revision))


def _download_blob(about: Any, blob: Path, progress: Progress) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part = blob.with_name(blob.name + ".llamaserve-part")
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
        _check_sum(part, blob.name)
    except errors.ChecksumMismatch:
        part.unlink()
        raise
    part.replace(blob)


def _check_sum(path: Path, etag: str) -> None:
    """Check a download against the sum that the hub promised for it: a large file's ETag is its SHA-256.

    huggingface_hub itself compares no more than the size when it downloads over plain HTTP.
    """
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        verify(path, etag)


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
