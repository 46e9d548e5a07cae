"""How the answers to commands about models look."""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta

from llamaserve.api.answers.answer import OK, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LACKS, LOADS
from llamaserve.api.answers.generation import HEADERS, MODEL
from llamaserve.api.answers.internal import Said


class ModelNames(Answer):
    """The names of all models on this machine."""

    model_names: list[str]


class LoadedModel(Answer):
    """What is in force after a load, with `verbose`."""

    status: Said
    model_name: str
    effective: Annotated[dict[str, Any], Meta(description="How the model runs.")]
    settings: Annotated[dict[str, Any], Meta(description="What its requests have where they say nothing.")]
    ignored: Annotated[list[str], Meta(description="What has no effect.")]


_LOADED: Final = {
    "status": OK,
    "model_name": MODEL,
    "effective": {"context": 4096, "threads": 2},
    "settings": {"temperature": 0.7, "max_tokens": 200},
    "ignored": [],
}
_LOAD: Final = {
    "model_name": MODEL,
    "args": {"ctx_size": 4096, "threads": 2},
    "settings": {"temperature": 0.7, "max_new_tokens": 200},
    "verbose": True,
}

ROUTES: Final = {
    "GET /v1/internal/model/list": Documented(
        answers=(Content(ModelNames, {"two": {"model_names": ["qwen3-0.6b", MODEL]}}),)
    ),
    "POST /v1/internal/model/load": Documented(
        answers=(Content((Said, LoadedModel), {"done": OK, "verbose": _LOADED}),),
        errors=(*BODY, *LOADS, *LACKS),
        requests={"verbose": _LOAD, "plain": {"model_name": MODEL}},
        headers=HEADERS,
    ),
    "POST /v1/internal/model/unload": Documented(
        answers=(Content(Said, {"done": OK}),),
        errors=(*BODY, 404),
        requests={"one": {"model_name": MODEL}, "all": {}},
    ),
}
