"""The classifier's heads: what they make of features, which files are refused, and the file that is shipped."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, strategies as st

from llamaserve.moderation.categories import CATEGORIES, PARENT, Scores
from llamaserve.moderation.heads import FILE, SHA256_KEY, CategoryHeads, HarmHead, Heads, KindHead, load_heads, merged
from llamaserve.moderation.spelling import buckets
from llamaserve.registry.gguf import GGUFHeader, read_header

BUCKETS = 8
some_scores = st.builds(Scores.of, st.dictionaries(st.sampled_from(CATEGORIES), st.floats(0.0, 1.0)))
vectors = st.lists(st.floats(-1.0, 1.0), min_size=3, max_size=3)


def harm(*vector: float, products: float = 0.0, words: float = 0.0, bias: float = 0.0) -> HarmHead:
    return HarmHead(vector, (products,) * 3, (words,) * BUCKETS, bias)


def tiny(own: HarmHead | None = None, *, kinds: dict[str, float] | None = None, **changes: Any) -> Heads:
    """Heads for vectors of 3 numbers. All categories have one harm head, ``own``, and nothing to say together without
    it; ``kinds`` are the biases of the others.
    """
    biases = dict.fromkeys(CATEGORIES, -9.0) | (kinds or {})
    categories = {
        name: CategoryHeads(
            own or harm(0, 0, 0, bias=-math.log(len(CATEGORIES))), KindHead((0.0, 0.0, 0.0), biases[name])
        )
        for name in CATEGORIES
    }
    given = {"model": "all-minilm", "sha256": "12ab", "sentences": "", "width": 3, "buckets": BUCKETS, "strength": 1.0}
    given |= {"directions": ((1.0, 0.0, 0.0), (0.0, 2.0, 0.0)), "middle": (0.5, 0.0)}
    return Heads(**{**given, "harm": harm(0.0, 0.0, 0.0), "categories": categories, **changes})


def header(width: int = 3, name: str | None = None, sha256: str | None = None) -> GGUFHeader:
    found = SimpleNamespace(embedding_length=width, name=name, text={SHA256_KEY: sha256}.get)
    return cast("GGUFHeader", found)


def test_the_likeliest_category_is_as_high_as_the_text_is_harmful() -> None:
    heads = tiny(harm(2.0, 0.0, 0.0), kinds={"illicit": 1.0, "sexual": 0.0})
    scores = heads.scores([0.5, 0.0, 0.0], "").values
    harmful = 1 / (1 + math.exp(-(1.0 + math.log(len(CATEGORIES)))))
    assert scores["illicit"] == pytest.approx(harmful)
    assert scores["sexual"] == pytest.approx(harmful / math.e)
    assert scores["violence"] == pytest.approx(harmful * math.exp(-10))


def test_a_parent_is_as_high_as_its_child() -> None:
    scores = tiny(harm(0, 0, 0), kinds={"hate/threatening": 2.0}).scores([0.0, 0.0, 1.0], "x").values
    assert scores["hate"] == scores["hate/threatening"] == max(scores.values())


def test_products_are_of_the_places_in_any_two_directions() -> None:
    features = tiny().features([1.5, 2.0, 7.0], "")
    assert features.products == [1.0, 4.0, 16.0]
    only_products = tiny(harm=harm(0, 0, 0, products=0.1, bias=-2.1))
    assert only_products.scores([1.5, 2.0, 7.0], "").values["hate"] == pytest.approx(0.5)


def test_words_count_by_their_bucket() -> None:
    heads = tiny(harm=harm(0, 0, 0, words=1.0))
    silent, told = (max(heads.scores([0.0, 0.0, 0.0], text).values.values()) for text in ("", "hello"))
    assert silent == pytest.approx(0.5)
    assert told == pytest.approx(1 / (1 + math.exp(-sum(buckets("hello", BUCKETS).values()))))


@given(vectors, st.text(max_size=300))
def test_scores_are_scores_for_any_text(vector: list[float], text: str) -> None:
    scores = tiny(harm(900.0, -900.0, 1.0), harm=harm(900.0, 900.0, 900.0, words=5.0)).scores(vector, text)
    assert all(scores.values[name] <= scores.values[parent] for name, parent in PARENT.items())


def test_a_vector_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers, and the heads are for 3"):
        tiny().scores([1.0, 0.0], "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 4}, "vector"),
        ({"buckets": 7}, "words"),
        ({"middle": (0.0,)}, "middle"),
        ({"directions": ((1.0, 0.0, 0.0),)}, "products, middle"),
    ],
)
def test_heads_must_fit_each_other(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny(**changes)


def test_heads_must_be_of_all_categories() -> None:
    given = tiny().categories
    with pytest.raises(ValueError, match="OpenAI's categories"):
        tiny(categories={name: given[name] for name in CATEGORIES[1:]})


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"model": "x"}', FILE.read_bytes().replace(b'"strength":', b'"strength":-')]
)
def test_a_file_that_has_no_heads_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_bytes(content)
    with pytest.raises(msgspec.DecodeError):
        load_heads(tmp_path / "heads.json")


def test_heads_fit_the_model_that_they_were_trained_on_however_it_was_converted() -> None:
    heads = tiny()
    assert heads.fit(header(sha256="12ab"))
    assert heads.fit(header(name="Sentence Transformers All MiniLM"))
    assert not heads.fit(header(name="multi-qa-minilm"))
    assert not heads.fit(header(name="all-minilm", width=4))
    assert not heads.fit(header())
    assert not heads.fit(header(name="all-minilm", sha256="34cd"))


def test_the_shipped_heads_fit_the_shipped_embedding_model(embedding_model: Path) -> None:
    assert load_heads().fit(read_header(embedding_model))
    assert load_heads().model == "all-minilm-l6-v2"


def test_the_shipped_heads_are_read_once() -> None:
    assert load_heads() is load_heads()
    assert set(load_heads().thresholds) == set(CATEGORIES)


@given(some_scores)
def test_one_chunk_is_the_text(scores: Scores) -> None:
    assert merged([scores]).values == pytest.approx(scores.values)


@given(st.lists(some_scores, max_size=8))
def test_more_chunks_must_be_surer(scores: list[Scores]) -> None:
    highest = Scores.merged(*scores).values
    together = merged(scores).values
    assert all(together[name] <= highest[name] + 1e-12 for name in CATEGORIES)
    assert all((together[name] == 1.0) == (highest[name] == 1.0) for name in CATEGORIES if len(scores) == 4)
    assert merged([*scores, *scores, *scores, *scores]).values == pytest.approx(
        {name: value / (value + 2 * (1 - value)) for name, value in together.items()}
    )


def test_no_number_of_chunks_hides_what_is_harmful() -> None:
    def padded(chunks: int) -> float:
        return merged([Scores.of({"hate": 0.9}), *[Scores.of({})] * (chunks - 1)]).values["hate"]

    assert 0.5 < padded(64) == padded(10_000) < padded(63)


def test_four_chunks_halve_the_odds() -> None:
    chunks = [Scores.of({"hate": 0.5}), *[Scores.of({})] * 3]
    assert merged(chunks).values["hate"] == pytest.approx(1 / 3)
    assert merged([]) == Scores.of({})
