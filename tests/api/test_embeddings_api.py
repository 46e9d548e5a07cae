"""``/v1/embeddings`` with a real model: vectors, their forms and their order, what is counted, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
from api_helpers import LIMIT, assert_error, is_error, unanswered
from hypothesis import HealthCheck, given, settings, strategies as st
from langchain_openai import OpenAIEmbeddings
from model_helpers import loaded, write_registry
from running_server import RunningServer, wait_until

from llamaserve.api.options import IGNORED_HEADER

EMBEDDINGS = "/v1/embeddings"
WIDTH, CONTEXT = 384, 512
HELLO, HELLO_IDS = "hello world", [101, 7592, 2088, 102]  # between the tokens [CLS] and [SEP]
TEXTS = [
    "A cat sits on the mat.",
    "Un chat est assis.",
    HELLO,
    "Stock markets fell sharply today.",
    "x",
    "A kitten sits.",
]
LONG = "word " * 600

Vectors = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def embedder(
    embedding_model: Path, starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with the starter models, and the embedding model a second time with prefixes, and with little time."""
    source = f"source: 'file:{embedding_model}'"
    models: dict[str, Path | str] = {
        "smollm2-135m": starter_model,
        "minilm": source,
        "prefixed": f"{source}, prefixes: {{query: 'query: ', document: 'passage: ', plain: 'text: '}}",
        "hasty": f"{source}, time_limit: 0.02",
    }
    path = write_registry(tmp_path_factory.mktemp("embedder") / "models.yaml", models, "", aliases="ada: minilm")
    with RunningServer("serve", "minilm", "--models-file", str(path)) as running:
        yield running


@pytest.fixture
def sdk(embedder: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=embedder.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def send(server: RunningServer, body: Any) -> httpx.Response:
    """Send JSON that httpx refuses to write: NaN, half surrogate pairs."""
    return httpx.post(server.url + EMBEDDINGS, content=json.dumps(body).encode(), timeout=LIMIT, verify=False)


def answer(server: RunningServer, inputs: object, **options: Any) -> dict[str, Any]:
    response = server.post(EMBEDDINGS, {"model": "minilm", "input": inputs, **options})
    assert response.status_code == 200, response.text[:500]
    body: dict[str, Any] = response.json()
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    assert {item["object"] for item in body["data"]} == {"embedding"}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"]
    return body


def vectors(server: RunningServer, inputs: object, **options: Any) -> Vectors:
    data = answer(server, inputs, **options)["data"]
    return np.array([item["embedding"] for item in data], np.float64).astype(np.float32)


# What comes back


def test_vectors_have_a_length_of_one_and_mean_something(embedder: RunningServer) -> None:
    found = vectors(embedder, TEXTS)
    assert found.shape == (len(TEXTS), WIDTH)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    cosines = found @ found[0]
    assert cosines[5] > 0.6  # the kitten
    assert cosines[5] == sorted(cosines)[-2]
    assert cosines[3] < 0.2


def test_base64_has_the_same_numbers(embedder: RunningServer) -> None:
    floats = answer(embedder, TEXTS)
    coded = answer(embedder, TEXTS, encoding_format="base64")
    for plain, packed in zip(floats["data"], coded["data"], strict=True):
        numbers = np.frombuffer(base64.b64decode(packed["embedding"], validate=True), "<f4")
        assert numbers.astype(np.float64).tolist() == plain["embedding"]
    assert floats["usage"] == coded["usage"]


def test_the_answer_has_openai_s_shape(embedder: RunningServer) -> None:
    body = answer(embedder, HELLO, user="somebody")
    assert set(body) == {"object", "data", "model", "usage"}
    assert (body["object"], body["model"]) == ("list", "minilm")
    assert set(body["data"][0]) == {"object", "index", "embedding"}
    assert body["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_order_and_vectors_do_not_depend_on_the_batch(embedder: RunningServer) -> None:
    texts = [" ".join(TEXTS[: 1 + number % len(TEXTS)]) + f" {number}" for number in range(60)]
    together = vectors(embedder, texts)
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = vectors(embedder, [texts[number] for number in order])
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)
    for number in (0, 17, 59):
        np.testing.assert_allclose(vectors(embedder, texts[number])[0], together[number], atol=1e-5)


def test_many_requests_at_once_get_their_own_vectors(embedder: RunningServer) -> None:
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS]
    together = vectors(embedder, texts)
    with ThreadPoolExecutor(8) as threads:
        alone = list(threads.map(lambda text: vectors(embedder, text)[0], texts))
    np.testing.assert_allclose(np.array(alone), together, atol=1e-5)


def test_dimensions_are_the_first_ones_with_a_length_of_one(embedder: RunningServer) -> None:
    whole = vectors(embedder, TEXTS)
    for number in (1, 2, 100, WIDTH):
        first = whole[:, :number] / np.linalg.norm(whole[:, :number], axis=1, keepdims=True)
        np.testing.assert_allclose(vectors(embedder, TEXTS, dimensions=number), first, atol=1e-6)
    (item,) = answer(embedder, HELLO, output_dimension=7, embedding_type="base64")["data"]
    assert len(base64.b64decode(item["embedding"])) == 7 * 4


@pytest.mark.parametrize("name", ["dimensions", "output_dimension"])
def test_more_dimensions_than_the_model_has_are_refused(embedder: RunningServer, name: str) -> None:
    response = send(embedder, {"input": HELLO, name: WIDTH + 1})
    assert str(WIDTH) in assert_error(response, 400, None, name)


def test_token_ids_are_taken_as_they_are(embedder: RunningServer) -> None:
    text = vectors(embedder, HELLO)
    np.testing.assert_allclose(vectors(embedder, HELLO_IDS), text, atol=1e-6)
    np.testing.assert_allclose(vectors(embedder, [HELLO_IDS, HELLO, HELLO_IDS]), text.repeat(3, axis=0), atol=1e-6)
    bare = answer(embedder, HELLO_IDS[1:3])
    assert bare["usage"]["prompt_tokens"] == 2
    assert abs(float(np.array(bare["data"][0]["embedding"]) @ text[0])) < 0.999


@pytest.mark.parametrize("name", ["[SEP]", "[CLS]", "[PAD]"])
def test_names_of_control_tokens_in_texts_are_text(embedder: RunningServer, name: str) -> None:
    assert answer(embedder, name)["usage"]["prompt_tokens"] >= 5
    spaced = "[ " + name.strip("[]") + " ]"
    np.testing.assert_allclose(vectors(embedder, f"a {name} b"), vectors(embedder, f"a {spaced} b"), atol=1e-5)


def test_usage_counts_all_tokens(embedder: RunningServer) -> None:
    assert answer(embedder, [HELLO, HELLO_IDS, [7592]])["usage"]["prompt_tokens"] == 4 + 4 + 1


def test_as_many_inputs_as_may_be(embedder: RunningServer) -> None:
    found = vectors(embedder, [HELLO_IDS, [7592]] * 1024, dimensions=3)
    assert found.shape == (2048, 3)
    np.testing.assert_allclose(found[::2], found[:1].repeat(1024, axis=0), atol=1e-5)


# Texts that are too long


def test_a_text_that_is_too_long_is_refused_by_its_place(embedder: RunningServer) -> None:
    for inputs, place in (
        (LONG, "input"),
        ([HELLO, LONG], "input[1]"),
        ([7592] * 600, "input"),
        ([[1] * 600], "input[0]"),
    ):
        message = assert_error(send(embedder, {"input": inputs}), 400, "context_length_exceeded", place)
        assert message.startswith(f"{place} has")
        assert str(CONTEXT) in message


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"truncate": True}, True),
        ({"truncation": True}, True),
        ({"truncate": "END"}, True),
        ({"truncate": "end", "truncation_direction": "left"}, True),
        ({"truncate": True, "truncation_direction": "Right"}, True),
        ({"truncate": True, "truncation_direction": "Left"}, False),
        ({"truncate": "start"}, False),
    ],
)
def test_a_text_is_cut_on_request_and_that_is_reported(
    embedder: RunningServer, options: dict[str, Any], end: bool
) -> None:
    ids = [101, *([2773] * 600), 7592, 102]
    assert answer(embedder, "word " * 509 + HELLO.split()[0])["usage"]["prompt_tokens"] == CONTEXT
    body = answer(embedder, [HELLO, LONG + "hello"], **options)
    assert body["usage"] == {
        "prompt_tokens": 4 + CONTEXT,
        "total_tokens": 4 + CONTEXT,
        "prompt_tokens_details": {"truncated_tokens": len(ids) - CONTEXT},
    }
    assert ["truncated_tokens" in item for item in body["data"]] == [False, True]
    assert body["data"][1]["truncated_tokens"] == len(ids) - CONTEXT
    kept = [*ids[: CONTEXT - 1], 102] if end else [101, *ids[-CONTEXT + 1 :]]
    np.testing.assert_allclose(body["data"][1]["embedding"], vectors(embedder, kept)[0], atol=1e-5)


@pytest.mark.parametrize("truncate", [False, "none", "NONE", None])
def test_nothing_is_cut_without_a_request(embedder: RunningServer, truncate: object) -> None:
    for name in ("truncate", "truncation"):
        assert_error(send(embedder, {"input": LONG, name: truncate}), 400, "context_length_exceeded", "input")


# Kinds of texts


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, "text: "),
        ({"input_type": "classification"}, "text: "),
        ({"input_type": "query"}, "query: "),
        ({"input_type": "SEARCH_QUERY"}, "query: "),
        ({"task": "retrieval.query"}, "query: "),
        ({"prompt_name": "passage"}, "passage: "),
        ({"input_type": "search_document"}, "passage: "),
    ],
)
def test_prefixes_are_put_before_texts_of_their_kind(
    embedder: RunningServer, options: dict[str, Any], prefix: str
) -> None:
    found = vectors(embedder, [HELLO, "cat"], model="prefixed", **options)
    np.testing.assert_allclose(found, vectors(embedder, [prefix + HELLO, prefix + "cat"]), atol=1e-5)
    np.testing.assert_allclose(vectors(embedder, [HELLO_IDS], model="prefixed"), vectors(embedder, HELLO), atol=1e-5)


def test_token_ids_have_no_kind(embedder: RunningServer) -> None:
    for inputs in (HELLO_IDS, [HELLO, HELLO_IDS]):
        assert_error(send(embedder, {"input": inputs, "input_type": "query"}), 400, None, "input_type")
    assert_error(send(embedder, {"input": HELLO_IDS, "task": "retrieval.query"}), 400, None, "task")


# Fields that are not offered, or do nothing


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({}, None),
        ({"user": "u", "metadata": {}, "normalize": True, "embedding_types": ["float"], "late_chunking": False}, None),
        ({"nonsense": 1, "a b": 2}, "nonsense, a?b"),
        ({"truncation_direction": "Right"}, "truncation_direction"),
        ({"truncate": "end", "truncation_direction": "left"}, "truncation_direction"),
        ({"input_type": "query", "task": "retrieval.passage"}, "task"),
        ({"dimensions": 3, "output_dimension": 5}, "output_dimension"),
        ({"truncate": True, "truncation": False}, "truncation"),
    ],
)
def test_what_has_no_effect_is_named(embedder: RunningServer, options: dict[str, Any], ignored: str | None) -> None:
    response = send(embedder, {"input": HELLO, **options})
    assert response.status_code == 200, response.text
    assert response.headers.get(IGNORED_HEADER) == ignored
    strict = send(embedder, {"input": HELLO, "strict": True, **options})
    if ignored is None:
        assert strict.status_code == 200
    else:
        assert_error(strict, 400, "unsupported_parameter", ignored.split(",")[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalize", False),
        ("normalized", 0),
        ("embd_normalize", -1),
        ("output_dtype", "int8"),
        ("embedding_types", ["float", "int8"]),
        ("late_chunking", True),
        ("return_multivector", True),
        ("add_special_tokens", False),
        ("late_chunking", [[[[]]]]),
    ],
)
def test_what_is_not_offered_is_refused(embedder: RunningServer, name: str, value: object) -> None:
    assert_error(send(embedder, {"input": HELLO, name: value}), 400, "unsupported_parameter", name)


# Models


def test_the_model_may_be_left_out_or_have_another_name(embedder: RunningServer) -> None:
    for options in ({}, {"model": None}, {"model": "ada"}, {"model": "minilm"}):
        response = send(embedder, {"input": HELLO, **options})
        assert response.status_code == 200, response.text
        assert response.json()["model"] == "minilm"


def test_models_that_are_not_there_or_make_no_vectors(embedder: RunningServer) -> None:
    assert_error(send(embedder, {"input": HELLO, "model": "nothing"}), 404, "model_not_found", "model")
    assert_error(send(embedder, {"input": HELLO, "model": "smollm2-135m"}), 400, "model_not_capable", "model")
    assert "smollm2-135m" not in loaded(embedder)


def test_a_model_that_makes_vectors_generates_nothing(embedder: RunningServer) -> None:
    messages = [{"role": "user", "content": HELLO}]
    for path, body in (("/v1/chat/completions", {"messages": messages}), ("/v1/completions", {"prompt": HELLO})):
        for stream in (False, True):
            named = embedder.post(path, {**body, "model": "minilm", "stream": stream})
            assert_error(named, 400, "model_not_capable", "model")
            assert_error(embedder.post(path, {**body, "stream": stream}), 400, "model_not_capable", None)


def test_a_model_stays_as_long_as_a_request_says(embedder: RunningServer) -> None:
    assert vectors(embedder, HELLO, model="prefixed", keep_alive="1h").shape == (1, WIDTH)
    assert "prefixed" in loaded(embedder)
    assert vectors(embedder, HELLO, model="prefixed", keep_alive=0).shape == (1, WIDTH)
    wait_until(lambda: "prefixed" not in loaded(embedder))


def test_a_request_that_takes_too_long_is_given_up(embedder: RunningServer) -> None:
    message = assert_error(
        send(embedder, {"input": [f"{'word ' * 400} {number}" for number in range(200)], "model": "hasty"}),
        504,
        "time_limit_exceeded",
    )
    assert "0.02 seconds" in message
    assert send(embedder, {"input": "x", "model": "hasty"}).status_code in {200, 504}


def test_a_client_that_leaves_holds_nobody_up(embedder: RunningServer) -> None:
    with unanswered(embedder, EMBEDDINGS, {"input": [f"{'word ' * 400} {number}" for number in range(500)]}):
        wait_until(lambda: embedder.running > 0)
    wait_until(lambda: embedder.running == 0, 3)
    assert vectors(embedder, HELLO).shape == (1, WIDTH)


# Bodies that can't be right


@pytest.mark.parametrize(
    ("inputs", "place"),
    [
        (None, "input"),
        (5, "input"),
        (True, "input"),
        (1.5, "input"),
        ({}, "input"),
        ({"text": "x"}, "input"),
        ("", "input"),
        ([], "input"),
        ([""], "input[0]"),
        (["x", ""], "input[1]"),
        ([[]], "input[0]"),
        ([[1], []], "input[1]"),
        ([None], "input[0]"),
        (["x", None], "input[1]"),
        (["x", 1], "input[1]"),
        (["x", {"text": "x"}], "input[1]"),
        ([1.5], "input[0]"),
        ([float("nan")], "input[0]"),
        ([1, "x"], "input[1]"),
        ([1, float("inf")], "input[1]"),
        ([True], "input[0]"),
        ([1, False], "input[1]"),
        ([-1], "input[0]"),
        ([1, 2**31], "input[1]"),
        ([10**400], "input[0]"),
        ([[1], [2, True]], "input[1][1]"),
        ([["x"]], "input[0][0]"),
        ([[[1]]], "input[0][0]"),
        (["x", [1, [2]]], "input[1][1]"),
        ("a\ud800b", "input"),
        (["x", "\udfff"], "input[1]"),
        (["x"] * 2049, "input"),
        ([[1]] * 2049, "input"),
        ([1] * (2**20 + 1), "input"),
        ([[1] * 2**19] * 3, "input"),
        ([30522], "input"),
        (["x", [101, 30522]], "input[1]"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_inputs_are_refused_by_their_place(embedder: RunningServer, inputs: object, place: str) -> None:
    message = assert_error(send(embedder, {"input": inputs}), 400, None, place)
    assert "<" not in message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("encoding_format", ("", "int8", 5, [], {}, True, "\ud800")),
        ("embedding_type", ("binary", 5)),
        ("dimensions", (0, -1, 1.5, "3", True, [], {}, 2**63, 10**400, float("nan"))),
        ("truncate", (5, 1, "yes", "", [], {}, "\ud800")),
        ("truncation_direction", (5, True, "up", [], {})),
        ("input_type", ("", "image", 5, True, [], {}, "\ud800")),
        ("task", ("code.query",)),
        ("keep_alive", ("x", [], {}, float("inf"), "\ud800")),
        ("strict", ("x", [], {}, 7)),
        ("model", (5, [], {}, True, "x" * 513, "\ud800")),
    ],
)
def test_wrong_values_are_refused_by_their_field(
    embedder: RunningServer, field: str, values: tuple[object, ...]
) -> None:
    for value in values:
        assert_error(send(embedder, {"input": HELLO, field: value}), 400, None, field)


@pytest.mark.parametrize("depth", [500, 900, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(embedder: RunningServer, opening: str, depth: int) -> None:
    deep = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    for field in ("input", "dimensions", "truncate", "late_chunking", "nonsense"):
        start = "" if field == "input" else '"input": "x", '
        content = f'{{{start}"{field}": {deep}}}'.encode()
        response = httpx.post(embedder.url + EMBEDDINGS, content=content, timeout=LIMIT, verify=False)
        assert (response.status_code == 200 and field == "nonsense") or is_error(response)


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
    *(
        "input",
        "model",
        "encoding_format",
        "dimensions",
        "truncate",
        "truncation_direction",
        "input_type",
        "keep_alive",
    ),
    *("strict", "user", "normalize", "embedding_types", "late_chunking", "nonsense"),
)


@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_of_any_fields_are_answered_or_refused(embedder: RunningServer, fields: dict[str, Any]) -> None:
    response = send(embedder, {"input": HELLO, **fields})
    assert response.status_code == 200 or is_error(response)


# Clients


def test_the_sdk_s_defaults_work(embedder: RunningServer, sdk: openai.OpenAI) -> None:
    found = sdk.embeddings.create(model="minilm", input=TEXTS)
    assert found.model == "minilm"
    assert found.usage.prompt_tokens > len(TEXTS)
    assert [item.index for item in found.data] == list(range(len(TEXTS)))
    np.testing.assert_array_equal(
        np.array([item.embedding for item in found.data], np.float32), vectors(embedder, TEXTS)
    )
    plain = sdk.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    assert [item.embedding for item in plain.data] == [item.embedding for item in found.data]


def test_the_sdk_s_dimensions_and_token_ids(sdk: openai.OpenAI) -> None:
    short = sdk.embeddings.create(model="minilm", input=HELLO, dimensions=16)
    assert len(short.data[0].embedding) == 16
    ids = sdk.embeddings.create(model="minilm", input=[HELLO_IDS, HELLO_IDS], dimensions=16)
    np.testing.assert_allclose([item.embedding for item in ids.data], [short.data[0].embedding] * 2, atol=1e-6)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.embeddings.create(model="minilm", input=["x", ""])
    assert caught.value.param == "input[1]"


def test_langchain_finds_what_a_question_is_about(embedder: RunningServer) -> None:
    with httpx.Client(timeout=LIMIT) as connections:
        chain = OpenAIEmbeddings(
            base_url=embedder.url + "/v1",
            api_key="none",
            model="minilm",
            check_embedding_ctx_length=False,
            http_client=connections,
        )
        documents = np.array(chain.embed_documents(["The cat sleeps.", "Paris is the capital of France.", "2 + 2 = 4"]))
        query = np.array(chain.embed_query("Which city is France's capital?"))
    assert int((documents @ query).argmax()) == 1
