from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from fake_model import END, SAMPLING, FakeModel, FakeSampler
from hypothesis import given, strategies as st
from simulated_clock import SimulatedClock

from llamaserve import errors
from llamaserve.engine.events import Delta, Failed, Finished, Occupancy, Progress
from llamaserve.engine.params import Adapter, Generation, Sampling
from llamaserve.engine.speculation import Draft
from llamaserve.errors import ContextLengthExceeded, EngineError, InvalidRequest

_stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3).map(tuple)
_answers = st.lists(st.sampled_from([b"a", b"b", "é".encode(), b"\xc3", b"\xff"]), max_size=15).map(b"".join)


@pytest.fixture(autouse=True)
def _no_sampler_stays_open() -> Iterator[None]:
    FakeSampler.open = 0
    yield
    assert FakeSampler.open == 0


def _expected(answer: bytes, stops: tuple[str, ...]) -> str:
    text = answer.decode("utf-8", "replace")
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


def test_an_answer_that_is_not_streamed_comes_whole_with_its_counts() -> None:
    model = FakeModel({(7, 0): b"Hello"})
    model.submit(7, "abc")
    model.run()
    assert model.events == [Finished(7, 0, "Hello", "stop", 3, 5, 0)]


def test_a_streamed_answer_comes_token_by_token() -> None:
    model = FakeModel({(7, 0): b"Hi!"})
    model.submit(7, "abc", stream=True)
    model.run()
    assert model.events == [*(Delta(7, 0, text, 1) for text in "Hi!"), Finished(7, 0, "", "stop", 3, 3, 0)]


@given(_answers, _stops, st.integers(1, 20))
def test_streamed_is_the_same_as_whole(answer: bytes, stops: tuple[str, ...], max_tokens: int) -> None:
    model = FakeModel({(1, 0): answer, (2, 0): answer})
    model.submit(1, "p", stop=stops, max_tokens=max_tokens, stream=True)
    model.submit(2, "p", stop=stops, max_tokens=max_tokens)
    model.run()
    streamed, whole = model.finished(1), model.finished(2)
    assert model.text(1) == model.text(2) == whole.text == _expected(answer[:max_tokens], stops)
    assert (streamed.reason, streamed.completion_tokens) == (whole.reason, whole.completion_tokens)
    assert whole.completion_tokens <= max_tokens


def test_no_delta_is_empty() -> None:
    model = FakeModel({(1, 0): "é€😀".encode()})
    model.submit(1, "p", stream=True)
    model.run()
    assert [event.text for event in model.of(1)] == ["é", "€", "😀", ""]


def test_prompts_and_choices_have_their_own_index() -> None:
    answers = {(1, index): f"answer {index}".encode() for index in range(6)}
    model = FakeModel(answers)
    model.submit(1, "a", "bc", choices=3)
    model.run()
    assert {index: model.finished(1, index).text for index in range(6)} == {i: f"answer {i}" for i in range(6)}
    assert [model.finished(1, index).prompt_tokens for index in range(6)] == [1, 1, 1, 2, 2, 2]


def test_max_tokens_ends_the_answer_with_length() -> None:
    model = FakeModel()
    model.submit(1, "p", max_tokens=3)
    model.run()
    assert model.events == [Finished(1, 0, "...", "length", 1, 3, 0)]


def test_an_answer_that_ends_just_at_max_tokens_reports_length() -> None:
    model = FakeModel({(1, 0): b"abc", (2, 0): b"abc"})
    model.submit(1, "p", max_tokens=3)
    model.submit(2, "p", max_tokens=4)
    model.run()
    assert model.finished(1).reason == "length"
    assert model.finished(2) == Finished(2, 0, "abc", "stop", 1, 3, 0)


def test_a_stop_string_that_ends_at_max_tokens_is_a_stop() -> None:
    model = FakeModel({(1, 0): b"abcdef"})
    model.submit(1, "p", max_tokens=3, stop=("c",))
    model.run()
    assert model.events == [Finished(1, 0, "ab", "stop", 1, 3, 0, stopped=True)]


def test_without_max_tokens_the_context_ends_the_answer() -> None:
    model = FakeModel(context=10)
    model.submit(1, "pppp")
    model.run()
    assert model.events == [Finished(1, 0, "......", "length", 4, 6, 0)]


def test_a_prompt_that_leaves_room_for_one_token_gets_it() -> None:
    model = FakeModel(context=10)
    model.submit(1, "p" * 9)
    model.run()
    assert model.events == [Finished(1, 0, ".", "length", 9, 1, 0)]


def test_an_answer_that_ends_at_once_is_empty() -> None:
    model = FakeModel({(1, 0): b""})
    model.submit(1, "p", stream=True)
    model.run()
    assert model.events == [Finished(1, 0, "", "stop", 1, 0, 0)]


def test_text_held_for_a_stop_string_is_released_at_the_end() -> None:
    model = FakeModel({(1, 0): b"one ##"})
    model.submit(1, "p", stop=("###",), stream=True)
    model.run()
    assert model.text(1) == "one ##"


def test_a_second_turn_reports_what_was_reused() -> None:
    model = FakeModel({(1, 0): b"ok", (2, 0): b"yes"})
    model.submit(1, "abc")
    model.run()
    model.submit(2, "abcok?")
    model.run()
    assert model.finished(2).cached_tokens == 5
    assert model.memory.evaluated == 5 + len("?yes")


def test_being_preempted_changes_neither_text_nor_counts() -> None:
    answers = {(request, 0): f"this is answer {request}".encode() for request in range(4)}
    model = FakeModel(answers, cells=40)
    for request in answers:
        model.submit(request[0], f"prompt {request[0]}", stream=request[0] % 2 == 0)
    model.run()
    for (request, _), answer in answers.items():
        assert model.text(request) == answer.decode()
        last = model.finished(request)
        assert (last.prompt_tokens, last.completion_tokens, last.cached_tokens) == (8, len(answer), 0)
    assert model.memory.evaluated > sum(8 + len(answer) for answer in answers.values())


# Cancel and stop


@pytest.mark.parametrize("steps", range(6))
def test_a_cancelled_request_is_never_heard_of_again(steps: int) -> None:
    model = FakeModel({(2, 0): b"fine"}, batch=4)
    model.submit(1, "p" * 10, "q", choices=2, stream=True)
    model.submit(2, "other")
    model.step(steps)
    model.engine.cancel(1)
    heard = len(model.events)
    model.run()
    assert all(event.request == 2 for event in model.events[heard:])
    assert model.text(2) == "fine"
    assert model.engine.occupancy() is None  # back to nothing, as it was first reported


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("stream", [True, False])
def test_a_stopped_request_finishes_with_its_text_so_far(steps: int, stream: bool) -> None:
    model = FakeModel(batch=4)
    model.submit(1, "p" * 10, stream=stream)
    model.step(steps)
    model.events += model.engine.stop(1)
    assert model.engine.idle
    generated = max(0, steps - 2)  # the prompt takes three steps, the last of which gives a token
    last = model.finished(1)
    assert (model.text(1), last.reason) == ("." * generated, "stop")
    assert (last.prompt_tokens, last.completion_tokens) == (10, generated)


def test_stop_without_a_number_ends_all_requests() -> None:
    model = FakeModel(slots=2)
    for request in (1, 2, 3):
        model.submit(request, "p")
    model.step(2)
    model.events += model.engine.stop()
    assert model.engine.idle
    assert [model.text(request) for request in (1, 2, 3)] == ["..", "..", ""]


def test_stopping_releases_what_was_held_back() -> None:
    model = FakeModel({(1, 0): b"ab#\xc3"})
    model.submit(1, "p", stop=("##",), stream=True)
    model.step(4)
    model.events += model.engine.stop(1)
    assert model.text(1) == "ab#\ufffd"


def test_unknown_requests_can_be_cancelled_and_stopped() -> None:
    model = FakeModel()
    model.engine.cancel(99)
    assert model.engine.stop(99) == []
    assert model.engine.idle


# Errors


def test_a_failed_step_fails_the_running_requests_whole_and_no_others() -> None:
    model = FakeModel({(1, 0): b"x", (3, 0): b"fine"}, slots=2)
    model.submit(1, "a", "b", "c", stream=True)  # two run, one waits
    model.submit(3, "d")
    model.step()
    model.runner.fail = lambda chunks: EngineError("broken") if chunks[0].sequence.request == 1 else None
    model.run()
    failures = [event for event in model.events if isinstance(event, Failed)]
    assert [(event.request, event.error.name, event.error.message) for event in failures] == [
        (1, "EngineError", "broken")
    ]
    assert model.text(3) == "fine"


def test_after_a_failed_step_its_cells_are_not_reused() -> None:
    model = FakeModel({(2, 0): b"fine"})
    model.submit(1, "abcdef")
    model.step(3)
    model.runner.fail = lambda chunks: EngineError("broken")
    model.step()
    model.runner.fail = lambda chunks: None
    assert model.memory.used == 0
    model.submit(2, "abcdef")
    model.run()
    assert model.finished(2) == Finished(2, 0, "fine", "stop", 6, 4, 0)


def test_bad_logits_fail_all_that_runs_beside_them_and_nothing_later() -> None:
    """What is no number in the cache spoils the neighbours, so nothing of it is kept."""
    model = FakeModel({(1, 0): b"long answer", (2, 0): b"other answer", (3, 0): b"fine"})
    model.submit(1, "p")
    model.submit(2, "q", stream=True)
    model.runner.spoil = lambda s: EngineError("NaN") if (s.request, s.generated) == (1, 2) else None
    model.run()
    assert sorted(event.request for event in model.events if isinstance(event, Failed)) == [1, 2]
    assert model.memory.used == model.cache.used_cells == 0
    model.submit(3, "p")
    model.run()
    assert model.finished(3).text == "fine"


def _beside_an_adapter(folder: Path, answers: dict[tuple[int, int], bytes], **options: int) -> FakeModel:
    model = FakeModel(answers, **options)  # type: ignore[arg-type]
    (folder / "a").write_text("a")
    model.engine.set_adapters([Adapter("a", str(folder / "a"), 0.0)])
    return model


def test_what_goes_wrong_with_adapters_fails_those_who_want_them_only(tmp_path: Path) -> None:
    answers = {(1, 0): b"long answer", (2, 0): b"other answer", (3, 0): b"never", (4, 0): b"half"}
    model = _beside_an_adapter(tmp_path, answers)
    model.submit(1, "prompt")
    model.submit(2, "question", stream=True)
    model.step(3)
    model.submit(3, "prompt", adapters=(("a", 100.0),))
    model.submit(4, "prompt", adapters=(("a", 0.5),))
    model.runner.spoil = lambda s: EngineError("NaN") if s.request == 3 else None
    model.run()
    assert [event.request for event in model.events if isinstance(event, Failed)] == [3]
    assert [model.text(request) for request in (1, 2, 4)] == ["long answer", "other answer", "half"]


def test_who_begins_again_has_found_nothing_cached(tmp_path: Path) -> None:
    model = _beside_an_adapter(tmp_path, {(1, 0): b"x", (2, 0): b"fine"}, batch=4)
    model.submit(1, "p" * 20)
    model.run()
    model.submit(2, "p" * 20 + "q" * 30)
    model.submit(3, "p", adapters=(("a", 1.0),))
    model.runner.fail = lambda chunks: EngineError("NaN") if chunks[0].sequence.request == 3 else None
    model.run()
    assert model.finished(2) == Finished(2, 0, "fine", "stop", 50, 4, 0)


def test_what_a_step_with_adapters_has_left_that_was_given_up_fails_nobody(tmp_path: Path) -> None:
    """Nobody has seen what it computed, and it may be others who suffer: they begin again, once."""
    model = _beside_an_adapter(tmp_path, {(1, 0): b"an answer"})
    model.submit(1, "prompt")
    model.step(2)
    model.submit(2, "p" * 20, adapters=(("a", 100.0),))
    model.runner.during = lambda: model.engine.interrupt(2)
    while not model.engine._unchecked:
        model.step()
    model.engine.cancel(2)
    model.runner.during = lambda: None
    errors = [EngineError("NaN")]
    model.runner.spoil = lambda sequence: errors.pop() if errors else None
    model.run()
    assert model.text(1) == "an answer"
    model.submit(3, "prompt")
    errors.append(EngineError("NaN"))
    model.run()
    assert [event.request for event in model.events if isinstance(event, Failed)] == [3], "it is the model, then"


def test_a_prompt_under_evaluation_is_given_up_when_its_request_ends() -> None:
    model = FakeModel({(1, 0): b"one", (2, 0): b"two"}, batch=16)
    model.submit(2, "q" * 20)
    model.step()  # the first 16 tokens
    model.submit(1, "p" * 20)
    model.runner.during = lambda: model.engine.interrupt(1)
    model.step()
    assert model.events == []
    assert model.memory.used == model.cache.used_cells == 16  # as before the step
    model.runner.during = lambda: None
    model.engine.cancel(1)
    model.run()
    assert model.text(2) == "two"


def test_the_end_of_another_request_gives_up_no_step() -> None:
    model = FakeModel({(1, 0): b"one"})
    model.submit(1, "p" * 20)
    model.runner.during = lambda: model.engine.interrupt(2)
    model.run()
    assert model.text(1) == "one"


def test_bad_logits_in_two_choices_are_reported_once() -> None:
    model = FakeModel()
    model.submit(1, "p", choices=3)
    model.runner.spoil = lambda sequence: EngineError("NaN")
    model.run()
    assert [type(event) for event in model.events] == [Failed]


def test_when_memory_falls_short_idle_prefixes_go_and_the_step_is_repeated() -> None:
    model = FakeModel({(1, 0): b"one", (2, 0): b"two"}, cells=200, real_cells=12)
    model.submit(1, "pppp")
    model.run()
    model.submit(2, "qqqqqq")
    model.run()
    assert (model.text(1), model.text(2)) == ("one", "two")


def test_when_memory_falls_short_requests_still_finish_one_after_another() -> None:
    """llama.cpp may have fewer cells than the engine counts with; then the newest waits, and both are answered."""
    model = FakeModel({(1, 0): b"first one", (2, 0): b"second"}, cells=200, real_cells=16)
    model.submit(1, "pppp")
    model.submit(2, "qqqq")
    model.run()
    assert (model.text(1), model.text(2)) == ("first one", "second")


def test_a_request_that_alone_is_too_much_for_the_memory_fails() -> None:
    model = FakeModel({(2, 0): b"fine"}, cells=200, real_cells=8)
    model.submit(1, "pppp")
    model.run()
    (failed,) = model.of(1)
    assert isinstance(failed, Failed)
    assert "key-value cache" in failed.error.message
    model.submit(2, "q")
    model.run()
    assert model.text(2) == "fine"


def test_a_request_that_outgrows_all_cells_ends() -> None:
    """With fewer cells than the context has tokens, a sequence may be alone and still too long."""
    model = FakeModel({(2, 0): b"fine"}, cells=20, context=60)
    model.submit(1, "p" * 30)
    model.submit(2, "q")
    model.run()
    assert model.of(1)
    assert model.text(2) == "fine"


def test_a_failure_for_want_of_cells_is_an_engine_error_for_the_api_process_too() -> None:
    """That process turns a name it does not know into the base class."""
    model = FakeModel(real_cells=2)
    model.submit(1, "pppp")
    model.run()
    (failed,) = model.of(1)
    assert isinstance(failed, Failed)
    known = getattr(errors, failed.error.name, None)
    assert known is not None, f"errors.py has no {failed.error.name}"
    assert issubclass(known, EngineError)


# Prompts


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers() -> None:
    engine = FakeModel(context=10).engine
    assert len(engine.encode("p" * 9)) == 9
    for prompt in ("p" * 10, [1] * 10):
        with pytest.raises(ContextLengthExceeded, match=r"\b10 tokens.*\b10 tokens"):
            engine.encode(prompt)


def test_an_empty_prompt_is_refused() -> None:
    engine = FakeModel().engine
    for prompt in ("", []):
        with pytest.raises(InvalidRequest, match="empty"):
            engine.encode(prompt)


@pytest.mark.parametrize("token", [-1, 257, 2**31, 2**64])
def test_token_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    engine = FakeModel().engine
    with pytest.raises(InvalidRequest) as caught:
        engine.encode([1, token])
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        engine.check(Generation(sampling=Sampling(seed=0, logit_bias={token: 1.0})))
    assert caught.value.param == "logit_bias"


def test_the_caller_may_change_its_prompt_afterwards() -> None:
    model = FakeModel({(1, 0): b"x"})
    prompt = [1, 2, 3]
    model.engine.submit(1, [model.engine.encode(prompt)], Generation(sampling=SAMPLING))
    prompt.clear()
    model.run()
    assert model.finished(1).prompt_tokens == 3


def test_an_end_token_inside_a_prompt_is_no_end() -> None:
    model = FakeModel({(1, 0): b"x"})
    model.engine.submit(1, [[END, END]], Generation(sampling=SAMPLING))
    model.run()
    assert model.text(1) == "x"


# Occupancy


def test_occupancy_is_told_when_it_changes() -> None:
    model = FakeModel(slots=2)
    assert model.engine.occupancy() is None
    for request in (1, 2, 3):
        model.submit(request, "pp", max_tokens=3)
    assert model.engine.occupancy() == Occupancy(0, 3, 0)
    model.step()
    assert model.engine.occupancy() == Occupancy(2, 1, 4)
    model.step()
    assert model.engine.occupancy() is None
    model.run()
    last = model.engine.occupancy()
    assert last is not None
    assert (last.running, last.waiting) == (0, 0)


# Time limits


def _limited(step: float = 1.0, **options: int) -> tuple[FakeModel, SimulatedClock]:
    """A model of which each step takes so many seconds."""
    clock = SimulatedClock(step)
    return FakeModel(clock=clock, **options), clock


def _failures(model: FakeModel) -> list[tuple[int, str]]:
    return [(event.request, event.error.name) for event in model.events if isinstance(event, Failed)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_what_there_is_when_its_time_is_up(stream: bool) -> None:
    model, _ = _limited()
    model.submit(1, "p", time_limit=5.5, stream=stream)
    model.submit(2, "q", max_tokens=9)
    model.run()
    assert (model.text(1), model.finished(1).reason, model.finished(1).completion_tokens) == ("......", "length", 6)
    assert model.text(2) == "." * 9


def test_text_held_back_is_released_when_time_is_up() -> None:
    model, _ = _limited()
    model.runner.answers = {(1, 0): b"ab##"}
    model.submit(1, "p", stop=("###",), stream=True, time_limit=3.5)
    model.run()
    assert (model.text(1), model.finished(1).reason) == ("ab##", "length")


def test_one_that_waits_too_long_fails() -> None:
    model, _ = _limited(slots=1)
    model.submit(1, "p", max_tokens=9)
    model.submit(2, "q", time_limit=4, stream=True)
    model.run()
    assert _failures(model) == [(2, "TimeLimitExceeded")]
    assert model.of(2) == [event for event in model.events if isinstance(event, Failed)]
    assert "4 seconds" in model.of(2)[0].error.message
    assert model.text(1) == "." * 9


def test_a_prompt_that_takes_too_long_fails_and_what_is_evaluated_stays_as_a_prefix() -> None:
    model, _ = _limited(batch=4, cells=300)
    model.submit(1, "p" * 40, time_limit=5)
    model.run()
    assert _failures(model) == [(1, "TimeLimitExceeded")]
    assert model.memory.used == model.cache.used_cells == 20
    model.submit(2, "p" * 40, max_tokens=1)
    model.run()
    assert model.finished(2).cached_tokens == 20


def test_a_choice_that_is_finished_stays_so_when_the_others_run_out_of_time() -> None:
    model, _ = _limited()
    model.runner.answers = {(1, 0): b"ab"}
    model.submit(1, "p", choices=2, time_limit=6)
    model.run()
    assert model.finished(1, 0) == Finished(1, 0, "ab", "stop", 1, 2, 0)
    assert (model.finished(1, 1).text, model.finished(1, 1).reason) == ("......", "length")


@pytest.mark.parametrize("slots", [1, 2])
def test_a_choice_without_a_token_does_not_cost_the_others_theirs(slots: int) -> None:
    """Whichever of them have run, are running or still wait when the time is up."""
    model, _ = _limited(slots=slots)
    model.runner.answers = {(1, 0): b"ab"}
    model.submit(1, "p", choices=5, time_limit=6)
    model.submit(2, "q", max_tokens=3)
    model.run()
    assert _failures(model) == []
    assert (model.text(1, 0), model.finished(1, 0).reason) == ("ab", "stop")
    assert all(model.finished(1, choice).reason == "length" for choice in range(1, 5))
    assert model.text(1, 1)
    assert model.text(1, 4) == ""
    assert model.text(2) == "..."


def test_a_limit_counts_from_when_the_request_came() -> None:
    model, _ = _limited(slots=1)
    model.submit(1, "p", max_tokens=4)
    model.submit(2, "q", time_limit=6)
    model.run()
    assert (model.text(2), model.finished(2).reason) == ("..", "length")


def test_preempted_sequences_keep_their_limit() -> None:
    model, _ = _limited(cells=30, slots=2)
    model.submit(1, "p" * 5)
    model.submit(2, "q" * 5, time_limit=30)
    model.step(12)
    assert [sequence.request for sequence in model.engine._scheduler.waiting] == [2]
    model.step(30)
    assert model.finished(2).reason == "length"
    assert model.text(2) == "." * model.finished(2).completion_tokens != ""


def test_the_last_request_of_all_may_end_by_its_limit() -> None:
    model, clock = _limited()
    model.submit(1, "p", time_limit=2)
    clock.now += 3
    assert [type(event) for event in model.engine.step()] == [Failed]
    assert model.engine.idle


# Progress


def test_progress_tells_the_place_in_the_queue_and_how_much_of_the_prompt_is_evaluated() -> None:
    model, clock = _limited(step=1e-3, slots=2, batch=4)
    model.submit(1, "p" * 10, stream=True)
    model.submit(2, "q", stream=True)
    model.submit(3, "rrr", stream=True)
    model.submit(4, "ssss", stream=True)
    model.submit(5, "t")
    assert model.engine.progress() == [
        Progress(1, 1, 0, 10),
        Progress(2, 2, 0, 1),
        Progress(3, 3, 0, 3),
        Progress(4, 4, 0, 4),
    ]
    model.step()
    clock.now += 1
    assert set(map(_fields, model.engine.progress())) == {(1, 0, 4, 10), (2, 0, 0, 1), (3, 1, 0, 3), (4, 2, 0, 4)}
    model.step(2)
    clock.now += 1
    assert set(map(_fields, model.engine.progress())) == {(3, 1, 0, 3), (4, 2, 0, 4)}
    model.events += model.engine.stop()


def _fields(progress: Progress) -> tuple[int, int, int, int]:
    return progress.request, progress.place, progress.evaluated, progress.prompt_tokens


def test_progress_is_told_at_most_twice_a_second() -> None:
    model, clock = _limited(step=0.03, batch=1, context=500, cells=1000)
    model.submit(1, "p" * 300, stream=True)
    times = []
    while not model.of(1):
        model.step()
        if model.engine.progress():
            times.append(clock.now)
    assert len(times) >= 300 * 0.03 // 0.5 - 1
    assert all(after - before >= 0.5 - 1e-9 for before, after in pairwise(times))
    model.engine.cancel(1)


def test_nothing_is_told_of_whole_answers_and_of_those_that_have_begun() -> None:
    model, clock = _limited(slots=2)
    model.submit(1, "p", stream=True, choices=3)
    model.submit(2, "q")
    assert [progress.request for progress in model.engine.progress()] == [1]
    model.step()
    clock.now += 1
    assert model.engine.progress() == [], "two choices have a token, the third waits"
    model.events += model.engine.stop()


# Drafts


class Copying:
    """Drafts from what the model is going to say, wrong where ``wrong`` says so."""

    def __init__(self, tokens: list[int], answer: bytes, wrong: frozenset[int]) -> None:
        self.tokens = tokens
        self.start = len(tokens) - 1  # one token is generated when it is first asked
        self.answer = [ord("x") if place in wrong else token for place, token in enumerate((*answer, END, END))]

    def draft(self, limit: int) -> Draft:
        """See ``Drafter``."""
        tokens = self.answer[len(self.tokens) - self.start :][: max(0, limit)]
        return Draft(tokens, [1.0] * len(tokens))


def _drafted(answer: bytes, wrong: frozenset[int] = frozenset(), **options: int) -> FakeModel:
    clock = SimulatedClock(row=1e-6)
    return FakeModel(
        {(1, 0): answer, (2, 0): answer},
        drafted_rows=8,
        drafter=lambda tokens: Copying(tokens, answer, wrong),
        clock=clock,
        **options,
    )


def test_right_drafts_take_few_steps() -> None:
    model = _drafted(b"The answer is long.")
    model.submit(1, "p", stream=True)
    model.run()
    assert model.runner.steps == 1 + 3
    assert [event.text for event in model.of(1)] == ["T", "he answer", " is long.", ""]
    assert model.finished(1).completion_tokens == 19


def test_wrong_drafts_cost_no_token() -> None:
    model = _drafted(b"The answer is long.", frozenset(range(40)))
    model.submit(1, "p")
    model.run()
    assert model.runner.steps == 1 + 19
    assert model.text(1) == "The answer is long."
    assert all(right == 0 for _, right in model.runner.drafts)


def test_drafts_are_counted_and_told_now_and_then() -> None:
    model = _drafted(b"The answer is long.", frozenset({5}))
    model.submit(1, "p")
    model.run()
    lengths, right = map(sum, zip(*model.runner.drafts, strict=True))
    assert isinstance(model.runner.clock, SimulatedClock)
    assert model.engine.occupancy() is None, "nothing runs, as it was first reported"
    model.runner.clock.now += 2
    told = model.engine.occupancy()
    assert told is not None
    assert (told.running, told.drafted, told.accepted) == (0, lengths, right)
    assert 0 < right < lengths
    model.runner.clock.now += 2
    assert model.engine.occupancy() is None, "that has been told"


def test_what_repeats_is_guessed_from_the_text_itself() -> None:
    model = FakeModel({(1, 0): b"one two three. " * 4}, context=200, drafted_rows=8, clock=SimulatedClock(row=1e-6))
    model.submit(1, "one two three. ")
    model.run()
    assert model.text(1) == "one two three. " * 4
    assert model.runner.steps < 25
    assert model.memory.used == model.cache.used_cells


@given(
    answer=_answers,
    wrong=st.frozensets(st.integers(0, 16)),
    stops=_stops,
    max_tokens=st.integers(1, 20),
    stream=st.booleans(),
    cells=st.sampled_from([24, 200]),
    batch=st.sampled_from([3, 16]),
)
def test_with_drafts_the_answer_is_the_same(
    answer: bytes,
    wrong: frozenset[int],
    stops: tuple[str, ...],
    max_tokens: int,
    stream: bool,
    cells: int,
    batch: int,
) -> None:
    model = _drafted(answer, wrong, cells=cells, batch=batch)
    plain = FakeModel({(1, 0): answer, (2, 0): answer})
    for request in (1, 2):
        for each in (model, plain):
            each.submit(request, "p", stop=stops, max_tokens=max_tokens, stream=stream)
    for each in (model, plain):
        each.run()
    for request in (1, 2):
        one, other = model.finished(request), plain.finished(request)
        assert model.text(request) == plain.text(request)
        assert (one.reason, one.completion_tokens) == (other.reason, other.completion_tokens)
    assert model.memory.used == model.cache.used_cells


@pytest.mark.parametrize("batch", [4, 5, 6])
def test_drafts_and_prompts_fit_in_the_batch_and_neither_keeps_the_other_out(batch: int) -> None:
    model = FakeModel(
        {(request, 0): b"0123456789" * 3 for request in range(4)},
        drafted_rows=8,
        drafter=lambda tokens: Copying(tokens, b"0123456789" * 3, frozenset()),
        clock=SimulatedClock(row=1e-6),
        batch=batch,
    )
    largest = []
    model.runner.fail = lambda chunks: largest.append(sum(chunk.rows for chunk in chunks))
    for request in range(4):
        model.submit(request, f"{request}prompt")
        model.step(3)
    model.run()
    assert max(largest) == batch
    for request in range(4):
        assert model.text(request) == "0123456789" * 3


def test_without_cells_for_drafts_a_lone_request_goes_on_without_them() -> None:
    """llama.cpp may have fewer cells than the engine counts with."""
    model = _drafted(b"0123456789", real_cells=12)
    model.submit(1, "p")
    model.run()
    assert model.text(1) == "0123456789"


def test_an_interrupted_step_takes_its_drafts_back() -> None:
    model = _drafted(b"0123456789")
    model.submit(1, "p")
    model.step(1)
    model.submit(2, "q" * 5)
    model.runner.during = lambda: model.engine.interrupt(2)
    for _ in range(3):
        assert model.engine.step() == []
        assert model.memory.used == model.cache.used_cells == 1
    model.runner.during = lambda: None
    model.run()
    assert (model.text(1), model.text(2)) == ("0123456789", "0123456789")


# A random life


@given(
    choices=st.lists(st.lists(_answers, min_size=1, max_size=3), min_size=1, max_size=6),
    waits=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    slots=st.integers(1, 3),
    cells=st.integers(40, 90),
    drafted_rows=st.sampled_from([0, 4]),
)
def test_any_mix_of_requests_gets_each_its_own_answer(
    choices: list[list[bytes]], waits: list[int], slots: int, cells: int, drafted_rows: int
) -> None:
    answers = {(r, index): answer for r, each in enumerate(choices) for index, answer in enumerate(each)}
    model = FakeModel(
        answers, slots=slots, cells=cells, context=40, drafted_rows=drafted_rows, clock=SimulatedClock(row=1e-6)
    )
    for request, each in enumerate(choices):
        model.submit(request, "p" * (1 + request), choices=len(each), stream=request % 2 == 0)
        model.step(waits[request])
    model.run()
    for (request, index), answer in answers.items():
        assert model.text(request, index) == answer.decode("utf-8", "replace")
        assert model.finished(request, index).completion_tokens == len(answer)
