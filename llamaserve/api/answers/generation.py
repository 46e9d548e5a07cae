"""What the answers of all endpoints that write text have in common."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import Answer

MODEL: Final = "smollm2-135m"
CREATED: Final = 1_764_288_000
HEADERS: Final = ("x-llamaserve-ignored",)

Seed = Annotated[int, Meta(description="The seed that was used.")]
Created = Annotated[int, Meta(description="When, in seconds since 1970.")]
Index = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
Ended = Annotated[
    Literal["stop", "length"],
    Meta(description="stop: the model ended, a stop text came, or it was told to end; length: a limit was reached."),
]


class PromptTokensDetails(Answer):
    """More about the tokens of prompts."""

    cached_tokens: Annotated[int, Meta(ge=0, description="Those that other requests had evaluated.")]
    truncated_tokens: Annotated[int, Meta(ge=1, description="How many more were cut off.")] | UnsetType = UNSET


class Usage(Answer):
    """Tokens of the request and of its answers."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """Return an example of a usage."""
    details = {"cached_tokens": 0}
    total = prompt + completion
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    return counts | {"prompt_tokens_details": details}
