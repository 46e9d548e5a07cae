"""How a model that scores pairs of texts wants to see a query and a document. Knows vocabularies, and no lengths."""

from __future__ import annotations

from dataclasses import dataclass

from llamaserve.engine.llama import Vocab
from llamaserve.errors import ModelLoadFailed

_QUERY, _DOCUMENT = "{query}", "{document}"


@dataclass(frozen=True)
class PairFrame:
    """What stands around a document: tokens before it, with the query, and behind it, and white space that belongs to
    its text.
    """

    before: list[int]
    lead: str
    trail: str
    after: list[int]


def frame_pair(vocab: Vocab, template: str | None, query: str) -> PairFrame:
    """Return what to put around documents. Most models want both texts one behind the other, as BERT sees pairs of
    sentences; some have a template for them. Names of control tokens in the query are text. Thread-safe.
    """
    before, after = vocab.frame
    if template is None:
        return PairFrame([*before, *_text(vocab, query), *vocab.separator], "", "", after)
    ahead, between, behind = _parts(template)
    start, query_lead = _split_trailing(ahead)
    middle, query_trail = _split_leading(between)
    middle, lead = _split_trailing(middle)
    end, trail = _split_leading(behind)
    texts = [_control(vocab, start), _text(vocab, query_lead + query + query_trail), _control(vocab, middle)]
    return PairFrame([*before, *texts[0], *texts[1], *texts[2]], lead, trail, [*_control(vocab, end), *after])


def _parts(template: str) -> tuple[str, str, str]:
    """Return what stands before the query, between the two, and behind the document."""
    ahead, found, rest = template.partition(_QUERY)
    between, found_too, behind = rest.partition(_DOCUMENT)
    if not (found and found_too):
        raise ModelLoadFailed(f"its template for pairs has no {_QUERY} with a {_DOCUMENT} behind it")
    return ahead, between, behind


def _text(vocab: Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, add_bos=False, parse_special=False)


def _control(vocab: Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, add_bos=False, parse_special=True) if text else []


def _split_trailing(text: str) -> tuple[str, str]:
    """Split off white space at the end: a tokeniser takes it together with what comes behind."""
    bare = text.rstrip()
    return bare, text[len(bare) :]


def _split_leading(text: str) -> tuple[str, str]:
    """Split off white space at the beginning: a tokeniser takes it together with what comes before."""
    bare = text.lstrip()
    return bare, text[: len(text) - len(bare)]
