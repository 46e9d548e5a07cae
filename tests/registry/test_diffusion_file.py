"""Files of diffusion models: what they say of themselves, what is missing, and that damage is an error of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from diffusion_tensors import (
    BYTES,
    CHECKPOINT,
    CLIP,
    DECODER,
    EDITORS,
    ENCODER,
    MODEL,
    PARTS,
    STEERED,
    TRANSFORMERS,
    UNETS,
    VIDEOS,
    Known,
    Shapes,
    prefixed,
    unet,
    write_parts,
    write_zeros,
)
from gguf_writer import F16, F32, Q4_0, Q8_0, File, Tensor, tiny_llama
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny_bert import write_safetensors
from tiny_diffusion import decoder_shapes, diffusion_shapes, text_shapes, write_model

from llamaserve.errors import GGUFError, ModelFileMissing, ModelNotCapable
from llamaserve.images.values import DiffusionParams, Part
from llamaserve.registry.diffusion_family import FLUX, KLEIN, SCHNELL, SD1, SD3
from llamaserve.registry.diffusion_file import DiffusionHeader, read_diffusion
from llamaserve.registry.gguf import _TENSOR_TYPES, LONG_TENSOR_NAME

KNOWN = TRANSFORMERS | UNETS | EDITORS
BLOCKS = {name: shape for name, shape in unet(768).items() if name != CLIP}  # of a U-Net without its encoder
TABLE = CLIP.removeprefix("cond_stage_model.transformer.")
LIN = "double_stream_modulation_img.lin.weight"  # of a FLUX.2 klein
CHILD = Path(__file__).with_name("running_diffusion.py")

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("stable_diffusion_cpp") is None or sys.platform == "darwin",
    reason="stable-diffusion-cpp-python is not installed, or uses Metal, which a forked process may not",
)


def whole(path: Path, shapes: Shapes = CHECKPOINT, dtype: str = "F16") -> DiffusionHeader:
    return read_diffusion(write_zeros(path / "model.safetensors", shapes, dtype))


def gguf(path: Path, *tensors: Tensor, **changes: Any) -> Path:
    path.write_bytes(File({}, tensors, **changes).bytes())
    return path


def whole_gguf(path: Path, block: str = MODEL + LIN, kind: int = F16, **changes: Any) -> Path:
    rest = [Tensor(name, (8,)) for name in ("text_encoders.llm.x", "vae.decoder.x")]
    return gguf(path, Tensor(block, (256, 4), kind, **changes), *rest)


def refused(path: Path, parts: Mapping[Part, Path] | None = None) -> str:
    with pytest.raises(GGUFError) as caught:
        read_diffusion(path, parts)
    return caught.value.message


# ---- sound files


def test_a_model_in_two_files_is_described(tmp_path: Path) -> None:
    model, decoder = write_model(tmp_path)
    header = read_diffusion(model, {"taesd": decoder})
    shapes = [*(diffusion_shapes() | text_shapes() | decoder_shapes()).values()]
    count, plain = (sum(math.prod(shape) for shape in some) for some in (shapes, [s for s in shapes if len(s) == 1]))
    assert (header.family, header.whole, header.path, header.parts) == (KLEIN, True, model, {"taesd": decoder})
    assert (header.parameter_count, header.weight_bytes, header.quantisation) == (count, 2 * count + 2 * plain, "F16")
    assert (header.paths, header.file_size) == (
        (model, decoder),
        model.stat().st_size + decoder.stat().st_size,
    )
    assert (header.encodes, header.decodes_small) == (True, True)
    assert header.tensors.keys() == {*diffusion_shapes(), *text_shapes(), *prefixed(decoder_shapes(), "tae.")}
    write_model(tmp_path, encoder=False)
    assert not read_diffusion(model, {"taesd": decoder}).encodes


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_transformer_is_known_with_its_prefix_and_without(tmp_path: Path, known: Known) -> None:
    parts = write_parts(tmp_path, known.family)
    for shapes, is_whole in ((known.shapes, False), (prefixed(known.shapes), True)):
        header = read_diffusion(write_zeros(tmp_path / "model.safetensors", shapes), parts)
        assert (header.family, header.whole) == (known.family, is_whole)
        assert header.tensors.keys() > {MODEL + name for name in known.shapes}
        assert (header.decodes_small, header.encodes) == (False, known.family.decodes)


@pytest.mark.parametrize("known", UNETS.values(), ids=UNETS)
def test_a_u_net_is_known_in_a_whole_file(tmp_path: Path, known: Known) -> None:
    header = whole(tmp_path, known.shapes | prefixed(DECODER, "first_stage_model."))
    assert (header.family, header.whole, header.parts, header.encodes) == (known.family, True, {}, False)


def test_parts_get_the_names_that_they_have_in_a_whole_file(tmp_path: Path) -> None:
    shapes = TRANSFORMERS["FLUX.1"].shapes
    parts: dict[Part, Path] = {
        "vae": write_zeros(tmp_path / "vae.safetensors", prefixed(DECODER, "vae.")),
        "taesd": write_zeros(tmp_path / "taesd.safetensors", DECODER),
        "llm_vision": write_zeros(tmp_path / "eyes.safetensors", {"patch.weight": (2, 2)}),
        **write_parts(tmp_path, FLUX, left_out="vae"),
    }
    header = read_diffusion(write_zeros(tmp_path / "model.safetensors", shapes), parts)
    assert header.tensors.keys() - {MODEL + name for name in shapes} == {
        "vae.decoder.conv_in.weight",
        "tae.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.llm.visual.patch.weight",
    }


@pytest.mark.parametrize(
    ("beginning", "other"),
    [
        ("diffusion_model.", MODEL),
        ("text_encoder.", "cond_stage_model.transformer."),
        ("text_encoder.2.", "cond_stage_model.1.transformer."),
        ("te.", "cond_stage_model.transformer."),
        ("te1.", "cond_stage_model.transformer."),
        ("te2.", "cond_stage_model.1.transformer."),
        ("te3.", "text_encoders.t5xxl.transformer."),
    ],
)
def test_names_that_begin_otherwise_get_those_of_the_library(tmp_path: Path, beginning: str, other: str) -> None:
    more = {beginning + "x": (2, 3), f"{MODEL}{beginning}y": (1,)}
    header = whole(tmp_path, CHECKPOINT | more)
    assert header.tensors.keys() == {*CHECKPOINT, other + "x", f"{MODEL}{beginning}y"}
    assert header.tensors[other + "x"].shape == (2, 3)
    vae = write_zeros(tmp_path / "vae", DECODER | more)
    assert f"vae.{beginning}x" in read_diffusion(header.path, {"vae": vae}).tensors


@pytest.mark.parametrize("beginning", ["te.", "te1.", "text_encoder."])
def test_a_u_net_is_known_by_an_encoder_of_another_name(tmp_path: Path, beginning: str) -> None:
    decoder = prefixed(DECODER, "vae.")
    assert whole(tmp_path, BLOCKS | {beginning + TABLE: (4, 768)} | decoder).family == SD1
    bare = {name.removeprefix("model."): shape for name, shape in BLOCKS.items()}
    header = whole(tmp_path, bare | {beginning + TABLE: (4, 768)} | decoder)
    assert (header.family, header.whole) == (SD1, True)


def test_encoders_of_a_u_net_take_the_place_of_those_in_its_file(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "model.safetensors", unet(768) | prefixed(DECODER, "vae."))
    clip_l = write_zeros(tmp_path / "l.safetensors", {"text_model.embeddings.token_embedding.weight": (9, 768)})
    clip_g = write_zeros(tmp_path / "g.safetensors", PARTS["clip_g"])
    header = read_diffusion(path, {"clip_l": clip_l})
    assert (header.family.name, header.tensors[CLIP].shape) == ("Stable Diffusion 1", (9, 768))
    header = read_diffusion(path, {"clip_l": clip_l, "clip_g": clip_g})
    assert header.family.name == "Stable Diffusion XL"
    assert "cond_stage_model.1.transformer.text_model.embeddings.token_embedding.weight" in header.tensors


def test_a_gguf_file_is_described_as_a_safetensors_file_is(tmp_path: Path) -> None:
    llm = gguf(tmp_path / "llm.gguf", Tensor("token_embd.weight", (32, 5), Q8_0))
    vae = write_zeros(tmp_path / "vae.safetensors", DECODER | ENCODER, "F32")
    norm = "img_in.norm.scale"
    model = gguf(tmp_path / "model.gguf", Tensor(LIN, (64, 3), Q4_0), Tensor(norm, (7,), F32))
    header = read_diffusion(model, {"llm": llm, "vae": vae})
    assert (header.family, header.whole, header.quantisation, header.encodes) == (KLEIN, False, "Q4_0", True)
    assert header.tensors[MODEL + LIN] == ((3, 64), "Q4_0", 6 * 18)
    assert header.parameter_count == 3 * 64 + 7 + 32 * 5 + 8 + 8
    assert header.weight_bytes == 6 * 18 + 7 * 4 + 5 * 34 + 16 * 4
    write_zeros(vae, {"decoder.conv_in.weight": (4, 2, 3, 3)}, "F32")
    assert read_diffusion(model, {"llm": llm, "vae": vae}).weight_bytes == 6 * 18 + 7 * 4 + 5 * 34 + 72 * 2
    assert header.file_size == sum(path.stat().st_size for path in (model, llm, vae))


@pytest.mark.parametrize(
    ("dtype", "size", "table"),
    [
        ("F32", 4, 4),
        ("F16", 2, 2),
        ("BF16", 2, 4),
        ("F8_E4M3", 2, 4),
        ("F8_E5M2", 2, 4),
        ("F64", 4, 4),
        ("I32", 4, 4),
        ("I64", 4, 4),
    ],
)
def test_weights_are_counted_as_they_are_in_memory(tmp_path: Path, dtype: str, size: int, table: int) -> None:
    shapes = {f"{MODEL}{LIN}": (6, 4), "text_encoders.llm.model.embed_tokens.weight": (4, 8), "vae.decoder.x": (4, 2)}
    header = whole(tmp_path, shapes, dtype)
    assert (header.quantisation, header.parameter_count) == (dtype, 6 * 4 + 4 * 8 + 4 * 2)
    assert header.weight_bytes == size * (6 * 4 + 4 * 2) + table * 4 * 8
    more = {f"{MODEL}img_in.bias": (5,), "vae.decoder.conv_in.weight": (2, 2, 3, 3), f"{MODEL}x": ()}
    assert whole(tmp_path, shapes | more, dtype).weight_bytes == header.weight_bytes + 5 * 4 + 36 * 2 + 4


def test_weights_that_are_not_loaded_take_no_memory(tmp_path: Path) -> None:
    weights = whole(tmp_path).weight_bytes
    idle = (
        "text_encoders.llm.lm_head.weight",
        "text_encoders.llm.output.weight",
        "model_ema.x",
        "first_stage_model.bn.x",
    )
    more = whole(tmp_path, CHECKPOINT | dict.fromkeys(idle, (3, 3)))
    assert (more.weight_bytes, more.parameter_count) == (weights, whole(tmp_path).parameter_count + 4 * 9)
    small = write_zeros(tmp_path / "taesd", {"decoder.x": (2, 2)})
    decoder = 2 * sum(math.prod(shape) for shape in DECODER.values())
    assert read_diffusion(tmp_path / "model.safetensors", {"taesd": small}).weight_bytes == weights - decoder + 8
    vae = write_zeros(tmp_path / "vae", DECODER)
    both = read_diffusion(tmp_path / "model.safetensors", {"taesd": small, "vae": vae})
    assert both.weight_bytes == weights + decoder + 8


def test_what_most_weights_of_the_diffusion_model_have_is_the_quantisation(tmp_path: Path) -> None:
    zeros = {
        f"{MODEL}{LIN}": ("F8_E4M3", (10, 10), bytes(100)),
        f"{MODEL}a": ("F32", (99,), bytes(396)),
        "text_encoders.llm.x": ("BF16", (1000,), bytes(2000)),
        "vae.decoder.x": ("F16", (500,), bytes(1000)),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(write_safetensors(zeros, __metadata__={"format": "pt"}))
    header = read_diffusion(path)
    assert (header.quantisation, header.parameter_count) == ("F8_E4M3", 1699)
    assert header.weight_bytes == 200 + 4 * 1599


@pytest.mark.parametrize(
    ("parts", "encodes", "small"),
    [
        ({"vae": DECODER | ENCODER}, True, False),
        ({"vae": DECODER}, False, False),
        ({"taesd": DECODER | ENCODER}, True, True),
        ({"taesd": DECODER}, False, True),
        ({"vae": DECODER | ENCODER, "taesd": DECODER}, True, False),
        ({"vae": DECODER, "taesd": DECODER | ENCODER}, False, False),
    ],
)
def test_pictures_are_encoded_by_what_also_decodes_them(
    tmp_path: Path, parts: dict[Part, Shapes], encodes: bool, small: bool
) -> None:
    paths = {part: write_zeros(tmp_path / part, shapes) for part, shapes in parts.items()}
    model = write_zeros(tmp_path / "model", {f"{MODEL}{LIN}": (4, 4)} | prefixed(PARTS["llm"], "text_encoders.llm."))
    header = read_diffusion(model, paths)
    assert (header.encodes, header.decodes_small) == (encodes, small)


# ---- what is missing, and what is none


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_what_is_missing_is_said(tmp_path: Path, known: Known) -> None:
    family, path = known.family, write_zeros(tmp_path / "model.safetensors", known.shapes)

    def lacking(parts: Mapping[Part, Path]) -> str:
        with pytest.raises(ModelNotCapable) as caught:
            read_diffusion(path, parts)
        return caught.value.message.removeprefix(f"{path} is a {family.name} model, and its ")

    for group in family.encoders:
        parts = {part: file for part, file in write_parts(tmp_path, family).items() if part not in group}
        assert lacking(parts) == f"text encoder is missing: name it under `parts`, as {' or '.join(group)}"
    if family.decodes:
        parts = write_parts(tmp_path, family, left_out="vae")
        assert lacking(parts) == "decoder is missing: name it under `parts`, as vae or taesd"
    assert lacking({}) == lacking({"llm_vision": write_zeros(tmp_path / "eyes", DECODER)})


@pytest.mark.parametrize("known", UNETS.values(), ids=UNETS)
def test_a_u_net_with_its_encoder_lacks_only_a_decoder(tmp_path: Path, known: Known) -> None:
    with pytest.raises(ModelNotCapable, match=rf"a {known.family.name} model, and its decoder is missing"):
        whole(tmp_path, known.shapes)
    assert whole(tmp_path, known.shapes | prefixed(DECODER, "vae.")).family == known.family


@pytest.mark.parametrize("part", ["clip_l", "clip_g", "t5xxl"])
def test_of_three_encoders_one_is_enough_for_stable_diffusion_3(tmp_path: Path, part: Part) -> None:
    path = write_zeros(tmp_path / "model.safetensors", TRANSFORMERS["SD3"].shapes)
    parts = {each: write_zeros(tmp_path / each, PARTS[each]) for each in (part, "vae")}
    assert read_diffusion(path, parts).family == SD3
    with pytest.raises(ModelNotCapable, match=r"as clip_l or clip_g or t5xxl$"):
        read_diffusion(path, {"vae": parts["vae"]})


def test_an_encoder_of_the_parts_stands_for_no_other(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, FLUX, left_out="t5xxl")
    for shapes in (TRANSFORMERS["FLUX.1"].shapes, prefixed(TRANSFORMERS["FLUX.1"].shapes)):
        path = write_zeros(tmp_path / "model.safetensors", shapes)
        with pytest.raises(ModelNotCapable, match=r"is a FLUX\.1 model, and its text encoder is missing: .* as t5xxl$"):
            read_diffusion(path, parts)
    write_zeros(path, prefixed(TRANSFORMERS["FLUX.1"].shapes) | {"text_encoders.t5xxl.transformer.x": (1,)})
    assert read_diffusion(path, parts).family == FLUX


def test_a_small_decoder_counts_only_as_a_part(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in CHECKPOINT.items() if "first_stage" not in name}
    with pytest.raises(ModelNotCapable, match="its decoder is missing: name it under `parts`, as vae or taesd"):
        whole(tmp_path, shapes | prefixed(DECODER, "tae."))
    small = write_zeros(tmp_path / "taesd", prefixed(DECODER, "tae."))
    assert read_diffusion(tmp_path / "model.safetensors", {"taesd": small}).decodes_small


@pytest.mark.parametrize("shapes", STEERED.values(), ids=STEERED)
def test_a_model_that_other_pictures_steer_is_refused(tmp_path: Path, shapes: Shapes) -> None:
    parts = write_parts(tmp_path, FLUX)
    for tensors in (shapes, prefixed(shapes)):
        path = write_zeros(tmp_path / "model.safetensors", tensors)
        with pytest.raises(ModelNotCapable, match=r"is a FLUX\.1 Control model, which needs pictures to steer it"):
            read_diffusion(path, parts)


def test_a_u_net_without_its_encoder_says_so(tmp_path: Path) -> None:
    parts = {part: write_zeros(tmp_path / part, PARTS[part]) for part in ("clip_l", "clip_g", "vae")}
    said = "holds a U-Net without its text encoder, and stable-diffusion.cpp takes these in one file only"
    for shapes in (BLOCKS, {name.removeprefix("model."): shape for name, shape in BLOCKS.items()}):
        path = write_zeros(tmp_path / "model.safetensors", shapes)
        assert refused(path) == refused(path, parts) == f"{path} {said}"


def test_an_encoder_in_a_file_with_the_diffusion_model_only_is_not_looked_for(tmp_path: Path) -> None:
    names = {"double_blocks.0.x": (1,), "te.x": (1,)}  # so it is no text encoder, but model.diffusion_model.te.x
    path = write_zeros(tmp_path / "model.safetensors", names)
    with pytest.raises(ModelNotCapable, match=r"is a FLUX\.1 schnell model, and its text encoder is missing"):
        read_diffusion(path, {"vae": write_zeros(tmp_path / "vae", DECODER)})
    assert read_diffusion(path, write_parts(tmp_path, SCHNELL)).family == SCHNELL


@pytest.mark.parametrize("shapes", VIDEOS.values(), ids=VIDEOS)
def test_models_of_moving_pictures_are_refused(tmp_path: Path, shapes: Shapes) -> None:
    parts = {part: write_zeros(tmp_path / part, PARTS[part]) for part in ("vae", "t5xxl")}
    for tensors in (shapes, prefixed(shapes)):
        path = write_zeros(tmp_path / "model.safetensors", tensors)
        with pytest.raises(ModelNotCapable, match="makes videos; only pictures are made here"):
            read_diffusion(path, parts)


@pytest.mark.parametrize(
    "shapes",
    [
        decoder_shapes(),
        {"text_model.embeddings.token_embedding.weight": (4, 768)},
        {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (4, 8)},
        {"unet.down_blocks.0.attentions.0.proj_in.lora.down.weight": (4, 8)},
        {"model.embed_tokens.weight": (8, 8), "lm_head.weight": (8, 8)},
        {"x": ()},
    ],
    ids=["decoder", "CLIP", "LoRA", "LoRA of diffusers", "language model", "scalar"],
)
def test_what_is_no_diffusion_model_is_refused_whatever_its_parts(tmp_path: Path, shapes: Shapes) -> None:
    path = write_zeros(tmp_path / "model.safetensors", shapes)
    for parts in ({}, write_parts(tmp_path, FLUX)):
        assert refused(path, parts) == f"{path} holds no diffusion model that stable-diffusion.cpp knows"


# ---- other files, and damaged ones


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has 0 bytes"),
        (b"GG", "has 2 bytes"),
        (b"junk" * 100, "its header should have"),
        (b"PK\x03\x04" + bytes(100), "its header should have"),
        (struct.pack("<Q", 2) + b"{}", "holds no weights"),
        (struct.pack("<Q", 1 << 62) + bytes(100), "its header should have"),
        (struct.pack("<Q", 3) + b"[[[", "its header cannot be read"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header cannot be read"),
        (b"GGUF", "is truncated"),
        (b"GGUF" + bytes(100), "version 0"),
        (File({}).bytes(), "holds no weights"),
        (File({}, [Tensor("a", (4,))] * 2).bytes(), "stands in it twice"),
        (File({}, [Tensor("a", (4,), 99, bytes(16))]).bytes(), "99"),
        (File({}, [Tensor("a", (4,))], tensor_count=1 << 62).bytes(), "tensor"),
        (File({}, metadata_count=1 << 62).bytes(), "metadata"),
        (File({}, [Tensor("a", (128,), 41, bytes(18))]).bytes(), "of the type Q1_0, which stable-diffusion.cpp lacks"),
        (File({}, [Tensor("a", (64,), 42, bytes(18))]).bytes(), "of the type Q2_0, which stable-diffusion.cpp lacks"),
        (tiny_llama(), "holds no diffusion model"),
    ],
)
def test_another_file_or_a_broken_one_is_refused_also_as_a_part(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    assert said in (message := refused(path))
    assert str(path) in message
    if data != tiny_llama():
        assert said in refused(write_zeros(tmp_path / "good", CHECKPOINT), {"llm": path})


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(write_safetensors({"": ("U8", (1,), b"1")}, f"{{{entry}, {entry}}}"))
    assert "its header has a name twice" in refused(path)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    good = write_zeros(tmp_path / "good", CHECKPOINT)
    messages: list[str] = []

    def read() -> None:
        for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
            messages.extend((refused(path), refused(good, {"vae": path})))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(messages) == 8
    assert all(message.endswith(" is no regular file") for message in messages)
    for name in ("a\0b", "a" * 300, "loop"):
        assert "cannot be read" in refused(tmp_path / name)
        assert "cannot be read" in refused(good, {"vae": tmp_path / name})
    for name in ("none", "good/inside"):
        for arguments in ((tmp_path / name,), (good, {"vae": tmp_path / name})):
            with pytest.raises(ModelFileMissing, match="does not exist"):
                read_diffusion(*arguments)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zeros(tmp_path / "model.safetensors", CHECKPOINT)

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refused(path) == f"{path} cannot be read: [Errno 13] Permission denied"


@pytest.mark.parametrize("number", [1, 2])
def test_a_gguf_file_in_parts_is_refused_and_one_alone_is_not(tmp_path: Path, number: int) -> None:
    path = whole_gguf(tmp_path / f"model-0000{number}-of-00002.gguf")
    assert refused(path) == f"{path} is one of 2 files, which stable-diffusion.cpp can't put together"
    assert "one of 2 files" in refused(whole_gguf(tmp_path / "good.gguf"), {"llm": path})
    assert read_diffusion(whole_gguf(tmp_path / "model-00001-of-00001.gguf")).family == KLEIN


@pytest.mark.parametrize("length", [63, 64, LONG_TENSOR_NAME])
def test_a_gguf_file_needs_no_architecture_and_may_have_long_names(tmp_path: Path, length: int) -> None:
    name = f"{MODEL}{LIN}".ljust(length, "x")
    header = read_diffusion(whole_gguf(tmp_path / "model.gguf", name))
    assert (header.family, len(name)) == (KLEIN, length)
    too_long = name.ljust(LONG_TENSOR_NAME + 1, "x")
    assert "128 bytes" in refused(whole_gguf(tmp_path / "model.gguf", too_long))


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "model", write_zeros(tmp_path / "good", CHECKPOINT)
    for data in (good.read_bytes(), whole_gguf(path).read_bytes()):
        for end in [*range(0, len(data), 41), len(data) - 1]:
            path.write_bytes(data[:end])
            assert refused(path)
            assert refused(good, {"vae": path})


SMALL = {
    "safetensors": write_safetensors(
        {
            f"{MODEL}joint_blocks.0.x": ("F16", (2, 2), bytes(8)),
            "te.x": ("F8_E4M3", (3,), b"123"),
            "vae.x": ("F32", (), bytes(4)),
        }
    ),
    "GGUF": File(
        {"general.alignment": 32},
        [Tensor(f"{MODEL}joint_blocks.0.x", (32, 2), Q4_0), Tensor("te.x", (3,)), Tensor("vae.x", (1,), F16)],
    ).bytes(),
}


@pytest.mark.parametrize("data", SMALL.values(), ids=SMALL)
@given(damage=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_error_of_ours(tmp_path: Path, data: bytes, damage: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(damage.draw(st.integers(0, 4))):
        changed[damage.draw(st.integers(0, len(data) - 1))] = damage.draw(st.integers(0, 255))
    path, good = tmp_path / "model", tmp_path / "good"
    path.write_bytes(changed[: damage.draw(st.just(len(data)) | st.integers(0, len(data)))])
    good.write_bytes(SMALL["safetensors"])
    for arguments in ((path,), (path, {"vae": good}), (good, {"llm_vision": path})):
        with contextlib.suppress(GGUFError, ModelNotCapable):
            header = read_diffusion(*arguments)
            assert header.weight_bytes >= 0 <= header.parameter_count
            assert header.quantisation
            assert header.encodes in (True, False)


# ---- with stable-diffusion.cpp itself


class Library:
    """stable-diffusion.cpp in a process of its own, which may end without harm."""

    def __init__(self) -> None:
        command = [sys.executable, str(CHILD)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, path: Path, parts: Mapping[Part, Path] | None = None, *, is_whole: bool = True) -> str:
        """Return what it takes the model in these files for, or what it complains of."""
        params = DiffusionParams(
            path=str(path),
            whole=is_whole,
            parts={part: str(each) for part, each in (parts or {}).items()},
            encodes=False,
            small_decoder=False,
            flash_attention=True,
            threads=1,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(params) + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().decode().strip()

    def of(self, header: DiffusionHeader) -> str:
        """The same for files that have been read."""
        return self(header.path, header.parts, is_whole=header.whole)

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    library = Library()
    yield library
    library.end()


@needs_library
@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_the_library_takes_a_model_for_one_of_the_same_family(tmp_path: Path, library: Library, known: Known) -> None:
    path, parts = tmp_path / "model.safetensors", {}
    if known in TRANSFORMERS.values():
        parts = write_parts(tmp_path, known.family)
        assert library.of(read_diffusion(write_zeros(path, prefixed(known.shapes)), parts)) == known.version
    assert (
        library.of(read_diffusion(write_zeros(path, known.shapes | prefixed(DECODER, "vae.")), parts)) == known.version
    )


@needs_library
@pytest.mark.parametrize(("version", "shapes"), VIDEOS.items(), ids=VIDEOS)
def test_the_library_makes_videos_with_what_is_refused_for_that(
    tmp_path: Path, library: Library, version: str, shapes: Shapes
) -> None:
    assert library(write_zeros(tmp_path / "model.safetensors", prefixed(shapes))) == version


@needs_library
@pytest.mark.parametrize(("version", "shapes"), STEERED.items(), ids=STEERED)
def test_the_library_knows_what_is_refused_for_being_steered(
    tmp_path: Path, library: Library, version: str, shapes: Shapes
) -> None:
    assert library(write_zeros(tmp_path / "model.safetensors", prefixed(shapes))) == version


@needs_library
@pytest.mark.parametrize("beginning", ["te.", "te1.", "text_encoder.", "diffusion_model."])
def test_the_library_renames_what_is_renamed_here(tmp_path: Path, library: Library, beginning: str) -> None:
    if beginning == "diffusion_model.":
        shapes = {name.removeprefix("model."): shape for name, shape in unet(768).items()}
    else:
        shapes = BLOCKS | {beginning + TABLE: (4, 768)}
    header = whole(tmp_path, shapes | prefixed(DECODER, "vae."))
    assert (header.family, library.of(header)) == (SD1, "SD 1.x")


@needs_library
def test_the_library_does_not_know_what_has_no_family_here(tmp_path: Path, library: Library) -> None:
    bare = {name.removeprefix(MODEL): shape for name, shape in BLOCKS.items()}
    parts = {part: write_zeros(tmp_path / part, PARTS[part]) for part in ("clip_l", "clip_g", "vae")}
    for shapes in (bare, BLOCKS, {"decoder.x": (2, 2)}, {f"{MODEL}x": (2, 2)}):
        path = write_zeros(tmp_path / "model.safetensors", shapes)
        said = "holds a U-Net without its text encoder" if shapes in (bare, BLOCKS) else "holds no diffusion model"
        assert said in refused(path, parts)
        for is_whole in (True, False):
            assert "get sd version from file failed" in library(path, parts, is_whole=is_whole)


@needs_library
@pytest.mark.parametrize("kind", sorted(set(_TENSOR_TYPES) - {41, 42}), ids=lambda kind: _TENSOR_TYPES[kind][0])
def test_the_library_reads_every_type_of_a_gguf_file_that_is_accepted(
    tmp_path: Path, library: Library, kind: int
) -> None:
    name, block, size = _TENSOR_TYPES[kind]
    header = read_diffusion(whole_gguf(tmp_path / "model.gguf", kind=kind, data=bytes(1024 // block * size)))
    assert (library.of(header), header.quantisation) == ("Flux.2 klein", name)


@needs_library
@pytest.mark.parametrize("dtype", BYTES)
def test_the_library_reads_every_type_of_a_safetensors_file(tmp_path: Path, library: Library, dtype: str) -> None:
    zeros = {name: ("F16", shape, bytes(2 * math.prod(shape))) for name, shape in CHECKPOINT.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(write_safetensors(zeros | {f"{MODEL}more": (dtype, (2, 2), bytes(4 * BYTES[dtype]))}))
    assert library.of(read_diffusion(path)) == "Flux.2 klein"


@needs_library
def test_the_library_reads_long_names_and_files_without_an_architecture(tmp_path: Path, library: Library) -> None:
    name = f"{MODEL}{LIN}"
    for length in (63, 64, LONG_TENSOR_NAME):
        assert (
            library.of(read_diffusion(whole_gguf(tmp_path / "model.gguf", name.ljust(length, "x")))) == "Flux.2 klein"
        )
