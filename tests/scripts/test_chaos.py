"""The program that has things go wrong finds what is wrong, and only that; and a short run of it finds nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chaos
import psutil
import pytest
from faults import mischief, server as server_module
from faults.answers import Answer, Failure, StreamReader, Usage, documented, problem_with, read_body
from faults.calendar import NOTHING, Calendar, Excuses
from faults.journal import Entry, Journal
from faults.mischief import ACTS, Dice, kill_model, lock_state_folder, restart
from faults.questions import Question, questions
from faults.recording import speech
from faults.rows import Row, check_rows, check_sums, read_rows
from faults.server import BUG, Server, Weights
from faults.vitals import API, MODEL, RENDERER, Lives, Process, Vitals, files_in, superfluous, unborn
from usage_records import made

from llamaserve.usage.database import Database

SCRIPT = Path(chaos.__file__)
QUESTION = Question("m/chat/0", "chat", "/v1/chat/completions", {"model": "m"})
RIGHT = Answer(200, {0: "The sun is warm."}, {0: "stop"}, usage=Usage(9, 5, 0), complete=True)
CRASH = Excuses(frozenset({"engine_crashed"}))
DOWN = Excuses(down=True)
ENDING = Excuses(ending=True)
TWO = Answer(200, {0: "The sun", 1: "The moon"}, {0: "length", 1: "length"}, usage=Usage(9, 4, 0), complete=True)


def right(**changes: Any) -> Answer:
    return replace(RIGHT, **changes)


def failed(status: int, code: str | None, *, streamed: bool = False) -> Answer:
    return Answer(200 if streamed else status, failure=Failure(status, code, "why"), complete=True)


@pytest.mark.parametrize(
    ("answer", "excuses"),
    [
        (right(), NOTHING),
        (right(usage=Usage(9, 5, 8)), NOTHING),  # more was cached than the first time
        (failed(503, "engine_crashed"), CRASH),
        (failed(200, "engine_crashed", streamed=True), CRASH),
        (Answer(broken="RemoteProtocolError"), DOWN),
        (Answer(200, {0: "The"}), DOWN),
        (Answer(broken="ConnectError"), ENDING),
        (right(texts={0: "The sun"}, usage=Usage(9, 2, 0)), ENDING),
        (right(texts={}, usage=Usage(9, 0, 0)), ENDING),
    ],
)
def test_what_is_right_or_explained_is_no_problem(answer: Answer, excuses: Excuses) -> None:
    assert problem_with(answer, RIGHT, excuses) is None


@pytest.mark.parametrize(
    ("answer", "excuses", "problem"),
    [
        (right(texts={0: "The sun is hot."}), NOTHING, "its text is .*hot.*, not .*warm"),
        (right(texts={0: "The sun is hot."}), ENDING, "its text is"),  # a cut answer is a beginning, not another one
        (right(texts={0: "The sun"}), NOTHING, "its text is"),
        (right(texts={0: "The sun"}, reasons={0: "length"}), ENDING, "its text is"),
        (right(texts={0: "The sun"}, reasons={}), ENDING, "its text is"),
        (right(texts={**RIGHT.texts, 1: "More"}), ENDING, "its text is"),
        (Answer(200, {0: "The"}), ENDING, "ended without"),
        (Answer(200, {0: "The"}, broken="ReadError"), ENDING, "after its answer had begun: ReadError"),
        (right(reasons={0: "length"}), NOTHING, "its text is"),
        (right(usage=Usage(9, 6, 0)), NOTHING, "its usage is"),
        (right(usage=Usage(9, 5, 10)), NOTHING, "which can't be"),
        (right(usage=None), NOTHING, "its usage is None"),
        (right(tokens=[1]), NOTHING, r"its tokens are \[1\]"),
        (right(vectors=[[1.0]]), NOTHING, "it has 1 vectors, not 0"),
        (right(complete=False), NOTHING, "ended without"),
        (Answer(late=True), DOWN, "not answered within the limit"),
        (Answer(broken="ReadError"), CRASH, "broke while the server lived: ReadError"),
        (failed(503, "engine_crashed"), NOTHING, "no fault explains that: 503 engine_crashed"),
        (failed(200, "engine_crashed", streamed=True), DOWN, "no fault explains that"),
        (failed(500, "internal_error"), CRASH, "not documented: 500 internal_error"),
        (failed(500, "engine_crashed"), CRASH, "not documented"),  # that code has another status
        (failed(502, ""), NOTHING, "not documented"),
        (failed(400, None), CRASH, "no fault explains that"),
    ],
)
def test_what_is_wrong_is_told(answer: Answer, excuses: Excuses, problem: str) -> None:
    found = problem_with(answer, RIGHT, excuses)
    assert found is not None
    assert re.search(problem, found), found


def test_vectors_are_compared_by_their_direction() -> None:
    reference = Answer(200, vectors=[[3.0, 4.0]], complete=True)
    assert problem_with(Answer(200, vectors=[[3.0, 4.0001]], complete=True), reference, NOTHING) is None
    found = problem_with(Answer(200, vectors=[[4.0, 3.0]], complete=True), reference, NOTHING)
    assert found is not None
    assert "similarity=0.96" in found


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (TWO, True),
        (replace(TWO, texts={0: "The", 1: "The moon"}, reasons={0: "stop", 1: "length"}), True),
        (replace(TWO, texts={0: "The"}, reasons={0: "stop", 1: "stop"}), True),
        (replace(TWO, texts={0: "The"}, reasons={0: "stop"}), False),  # nothing was told of the second
    ],
)
def test_a_cut_answer_has_an_end_for_each_choice(answer: Answer, good: bool) -> None:
    assert (problem_with(answer, TWO, ENDING) is None) == good


ODD_AND_RIGHT = [right(), failed(400, "whatever"), failed(429, "queue_full"), failed(507, "insufficient_memory")]
ODD_AND_WRONG = [
    *(failed(500, "internal_error"), failed(500, None), failed(503, "engine_crashed"), failed(503, "unavailable")),
    *(failed(429, "rate_limit_exceeded"), failed(400, ""), Answer(broken="ReadError"), Answer(late=True)),
]


def test_of_an_odd_body_any_answer_is_right_that_blames_the_client_or_nobody() -> None:
    for answer in ODD_AND_RIGHT:
        assert problem_with(answer, None, NOTHING) is None, answer
    for answer in ODD_AND_WRONG:
        assert problem_with(answer, None, NOTHING) is not None, answer
    assert problem_with(failed(503, "engine_crashed"), None, CRASH) is None


def test_a_kind_of_error_is_excused_only_where_a_grammar_was_asked_for() -> None:
    form = Question("m/schema", "chat", "/v1/chat/completions", {"model": "m"}, constrained=True)
    journal = Journal("run", Calendar(), {QUESTION.name: RIGHT, form.name: RIGHT})
    with journal.calendar.at_work("helper killed", Excuses(frozenset({None}))):
        ask(journal, failed(400, None), form)
        assert not journal.failed
        ask(journal, failed(400, None))
    assert journal.failed


def test_other_answers_are_read() -> None:
    results = [{"index": 1, "relevance_score": 0.7}, {"index": 0, "relevance_score": 0.2}]
    found = read_body(Question("r", "rerank", "/v1/rerank", {}), 200, json.dumps({"results": results}).encode())
    assert found.vectors == [[0.2, 0.7]]
    results = [{"flagged": True, "category_scores": {"hate": 0.9, "violence": 0.1}}]
    found = read_body(
        Question("m", "moderation", "/v1/moderations", {}), 200, json.dumps({"results": results}).encode()
    )
    assert (found.vectors, found.texts) == ([[0.9, 0.1]], {0: "True"})
    body = {"text": "Ask not.", "usage": {"type": "duration", "seconds": 4}}
    found = read_body(Question("t", "transcription", "/v1/audio/transcriptions", {}), 200, json.dumps(body).encode())
    assert (found.texts, found.usage) == ({0: "Ask not."}, None)


def test_a_bug_is_not_documented() -> None:
    assert (500, "internal_error") not in documented()
    assert {(503, "engine_crashed"), (429, "queue_full"), (504, "time_limit_exceeded")} <= documented()


def test_a_stream_is_put_together() -> None:
    answer = Answer(200)
    reader = StreamReader(answer)
    for delta in ({"role": "assistant"}, {"content": "The sun"}, {"content": " is warm."}):
        reader.line("data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
    reader.line(": 2 before you")
    reader.line("data: " + json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}}
    reader.line("data: " + json.dumps({"choices": [], "usage": usage}))
    assert not answer.answered
    reader.line("data: [DONE]")
    assert answer == RIGHT


def test_an_error_within_a_stream_is_its_answer() -> None:
    answer = Answer(200)
    error = {"message": "gone", "type": "server_error", "param": None, "code": "engine_crashed"}
    StreamReader(answer).line("data: " + json.dumps({"error": error}))
    assert answer.failure == Failure(200, "engine_crashed", "gone")


def test_an_error_must_have_openais_shape() -> None:
    answer = read_body(QUESTION, 503, b'{"detail": "no"}')
    assert "not documented" in str(problem_with(answer, RIGHT, CRASH))
    assert "no JSON" in str(problem_with(read_body(QUESTION, 500, b"<h1>Oops</h1>"), RIGHT, CRASH))


def test_codes_excuse_until_all_is_settled_and_the_rest_while_it_lasts() -> None:
    calendar = Calendar()
    assert NOTHING.away is False
    assert (DOWN.away, ENDING.away) == (True, True)
    with calendar.at_work("kill", Excuses(frozenset({"engine_crashed"}), down=True)):
        began = _now()
    after = _now()
    assert calendar.excuses(began, began) == Excuses(frozenset({"engine_crashed"}), down=True)
    assert calendar.excuses(after, after) == Excuses(frozenset({"engine_crashed"}))
    assert calendar.at_work_between(after, after) == ["kill"]
    calendar.settled()
    later = _now()
    assert calendar.excuses(later, later) == NOTHING
    assert calendar.excuses(began, later).down  # a request that was already there
    assert calendar.counts == {"kill": 1}


def _now() -> float:
    time.sleep(0.001)
    return time.monotonic()


@pytest.fixture
def journal() -> Journal:
    return Journal("run", Calendar(), {QUESTION.name: RIGHT})


def ask(journal: Journal, answer: Answer, question: Question = QUESTION) -> Entry:
    entry = journal.begin(question, "ann")
    journal.end(entry, answer)
    return entry


def row(entry: Entry, **changes: Any) -> Row:
    usual = Row(entry.id, "ann", QUESTION.path, "m", 9, 0, 5, 0, 200, "answered")
    return replace(usual, **changes)


def told(journal: Journal) -> list[str]:
    return [violation.what for violation in journal.violations]


def test_a_journal_judges_answers_and_tells_what_was_at_work(journal: Journal) -> None:
    ask(journal, right())
    assert not journal.failed
    with journal.calendar.at_work("disk full"):
        ask(journal, right(texts={0: "No"}))
    assert journal.failed
    assert "disk full" in journal.violations[0].evidence
    assert journal.outcomes == {"answered": 2, "violations": 1}


def test_a_client_that_left_is_not_judged(journal: Journal) -> None:
    entry = journal.begin(QUESTION, "ann")
    entry.left = True
    journal.end(entry, Answer())
    assert not journal.failed
    check_rows(journal, [])
    check_rows(journal, [row(entry, outcome="cancelled", status=499, completion_tokens=1)])
    assert not journal.failed


def test_rows_that_are_as_clients_saw_it(journal: Journal) -> None:
    rows = [row(ask(journal, right())), row(ask(journal, right(usage=Usage(9, 5, 8))), cached_tokens=8)]
    with journal.calendar.at_work("kill", CRASH):
        rows.append(row(ask(journal, failed(503, "engine_crashed")), outcome="failed", status=503))
        ask(journal, failed(503, "engine_crashed"))  # what was not answered need not have a row
    check_rows(journal, [*rows, Row("of-another-run-1", None, "/", None, 0, 0, 0, 0, 200, "answered")])
    assert not journal.failed


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (lambda entry: [], "an answered request has no row"),
        (lambda entry: [row(entry), row(entry)], "a request has 2 rows"),
        (lambda entry: [row(entry, outcome="cancelled")], "outcome of an answered request is 'cancelled'"),
        (lambda entry: [row(entry, key="bob")], "key of an answered request is 'bob', not 'ann'"),
        (lambda entry: [row(entry, model="n")], "model of an answered request"),
        (lambda entry: [row(entry, prompt_tokens=8)], "prompt_tokens of an answered request is 8, not 9"),
        (lambda entry: [row(entry, cached_tokens=1)], "cached_tokens of an answered request is 1, not 0"),
        (lambda entry: [row(entry, completion_tokens=4)], "completion_tokens of an answered request is 4, not 5"),
        (lambda entry: [row(entry, streamed=1)], "streamed of an answered request"),
        (lambda entry: [row(entry), row(replace(entry, id="run-77"))], "a row is of a request that nobody has sent"),
    ],
)
def test_rows_that_are_wrong_are_told(journal: Journal, rows: Callable[[Entry], list[Row]], what: str) -> None:
    check_rows(journal, rows(ask(journal, right())))
    assert len(journal.violations) == 1
    assert journal.violations[0].what.startswith(what)


def test_a_row_of_a_failure_must_say_so(journal: Journal) -> None:
    with journal.calendar.at_work("kill", CRASH):
        entry = ask(journal, failed(503, "engine_crashed"))
    check_rows(journal, [row(entry, outcome="answered")])
    assert told(journal) == ["a request that was told 503 engine_crashed is answered, not failed"]


def billing(**changes: int) -> dict[str, Any]:
    unanswered = {"outcome": "failed", "requests": 1, "prompt_tokens": 9, "cached_tokens": 0, "completion_tokens": 0}
    sums = {"requests": 2, "prompt_tokens": 18, "cached_tokens": 8, "completion_tokens": 10}
    return {**sums, **changes, "unanswered": [unanswered]}


@pytest.mark.parametrize("part", ["", "requests", "prompt_tokens", "cached_tokens", "completion_tokens"])
def test_sums_are_those_of_the_rows(journal: Journal, part: str) -> None:
    entry = ask(journal, right())
    rows = [row(entry), row(entry, cached_tokens=8), row(entry, outcome="failed", completion_tokens=0)]
    check_sums(journal, rows, billing(**({part: 7} if part else {})))
    assert [what.split(", and")[0] for what in told(journal)] == (
        [f"billing says 7 {part} of answered requests"] if part else []
    )


def test_rows_are_read_from_a_real_ledger(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    with Database(path) as database:
        database.insert([made(request_id="run-0", key="ann", model="m")])
    assert read_rows(path) == [Row("run-0", "ann", "/v1/chat/completions", "m", 20, 5, 7, 1, 200, "answered")]


def vitals(*processes: Process, **models: Process) -> Vitals:
    return Vitals([Process(1, API, 90.0, 20), *processes, *models.values()], models)


TALK = Process(2, MODEL, 270.0, 9)
SPARE = Process(3, MODEL, 30.0, 9)
RENDERERS = [Process(number, RENDERER, 20.0, 5) for number in range(4, 9)]


@pytest.mark.parametrize(
    ("now", "what"),
    [
        (vitals(SPARE, *RENDERERS[:4], talk=TALK), None),
        (vitals(SPARE, Process(9, MODEL, 30.0, 9), talk=TALK), r"3 processes \(model\), and should be 2 at most: "),
        (vitals(*RENDERERS, talk=TALK), r"5 processes \(renderer\)"),
        (vitals(Process(9, "zombie", 0.0, 0), talk=TALK), r"1 processes \(zombie\), and should be 0 at most: \[9\]"),
        (vitals(Process(9, "other", 9.0, 3), talk=TALK), r"1 processes \(other\)"),
    ],
)
def test_processes_that_are_too_many_are_told(now: Vitals, what: str | None) -> None:
    found = superfluous(now)
    assert len(found) == (what is not None)
    assert what is None or re.search(what, found[0]), found


@pytest.fixture
def lives() -> Lives:
    """A process has grown in its warm-up."""
    found = Lives()
    for at, memory in ((0.0, 100.0), (60.0, 270.0)):
        found.take(vitals(SPARE, talk=replace(TALK, memory=memory)), at)
    return found


@pytest.mark.parametrize(
    ("process", "growth", "files"),
    [
        (replace(TALK, memory=299.0, files=17), [], []),
        (replace(TALK, memory=301.0), ["talk (2) takes 301 MiB, and took 270 MiB after its warm-up"], []),
        (replace(TALK, files=18), [], ["talk (2) has 18 files open, and had 9 after its warm-up"]),
        (replace(TALK, pid=7, memory=900.0, files=99), [], []),  # another one
        (replace(TALK, began=5.0, memory=900.0, files=99), [], []),  # another one with the same number
    ],
)
def test_a_process_is_compared_with_itself(lives: Lives, process: Process, growth: list[str], files: list[str]) -> None:
    now = vitals(replace(SPARE, memory=400.0), talk=process)
    assert (lives.growth(now), lives.open_files(now)) == (growth, files)


def test_a_process_may_grow_in_its_warm_up() -> None:
    lives = Lives()
    lives.take(vitals(talk=TALK), 0.0)
    assert lives.growth(vitals(talk=replace(TALK, memory=900.0))) == []


def test_a_process_is_warm_once_all_that_it_needs_once_was_asked_of_it(lives: Lives) -> None:
    talk = {each: vitals(talk=replace(TALK, memory=float(each), files=each // 10)) for each in (270, 310, 340, 341)}
    lives.warm_up(talk[270])
    assert lives.growth(talk[310]) == lives.open_files(talk[310]) == [], "that is the next reading"
    lives.take(talk[310], 90.0)
    lives.warm_up(talk[310])
    assert lives.growth(talk[340]) == []
    lives.take(talk[340], 120.0)
    assert lives.growth(talk[341]) == ["talk (2) takes 341 MiB, and took 310 MiB after its warm-up"], "it is warm once"


def test_a_process_that_has_begun_meanwhile_is_not_warm_yet(lives: Lives) -> None:
    old, new = vitals(talk=TALK), vitals(talk=replace(TALK, pid=7))
    lives.warm_up(old)
    lives.take(new, 90.0)
    assert lives.growth(vitals(talk=replace(TALK, pid=7, memory=900.0))) == []


@pytest.fixture
def forking() -> Iterator[tuple[int, int]]:
    """A process, and the one that it has forked."""
    program = "import os, time\nif child := os.fork():\n    print(child, flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as popen:
        try:
            assert popen.stdout is not None
            yield popen.pid, int(popen.stdout.readline())
        finally:
            os.killpg(popen.pid, signal.SIGKILL)


def test_a_fork_that_becomes_nothing_is_known(forking: tuple[int, int]) -> None:
    parent, child = forking
    assert unborn(parent) == [child]
    assert unborn(child) == []


@pytest.mark.parametrize("false_clock", [True, False])
def test_a_fork_that_libfaketime_holds_up_is_ended(
    forking: tuple[int, int], monkeypatch: pytest.MonkeyPatch, false_clock: bool
) -> None:
    monkeypatch.setattr(mischief, "_FORK_SECONDS", 0.1)
    parent, child = forking
    server, calendar = SimpleNamespace(leader=parent, false_clock=false_clock), Calendar()

    async def run() -> None:
        world: Any = SimpleNamespace(server=server, at_work=calendar.at_work)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(mischief._end_stuck_forks(world), 1.0)

    asyncio.run(run())
    assert (psutil.Process(child).status() == psutil.STATUS_ZOMBIE) is false_clock
    assert bool(calendar.counts[mischief._STUCK]) is false_clock


def test_a_server_can_be_killed_though_others_have_its_output_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_ENDING", 0.2)

    async def run() -> None:
        server = Server(tmp_path, Weights(tmp_path, tmp_path, None), None)
        server._process = await asyncio.create_subprocess_exec(
            *("sh", "-c", "sleep 60 & echo $!; wait"), stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert server._process.stdout is not None
        other = int(await server._process.stdout.readline())
        server._reader = asyncio.create_task(server._read(server._process))
        async with asyncio.timeout(20):
            assert await server.kill() == [other]

    asyncio.run(run())


def test_the_longest_life_of_each_kind_is_known(lives: Lives) -> None:
    lives.take(vitals(talk=replace(TALK, pid=7)), 90.0)
    longest = lives.longest()
    assert longest.keys() == {"talk", API}
    assert (longest["talk"].pid, longest["talk"].minutes, len(longest[API].readings)) == (2, 1.0, 3)


@pytest.mark.parametrize(
    "line",
    [
        "ERROR the process that ran talk was ended by SIGSEGV; the request was not finished",
        "ERROR the spare process was ended by SIGABRT (GGML_ASSERT(n > 0) failed)",
        "ERROR the process that loaded talk ended with exit code 1",
        *("Fatal Python error: Segmentation fault", "terminate called after throwing an instance of", "GGML_ASSERT(x)"),
        *("Traceback (most recent call last):", "Task exception was never retrieved", "Task was destroyed but"),
    ],
)
def test_lines_of_crashes_that_nobody_made(line: str) -> None:
    assert BUG.search(line)


def test_a_killed_process_is_no_such_line() -> None:
    assert not BUG.search("ERROR the process that ran talk was ended by SIGKILL; the request was not finished")


def test_each_act_has_its_faults_once_first(tmp_path: Path) -> None:
    server = Server(tmp_path, Weights(tmp_path, tmp_path, None), tmp_path)
    first = {}
    for act in ACTS:
        dice = Dice(server, random.Random(1), act)
        first[act] = [dice.next() for _ in dice.faults]
        assert len(set(first[act])) == len(dice.faults)
    assert first["ends"][0] not in first["crashes"]
    assert first["crashes"][0] not in first["wear"]
    assert {restart, kill_model} <= set(first["ends"])
    assert set(first["crashes"]) < set(first["ends"]) - {restart, lock_state_folder}
    assert set(first["wear"]) < set(first["crashes"]) - {kill_model}


def test_what_happens_after_an_interruption_is_no_violation(journal: Journal) -> None:
    journal.over = True
    ask(journal, right(texts={0: "No"}))
    assert not journal.failed


def test_it_is_known_whether_somebody_was_answered(journal: Journal) -> None:
    before = _now()
    assert not journal.answered_since(before)
    ask(journal, right())
    ask(journal, failed(503, "engine_crashed"))
    assert journal.answered_since(before)
    assert not journal.answered_since(_now())


def test_files_are_found_however_deep(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert files_in(tmp_path) == []
    (tmp_path / "a" / "b" / "c").touch()
    assert files_in(tmp_path) == ["a/b/c"]


def test_questions_have_names_of_their_own_and_are_greedy() -> None:
    found = questions(b"")
    assert len({question.name for question in found}) == len(found)
    assert all(question.body["temperature"] == 0 for question in found if question.can_stream)
    assert len(questions(None)) == len(found) - 1


def test_the_speech_is_a_short_file() -> None:
    pytest.importorskip("av")
    with wave.open(io.BytesIO(speech())) as found:
        assert (found.getframerate(), found.getnframes()) == (16_000, 64_000)


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--clients", "0"]])
def test_a_run_of_nothing_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="must be more than nothing"):
        chaos.plan(chaos.arguments().parse_args(words))


def test_a_seed_decides_the_course() -> None:
    plan = chaos.plan(chaos.arguments().parse_args(["--seed", "7", "--minutes", "60"]))
    assert (plan.seed, plan.seconds) == (7, 3600.0)


@pytest.mark.timeout(900)
def test_a_short_run_finds_nothing_wrong(starter_model: Path, embedding_model: Path, tmp_path: Path) -> None:
    """The fixtures have the weights where the program finds them."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--short", "--seed", "20", "--out", str(report), "--log", str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = json.loads(report.read_text())
    assert found["passed"]
    assert found["rounds"] >= 6
    assert found["longest_lives"]["small"]["readings"][2:]
    assert found["longest_lives"][API]["warmed"]
    assert found["requests"]["answered"] > 100
    assert sum(found["faults"].values()) > 10
    assert len(found["memory"]) == found["rounds"]


def test_a_run_that_is_interrupted_tells_what_it_has_found(
    starter_model: Path, embedding_model: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--short", "--out", str(report), "--log", str(tmp_path / "log")],
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr is not None
        said = run.stderr.readline()
        time.sleep(5)
        run.send_signal(signal.SIGTERM)
        said += run.stderr.read()
    assert run.returncode == 130, said
    assert "verdict    no violation, and the run was interrupted" in said
    assert json.loads(report.read_text())["violations"] == []
