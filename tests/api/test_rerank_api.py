"""``/v1/rerank`` with a random cross-encoder, whose scores numpy knows, and with an embedding model in its place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api_helpers import LIMIT, assert_error, is_error, unanswered
from hypothesis import HealthCheck, given, settings, strategies as st
from model_helpers import loaded, write_registry
from rank_model import CONTEXT, RankModel, pair
from running_server import RunningServer, wait_until

from llamaserve.api.options import IGNORED_HEADER

RERANK = "/v1/rerank"
METHOD, TRUNCATED = "x-llamaserve-rerank-method", "x-llamaserve-truncated"
QUERY = "What is the capital of France?"
DOCUMENTS = ["The sea is blue.", "Paris is the capital of France.", "A cat", "Berlin, capital of Germany", "xyz 42"]
MANY = [f"{DOCUMENTS[number % 5]} {'abcdefg' * (number % 4)} {number}" for number in range(60)]
ATOL = 1e-3  # llama.cpp's activation is a table: a number between two entries of it may be rounded the other way
MODEL, MODEL_OF_THREE = RankModel(), RankModel(labels=3, seed=2)


@pytest.fixture(scope="module")
def ranker(
    embedding_model: Path, starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with two cross-encoders, the starter models, and the embedding model a second time with prefixes."""
    folder = tmp_path_factory.mktemp("ranker")
    models: dict[str, Path | str] = {
        "smollm2-135m": starter_model,
        "minilm": embedding_model,
        "prefixed": f"source: 'file:{embedding_model}', prefixes: {{query: 'query: ', document: 'passage: '}}",
        "ranker": f"source: 'file:{MODEL.write(folder / 'ranker.gguf')}', flash_attention: off",
        "three": f"source: 'file:{MODEL_OF_THREE.write(folder / 'three.gguf')}', flash_attention: off",
        "fast": f"source: 'file:{folder / 'ranker.gguf'}'",
    }
    path = write_registry(folder / "models.yaml", models, "", aliases="bge: ranker")
    with RunningServer("serve", "ranker", "--models-file", str(path)) as running:
        yield running


def send(server: RunningServer, body: Any, path: str = RERANK) -> httpx.Response:
    """Send JSON that httpx refuses to write: NaN, half surrogate pairs."""
    return httpx.post(server.url + path, content=json.dumps(body).encode(), timeout=LIMIT, verify=False)


def rerank(server: RunningServer, documents: object = DOCUMENTS, **options: Any) -> dict[str, Any]:
    response = send(server, {"query": QUERY, "documents": documents, **options})
    assert response.status_code == 200, response.text[:500]
    body: dict[str, Any] = response.json()
    assert body["method"] == response.headers[METHOD]
    return body


def scores_of(body: dict[str, Any]) -> list[float]:
    """Return the scores in the order of the documents."""
    return [result["relevance_score"] for result in sorted(body["results"], key=lambda result: result["index"])]


def order_of(body: dict[str, Any]) -> list[int]:
    return [result["index"] for result in body["results"]]


def embeddings(server: RunningServer, texts: list[str], **options: Any) -> Any:
    data = server.post("/v1/embeddings", {"input": texts, "model": "minilm", **options}).json()["data"]
    return np.array([item["embedding"] for item in data])


# Cross-encoders


@pytest.mark.parametrize(("name", "model"), [("ranker", MODEL), ("three", MODEL_OF_THREE)])
def test_scores_are_those_of_numpy(ranker: RunningServer, name: str, model: RankModel) -> None:
    expected = [float(model.score(QUERY, document)[0]) for document in MANY]
    assert max(expected) - min(expected) > 0.3
    raw = rerank(ranker, MANY, model=name, raw_scores=True)
    np.testing.assert_allclose(scores_of(raw), expected, atol=ATOL)
    assert np.median(np.abs(np.array(scores_of(raw)) - expected)) < 3e-5
    assert raw["method"] == "cross_encoder"
    relevances = scores_of(rerank(ranker, MANY, model=name))
    np.testing.assert_allclose(relevances, [1 / (1 + math.exp(-score)) for score in expected], atol=ATOL)


def test_the_best_come_first_and_equals_in_their_order(ranker: RunningServer) -> None:
    documents = [*MANY, *MANY[::-1]]
    body = rerank(ranker, documents)
    scores = scores_of(body)
    assert order_of(body) == sorted(range(len(documents)), key=lambda index: (-scores[index], index))
    assert scores[:60] == scores[:59:-1]
    assert order_of(rerank(ranker, ["A cat"] * 40)) == list(range(40))


def test_order_and_scores_do_not_depend_on_the_batch(ranker: RunningServer) -> None:
    together = scores_of(rerank(ranker, MANY, model="fast"))
    order = np.random.default_rng(1).permutation(len(MANY))
    shuffled = scores_of(rerank(ranker, [MANY[number] for number in order], model="fast"))
    np.testing.assert_allclose(shuffled, np.array(together)[order], atol=1e-6)
    with ThreadPoolExecutor(4) as threads:
        alone = list(threads.map(lambda document: scores_of(rerank(ranker, [document], model="fast"))[0], MANY))
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_flash_attention_changes_little(ranker: RunningServer) -> None:
    expected = [float(model_score) for document in MANY for model_score in MODEL.score(QUERY, document)]
    np.testing.assert_allclose(scores_of(rerank(ranker, MANY, model="fast", raw_scores=True)), expected, atol=1e-2)


def test_usage_counts_each_pair(ranker: RunningServer) -> None:
    tokens = sum(len(pair(QUERY, document)) for document in DOCUMENTS)
    assert rerank(ranker)["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_usage_counts_equal_documents_once_as_they_are_evaluated(ranker: RunningServer) -> None:
    for model in ("ranker", "minilm"):
        assert rerank(ranker, DOCUMENTS * 3, model=model)["usage"] == rerank(ranker, model=model)["usage"]
    long = "a " * 100
    once = rerank(ranker, [long], truncate=True)
    twice = rerank(ranker, [long] * 2, truncate=True)
    assert twice["usage"] == once["usage"]
    assert [result["truncated_tokens"] for result in twice["results"]] == [once["results"][0]["truncated_tokens"]] * 2


def test_the_answer_has_the_shape_of_jina_and_cohere(ranker: RunningServer) -> None:
    body = rerank(ranker, return_documents=True)
    assert set(body) == {"id", "object", "model", "method", "results", "data", "usage"}
    assert body["data"] == body["results"]
    assert (body["object"], body["model"]) == ("list", "ranker")
    for result in body["results"]:
        assert result == {
            "index": result["index"],
            "relevance_score": result["relevance_score"],
            "document": {"text": DOCUMENTS[result["index"]]},
        }
    assert "document" not in rerank(ranker)["results"][0]


@pytest.mark.parametrize("number", [1, 3, 5, 100, 10**30])
def test_top_n(ranker: RunningServer, number: int) -> None:
    assert rerank(ranker, top_n=number)["results"] == rerank(ranker)["results"][:number]


def test_documents_may_be_objects_with_a_text(ranker: RunningServer) -> None:
    objects = [{"text": DOCUMENTS[0], "title": "x"}, *DOCUMENTS[1:]]
    response = send(ranker, {"query": QUERY, "documents": objects, "rank_fields": ["text"], "return_documents": True})
    assert response.json()["results"] == rerank(ranker, return_documents=True)["results"]
    assert response.headers[IGNORED_HEADER] == "documents.title"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking"])
def test_every_path_is_the_same(ranker: RunningServer, path: str) -> None:
    response = send(ranker, {"query": QUERY, "documents": DOCUMENTS}, path)
    assert response.json()["results"] == rerank(ranker)["results"]


def test_tei_s_shape_is_a_bare_list(ranker: RunningServer) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": False, "raw_scores": False, "return_text": False}
    response = send(ranker, body, "/rerank")
    expected = rerank(ranker)
    assert response.json() == [
        {"index": result["index"], "score": result["relevance_score"]} for result in expected["results"]
    ]
    assert response.headers[METHOD] == "cross_encoder"
    assert response.headers["x-compute-tokens"] == str(expected["usage"]["total_tokens"])
    assert IGNORED_HEADER not in response.headers
    raw = send(ranker, {**body, "raw_scores": True, "return_text": True, "top_n": 2}, "/rerank").json()
    assert [each["text"] for each in raw] == [DOCUMENTS[index] for index in order_of(expected)[:2]]
    np.testing.assert_allclose(raw[0]["score"], MODEL.score(QUERY, raw[0]["text"])[0], atol=ATOL)


# What is too long


def test_a_document_that_is_too_long_is_refused_by_its_place(ranker: RunningServer) -> None:
    for field in ("documents", "texts"):
        response = send(ranker, {"query": QUERY, field: ["A cat", "a " * CONTEXT]})
        message = assert_error(response, 400, "context_length_exceeded", f"{field}[1]")
        assert message.startswith(f"{field}[1] has")
        long_query = {"query": "a " * CONTEXT, field: DOCUMENTS, "truncate": True}
        assert_error(send(ranker, long_query), 400, "context_length_exceeded", "query")
        response = send(ranker, {"query": "A cat", field: ["x", "a " * 600], "model": "minilm"})
        assert_error(response, 400, "context_length_exceeded", f"{field}[1]")
        response = send(ranker, {"query": "a " * 600, field: ["x"], "model": "minilm"})
        assert_error(response, 400, "context_length_exceeded", "query")


@pytest.mark.parametrize("name", ["truncate", "truncation"])
@pytest.mark.parametrize("truncate", [True, "end", "END"])
def test_a_document_is_cut_on_request_and_that_is_reported(ranker: RunningServer, name: str, truncate: object) -> None:
    long = "a " * 100
    cut = len(pair(QUERY, long)) - CONTEXT
    body = rerank(ranker, ["A cat", long], raw_scores=True, **{name: truncate})
    assert {result["index"]: result.get("truncated_tokens") for result in body["results"]} == {0: None, 1: cut}
    assert body["usage"]["prompt_tokens"] == len(pair(QUERY, "A cat")) + CONTEXT
    assert body["usage"]["prompt_tokens_details"] == {"truncated_tokens": cut}
    np.testing.assert_allclose(scores_of(body)[1], MODEL.score(QUERY, "a " * (100 - cut))[0], atol=ATOL)
    response = send(ranker, {"query": QUERY, "texts": ["A cat", long], name: truncate})
    assert response.headers[TRUNCATED] == f"{cut} tokens"


# Embedding models


def test_an_embedding_model_takes_the_cosine_and_says_so(ranker: RunningServer) -> None:
    body = rerank(ranker, model="minilm", raw_scores=True)
    assert (body["method"], body["model"]) == ("embedding_cosine", "minilm")
    query, *documents = embeddings(ranker, [QUERY, *DOCUMENTS])
    np.testing.assert_allclose(scores_of(body), np.array(documents) @ query, atol=1e-5)
    assert order_of(body)[0] == 1
    assert (
        body["usage"]
        == ranker.post("/v1/embeddings", {"input": [QUERY, *DOCUMENTS], "model": "minilm"}).json()["usage"]
    )
    clipped = scores_of(rerank(ranker, model="minilm"))
    np.testing.assert_allclose(clipped, np.clip(scores_of(body), 0, 1), atol=1e-9)
    tei = send(ranker, {"query": QUERY, "texts": DOCUMENTS, "model": "minilm"})
    assert tei.headers[METHOD] == "embedding_cosine"
    assert [each["index"] for each in tei.json()] == order_of(body)


def test_an_embedding_model_gets_its_prefixes(ranker: RunningServer) -> None:
    body = rerank(ranker, model="prefixed", raw_scores=True)
    (query,) = embeddings(ranker, [QUERY], model="prefixed", input_type="query")
    documents = embeddings(ranker, DOCUMENTS, model="prefixed", input_type="document")
    np.testing.assert_allclose(scores_of(body), documents @ query, atol=1e-5)


def test_names_of_control_tokens_are_text_to_an_embedding_model_too(ranker: RunningServer) -> None:
    named = scores_of(rerank(ranker, ["a [SEP] b", "[PAD] x"], model="minilm", raw_scores=True))
    spaced = scores_of(rerank(ranker, ["a [ SEP ] b", "[ PAD ] x"], model="minilm", raw_scores=True))
    np.testing.assert_allclose(named, spaced, atol=1e-5)


def test_cosines_below_zero_are_no_relevance_and_keep_their_order(ranker: RunningServer) -> None:
    query, documents = (
        "stock market crash",
        ["cute kitten", "asdf qwer", "bananas are yellow", "the moon landing of 1969"],
    )
    request = {"query": query, "documents": documents * 10, "model": "minilm"}
    raw = send(ranker, {**request, "raw_scores": True}).json()
    clipped = send(ranker, request).json()
    assert order_of(raw) == order_of(clipped)
    assert min(scores_of(raw)) < 0
    assert min(scores_of(clipped)) == 0


# Models


def test_the_model_may_be_left_out_or_have_another_name(ranker: RunningServer) -> None:
    for options in ({}, {"model": None}, {"model": "bge"}):
        assert rerank(ranker, **options)["model"] == "ranker"


def test_models_that_are_not_there_or_can_t_rank(ranker: RunningServer) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS}
    assert_error(send(ranker, {**body, "model": "nothing"}), 404, "model_not_found", "model")
    assert_error(send(ranker, {**body, "model": "smollm2-135m"}), 400, "model_not_capable", "model")
    assert_error(ranker.post("/v1/embeddings", {"input": "x", "model": "ranker"}), 400, "model_not_capable", "model")
    assert "smollm2-135m" not in loaded(ranker)


def test_without_a_model_for_it_the_one_for_embeddings_does_it(
    embedding_model: Path, starter_model: Path, tmp_path: Path
) -> None:
    models: dict[str, Path | str] = {"smollm2-135m": starter_model, "minilm": embedding_model}
    path = write_registry(tmp_path / "models.yaml", models, "embedding_model: minilm")
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path)) as server:
        body = rerank(server)
        assert (body["model"], body["method"]) == ("minilm", "embedding_cosine")
        path.write_text(path.read_text().replace("embedding_model: minilm", ""))
        wait_until(lambda: send(server, {"query": QUERY, "documents": DOCUMENTS}).status_code == 503)
        message = assert_error(send(server, {"query": QUERY, "documents": DOCUMENTS}), 503, "model_not_loaded")
        assert "neither `rerank_model` nor `embedding_model`" in message


def test_a_model_stays_as_long_as_a_request_says(ranker: RunningServer) -> None:
    assert rerank(ranker, model="three", keep_alive="1h")["model"] == "three"
    assert "three" in loaded(ranker)
    assert rerank(ranker, model="three", keep_alive=0)["model"] == "three"
    wait_until(lambda: "three" not in loaded(ranker))


def test_a_client_that_leaves_holds_nobody_up(ranker: RunningServer) -> None:
    body = {"query": QUERY, "documents": ["a b c " * 160] * 1000, "model": "minilm"}
    with unanswered(ranker, RERANK, body):
        wait_until(lambda: ranker.running > 0)
    wait_until(lambda: ranker.running == 0, 3)
    assert rerank(ranker)["results"]


# Bodies that can't be right


@pytest.mark.parametrize("field", ["documents", "texts"])
@pytest.mark.parametrize(
    ("documents", "place"),
    [
        (5, ""),
        ("x", ""),
        ({}, ""),
        (True, ""),
        ([], ""),
        ([""], "[0]"),
        (["x", ""], "[1]"),
        ([{"text": ""}], "[0]"),
        (["x", {"title": "x"}], "[1]"),
        ([{"text": 5}], "[0]"),
        (["x", None], "[1]"),
        ([["x"]], "[0]"),
        (["x", 5], "[1]"),
        ([True], "[0]"),
        ([float("nan")], "[0]"),
        (["x", "a\ud800"], "[1]"),
        ([{"text": "\udfff"}], "[0]"),
        (["x"] * 1025, ""),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_documents_are_refused_by_their_place(
    ranker: RunningServer, field: str, documents: object, place: str
) -> None:
    assert_error(send(ranker, {"query": QUERY, field: documents}), 400, None, field + place)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("query", (None, "", 5, [], {}, True, "\ud800")),
        ("documents", (None,)),
        ("texts", (["x"],)),
        ("top_n", (0, -1, 1.5, "3", True, [], {}, float("nan"))),
        ("return_documents", ("x", [], {}, 7)),
        ("return_text", ("x", 7)),
        ("raw_scores", ("x", [], {}, 7)),
        ("truncate", (5, "yes", [], {})),
        ("model", (5, [], {}, True, "x" * 513, "\ud800")),
    ],
)
def test_wrong_values_are_refused_by_their_field(ranker: RunningServer, field: str, values: tuple[object, ...]) -> None:
    for value in values:
        assert_error(send(ranker, {"query": QUERY, "documents": DOCUMENTS, field: value}), 400, None, field)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens_per_doc": 100}, "max_tokens_per_doc"),
        ({"max_chunks_per_doc": 1}, "max_chunks_per_doc"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"truncate": "start"}, "truncate"),
        ({"truncation": "start"}, "truncation"),
        ({"truncate": True, "truncation_direction": "Left"}, "truncation_direction"),
        ({"strict": True, "nonsense": 1}, "nonsense"),
        ({"strict": True, "truncation_direction": "Right"}, "truncation_direction"),
    ],
)
def test_what_is_not_offered_is_refused(ranker: RunningServer, options: dict[str, Any], param: str) -> None:
    response = send(ranker, {"query": QUERY, "documents": DOCUMENTS, **options})
    assert_error(response, 400, "unsupported_parameter", param)


@pytest.mark.parametrize("depth", [500, 900, 100_000])
def test_deep_nesting(ranker: RunningServer, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for documents in (deep, f"[{deep}]", f'[{{"text": {deep}}}]', f'[{{"text": "x", "more": {deep}}}]'):
        content = f'{{"query": "x", "documents": {documents}, "return_documents": true}}'.encode()
        response = httpx.post(ranker.url + RERANK, content=content, timeout=LIMIT, verify=False)
        assert (response.status_code == 200 and "more" in documents) or is_error(response)


def test_odd_names_in_documents_are_no_headers(ranker: RunningServer) -> None:
    documents = [{"text": "x", name: 1} for name in ("\ud800", "\0", "", "x" * 9999, "é", "a\r\nb: c")]
    response = send(ranker, {"query": QUERY, "documents": documents})
    assert response.status_code == 200
    assert response.headers[IGNORED_HEADER].count("documents.") == len(documents)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    *("query", "documents", "texts", "model", "top_n", "return_documents", "raw_scores", "truncate"),
    *("truncation_direction", "rank_fields", "max_tokens_per_doc", "strict", "nonsense"),
)


@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_of_any_fields_are_answered_or_refused(ranker: RunningServer, fields: dict[str, Any]) -> None:
    response = send(ranker, {"query": QUERY, "documents": DOCUMENTS, **fields})
    assert response.status_code == 200 or is_error(response)
