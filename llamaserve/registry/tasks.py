"""What a model is there for, and what its vectors are made of: as its settings say, or else its file.

Knows settings and headers, and nothing of how anything is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from llamaserve.engine.params import Pooling
from llamaserve.errors import ModelNotCapable
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.sources import Source, is_image, is_speech, parse_source
from llamaserve.registry.spec import ModelSpec, Prefixes, Task

_POOLING: Final[dict[int | None, Pooling]] = {1: "mean", 2: "cls", 3: "last"}  # llama_pooling_type
_RANK: Final = 4

GENERATING: Final[tuple[Task, ...]] = ("generation", "moderation")  # whose models generate text

# What models of each task do, for people, and where it is asked for.
WORK: Final[dict[Task, str]] = {
    "generation": "generates text",
    "embedding": "makes embeddings (POST /v1/embeddings)",
    "rerank": "scores documents for a query (POST /v1/rerank)",
    "moderation": "judges texts (POST /v1/moderations)",
    "transcription": "transcribes speech (POST /v1/audio/transcriptions)",
    "image": "makes pictures (POST /v1/images/generations)",
}
NOT_WHISPER: Final = "its file is none of whisper.cpp's (.bin), which alone transcribe speech"


Kind = Literal["text", "speech", "image"]


def kind_of(spec: ModelSpec, source: Source) -> Kind:
    """Return which library runs a model with this source: llama.cpp for text, whisper.cpp or stable-diffusion.cpp."""
    if spec.task == "image" or (spec.task is None and is_image(source)):
        return "image"
    return "speech" if is_speech(source) else "text"


def task_of(spec: ModelSpec, header: GGUFHeader | None) -> Task:
    """Return what a model is there for; without a header, as far as its settings tell."""
    if spec.task is not None:
        return spec.task
    match kind_of(spec, parse_source(spec.source, Path("/"))):
        case "speech":
            return "transcription"
        case "image":
            return "image"
    if header is None or not header.is_embedding_model:
        return "generation"
    return "rerank" if header.pooling_type == _RANK else "embedding"


def pooling_of(spec: ModelSpec, header: GGUFHeader) -> Pooling | None:
    """Return how one vector or score is made of those of a text's tokens; None for a model that generates text. A model
    that was not made for embeddings gives the mean.

    Raises ``ModelNotCapable`` when it can't do what its settings say.
    """
    task = task_of(spec, header)
    if task != "embedding" and (spec.pooling != "auto" or spec.prefixes != Prefixes()):
        raise ModelNotCapable(
            f"it {WORK[task]}, and `pooling` and `prefixes` are for models that make embeddings: leave them out, or "
            "set `task: embedding`"
        )
    match task:
        case "embedding":
            return _POOLING.get(header.pooling_type, "mean") if spec.pooling == "auto" else spec.pooling
        case "rerank":
            if not header.gives_scores:
                raise ModelNotCapable("it has no classification head, so it can't score documents")
            return "rank"
        case "transcription" | "image":
            raise ModelNotCapable(NOT_WHISPER if task == "transcription" else "its file is none of a diffusion model")
        case _:
            if not header.remembers:
                raise ModelNotCapable("it is an encoder; it can't generate text")
            return None
