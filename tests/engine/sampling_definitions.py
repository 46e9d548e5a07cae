"""What each sampling option means, written down a second time: slowly, in 64 bits, on lists and loops.

A definition takes a list of logits, one for each token of the vocabulary and minus infinity for what is dropped, and
returns the list after the stage. It is meant to be read beside the published definition, not to be fast.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

Logits = list[float]
DROPPED = -math.inf


def softmax(logits: Logits) -> list[float]:
    """Probabilities, 0 for what is dropped."""
    best = max(logits)
    weights = [math.exp(logit - best) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _by_probability(logits: Logits) -> list[int]:
    """Tokens that are not dropped, the most probable first."""
    return sorted((token for token, logit in enumerate(logits) if logit > DROPPED), key=lambda token: -logits[token])


def _only(logits: Logits, kept: Sequence[int]) -> Logits:
    chosen = set(kept)
    return [logit if token in chosen else DROPPED for token, logit in enumerate(logits)]


def temperature(logits: Logits, value: float) -> Logits:
    return [logit / value for logit in logits]


def dynamic_temperature(logits: Logits, low: float, high: float, exponent: float) -> Logits:
    present = [p for p in softmax(logits) if p > 0]
    entropy = -math.fsum(p * math.log(p) for p in present)
    count = sum(logit > DROPPED for logit in logits)
    return temperature(logits, low + (high - low) * (entropy / math.log(count)) ** exponent)


def smoothing(logits: Logits, factor: float, curve: float) -> Logits:
    best = max(logits)
    k, s = (3 - curve) / 2, (curve - 1) / 2
    return [best - k * factor * (x - best) ** 2 + s * factor * (x - best) ** 3 if x > DROPPED else x for x in logits]


def top_k(logits: Logits, k: int) -> Logits:
    return _only(logits, _by_probability(logits)[:k])


def top_p(logits: Logits, p: float) -> Logits:
    probabilities = softmax(logits)
    kept: list[int] = []
    total = 0.0
    for token in _by_probability(logits):
        kept.append(token)
        total += probabilities[token]
        if total >= p:
            break
    return _only(logits, kept)


def min_p(logits: Logits, p: float) -> Logits:
    probabilities = softmax(logits)
    return _only(logits, [t for t, each in enumerate(probabilities) if each >= p * max(probabilities)])


def typical_p(logits: Logits, p: float) -> Logits:
    probabilities = softmax(logits)
    entropy = -math.fsum(each * math.log(each) for each in probabilities if each > 0)
    tokens = [token for token, each in enumerate(probabilities) if each > 0]
    tokens.sort(key=lambda token: abs(-math.log(probabilities[token]) - entropy))
    kept: list[int] = []
    total = 0.0
    for token in tokens:
        kept.append(token)
        total += probabilities[token]
        if total > p:
            break
    return _only(logits, kept)


def top_n_sigma(logits: Logits, n: float) -> Logits:
    present = [logit for logit in logits if logit > DROPPED]
    mean = math.fsum(present) / len(present)
    deviation = math.sqrt(math.fsum((logit - mean) ** 2 for logit in present) / len(present))
    return [logit if logit >= max(present) - n * deviation else DROPPED for logit in logits]


def _at_least(logits: Logits, least: float) -> Logits:
    probabilities = softmax(logits)
    best = max(probabilities)
    return _only(logits, [token for token, each in enumerate(probabilities) if each >= least or each == best])


def epsilon_cutoff(logits: Logits, value: float) -> Logits:
    return _at_least(logits, value / 10_000)


def eta_cutoff(logits: Logits, value: float) -> Logits:
    epsilon = value / 10_000
    entropy = -math.fsum(each * math.log(each) for each in softmax(logits) if each > 0)
    return _at_least(logits, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)))


def top_a(logits: Logits, a: float) -> Logits:
    return _at_least(logits, a * max(softmax(logits)) ** 2)


def tail_free(logits: Logits, z: float) -> Logits:
    order = _by_probability(logits)
    probabilities = softmax(logits)
    curve = [probabilities[token] for token in order]
    slopes = [after - before for before, after in itertools.pairwise(curve)]
    bends = [abs(after - before) for before, after in itertools.pairwise(slopes)]
    kept, total, running = 1, math.fsum(bends), 0.0
    for bend in bends:
        running += bend / total
        if running > z:
            break
        kept += 1
    return _only(logits, order[:kept])


def xtc(logits: Logits, threshold: float) -> Logits:
    """When it strikes."""
    probabilities = softmax(logits)
    reaching = [token for token in _by_probability(logits) if probabilities[token] >= threshold]
    return _only(logits, [t for t, logit in enumerate(logits) if logit > DROPPED and t not in reaching[:-1]])


def mirostat(logits: Logits, limit: float, vocabulary: int) -> Logits:
    top = [softmax(logits)[token] for token in _by_probability(logits)[:100]]
    steps = [math.log((i + 2) / (i + 1)) for i in range(len(top) - 1)]
    drops = [math.log(top[i] / top[i + 1]) for i in range(len(top) - 1)]
    s = math.fsum(t * b for t, b in zip(steps, drops, strict=True)) / math.fsum(t * t for t in steps)
    epsilon = s - 1
    k = ((epsilon * 2**limit) / (1 - vocabulary**-epsilon)) ** (1 / s)
    return top_k(logits, max(1, int(k)))


def mirostat_2(logits: Logits, limit: float) -> Logits:
    probabilities = softmax(logits)
    order = _by_probability(logits)
    return _only(logits, [token for token in order if -math.log2(probabilities[token]) <= limit] or order[:1])


def adaptive(logits: Logits, target: float) -> Logits:
    distances = [abs(p - target) / 0.3 for p in softmax(logits)]
    return [
        5 - 10 * d * d / (1 + d) if logit > DROPPED else DROPPED for d, logit in zip(distances, logits, strict=True)
    ]


def penalties(
    logits: Logits, history: Sequence[int], last: int, repetition: float, frequency: float, presence: float
) -> Logits:
    changed = list(logits)
    for token, times in Counter(history[-last:]).items():
        changed[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        changed[token] -= times * frequency + presence
    return changed


def encoder_penalty(logits: Logits, prompt: Sequence[int], factor: float) -> Logits:
    changed = list(logits)
    for token in set(prompt):
        changed[token] = logits[token] * factor if logits[token] > 0 else logits[token] / factor
    return changed


def no_repeated_ngram(logits: Logits, history: Sequence[int], size: int) -> Logits:
    known = {tuple(history[at : at + size]) for at in range(len(history) - size + 1)}
    last = tuple(history[len(history) - size + 1 :])
    return [DROPPED if (*last, token) in known else logit for token, logit in enumerate(logits)]


def dry(
    logits: Logits,
    history: Sequence[int],
    last: int,
    multiplier: float,
    base: float,
    allowed: int,
    breakers: set[int],
) -> Logits:
    """For breakers that are single tokens."""
    text = list(history[-last:])
    reach = len(text)  # tokens since the last breaker: no repetition is longer
    for distance, token in enumerate(reversed(text)):
        if token in breakers:
            reach = distance
            break
    longest: dict[int, int] = {}
    for end in range(1, len(text)):  # a repetition that ended here was followed by text[end]
        length = 0
        while length < min(end, reach) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length >= allowed:
            longest[text[end]] = max(longest.get(text[end], 0), length)
    return [
        logit - multiplier * base ** (longest[token] - allowed) if token in longest and token not in breakers else logit
        for token, logit in enumerate(logits)
    ]
