"""How much audio may lie on the disk at once."""

from __future__ import annotations

import pytest

from llamaserve.api.uploads import AudioAdmission, kept
from llamaserve.errors import QueueFull, Unavailable


def test_audio_is_let_in_until_there_is_too_much() -> None:
    admission = AudioAdmission(1000)
    first, second = admission.enter(600), admission.enter(600)  # the last one may bring more
    with pytest.raises(QueueFull, match="as much audio waits") as caught:
        admission.enter(1)
    assert (caught.value.retry_after or 0) >= 1
    first.leave()
    first.leave()
    admission.enter(5000)
    second.leave()
    with pytest.raises(QueueFull):
        admission.enter(1)


def test_a_full_disk_is_not_the_client_s_fault() -> None:
    with pytest.raises(Unavailable, match="temporary folder: No space left on device"), kept():
        raise OSError(28, "No space left on device")
