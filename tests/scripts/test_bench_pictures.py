"""Those who make pictures for the benchmark, and the rows that follow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from benchmark import pictures
from benchmark.client import Unreachable
from benchmark.contenders import HERE, WORKER_ENVIRONMENT, HttpServer
from benchmark.lab import OURS
from benchmark.pictures import BareCall, PictureServer
from benchmark.processes import running
from benchmark.results import Results
from running_server import RunningServer, wait_until

from llamaserve.registry.diffusion_file import read_diffusion
from llamaserve.registry.image_file import image_params
from llamaserve.registry.spec import ModelSpec


@pytest.fixture
def painter(image_server: RunningServer) -> PictureServer:
    return PictureServer(HttpServer(OURS, f"{image_server.url}/v1", None), "tiny")


def params(files: tuple[Path, Path]) -> dict[str, Any]:
    model, decoder = files
    spec = ModelSpec(source=f"file:{model}", task="image")
    plain: dict[str, Any] = msgspec.to_builtins(image_params(spec, read_diffusion(model, {"taesd": decoder})))
    return plain


def test_the_library_alone_makes_the_same_picture(painter: PictureServer, image_model: tuple[Path, Path]) -> None:
    with running([sys.executable, str(HERE / "bare_picture.py")], WORKER_ENVIRONMENT) as started:
        bare = BareCall(*started)
        bare.wait_until_started()
        bare.command(do="load", params=params(image_model))
        for seed in (1, 2):
            (ours, pixels), (alone, others) = painter.draw((80, 64), seed), bare.draw((80, 64), seed)
            assert pixels == others
            assert ours > 0
            assert alone > 0


def test_a_picture_ends_with_its_block(painter: PictureServer, image_server: RunningServer) -> None:
    with painter.drawing() as stream:
        assert stream.flowing
        assert not stream.done
        assert image_server.running == 1
    wait_until(lambda: image_server.running == 0)


def test_refusals_are_told(image_server: RunningServer) -> None:
    nobody = PictureServer(HttpServer(OURS, f"{image_server.url}/v1", None), "nobody")
    with pytest.raises(Unreachable, match=r"status 404: .*nobody"):
        nobody.draw((64, 64), 1)


def test_the_rows_set_the_server_against_the_library_and_a_chat_beside_it_against_one_alone() -> None:
    results = Results()
    for name, seconds in ((OURS, 0.55), (pictures.BARE, 0.5)):
        results.add("pictures", name, "64x64 pixels", seconds)
    results.add("pictures", OURS, "64x64 pixels, same", 1.0)
    results.add("pictures", OURS, "chat alone", 100.0)
    results.add("pictures", OURS, "chat beside", 40.0)
    judged = [row for row in pictures.rows(results) if row.target is not None]
    assert [(str(row.target), row.value, row.met) for row in judged] == [
        ("≤ 1.15", pytest.approx(1.1), True),
        ("≥ 1", 1.0, True),
        ("≤ 1.15", None, None),  # larger ones, which were not measured
        ("≥ 1", None, None),
        ("≥ 0.5", 0.4, False),
    ]
