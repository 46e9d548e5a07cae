"""How the answers of the small endpoints look."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import OK, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LOADS, WAITS
from llamaserve.api.answers.generation import HEADERS, MODEL, Count
from llamaserve.api.answers.models import CAPABILITIES, Capabilities, State

Said = Literal["OK"]
Probability = Annotated[float, Meta(ge=0)]


class Tokens(Answer):
    """The token ids of a text."""

    tokens: list[int]
    length: Count


class TokenCount(Answer):
    """The number of tokens of a text."""

    length: Count


class DecodedText(Answer):
    """The text of token ids."""

    text: Annotated[str, Meta(description="Bytes that are no UTF-8 are U+FFFD.")]


class Health(Answer):
    """The server is up."""

    status: Literal["ok"]


class Busyness(Answer):
    """The server is up, and does so much."""

    status: Literal["ok"]
    running: Annotated[int, Meta(ge=0, description="Sequences that are being evaluated.")]
    waiting: Annotated[int, Meta(ge=0, description="Sequences in the queue.")]
    models: dict[str, State]


class AdapterScale(Answer):
    """An adapter, and how strongly it works."""

    name: str
    scale: float


class EstimatedMemory(Answer):
    """What a model was estimated to take, in bytes."""

    host: Count
    gpu: Count
    weights: Count
    cache: Count
    compute: Count
    vocabulary: Count


class MeasuredMemory(Answer):
    """What a model took, in bytes."""

    host: int
    gpu: int


class ModelMemory(Answer):
    """The memory of a model, in bytes; null before it was loaded."""

    estimated: EstimatedMemory | None
    measured: MeasuredMemory | None
    planned: int | UnsetType = UNSET
    spill: int | UnsetType | None = UNSET


class ModelInfo(Answer):
    """The current model; its name is `None`, as a word, when there is none."""

    model_name: str
    lora_names: list[str]
    loader: Literal["llama.cpp", "whisper.cpp", "stable-diffusion.cpp"] | None
    status: State | UnsetType = UNSET
    gpu: (
        Annotated[bool | None, Meta(description="Whether it is on a GPU; null where it is not loaded.")] | UnsetType
    ) = UNSET
    pid: int | UnsetType | None = UNSET
    capabilities: Capabilities | UnsetType = UNSET
    ctx_size: int | UnsetType = UNSET
    n_vocab: int | UnsetType = UNSET
    chat_template: str | UnsetType = UNSET
    args: Annotated[dict[str, Any], Meta(description="What is in force.")] | UnsetType = UNSET
    lora: list[AdapterScale] | UnsetType = UNSET
    memory: ModelMemory | UnsetType = UNSET
    error: Annotated[str, Meta(description="Why no more is known.")] | UnsetType = UNSET


_INFO: Final = {
    "model_name": MODEL,
    "lora_names": [],
    "loader": "llama.cpp",
    "status": "loaded",
    "gpu": False,
    "pid": 4711,
    "capabilities": CAPABILITIES,
    "ctx_size": 8192,
    "n_vocab": 49_152,
    "chat_template": "{% for message in messages %}…{% endfor %}",
    "args": {"context": 8192, "threads": 8},
    "lora": [],
    "memory": {"estimated": None, "measured": None},
}
_HELLO: Final = {"text": "Hello world"}

ROUTES: Final = {
    "POST /v1/internal/encode": Documented(
        answers=(Content(Tokens, {"two": {"tokens": [19556, 905], "length": 2}}),),
        errors=(*BODY, *LOADS),
        requests={"text": _HELLO},
    ),
    "POST /v1/internal/token-count": Documented(
        answers=(Content(TokenCount, {"two": {"length": 2}}),),
        errors=(*BODY, *LOADS),
        requests={"text": _HELLO},
    ),
    "POST /v1/internal/decode": Documented(
        answers=(Content(DecodedText, {"text": _HELLO}),),
        errors=(*BODY, *LOADS),
        requests={"tokens": {"tokens": [19556, 905]}},
    ),
    "POST /v1/internal/logits": Documented(
        answers=(Content(dict[str, Probability], {"five": {" Paris": 0.41, " a": 0.07}}),),
        errors=(*BODY, *WAITS),
        requests={"five": {"prompt": "The capital of France is", "top_logits": 5}},
        headers=HEADERS,
    ),
    "POST /v1/internal/stop-generation": Documented(
        answers=(Content(Said, {"done": OK}),),
        errors=BODY,
        requests={"all": {}, "one": {"id": "chatcmpl-5d3f0a"}},
    ),
    "GET /health": Documented(answers=(Content(Health, {"up": {"status": "ok"}}),)),
    "GET /v1/internal/health": Documented(
        answers=(
            Content(
                (Busyness, Health), {"idle": {"status": "ok", "running": 0, "waiting": 0, "models": {MODEL: "loaded"}}}
            ),
        )
    ),
    "GET /v1/internal/model/info": Documented(
        answers=(
            Content(ModelInfo, {"loaded": _INFO, "none": {"model_name": "None", "lora_names": [], "loader": None}}),
        )
    ),
}
