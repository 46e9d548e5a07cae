"""Requests for pictures that can't be answered: wrong fields, hostile words and files, damaged models, no library."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_helpers import LIMIT, assert_error
from image_helpers import EDITS, GENERATIONS, PIL, VARIATIONS, edit, generate, made, photo, png, right_half
from running_server import RunningServer
from tiny_diffusion import decoder_shapes, diffusion_shapes, image_entry, text_shapes, write_safetensors

from llamaserve.errors import NotSupported
from llamaserve.images.pictures import MOST_PIXELS


@pytest.fixture(autouse=True)
def _nobody_is_hurt(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the same process is there, and does nothing."""
    if "image_server" not in request.fixturenames:
        yield
        return
    server: RunningServer = request.getfixturevalue("image_server")
    if server.get("/v1/internal/model/info")["pid"] is None:
        generate(server)
    before = server.worker_pid()
    yield
    assert server.worker_pid() == before
    assert server.running == 0


def test_after_all_that_pictures_are_made(image_server: RunningServer) -> None:
    for _ in range(3):
        generate(image_server, prompt="(a:.)")
        edit(image_server, files={"image": b"nothing"})
    assert made(generate(image_server)).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *[({"size": size}, "size") for size in ("0x0", "-1x64", "64x-1", "1000000x1000000", "64", "64x", "x", "8x64")],
        *[
            ({"size": size}, "size")
            for size in ("4096x4096", "99999999999999x64", 64, ["64", "64"], "64x64x64", "6e1x64")
        ],
        *[({"n": n}, "n") for n in (0, -1, 11, 10**6, 1.5, "many")],
        *[({"steps": steps}, "steps") for steps in (0, -1, 151, 10**9)],
        *[({"cfg_scale": scale}, "cfg_scale") for scale in (-1, 101, "much", 1e400)],
        *[({"seed": seed}, "seed") for seed in (-2, 2**53, 1e300, "x")],
        *[({"image_seed": seed}, "image_seed") for seed in (-2, 2**63)],
        ({"seed": 2**53 - 3, "n": 4}, "seed"),
        ({"image_seed": 2**53 - 1, "batch_size": 2}, "image_seed"),
        ({"sampler": "nothing"}, "sampler"),
        ({"sampler_name": 7}, "sampler_name"),
        ({"scheduler": "nothing"}, "scheduler"),
        ({"scheduler": "ays"}, "scheduler"),
        ({"scheduler": "karras", "steps": 1}, "scheduler"),
        ({"sampler": "Euler Karras", "steps": 1}, "sampler"),
        ({"scheduler": "gits", "steps": 1}, "scheduler"),
        ({"scheduler": "lcm", "steps": 51}, "scheduler"),
        ({"scheduler": "smoothstep", "steps": 76}, "scheduler"),
        ({"sampler": "Euler Karras", "scheduler": "simple"}, "scheduler"),
        ({"size": "\u0666\u0664x64"}, "size"),
        ({"quality": "best"}, "quality"),
        ({"response_format": "file"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"partial_images": 4}, "partial_images"),
        ({"size_policy": "stretch"}, "size_policy"),
        ({"background": "transparent"}, "background"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"negative_prompt": "x" * 100_000, "cfg_scale": 2}, "negative_prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "a BREAK " * 17}, "prompt"),
        ({"prompt": "(B(REAK:1):-1)a" * 17}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        *[({"prompt": f"(a:{weight})"}, "prompt") for weight in (".", "9" * 60, "..1", "-.")],
        *[({"prompt": f"(a:0.{'0' * zeros}1)"}, "prompt") for zeros in (4, 60, 400, 4000)],
        ({"prompt": "(a) b:.)"}, "prompt"),
        *[({"prompt": text}, "prompt") for text in ("(" * 49 + "a", "[" * 73 + "a", "(((a:9) b:9) c:9)", "((a:100))")],
        *[({"prompt": f"a<lora:{name}>"}, "prompt") for name in ("x", "../x", "/etc/passwd", "a/b", ".", "x" * 5000)],
        ({"keep_alive": "soon"}, "keep_alive"),
    ],
)
def test_a_wrong_field_is_named(image_server: RunningServer, fields: dict[str, Any], param: str) -> None:
    body = {"prompt": "a lighthouse", **fields}
    response = httpx.post(image_server.url + GENERATIONS, content=_json(body), timeout=LIMIT)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 1000


def _json(body: dict[str, Any]) -> bytes:
    import json

    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "",
            " ",
            "(" * 48 + "a",
            ")" * 4000,
            "[" * 72 + "a",
            "([" * 2000,
            "\\(" * 2000,
            "(a:1.3)" * 200,
            "\\" * 2000,
            "BREAK " * 16,
            "B" * 3000,
        ),
        *(
            "(a:100)",
            "(a:-5)",
            "(a:0)",
            "(a:-0.00)",
            "(a:nan)",
            "(a:+)",
            "time 12:30)",
            "smile :.)",
            "(: 1.5)",
            "(a:1.2.3)",
        ),
        *("\U0001f600" * 1000, "\u0301" * 800, "\n\r\t\x01\x7f", "<|im_end|>" * 200, "<lora:>", "<lora", "%s%n" * 500),
    ],
)
def test_odd_prompts_are_drawn(image_server: RunningServer, prompt: str) -> None:
    if prompt == "(a:1.2.3)":
        assert generate(image_server, prompt=prompt).status_code == 400
        return
    assert made(generate(image_server, prompt=prompt, steps=1)).shape == (64, 64, 3)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"prompt": "a", "n": ', b"\xff\xfe"])
def test_bodies_that_are_no_request(image_server: RunningServer, body: bytes) -> None:
    response = httpx.post(image_server.url + GENERATIONS, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["x", "x" * 5000, "..%2f..%2fetc%2fpasswd", "a.png", "%00", "."])
def test_links_that_lead_nowhere(image_server: RunningServer, name: str) -> None:
    assert httpx.get(f"{image_server.url}/v1/images/files/{name}").status_code == 404


# ---- uploads


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB with so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packer = zlib.compressobj(9)
    rows = b"".join([packer.compress(bytes(width // 8 + 1)) for _ in range(min(height, 20_000))])
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.new("RGB", (width, height), "red").save(file, "JPEG")
    return file.getvalue()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"this is no picture at all",
    "an SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a PDF": lambda: b"%PDF-1.4\n%%EOF",
    "half a PNG": lambda: photo(512, 512)[:1000],
    "half a JPEG": lambda: jpeg(512, 512)[:700],
    "a PNG with wrong sums": lambda: photo().replace(b"IDAT", b"IDAX"),
    "too many pixels": lambda: bomb(60_000, 60_000),
    "many pixels": lambda: bomb(MOST_PIXELS // 1000 + 1, 1000),
    "too slim": lambda: png(PIL.new("RGB", (2000, 3))),
    "an EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "a TIFF": lambda: b"II*\x00\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("kind", list(HOSTILE))
@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_file_that_is_no_good_picture_is_refused(image_server: RunningServer, kind: str, field: str) -> None:
    files = {"image": photo(512, 512), "mask": right_half(512, 512)} | {field: HOSTILE[kind]()}
    response = edit(image_server, files={name: (name, data) for name, data in files.items()})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("size", [(95, 64), (96, 65), (1, 1), (64, 96), (960, 640)])
def test_a_mask_of_another_size_is_refused(image_server: RunningServer, size: tuple[int, int]) -> None:
    response = edit(image_server, files={"image": photo(), "mask": right_half(*size)})
    said = assert_error(response, 400, None, "mask")
    assert said == f"the mask must have the size of the picture, 96x64, and has {size[0]}x{size[1]}"


def test_a_mask_that_lets_nothing_through_is_refused(image_server: RunningServer) -> None:
    for mask in (PIL.new("RGBA", (96, 64), "red"), PIL.new("L", (96, 64), 0), PIL.new("RGB", (96, 64))):
        response = edit(image_server, files={"image": photo(), "mask": png(mask)})
        assert response.status_code == 400
        assert "nothing in the mask is transparent" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "files", "data", "param"),
    [
        (EDITS, [], {"prompt": "a"}, "image"),
        (EDITS, [("image", ("a", photo()))], {}, "prompt"),
        (EDITS, [("image", (None, "text"))], {"prompt": "a"}, "image"),
        (EDITS, [("image", ("a", photo())), ("mask", (None, "text"))], {"prompt": "a"}, "mask"),
        (EDITS, [("image", ("a", photo()))] + [("mask", ("m", right_half()))] * 2, {"prompt": "a"}, "mask"),
        (EDITS, [("image", ("a", photo()))], {"prompt": "a", "strength": "2"}, "strength"),
        (EDITS, [("image", ("a", photo()))], {"prompt": "a", "size": "0x0"}, "size"),
        (VARIATIONS, [], {"n": "1"}, "image"),
        (VARIATIONS, [("image", ("a", photo()))] * 2, {}, "image"),
    ],
)
def test_a_form_that_lacks_something_is_refused(
    image_server: RunningServer, path: str, files: Any, data: dict[str, str], param: str
) -> None:
    files = [*files, ("unknown", (None, "x"))]
    response = httpx.post(image_server.url + path, files=files, data=data, timeout=LIMIT)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_no_form_and_too_many_files_are_refused(image_server: RunningServer) -> None:
    response = httpx.post(image_server.url + EDITS, json={"prompt": "a"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "image")
    many = [("image[]", ("a", photo()))] * 18
    response = httpx.post(image_server.url + EDITS, files=many, data={"prompt": "a"}, timeout=LIMIT)
    assert response.status_code == 400


def test_only_forms_may_be_as_large_as_files(image_server: RunningServer) -> None:
    response = httpx.post(image_server.url + GENERATIONS, content=b" " * 17_000_000, timeout=LIMIT)
    assert_error(response, 413, "body_too_large", None)


def test_all_files_are_looked_at_before_one_is_decoded(image_server: RunningServer) -> None:
    wrong = {"image": jpeg(512, 512)[:700], "mask": right_half()}
    assert_error(edit(image_server, files=wrong), 400, None, "mask")
    strict = edit(image_server, files={"image": b"no picture"}, strength="0.5", strict="true")
    assert_error(strict, 400, "unsupported_parameter", "strength")


# ---- models


def cut(path: Path, share: float) -> Path:
    """Return a copy of the beginning of a file."""
    target = path.with_name(f"cut-{share:g}-{path.name}")
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return target


@pytest.fixture(scope="module")
def broken(
    image_model: tuple[Path, Path], starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with models that can't be loaded, each in its way, and one that can."""
    folder = tmp_path_factory.mktemp("broken")
    model, decoder = image_model
    (folder / "junk.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "junk.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 40)
    (folder / "empty.safetensors").write_bytes(b"")
    write_safetensors(folder / "narrow.safetensors", diffusion_shapes(64) | text_shapes())
    write_safetensors(folder / "lacking.safetensors", _without(diffusion_shapes() | text_shapes(), "txt_in"))
    write_safetensors(folder / "odd.safetensors", _without(decoder_shapes(), "decoder.layers.0.weight"))
    entries = {
        "good": image_entry(image_model, "steps: 1, size: 64x64"),
        "junk": image_entry((folder / "junk.safetensors", decoder), ""),
        "junk-gguf": image_entry((folder / "junk.gguf", decoder), ""),
        "empty": image_entry((folder / "empty.safetensors", decoder), ""),
        "cut": image_entry((cut(model, 0.5), decoder), ""),
        "cut-head": image_entry((cut(model, 0.0001), decoder), ""),
        "cut-decoder": image_entry((model, cut(decoder, 0.5)), ""),
        "chat": image_entry((starter_model, decoder), ""),
        "decoder": image_entry((decoder, decoder), ""),
        "narrow": image_entry((folder / "narrow.safetensors", decoder), ""),
        "lacking": image_entry((folder / "lacking.safetensors", decoder), ""),
        "odd": image_entry((model, folder / "odd.safetensors"), ""),
        "chat-as-part": image_entry((model, starter_model), ""),
        "whole": f"{{source: 'file:{model}'}}",
    }
    models = folder / "models.yaml"
    models.write_text("models:\n" + "".join(f"  {name}: {entry}\n" for name, entry in entries.items()))
    with RunningServer("serve", "good", "--models-file", str(models)) as running:
        yield running


def _without(shapes: dict[str, Any], name: str) -> dict[str, Any]:
    return {each: shape for each, shape in shapes.items() if name not in each}


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *[(name, 500) for name in ("junk", "junk-gguf", "empty", "cut", "cut-head", "cut-decoder", "chat", "decoder")],
        *[(name, 500) for name in ("lacking", "narrow", "odd", "chat-as-part")],
        ("whole", 400),
    ],
)
def test_a_file_that_is_no_good_model_is_an_error(broken: RunningServer, name: str, status: int) -> None:
    for _ in range(2):
        response = generate(broken, model=name)
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] in {"model_file_invalid", "model_load_failed", "model_not_capable"}
    assert made(generate(broken, model="good")).shape == (64, 64, 3)
    assert broken.get(f"/v1/models/{name}")["status"]["value"] == "unloaded"


# ---- without the library


_WITHOUT = """
import importlib.metadata as metadata

there = metadata.version

def version(name):
    if name.startswith("stable-diffusion"):
        raise metadata.PackageNotFoundError(name)
    return there(name)

metadata.version = version
"""


def test_without_the_library_a_command_is_named_that_installs_it(
    starter_model: Path, image_model: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_WITHOUT)
    models = tmp_path / "models.yaml"
    models.write_text(
        f"models:\n  tiny: {image_entry(image_model, '')}\n  starter: {{source: 'file:{starter_model}'}}\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    with RunningServer("serve", "starter", "--models-file", str(models), environment=environment) as server:
        for response in (
            generate(server, model="tiny"),
            edit(server, files={"image": photo()}, model="tiny"),
            edit(server, path=VARIATIONS, files={"image": photo()}, model="tiny"),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["code"]) == (501, NotSupported.type, NotSupported.code)
            words = error["message"]
            assert " -m pip install " in words
            assert "stable-diffusion-cpp-python==" in words
        response = httpx.post(server.url + "/v1/internal/model/load", json={"model_name": "tiny"}, timeout=LIMIT)
        assert (response.status_code, response.json()["error"]["code"]) == (501, NotSupported.code)
        assert server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2}).status_code == 200
