from __future__ import annotations

import pytest

from llamaserve.engine.params import Footprint
from llamaserve.registry import budget
from llamaserve.registry.budget import is_unified, memory_budget
from llamaserve.settings import parse_size
from llamaserve.worker.protocol import Device

GB = 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * GB),
        ("6 gb", 6 * GB),
        ("1.5G", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("512mi", 512 << 20),
        ("100kB", 100_000),
        ("2000000000", 2 * GB),
        ("0", 0),
        ("50%", 4 * GB),
        ("100%", 8 * GB),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text)(8 * GB) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "6XB", "6GBs", "101%", "1e9", "6 G B", "9" * 40, "½GB", "6GB%"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="6GB"):
        parse_size(text)


def test_by_default_models_may_take_a_safe_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 10 * GB)
    monkeypatch.setattr(budget, "total_memory", lambda: 16 * GB)
    gpus = [Device("CUDA0", "a card", 4 * GB, 8 * GB), Device("CUDA1", "another", 6 * GB, 8 * GB)]
    assert memory_budget(None, None)([]) == Footprint(8 * GB)
    assert memory_budget(None, None)(gpus) == Footprint(8 * GB, 9 * GB)
    assert memory_budget("50%", "50%")(gpus) == Footprint(8 * GB, 8 * GB)
    assert memory_budget("3GB", "2GB")(gpus) == Footprint(3 * GB, 2 * GB)
    assert memory_budget("3GB", "2GB")([]) == Footprint(3 * GB)


def test_gpus_that_use_the_main_memory_have_one_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 10 * GB)
    apple = Device("MTL0", "Apple M3", 10 * GB, 12 * GB, "integrated")
    other = Device("Vulkan1", "the same chip", 8 * GB, 8 * GB, "integrated")
    assert memory_budget(None, None)([apple]) == Footprint(8 * GB, 9 * GB)
    assert memory_budget(None, None)([apple, other]) == Footprint(8 * GB, 9 * GB)
    assert memory_budget(None, "50%")([apple, other]) == Footprint(8 * GB, 6 * GB)
    assert is_unified([apple, other])
    assert not is_unified([])
    assert not is_unified([Device("CUDA0", "a card", 4 * GB, 8 * GB)])
