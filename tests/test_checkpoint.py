"""checkpoint.py: atomic, versioned, and closed to anything but tensors and plain values."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
from errors import CheckpointError

CONTENT: dict[str, Any] = {
    "model_state_dict": {"w": torch.arange(6.0)},
    "config": {"training": {"seed": 1}},
    "classes": ["a", "b"],
    "preprocess": {},
    "temperature": 1.5,
    "operating_point": {"threshold": 0.4},
    "provenance": {"epoch": 1},
    "seen_films": torch.zeros(2, dtype=torch.int64),
}
ROOT = Path(checkpoint.__file__).parent


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "best_model.pth"
    checkpoint.save(path, CONTENT)
    return path


def test_a_checkpoint_reads_back_and_is_readable_by_plain_torch(saved: Path) -> None:
    assert torch.equal(checkpoint.load(saved)["model_state_dict"]["w"], torch.arange(6.0))
    assert torch.load(saved, weights_only=True)["format_version"] == checkpoint.FORMAT_VERSION


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_checkpoint_is_refused(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged|not a checkpoint"):
        checkpoint.load(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    torch.save({**CONTENT, "format_version": 99}, saved)
    with pytest.raises(CheckpointError, match="format 99 is newer than this program reads .1.; update"):
        checkpoint.load(saved)


def test_a_pickle_bomb_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({**CONTENT, "format_version": 1, "payload": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="refused: it holds objects other than tensors"):
        checkpoint.load(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"this is text\n", b"t", b"PK\x03\x04 broken zip"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pth: (not a checkpoint, or damaged|truncated or damaged)"):
        checkpoint.load(tmp_path / "x.pth")


@pytest.mark.parametrize("seed", range(50))
def test_random_bytes_are_refused_whatever_the_unpickler_makes_of_them(tmp_path: Path, seed: int) -> None:
    (tmp_path / "x.pth").write_bytes(np.random.default_rng(seed).bytes(200))
    with pytest.raises(CheckpointError, match="x.pth: "):
        checkpoint.load(tmp_path / "x.pth")


def test_a_plain_state_dict_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no format_version.; as weights use --weights"):
        checkpoint.load(tmp_path / "x.pth")


def test_an_incomplete_checkpoint_names_what_it_lacks(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "model_state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no config, classes"):
        checkpoint.load(tmp_path / "x.pth")


def test_a_missing_checkpoint_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint; train one first"):
        checkpoint.load(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder; name a checkpoint file in it"):
        checkpoint.load(tmp_path)


def test_a_write_that_fails_keeps_the_previous_checkpoint_and_leaves_nothing_behind(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="the disk is full; the previous checkpoint stays"):
        checkpoint.save(saved, CONTENT)
    assert saved.read_bytes() == before
    assert [item.name for item in saved.parent.iterdir()] == [saved.name]


def test_a_file_size_limit_met_while_writing_is_a_clear_error(saved: Path) -> None:
    code = (
        "import signal, resource, sys, torch, checkpoint\n"
        "from tests.test_checkpoint import CONTENT\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "large = {**CONTENT, 'model_state_dict': {'w': torch.zeros(10**5)}}\n"
        "try: checkpoint.save(checkpoint.Path(sys.argv[1]), large)\n"
        "except checkpoint.CheckpointError as error: print(error)\n"
    )
    before = saved.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "the disk is full; the previous checkpoint stays" in done.stdout, done.stderr
    assert saved.read_bytes() == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_kill_9_while_writing_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "best_model.pth"
    code = (
        "import sys, torch, checkpoint\n"
        "from tests.test_checkpoint import CONTENT\n"
        "for count in range(10**6):\n"
        "    content = {**CONTENT, 'model_state_dict': {'w': torch.full((10**6,), count)}}\n"
        "    checkpoint.save(checkpoint.Path(sys.argv[1]), content)\n"
        "    print(count, flush=True)\n"
    )
    for delay in (0.0, 0.013, 0.037):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        weights = checkpoint.load(path)["model_state_dict"]["w"]
        assert (weights == weights[0]).all()


def test_only_the_newest_epoch_checkpoints_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 9, 10, 11):
        (tmp_path / f"checkpoint_epoch_{epoch}.pth").touch()
    checkpoint.keep_newest(tmp_path, 2)
    assert [epoch for epoch, _ in checkpoint.epoch_files(tmp_path)] == [10, 11]


def test_a_resume_of_a_folder_starts_from_the_newest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint_epoch_<N>.pth"):
        checkpoint.newest(tmp_path)
    for epoch in (9, 10):
        (tmp_path / f"checkpoint_epoch_{epoch}.pth").touch()
    assert checkpoint.newest(tmp_path).name == "checkpoint_epoch_10.pth"
    (tmp_path / checkpoint.INTERRUPTED).touch()
    assert checkpoint.newest(tmp_path).name == checkpoint.INTERRUPTED


def test_a_checkpoint_with_damaged_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    checkpoint.save(path, {**CONTENT, "model_state_dict": {"w": torch.ones(10_000)}})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or damaged checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("config", 5), ("classes", "ab")])
def test_a_field_of_the_wrong_kind_is_refused(tmp_path: Path, name: str, value: object) -> None:
    checkpoint.save(tmp_path / "x.pth", {**CONTENT, name: value})
    with pytest.raises(CheckpointError, match=f"damaged checkpoint: {name} is"):
        checkpoint.load(tmp_path / "x.pth")
