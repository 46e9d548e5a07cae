"""``GET /v1/models`` and ``GET /v1/models/{id}``: what is served, with the facts that clients look for.

Clients read a model's context under three names, and its abilities and state as llama-server, LM Studio or OpenRouter
spell them; one record has them all. The endpoints are plain functions, which run in a thread, because a model's file
may have to be read first.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from llamaserve.api.services import UsesServices
from llamaserve.chat.formats.known import thinks
from llamaserve.errors import ModelError
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.image_file import ImageFile
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel
from llamaserve.registry.speech_file import SpeechFile
from llamaserve.registry.tasks import GENERATING, task_of
from llamaserve.registry.whisper_file import WhisperHeader
from llamaserve.worker.supervisor import Status

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List the served models")
def list_models(services: UsesServices, loaded: bool = False) -> dict[str, Any]:
    """Return all models on this machine, or only the ``loaded`` ones; the current one first, then other loaded ones."""
    models = services.pool.models
    if loaded:
        models = [model for model in models if model.live_worker is not None]
    return {"object": "list", "data": [describe(services.pool, model) for model in models]}


@router.get("/v1/models/{model_id:path}", summary="Describe one model")
def get_model(model_id: str, services: UsesServices) -> dict[str, Any]:
    """Return one model by name or alias; names may contain slashes."""
    return describe(services.pool, services.pool.get(model_id))


def capabilities(model: ServedModel) -> dict[str, bool]:
    """Return what this server does with the model; not all that the model was trained for."""
    header, speech, images = model.file.known_header, known_speech(model), known_images(model)
    task = task_of(model.spec, header)
    generates = header is not None and task in GENERATING
    template = header.chat_template if header is not None and generates else None
    return {
        "completion": generates,
        "chat": bool(template),
        "tools": bool(template),
        "vision": False,
        "reasoning": thinks(template or ""),
        "fim": header is not None and generates and _fills(header),
        "embeddings": header is not None and task == "embedding",
        "rerank": header is not None and (task == "embedding" or (task == "rerank" and header.gives_scores)),
        "moderation": header is not None and task == "moderation",
        "transcription": speech is not None,
        "translation": speech is not None and speech.translates,
        "image_generation": images is not None,
        "image_editing": images is not None and images.encodes,
    }


def known_speech(model: ServedModel) -> WhisperHeader | None:
    """Return what the file of a model of speech says of itself; None for others, and for one that is missing or bad."""
    return model.file.known_contents if isinstance(model.file, SpeechFile) else None


def known_images(model: ServedModel) -> DiffusionHeader | None:
    """Return what the files of a diffusion model say of themselves; None for others, and where they are bad."""
    return model.file.known_contents if isinstance(model.file, ImageFile) else None


def _input_modalities(model: ServedModel, images: DiffusionHeader | None) -> list[str]:
    if isinstance(model.file, SpeechFile):
        return ["audio"]
    return ["text", "image"] if images is not None and images.encodes else ["text"]


def _architecture(
    header: GGUFHeader | None, speech: WhisperHeader | None, images: DiffusionHeader | None
) -> str | None:
    if header is not None:
        return header.architecture
    return "whisper" if speech else images.family.name if images else None


def _fills(header: GGUFHeader) -> bool:
    try:
        return header.fim_tokens is not None
    except ModelError:  # the file was changed or taken away since its header was read
        return False


def _status(model: ServedModel) -> dict[str, Any]:
    status: dict[str, Any] = {"value": model.status.value}
    if model.status is Status.LOADING:
        status["progress"] = round(model.progress, 2)
    return status


def describe(pool: ModelPool, model: ServedModel) -> dict[str, Any]:
    """Return OpenAI's model object and what other servers' clients expect in it."""
    header, speech, images = model.file.known_header, known_speech(model), known_images(model)
    known = header or speech or images
    context = model.context if header else None
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llamaserve",
        "aliases": pool.aliases_of(model.name),
        "context_length": context,
        "max_model_len": context,
        "max_context_length": context,
        "meta": {
            "n_ctx": context,
            "n_ctx_train": header.context_length if header else None,
            "n_params": known.parameter_count if known else None,
            "n_vocab": header.vocabulary_size if header else speech.vocabulary_size if speech else None,
            "n_embd": header.embedding_length if header else speech.width if speech else None,
            "size": known.file_size if known else None,
            "quantization": known.quantisation if known else None,
            "architecture": _architecture(header, speech, images),
        },
        "architecture": {
            "input_modalities": _input_modalities(model, images),
            "output_modalities": ["image" if isinstance(model.file, ImageFile) else "text"],
        },
        "capabilities": capabilities(model),
        "status": _status(model),
    }
