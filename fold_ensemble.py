"""The models of a cross-validation as one: what `crossval` says of them on disk, and their mean as a network.

    predictor.load("crossval_results")          # or its crossval.json: wherever a checkpoint is taken

Members are averaged as log-odds: the mean over members of logits divided by the member's own temperature, which is the
geometric mean of their calibrated probabilities. The arithmetic mean of calibrated probabilities is never calibrated
itself, but too little sure (Ranjan and Gneiting 2010, J R Stat Soc B 72:71), and what is linear in logits stays linear:
the evidence for the mean is the mean of the members' evidence. One temperature and the operating point are chosen on
the out-of-fold films. Legend: B batch, C classes, F features, K members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bundle import Kinds, read_description, sha256
from engines import Outputs, TorchEngine
from errors import CheckpointError
from models import Classifier
from preprocess import PreprocessSpec
from runtime import autocast, write_json

FACTS = "ensemble.json"
"""What stands beside crossval.json; written last, so that a folder with it is whole."""
SUMMARY = "crossval.json"
VALIDATION = "ensemble_validation.csv"
"""The out-of-fold films as the ensemble's own scale has them: its validation films."""
FORMAT_VERSION = 1
REQUIRED: dict[str, Kinds] = {
    "members": list,
    "classes": list,
    "temperature": (int, float),
    "operating_point": dict,
    "config": dict,
    "provenance": dict,
}
AGAIN = "run crossval again with that --output-dir: folds that are done are not trained again"


@dataclass(frozen=True)
class StoredEnsemble:
    """An ensemble on disk, its members' hashes checked."""

    file: Path
    """ensemble.json."""
    facts: dict[str, Any]
    """REQUIRED, and their values."""
    members: tuple[Path, ...]
    """Checkpoints."""

    @property
    def validation(self) -> Path:
        """The out-of-fold films."""
        return self.file.parent / VALIDATION


def is_ensemble(path: str | Path) -> bool:
    """Whether `path` is a folder that `crossval` wrote, or its crossval.json or ensemble.json."""
    path = Path(path)
    return (path / SUMMARY).is_file() or (path / FACTS).is_file() or path.name in (SUMMARY, FACTS)


def facts_file(path: str | Path) -> Path:
    """ensemble.json of what `is_ensemble` knows."""
    path = Path(path)
    return (path if path.is_dir() else path.parent) / FACTS


def write(folder: Path, members: Sequence[Path], facts: Mapping[str, Any]) -> None:
    """Write ensemble.json; `facts` holds what is REQUIRED but the members, which lie below `folder`."""
    own = [{"path": path.relative_to(folder).as_posix(), "sha256": sha256(path)} for path in members]
    complete = {"format_version": FORMAT_VERSION, "members": own, **facts}
    assert not set(REQUIRED) - set(complete), f"ensemble lacks {set(REQUIRED) - set(complete)}"
    write_json(folder / FACTS, complete)


def read(path: str | Path) -> StoredEnsemble:
    """The ensemble of a crossval folder; CheckpointError when it is unfinished, damaged or newer, or a member is."""
    file = facts_file(path)
    facts = read_description(
        file,
        kind="an ensemble",
        absent=f"{file.parent}: no ensemble (no {FACTS}): not finished, or of an older program; {AGAIN}",
        required=REQUIRED,
        newest=FORMAT_VERSION,
        again=AGAIN,
    )
    try:
        named = [(file.parent / str(item["path"]), str(item["sha256"])) for item in facts["members"]]
    except (KeyError, TypeError):
        raise CheckpointError(f"{file}: damaged: members without path or sha256; {AGAIN}") from None
    if not named:
        raise CheckpointError(f"{file}: damaged: names no member; {AGAIN}")
    for member, digest in named:
        if not member.is_file():
            raise CheckpointError(f"{member}: missing from the ensemble; put it back, or {AGAIN}")
        if sha256(member) != digest:
            raise CheckpointError(f"{member}: hash mismatch, it is not the model that crossval measured; {AGAIN}")
    return StoredEnsemble(file, facts, tuple(member for member, _ in named))


# --- the network -----------------------------------------------------------------------------------------------


class FoldEnsemble(nn.Module):
    """Classifiers of one architecture whose calibrated logits are averaged."""

    def __init__(self, members: Sequence[Classifier], temperatures: Sequence[float]) -> None:
        super().__init__()
        assert len(members) == len(temperatures) > 0
        self.members = nn.ModuleList(members)
        self.temperatures = tuple(temperatures)

    @property
    def classifiers(self) -> list[Classifier]:
        """The members."""
        return list(self.members)  # type: ignore[arg-type]

    @property
    def first(self) -> Classifier:
        """The member whose features and input gate stand for all: each member has a feature space of its own."""
        return self.classifiers[0]

    @property
    def head(self) -> nn.Sequential:
        """From `features` to logits, of the first member."""
        return self.first.head

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Pooled features (B, F) of the first member."""
        return self.first.features(images_BCHW)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, H, W)."""
        return self.everything(images_BCHW)[0]

    def everything(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and the first member's features (B, F) in one pass."""
        features_BF = self.features(images_BCHW)
        further = [member(images_BCHW) for member in self.classifiers[1:]]
        logits = [self.head(features_BF), *further]
        scaled = [logits_BC.float() / own for logits_BC, own in zip(logits, self.temperatures)]
        return torch.stack(scaled).mean(dim=0), features_BF


class FoldEngine(TorchEngine):
    """torch inference of all members on the same films."""

    def __init__(self, model: FoldEnsemble, spec: PreprocessSpec, *, device: torch.device, precision: str) -> None:
        super().__init__(model, spec, device=device, precision=precision)  # type: ignore[arg-type]
        self.name += f", {len(model.members)} folds"
        self._everything = model.everything

    @torch.inference_mode()
    def outputs(self, images_BHWC: npt.NDArray[np.uint8] | Tensor) -> Outputs:
        """Logits (B, C) of the mean, and the first member's features (B, F)."""
        with autocast(self.device, self.precision):
            logits_BC, features_BF = self._everything(self.to_input(torch.as_tensor(images_BHWC)))
        return logits_BC.float().cpu().numpy(), features_BF.float().cpu().numpy()
