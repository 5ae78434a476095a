"""How modalities are joined: a registry of fusions, each one class from encoded modalities to logits.

    fusion = create_fusion("gated", modalities=("image", "text"), width=256, num_classes=2, ...)
    logits_BC, weights_BM = fusion(encoded)

A new one is a subclass with a name: it is then a value of `multimodal.fusion`. What is missing arrives as a learned
empty vector, and is given no weight where a fusion has weights. Legend: B batch, M modalities, W common width, N tokens
of a modality (the empty one first), C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from errors import ConfigError, nearest
from models import make_head

FUSIONS: dict[str, type[Fusion]] = {}
"""Name → class; filled by the subclasses of `Fusion`."""


class Encoded(NamedTuple):
    """A batch of cases as every fusion takes it."""

    vectors_BMW: Tensor
    """One vector a modality; the learned empty one where it is missing."""
    present_BM: Tensor
    """1 where the case has the modality, else 0."""
    tokens: Sequence[Tensor]
    """Per modality (B, N, W), the empty token first; none where `needs_tokens` is false."""
    masks: Sequence[Tensor]
    """Per modality (B, N), 1 where a token is to be looked at; never all 0."""
    branch_logits_BMC: Tensor
    """What each modality says alone."""


class Fused(NamedTuple):
    """Logits (B, C), and how much each modality weighed (B, M), rows of sum 1; None where a fusion has no weights."""

    logits_BC: Tensor
    weights_BM: Tensor | None


class Fusion(nn.Module, ABC):
    """One way of joining modalities."""

    name: ClassVar[str]
    needs_tokens: ClassVar[bool] = False
    """Whether it looks at single tokens of note and film, not at their means."""
    least: ClassVar[int] = 2
    """Modalities it needs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FUSIONS[cls.name] = cls

    def __init__(self, *, count: int, width: int, num_classes: int, dropout_rate: float, hidden: int, heads: int):
        super().__init__()
        self.count, self.width = count, width
        self.build(heads)
        size = self.output_width()
        if size:
            self.classifier = make_head(
                size, num_classes=num_classes, dropout_rate=dropout_rate, hidden_features=hidden
            )

    def build(self, heads: int) -> None:
        """Make the modules that come before the classifier."""

    @abstractmethod
    def output_width(self) -> int:
        """Length of the representation the classifier takes; 0 where there is no classifier."""

    @abstractmethod
    def forward(self, encoded: Encoded) -> Fused:
        """Logits and weights of a batch."""


def create_fusion(
    name: str,
    *,
    modalities: Sequence[str],
    width: int,
    num_classes: int,
    dropout_rate: float,
    hidden: int,
    heads: int,
) -> Fusion:
    """The fusion called `name`; ConfigError for an unknown one, and for too few modalities."""
    kind = fusion_class(name)
    if len(modalities) < kind.least:
        raise ConfigError(
            f"multimodal.fusion: {name} joins {kind.least} modalities or more, and there is {' and '.join(modalities)} "
            "only; use concatenation or late"
        )
    return kind(
        count=len(modalities),
        width=width,
        num_classes=num_classes,
        dropout_rate=dropout_rate,
        hidden=hidden,
        heads=heads,
    )


def fusion_class(name: str) -> type[Fusion]:
    """The class registered as `name`; ConfigError with the nearest name."""
    if name not in FUSIONS:
        raise ConfigError(f"multimodal.fusion: {name!r} is not one of {', '.join(FUSIONS)}{nearest(name, FUSIONS)}")
    return FUSIONS[name]


class Concatenation(Fusion):
    """The vectors side by side, then a small network."""

    name = "concatenation"
    least = 1

    def output_width(self) -> int:
        """All vectors."""
        return self.count * self.width

    def forward(self, encoded: Encoded) -> Fused:
        """No weights: the network decides."""
        return Fused(self.classifier(encoded.vectors_BMW.flatten(1)), None)


class CrossAttention(Fusion):
    """Each modality's mean asks the tokens of all others; what is found corrects the mean of the single opinions.

    Multi-head attention as in Vaswani 2017, with a residual and a norm; every direction has its own weights. The
    correction starts at 0, so that few cases leave the fusion near what the modalities say alone (`Late`).
    """

    name = "cross_attention"
    needs_tokens = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        last: Any = self.classifier[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def build(self, heads: int) -> None:
        """One attention a modality, and a score for each."""
        self.asking = nn.ModuleList(Attention(self.width, heads) for _ in range(self.count))
        self.norm = nn.ModuleList(nn.LayerNorm(self.width) for _ in range(self.count))
        self.score = nn.Linear(self.width, 1)

    def output_width(self) -> int:
        """An answer a modality."""
        return self.count * self.width

    def forward(self, encoded: Encoded) -> Fused:
        """The weights are those the answers are multiplied by."""
        answers = []
        for own in range(self.count):
            others = [k for k in range(self.count) if k != own]
            keys_BKW = torch.cat([encoded.tokens[k] for k in others], dim=1)
            seen_BK = torch.cat([encoded.masks[k] for k in others], dim=1)
            question_B1W = encoded.vectors_BMW[:, own, None]
            found_B1W, _ = self.asking[own](question_B1W, keys_BKW, seen_BK)
            answers.append(self.norm[own](question_B1W + found_B1W)[:, 0])
        answers_BMW = torch.stack(answers, dim=1)
        weights_BM = masked_softmax(self.score(torch.tanh(answers_BMW))[..., 0], encoded.present_BM)
        scaled_BMW = answers_BMW * (weights_BM * self.count)[..., None]
        # Detached: the single heads are what the fusion is measured against, and learn from their own loss alone.
        alone_BC, _ = mean_opinion(encoded.branch_logits_BMC.detach(), encoded.present_BM)
        return Fused(alone_BC + self.classifier(scaled_BMW.flatten(1)), weights_BM)


class Attention(nn.Module):
    """Multi-head attention that gives its weights and exports to ONNX."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries_BNW: Tensor, keys_BKW: Tensor, seen_BK: Tensor) -> tuple[Tensor, Tensor]:
        """What is found (B, N, W), and the weights (B, N, K), averaged over heads; `seen_BK` is 0 where hidden."""
        query, key, value = (
            layer(item).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, item in ((self.query, queries_BNW), (self.key, keys_BKW), (self.value, keys_BKW))
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = masked_softmax(scores, seen_BK[:, None, None, :])
        found_BNW = (weights @ value).transpose(1, 2).flatten(2)
        return self.out(found_BNW), weights.mean(dim=1)


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the last axis of what `seen` (1 or 0) shows; the plain one of a row that shows nothing."""
    nothing = (seen.sum(dim=-1, keepdim=True) == 0).to(scores.dtype)
    hidden = 1 - torch.maximum(seen.to(scores.dtype), nothing)
    return torch.softmax(scores.float() - hidden.float() * 1e9, dim=-1).to(scores.dtype)


class Gated(Fusion):
    """The gated multimodal unit (Arevalo 2017): each feature is a mixture of the modalities, weighed by all of them."""

    name = "gated"

    def build(self, heads: int) -> None:
        """A view of each modality, and the gates."""
        self.views = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.count))
        self.gates = nn.Linear(self.count * self.width, self.count * self.width)

    def output_width(self) -> int:
        """One mixture."""
        return self.width

    def forward(self, encoded: Encoded) -> Fused:
        """The weights are the gates, averaged over the features."""
        views_BMW = torch.stack(
            [torch.tanh(view(encoded.vectors_BMW[:, k])) for k, view in enumerate(self.views)], dim=1
        )
        scores_BMW = self.gates(encoded.vectors_BMW.flatten(1)).unflatten(1, (self.count, self.width))
        gates_BWM = masked_softmax(scores_BMW.transpose(1, 2), encoded.present_BM[:, None, :])
        mixed_BW = (gates_BWM.transpose(1, 2) * views_BMW).sum(dim=1)
        return Fused(self.classifier(mixed_BW), gates_BWM.mean(dim=1))


class Film(Fusion):
    """Feature-wise linear modulation (Perez 2018): the first modality, scaled and shifted by what the others say."""

    name = "film"

    def build(self, heads: int) -> None:
        """Scale and shift from the other modalities."""
        self.modulation = nn.Linear((self.count - 1) * self.width, 2 * self.width)
        self.norm = nn.LayerNorm(self.width)

    def output_width(self) -> int:
        """The modulated vector."""
        return self.width

    def forward(self, encoded: Encoded) -> Fused:
        """No weights: a modulation has none."""
        scale_BW, shift_BW = self.modulation(encoded.vectors_BMW[:, 1:].flatten(1)).chunk(2, dim=1)
        return Fused(self.classifier((1 + scale_BW) * self.norm(encoded.vectors_BMW[:, 0]) + shift_BW), None)


class Bilinear(Fusion):
    """Low-rank multimodal fusion (Liu 2018): the product of one linear map a modality, each with a constant term.

    The constants start at 1, so that the product holds the single modalities beside their interaction.
    """

    name = "bilinear"

    def build(self, heads: int) -> None:
        """A map a modality."""
        maps = [nn.Linear(self.width, self.width) for _ in range(self.count)]
        for item in maps:
            nn.init.ones_(item.bias)
        self.maps = nn.ModuleList(maps)

    def output_width(self) -> int:
        """The rank, which is the common width."""
        return self.width

    def forward(self, encoded: Encoded) -> Fused:
        """No weights: a product has none."""
        factors = [layer(encoded.vectors_BMW[:, k]) for k, layer in enumerate(self.maps)]
        return Fused(self.classifier(torch.stack(factors, dim=1).prod(dim=1)), None)


class Late(Fusion):
    """The mean of what the present modalities say alone; cannot learn that one changes the meaning of another."""

    name = "late"
    least = 1

    def output_width(self) -> int:
        """No classifier of its own."""
        return 0

    def forward(self, encoded: Encoded) -> Fused:
        """Every present modality weighs the same; where none is, all do."""
        return mean_opinion(encoded.branch_logits_BMC, encoded.present_BM)


def mean_opinion(logits_BMC: Tensor, present_BM: Tensor) -> Fused:
    """The mean over present modalities of what each says alone, and their weights."""
    weights_BM = masked_softmax(torch.zeros_like(present_BM), present_BM)
    return Fused((logits_BMC * weights_BM[..., None]).sum(dim=1), weights_BM)
