"""Pictures over HTTP: from prompts and other pictures, in all forms, as OpenAI's clients and others ask for them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from api_helpers import LIMIT
from image_helpers import (
    EDITS,
    GENERATIONS,
    PIL,
    VARIATIONS,
    all_events,
    differ,
    edit,
    file_of,
    generate,
    made,
    opened,
    photo,
    pixels,
    png,
    right_half,
)
from running_server import RunningServer

from llamaserve.api.options import IGNORED_HEADER, WARNING_HEADER

SMALL = (64, 64)  # what the model's settings say


@pytest.fixture
def sdk(image_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=image_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


# ---- from a prompt


@pytest.mark.parametrize("size", ["64x64", "128x64", "80x112"])
def test_three_pictures_have_just_the_size_that_is_asked_for(sdk: openai.OpenAI, size: str) -> None:
    answer = sdk.images.generate(model="tiny", prompt="a cat", n=3, size=size, response_format="b64_json")  # type: ignore[call-overload]
    assert len(answer.data) == 3
    pictures = [opened(file_of(each.to_dict())) for each in answer.data]
    assert {f"{image.width}x{image.height}" for image in pictures} == {size}
    assert {image.format for image in pictures} == {"PNG"}
    assert all(each.url is None for each in answer.data)
    assert answer.size == size
    assert answer.output_format == "png"
    one, other, _ = (pixels(file_of(each.to_dict())) for each in answer.data)
    assert differ(one, other) > 1


def test_a_seed_gives_the_same_picture_again_and_the_next_one_belongs_to_the_next_picture(
    image_server: RunningServer,
) -> None:
    three = generate(image_server, n=3, seed=5).json()["data"]
    again = generate(image_server, n=3, seed=5).json()["data"]
    assert [file_of(each) for each in three] == [file_of(each) for each in again]
    assert [each["seed"] for each in three] == [5, 6, 7]
    assert file_of(generate(image_server, seed=7).json()["data"][0]) == file_of(three[2])


def test_without_a_seed_each_picture_is_another(image_server: RunningServer) -> None:
    one, other = (generate(image_server, seed=-1).json()["data"][0] for _ in range(2))
    assert one["seed"] != other["seed"]
    assert differ(pixels(file_of(one)), pixels(file_of(other))) > 1
    again = generate(image_server, seed=one["seed"])
    assert differ(made(again), pixels(file_of(one))) == 0


def test_the_prompts_steps_guidance_and_sampler_change_the_picture(image_server: RunningServer) -> None:
    plain = made(generate(image_server))
    guided = made(generate(image_server, cfg_scale=4))
    assert differ(plain, made(generate(image_server, prompt="an orange tree"))) > 0.1
    assert differ(plain, guided) > 0.1
    assert differ(guided, made(generate(image_server, cfg_scale=4, negative_prompt="fog"))) > 0.1
    assert differ(plain, made(generate(image_server, steps=4))) > 0.01
    assert differ(plain, made(generate(image_server, sampler="euler_a"))) > 0.01
    assert differ(plain, made(generate(image_server, steps=3, scheduler="karras"))) > 0.001
    for same in ({"cfg_scale": 1}, {"cfg_scale": 0}, {"sampler": "Euler"}, {"steps": 2}):
        assert differ(plain, made(generate(image_server, **same))) == 0, same


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(image_server: RunningServer) -> None:
    response = generate(image_server, negative_prompt="fog")
    assert differ(made(response), made(generate(image_server))) == 0
    assert response.headers[IGNORED_HEADER] == "negative_prompt"
    assert generate(image_server, negative_prompt="fog", strict=True).status_code == 400
    assert IGNORED_HEADER not in generate(image_server, negative_prompt="fog", cfg_scale=2).headers


def test_a_link_leads_to_the_picture(image_server: RunningServer, sdk: openai.OpenAI) -> None:
    answer = sdk.images.generate(prompt="a cat", size="64x64", response_format="url", extra_body={"seed": 1})
    (picture,) = answer.data or ()
    assert picture.b64_json is None
    assert picture.url is not None
    fetched = httpx.get(picture.url)
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch(r"private, max-age=(3600|35\d\d)", fetched.headers["cache-control"])
    head = httpx.head(picture.url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(fetched.content))
    assert differ(pixels(fetched.content), made(generate(image_server, prompt="a cat"))) == 0
    assert re.fullmatch(re.escape(image_server.url) + r"/v1/images/files/[\w-]{32}\.png", picture.url)
    gone = httpx.get(picture.url[:-8] + "AAAA.png")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "image_not_found")


def test_an_answer_has_the_picture_and_a_link_unless_it_is_said_which(image_server: RunningServer) -> None:
    (both,) = generate(image_server).json()["data"]
    assert httpx.get(both["url"]).content == file_of(both)
    assert both["revised_prompt"] == "a lighthouse"
    (data,) = generate(image_server, response_format="data_url").json()["data"]
    head, _, body = data["url"].partition(",")
    assert head == "data:image/png;base64"
    assert file_of({"b64_json": body}) == file_of(both)
    assert "b64_json" not in data


@pytest.mark.parametrize(("kind", "media"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("JPG", "JPEG")])
def test_all_formats_tell_how_the_picture_was_made(image_server: RunningServer, kind: str, media: str) -> None:
    response = generate(image_server, output_format=kind, size="100x70", cfg_scale=2, negative_prompt="fög 雾")
    (picture,) = response.json()["data"]
    image = opened(file_of(picture))
    assert (image.format, image.size) == (media, (100, 70))
    assert httpx.get(picture["url"]).headers["content-type"] == f"image/{media.lower()}"
    if media == "PNG":
        told = image.info["parameters"]
    else:
        told = image.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    first, second, third = told.splitlines()
    assert first == "a lighthouse"
    assert second == "Negative prompt: fög 雾"
    assert third.startswith("Steps: 2, Sampler: euler, CFG scale: 2, Seed: 1, Size: 100x70, Model: tiny, Version: ")


def test_the_quality_of_a_file_is_up_to_the_client(image_server: RunningServer) -> None:
    sizes = {
        quality: len(
            file_of(generate(image_server, output_format="jpeg", output_compression=quality).json()["data"][0])
        )
        for quality in (10, 60, 100)
    }
    assert sizes[10] < sizes[60] < sizes[100]
    exact = made(generate(image_server))
    assert differ(exact, made(generate(image_server, output_format="webp", output_compression=100))) == 0
    assert 0 < differ(exact, made(generate(image_server, output_format="jpeg"))) < 3
    ignored = generate(image_server, output_compression=50).headers[IGNORED_HEADER]
    assert ignored == "output_compression"


def test_names_of_other_programs_mean_the_same(image_server: RunningServer) -> None:
    ours = generate(image_server, seed=9, n=2, sampler="dpm++2m", scheduler="karras", steps=3).json()["data"]
    theirs = httpx.post(
        image_server.url + GENERATIONS,
        json={
            "prompt": "a lighthouse",
            "image_seed": 9,
            "batch_size": 1,
            "batch_count": 2,
            "sampler_name": "DPM++ 2M Karras",
            "steps": 3,
            "size": "auto",
        },
        timeout=LIMIT,
    )
    assert [file_of(each) for each in theirs.json()["data"]] == [file_of(each) for each in ours]
    assert len(generate(image_server, batch_size=2, n=2).json()["data"]) == 2
    for wrong in ({"n": 2, "batch_size": 3}, {"n": 4, "batch_count": 3}, {"batch_count": 11}):
        assert generate(image_server, **wrong).status_code == 400, wrong


@pytest.mark.parametrize(("quality", "steps"), [("low", 1), ("medium", 2), ("standard", 2), ("hd", 4), ("high", 4)])
def test_quality_is_a_number_of_steps(image_server: RunningServer, quality: str, steps: int) -> None:
    response = generate(image_server, quality=quality)
    assert f"Steps: {steps}," in opened(file_of(response.json()["data"][0])).info["parameters"]
    assert response.json()["quality"] == quality


def test_steps_count_more_than_quality(image_server: RunningServer) -> None:
    response = generate(image_server, quality="high", steps=1)
    assert "Steps: 1," in opened(file_of(response.json()["data"][0])).info["parameters"]
    assert response.headers[IGNORED_HEADER] == "quality"


def test_a_size_that_the_model_cannot_make_is_cut_from_a_larger_one_or_refused(image_server: RunningServer) -> None:
    response = generate(image_server, size="100x70")
    whole = made(generate(image_server, size="112x80"))
    assert differ(made(response), whole[5:75, 6:106]) == 0
    assert (
        response.headers[WARNING_HEADER] == "the model can't make 100x70, so 112x80 is made and its edges are cut off"
    )
    refused = generate(image_server, size="100x70", size_policy="refuse")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "size")
    assert "112x80" in refused.json()["error"]["message"]
    exact = generate(image_server, size="112x80", size_policy="refuse")
    assert WARNING_HEADER not in exact.headers
    assert made(generate(image_server, size="16x20")).shape == (20, 16, 3)
    assert made(generate(image_server)).shape == (*SMALL, 3)


def test_a_lora_changes_the_pictures_that_name_it_and_no_others(image_server: RunningServer) -> None:
    plain = made(generate(image_server))
    styled = made(generate(image_server, prompt="a lighthouse<lora:style>"))
    assert differ(plain, styled) > 0.1
    assert differ(made(generate(image_server, prompt="a lighthouse<lora:style:0.5>")), styled) > 0.01
    assert differ(made(generate(image_server, prompt="a lighthouse<lora:style:0.4><lora:style:0.6>")), styled) < 0.01
    assert differ(made(generate(image_server)), plain) == 0
    told = opened(file_of(generate(image_server, prompt="a<lora:style:0.5>").json()["data"][0])).info["parameters"]
    assert "Lora: style:0.5" in told
    half = generate(image_server, prompt="a lighthouse<lora:水墨 (half)>")
    assert differ(made(half), styled) == 0
    said = "only 2 of 4 tensors of the LoRA '\\u6c34\\u58a8 (half)' are for this model"
    assert half.headers[WARNING_HEADER] == said
    assert WARNING_HEADER not in generate(image_server, prompt="a lighthouse<lora:style>").headers
    for trick in ("(a:<lora:style>.)", "(a:<lora:style>100000)", "BRE<lora:style:0>AK " * 17):
        response = generate(image_server, prompt=trick)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    for name, status in (("nobody", 400), ("../style", 400), ("style:nan", 400), ("style:99", 400), ("broken", 500)):
        response = generate(image_server, prompt=f"a lighthouse<lora:{name}>")
        assert response.status_code == status, response.text
    assert differ(made(generate(image_server)), plain) == 0


# ---- in a stream


def test_a_stream_has_progress_partial_pictures_and_the_picture(image_server: RunningServer) -> None:
    *told, done = all_events(image_server, steps=6, partial_images=2, size="100x70", n=2)
    assert done == "[DONE]"
    kinds = [each["type"].removeprefix("image_generation.") for each in told]
    steps = ["progress"] * 3 + ["partial_image"] + ["progress"] * 2 + ["partial_image"] + ["progress"] * 2
    assert [kind for kind in kinds if kind != "progress"] == ["partial_image", "partial_image", "completed"] * 2
    assert kinds.count("progress") == 2 * steps.count("progress")
    assert [each["index"] for each in told] == [0] * (len(told) // 2) + [1] * (len(told) // 2)
    progress = [(each["step"], each["steps"]) for each in told if each["type"].endswith("progress")]
    assert progress == [(step, 6) for step in range(7)] * 2
    whole = generate(image_server, steps=6, size="100x70", n=2).json()["data"]
    pictures = [each for each in told if each["type"].endswith("completed")]
    assert [file_of(each) for each in pictures] == [file_of(each) for each in whole]
    for each in told:
        if each["type"].endswith("partial_image"):
            assert opened(file_of(each)).size == (100, 70)
            assert each["partial_image_index"] in (0, 1)
            assert each["size"] == "100x70"
            assert differ(pixels(file_of(each)), pixels(file_of(whole[each["index"]]))) > 0.001


def test_the_sdk_reads_a_stream(sdk: openai.OpenAI) -> None:
    stream = sdk.images.generate(
        prompt="a cat",
        size="64x64",
        stream=True,
        partial_images=1,
        extra_body={"steps": 2, "response_format": "b64_json"},
    )
    events = [each for each in stream if not each.type.endswith("progress")]
    assert [each.type for each in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert all(opened(file_of(each.to_dict())).size == SMALL for each in events)


def test_a_model_of_one_step_shows_one_partial_picture(image_server: RunningServer) -> None:
    told = all_events(image_server, steps=1, partial_images=3)
    assert [each["type"] for each in told[:-1] if not each["type"].endswith("progress")] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]


def test_what_makes_no_sense_without_a_stream_is_said(image_server: RunningServer) -> None:
    assert generate(image_server, partial_images=2).headers[IGNORED_HEADER] == "partial_images"


# ---- from other pictures


def test_a_picture_is_edited_by_the_sdk(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(
        image=("a.png", photo()), prompt="at night", n=2, response_format="b64_json", extra_body={"seed": 1}
    )
    assert len(answer.data or ()) == 2
    assert {opened(file_of(each.to_dict())).size for each in answer.data or ()} == {(96, 64)}


def test_only_what_the_mask_lets_through_is_made_anew(image_server: RunningServer) -> None:
    original = pixels(photo())
    response = edit(image_server, files={"image": photo(), "mask": right_half()})
    edited = made(response)
    assert edited.shape == original.shape
    assert differ(edited[:, :48], original[:, :48]) == 0
    assert differ(edited[:, 48:], original[:, 48:]) > 10
    other = made(edit(image_server, files={"image": photo(), "mask": right_half()}, prompt="an orange tree"))
    assert differ(edited, other) > 0.01
    white = PIL.new("L", (96, 64), 0)
    white.paste(255, (48, 0, 96, 64))
    assert differ(made(edit(image_server, files={"image": photo(), "mask": png(white)})), edited) == 0


def test_what_the_model_looks_at_changes_the_picture(image_server: RunningServer) -> None:
    one, other = photo(), png(PIL.new("RGB", (96, 64), "red"))
    first = made(edit(image_server, files={"image": one}))
    assert differ(first, made(edit(image_server, files={"image": other}))) > 0.01
    both = [("image[]", ("a.png", one)), ("image[]", ("b.png", other))]
    assert differ(first, made(edit(image_server, files=both))) > 0.01
    assert differ(first, made(edit(image_server, files={"image": one}))) == 0


def test_an_edit_may_have_another_size(image_server: RunningServer) -> None:
    response = edit(image_server, files={"image": photo(), "mask": right_half()}, size="64x64")
    edited, original = made(response), pixels(photo())
    assert edited.shape == (64, 64, 3)
    assert differ(edited[:, :32], original[:, 16:48]) == 0
    assert response.headers[WARNING_HEADER] == "the picture of 96x64 is cut to the shape of 64x64"
    told = edit(image_server, files={"image": photo(96, 64)}, size="100x70", steps="1").headers[WARNING_HEADER]
    assert told.count("can't make 100x70") == 1


def test_a_photo_is_turned_and_made_smaller(image_server: RunningServer) -> None:
    image = PIL.new("RGB", (2000, 1000), "blue")
    exif = PIL.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    response = edit(image_server, files={"image": file.getvalue()}, size="auto")
    assert made(response).shape == (724, 362, 3)


def test_a_variation_is_like_the_picture(image_server: RunningServer, sdk: openai.OpenAI) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        answer = sdk.images.create_variation(image=("a.png", photo()), n=2, response_format="b64_json")
    assert [opened(file_of(each.to_dict())).size for each in answer.data or ()] == [(96, 64)] * 2
    one = made(edit(image_server, path=VARIATIONS, files={"image": photo()}, steps=8, strength=0.2))
    much = made(edit(image_server, path=VARIATIONS, files={"image": photo()}, steps=8, strength=1))
    assert differ(one, much) > 0.1
    told = edit(image_server, path=VARIATIONS, files={"image": photo()}).json()["data"][0]
    assert "Denoising strength: 0.75" in opened(file_of(told)).info["parameters"]


def test_strength_does_nothing_where_the_model_only_looks(image_server: RunningServer) -> None:
    response = edit(image_server, files={"image": photo()}, strength="0.3")
    assert response.headers[IGNORED_HEADER] == "strength"
    masked = edit(image_server, files={"image": photo(), "mask": right_half()}, strength="0.3")
    assert IGNORED_HEADER not in masked.headers


def test_little_strength_that_leaves_few_steps_is_said(image_server: RunningServer) -> None:
    photos = {"image": photo(64, 64)}
    response = edit(image_server, path=VARIATIONS, files=photos, steps="4", strength="0.001")
    assert response.headers[WARNING_HEADER] == "a strength of 0.001 leaves 1 of 4 steps"
    assert WARNING_HEADER not in edit(image_server, path=VARIATIONS, files=photos, steps="2", strength="0.01").headers
    lcm = {"scheduler": "lcm", "steps": "20"}
    assert edit(image_server, path=VARIATIONS, files=photos, strength="0.5", **lcm).status_code == 200
    refused = edit(image_server, path=VARIATIONS, files=photos, strength="0.3", **lcm)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "strength")


def test_an_edit_can_be_streamed(image_server: RunningServer) -> None:
    data = {"prompt": "at night", "stream": "true", "partial_images": "1", "steps": "2"}
    with httpx.stream("POST", image_server.url + EDITS, files={"image": photo()}, data=data, timeout=LIMIT) as response:
        text = response.read().decode()
    assert re.findall(r'"type":"(\w+\.\w+)"', text) == [
        "image_edit.progress",
        "image_edit.partial_image",
        "image_edit.progress",
        "image_edit.progress",
        "image_edit.completed",
    ]


# ---- what the model is, and is not


def test_the_model_is_listed_with_what_it_can_do(image_server: RunningServer) -> None:
    model = image_server.get("/v1/models/tiny")
    assert {name for name, can in model["capabilities"].items() if can} == {"image_generation", "image_editing"}
    assert model["architecture"] == {"input_modalities": ["text", "image"], "output_modalities": ["image"]}
    assert (model["meta"]["architecture"], model["meta"]["quantization"]) == ("FLUX.2 klein", "F16")
    info = image_server.get("/v1/internal/model/info")
    assert (info["loader"], info["gpu"]) == ("stable-diffusion.cpp", False)
    assert info["memory"]["measured"]["host"] < 1.1 * info["memory"]["estimated"]["host"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/v1/rerank", {"query": "Hi", "documents": ["Hi"]}),
        ("/v1/moderations", {"input": "Hi"}),
        ("/v1/internal/encode", {"text": "Hi"}),
    ],
)
def test_a_model_for_pictures_does_nothing_else(image_server: RunningServer, path: str, body: dict[str, Any]) -> None:
    response = image_server.post(path, {"model": "tiny", **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "model_not_capable"
    assert np.ptp(made(generate(image_server))) > 0


def test_other_models_make_no_pictures(image_server: RunningServer) -> None:
    response = generate(image_server, model="smollm2-135m")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "model_not_capable")
    assert generate(image_server, model="dall-e-2").status_code == 200
    assert generate(image_server, model="dall-e-3").status_code == 404
