"""Where in a case a class score comes from: the places of its film, the words of its note, the values of its table.

    heat_SS = film_map(engine, row, target=1)
    for item in words(engine, row, note, target=1): print(item.word, item.evidence)

A word's evidence is what the logit loses when its tokens are hidden (Zeiler 2014, on words); a film's map is any method
of `attribution`, with note and table held as they are. Changes no model. Legend: B batch, S side of the film, T tokens,
W words, N tokens of an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from attribution import Attribution, attributions
from case_engine import CaseTorchEngine
from multimodal import CaseInputs, MultimodalClassifier, Rows

WORDS_AT_A_TIME = 32


@dataclass(frozen=True)
class Evidence:
    """A word of the note, or a column of the table."""

    word: str
    evidence: float
    """What the logit of the class loses without it; below 0 it speaks against the class."""


class FilmView(nn.Module):
    """A multimodal model as a classifier of films, all else of one case held as it is."""

    def __init__(self, model: MultimodalClassifier, case: CaseInputs) -> None:
        super().__init__()
        self.backbone, self.head, self.whole = model.backbone, model.head, [model]
        self.case = case

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Fused logits (B, C) of normalised films, each in the place of the case's own."""
        return self.whole[0](replace(_repeated(self.case, len(images_BCHW)), image_BCHW=images_BCHW))


def _repeated(case: CaseInputs, count: int) -> CaseInputs:
    own = {item.name: getattr(case, item.name) for item in fields(case)}
    return CaseInputs(
        **{name: None if value is None else value.expand(count, *value.shape[1:]) for name, value in own.items()}
    )


@torch.no_grad()
def _with_note_encoded(engine: CaseTorchEngine, rows: Rows) -> CaseInputs:
    case = engine.inputs(rows)
    if case.ids_BT is None or case.mask_BT is None:
        return case
    return replace(case, ids_BT=None, text_features=engine.model.text_features(case.ids_BT, case.mask_BT))


@torch.no_grad()
def _with_film_encoded(engine: CaseTorchEngine, rows: Rows) -> CaseInputs:
    case = engine.inputs(rows)
    if case.image_BCHW is None:
        return case
    return replace(case, image_BCHW=None, image_features=engine.model.image_features(case.image_BCHW))


def film_maps(
    engine: CaseTorchEngine, row: Rows, *, methods: Sequence[str], target: int, layer: str | None = None, seed: int = 0
) -> dict[str, Attribution]:
    """What each of `methods` says of the film of a case, its note and table held as they are."""
    rows = row[None] if row.ndim == 0 else row
    view: Any = FilmView(engine.model, _with_note_encoded(engine, rows)).eval()
    return attributions(
        view,
        engine.reader.spec,
        rows["film"],
        methods=methods,
        target=target,
        device=engine.device,
        layer=layer,
        seed=seed,
    )


@torch.no_grad()
def words(engine: CaseTorchEngine, row: Rows, note: str, *, target: int) -> list[Evidence]:
    """The evidence of each word of `note`, in order; of a case that was made from it."""
    reader = engine.reader
    if reader.notes is None:
        return []
    found = reader.notes.words(reader.texts([note])[0])
    rows = row[None] if row.ndim == 0 else row
    case = _with_film_encoded(engine, rows)
    assert case.mask_BT is not None
    masks = [case.mask_BT[0]]
    for _, positions in found:
        hidden = case.mask_BT[0].clone()
        hidden[[position for position in positions if position < len(hidden)]] = 0
        masks.append(hidden)
    logits = []
    for start in range(0, len(masks), WORDS_AT_A_TIME):
        mask_BT = torch.stack(masks[start : start + WORDS_AT_A_TIME])
        logits.append(engine.model(replace(_repeated(case, len(mask_BT)), mask_BT=mask_BT))[:, target].float())
    logits_W = torch.cat(logits).cpu().numpy()
    return [Evidence(word, float(logits_W[0] - logit)) for (word, _), logit in zip(found, logits_W[1:])]


@torch.no_grad()
def values(engine: CaseTorchEngine, row: Rows, *, target: int) -> list[Evidence]:
    """The evidence of each column of the table: what the logit loses when it is missing."""
    reader = engine.reader
    rows = row[None] if row.ndim == 0 else row
    found, start, missing = [], 0, reader.table.missing()
    whole = float(engine.model(engine.inputs(rows))[0, target])
    for column in reader.table.columns:
        without = rows.copy()
        part = slice(start, start + column.width)
        without["table"][0, part] = missing[part]
        without["has_table"] = bool((without["table"][0] != missing).any())
        found.append(Evidence(column.name, whole - float(engine.model(engine.inputs(without))[0, target])))
        start += column.width
    return found


def film_map(engine: CaseTorchEngine, row: Rows, *, target: int) -> npt.NDArray[np.float32]:
    """Grad-CAM of a case's film for class `target`, (S, S) in [0, 1]."""
    return film_maps(engine, row, methods=["gradcam"], target=target)["gradcam"].map_BSS[0]
