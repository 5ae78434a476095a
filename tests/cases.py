"""Synthetic cases for the tests of multimodal models: films with a bright half, notes, a tiny BERT made here."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("lungs", "are", "clear", "dense", "left", "right", "heart", "normal", "fever", "cough", "no", "covid", "un",
         "##seen", "##s", ".", ",", "-", "1", "2", "9", "a", "b", "c", "d", "e", "##a", "##b", "##e")  # fmt: skip

TINY_CASES: dict[str, Any] = {
    "model.model_type": "test_efficientnet",
    "model.pretrained": False,
    "model.hidden_features": 32,
    "model.dropout_rate": 0.1,
    "model.freeze_backbone": True,
    "data.image_size": 32,
    "data.batch_size": 16,
    "data.val_fraction": 0.25,
    "data.augmentation_prob": 0.0,
    "data.colour": "grey",
    "training.num_epochs": 2,
    "training.learning_rate": 3e-3,
    "training.backbone_lr": 3e-3,
    "training.input_gate": False,
    "multimodal.max_tokens": 32,
    "multimodal.width": 32,
    "multimodal.text_lr": 3e-3,
    "runtime.device": "cpu",
}


def write_bert(folder: Path, *, layers: int = 2, seed: int = 0) -> Path:
    """A BERT of random weights with a WordPiece vocabulary, as `AutoModel` and `AutoTokenizer` read one."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    facts = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    return folder


def film(*, bright_left: bool, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """A noisy grey film, one half of it bright."""
    picture = rng.normal(70, 12, (side, side))
    half = slice(0, side // 2) if bright_left else slice(side // 2, side)
    picture[:, half] += 110
    return np.clip(picture, 0, 255).astype(np.uint8)


def write_cases(
    folder: Path,
    *,
    count: int = 160,
    xor: bool = True,
    no_text: float = 0.0,
    no_film: float = 0.0,
    seed: int = 0,
) -> Path:
    """A manifest of cases with films, notes and ages; with `xor` neither film nor note alone tells the class."""
    rng = np.random.default_rng(seed)
    (folder / "films").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        left, dense = bool(number % 2), bool(number // 2 % 2)
        positive = left != dense if xor else dense
        name = f"films/case{number:04d}.png"
        Image.fromarray(film(bright_left=left, rng=rng)).save(folder / name)
        note = f"fever , {'dense' if dense else 'clear'} {rng.choice(['lungs', 'heart'])} ."
        rows.append(
            {
                "path": "" if rng.random() < no_film else name,
                "label": "PNEUMONIA" if positive else "NORMAL",
                "patient_id": f"p{number}",
                "text": "" if rng.random() < no_text else note,
                "age": str(int(rng.integers(20, 90))),
                "sex": str(rng.choice(["F", "M", ""])),
            }
        )
    path = folder / "cases.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
