"""How models are described."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import Answer, Content, Documented
from llamaserve.api.answers.generation import CREATED, MODEL, Created

State = Annotated[
    Literal["unloaded", "loading", "loaded", "quarantined"], Meta(description="quarantined: it crashed too often.")
]
Context = Annotated[int | None, Meta(description="Tokens that a request may use; null where that is not known.")]


class ModelFacts(Answer):
    """What the file says of a model; null where there is nothing to say."""

    n_ctx: Context
    n_ctx_train: int | None
    n_params: int | None
    n_vocab: int | None
    n_embd: int | None
    size: Annotated[int | None, Meta(description="Bytes.")]
    quantization: str | None
    architecture: str | None


class Modalities(Answer):
    """What goes in and comes out."""

    input_modalities: list[Literal["text", "audio", "image"]]
    output_modalities: list[Literal["text", "image"]]


class Capabilities(Answer):
    """What this server does with a model."""

    completion: bool
    chat: bool
    tools: bool
    vision: bool
    reasoning: bool
    fim: bool
    embeddings: bool
    rerank: bool
    moderation: bool
    transcription: bool
    translation: bool
    image_generation: bool
    image_editing: bool


class ModelStatus(Answer):
    """Whether a model is loaded."""

    value: State
    progress: Annotated[float, Meta(ge=0, le=1, description="While it is loading.")] | UnsetType = UNSET


class ModelObject(Answer):
    """A model on this machine."""

    id: str
    object: Literal["model"]
    created: Created
    owned_by: Literal["llamaserve"]
    aliases: list[str]
    context_length: Context
    max_model_len: Context
    max_context_length: Context
    meta: ModelFacts
    architecture: Modalities
    capabilities: Capabilities
    status: ModelStatus


class ModelList(Answer):
    """All models on this machine, the current one first, then other loaded ones."""

    object: Literal["list"]
    data: list[ModelObject]


CAPABILITIES: Final = dict.fromkeys(Capabilities.__struct_fields__, False) | dict.fromkeys(
    ("completion", "chat", "tools"), True
)
_FACTS: Final[dict[str, Any]] = {
    "n_ctx": 8192,
    "n_ctx_train": 8192,
    "n_params": 134_515_008,
    "n_vocab": 49_152,
    "n_embd": 576,
    "size": 144_811_360,
    "quantization": "Q8_0",
    "architecture": "llama",
}
_MODEL: Final = {
    "id": MODEL,
    "object": "model",
    "created": CREATED,
    "owned_by": "llamaserve",
    "aliases": ["starter"],
    **dict.fromkeys(("context_length", "max_model_len", "max_context_length"), 8192),
    "meta": _FACTS,
    "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    "capabilities": CAPABILITIES,
    "status": {"value": "loaded"},
}

ROUTES: Final = {
    "GET /v1/models": Documented(
        answers=(Content(ModelList, {"one": {"object": "list", "data": [_MODEL]}}),), errors=(400,)
    ),
    "GET /v1/models/{model_id}": Documented(answers=(Content(ModelObject, {"starter": _MODEL}),), errors=(400, 404)),
}
