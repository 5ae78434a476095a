"""Train in several processes: what torchrun starts.

    torchrun --nproc_per_node=2 distributed_train.py --model resnet50 --epochs 50
    torchrun --standalone --nproc_per_node=8 --max-restarts=3 distributed_train.py --config recipe.yaml

Takes the flags of `python main.py train`, reads and writes the same files, and gives the same run: each process trains
on its part of every step's films, and the first one writes. Without torchrun it is `train` itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import main


def run(words: Sequence[str]) -> int:
    """Train as `words` say; the exit code."""
    return main.main(["train", *words])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
