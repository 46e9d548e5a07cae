from __future__ import annotations

import pytest

from llamaserve.engine.events import Delta, Device, Failed, Finished, Occupancy
from llamaserve.engine.params import Adapter, Embedding, Footprint, Generation, LoadParams, Sampling
from llamaserve.errors import ErrorValue
from llamaserve.speech.values import (
    Heard,
    Segment,
    SpokenWord,
    TextToken,
    Transcribed,
    TranscriberParams,
    Transcription,
)
from llamaserve.worker import protocol

_GENERATION = Generation(
    sampling=Sampling(seed=-(2**63), logit_bias={0: -100.0, 2**31 - 1: 100.0}),
    choices=128,
    stop=("\0", "😀"),
    stream=True,
    share="ä",
)
_LOAD = LoadParams(
    path="/tmp/ä.gguf",
    context=1,
    parallel=2,
    kv_cells=3,
    kv_unified=True,
    batch=4,
    threads=5,
    adaptive_threads=True,
    gpu_layers=6,
    flash_attention="auto",
    key_type="f16",
    value_type="bf16",
    prefix_cache=True,
    spill=0,
    speculation=False,
    tensor_split=(0.5, 1.5),
    adapters=(Adapter("a", "/tmp/a.gguf"),),
)
_LISTEN = TranscriberParams(path="/tmp/ä.bin", threads=2, adaptive_threads=True, gpu=False)
_SEGMENT = Segment(
    " é", 0.5, 1.5, 0.0, 0.2, -0.5, 0.9, (SpokenWord("é", 0.5, 1.5, 0.25),), (TextToken(1, b"\xc3", -0.5),)
)
_COMMANDS = [
    protocol.Load(_LOAD),
    protocol.Load(_LISTEN),
    protocol.Transcribe(9, "/tmp/ä", Transcription()),
    protocol.Transcribe(9, "", Transcription(language="haw", translate=True, prompt="\0", temperature=0.5)),
    protocol.Transcribe(9, "/tmp/ä", Transcription(), "\0"),
    protocol.Embed(10, ["text", [1]], Embedding(dimensions=3), "ä"),
    protocol.Rank(11, "", ["text"], True, "ä"),
    protocol.Generate(1, ["text", [1, 2, 3], "", []], _GENERATION),
    protocol.Cancel(2**40),
    protocol.Stop(None),
    protocol.Stop(3),
    protocol.Tokenize(4, "\0", True, False),
    protocol.Detokenize(5, [-1, 2**40], True),
    protocol.SetAdapters(6, [Adapter("a", "/tmp/ä.gguf", -0.5)]),
    protocol.LimitSpill(7, 2**40),
    protocol.SavePrefixes(8, "/tmp/ä", 0),
]
_EVENTS = [
    protocol.Hello([Device("GPU0", "ä", 2**40, 2**41)]),
    protocol.Loading(0.5),
    protocol.Ready(True, Footprint(2**40, 1)),
    protocol.LoadFailed(ErrorValue("ModelLoadFailed", "why", None, "hint", 1.5)),
    protocol.Accepted(1, [2, 3]),
    protocol.Tokens(1, []),
    protocol.Text(1, "\ufffd"),
    protocol.Done(1),
    protocol.Saved(1, 2, 2**40),
    Occupancy(1, 2, 3),
    Delta(1, 2, "text"),
    Finished(1, 2, "text", "length", 3, 4, 5),
    Heard(1, [_SEGMENT], 2.5),
    Heard(1, [], 2.5),
    Transcribed(1, "yue", 3),
    Failed(1, ErrorValue("Gone", "why")),
]


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda command: type(command).__name__)
def test_commands_cross_unchanged(command: protocol.Command) -> None:
    assert protocol.decode_command(protocol.encode_command(command)) == command


def test_frames_are_no_longer_for_a_share_where_there_is_none() -> None:
    without = protocol.encode_command(protocol.Generate(1, [], Generation(sampling=Sampling(seed=1))))
    assert b"share" not in without


def test_events_cross_unchanged_and_in_order() -> None:
    assert protocol.decode_events(protocol.encode_events(_EVENTS)) == _EVENTS
