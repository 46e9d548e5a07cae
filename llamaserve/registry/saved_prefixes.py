"""Where the prefixes of models that are not loaded lie: which file is whose, and how many bytes all of them may take.

A state is good for the same weights, evaluated in the same way by the same build of llama.cpp. So a file is good for a
model's fingerprint with the settings that decide how positions are turned, how much of the past a layer sees, and in
which form the cache keeps it. Everything else may change between two loads: how long the context is, how many sequences
run at once, batches, threads, how many layers are on a GPU. LoRA adapters are in the file, by what is in theirs.

Blocking: for a thread. Knows nothing of what is in the files, and of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import struct
import time
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from llamaserve.engine.params import LoadParams
from llamaserve.registry.cache import State, cache_folder, recall, remember, state_of
from llamaserve.registry.gguf import GGUFHeader, TensorInfo

log = logging.getLogger(__name__)

_SUFFIX: Final = ".prefixes"
_UNFINISHED: Final = 3600.0  # seconds after which a file that is still being written is nobody's any more ...
_BEGUN: Final = 60.0  # ... or so many, where locks say whether somebody is at it
_LEFT_FREE: Final = 1 << 30  # bytes of the disk that are for others
_SAMPLES, _SAMPLE = 1024, 4096  # from each file of a model, and bytes of each: 0.1 s for 10 GB that nobody has read
_SMALL: Final = (
    1 << 20
)  # bytes of a tensor that is looked at as a whole, since samples could miss it: norms, biases ...
_MOST_SMALL: Final = 64 << 20  # ... as far as all of them have no more
_SWITCHES: Final = ("LLAMA_ATTN_", "LLAMA_KV_")  # environment variables by which llama.cpp keeps keys in another form
_SILENT: Final = "_DEBUG"  # of them, those that change nothing
_ALIGNMENT: Final = 32  # bytes, of weights in a file that says nothing else
_CELLS: Final = 256  # llama.cpp rounds the cells of a cache up to a multiple of it


class _Fingerprint(msgspec.Struct, frozen=True):
    """The fingerprint of a model, good as long as the states of its files are the same."""

    files: list[tuple[str, State]]
    value: str


def saved_prefixes_folder() -> Path:
    """Return where the files are kept."""
    return cache_folder() / "prefixes"


class SavedPrefixes:
    """The files in one folder: at most ``budget`` bytes. Conversations are in them, so others may not look into it."""

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._budget = budget

    def path_for(self, header: GGUFHeader, params: LoadParams, *, name: str = "") -> tuple[Path, str]:
        """Return the file of a model that is loaded like this, whether it is there or not, and the identity that it
        must have to be good. Models of different names have files of their own, and do not replace each other's.

        Raises ``OSError`` when the weights can't be read.
        """
        identity = _identity(header, params)
        owner = "\0".join((identity, str(header.path.absolute()), name))
        digest = hashlib.sha256(owner.encode("utf-8", "surrogateescape")).hexdigest()
        return self._folder / (digest[:32] + _SUFFIX), identity

    def room(self, path: Path) -> int:
        """Return how many bytes a model's file may have; 0 when there can be none. What the former one takes of the
        disk is there already: while a new one is written beside it, that may be missing from what is left for others.
        Other models' files make room for it afterwards, in ``prune``.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            free = shutil.disk_usage(self._folder).free
            former = path.stat().st_size if path.exists() else 0
        except OSError as error:
            log.warning("prefixes can't be saved in %s: %s", path.parent, error)
            return 0
        return max(0, min(self._budget, free - _LEFT_FREE + former))

    def prune(self) -> None:
        """Remove what was never finished, and files, those unused longest first, until all that is there is within the
        budget. For the start of a server, and after each save.
        """
        unfinished = [file for file in self._files(".*.part") if not self._discard_abandoned(*file)]
        files = sorted(self._files("*" + _SUFFIX), key=lambda file: file[1].st_mtime_ns)
        size = sum(status.st_size for _, status in (*files, *unfinished))
        for path, status in files:
            if size <= self._budget:
                break
            log.info("saved prefixes are removed to make room for others: %s", path)
            self.discard(path)
            size -= status.st_size

    def discard(self, path: Path) -> None:
        """Remove a file, if it is there."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("saved prefixes can't be removed: %s", error)

    def _discard_abandoned(self, path: Path, status: os.stat_result) -> bool:
        """Remove a file that nobody is writing any more, and return whether that was so."""
        age = time.time() - status.st_mtime
        abandoned = age > _BEGUN and _abandoned(path, old=age > _UNFINISHED)
        if abandoned:
            self.discard(path)
        return abandoned

    def _files(self, pattern: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another server has the same folder
                found.append((path, path.lstat()))
        return found


def _abandoned(path: Path, *, old: bool) -> bool:
    """Return whether nobody has locked a file; where that can't be told, whether it is old."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return old
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return old
    finally:
        os.close(descriptor)
    return True


def _identity(header: GGUFHeader, params: LoadParams) -> str:
    """Return what states depend on, for humans, too."""
    parts = {
        "model": _fingerprint(header),
        "build": _build(),
        "keys": params.key_type,
        "values": params.value_type,
        "flash attention": params.flash_attention,  # without, values lie across
        "unified": params.kv_unified,
        "whole window": params.full_window,
        "rope base": params.rope_freq_base,
        "rope scale": params.rope_freq_scale,
        "long rope": _turns_for_long(header, params),
    } | _switches()
    return ", ".join(f"{key} {value}" for key, value in parts.items())


def _switches() -> dict[str, str]:
    """Return the environment variables, which a child inherits, that change what a state means. Quantised keys are
    rotated unless ``LLAMA_ATTN_ROT_DISABLE`` says no, and other builds have more of that kind.
    """
    names = sorted(name for name in os.environ if name.startswith(_SWITCHES) and not name.endswith(_SILENT))
    return {ascii(name): ascii(os.environ[name]) for name in names}


def _turns_for_long(header: GGUFHeader, params: LoadParams) -> bool:
    """Whether positions are turned by a model's factors for long contexts (LongRoPE): of the models that have some,
    llama.cpp uses them for all positions once a sequence could be longer than those trained at first.
    """
    if not any(tensor.name.endswith("rope_factors_long.weight") for tensor in header.tensors):
        return False
    trained = header.integer("{arch}.rope.scaling.original_context_length") or header.context_length or 0
    return -(-params.kv_cells // _CELLS) * _CELLS > trained


def _fingerprint(header: GGUFHeader) -> str:
    """Return what tells a model from others: the sum of its files' sizes and times of change, of the header, the small
    tensors and samples of the weights. It is remembered.
    """
    key = str(header.path.absolute())
    files = [(str(path), state_of(path.stat())) for path in header.paths]
    known = recall("fingerprints", key, _Fingerprint)
    if known is not None and known.files == files:
        return known.value
    digest = hashlib.sha256()
    left = _MOST_SMALL
    for path, (_, (size, changed, *_)), tensors in zip(header.paths, files, _tensors_by_file(header), strict=True):
        digest.update(struct.pack("<Qq", size, changed))
        with path.open("rb", buffering=0) as file:
            if path == header.path:
                digest.update(file.read(header.data_offset))
            start = header.data_offset if path == header.path else _start_of_data(header, size, tensors)
            for tensor in tensors:
                if tensor.size <= min(_SMALL, left):
                    left -= tensor.size
                    digest.update(os.pread(file.fileno(), tensor.size, start + tensor.offset))
            for number in range(_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE, size * number // _SAMPLES))
    value = digest.hexdigest()[:32]
    remember("fingerprints", key, _Fingerprint(files, value))
    return value


def _tensors_by_file(header: GGUFHeader) -> list[tuple[TensorInfo, ...]]:
    counts = [
        len(header.tensors) - sum(part.tensors for part in header.others),
        *(each.tensors for each in header.others),
    ]
    tensors = iter(header.tensors)
    return [tuple(islice(tensors, count)) for count in counts]


def _start_of_data(header: GGUFHeader, size: int, tensors: tuple[TensorInfo, ...]) -> int:
    """Return where the weights begin in a further file of a model: they reach to its end, or nearly so."""
    alignment = header.integer("general.alignment") or _ALIGNMENT
    end = max((tensor.offset + tensor.size for tensor in tensors), default=0)
    return max(0, size - end) // alignment * alignment


def _build() -> str:
    """Return what tells a build of llama.cpp from others: the names, sizes and times of its libraries. They are not
    loaded for it.
    """
    configured = os.environ.get("LLAMA_CPP_LIB_PATH")
    spec = None if configured else importlib.util.find_spec("llama_cpp")
    places = (spec.submodule_search_locations if spec else None) or []
    folders = [Path(configured)] if configured else [Path(place) / "lib" for place in places]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
