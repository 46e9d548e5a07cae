"""Constraints of strangers: what is wrong with each is said, and none keeps anybody waiting."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from llamaserve.engine.grammar import words
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest, Unavailable
from llamaserve.sandbox import Budget
from llamaserve.worker import grammar_check
from llamaserve.worker.grammar_check import GrammarChecker, Verdict
from llamaserve.worker.grammar_check_main import verdict


def schema(value: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(value), "response_format")


def regex(pattern: str) -> Constraint:
    return Constraint("regex", pattern, "regex")


def grammar(text: str) -> Constraint:
    return Constraint("grammar", text, "grammar")


def choice(*texts: str) -> Constraint:
    return Constraint("choice", json.dumps(texts), "guided_choice")


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
GOOD = {
    "object": schema(PERSON | {"required": ["name"], "additionalProperties": False}),
    "any value": schema({}),
    "reference": schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}),
    "format": schema({"type": "string", "format": "date-time"}),
    "regex": regex(r"[0-9]{3}-\w+"),
    "grammar": grammar('root ::= "yes" | "no"\n'),
    "choice": choice("one", 'two "quoted"', "3\n", "vier ü"),
}
BAD = {
    "unsupported keyword": (schema({"contains": {}, "uniqueItems": True}), 'Unimplemented keys: ["contains", "uniqueI'),
    "unknown type": (schema({"type": "text"}), "Invalid type: text"),
    "impossible": (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum (5) is greater than maximum (3)"),
    "pattern": (schema({"type": "string", "pattern": "("}), "regex parse error: ( error: unclosed group"),
    "missing definition": (schema({"$ref": "#/$defs/a"}), "Pointer '/$defs/a' does not exist"),
    "not JSON": (Constraint("json_schema", "{", "response_format"), "EOF while parsing"),
    "regex": (regex("a(b"), "unclosed group"),
    "nested regex": (regex("(" * 3000 + ")" * 3000), "exceed the maximum number of nested parentheses"),
    "look-ahead": (regex("(?=a)b"), "look-around, including look-ahead and look-behind, is not supported"),
    "grammar": (grammar('root = "yes"'), "line 1"),
    "undefined rule": (grammar("root ::= other\n"), "other"),
}
BOMB = schema({"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b.*"} for n in range(30)]})


@pytest.mark.parametrize("constraint", GOOD.values(), ids=GOOD)
def test_good_constraints(constraint: Constraint) -> None:
    assert verdict(constraint) == Verdict()


@pytest.mark.parametrize(("constraint", "reason"), BAD.values(), ids=BAD)
def test_bad_constraints_and_why(constraint: Constraint, reason: str) -> None:
    found = verdict(constraint).fault
    assert found is not None
    assert reason in found
    assert "\n" not in found
    assert len(found) < 500


async def refusal(checker: GrammarChecker, constraint: Constraint) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(constraint)
    assert caught.value.param == constraint.param
    return caught.value.message


def test_a_process_says_what_this_one_says() -> None:
    async def scenario() -> None:
        async with GrammarChecker(size=1) as checker:
            await checker.warm()
            first = checker.pids
            for constraint in GOOD.values():
                await checker.check(constraint)
            for constraint, _ in BAD.values():
                assert await refusal(checker, constraint) == f"{constraint.param}: {verdict(constraint).fault}"
            assert checker.pids == first

    asyncio.run(scenario())


WORDS = {
    "one line": ("at 1(8):\n  unknown\tname", "at 1(8): unknown name"),
    "excerpt": ('unknown name: "a"\n   1 | start: a\n              ^\n  22 | b: "x"\n', 'unknown name: "a"'),
    "carets": (
        "regex parse error:\n    a{5,3}\n     ^^^^^\nerror: invalid",
        "regex parse error: a{5,3} error: invalid",
    ),
    "mark": ("no extension\n<non-verbose/>", "no extension"),
    "panic": ("panic: called `Option::unwrap()` on a `None` value\n   0: backtrace", "it is too complex"),
    "panic in a pattern": ("regex parse error: panic: (", "regex parse error: panic: ("),
    "long": ("a" * 1000 + "z" * 200, "a" * 200 + " … " + "z" * 200),
}


@pytest.mark.parametrize(("message", "expected"), WORDS.values(), ids=WORDS)
def test_words(message: str, expected: str) -> None:
    assert words(message) == expected


def test_a_schema_that_takes_minutes_is_given_up_and_the_next_is_checked() -> None:
    assert len(BOMB.text) < 2000

    async def scenario() -> None:
        async with GrammarChecker(size=1) as checker:
            await checker.warm()
            first = checker.pids
            started = time.monotonic()
            assert await refusal(checker, BOMB) == "response_format took longer than 0.8 s to compile"
            assert time.monotonic() - started < 5  # of which the machine may use the most for other things
            assert not checker.pids
            await checker.check(GOOD["object"])
            assert not checker.pids & first

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not keep to a limit of the address space")
def test_a_regex_that_needs_too_much_memory() -> None:
    async def scenario() -> None:
        async with GrammarChecker(size=1, time_limit=60) as checker:
            reason = await refusal(checker, regex(r"[^\w]" * 50_000))
            assert reason == "regex needed more than 1024 MB of memory to compile"
            await checker.check(GOOD["object"])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (signal.SIGSEGV, "grammar crashed the process that compiled it (signal 11)"),
        (signal.SIGKILL, "grammar needed more than 1024 MB of memory to compile"),
    ],
)
def test_a_process_that_dies_fails_only_its_constraint(ending: signal.Signals, reason: str) -> None:
    async def scenario() -> None:
        async with GrammarChecker(size=1) as checker:
            await checker.warm()
            (pid,) = checker.pids
            task = asyncio.create_task(refusal(checker, Constraint("json_schema", BOMB.text, "grammar")))
            await asyncio.sleep(0)  # sends the job
            os.kill(pid, ending)
            assert await task == reason
            await checker.check(GOOD["object"])

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="what an allocator gives back differs")
def test_a_process_that_keeps_much_memory_is_ended() -> None:
    big = regex(r"\w" * 60_000)

    async def scenario() -> None:
        async with GrammarChecker(size=1, time_limit=20) as checker:
            await checker.check(GOOD["object"])
            assert checker.pids
            await checker.check(big)
            assert not checker.pids

    asyncio.run(scenario())


def test_a_slow_check_does_not_delay_another() -> None:
    async def scenario() -> None:
        async with GrammarChecker() as checker:
            await asyncio.gather(checker.warm(), checker.warm())
            slow = asyncio.create_task(refusal(checker, BOMB))
            for constraint in GOOD.values():
                await checker.check(constraint)
            assert not slow.done()
            await slow

    asyncio.run(scenario())


def test_many_at_once_share_the_processes() -> None:
    async def scenario() -> None:
        async with GrammarChecker() as checker:
            checks = (checker.check(regex(f"a{{{n}}}")) for n in range(40))
            await asyncio.gather(*checks, refusal(checker, regex("(")))
            assert len(checker.pids) == 2

    asyncio.run(scenario())


class Counting(GrammarChecker):
    """Counts what goes to a process."""

    asked = 0

    async def ask(self, payload: bytes, budget: Budget | None = None) -> bytes:
        self.asked += 1
        return await super().ask(payload, budget)


def test_what_was_checked_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "REMEMBERED", 2)
    one, two, three = (regex(text) for text in "123")

    async def asked(checker: Counting, constraint: Constraint) -> bool:
        before = checker.asked
        await checker.check(constraint)
        return checker.asked > before

    async def scenario() -> None:
        async with Counting(size=1) as checker:
            assert [await asked(checker, each) for each in (one, two, one, three)] == [True, True, False, True]
            assert [await asked(checker, each) for each in (one, three, two)] == [False, False, True]
            assert not await asked(checker, Constraint("regex", "3", "structured_outputs"))
            assert await asked(checker, Constraint("json_schema", "{}", "json_schema"))
            assert await asked(checker, Constraint("grammar", 'root ::= "{}"', "grammar"))
            before = checker.asked
            for _ in range(2):
                await refusal(checker, regex("("))
            assert checker.asked == before + 1

    asyncio.run(scenario())


def tool(number: int, **more: Any) -> Constraint:
    properties = {"path": {"type": "string", "description": "Where it is. " * 20}, f"option{number}": {"enum": [1, 2]}}
    value = {"type": "object", "properties": properties, "required": ["path"], **more}
    return Constraint("json_schema", json.dumps(value), f"tools[{number}].function.parameters")


def call_of(*parts: Constraint, markers: tuple[str, ...] = ("<tool_call>", "</tool_call>")) -> Constraint:
    calls = " | ".join(f'"f{number}(" part{number} ")"' for number in range(len(parts)))
    return Constraint("lark", f"start: TEXT | until0 ({calls}) marker1", "tools", markers, parts)


def test_parts_are_checked_first_and_each_once() -> None:
    async def scenario() -> None:
        async with Counting(size=1) as checker:
            await checker.check(call_of(tool(0), tool(1)))
            assert checker.asked == 3
            await checker.check(call_of(tool(1), tool(0), tool(2)))
            assert checker.asked == 5
            await checker.check(call_of(tool(0), tool(1)))
            assert checker.asked == 5
            await checker.check(call_of(tool(0), tool(1), markers=("<call>", "</call>")))
            assert checker.asked == 6

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (tool(1, type="text"), "tools[1].function.parameters: Invalid type: text"),
        (Constraint("json_schema", BOMB.text, "tools[1]"), "tools[1] took longer than 0.8 s to compile"),
        (Constraint("grammar", "root ::= missing", "tools[1].custom"), "tools[1].custom: "),
    ],
)
def test_what_is_wrong_with_a_part_is_said_of_it(part: Constraint, reason: str) -> None:
    async def scenario() -> None:
        async with GrammarChecker(size=1) as checker:
            with pytest.raises(InvalidRequest) as caught:
                await checker.check(call_of(tool(0), part, tool(2, type="text")))
            assert caught.value.param == part.param
            assert caught.value.message.startswith(reason)
            assert await refusal(checker, call_of(tool(0), markers=("", ""))) == (
                "tools: there must be at most 32 markers, all different"
            )
            assert "grammar size" in await refusal(checker, call_of(*[big_tool(number) for number in range(40)]))

    asyncio.run(scenario())


def big_tool(number: int) -> Constraint:
    return tool(number, properties={f"option{index}": {"enum": [1, 2]} for index in range(400)}, required=[])


def test_an_agents_many_tools_take_no_time() -> None:
    constraint = call_of(*map(tool, range(60)))

    async def scenario() -> None:
        async with GrammarChecker(size=1) as checker:
            await checker.warm()
            started = time.monotonic()
            await checker.check(constraint)
            assert time.monotonic() - started < 2
            started = time.monotonic()
            await checker.check(constraint)
            assert time.monotonic() - started < 0.1

    asyncio.run(scenario())


def test_what_a_schema_has_that_can_not_be_enforced_is_left_out() -> None:
    strict = tool(1)
    beyond = tool(1, properties={"a": {"not": {}}, "b": {"uniqueItems": True}, "c": {"not": {}}}, required=[])
    lenient = Constraint("json_schema", beyond.text, beyond.param, lenient=True)

    async def scenario() -> None:
        async with Counting(size=1) as checker:
            assert await checker.relaxed(strict) == (strict, None)
            for _ in range(2):
                found, words = await checker.relaxed(beyond)
                assert found == lenient
                assert words == 'Unimplemented keys: ["not"] (2 times); Unimplemented keys: ["uniqueItems"]'
            assert checker.asked == 3
            assert await checker.relaxed(lenient) == (lenient, words)
            await checker.check(call_of(strict, lenient))
            assert await checker.relaxed(regex("a")) == (regex("a"), None)
            assert await refusal(checker, beyond) == 'tools[1].function.parameters: Unimplemented keys: ["not"]'
            for wrong in (tool(1, type="text"), schema(False), regex("("), BOMB):
                with pytest.raises(InvalidRequest) as caught:
                    await checker.relaxed(wrong)
                assert caught.value.param == wrong.param

    asyncio.run(scenario())


def test_checks_that_run_or_wait_when_it_closes_fail_as_unavailable() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(size=1)
        await checker.warm()
        running = asyncio.create_task(checker.check(BOMB))
        waiting = asyncio.create_task(checker.check(GOOD["object"]))
        await asyncio.sleep(0)  # sends the first; the second waits for the process
        await checker.aclose()
        assert not checker.pids
        for task in (running, waiting, asyncio.create_task(checker.check(GOOD["object"]))):
            with pytest.raises(Unavailable, match="the grammar checker is shut down"):
                await task

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("grammar_check", ["llguidance", "llama_cpp", "numpy"]),
        ("grammar_check_main", ["llama_cpp", "numpy"]),
    ],
)
def test_neither_side_loads_what_it_has_no_use_for(module: str, absent: list[str]) -> None:
    check = f"import sys, llamaserve.worker.{module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
