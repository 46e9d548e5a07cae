"""How the answers about usage look."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import Answer, Content, Documented
from llamaserve.api.answers.generation import MODEL, Count

Seconds = Annotated[float, Meta(ge=0)]


class Figures(Answer):
    """What requests have used."""

    requests: Count
    prompt_tokens: Count
    cached_tokens: Annotated[int, Meta(ge=0, description="Those of the prompts that had been evaluated before.")]
    completion_tokens: Count
    total_tokens: Count
    audio_seconds: Seconds
    images: Count


class UnansweredFigures(Figures):
    """What requests have used that were not answered."""

    outcome: Literal["refused", "cancelled", "failed"]


class UsageGroup(Figures):
    """What the requests of one group have used."""

    day: Annotated[str, Meta(description="A date of UTC.")] | UnsetType = UNSET
    model: str | UnsetType | None = UNSET
    key: str | UnsetType | None = UNSET
    endpoint: str | UnsetType = UNSET


class Usage(Figures):
    """What the answered requests of a period have used."""

    object: Literal["billing.usage"]
    total_usage: Annotated[int, Meta(ge=0, description="Tokens of prompts and answers.")]
    start_date: str | None
    end_date: str | None
    unanswered: list[UnansweredFigures]
    recorded: Annotated[bool, Meta(description="Whether usage is recorded at all.")]
    group_by: list[Literal["day", "model", "key", "endpoint"]] | UnsetType = UNSET
    data: list[UsageGroup] | UnsetType = UNSET


class LineItem(Answer):
    """What a model has cost on a day: nothing."""

    name: str
    cost: Annotated[float, Meta(description="Cents.")]
    tokens: Count
    requests: Count


class DailyCosts(Answer):
    """The costs of a day, which begins at this time in Unix seconds."""

    timestamp: float
    line_items: list[LineItem]


class DashboardUsage(Answer):
    """The costs of a period, as OpenAI's former dashboard had them."""

    object: Literal["list"]
    daily_costs: list[DailyCosts]
    total_usage: Annotated[float, Meta(description="Cents.")]
    total_tokens: Count


class Plan(Answer):
    """What is subscribed to."""

    title: str
    id: str


class Subscription(Answer):
    """A subscription without limits, as OpenAI's former dashboard had it."""

    object: Literal["billing_subscription"]
    has_payment_method: bool
    canceled: bool
    canceled_at: int | None
    delinquent: bool | None
    access_until: int
    soft_limit: int
    hard_limit: int
    system_hard_limit: int
    soft_limit_usd: float
    hard_limit_usd: float
    system_hard_limit_usd: float
    plan: Plan
    account_name: str | None


_FIGURES: Final = {
    "requests": 40,
    "prompt_tokens": 4096,
    "cached_tokens": 2048,
    "completion_tokens": 1024,
    "total_tokens": 5120,
    "audio_seconds": 0.0,
    "images": 0,
}
_USAGE: Final = {
    "object": "billing.usage",
    "total_usage": 5120,
    "start_date": "2026-01-01T00:00:00Z",
    "end_date": None,
    **_FIGURES,
    "unanswered": [{"outcome": "cancelled", **_FIGURES, "requests": 1}],
    "recorded": True,
}
_GROUPED: Final = _USAGE | {
    "group_by": ["day", "model"],
    "data": [{"day": "2026-01-31", "model": MODEL, **_FIGURES}],
}
_DASHBOARD: Final = {
    "object": "list",
    "daily_costs": [
        {
            "timestamp": 1769817600.0,
            "line_items": [{"name": MODEL, "cost": 0.0, "tokens": 5120, "requests": 40}],
        }
    ],
    "total_usage": 0.0,
    "total_tokens": 5120,
}
_SUBSCRIPTION: Final = {
    "object": "billing_subscription",
    "has_payment_method": False,
    "canceled": False,
    "canceled_at": None,
    "delinquent": None,
    "access_until": 32503680000,
    **dict.fromkeys(("soft_limit", "hard_limit", "system_hard_limit"), 100_000_000),
    **dict.fromkeys(("soft_limit_usd", "hard_limit_usd", "system_hard_limit_usd"), 100_000_000.0),
    "plan": {"title": "Self-hosted", "id": "self-hosted"},
    "account_name": "laptop",
}

ROUTES: Final = {
    "GET /v1/billing/usage": Documented(
        answers=(Content(Usage, {"all": _USAGE, "by day and model": _GROUPED}),), errors=(400, 503)
    ),
    "GET /v1/dashboard/billing/usage": Documented(
        answers=(Content(DashboardUsage, {"a day": _DASHBOARD}),), errors=(400, 503)
    ),
    "GET /v1/dashboard/billing/subscription": Documented(answers=(Content(Subscription, {"one": _SUBSCRIPTION}),)),
}
