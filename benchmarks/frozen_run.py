"""The published frozen run, from decoding to stored checkpoint, against the loop a user would write.

    python benchmarks/frozen_run.py FILMS --films 256

Runs `main.py train --model resnet50 --epochs 50 --freeze-backbone --no-pretrained` with nothing cached, for each number
of augmented views, in processes of its own; and, before and after each, one epoch of an ordinary frozen loop on a
stated subset: JPEG decoding and albumentations in a DataLoader with two workers, timm's network in eval mode without
gradients, the same head, Adam, then a validation pass; in fp32 NCHW and with bf16 autocast. That epoch, scaled to all
films and times the epochs, is what the run is compared with. Prints seconds, ratios and peak memory; leaves nothing
behind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def ordinary_epoch(folder: Path, *, model: str, side: int, films: int, precision: str) -> dict[str, float]:
    """Seconds of one training epoch with validation over all films under folder/train, from a subset of `films`."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    import numpy as np
    import timm
    import torch
    from albumentations.pytorch import ToTensorV2
    from PIL import Image
    from torch import nn

    paths = sorted(item for item in (folder / "train").rglob("*") if item.suffix.lower() in (".jpeg", ".jpg", ".png"))
    classes = sorted({item.parent.name for item in paths})
    order = np.random.default_rng(0).permutation(len(paths))
    chosen = [paths[int(row)] for row in order[: min(films, len(paths))]]
    cut = round(0.85 * len(chosen))
    ending = [A.Normalize(), ToTensorV2()]
    light = [A.Rotate(15), A.HorizontalFlip(), A.RandomBrightnessContrast()]

    class Films(torch.utils.data.Dataset[Any]):
        def __init__(self, rows: list[Path], transforms: list[Any]) -> None:
            self.rows, self.transform = rows, A.Compose([A.Resize(side, side), *transforms])

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            image = np.asarray(Image.open(self.rows[row]).convert("RGB"))
            return self.transform(image=image)["image"], classes.index(self.rows[row].parent.name)

    backbone = timm.create_model(model, pretrained=False, num_classes=0).eval().requires_grad_(False)
    head = nn.Sequential(
        nn.Dropout(0.3), nn.Linear(backbone.num_features, 512), nn.ReLU(), nn.Dropout(0.3), nn.Linear(512, len(classes))
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")

    def run(rows: list[Path], transforms: list[Any], *, training: bool) -> float:
        """Seconds a film; the first batch, which waits for the workers to start, is left out."""
        loader = torch.utils.data.DataLoader(Films(rows, transforms), batch_size=32, shuffle=training, num_workers=2)
        head.train(training)
        started, done = 0.0, 0
        for number, (images, labels) in enumerate(loader):
            with context:
                with torch.no_grad():
                    features = backbone(images)
                with torch.set_grad_enabled(training):
                    loss = nn.functional.cross_entropy(head(features), labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if number:
                done += len(labels)
            else:
                started = time.perf_counter()
        return (time.perf_counter() - started) / max(1, done)

    training = run(chosen[:cut], [*light, *ending], training=True)
    validating = run(chosen[cut:], ending, training=False)
    total = len(paths)
    return {"seconds": total * (0.85 * training + 0.15 * validating), "films": len(chosen), "of": total}


def own_run(arguments: argparse.Namespace, *, views: int) -> dict[str, float]:
    """Seconds and peak memory (MiB) of the whole verb with cold caches."""
    with tempfile.TemporaryDirectory() as name:
        flags = ["--data-dir", str(arguments.folder), "--model", arguments.model, "--epochs", str(arguments.epochs)]
        flags += ["--freeze-backbone", "--no-pretrained", "--output-dir", f"{name}/run", "--quiet"]
        flags += ["--image-size", str(arguments.size), "--set", f"training.cached_views={views}"]
        flags += ["--set", "training.early_stopping_patience=0", *arguments.flags]
        environment = {**os.environ, "MEDIMG_CACHE_DIR": f"{name}/cache"}
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), "train", *flags], env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if os.waitstatus_to_exitcode(status):
            sys.exit("the run failed")
        assert (Path(name) / "run" / "best_model.pth").exists()
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss / 1024}


def ordinary(arguments: argparse.Namespace, precision: str) -> dict[str, float]:
    """`ordinary_epoch` in a process of its own, so that the two programs share no memory, threads or caches."""
    words = [str(arguments.folder), "--model", arguments.model, "--size", str(arguments.size)]
    words += ["--films", str(arguments.films), "--ordinary", precision]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="class folders with a train split")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--views", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--films", type=int, default=256, help="films of the ordinary epoch that is timed and scaled")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further words for main.py train")
    parser.add_argument("--ordinary", choices=("fp32", "bf16"), default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ordinary:
        found = ordinary_epoch(
            arguments.folder,
            model=arguments.model,
            side=arguments.size,
            films=arguments.films,
            precision=arguments.ordinary,
        )
        print(json.dumps(found))
        return
    kinds = ("fp32", "bf16")
    epochs: dict[str, list[float]] = {kind: [] for kind in kinds}

    def time_ordinary() -> None:
        for kind in kinds:
            found = ordinary(arguments, kind)
            epochs[kind].append(found["seconds"])
            print(
                f"ordinary loop, {kind}: {found['seconds']:.0f} s an epoch of {found['of']} films, scaled from "
                f"{found['films']}",
                flush=True,
            )

    time_ordinary()
    runs = {}
    for views in arguments.views:
        runs[views] = own_run(arguments, views=views)
        print(f"this program, K = {views}: {runs[views]['seconds']:.0f} s", flush=True)
        time_ordinary()
    for views, run in runs.items():
        against = ", ".join(
            f"{statistics.median(epochs[kind]) * arguments.epochs / run['seconds']:.0f} times the {kind} loop "
            f"({statistics.median(epochs[kind]) * arguments.epochs:.0f} s)"
            for kind in kinds
        )
        print(
            f"{arguments.model}, {arguments.epochs} epochs, K = {views}: {run['seconds']:.0f} s, peak "
            f"{run['peak_mb']:.0f} MiB: {against}"
        )


if __name__ == "__main__":
    main()
