"""text_encoder: any text can be read, masks hold, and what cannot be had is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import text_encoder
from errors import CheckpointError, ConfigError, DataError
from tests.cases import write_bert
from text_encoder import NoteReader, TextEncoder, clean, load_text_encoder, mask_terms, padded, pooled, read_terms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), layers=3)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[TextEncoder, NoteReader]:
    encoder, reader = load_text_encoder(str(folder), max_tokens=48, trained_layers=0)
    return encoder.eval(), reader


ODD_NOTES = {
    "empty": "",
    "blanks": " \t\n ",
    "long": "dense lungs " * 5000,
    "one word": "x" * 100_000,
    "other scripts": "Лёгкие чистые. 肺部清晰。 الرئتان صافيتان",
    "emoji": "👩‍⚕️ fever 🤒🤧",
    "null bytes": "dense\0lungs\0",
    "broken surrogate": "dense \ud83e lungs",
    "control": "\x07\x1b[31mdense\x7f",
    "html": "<script>alert(1)</script>",
}


@pytest.mark.parametrize("kind", ODD_NOTES)
def test_any_text_gives_finite_vectors(kind: str, loaded: tuple[TextEncoder, NoteReader]) -> None:
    encoder, reader = loaded
    tokens = reader.read([ODD_NOTES[kind], "fever"])
    assert tokens.ids_NT.shape == (2, 48) and tokens.lengths_N[0] <= 48
    ids_BT, mask_BT = tokens.tensors()
    with torch.inference_mode():
        found = encoder(ids_BT, mask_BT)
    assert found.isfinite().all()


def test_an_empty_note_has_no_tokens_and_a_null_byte_is_a_blank(loaded: tuple[TextEncoder, NoteReader]) -> None:
    _, reader = loaded
    tokens = reader.read(["", " \n", "dense\0lungs", "dense lungs"])
    assert tokens.lengths_N[0] == tokens.lengths_N[1] == 0
    assert np.array_equal(tokens.ids_NT[2], tokens.ids_NT[3])


def test_vectors_do_not_depend_on_padding_or_on_neighbours(loaded: tuple[TextEncoder, NoteReader]) -> None:
    encoder, reader = loaded
    tokens = reader.read(["dense lungs .", "fever , cough , no heart , dense left lungs , right lungs are clear ."])
    with torch.inference_mode():
        together = encoder(*tokens.tensors())
        alone = encoder(*padded(tokens.ids_NT[:1], tokens.lengths_N[:1]))
    length = int(tokens.lengths_N[0])
    # Other shapes take other kernels: equal but for rounding.
    torch.testing.assert_close(together[0, :length], alone[0, :length], rtol=1e-4, atol=1e-5)


def test_vectors_are_those_of_the_library_itself(folder: Path, loaded: tuple[TextEncoder, NoteReader]) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder, reader = loaded
    notes = ["dense lungs .", "fever , cough"]
    inputs = AutoTokenizer.from_pretrained(folder)(notes, return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
        found = encoder(*reader.read(notes).tensors())[:, : expected.shape[1]]
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_pooling_counts_only_what_the_mask_shows() -> None:
    tokens_BTD = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]], [[5.0, 5.0], [1.0, 1.0], [2.0, 2.0]]])
    found = pooled(tokens_BTD, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert found.tolist() == [[2.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize(("count", "trained"), [(0, 0), (1, 1), (2, 2), (-1, 3)])
def test_last_layers_are_trained_and_the_rest_stands_still(folder: Path, count: int, trained: int) -> None:
    encoder, _ = load_text_encoder(str(folder), max_tokens=16, trained_layers=count)
    opened = [all(item.requires_grad for item in layer.parameters()) for layer in encoder.layers()]
    assert opened == [False] * (3 - trained) + [True] * trained
    embeddings = [item.requires_grad for name, item in encoder.named_parameters() if "embeddings" in name]
    assert all(value == (count == -1) for value in embeddings)
    encoder.train()
    assert [layer.training for layer in encoder.layers()] == opened


def test_more_layers_than_there_are_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has 3 layers"):
        load_text_encoder(str(folder), max_tokens=16, trained_layers=4)


def test_what_a_checkpoint_keeps_builds_the_same_encoder(loaded: tuple[TextEncoder, NoteReader]) -> None:
    encoder, reader = loaded
    again, same_reader = text_encoder.from_state(text_encoder.to_state(encoder, reader))
    again.load_state_dict(encoder.state_dict())
    notes = reader.read(["unseen dense lungs", ""])
    assert np.array_equal(notes.ids_NT, same_reader.read(["unseen dense lungs", ""]).ids_NT)
    with torch.inference_mode():
        assert torch.equal(encoder(*notes.tensors()), again.eval()(*notes.tensors()))


def test_words_are_put_together_from_their_tokens(loaded: tuple[TextEncoder, NoteReader]) -> None:
    _, reader = loaded
    words = reader.words("Unseen covid-19, dense")
    assert [word for word, _ in words] == ["Unseen", "covid-19,", "dense"]
    positions = [position for _, own in words for position in own]
    assert positions == list(range(1, 1 + len(positions)))  # [CLS] stands first


@pytest.mark.parametrize(
    ("terms", "left"),
    [
        (["covid"], "-19 and SARS CoV 2, covids"),
        (["covid-19", "covid"], "and SARS CoV 2, covids"),
        (["covid*"], "-19 and SARS CoV 2,"),
        (["sars cov 2"], "COVID-19 and , covids"),
        (["and", "SARS   cov 2"], "COVID-19 , covids"),
    ],
)
def test_terms_are_blotted_out_as_whole_words(terms: list[str], left: str) -> None:
    assert mask_terms("COVID-19 and SARS CoV 2, covids", terms) == left


def test_terms_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("# the label\ncovid*\n\nPCR positive  # a test\ncovid*\n", encoding="utf-8")
    assert read_terms(path) == ["covid*", "PCR positive"]


def test_a_file_of_terms_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of terms"):
        read_terms(tmp_path / "terms.txt")
    (tmp_path / "terms.txt").write_text("# nothing\n *\n", encoding="utf-8")
    with pytest.raises(DataError, match="names no term"):
        read_terms(tmp_path / "terms.txt")
    (tmp_path / "terms.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match="UTF-8"):
        read_terms(tmp_path / "terms.txt")


def test_clean_keeps_one_line() -> None:
    assert clean("a\0b\r\n c\t d") == "a b c d"


def test_an_encoder_out_of_reach_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "hub_answers", lambda endpoint: False)
    with pytest.raises(CheckpointError, match="--text-model FOLDER") as stopped:
        load_text_encoder("dmis-lab/biobert-base-cased-v1.2", max_tokens=16, trained_layers=0)
    assert "\n" not in str(stopped.value) and "biobert" in str(stopped.value)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_damaged_folder_is_one_line(damage: str, tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert", layers=1)
    (folder / damage).write_bytes(b"{")
    if damage == "vocab.txt":
        (folder / damage).unlink()
    with pytest.raises(CheckpointError, match=r"multimodal\.text_model") as stopped:
        load_text_encoder(str(folder), max_tokens=16, trained_layers=0)
    assert "\n" not in str(stopped.value)


def test_a_missing_folder_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_text_encoder("./nowhere/at/all", max_tokens=16, trained_layers=0)


def test_a_note_longer_than_the_encoder_is_cut_there(folder: Path) -> None:
    _, reader = load_text_encoder(str(folder), max_tokens=500, trained_layers=0)
    assert reader.max_tokens == 64 and reader.read(["dense " * 1000]).lengths_N[0] == 64
