"""The default classifier: its sentences, its training, what is measured, and that the shipped heads are of these."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from moderation import evaluation, training
from moderation.data import BENIGN, DANGEROUS, PEOPLE, Data, LongText, Sentence, read
from moderation.embedding import Vectors, embed
from moderation.evaluation import ALL, EASY, HARD, Counts, Material, Report
from moderation.tables import as_markdown, goals

from llamaserve.moderation.categories import CATEGORIES
from llamaserve.moderation.heads import FILE, load_heads

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 30
LEAST = {name: 12 if name in ("hate", "harassment", "violence", "sexual", "illicit") else 8 for name in CATEGORIES}
LEAST |= {BENIGN: 40, DANGEROUS: 60}


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


@pytest.fixture
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on made-up sentences that have few words."""
    monkeypatch.setattr(training, "BUCKETS", 16)


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_moderation", ROOT / "scripts" / "train_moderation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(count: int = 6) -> tuple[list[Sentence], Vectors]:
    """Return sentences of two styles, and vectors of which a number of its own is large for each category."""
    random = np.random.default_rng(3)
    sentences, vectors = [], []
    for style in ("one", "other"):
        for place, kind in enumerate((*CATEGORIES, BENIGN, PEOPLE, DANGEROUS)):
            for number in range(count):
                text = f"{kind.replace('/', ' ')} {style} {number}"
                sentences.append(Sentence(text, kind, style, hard=style == "other"))
                vectors.append(random.normal(0, 0.1, WIDTH))
                vectors[-1][place] += 1.0
    found = np.array(vectors)
    return sentences, (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


# The sentences


def test_every_style_has_enough_sentences_of_every_kind(data: Data) -> None:
    assert len(data.styles) >= 3
    counts = Counter((each.style, each.kind) for each in data.sentences)
    assert {each for style in data.styles for each in LEAST if counts[style, each] < LEAST[each]} == set()
    assert sum(each.kind == PEOPLE for each in data.sentences) >= 100
    data.check()


def test_a_style_has_longer_texts_of_both_sorts_or_none(data: Data) -> None:
    for style in data.styles:
        texts = [each for each in data.long_texts if each.style == style]
        harmless = sum(not each.categories for each in texts)
        assert not texts or min(harmless, len(texts) - harmless) >= 2
        assert all(80 <= len(each.text.split()) <= 250 for each in texts)


def test_sentences_are_sentences_and_none_is_within_a_longer_text(data: Data) -> None:
    for each in data.sentences:
        assert each.text == each.text.strip() == " ".join(each.text.split())
        assert 1 <= len(each.text.split()) <= 45, each.text
        assert not any(each.text in text.text for text in data.long_texts if len(each.text) > 20)


def test_there_are_about_as_many_harmless_sentences_as_harmful_ones(data: Data) -> None:
    assert 0.4 < sum(each.is_harmful for each in data.sentences) / len(data.sentences) < 0.6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("harmful: {hate: ['Be gone']}\nbenign: []\nbenign_dangerous: []\n", "long"),
        ("harmful: {rudeness: ['Oh']}\nbenign: []\nbenign_dangerous: []\nlong: []\n", "rudeness"),
        ("harmful: {}\nbenign: [1]\nbenign_dangerous: []\nlong: []\n", "str"),
        ("harmful: {}\nbenign: [Yes., YES.]\nbenign_dangerous: []\nlong: []\n", "twice"),
        ("harmful: {}\nbenign: []\nbenign_dangerous: []\nlong: [{text: a, categories: [spam]}]\n", "spam"),
        ("harmful: [", "style.yaml"),
    ],
)
def test_a_file_with_mistakes_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "style.yaml").write_text(content)
    with pytest.raises(ValueError, match=reason):
        read(tmp_path)


def test_too_few_sentences_of_a_kind_are_refused() -> None:
    sentences, _ = made_up()
    Data(sentences, []).check()
    with pytest.raises(ValueError, match=r"at least 10 sentences of each kind, and there are 2 of hate, 0 of benign$"):
        Data(
            [each for each in sentences if each.kind != BENIGN and (each.kind != "hate" or each.text[-1] == "1")], []
        ).check()


# Training


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_a_regression_ends_where_the_loss_has_no_slope(seed: int) -> None:
    random = np.random.default_rng(seed)
    features = random.normal(size=(40, 5))
    wanted = random.random((40, 3)) < 0.3
    learned_from = random.random((40, 3)) < 0.8
    found = training.regress(features, wanted, learned_from, penalty=1.0)
    wrong = learned_from * (training.sigmoid(found(features)) - wanted)
    assert np.abs(features.T @ wrong + found.weights).max() < 1e-3
    assert np.abs(wrong.sum(axis=0)).max() < 1e-2


def test_each_style_and_kind_is_spread_over_the_folds() -> None:
    sentences, _ = made_up()
    fold = training.folds(sentences, 1)
    assert (training.folds(sentences, 1) == fold).all()
    assert (training.folds(sentences, 2) != fold).any()
    for style, kind in {(each.style, each.kind) for each in sentences}:
        own = [place for place, each in enumerate(sentences) if (each.style, each.kind) == (style, kind)]
        assert max(Counter(fold[own].tolist()).values()) <= 2


@pytest.mark.usefixtures("few_buckets")
def test_training_is_the_same_each_time(script: ModuleType) -> None:
    sentences, vectors = made_up()
    words = training.words_of([each.text for each in sentences])
    one, other = (training.train(vectors, words, sentences).heads("m", "s", "d") for _ in range(2))
    assert script.encoded(one) == script.encoded(other)
    assert msgspec.json.decode(script.encoded(one), type=type(one)) == one


@pytest.mark.usefixtures("few_buckets")
def test_the_server_finds_what_training_found() -> None:
    sentences, vectors = made_up()
    words = training.words_of([each.text for each in sentences])
    classifier = training.train(vectors, words, sentences)
    heads = classifier.heads("m", "s", "d")
    logits = classifier.logits(vectors, words)
    for vector, sentence, logit in list(zip(vectors, sentences, logits, strict=True))[::7]:
        scores = heads.scores(vector.tolist(), sentence.text).values
        assert max(scores.values()) == pytest.approx(float(training.sigmoid(logit)), abs=0.005)
        if sentence.is_harmful:
            assert max(CATEGORIES, key=lambda name: (scores[name], name.count("/"))) == sentence.kind


@pytest.mark.usefixtures("few_buckets")
def test_few_of_those_that_only_look_dangerous_are_flagged() -> None:
    sentences, vectors = made_up(20)
    random = np.random.default_rng(4)
    vectors = vectors + random.normal(0, 0.4, vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = training.words_of(["" for _ in sentences])
    flagged = training.train(vectors, words, sentences).logits(vectors, words) >= 0
    only_look_so = np.array([each.kind == DANGEROUS for each in sentences])
    assert flagged[only_look_so].mean() <= 0.1
    assert flagged[[each.is_harmful for each in sentences]].mean() > 0.5


# Measuring


def counts(harmful: int, benign: int, dangerous: int) -> Counts:
    flagged = {"harmful": harmful, BENIGN: benign, PEOPLE: 0, DANGEROUS: dangerous}
    return Counts(flagged, {"harmful": 100, BENIGN: 50, PEOPLE: 50, DANGEROUS: 200})


def test_an_accuracy_is_the_share_that_is_judged_rightly() -> None:
    assert counts(90, 5, 20).accuracy == pytest.approx((90 + 45 + 50 + 180) / 400)
    assert counts(90, 5, 20).share(DANGEROUS) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "met"), [((90, 0, 20), True), ((90, 0, 21), False), ((39, 0, 0), False), ((40, 0, 0), True)]
)
def test_the_goals_are_met_by_the_worst_division(given: tuple[int, int, int], met: bool) -> None:
    good, worst = counts(100, 0, 0), counts(*given)
    report = Report([{EASY: good, ALL: good}, {EASY: worst, ALL: good}], {}, {}, {}, good, {})
    assert report.meets_goals is met
    assert ("met" in goals(report)) is met


def test_hard_sentences_are_counted_by_themselves() -> None:
    good, bad, false = counts(100, 0, 0), counts(20, 0, 20), counts(100, 0, 21)
    assert Report([{EASY: good, HARD: bad, ALL: bad}], {}, {}, {}, good, {}).meets_goals
    assert not Report([{EASY: bad, HARD: good, ALL: good}], {}, {}, {}, good, {}).meets_goals
    assert not Report([{EASY: good, HARD: good, ALL: false}], {}, {}, {}, good, {}).meets_goals


def test_a_few_sentences_are_not_measured() -> None:
    sentences, _ = made_up(10)
    Data(sentences, []).check(160)
    with pytest.raises(
        ValueError, match="at least 161 sentences that are not hard are needed to measure, and there are 160"
    ):
        Data(sentences, []).check(161)


def test_sentences_that_are_alike_are_in_one_fold() -> None:
    random = np.random.default_rng(5)
    vectors = random.normal(size=(300, WIDTH)).astype(np.float32)
    vectors[200:] = vectors[:100] + random.normal(0, 0.1, (100, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fold = training.grouped_folds(vectors)
    assert (fold[200:] == fold[:100]).all()
    assert max(Counter(fold.tolist()).values()) - min(Counter(fold.tolist()).values()) <= 2


@pytest.mark.usefixtures("few_buckets")
def test_everything_measured_is_told(
    embedding_model: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    def invent(texts: list[str], _file: Path) -> Vectors:
        return np.array([known.get(text, vectors[0]) for text in texts])

    sentences, vectors = made_up(5)
    known = {each.text: vector for each, vector in zip(sentences, vectors, strict=True)}
    monkeypatch.setattr(evaluation, "embed", invent)
    monkeypatch.setattr(evaluation, "_MIXED", {8: 3, 12: 1})
    monkeypatch.setattr(training, "_ALIKE", 0.999)
    monkeypatch.setattr(evaluation, "_SEEDS", range(1, 3))
    texts = [LongText("hate one 0", frozenset({"hate"}), "one"), LongText("benign one 0", frozenset(), "other")]
    data = Data(sentences, texts)
    said: list[str] = []
    report = evaluation.evaluate(Material.of(data, "m", "s", embedding_model), said.append)
    assert len(report.divisions) == 2
    assert report.parts == [EASY, HARD, ALL]
    assert all(counts.accuracy > 0.9 for part in report.parts for counts in report.of(part))
    assert [sum(each.all.values()) for each in report.of(HARD)] == [5 * (len(CATEGORIES) + 3)] * 2
    assert report.grouped.keys() == report.divisions[0].keys()
    assert report.mixed["8 sentences, with a harmful one"][1] == 3 * training.FOLDS
    assert set(report.mixed) == {
        f"{size} sentences, {what}"
        for size in (8, 12)
        for what in ("harmless", "harmless, a quarter of which look dangerous", "with a harmful one")
    }
    assert set(report.unseen) == {"one", "other"}
    assert report.categories["hate"].sentences == 20  # with those of its child
    assert report.categories["hate"].recall > 0.8
    assert report.long_texts.all == {"harmful": 1, BENIGN: 1}
    assert len(said) == 4 * training.FOLDS + 3
    told = as_markdown(report, data)
    assert all(f"| `{name}` |" in told for name in CATEGORIES)
    assert "| never seen: other |" in told


# What is shipped


def test_the_shipped_heads_have_learned_from_these_sentences(data: Data) -> None:
    assert load_heads().sentences == data.sha256, "run scripts/train_moderation.py"
    assert FILE.stat().st_size < 400_000


def test_the_shipped_heads_are_what_training_makes_of_these_sentences(data: Data, embedding_model: Path) -> None:
    trained, shipped = Material.of(data, "all-minilm-l6-v2", "", embedding_model).heads(), load_heads()
    pairs = [(trained.harm, shipped.harm)]
    pairs += [(trained.categories[name].harm, shipped.categories[name].harm) for name in CATEGORIES]
    for name in CATEGORIES:
        one, other = trained.categories[name].kind, shipped.categories[name].kind
        assert one.bias == pytest.approx(other.bias, abs=0.05)
        assert one.vector == pytest.approx(other.vector, abs=0.05)
    assert trained.strength == pytest.approx(shipped.strength, abs=0.02)
    assert trained.middle == pytest.approx(shipped.middle, abs=0.05)
    for one, other in pairs:
        assert one.products == pytest.approx(other.products, abs=0.05)
        assert one.bias == pytest.approx(other.bias, abs=0.05)
        assert one.vector == pytest.approx(other.vector, abs=0.05)
        assert one.words == pytest.approx(other.words, abs=0.05)


def test_vectors_have_a_length_of_one_whatever_the_text(embedding_model: Path) -> None:
    vectors = embed(["", "Hello.", "word " * 2000], embedding_model)
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_a_missing_folder_of_sentences_is_an_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_moderation.py", "--check", "--sentences", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .* no sentences"):
        script.main()


@pytest.mark.usefixtures("few_buckets", "embedding_model")
def test_heads_that_are_not_good_enough_are_not_written(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences, _ = made_up(10)
    harmful = {name: [each.text for each in sentences if each.kind == name] for name in CATEGORIES}
    harmless = {kind: [each.text for each in sentences if each.kind == kind] for kind in (BENIGN, DANGEROUS)}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"harmful": harmful, **harmless, "long": []}))
    monkeypatch.setattr(evaluation, "_MIXED", {})
    monkeypatch.setattr(training, "_ALIKE", 0.999)
    monkeypatch.setattr(evaluation, "_SEEDS", range(1, 2))
    written = tmp_path / "heads.json"
    monkeypatch.setattr(sys, "argv", ["train", "--sentences", str(tmp_path), "--output", str(written)])
    with pytest.raises(SystemExit, match=r"error: at least 400 sentences that are not hard .* there are 300"):
        script.main()
    monkeypatch.setattr(script, "LEAST_SENTENCES", 300)
    monkeypatch.setattr(evaluation, "LEAST_ACCURACY", 1.1)
    with pytest.raises(SystemExit, match=r"1"):
        script.main()
    assert "goals MISSED" in capsys.readouterr().err
    assert not written.exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--quick"])
    script.main()
    assert load_heads(written).model == "all-minilm-l6-v2"
