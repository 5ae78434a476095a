"""What this machine has: versions, device, instruction sets, weight cache, data folder.

    python main.py doctor
    python main.py doctor --benchmark --model resnet50

With --benchmark also how fast it decodes, augments and trains, and what bounds a run here (about a minute).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from config import Config, DataConfig, ModelConfig
from runtime import cpu_flags, labelled, library_versions, resolve_device, resolve_precision

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "albumentations",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "pillow",
    "opencv-python-headless",
    "matplotlib",
)


def examine(config: Config, *, benchmark: bool = False) -> dict[str, Any]:
    """The facts, ready for JSON; with `benchmark` also the speeds, for the network and the device of `config`."""
    from huggingface_hub import constants

    device = resolve_device(config.runtime.device)
    if config.model.model_type != ModelConfig().model_type:
        from models import check_model_name  # brings timm: the facts alone do not wait for it

        check_model_name(config.model.model_type)
    cache = Path(constants.HF_HUB_CACHE)
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(LIBRARIES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": resolve_precision("auto", device),
        "cpu_count": os.cpu_count(),
        "instruction_sets": sorted(
            name for name in cpu_flags() if name.startswith(("avx", "amx")) or name in ("fma", "asimd", "sve")
        ),
        "weight_cache": str(cache),
        "cached_weights": sorted(item.name for item in cache.glob("models--*")) if cache.is_dir() else [],
        "default_data_dir_exists": Path(DataConfig().data_dir).is_dir(),
    }
    if benchmark:
        import machine_speed  # brings timm and albumentations, as above

        facts["speed"] = machine_speed.measure(config)
    return facts


def summary(facts: dict[str, Any]) -> str:
    """The facts as lines for the terminal."""
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    weights = ", ".join(facts["cached_weights"]) or "none cached; use --weights FILE or --no-pretrained without a hub"
    data = "is there" if facts["default_data_dir_exists"] else "is not there; name yours with --data-dir or --manifest"
    rows = {
        "python": f"{facts['python']} on {facts['platform']}",
        "libraries": libraries,
        "device": f"{facts['device']}, computes in {facts['precision']}, {facts['cpu_count']} CPU cores",
        "cpu": " ".join(facts["instruction_sets"]) or "instruction sets unknown",
        "weights": f"{facts['weight_cache']}: {weights}",
        "data": f"{DataConfig().data_dir} {data}",
    }
    lines = [labelled(f"{name:11}", words) for name, words in rows.items()]
    return "\n".join([*lines, *facts.get("speed", {}).get("lines", [])])
