"""``GET /v1/billing/usage``: what requests have used, out of the ledger; and the two endpoints of OpenAI's former
dashboard that programs poll to show what is left.

With an ordinary key, it is that key's own requests. Nothing here costs money, so amounts of it are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query

from llamaserve.api.caller import caller
from llamaserve.api.services import Services, UsesServices
from llamaserve.errors import AdminKeyRequired, InvalidRequest
from llamaserve.usage.period import parse_moment, parse_period
from llamaserve.usage.totals import ALL, GROUPS, NUMBERS, AllKeys, Group, Total, added, answered, by_outcome, totals

router = APIRouter(tags=["billing"])

_UNLIMITED: Final = 100_000_000  # dollars; programs want a number
_FOR_EVER: Final = 32503680000  # the year 3000, in Unix seconds
_LONGEST: Final = 64  # characters of a date
_NOT_BY_OUTCOME: Final = tuple(group for group in GROUPS if group != "outcome")

Date = Annotated[str | None, Query(max_length=_LONGEST, description="A date, a date-time or Unix seconds, in UTC.")]
GroupBy = Annotated[
    str | None, Query(max_length=_LONGEST, description="One or several of day, model, key, endpoint: `day,model`.")
]
KeyName = Annotated[str | None, Query(max_length=_LONGEST, description="Only requests with the key of this name.")]


@router.get("/v1/billing/usage", summary="What have requests used?")
def billing_usage(
    services: UsesServices,
    start_date: Date = None,
    end_date: Date = None,
    group_by: GroupBy = None,
    key: KeyName = None,
) -> dict[str, Any]:
    """Return the sums of a period, its last day included; of everything if none is given. ``total_usage`` is the number
    of tokens of all requests that were answered, which is the sum of the ``usage`` objects in the answers.
    """
    groups = _groups(group_by)
    start, end = _period(start_date, end_date)
    whose = _whose(key)
    found = _totals(services, start, end, whose, [*groups, "outcome"])  # in one look, since requests go on
    rows = answered(found)
    answer = {
        "object": "billing.usage",
        "total_usage": added(rows).total_tokens,
        "start_date": _shown(start),
        "end_date": _shown(end),
        **_numbers(added(rows)),
        "unanswered": [
            {"outcome": total.outcome, **_numbers(total)} for total in by_outcome(found) if total.outcome != "answered"
        ],
        "recorded": services.books.ledger is not None,
    }
    if groups:
        answer["group_by"] = groups
        answer["data"] = [_row(groups, total) for total in rows]
    return answer


@router.get("/v1/dashboard/billing/usage", summary="What have requests cost? Nothing")
def dashboard_usage(services: UsesServices, start_date: Date = None, end_date: Date = None) -> dict[str, Any]:
    """Return the costs of each day and model in cents, as OpenAI's former dashboard had them. They are 0, and beside
    them is the number of tokens.
    """
    start, end = _period(start_date, end_date)
    days: dict[str, list[dict[str, Any]]] = {}
    found = _totals(services, start, end, _whose(None), ["day", "model"])
    for total in found:
        item = {"name": total.model or "none", "cost": 0.0, "tokens": total.total_tokens, "requests": total.requests}
        days.setdefault(str(total.day), []).append(item)
    return {
        "object": "list",
        "daily_costs": [{"timestamp": _timestamp(day), "line_items": items} for day, items in days.items()],
        "total_usage": 0.0,
        "total_tokens": sum(total.total_tokens for total in found),
    }


@router.get("/v1/dashboard/billing/subscription", summary="What is left? As much as you like")
def dashboard_subscription() -> dict[str, Any]:
    """Return a subscription without limits, as OpenAI's former dashboard had it."""
    return {
        "object": "billing_subscription",
        "has_payment_method": False,
        "canceled": False,
        "canceled_at": None,
        "delinquent": None,
        "access_until": _FOR_EVER,
        "soft_limit": _UNLIMITED,
        "hard_limit": _UNLIMITED,
        "system_hard_limit": _UNLIMITED,
        "soft_limit_usd": float(_UNLIMITED),
        "hard_limit_usd": float(_UNLIMITED),
        "system_hard_limit_usd": float(_UNLIMITED),
        "plan": {"title": "Self-hosted", "id": "self-hosted"},
        "account_name": caller().name,
    }


def _groups(given: str | None) -> list[Group]:
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    groups: list[Group] = [group for group in _NOT_BY_OUTCOME if group in names]
    if unknown := [name for name in names if name not in groups]:
        raise InvalidRequest(
            f"group_by: {unknown[0]!r} is none of {', '.join(_NOT_BY_OUTCOME)}",
            param="group_by",
        )
    return groups


def _period(start: str | None, end: str | None) -> tuple[float | None, float | None]:
    param = "start_date"
    try:
        if start is not None:
            parse_moment(start)
        param = "end_date"
        return parse_period(start, end)
    except ValueError as error:
        raise InvalidRequest(str(error), param=param) from None


def _whose(key: str | None) -> str | AllKeys | None:
    """Return whose requests are asked for. Raises ``AdminKeyRequired`` if that is nobody else's business."""
    asking = caller()
    if asking.admin:
        return ALL if key is None else key
    if key is not None and key != asking.name:
        raise AdminKeyRequired(f"an admin key shows the usage of other keys; this one is {asking.name}")
    return asking.name


def _totals(
    services: Services,
    start: float | None,
    end: float | None,
    whose: str | AllKeys | None,
    groups: Sequence[Group],
) -> list[Total]:
    if services.books.ledger is None:
        return []
    return totals(services.settings.ledger_path, start=start, end=end, key=whose, group_by=groups)


def _numbers(total: Total) -> dict[str, Any]:
    return {name: getattr(total, name) for name in NUMBERS}


def _row(groups: Sequence[Group], total: Total) -> dict[str, Any]:
    return {group: getattr(total, group) for group in groups} | _numbers(total)


def _shown(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def _timestamp(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
