"""Where the prefixes of models that are not loaded lie: which file is whose, and how many bytes all of them may take.

A state is good for the same weights, evaluated in the same way by the same build of llama.cpp. So a file is good for a
model's fingerprint with the settings that decide how positions are turned, how much of the past a layer sees, and in
which form the cache keeps it. Everything else may change between two loads: how long the context is, how many sequences
run at once, batches, threads, how many layers are on a GPU. LoRA adapters are in the file, by what is in theirs.

Blocking: for a thread. Knows nothing of what is in the files, and of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Final

import msgspec

from llamaserve.engine.params import LoadParams
from llamaserve.registry.cache import cache_folder, recall, remember
from llamaserve.registry.gguf import GGUFHeader

log = logging.getLogger(__name__)

_SUFFIX: Final = ".prefixes"
_UNFINISHED: Final = 3600.0  # seconds after which a file that is still being written is nobody's any more
_LEFT_FREE: Final = 1 << 30  # bytes of the disk that are for others
_SAMPLES, _SAMPLE = 1024, 4096  # from each file of a model, and bytes of each: 0.1 s for 10 GB that nobody has read
_CELLS: Final = 256  # llama.cpp rounds the cells of a cache up to a multiple of it


class _Fingerprint(msgspec.Struct, frozen=True):
    """The fingerprint of a model, good as long as sizes and times of change of its files are the same."""

    files: list[tuple[str, int, int]]
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
        """Return how many bytes a new file may take, beside the former one while it is written; 0 when there can be
        none. Other models' files make room for it afterwards, in ``prune``.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            log.warning("prefixes can't be saved in %s: %s", path.parent, error)
            return 0
        return max(0, min(self._budget, free - _LEFT_FREE))

    def prune(self) -> None:
        """Remove files, those unused longest first, until the others are within the budget, and what was never
        finished.
        """
        for path, status in self._files(".*.part"):
            if time.time() - status.st_mtime > _UNFINISHED:
                self.discard(path)
        files = sorted(self._files("*" + _SUFFIX), key=lambda file: file[1].st_mtime_ns)
        size = sum(status.st_size for _, status in files)
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

    def _files(self, pattern: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another server has the same folder
                found.append((path, path.lstat()))
        return found


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
    }
    return ", ".join(f"{key} {value}" for key, value in parts.items())


def _turns_for_long(header: GGUFHeader, params: LoadParams) -> bool:
    """Whether positions are turned by a model's factors for long contexts (LongRoPE): of the models that have some,
    llama.cpp uses them for all positions once a sequence could be longer than those trained at first.
    """
    if not any(tensor.name.endswith("rope_factors_long.weight") for tensor in header.tensors):
        return False
    trained = header.integer("{arch}.rope.scaling.original_context_length") or header.context_length or 0
    return -(-params.kv_cells // _CELLS) * _CELLS > trained


def _fingerprint(header: GGUFHeader) -> str:
    """Return what tells a model from others: the sum of its files' sizes and beginnings, the header among them, and of
    samples of the weights. It is remembered.
    """
    key = str(header.path.absolute())
    files = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in header.paths]
    known = recall("fingerprints", key, _Fingerprint)
    if known is not None and known.files == files:
        return known.value
    digest = hashlib.sha256()
    for path, (_, size, _) in zip(header.paths, files, strict=True):
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb", buffering=0) as file:
            if path == header.path:
                digest.update(file.read(header.data_offset))
            for number in range(_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE, size * number // _SAMPLES))
    value = digest.hexdigest()[:32]
    remember("fingerprints", key, _Fingerprint(files, value))
    return value


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
