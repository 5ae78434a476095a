"""Notes to vectors: text brought to a plain form, terms blotted out, tokens, and a BERT-family encoder.

    encoder, reader = load_text_encoder("dmis-lab/biobert-base-cased-v1.2", max_tokens=256, trained_layers=0)
    tokens_BTD = encoder(*reader.read(["No effusion.", ""]).tensors())

An encoder comes from a folder or, by hub name, from the hub or its cache; what a checkpoint needs to build it again
(its configuration and its tokenizer) is plain text inside the checkpoint. Code from a hub is never run. Any text can
be read: an empty one has no tokens, a long one is cut. Legend: B batch, T tokens, D width of the encoder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from errors import CheckpointError, ConfigError, DataError, first_line
from models import hub_answers, keep_frozen_still
from runtime import log

BUCKET = 16
"""Batches are as long as their longest note, rounded up to a multiple of this, so that few lengths occur."""
CHARACTERS_A_TOKEN = 64
"""A note is cut to this many characters for each token that may be read of it before it is taken apart."""


# --- plain text ------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """`text` in one line without control characters or broken surrogates; '' where nothing is to be read."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in whole).split())


def read_terms(path: Path) -> list[str]:
    """The terms of a file, one a line, `#` for remarks; DataError when it cannot be read or names none."""
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of terms to mask; give one word or phrase a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable list of terms ({first_line(error)}); save it as UTF-8 text") from None
    terms = list(dict.fromkeys(line for line in lines if line.strip("* ")))
    if not terms:
        raise DataError(f"{path}: names no term to mask; give one word or phrase a line")
    return terms


def mask_terms(text: str, terms: Sequence[str]) -> str:
    """`text` without the whole words or phrases `terms`, whatever their case; `*` stands for the rest of a word."""
    return text if not terms else " ".join(_pattern(tuple(terms)).sub(" ", text).split())


def _pattern(terms: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first: 'covid-19' must not leave '-19' behind where 'covid' is a term as well.
    words = sorted(terms, key=len, reverse=True)
    parts = [r"\s+".join(re.escape(word).replace(r"\*", r"\w*") for word in term.split()) for term in words]
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)


# --- tokens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Notes as rows of token numbers, filled up with zeros."""

    ids_NT: npt.NDArray[np.int32]
    lengths_N: npt.NDArray[np.int32]
    """Tokens of each note; 0 for an empty one."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """ids (B, T) int64 and mask (B, T), 1 where there is a token, as long as the longest note needs."""
        return padded(self.ids_NT, self.lengths_N)


def padded(ids_NT: npt.NDArray[np.int32], lengths_N: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    """ids (B, T) int64 and mask (B, T) float of rows cut to the bucket of the longest."""
    width = bucket_length(int(lengths_N.max(initial=0)), most=ids_NT.shape[1])
    mask = np.arange(width)[None] < lengths_N[:, None]
    return torch.from_numpy(ids_NT[:, :width].astype(np.int64)), torch.from_numpy(mask.astype(np.float32))


def bucket_length(longest: int, *, most: int) -> int:
    """`longest` rounded up to a multiple of BUCKET, at least one bucket, at most `most`."""
    return min(most, max(1, -(-longest // BUCKET)) * BUCKET)


class NoteReader:
    """Turns notes into tokens; all it needs is the tokenizer's own JSON and a length."""

    def __init__(self, tokenizer_json: str, *, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer_json, self.max_tokens = tokenizer_json, max_tokens
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    def read(self, notes: Sequence[str]) -> Tokens:
        """Tokens of `notes`, (N, max_tokens); what is longer is cut off."""
        texts = [clean(note) for note in notes]
        most = self.max_tokens * CHARACTERS_A_TOKEN
        encoded = self._tokenizer.encode_batch([text[:most] for text in texts])
        ids_NT = np.zeros((len(texts), self.max_tokens), dtype=np.int32)
        lengths = np.zeros(len(texts), dtype=np.int32)
        for row, (text, item) in enumerate(zip(texts, encoded)):
            if text:
                ids_NT[row, : len(item.ids)], lengths[row] = item.ids, len(item.ids)
        return Tokens(ids_NT, lengths)

    def words(self, note: str) -> list[tuple[str, list[int]]]:
        """(word as written, positions of its tokens) of a note, in order; special tokens belong to none."""
        text = clean(note)[: self.max_tokens * CHARACTERS_A_TOKEN]
        encoded = self._tokenizer.encode(text)
        found: list[tuple[int, int, list[int]]] = []
        for position, (start, end) in enumerate(encoded.offsets):
            if encoded.special_tokens_mask[position] or end <= start:
                continue
            if found and " " not in text[found[-1][1] : start]:
                begin, _, positions = found[-1]
                found[-1] = (begin, end, [*positions, position])
            else:
                found.append((start, end, [position]))
        return [(text[start:end], positions) for start, end, positions in found]


# --- the encoder -----------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """A BERT-family network without its pooler."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        facts: Any = network
        facts.pooler = None  # a sentence classifier's; what is pooled here are the tokens
        self.network = network
        self.width = int(facts.config.hidden_size)
        self.dtype_min = float(torch.finfo(torch.float32).min)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Token vectors (B, T, D); `mask_BT` is 1 where there is a token. A row without any gives finite values."""
        counted_BT = torch.cumsum(torch.ones_like(mask_BT), dim=1)
        seen_BT = torch.maximum(mask_BT, (counted_BT == 1).to(mask_BT.dtype))
        extra: dict[str, Tensor] = {}
        if getattr(self.network.config, "model_type", "") == "bert":
            # Given, because left to itself the network would fix both to the traced length in an exported graph.
            extra = {
                "position_ids": torch.cumsum(torch.ones_like(ids_BT), dim=1) - 1,
                "token_type_ids": torch.zeros_like(ids_BT),
            }
        # In four dimensions it is taken as it is: added to the attention's scores.
        added_B1TT = ((1 - seen_BT) * self.dtype_min)[:, None, None, :].expand(-1, 1, ids_BT.shape[1], -1)
        return self.network(input_ids=ids_BT, attention_mask=added_B1TT, **extra).last_hidden_state

    def layers(self) -> list[nn.Module]:
        """The transformer layers from input to output: the longest list of modules there is."""
        lists = [list(item) for item in self.network.modules() if isinstance(item, nn.ModuleList)]
        return max(lists, key=len, default=[])

    def train_last(self, count: int) -> None:
        """Train the last `count` layers; 0 freezes the encoder, -1 opens all of it."""
        layers = self.layers()
        if count > len(layers):
            raise ConfigError(
                f"multimodal.text_layers: {count}, but the text encoder has {len(layers)} layers; -1 trains all"
            )
        self.network.requires_grad_(count == -1)
        for layer in layers[len(layers) - count :] if count > 0 else ():
            layer.requires_grad_(True)

    def train(self, mode: bool = True) -> TextEncoder:
        """Like nn.Module.train, but what is frozen stays in eval mode: its dropout stands still."""
        super().train(mode)
        if mode:
            keep_frozen_still(self.network)
        return self


def pooled(tokens_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean (B, D) of the token vectors that `mask_BT` shows; 0 where it shows none."""
    weights_BT1 = mask_BT.to(tokens_BTD.dtype)[..., None]
    return (tokens_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1).clamp(min=1)


def load_text_encoder(name: str, *, max_tokens: int, trained_layers: int) -> tuple[TextEncoder, NoteReader]:
    """The pretrained encoder of a folder or hub name, and what turns notes into its tokens.

    CheckpointError in one line when it cannot be had or is no BERT-family model.
    """
    source, only_local = _source(name)
    from transformers import AutoModel, AutoTokenizer

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else it asks the hub for another file format
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=only_local)
            network, found = AutoModel.from_pretrained(
                source,
                local_files_only=only_local,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # the library raises anything over a folder that is not what it expects
        raise CheckpointError(
            f"multimodal.text_model: {name!r} cannot be read as a text encoder ({first_line(error)}); give a folder "
            "with config.json, weights and tokenizer"
        ) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    missing = [item for item in found["missing_keys"] if not item.startswith("pooler.")]
    known = 0 if backend is None else backend.get_vocab_size()
    few = known < getattr(network.config, "vocab_size", 0) / 2
    if few or missing or not hasattr(network.config, "hidden_size"):
        reason = f"{len(missing)} weights are missing" if missing else "it is not of the BERT family"
        reason = f"its tokenizer knows only {known} tokens" if few else reason
        raise CheckpointError(f"multimodal.text_model: {name!r}: {reason}; give another folder or hub name")
    assert backend is not None
    encoder = TextEncoder(network)
    encoder.train_last(trained_layers)
    most = _longest(network.config)
    if max_tokens > most:
        log.info("multimodal.max_tokens: %s reads %d tokens at most", name, most)
    return encoder, NoteReader(backend.to_str(), max_tokens=min(max_tokens, most))


def _longest(config: Any) -> int:
    """Tokens an encoder has positions for; RoBERTa counts its positions from the padding's number on."""
    positions = int(getattr(config, "max_position_embeddings", 512))
    return positions - (config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0)


def _source(name: str) -> tuple[str, bool]:
    """(folder or hub name, whether to keep off the network); CheckpointError where the encoder is out of reach."""
    if Path(name).is_dir():
        return name, True
    from huggingface_hub import constants, try_to_load_from_cache

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"multimodal.text_model: {name}: no such folder; name one with config.json and weights")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name, True
    if not hub_answers(constants.ENDPOINT):
        raise CheckpointError(
            f"multimodal.text_model: {name!r} is neither a folder nor in the cache, and no hub is in reach; give a "
            f"local folder with --text-model FOLDER, or fill the cache folder {constants.HF_HUB_CACHE}"
        )
    return name, False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and remarks."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def to_state(encoder: TextEncoder, reader: NoteReader) -> dict[str, Any]:
    """What a checkpoint keeps beside the weights: plain values."""
    config: Any = encoder.network.config
    facts = json.loads(json.dumps(config.to_dict(), default=str))
    facts.pop("_name_or_path", None)  # a folder of the machine it was trained on
    return {"config": facts, "tokenizer": reader.tokenizer_json, "max_tokens": reader.max_tokens}


def from_state(state: Mapping[str, Any]) -> tuple[TextEncoder, NoteReader]:
    """The encoder, its weights still to be filled, and the reader that `to_state` stored; asks nothing of a network."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.for_model(**state["config"])
        with _quiet():
            network = AutoModel.from_config(config, attn_implementation="eager")
        reader = NoteReader(state["tokenizer"], max_tokens=int(state["max_tokens"]))
    except Exception as error:  # a newer library may refuse what an older one wrote, in any way
        raise CheckpointError(f"checkpoint: its text encoder cannot be built ({first_line(error)})") from None
    return TextEncoder(network.float()), reader
