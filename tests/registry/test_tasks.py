"""What a model is there for, and how its vectors are made: by its settings, or else by its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from encoder_files import encoder_file
from gguf_writer import STRING, Array, tiny_llama

from llamaserve.errors import ModelNotCapable
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec, Task
from llamaserve.registry.tasks import GENERATING, WORK, kind_of, pooling_of, task_of

MEAN, CLS, LAST, RANK = 1, 2, 3, 4  # llama_pooling_type


def decoder(folder: Path, **changes: Any) -> GGUFHeader:
    path = folder / "decoder.gguf"
    path.write_bytes(tiny_llama(**changes))
    return read_header(path)


def encoder(folder: Path, pooling: int | None = MEAN, *heads: tuple[int, ...], **changes: Any) -> GGUFHeader:
    """Return the header of a BERT; ``heads`` are the shapes of ``cls.output``."""
    more = [("cls.output.weight", shape) for shape in heads]
    return read_header(encoder_file(folder / "encoder.gguf", "bert", more, bert__pooling_type=pooling, **changes))


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec(source="file:/x.gguf", **fields)


def test_the_file_decides_where_the_settings_say_nothing(tmp_path: Path) -> None:
    assert task_of(spec(), decoder(tmp_path)) == "generation"
    assert task_of(spec(), decoder(tmp_path, llama__pooling_type=LAST)) == "embedding"
    assert task_of(spec(), decoder(tmp_path, llama__pooling_type=RANK)) == "rerank"
    assert task_of(spec(), encoder(tmp_path)) == "embedding"
    assert task_of(spec(), encoder(tmp_path, None)) == "embedding"
    assert task_of(spec(), encoder(tmp_path, RANK)) == "rerank"
    assert task_of(spec(), None) == "generation"


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("file:~/ggml-tiny.en.bin", "transcription"),
        ("file:models/GGML.BIN", "transcription"),
        ("hf:o/r/ggml-base-q5_1.bin@main", "transcription"),
        ("pypi:a==1/a/model.bin:F16", "transcription"),
        ("pypi:a==1/a/m.bin.part1+b==1/b/m.bin.part2:Q8_0", "transcription"),
        ("hf:o/r:Q5_1", "generation"),
        ("file:bin.gguf", "generation"),
        ("pypi:a==1/a/model.safetensors:F16", "generation"),
    ],
)
def test_files_for_whisper_cpp_are_for_speech_without_a_look_at_them(source: str, task: Task) -> None:
    assert task_of(ModelSpec(source=source), None) == task
    assert task_of(ModelSpec(source=source, task="rerank"), None) == "rerank"  # which loading it will refuse


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("file:~/flux2.safetensors", "image"),
        ("file:models/SD.SafeTensors", "image"),
        ("hf:o/r/v1-5.safetensors@main", "image"),
        ("pypi:a==1/a/model.safetensors:F16", "generation"),  # of which a GGUF file is made
        ("hf:o/r/flux2.gguf", "generation"),
        ("file:safetensors.gguf", "generation"),
        ("file:x.safetensors.bin", "transcription"),
    ],
)
def test_files_that_only_stable_diffusion_cpp_takes_are_for_images(source: str, task: Task) -> None:
    assert task_of(ModelSpec(source=source), None) == task
    kinds = {"image": "image", "transcription": "speech", "generation": "text"}
    assert kind_of(ModelSpec(source=source), parse_source(source, Path("/"))) == kinds[task]


@pytest.mark.parametrize("source", ["file:a.gguf", "file:a.safetensors", "file:a.bin", "hf:o/r:Q8_0", "file:a"])
def test_a_file_of_any_name_is_for_images_if_the_settings_say_so(source: str) -> None:
    parsed = parse_source(source, Path("/"))
    assert kind_of(ModelSpec(source=source, task="image"), parsed) == "image"
    assert kind_of(ModelSpec(source=source, task="generation"), parsed) != "image"


@pytest.mark.parametrize("task", get_args(Task))
def test_the_settings_win_over_the_file(task: Task, tmp_path: Path) -> None:
    for header in (None, decoder(tmp_path), encoder(tmp_path, RANK)):
        assert task_of(spec(task=task), header) == task
    assert WORK[task]


@pytest.mark.parametrize(("number", "pooling"), [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls"), (3, "last")])
def test_an_encoder_pools_as_its_file_says(number: int | None, pooling: str, tmp_path: Path) -> None:
    assert pooling_of(spec(), encoder(tmp_path, number)) == pooling
    assert pooling_of(spec(task="embedding"), encoder(tmp_path, number)) == pooling


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_settings_may_say_how_vectors_are_made(pooling: str, tmp_path: Path) -> None:
    assert pooling_of(spec(pooling=pooling), encoder(tmp_path)) == pooling
    assert pooling_of(spec(pooling=pooling, task="embedding"), decoder(tmp_path)) == pooling


def test_a_decoder_gives_the_mean_unless_it_was_made_for_another(tmp_path: Path) -> None:
    assert pooling_of(spec(task="embedding"), decoder(tmp_path)) == "mean"
    assert pooling_of(spec(), decoder(tmp_path, llama__pooling_type=LAST)) == "last"


@pytest.mark.parametrize("task", GENERATING)
def test_models_that_generate_text_pool_nothing_and_encoders_are_none(task: Task, tmp_path: Path) -> None:
    assert pooling_of(spec(task=task), decoder(tmp_path)) is None
    assert pooling_of(spec(task=task), decoder(tmp_path, llama__pooling_type=LAST)) is None
    with pytest.raises(ModelNotCapable, match="it is an encoder; it can't generate text"):
        pooling_of(spec(task=task), encoder(tmp_path))


def test_only_a_classification_head_can_score(tmp_path: Path) -> None:
    head = (64, 1)
    assert pooling_of(spec(), encoder(tmp_path, RANK, head)) == "rank"
    assert pooling_of(spec(task="rerank"), encoder(tmp_path, MEAN, head)) == "rank"
    for header in (encoder(tmp_path, RANK), decoder(tmp_path, llama__pooling_type=RANK)):
        with pytest.raises(ModelNotCapable, match="no classification head"):
            pooling_of(spec(), header)
    with pytest.raises(ModelNotCapable, match="no classification head"):
        pooling_of(spec(task="rerank"), decoder(tmp_path))


def test_a_head_must_have_an_output_for_each_label(tmp_path: Path) -> None:
    labels = Array(STRING, ["no", "maybe", "yes"])
    assert encoder(tmp_path, RANK, (64, 3), bert__classifier__output_labels=labels).gives_scores
    assert not encoder(tmp_path, RANK, (64, 1), bert__classifier__output_labels=labels).gives_scores
    assert not encoder(tmp_path, RANK, (64, 3)).gives_scores
    assert encoder(tmp_path, RANK, (64,)).gives_scores


def test_a_head_of_one_matrix_gives_as_many_scores_as_it_has_outputs(tmp_path: Path) -> None:
    """That of jina-reranker-v1; a larger matrix is only the layer before the scores."""
    for outputs, good in ((1, True), (64, False)):
        path = encoder_file(tmp_path / "jina.gguf", "jina-bert-v2", [("cls.weight", (64, outputs))])
        assert read_header(path).gives_scores is good


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for idle in ({"pooling": "mean"}, {"prefixes": {"query": "a"}}):
        for header in (encoder(tmp_path, RANK, (64, 1)), decoder(tmp_path)):
            with pytest.raises(ModelNotCapable, match="`pooling` and `prefixes` are for models that make embeddings"):
                pooling_of(spec(**idle), header)
    with pytest.raises(ModelNotCapable, match=r"none of whisper.cpp's \(.bin\), which alone transcribe speech"):
        pooling_of(spec(task="transcription"), decoder(tmp_path))
    with pytest.raises(ModelNotCapable, match="its file is none of a diffusion model"):
        pooling_of(spec(task="image"), decoder(tmp_path))
