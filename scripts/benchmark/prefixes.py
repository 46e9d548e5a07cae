"""Workloads in which prompts begin alike: a shared system prompt, a prompt evaluated before, a conversation."""

from __future__ import annotations

from contextlib import ExitStack

from benchmark import texts
from benchmark.answers import Answer, Request, decode_rate, rate, seconds
from benchmark.contenders import HttpServer
from benchmark.lab import OURS, PLAIN, PLAIN_SETTINGS, Lab, NotPossible
from benchmark.processes import StartFailed
from benchmark.results import Results, Row, at_most
from benchmark.throughput import STREAMS

UNSHARED = "llamaserve, sharing off"
SYSTEM_PROMPT = 1500  # tokens
_CELLS = 16384  # of the cache, so that eight prompts also fit where each has its own copy
_ANSWER = 48  # tokens
_TURNS = 6


def run_shared(lab: Lab) -> None:
    """Eight clients with one system prompt and a question each, then one of them once more, which is all cached."""
    ends = lab.ends()
    with ExitStack() as stack:
        for number, order in lab.rounds(_shared_contenders(lab, stack)):
            system = texts.manual(f"shared/{number}", SYSTEM_PROMPT, lab.count)
            questions = texts.questions(f"shared/{number}", STREAMS)
            requests = [_chat(system, question, ends) for question in questions]
            for server in order:
                answers = lab.ask("shared", server, requests)
                lab.results.add("shared", server.name, "seconds", seconds(answers))
                lab.results.add("shared", server.name, "rate", rate(answers))
                lab.results.add("shared", server.name, "cached", sum(answer.cached_tokens for answer in answers))
                if server.name != UNSHARED:
                    (again,) = lab.ask("shared", server, requests[-1:])
                    _note_cached(lab.results, server.name, again)


def _shared_contenders(lab: Lab, stack: ExitStack) -> list[HttpServer]:
    if lab.plan.url is not None:
        return [lab.ours()]
    found = [stack.enter_context(lab.server(OURS, kv_cells=_CELLS))]
    for name, changes in ((UNSHARED, {"prefix_cache": False}), (PLAIN, PLAIN_SETTINGS)):
        try:
            found.append(stack.enter_context(lab.server(name, kv_cells=_CELLS, **changes)))
        except (NotPossible, StartFailed) as error:
            lab.results.missing[f"shared/{name}"] = str(error)
    return found


def _chat(system: str, question: str, ends: tuple[int, ...]) -> Request:
    messages = ({"role": "system", "content": system}, {"role": "user", "content": question})
    return Request(_ANSWER, messages=messages, banned=ends)


def _note_cached(results: Results, name: str, answer: Answer) -> None:
    results.add("shared", name, "cached_first", answer.first)
    results.add("shared", name, "cached_steps", answer.first * decode_rate([answer]))
    results.add("shared", name, "cached_share", answer.cached_tokens / max(1, answer.prompt_tokens))


def run_conversation(lab: Lab) -> None:
    """A chat in which each turn sends everything that was said before."""
    ends = lab.ends()
    for number, order in lab.rounds(lab.present(lab.ours, lab.plain)):
        for server in order:
            messages: list[dict[str, str]] = []
            answers: list[Answer] = []
            for said in texts.conversation(f"conversation/{number}", _TURNS):
                messages.append({"role": "user", "content": said})
                request = Request(_ANSWER, messages=tuple(messages), banned=ends)
                (answer,) = lab.ask("conversation", server, [request])
                messages.append({"role": "assistant", "content": answer.text})
                answers.append(answer)
            _note_conversation(lab.results, server.name, answers)


def _note_conversation(results: Results, name: str, answers: list[Answer]) -> None:
    spent = sum(answer.ended - answer.started for answer in answers)
    results.add("conversation", name, "rate", sum(answer.tokens for answer in answers) / spent)
    results.add("conversation", name, "first_turn", answers[0].first)
    results.add("conversation", name, "last_turn", answers[-1].first)
    results.add("conversation", name, "new", answers[-1].prompt_tokens - answers[-1].cached_tokens)
    results.add("conversation", name, "cached_share", answers[-1].cached_tokens / max(1, answers[-1].prompt_tokens))
    turns = [[answer.first, answer.prompt_tokens, answer.cached_tokens] for answer in answers]
    results.add_detail("conversation", {"contender": name, "first_prompt_cached": turns})


def shared_rows(results: Results) -> list[Row]:
    """A shared system prompt, and a prompt that is all cached."""
    return [
        results.row(("shared", OURS, "seconds"), "shared system prompt, 8 clients: all answers", "s"),
        results.row(("shared", UNSHARED, "seconds"), "shared system prompt, 8 clients: without sharing", "s"),
        results.ratio(
            ("shared", OURS, "seconds"),
            ("shared", UNSHARED, "seconds"),
            "shared system prompt, 8 clients: with / without sharing",
            target=at_most(0.30),
        ),
        results.row(("shared", OURS, "cached_first"), f"cached prompt of {SYSTEM_PROMPT} tokens: first token", "s"),
        results.row(
            ("shared", OURS, "cached_steps"),
            f"cached prompt of {SYSTEM_PROMPT} tokens: first token",
            "decode steps",
            target=at_most(3),
        ),
        results.row(("shared", OURS, "cached_share"), "cached prompt: share reported as cached", "x"),
    ]


def conversation_rows(results: Results) -> list[Row]:
    """A growing conversation."""
    return [
        results.row(("conversation", OURS, "first_turn"), "conversation, turn 1: first token", "s"),
        results.row(("conversation", OURS, "last_turn"), f"conversation, turn {_TURNS}: first token", "s"),
        results.row(("conversation", OURS, "new"), f"conversation, turn {_TURNS}: tokens evaluated anew", "tokens"),
        results.row(("conversation", OURS, "cached_share"), f"conversation, turn {_TURNS}: share cached", "x"),
    ]
