"""Does the feature cache cost accuracy? The same frozen run with it and without it, compared on the test films.

    python benchmarks/frozen_accuracy.py FILMS --weights tf_efficientnet_lite0.safetensors --epochs 8

Trains twice (cached, then `training.feature_cache=false`), then runs `main.py compare` on the two checkpoints: test
AUROC of both with the paired DeLong test, clustered by patient. Prints the figures and the seconds of both runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> tuple[Any, float]:
    """What a verb prints as JSON, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "main.py"), *words, "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path, default=None, help="without it the weights are random")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further words for main.py train")
    arguments = parser.parse_args()
    start = ["--weights", str(arguments.weights)] if arguments.weights else ["--no-pretrained"]
    with tempfile.TemporaryDirectory() as name:
        seconds = {}
        for cached in ("true", "false"):
            words = ["--data-dir", str(arguments.folder), "--model", arguments.model, "--freeze-backbone", *start]
            words += ["--epochs", str(arguments.epochs), "--output-dir", f"{name}/{cached}"]
            words += ["--set", f"training.feature_cache={cached}", "--set", f"data.cache_dir={name}/cache"]
            result, seconds[cached] = run("train", *words, *arguments.flags)
            print(f"feature cache {cached}: {seconds[cached]:.0f} s, validation {result['best_score']:.4f}", flush=True)
        checkpoints = [f"{name}/{cached}/best_model.pth" for cached in ("true", "false")]
        compared, _ = run("compare", "--checkpoints", *checkpoints, "--output-dir", f"{name}/compared")
    auroc = compared["auc_roc"]
    print(
        f"{arguments.model}, {arguments.epochs} epochs: test AUROC {auroc['a']:.4f} cached, {auroc['b']:.4f} uncached, "
        f"difference {auroc['difference']:.4f} ({auroc['ci_low']:.4f} to {auroc['ci_high']:.4f}), p = "
        f"{auroc['p_value']:.3f}; {seconds['false'] / seconds['true']:.1f} times faster"
    )


if __name__ == "__main__":
    main()
