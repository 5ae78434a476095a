"""Classifiers that read a film with a note and a table: the network, and everything it needs to be built again.

    python multimodal.py            # a short self-check on random weights
    python main.py train_multimodal --manifest cases.csv --epochs 30

A case is a film, a note and a row of a table; any of them may be missing, which is a learned empty vector. Beside the
fused logits every modality has a head of its own, trained in the same run, to measure the fusion against. `build_model`
is the door to a stored network; what else it needs (columns, terms to mask, tokenizer) is `CaseReader`, plain values in
the checkpoint. Legend: B batch, H height, W width of films or of vectors, S side, T tokens, K table numbers, M
modalities, X = 1 + M heads, C classes, D an encoder's width, N tokens of a modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import text_encoder
from config import MODALITIES, Config, ModelConfig, MultimodalConfig
from errors import CheckpointError
from fusion import Encoded, create_fusion, fusion_class
from models import Classifier, keep_frozen_still, make_head, model_from_config
from preprocess import PreprocessSpec
from tabular import TableSpec
from text_encoder import NoteReader, TextEncoder, clean, mask_terms, padded, pooled

Rows = npt.NDArray[Any]
"""Cases as a structured array (B,): film, has_film, ids, length, table, has_table; stacked and cut like films."""


@dataclass(frozen=True)
class CaseInputs:
    """A batch of cases as tensors; what a model does not read is None."""

    image_BCHW: Tensor | None = None
    """Normalised films; whatever stands in a row without one is not looked at."""
    has_image_B: Tensor | None = None
    """1 where the case has a film, else 0."""
    ids_BT: Tensor | None = None
    """Token numbers, int64."""
    mask_BT: Tensor | None = None
    """1 where there is a token; all 0 in a row without a note."""
    table_BK: Tensor | None = None
    has_table_B: Tensor | None = None
    """1 where at least one value of the row is known, else 0."""
    image_features: Tensor | None = None
    """What the image encoder made of the film, in place of it: (B, D) or tokens (B, N, D)."""
    text_features: Tensor | None = None
    """What the text encoder made of the note, in place of it: (B, D) or tokens (B, T, D)."""

    def to(self, device: torch.device) -> CaseInputs:
        """Every tensor on `device`."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: item if item is None else item.to(device, non_blocking=True) for name, item in own.items()}
        return CaseInputs(**moved)

    def presence(self, modality: str) -> Tensor:
        """(B,): 1 where the case has the modality, else 0."""
        found = {"image": self.has_image_B, "text": self.mask_BT, "table": self.has_table_B}[modality]
        assert found is not None
        return found if found.ndim == 1 else found.amax(dim=1)

    def only(self, kept_BM: Tensor, modalities: Sequence[str]) -> CaseInputs:
        """The same cases without the modalities whose `kept_BM` is 0."""
        changed: dict[str, Tensor] = {}
        for k, modality in enumerate(modalities):
            name = {"image": "has_image_B", "text": "mask_BT", "table": "has_table_B"}[modality]
            own = getattr(self, name)
            changed[name] = own * (kept_BM[:, k, None] if own.ndim == 2 else kept_BM[:, k])
        return replace(self, **changed)


class Everything(NamedTuple):
    """All that a model says of a batch."""

    logits_BC: Tensor
    """Of the fusion."""
    branches_BMC: Tensor
    """Logits of each modality alone."""
    features_BD: Tensor
    """Pooled features of the first modality, which is the film where films are read."""
    weights_BM: Tensor | None
    """How much each modality weighed in the fusion; None where it has no weights."""

    @property
    def heads_BXC(self) -> Tensor:
        """Logits of every head, the fused ones first."""
        return torch.cat([self.logits_BC[:, None], self.branches_BMC], dim=1)


# --- the network -----------------------------------------------------------------------------------------------


class MultimodalClassifier(nn.Module):
    """Encoders of the modalities, a head for each, and a fusion over them.

    `backbone` encodes films, `text` notes; `head` holds all that is trained whatever is frozen.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        *,
        image: Classifier | None,
        text: TextEncoder | None,
        table_width: int,
        num_classes: int,
        settings: MultimodalConfig,
        model: ModelConfig,
    ) -> None:
        super().__init__()
        self.modalities = tuple(name for name in MODALITIES if name in modalities)
        self.needs_tokens = fusion_class(settings.fusion).needs_tokens
        self.backbone: nn.Module = nn.Identity() if image is None else image.backbone
        self.text = text
        widths = {"table": table_width, "text": 0 if text is None else text.width}
        if image is not None:
            facts: Any = image.backbone
            pooled_width = getattr(facts, "head_hidden_size", None) or facts.num_features
            widths["image"] = int(facts.num_features if self.needs_tokens else pooled_width)
        own = {name: widths[name] for name in self.modalities}
        self.head = CaseHead(own, num_classes=num_classes, settings=settings, model=model)

    def forward(self, case: CaseInputs) -> Tensor:
        """Fused logits (B, C)."""
        return self.everything(case).logits_BC

    def everything(self, case: CaseInputs) -> Everything:
        """Logits of all heads, pooled features, the fusion's weights."""
        image, text = case.image_features, case.text_features
        if image is None and case.image_BCHW is not None:
            image = self.image_features(case.image_BCHW)
        if text is None and case.ids_BT is not None and case.mask_BT is not None:
            text = self.text_features(case.ids_BT, case.mask_BT)
        image, text = (None if item is None else item.float() for item in (image, text))
        # The heads are small: in half precision their scores would only tie.
        with torch.autocast(next(self.head.parameters()).device.type, enabled=False):
            return self.head(replace(case, image_features=image, text_features=text))

    def image_features(self, image_BCHW: Tensor) -> Tensor:
        """(B, D) of normalised films, or tokens (B, N, D) for a fusion that looks at them."""
        return film_features(self.backbone, image_BCHW, tokens=self.needs_tokens)

    def text_features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D) of notes, or tokens (B, T, D) for a fusion that looks at them."""
        assert self.text is not None
        tokens_BTD = self.text(ids_BT, mask_BT)
        return tokens_BTD if self.needs_tokens else pooled(tokens_BTD, mask_BT)

    def stages(self) -> list[list[str]]:
        """As of `models.Classifier`, of the films' encoder."""
        return Classifier.stages(self)  # type: ignore[arg-type]

    def unfreeze_layers(self, num_layers: int = 1) -> None:
        """As of `models.Classifier`, for the films' encoder."""
        Classifier.unfreeze_layers(self, num_layers)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> MultimodalClassifier:
        """Like nn.Module.train, but modules with nothing left to train stay in eval mode."""
        super().train(mode)
        if mode:
            keep_frozen_still(self.backbone)
        return self


def film_features(backbone: nn.Module, image_BCHW: Tensor, *, tokens: bool) -> Tensor:
    """What a timm backbone makes of normalised films: pooled (B, D), or its last map as tokens (B, N, D)."""
    if not tokens:
        return backbone(image_BCHW)
    facts: Any = backbone
    features: Tensor = facts.forward_features(image_BCHW)
    if features.ndim == 4 and features.shape[1] == facts.num_features:
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1, -2)


class CaseHead(nn.Module):
    """From encoded modalities to logits: empty vectors for what is missing, a head a modality, the fusion."""

    def __init__(
        self, widths: Mapping[str, int], *, num_classes: int, settings: MultimodalConfig, model: ModelConfig
    ) -> None:
        super().__init__()
        self.modalities = tuple(widths)
        self.empty = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name, width in widths.items()})
        # Not over a table: its few numbers mean something by their size.
        self.norms = nn.ModuleDict(
            {name: nn.Identity() if name == "table" else nn.LayerNorm(width) for name, width in widths.items()}
        )
        self.entries = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, settings.width), nn.GELU()) for name, width in widths.items()}
        )
        shape: dict[str, Any] = {"num_classes": num_classes, "dropout_rate": model.dropout_rate}
        self.branches = nn.ModuleDict(
            {name: make_head(width, hidden_features=model.hidden_features, **shape) for name, width in widths.items()}
        )
        self.fusion = create_fusion(
            settings.fusion,
            modalities=self.modalities,
            width=settings.width,
            hidden=model.hidden_features,
            heads=settings.heads,
            **shape,
        )

    def forward(self, case: CaseInputs) -> Everything:
        """What all heads say of cases whose films and notes are features."""
        present_BM = torch.stack([case.presence(name) for name in self.modalities], dim=1)
        sources = {"image": case.image_features, "text": case.text_features, "table": case.table_BK}
        vectors, branches, tokens, masks, pooled_ones = [], [], [], [], []
        for k, name in enumerate(self.modalities):
            source = sources[name]
            assert source is not None
            mask_BN = case.mask_BT if name == "text" else None
            mean_BD = _mean(source, mask_BN)
            own_BD = torch.where(present_BM[:, k, None] > 0, mean_BD, self.empty[name].to(mean_BD.dtype))
            pooled_ones.append(own_BD)
            own_BD = self.norms[name](own_BD)
            branches.append(self.branches[name](own_BD))
            vectors.append(self.entries[name](own_BD))
            if self.fusion.needs_tokens:
                tokens_BNW, seen_BN = self._tokens(name, source, mask_BN, present_BM[:, k])
                tokens.append(tokens_BNW)
                masks.append(seen_BN)
        branch_logits_BMC = torch.stack(branches, dim=1)
        encoded = Encoded(torch.stack(vectors, dim=1), present_BM, tokens, masks, branch_logits_BMC)
        logits_BC, weights_BM = self.fusion(encoded)
        return Everything(logits_BC, branch_logits_BMC, pooled_ones[0], weights_BM)

    def _tokens(self, name: str, source: Tensor, mask_BN: Tensor | None, present_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, W) and which of them to look at (B, 1 + N): the empty one only where nothing else is."""
        own_BND = source if source.ndim == 3 else source[:, None]
        empty_B1D = torch.zeros_like(own_BND[:, :1]) + self.empty[name].to(own_BND.dtype)
        tokens_BNW = self.entries[name](self.norms[name](torch.cat([empty_B1D, own_BND], dim=1)))
        seen_BN = torch.ones_like(own_BND[..., 0]) if mask_BN is None or source.ndim == 2 else mask_BN
        seen_BN = seen_BN * present_B[:, None]
        return tokens_BNW, torch.cat([(1 - present_B)[:, None].to(seen_BN.dtype), seen_BN], dim=1)


def _mean(source: Tensor, mask_BN: Tensor | None) -> Tensor:
    """(B, D): the mean over tokens where `source` holds tokens."""
    if source.ndim == 2:
        return source
    return source.mean(dim=1) if mask_BN is None else pooled(source, mask_BN)


# --- what a case is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseReader:
    """How a film, a note and a row of a table become a case; stored in the checkpoint beside the weights."""

    spec: PreprocessSpec
    modalities: tuple[str, ...]
    table: TableSpec
    notes: NoteReader | None
    """None where notes are not read."""
    terms: tuple[str, ...] = ()
    """Blotted out of every note."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are read."""
        return ["text"] * (self.notes is not None) + [column.name for column in self.table.columns]

    def dtype(self, *, films: bool = True) -> np.dtype[Any]:
        """Of a row."""
        side, most = self.spec.image_size, 0 if self.notes is None else self.notes.max_tokens
        film = [("film", np.uint8, (side, side, self.spec.channels))]
        rest = [
            ("has_film", np.bool_),
            ("ids", np.int32, (most,)),
            ("length", np.int32),
            ("table", np.float32, (self.table.width,)),
            ("has_table", np.bool_),
        ]
        return np.dtype(film + rest if films else rest)

    def rows(
        self,
        films: Sequence[npt.NDArray[np.uint8] | None],
        columns: Mapping[str, Sequence[Any]],
        *,
        where: str = "the table",
    ) -> Rows:
        """Cases (B,) of preprocessed films (None where there is none) and what `columns` say of them.

        `columns` holds `text` and the table's columns; those it lacks are missing. DataError for a value of a numeric
        column that is no number.
        """
        rows = np.zeros(len(films), dtype=self.dtype())
        known = self.notes_of([film is not None for film in films], columns, where=where)
        for name in known.dtype.names or ():
            rows[name] = known[name]
        for row, film in enumerate(films):
            if film is not None:
                rows["film"][row] = film
        return rows

    def notes_of(self, has_film: Sequence[bool], columns: Mapping[str, Sequence[Any]], *, where: str) -> Rows:
        """The same rows without the field `film`."""
        count = len(has_film)
        rows = np.zeros(count, dtype=self.dtype(films=False))
        rows["has_film"] = has_film
        if self.notes is not None:
            tokens = self.notes.read(self.texts(columns.get("text", [""] * count)))
            rows["ids"], rows["length"] = tokens.ids_NT, tokens.lengths_N
        if self.table.width:
            rows["table"] = self.table.encode(columns, count=count, where=where)
            rows["has_table"] = (rows["table"] != self.table.missing()).any(axis=1)
        return rows

    def texts(self, notes: Sequence[Any]) -> list[str]:
        """The notes as the model reads them: plain, and without the terms to mask."""
        plain = ["" if note is None or note != note else clean(str(note)) for note in notes]
        return [mask_terms(note, self.terms) for note in plain]

    def inputs(self, rows: Rows, image_BCHW: Tensor | None) -> CaseInputs:
        """The tensors of `rows`; `image_BCHW` are their films, normalised."""
        case = CaseInputs()
        if "image" in self.modalities:
            case = replace(case, image_BCHW=image_BCHW, has_image_B=_ones(rows["has_film"]))
        if "text" in self.modalities:
            ids_BT, mask_BT = padded(rows["ids"], rows["length"])
            case = replace(case, ids_BT=ids_BT, mask_BT=mask_BT)
        if "table" in self.modalities:
            case = replace(case, table_BK=torch.from_numpy(rows["table"].copy()), has_table_B=_ones(rows["has_table"]))
        return case


def _ones(known: npt.NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(known.astype(np.float32))


# --- building --------------------------------------------------------------------------------------------------


def new_model(
    config: Config,
    *,
    modalities: Sequence[str],
    table: TableSpec,
    classes: Sequence[str],
    random_image: bool = False,
    text_state: Mapping[str, Any] | None = None,
) -> tuple[MultimodalClassifier, NoteReader | None]:
    """A network with pretrained encoders and new heads, as `config` says; and the reader of its notes.

    `text_state` builds the text encoder of a checkpoint instead, `random_image` leaves out the image encoder's weights.
    """
    settings = config.multimodal
    fusion_class(settings.fusion)  # a wrong name is said before encoders are loaded
    text, notes = None, None
    if "text" in modalities and text_state is not None:
        text, notes = text_encoder.from_state(text_state)
        text.train_last(settings.text_layers)
    elif "text" in modalities:
        text, notes = text_encoder.load_text_encoder(
            settings.text_model, max_tokens=settings.max_tokens, trained_layers=settings.text_layers
        )
    image = _image_model(config, modalities, classes, random=random_image)
    return _assembled(config, modalities, image, text, table, classes), notes


def build_model(state: Mapping[str, Any], config: Config, *, classes: Sequence[str]) -> MultimodalClassifier:
    """The network of a checkpoint, its weights still to be filled; `state` is the checkpoint's `multimodal`."""
    modalities = state["modalities"]
    text = None
    if "text" in modalities:
        text, _ = text_encoder.from_state(state["text"])
        text.train_last(config.multimodal.text_layers)
    image = _image_model(config, modalities, classes, random=True)
    return _assembled(config, modalities, image, text, TableSpec.from_state(state["table"]), classes)


def _image_model(
    config: Config, modalities: Sequence[str], classes: Sequence[str], *, random: bool
) -> Classifier | None:
    if "image" not in modalities:
        return None
    return model_from_config(config.model, num_classes=len(classes), image_size=config.data.image_size, random=random)


def _assembled(
    config: Config,
    modalities: Sequence[str],
    image: Classifier | None,
    text: TextEncoder | None,
    table: TableSpec,
    classes: Sequence[str],
) -> MultimodalClassifier:
    return MultimodalClassifier(
        modalities,
        image=image,
        text=text,
        table_width=table.width,
        num_classes=len(classes),
        settings=config.multimodal,
        model=config.model,
    )


def reader_state(reader: CaseReader, model: MultimodalClassifier) -> dict[str, Any]:
    """What a checkpoint keeps as `multimodal`: plain values."""
    state = {
        "modalities": list(reader.modalities),
        "table": reader.table.to_state(),
        "terms": list(reader.terms),
    }
    if model.text is not None and reader.notes is not None:
        state["text"] = text_encoder.to_state(model.text, reader.notes)
    return state


def read_state(state: Mapping[str, Any], spec: PreprocessSpec) -> CaseReader:
    """The reader a checkpoint or bundle stored; CheckpointError when it is not whole."""
    try:
        modalities = tuple(state["modalities"])
        text = state["text"] if "text" in modalities else None
        notes = None if text is None else NoteReader(text["tokenizer"], max_tokens=int(text["max_tokens"]))
        return CaseReader(spec, modalities, TableSpec.from_state(state["table"]), notes, tuple(state["terms"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: what it says of its notes and tables is damaged ({error!r})") from None


def parameter_groups(model: MultimodalClassifier, config: Config) -> list[dict[str, Any]]:
    """As of `models.parameter_groups`, with the text encoder at its own rate."""
    rates = {
        "head": config.training.learning_rate,
        "backbone": config.training.backbone_lr,
        "text": config.multimodal.text_lr,
    }
    groups = []
    for name, rate in rates.items():
        part: nn.Module | None = getattr(model, name)
        own = [] if part is None else list(part.parameters())
        for decayed in (True, False):
            parameters = [item for item in own if (item.ndim > 1) == decayed]
            if parameters:
                decay = config.training.weight_decay if decayed else 0.0
                groups.append({"name": name, "params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return groups


def self_check(say: Callable[[str], None] = print) -> None:
    """Every fusion on random features, with all, some and none of the modalities."""
    from fusion import FUSIONS

    torch.manual_seed(0)
    for name in FUSIONS:
        settings = MultimodalConfig(fusion=name, width=32)
        head = CaseHead({"image": 40, "text": 24, "table": 5}, num_classes=2, settings=settings, model=ModelConfig())
        tokens = head.fusion.needs_tokens
        case = CaseInputs(
            has_image_B=torch.tensor([1.0, 1.0, 0.0, 0.0]),
            mask_BT=torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
            table_BK=torch.zeros(4, 5),
            has_table_B=torch.tensor([1.0, 0.0, 0.0, 0.0]),
            image_features=torch.randn(4, 9, 40) if tokens else torch.randn(4, 40),
            text_features=torch.randn(4, 2, 24) if tokens else torch.randn(4, 24),
        )
        with torch.inference_mode():
            said = head.eval()(case)
        assert bool(said.heads_BXC.isfinite().all())
        weights = "none" if said.weights_BM is None else [round(value, 2) for value in said.weights_BM[0].tolist()]
        say(f"{name}: logits {tuple(said.heads_BXC.shape)}, weights of the first case {weights}")
    say("multimodal: ok")


if __name__ == "__main__":
    self_check()
