"""The folders that files are kept in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from doctor_machine import about, bad, case_of, checked, described, one

from llamaserve.doctor import disk as examined
from llamaserve.doctor.case import Case
from llamaserve.doctor.disk import Space, disk, file_system, hub_cache, nearest
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.machine import Machine
from llamaserve.settings import Settings

GB = 10**9


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache of mine"))
    monkeypatch.chdir(tmp_path)
    set_space(monkeypatch)


def set_space(monkeypatch: pytest.MonkeyPatch, free: float = 100, files: int | None = 10**6) -> None:
    monkeypatch.setattr(examined, "space", lambda folder: Space(int(free * GB), files))


def machine_at(tmp_path: Path, kind: str = "ext4") -> Machine:
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\n"
    return described(tmp_path / "root", {"proc/mounts": mounts}, HF_HOME=str(tmp_path / "hf"), USER="ann")


def findings(machine: Machine, settings: Settings | None = None) -> list[Finding]:
    return checked(disk(case_of(machine, settings)))


def test_room_enough_is_well(tmp_path: Path) -> None:
    found = findings(machine_at(tmp_path))
    assert not bad(found)
    assert one(found, "cache").message == f"{tmp_path}/cache of mine: 100.0 GB are free"
    assert one(found, "Hugging Face cache").message == f"{tmp_path}/hf/hub: 100.0 GB are free"


def test_a_models_folder_is_examined_where_there_is_one(tmp_path: Path) -> None:
    assert not about(findings(machine_at(tmp_path)), "models folder")
    (tmp_path / "models").mkdir()
    assert about(findings(machine_at(tmp_path)), "models folder")
    assert about(findings(machine_at(tmp_path), Settings(models_dir=tmp_path)), "models folder")


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_space(monkeypatch, 3)
    finding = one(findings(machine_at(tmp_path)), "cache")
    assert finding.level is Level.NOTE
    assert finding.fix == f"du -ah '{tmp_path}/cache of mine' | sort -rh | head -n 20"
    set_space(monkeypatch, 0.1)
    assert one(findings(machine_at(tmp_path)), "cache").level is Level.PROBLEM
    set_space(monkeypatch, files=10)
    assert "10 more files" in one(findings(machine_at(tmp_path)), "cache").message


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs", "smb3"])
def test_files_that_come_over_a_network_are_slow(kind: str, tmp_path: Path) -> None:
    found = findings(machine_at(tmp_path, kind))
    assert one(found, "cache").level is Level.WARNING
    assert one(found, "cache").fix == "export LLAMASERVE_CACHE=/var/tmp/llamaserve"
    assert one(found, "Hugging Face cache").fix == "export HF_HUB_CACHE=/var/tmp/llamaserve"


def test_files_in_memory_are_told_of(tmp_path: Path) -> None:
    assert one(findings(machine_at(tmp_path, "tmpfs")), "cache").level is Level.NOTE


@pytest.mark.parametrize("kind", ["ext4", "btrfs", "apfs", "overlay", "fuseblk", ""])
def test_ordinary_file_systems_are_well(kind: str, tmp_path: Path) -> None:
    assert not bad(findings(machine_at(tmp_path, kind)))


def test_the_innermost_and_last_mount_counts(tmp_path: Path) -> None:
    mounts = "a / ext4 rw\nb /mnt/my\\040disk nfs rw\nc /mnt/my\\040disk xfs rw\nd /mnt/my tmpfs rw\n"
    machine = described(tmp_path, {"proc/mounts": mounts})
    assert file_system(machine, Path("/mnt/my disk/a")) == "xfs"
    assert file_system(machine, Path("/mnt/my disks")) == "ext4"
    assert file_system(machine, Path("/mnt/my/a")) == "tmpfs"
    mac = described(tmp_path, programs={"/sbin/mount": "/dev/disk3 on / (apfs, local)\n//a@b/c on /Volumes/c (smbfs)"})
    mac = Machine("Darwin", "arm64", {}, tmp_path, mac.run, mac.find)
    assert file_system(mac, Path("/Users/ann")) == "apfs"


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache of mine").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = one(findings(machine_at(tmp_path)), "cache")
    assert finding.level is Level.PROBLEM
    assert finding.fix == f"sudo chown ann '{tmp_path}/cache of mine'"


def test_a_folder_that_cannot_be_made_is_made_without_touching_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("LLAMASERVE_CACHE", "/there is/none")
    found = findings(machine_at(tmp_path), Settings(models_dir=tmp_path / "a" / "b"))
    assert one(found, "cache").fix == "sudo install -d -o ann '/there is/none'"
    assert one(found, "models folder").fix == f"sudo install -d -o ann {tmp_path}/a/b"
    assert not any("-R" in (finding.fix or "") for finding in found)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cache of mine").write_text("")
    assert "is no folder" in one(findings(machine_at(tmp_path)), "cache").message


def test_where_the_hub_keeps_its_files() -> None:
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"
    assert hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}) == Path("/h/hub")
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")


def test_the_nearest_folder_is_the_one_that_is_there(tmp_path: Path) -> None:
    assert nearest(tmp_path) == tmp_path
    assert nearest(tmp_path / "a" / "b") == tmp_path


def test_this_machine_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert about(disk(Case(Settings())), "cache")
