"""Whether a model's files are what they should be: read anew, and compared with models.yaml, models.lock and the hub.

Nothing is fetched, changed or loaded. This module knows files and promises, and not how findings are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llamaserve import errors
from llamaserve.registry import hub, wheels
from llamaserve.registry.adapters import check_adapter
from llamaserve.registry.cache import checksum
from llamaserve.registry.diffusion_file import read_diffusion, read_weights
from llamaserve.registry.fetching import check_sum, locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.image_file import locate_parts
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.lock_file import LockEntry, LockFile
from llamaserve.registry.pulling import differences, template_sum
from llamaserve.registry.remedies import Advice, Files, Remedies
from llamaserve.registry.sources import FileSource, Source, WheelSource, parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths
from llamaserve.registry.tasks import kind_of
from llamaserve.registry.whisper_file import read_whisper


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong with a model, and the command that mends it."""

    model: str
    problem: str
    fix: str


def verify_model(
    registry: Registry, name: str, spec: ModelSpec, lock: LockFile, options: tuple[str, ...] = ()
) -> list[Finding]:
    """Return what is wrong with a model, its adapters and its parts. ``options`` are the words that make other commands
    see the same models. Raises ``RegistryError`` for a damaged models.lock.
    """
    base = registry.path.parent
    verification = _Verification(Remedies(registry, name, options), spec, lock)
    found = list(verification.files(registry.source(spec), spec.source, spec.sha256))
    for part, text in spec.parts.sources.items():
        found += verification.files(parse_source(text, base), text, None, beside=f"the part {part}")
    header = None
    if not found:
        header, fault = verification.header(registry.source(spec))
        found += fault
    for adapter in spec.lora:
        found += verification.adapter(parse_source(adapter.source, base), adapter.source, header)
    return [Finding(name, *advice) for advice in found]


def unfit_adapter(remedies: Remedies, files: Files, model: GGUFHeader) -> Advice | None:
    """Return what keeps a model from being loaded with an adapter that is here; None if nothing does."""
    try:
        adapter = read_header(files.path)
    except errors.LlamaserveError as error:
        return remedies.mend(files, error)
    try:
        check_adapter(adapter, model)
    except errors.LlamaserveError as error:
        return remedies.unfit(files.source, error)
    return None


@dataclass(frozen=True)
class _Verification:
    """What is looked at for one model, file by file."""

    remedies: Remedies
    spec: ModelSpec
    lock: LockFile

    def files(self, source: Source, text: str, sha256: str | None, *, beside: str | None = None) -> Iterator[Advice]:
        """Compare the files of a source with all that was promised for them. ``text`` is what models.yaml calls it, and
        ``beside`` what it is, if not the model itself.
        """
        path, entry = locate(source), self.lock.get(text)
        if path is None:
            yield self.remedies.absent(source, "it" if beside is None else f"{beside} {text}")
            return
        files = Files(source, path, entry, sha256, beside is not None)
        try:
            for what in _broken_promises(path):
                yield self.remedies.replace(files, what)
            if entry is not None:
                own = isinstance(source, FileSource)
                for what in differences(entry, path):
                    yield self.remedies.accept(self.spec, what) if own else self.remedies.replace(files, what)
            check_sum(source, path, sha256)
            if isinstance(source, WheelSource) and wheels.is_unknown(source):
                yield self.remedies.unknown(files)
            elif isinstance(source, WheelSource) and wheels.is_outdated(source, path):
                what = f"{path} was converted by another version of llamaserve, and would be another file now"
                yield self.remedies.accept(self.spec, what)
            of_texts = kind_of(self.spec, self.remedies.registry.source(self.spec)) == "text"
            if of_texts and entry is not None and (other := _other_template(entry, path)):
                yield self.remedies.accept(self.spec, other)
        except (errors.LlamaserveError, OSError) as error:
            yield self.remedies.mend(files, error)

    def header(self, source: Source) -> tuple[GGUFHeader | None, list[Advice]]:
        """Return the header of a file that llama.cpp can load, None for another library's, or what is wrong."""
        path = locate(source)
        if path is None:
            return None, []
        try:
            match kind_of(self.spec, source):
                case "speech":
                    read_whisper(path)
                    return None, []
                case "image":
                    return None, list(self.images(path))
            header = read_header(path)
            check_loadable(header)
        except errors.LlamaserveError as error:
            files = Files(source, path, self.lock.get(self.spec.source), self.spec.sha256)
            return None, [self.remedies.mend(files, error)]
        return header, []

    def images(self, path: Path) -> Iterator[Advice]:
        """Look into the files of a diffusion model, whose parts are all here: each by itself, and all together."""
        base = self.remedies.registry.path.parent
        for text in (self.spec.source, *self.spec.parts.sources.values()):
            source = parse_source(text, base)
            file = locate(source) or path
            try:
                read_weights(file)
            except errors.LlamaserveError as error:
                own = file == path
                files = Files(source, file, self.lock.get(text), self.spec.sha256 if own else None, adapter=not own)
                yield self.remedies.mend(files, error)
                return
        try:
            read_diffusion(path, locate_parts(self.remedies.name, self.spec, base))
        except errors.LlamaserveError as error:
            yield self.remedies.unfit(parse_source(self.spec.source, base), error)

    def adapter(self, source: Source, text: str, model: GGUFHeader | None) -> Iterator[Advice]:
        """Compare an adapter with what was promised, and with the model if that is good."""
        found = list(self.files(source, text, None, beside="the LoRA adapter"))
        yield from found
        path = locate(source)
        if found or path is None or model is None:
            return
        unfit = unfit_adapter(self.remedies, Files(source, path, self.lock.get(text), adapter=True), model)
        if unfit is not None:
            yield unfit


def _broken_promises(path: Path) -> Iterator[str]:
    """Read a model's files, and say which are not what the hub promised."""
    sums = {part: checksum(part, anew=True) for part in part_paths(path)}
    for part, actual in sums.items():
        promised = hub.promised_sum(part)
        if promised is not None and promised != actual:
            yield f"{part} has the SHA-256 {actual}, and the hub promised {promised}"


def _other_template(entry: LockEntry, path: Path) -> str | None:
    template = template_sum(path)
    if template == entry.template:
        return None
    return f"{path} has the chat template {template or 'none'}, and models.lock says {entry.template or 'none'}"
