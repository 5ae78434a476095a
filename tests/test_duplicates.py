"""Copies are found however they were changed, and films that are merely alike are not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

import synthetic
from duplicates import SIDE, candidate_pairs, connected, near_pairs, same_key, same_picture
from film_facts import eight_bit_grey, shrink, thumbnail
from preprocess import decode
from tests.planted import CHANGES, encoded

Film = npt.NDArray[np.uint8]
FILMS = 70


def reduced(data: bytes) -> Film:
    return thumbnail(shrink(eight_bit_grey(decode(data))))


@pytest.fixture(scope="module")
def drawn() -> list[Film]:
    return [synthetic.film(pneumonia=bool(seed % 2), seed=seed, size=160) for seed in range(FILMS)]


@pytest.fixture(scope="module")
def thumbnails(drawn: list[Film]) -> Film:
    return np.stack([reduced(encoded(film)) for film in drawn])


def test_films_that_are_merely_alike_are_no_pair(thumbnails: Film) -> None:
    assert near_pairs(thumbnails) == []


@pytest.mark.parametrize("change", CHANGES)
def test_every_changed_copy_is_found_and_nothing_else(change: str, drawn: list[Film], thumbnails: Film) -> None:
    copies = np.stack([reduced(CHANGES[change](film)) for film in drawn[:15]])
    found = near_pairs(np.concatenate([thumbnails, copies]))
    assert [(pair.first, pair.second) for pair in found] == [(row, FILMS + row) for row in range(15)]
    assert all(0.85 <= pair.correlation <= 1 for pair in found)


def test_the_pairs_do_not_depend_on_the_number_of_workers(drawn: list[Film], thumbnails: Film) -> None:
    every = np.concatenate([thumbnails, np.stack([reduced(CHANGES["cropped"](film)) for film in drawn[:10]])])
    assert near_pairs(every, workers=1) == near_pairs(every, workers=3)


def test_a_picture_is_itself_and_not_its_mirror_image(thumbnails: Film) -> None:
    assert same_picture(thumbnails[0], thumbnails[0]) == pytest.approx(1, abs=1e-5)
    assert same_picture(thumbnails[0], np.ascontiguousarray(thumbnails[0][:, ::-1])) == 0


def test_blank_films_are_nobodys_copy(thumbnails: Film) -> None:
    blank = np.zeros((5, SIDE, SIDE), np.uint8)
    assert near_pairs(np.concatenate([thumbnails[:20], blank])) == []
    assert near_pairs(blank) == near_pairs(blank[:0]) == near_pairs(thumbnails[:1]) == []


def test_candidates_grow_with_the_films_and_not_with_their_square() -> None:
    """Of 6,000 unrelated pictures and one copy, the candidates are few and hold the copy."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(6000, 8, 8)).astype(np.float32)
    smooth = np.kron(coarse, np.ones((8, 8), np.float32))
    films = np.clip(smooth * 30 + 128, 0, 255).astype(np.uint8)
    films = np.concatenate([films, np.clip(films[:1] * 0.8 + 10, 0, 255).astype(np.uint8)])
    with ThreadPoolExecutor(2) as pool:
        candidates = candidate_pairs(films, pool).tolist()
    assert [0, 6000] in candidates and len(candidates) < 6000


def test_groups_join_what_pairs_join_in_any_order() -> None:
    assert connected([(5, 3), (1, 2), (3, 1), (8, 9)]) == [[1, 2, 3, 5], [8, 9]]
    assert connected([]) == []


def test_equal_keys_form_groups_in_order_of_their_first_position() -> None:
    assert list(same_key(["b", "a", "c", "a", "b"])) == [[0, 4], [1, 3]]
