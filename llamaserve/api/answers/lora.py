"""How the answers to commands about LoRA adapters look."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from llamaserve.api.answers.answer import OK, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LOADS
from llamaserve.api.answers.internal import Said


class AdapterNames(Answer):
    """The adapters of the current model, and those in the folder for them."""

    lora_names: list[str]


class AdapterObject(Answer):
    """An adapter of the current model, as llama-server has it."""

    id: Annotated[int, Meta(ge=0, description="Its place in the list.")]
    name: str
    path: str
    scale: float


class ScalesSet(Answer):
    """It is done."""

    success: Literal[True]


_STYLE: Final = {"id": 0, "name": "style", "path": "loras/style.gguf", "scale": 0.8}

ROUTES: Final = {
    "GET /v1/internal/lora/list": Documented(answers=(Content(AdapterNames, {"one": {"lora_names": ["style"]}}),)),
    "POST /v1/internal/lora/load": Documented(
        answers=(Content(Said, {"done": OK}),),
        errors=(*BODY, *LOADS),
        requests={"one": {"lora_names": ["style"], "scales": [0.8]}},
    ),
    "POST /v1/internal/lora/unload": Documented(
        answers=(Content(Said, {"done": OK}),), errors=(*BODY, *LOADS), requests={"all": {}}
    ),
    "GET /lora-adapters": Documented(answers=(Content(list[AdapterObject], {"one": [_STYLE]}),)),
    "POST /lora-adapters": Documented(
        answers=(Content(ScalesSet, {"done": {"success": True}}),),
        errors=(*BODY, *LOADS),
        requests={"one": [{"id": 0, "scale": 0.5}]},
    ),
}
