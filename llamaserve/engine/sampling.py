"""From a request's sampling options to what picks the next token: a row of stages, then a draw.

Biases and bans come first, then the stages in the order of the request. A token may also be forced, which nothing but
the form of the answer can prevent. Knows nothing of requests or batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from random import Random
from typing import Any, Protocol

import numpy as np

from llamaserve.engine import stages, thinking
from llamaserve.engine.candidates import Candidates, Floats, NothingLeft, Places, draw
from llamaserve.engine.constraint import CanNotGoOn, Form, Grammars
from llamaserve.engine.llama import NativeSampler, Vocab
from llamaserve.engine.params import Constraint, Sampling, Thinking
from llamaserve.engine.penalties import LeastLength, NoRepeatedNgrams, OccurrencePenalty, PromptPreference, TextStage
from llamaserve.engine.thinking import LimitedThinking
from llamaserve.errors import EngineError

Stage = Callable[[Candidates], None]

_WHOLE_TEXT = 0  # a range of "all tokens"
_SEEDS = 2**64  # different ones
# the stages that have one number, the option of their name
_BY_ONE_NUMBER: dict[str, Callable[[Candidates, Any], None]] = {
    "top_n_sigma": stages.top_n_sigma,
    "temperature": stages.temperature,
    "top_k": stages.top_k,
    "top_p": stages.top_p,
    "typical_p": stages.typical_p,
    "epsilon_cutoff": stages.epsilon_cutoff,
    "eta_cutoff": stages.eta_cutoff,
    "tfs": stages.tail_free,
    "top_a": stages.top_a,
    "min_p": stages.min_p,
}
_PREPARED = 16  # DRY samplers of a model that are kept to be cloned


class Observer(Protocol):
    """What learns from each draw."""

    def observe(self, place: int) -> None:
        """Take note of the place of the candidate that is drawn."""


class Greedy:
    """Picks the most probable token."""

    def sample(self, logits: Floats) -> int:
        """Pick a token from the logits, shape (vocabulary,). Raises ``EngineError`` when they are not numbers."""
        token = int(logits.argmax())  # the first that is no number, if there is one
        _check(logits[token])
        return token

    complete = False  # there is always a most probable one

    def force(self, token: int) -> None:
        """There is nothing to tell of a token that was not picked."""

    def candidates(self, logits: Floats) -> Candidates:
        """Return the one token that could be picked."""
        candidates = Candidates(logits)
        stages.only_best(candidates)
        return candidates

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def possible(self, tokens: Sequence[int]) -> int:
        """Return the number of the tokens: whether they come is up to the model."""
        return len(tokens)

    def close(self) -> None:
        """There is nothing to free."""


class Sampler:
    """Picks a token at random from what its stages leave."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        followers: Sequence[TextStage] = (),
        observers: Sequence[Observer] = (),
        chance: Random | None = None,
        form: Form | None = None,
    ) -> None:
        """``followers`` are those of the stages that follow the text, ``observers`` those that learn from draws. One of
        the followers may be the ``form`` that the answer must have.
        """
        self._stages = stages
        self._followers = followers
        self._observers = observers
        self._chance = chance or Random()  # noqa: S311
        self._form = form

    @property
    def complete(self) -> bool:
        """Whether the answer has its form, and nothing more may come."""
        return self._form is not None and self._form.complete

    def sample(self, logits: Floats) -> int:
        """Pick a token from the logits, shape (vocabulary,), and take note of it as the text's next. Raises
        ``EngineError`` when they are not numbers, ``NothingLeft``, and ``CanNotGoOn``.
        """
        candidates = self.candidates(logits)
        place = draw(candidates.weights(), self._chance.random())
        for observer in self._observers:
            observer.observe(place)
        token = candidates.token(place)
        for follower in self._followers:
            follower.accept(token)
        return token

    def force(self, token: int) -> None:
        """Take note of a token that comes next without having been picked, whatever the bans. Raises ``CanNotGoOn``
        where the answer's form does not allow it.
        """
        if not self.possible([token]):
            raise CanNotGoOn("the answer's form does not let its thinking end where the budget for it is used up")
        for follower in self._followers:
            follower.accept(token)

    def candidates(self, logits: Floats) -> Candidates:
        """Return the tokens that could be picked, with what their probabilities are the softmax of. Raises
        ``NothingLeft``.
        """
        _check(logits.max())  # which is no number as soon as one of them is none
        candidates = Candidates(logits.copy())
        for stage in self._stages:
            stage(candidates)
        if not math.isfinite(candidates.logits[candidates.best()]):
            raise NothingLeft  # the options have made it infinite
        return candidates

    def prepare(self) -> None:
        """Do what can be done for the next token before its logits are there, on another thread."""
        if self._form is not None:
            self._form.prepare()

    def possible(self, tokens: Sequence[int]) -> int:
        """Return how many of some guessed tokens the answer's form allows next, one after the other."""
        return len(tokens) if self._form is None else self._form.possible(tokens)

    def close(self) -> None:
        """Free what is not Python's."""
        for follower in self._followers:
            follower.close()


def _check(logit: np.float32) -> None:
    """Refuse logits that are no numbers: they would become noise."""
    if not math.isfinite(logit):
        raise EngineError("the model computed logits that are not numbers; its file is probably damaged")


class SamplerFactory:
    """Makes the samplers of one model's sequences. ``context`` is the largest number of tokens of one."""

    def __init__(self, vocab: Vocab, context: int) -> None:
        self.vocab = vocab
        self.context = context
        self.dry = lru_cache(_PREPARED)(self._make_dry)
        self.grammars = Grammars(vocab)

    def check(self, sampling: Sampling, constraint: Constraint | None = None, limit: Thinking | None = None) -> None:
        """Refuse options that can't work with this model, and do what takes long in ``build``. Thread-safe."""
        self.vocab.check(sampling.logit_bias, "logit_bias")
        self.vocab.check(sampling.banned_tokens, "custom_token_bans")
        if sampling.dry_multiplier > 0:
            self.dry(*dry_options(sampling))
        if limit is not None:
            thinking.check(limit, self.vocab)
        if constraint is not None:
            self.grammars.compile(constraint)

    def build(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        choice: int = 0,
        form: Form | None = None,
        limit: Thinking | None = None,
    ) -> Greedy | Sampler | LimitedThinking:
        """Return what samples one sequence, and knows its prompt. ``choice`` is added to the seed, and ``limit`` is how
        long it may think.
        """
        sampler = _Builder(self, sampling, prompt, choice, form).build()
        return sampler if limit is None else LimitedThinking(sampler, limit, self.vocab)

    def range(self, wanted: int) -> int:
        """Return how many last tokens a penalty looks at: llama.cpp allocates what it is told."""
        return self.context if wanted == _WHOLE_TEXT else min(wanted, self.context)

    def _make_dry(
        self, last: int, multiplier: float, base: float, allowed_length: int, breakers: tuple[str, ...]
    ) -> NativeSampler:
        encoded = [breaker.encode() for breaker in breakers]
        return NativeSampler.dry(self.vocab, self.range(last), multiplier, base, allowed_length, encoded)


def dry_options(s: Sampling) -> tuple[int, float, float, int, tuple[str, ...]]:
    """Return what a DRY sampler depends on."""
    return s.dry_range, s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_sequence_breakers


class _Builder:
    def __init__(
        self, factory: SamplerFactory, sampling: Sampling, prompt: Sequence[int], choice: int, form: Form | None
    ) -> None:
        self._form = form
        self._factory = factory
        self._vocab = factory.vocab
        self._sampling = sampling.effective()
        self._prompt = prompt
        self._chance = Random((sampling.seed + choice) % _SEEDS)  # noqa: S311
        self._followers: list[TextStage] = []
        self._observers: list[Observer] = []

    def build(self) -> Greedy | Sampler:
        form, greedy = self._form, self._sampling.greedy
        made: list[Stage] = [*self._bans()]
        if form is not None:
            self._followers.append(form)
            if not greedy:
                made.append(form)
        made += [self._stage(name) for name in self._sampling.stages]
        if not greedy:
            made += self._shapers()
        elif form is not None:
            made.append(form.keep_best)
        elif made:
            made.append(stages.only_best)
        else:
            return Greedy()
        return Sampler(made, followers=self._followers, observers=self._observers, chance=self._chance, form=form)

    def _bans(self) -> Iterator[Stage]:
        """Yield what changes the logits of certain tokens."""
        sampling = self._sampling
        changes = dict(sampling.logit_bias)
        banned = (*sampling.banned_tokens, *(self._vocab.ends if sampling.ban_eos else ()))
        changes |= dict.fromkeys(banned, -math.inf)
        if changes:
            tokens = np.array(list(changes), np.intp)
            yield partial(_add, tokens=tokens, values=np.array(list(changes.values()), np.float32))
        if sampling.min_tokens:
            yield self._follow(LeastLength(sampling.min_tokens, self._vocab.ends), 0)

    def _stage(self, name: str) -> Stage:
        """Return the stage of this name."""
        s = self._sampling
        match name:
            case "no_repeat_ngram":
                return self._follow(NoRepeatedNgrams(s.no_repeat_ngram_size), self._factory.context)
            case "encoder_repetition_penalty":
                return PromptPreference(s.encoder_repetition_penalty, self._prompt)
            case "penalties":
                last = self._factory.range(s.repetition_penalty_range)
                penalties = (s.repetition_penalty, s.frequency_penalty, s.presence_penalty)
                return self._follow(OccurrencePenalty(NativeSampler.penalties(self._vocab, last, *penalties)), last)
            case "dry":
                native = self._factory.dry(*dry_options(s)).clone()
                return self._follow(OccurrencePenalty(native), self._factory.range(s.dry_range))
            case "temperature" if s.dynatemp_range > 0:
                low, high = max(0.0, s.temperature - s.dynatemp_range), s.temperature + s.dynatemp_range
                return partial(stages.dynamic_temperature, low=low, high=high, exponent=s.dynatemp_exponent)
            case "quadratic_sampling":
                return partial(stages.quadratic, factor=s.smoothing_factor, curve=s.smoothing_curve)
            case "xtc":
                xtc = partial(stages.xtc, probability=s.xtc_probability, threshold=s.xtc_threshold)
                return partial(xtc, chance=self._chance)
        stage, number = _BY_ONE_NUMBER[name], getattr(s, name)
        return lambda candidates: stage(candidates, number)

    def _shapers(self) -> Iterator[Stage]:
        """Yield what comes last and learns from what is drawn."""
        sampling = self._sampling
        mirostat: stages.Mirostat | stages.Mirostat2
        if sampling.mirostat_mode:
            if sampling.mirostat_mode == 1:
                mirostat = stages.Mirostat(sampling.mirostat_tau, sampling.mirostat_eta, self._vocab.size)
            else:
                mirostat = stages.Mirostat2(sampling.mirostat_tau, sampling.mirostat_eta)
            self._observers.append(mirostat)
            yield mirostat
        elif sampling.adaptive_target > 0:
            adaptive = stages.AdaptiveP(sampling.adaptive_target, sampling.adaptive_decay)
            self._observers.append(adaptive)
            yield adaptive

    def _follow(self, stage: TextStage, last: int) -> TextStage:
        """Have a stage follow the text from so many tokens before the prompt's end."""
        self._followers.append(stage)
        for token in self._prompt[-last:] if last else ():
            stage.accept(token)
        return stage


def _add(candidates: Candidates, tokens: Places, values: Floats) -> None:
    candidates.logits[tokens] += values
