"""launcher.py, and torchrun itself: processes that are lost are started again, mistakes and signals end all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
import launcher
import train
from config import Config, to_yaml
from errors import ConfigError
from tests import processes
from tests.test_distributed_train import trained
from tests.test_train import assert_same_run, changed

ROOT = Path(train.__file__).parent

LOSING = """
import os, signal, sys
import main, train
step = train.Fit._step
def counted(fit):
    step(fit)
    # The second process is lost in the middle of the second epoch, once.
    if fit.standing.step == 14 and fit.group.rank == 1 and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
train.Fit._step = counted
sys.exit(main.main(["train", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("door", ["launcher", "torchrun"])
def test_a_process_killed_with_9_is_replaced_and_the_run_equals_the_undisturbed_one(
    small: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    door: str,
) -> None:
    whole = changed(small, data__batch_size=4, runtime__output_dir=str(tmp_path / "whole"))
    processes.run(2, trained, whole)
    script = tmp_path / "losing.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOSING}")
    (tmp_path / "c.yaml").write_text(to_yaml(changed(whole, runtime__output_dir=str(tmp_path / "killed"))))
    words = [str(tmp_path / "was_killed"), "--quiet", "--config", str(tmp_path / "c.yaml")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if door == "launcher":
        monkeypatch.setattr(launcher, "SCRIPT", script)
        before = signal.getsignal(signal.SIGTERM)
        assert launcher.launch(words, processes=2, max_restarts=1) == 0
        assert signal.getsignal(signal.SIGTERM) is before
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run([*torchrun, "--max-restarts=1", str(script), *words], check=True, timeout=240)
    said = capfd.readouterr().err
    assert "started anew: going on from" in said and "checkpoint_epoch_1.pth" in said
    assert "another process is gone" in said
    assert (tmp_path / "was_killed").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_line_and_no_second_try(tmp_path: Path) -> None:
    where = tmp_path / "nowhere"
    words = ["main.py", "distributed", "--nproc-per-node", "2", "--device", "cpu", "--data-dir", str(where)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, "--no-pretrained", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: {where}: no such data folder; put films into {where}/train/CLASS/ and {where}/test/CLASS/, or name "
        "another with --data-dir or --manifest\n"
    )


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_ends_all(small: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = changed(small, data__batch_size=4, training__num_epochs=500, training__early_stopping_patience=0)
    (tmp_path / "c.yaml").write_text(to_yaml(changed(long, runtime__output_dir=str(run))))
    words = ["main.py", "distributed", "--quiet", "--nproc-per-node", "2", "--config", str(tmp_path / "c.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint_epoch_2.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said.count("go on with: python main.py train --resume") == 1
    left = checkpoint.load(checkpoint.newest(run))["training_state"]["standing"]
    assert left["step"] > 2 * 9


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([-9, 143], 1),  # one was lost, the other stopped for it
        ([143, -9, -15], 1),
        ([1, -15], 1),
        ([2, 2], 2),
        ([2, -15], 2),
        ([-15, 2, 1], 2),
        ([143, 143], 143),
        ([130, -15], 130),
        ([-15, -15], 1),
    ],
)
def test_what_the_engine_did_to_the_others_is_not_why_a_run_ended(codes: list[int], said: int) -> None:
    assert launcher.verdict(codes) == said


def test_the_launcher_keeps_its_own_flags_to_itself() -> None:
    words = ["--epochs", "3", "--nproc-per-node", "2", "--max-restarts=1", "--set", "data.batch_size=4"]
    kept = launcher.own_words(words, ("--nproc-per-node", "--max-restarts"))
    assert kept == ["--epochs", "3", "--set", "data.batch_size=4"]


def test_the_launcher_refuses_what_cannot_be_started() -> None:
    assert launcher.process_count(3, "cpu") == 3 and launcher.process_count(None, "cpu") == 1
    with pytest.raises(ConfigError, match="--nproc-per-node 0: start at least one process"):
        launcher.process_count(0, "cpu")
    with pytest.raises(ConfigError, match="--max-restarts -1: give 0 or more"):
        launcher.launch([], processes=1, max_restarts=-1)
