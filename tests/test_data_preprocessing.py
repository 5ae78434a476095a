"""data_preprocessing.py: manifests, patient splits, pixel cache, augmentation, order and loading."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import array_cache
import data_preprocessing as dp
import synthetic
from config import DataConfig
from errors import ConfigError, DataError
from preprocess import PreprocessSpec, apply, decode

SPEC = PreprocessSpec(image_size=32)


@pytest.fixture
def copied(films: Path, tmp_path: Path) -> Path:
    """A copy of the films that a test may damage."""
    return Path(shutil.copytree(films, tmp_path / "films"))


def write_manifest(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "manifest.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def split_of(config: DataConfig, seed: int = 0) -> dp.Manifest:
    return dp.split_manifest(dp.load_manifest(config), config, seed=seed)


# --- manifest ---


def test_class_folders_give_sorted_classes_and_named_splits(films: Path) -> None:
    manifest = dp.load_manifest(DataConfig(data_dir=str(films)))
    assert manifest.classes == ("NORMAL", "PNEUMONIA")
    assert manifest.counts() == {"train": {"NORMAL": 48, "PNEUMONIA": 48}, "test": {"NORMAL": 20, "PNEUMONIA": 20}}


def test_class_folders_without_splits_are_split_three_ways(copied: Path) -> None:
    manifest = split_of(DataConfig(data_dir=str(copied / "train")))
    assert set(manifest.counts()) == {"train", "val", "test"}
    assert all(min(counts.values()) > 0 for counts in manifest.counts().values())


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person12_bacteria_47.jpeg", "person12_bacteria"),
        ("person12_virus_48.jpeg", "person12_virus"),
        ("IM-0115-0001.jpeg", "IM-0115"),
        ("NORMAL2-IM-0115-0001-0002.jpeg", "NORMAL2-IM-0115"),
        ("scan7.png", "scan7"),
    ],
)
def test_published_file_names_carry_the_patient(name: str, patient: str) -> None:
    assert dp._patient_ids(pd.DataFrame({"path": [f"/x/{name}"]}), None) == [patient]


def test_another_naming_comes_through_a_pattern() -> None:
    table = pd.DataFrame({"path": ["/x/p07_a.png", "/x/p07_b.png"]})
    assert dp._patient_ids(table, r"^(p\d+)_") == ["p07", "p07"]


def test_a_wrong_pattern_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="patient_id_regex: .* is not a regular expression"):
        dp._patient_ids(pd.DataFrame({"path": ["/x/a.png"]}), "(")


def test_films_that_share_a_name_and_name_no_patient_are_not_one_patient(tmp_path: Path) -> None:
    paths = [f"{split}/{name}/0001.png" for split in ("train", "test") for name in ("A", "B")]
    rows = [{"path": path, "label": path.split("/")[1], "split": path.split("/")[0]} for path in paths]
    table = dp.load_manifest(
        DataConfig(manifest=str(write_manifest(tmp_path, [*rows, {"path": "7.png", "label": "A", "split": "train"}])))
    ).table
    assert list(table["patient_id"]) == [*paths, "7"]
    dp.check_no_leak(table)


def test_blanks_around_label_split_and_patient_make_no_other_ones(tmp_path: Path) -> None:
    rows = [
        {"path": "a.png", "label": "A ", "split": "train ", "patient_id": "p "},
        {"path": "b.png", "label": "A", "split": "train", "patient_id": "p"},
        {"path": "c.png", "label": "B", "split": "test", "patient_id": "q"},
    ]
    manifest = dp.load_manifest(DataConfig(manifest=str(write_manifest(tmp_path, rows))))
    assert manifest.classes == ("A", "B") and list(manifest.table["patient_id"]) == ["p", "p", "q"]


def test_the_manifests_patients_win_over_the_file_name(films: Path, tmp_path: Path) -> None:
    path = next((films / "train" / "NORMAL").iterdir())
    manifest = write_manifest(
        tmp_path,
        [{"path": str(path), "label": "A", "patient_id": "p"}] * 1
        + [{"path": str(next((films / "train" / "PNEUMONIA").iterdir())), "label": "B", "patient_id": ""}],
    )
    table = dp.load_manifest(DataConfig(manifest=str(manifest))).table
    assert table["patient_id"][0] == "p" and table["patient_id"][1].startswith("person")


def test_manifest_paths_are_relative_to_the_csv(copied: Path) -> None:
    films = sorted((copied / "train").rglob("*.jpeg"))
    manifest = write_manifest(copied, [{"path": str(f.relative_to(copied)), "label": f.parent.name} for f in films])
    loaded = dp.load_manifest(DataConfig(manifest=str(manifest)))
    assert all(Path(path).exists() for path in loaded.table["path"])
    assert loaded.relative_path(loaded.table["path"][0]).startswith("train/")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "a.png", "label": "A"}], "no column 'path'"),
        ([{"path": "a.png", "lable": "A"}], "no column 'label'; did you mean 'lable'"),
        ([{"path": "a.png", "label": "A"}, {"path": "b.png", "label": " "}], r"manifest.csv:3: empty label"),
        ([{"path": "", "label": "A"}], r"manifest.csv:2: empty path"),
        ([{"path": "a.png", "label": "A"}] * 2, r"manifest.csv:3: .*a.png is listed twice"),
        (
            [{"path": "a.png", "label": "A", "split": "dev"}],
            r"manifest.csv:2: split 'dev' is not one of train, val, test",
        ),
        (
            [{"path": "a.png", "label": "A", "split": "train"}, {"path": "b.png", "label": "B", "split": ""}],
            r"manifest.csv:3: split ''",
        ),
        ([{"path": "a.png", "label": "A"}, {"path": "b.png", "label": "A"}], "only one class .'A'."),
    ],
)
def test_a_wrong_manifest_names_line_and_remedy(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dp.load_manifest(DataConfig(manifest=str(write_manifest(tmp_path, rows))))


def test_a_label_outside_the_classes_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [{"path": "a.png", "label": "NORMAL"}, {"path": "b.png", "label": "PNEUMONA"}]
    config = DataConfig(manifest=str(write_manifest(tmp_path, rows)), classes=["NORMAL", "PNEUMONIA"])
    with pytest.raises(DataError, match=r"csv:3: label 'PNEUMONA' is not one of .*did you mean 'PNEUMONIA'"):
        dp.load_manifest(config)


def test_an_empty_csv_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="the manifest has no rows"):
        dp.load_manifest(DataConfig(manifest=str(tmp_path / "m.csv")))
    (tmp_path / "m.csv").write_text("")
    with pytest.raises(DataError, match="not a readable CSV"):
        dp.load_manifest(DataConfig(manifest=str(tmp_path / "m.csv")))


def test_a_missing_data_folder_says_where_films_belong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder; put films into .*train/CLASS/"):
        dp.load_manifest(DataConfig(data_dir=str(tmp_path / "none")))


def test_an_empty_class_folder_is_named(copied: Path) -> None:
    (copied / "train" / "TUBERCULOSIS").mkdir()
    with pytest.raises(DataError, match="TUBERCULOSIS: no films in this class folder"):
        dp.load_manifest(DataConfig(data_dir=str(copied)))


def test_an_empty_data_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders with films"):
        dp.load_manifest(DataConfig(data_dir=str(tmp_path)))


def test_a_single_class_is_an_error(copied: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(copied / split / "NORMAL")
    with pytest.raises(DataError, match="only one class"):
        dp.load_manifest(DataConfig(data_dir=str(copied)))


def test_hidden_files_and_other_suffixes_are_passed_over(copied: Path) -> None:
    before = len(dp.load_manifest(DataConfig(data_dir=str(copied))))
    (copied / "train" / "NORMAL" / ".DS_Store").write_bytes(b"x")
    (copied / "train" / "NORMAL" / "notes.txt").write_text("x")
    assert len(dp.load_manifest(DataConfig(data_dir=str(copied)))) == before


def test_excluded_films_leave_the_manifest(copied: Path, tmp_path: Path) -> None:
    film = sorted((copied / "train" / "NORMAL").iterdir())[0]
    (tmp_path / "exclude.csv").write_text(f"path\n{film.relative_to(copied)}\n")
    manifest = dp.load_manifest(DataConfig(data_dir=str(copied), exclude=str(tmp_path / "exclude.csv")))
    assert str(film.resolve()) not in set(manifest.table["path"]) and len(manifest) == 135


@pytest.mark.parametrize(
    ("classes", "wanted", "found"),
    [
        (("NORMAL", "PNEUMONIA"), None, "PNEUMONIA"),
        (("COVID-19", "OTHER"), None, "COVID-19"),
        (("a", "b"), None, "b"),
        (("a", "b"), "a", "a"),
        (("a", "b", "c"), None, None),
    ],
)
def test_the_positive_class_is_the_disease(classes: tuple[str, ...], wanted: str | None, found: str | None) -> None:
    assert dp.positive_class(classes, wanted) == found


def test_an_unknown_positive_class_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'PNEUMONA' is not one of .*did you mean 'PNEUMONIA'"):
        dp.positive_class(("NORMAL", "PNEUMONIA"), "PNEUMONA")


# --- split ---


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_stands_in_two_splits_and_classes_stay_balanced(films: Path, seed: int) -> None:
    manifest = split_of(DataConfig(data_dir=str(films), val_fraction=0.25), seed)
    by_patient = manifest.table.groupby("patient_id")["split"].nunique()
    assert (by_patient == 1).all()
    counts = manifest.counts()
    assert sum(counts["val"].values()) == 24 and abs(counts["val"]["NORMAL"] - 12) <= 2


def test_the_split_is_fixed_by_the_seed_and_moves_with_it(films: Path) -> None:
    config = DataConfig(data_dir=str(films))
    assert split_of(config, 1).digest() == split_of(config, 1).digest() != split_of(config, 2).digest()


def test_the_test_split_is_never_touched_when_validation_is_rebuilt(films: Path) -> None:
    given = dp.load_manifest(DataConfig(data_dir=str(films))).split("test")["path"]
    assert set(split_of(DataConfig(data_dir=str(films))).split("test")["path"]) == set(given)


def test_a_tiny_given_validation_split_is_rebuilt_from_its_own_and_training_patients(copied: Path) -> None:
    for label in ("NORMAL", "PNEUMONIA"):
        (copied / "val" / label).mkdir(parents=True)
        film = sorted((copied / "train" / label).iterdir())[0]
        prefix = film.name.rsplit("-" if label == "NORMAL" else "_", 1)[0]
        for item in (copied / "train" / label).glob(f"{prefix}*"):
            item.rename(copied / "val" / label / item.name)
    manifest = split_of(DataConfig(data_dir=str(copied), val_fraction=0.25))
    assert sum(manifest.counts()["val"].values()) > 4
    assert len(manifest) == 136


def test_a_given_validation_split_of_enough_films_is_kept(copied: Path) -> None:
    (copied / "test").rename(copied / "val")
    config = DataConfig(data_dir=str(copied), test_fraction=0.0)
    assert sum(split_of(config).counts()["val"].values()) == 40


def test_a_patient_in_two_splits_is_an_error_with_the_count(copied: Path) -> None:
    for film in sorted((copied / "train" / "NORMAL").iterdir())[:2]:
        shutil.copy(
            film, copied / "test" / "NORMAL" / film.name.replace("-0001.", "-0009.").replace("-0002.", "-0008.")
        )
    with pytest.raises(DataError, match="1 patients are in more than one split, e.g. 'IM-0001' in test and train"):
        split_of(DataConfig(data_dir=str(copied)))


def test_too_few_patients_to_split_is_an_error(tmp_path: Path) -> None:
    synthetic.write_dataset(tmp_path, patients_per_class={"train": 1, "test": 2}, size=16)
    with pytest.raises(DataError, match="films of 1 patient.s. to split"):
        split_of(DataConfig(data_dir=str(tmp_path)))


def test_split_csv_holds_every_film_once_with_relative_paths(films: Path, tmp_path: Path) -> None:
    manifest = split_of(DataConfig(data_dir=str(films)))
    dp.write_split(manifest, tmp_path / "split.csv")
    table = pd.read_csv(tmp_path / "split.csv")
    assert list(table.columns) == ["path", "label", "split", "patient_id"]
    assert len(table) == len(manifest) and (films / table["path"][0]).exists()


# --- pixel cache ---


def paths_of(folder: Path) -> list[str]:
    return [str(item) for item in sorted((folder / "test").rglob("*.jpeg"))]


def test_the_cache_holds_exactly_what_preprocess_returns(films: Path, tmp_path: Path) -> None:
    paths = paths_of(films)
    store, unreadable = dp.cached_pixels(paths, SPEC, tmp_path)
    assert not unreadable and len(store) == len(paths)
    assert all(np.array_equal(store[row], apply(SPEC, decode(path))) for row, path in enumerate(paths))


def test_the_second_opening_decodes_nothing(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dp.cached_pixels(paths_of(films), SPEC, tmp_path)
    monkeypatch.setattr(dp, "decode", lambda path: pytest.fail("decoded again"))
    dp.cached_pixels(paths_of(films), SPEC, tmp_path)


@pytest.mark.parametrize("spec", [replace(SPEC, image_size=24), replace(SPEC, resize="pad"), replace(SPEC, channels=3)])
def test_another_spec_never_reuses_the_cache(films: Path, tmp_path: Path, spec: PreprocessSpec) -> None:
    a, _ = dp.cached_pixels(paths_of(films), SPEC, tmp_path)
    b, _ = dp.cached_pixels(paths_of(films), spec, tmp_path)
    assert a.path != b.path and b[0].shape == (spec.image_size, spec.image_size, spec.channels)


def test_a_changed_film_of_the_same_name_size_and_time_is_decoded_again(copied: Path, tmp_path: Path) -> None:
    paths = paths_of(copied)
    dp.cached_pixels(paths, SPEC, tmp_path)
    first = Path(paths[0])
    stat = first.stat()
    data = bytearray(first.read_bytes())
    other = Path(paths[-1]).read_bytes()
    first.write_bytes((other + b"\0" * len(data))[: len(data)] if len(other) <= len(data) else other)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    store, _ = dp.cached_pixels(paths, SPEC, tmp_path)
    assert np.array_equal(store[0], apply(SPEC, decode(first)))


@pytest.mark.parametrize("damage", ["flip", "truncate", "facts", "missing_facts"])
def test_a_damaged_cache_is_built_again(films: Path, tmp_path: Path, damage: str) -> None:
    store, _ = dp.cached_pixels(paths_of(films), SPEC, tmp_path)
    expected = np.array(store[3])
    data = bytearray(store.path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        store.path.write_bytes(data)
    elif damage == "truncate":
        store.path.write_bytes(data[: len(data) // 2])
    elif damage == "facts":
        store.path.with_suffix(".json").write_text("{")
    else:
        store.path.with_suffix(".json").unlink()
    again, _ = dp.cached_pixels(paths_of(films), SPEC, tmp_path)
    assert np.array_equal(again[3], expected)
    assert array_cache.checked_facts(again.path) is not None


def _build(paths: list[str], folder: Path, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    store, _ = dp.cached_pixels(paths, SPEC, folder)
    results.put(int(np.asarray([store[row] for row in range(len(paths))]).sum()))


def test_two_processes_that_build_the_cache_at_once_agree(films: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_build, args=(paths_of(films), tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert sums[0] == sums[1]
    assert len(list((tmp_path / "pixels").glob("*.npy"))) == 1


def test_cached_pixels_pickle_as_a_path_not_as_pixels(films: Path, tmp_path: Path) -> None:
    store, _ = dp.cached_pixels(paths_of(films), SPEC, tmp_path)
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data)[2], store[2])


def test_films_whose_digests_are_known_are_not_read_again(films: Path, tmp_path: Path) -> None:
    config = DataConfig(data_dir=str(films), cache_dir=str(tmp_path))
    manifest = split_of(config)
    paths = list(manifest.table["path"])
    digests = dp.file_digests(paths)
    first = dp.open_pixels(manifest, SPEC, config)[1]
    assert isinstance(first, dp.CachedPixels) and len(set(digests.values())) > 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp, "_file_digest", lambda path: pytest.fail("read again"))
        again = dp.open_pixels(manifest, SPEC, config, digests)[1]
        hashes = dp.film_hashes(paths, digests)
    assert isinstance(again, dp.CachedPixels) and again.path == first.path
    assert np.array_equal(hashes, dp.film_hashes(paths))


def _read_while_pages_are_given_back(store: dp.CachedPixels, rows: list[int]) -> list[bytes]:
    """Each row as it is when read, and as it still is after the pages were given back at every later read."""
    store.RELEASE_EVERY = 1  # type: ignore[misc]
    held = [store[row] for row in rows]
    return [film.tobytes() for film in held]


def test_films_stay_whole_while_threads_and_a_process_give_back_pages(films: Path, tmp_path: Path) -> None:
    paths = paths_of(films)
    store, _ = dp.cached_pixels(paths, SPEC, tmp_path)
    rows = [row % len(paths) for row in range(3 * len(paths))]
    expected = [apply(SPEC, decode(paths[row])).tobytes() for row in rows]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: _read_while_pages_are_given_back(store, rows), range(8)):
            assert found == expected
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        assert process.submit(_read_while_pages_are_given_back, store, rows).result() == expected
    assert _read_while_pages_are_given_back(store, rows) == expected


def test_unreadable_films_stop_the_run_with_names(copied: Path) -> None:
    (copied / "train" / "NORMAL" / "IM-9001-0001.jpeg").write_text("not a film")
    (copied / "train" / "NORMAL" / "IM-9002-0001.jpeg").write_bytes(b"")
    config = DataConfig(data_dir=str(copied))
    with pytest.raises(DataError, match=r"2 of 138 films cannot be read: .*IM-900.*--skip-unreadable"):
        dp.open_pixels(split_of(config), SPEC, config)


def test_skip_unreadable_leaves_just_those_films_out(copied: Path) -> None:
    bad = copied / "train" / "NORMAL" / "IM-9001-0001.jpeg"
    bad.write_text("not a film")
    config = DataConfig(data_dir=str(copied), skip_unreadable=True)
    manifest, store = dp.open_pixels(split_of(config), SPEC, config)
    assert len(manifest) == 136 and str(bad) not in set(manifest.table["path"])
    row = manifest.table.iloc[-1]
    assert np.array_equal(store[int(row["row"])], apply(SPEC, decode(row["path"])))


def test_without_a_cache_films_are_decoded_to_the_same_pixels(films: Path) -> None:
    config = DataConfig(data_dir=str(films), pixel_cache=False)
    manifest, store = dp.open_pixels(split_of(config), SPEC, config)
    assert np.array_equal(store[5], apply(SPEC, decode(manifest.table["path"][5])))


def test_a_disk_too_small_for_the_cache_is_said_with_the_size(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(DataError, match=r"needs \d+\.\d GiB, more than is free.*data.pixel_cache=false"):
        dp.cached_pixels(paths_of(films), SPEC, tmp_path)


def test_colour_is_found_by_looking(films: Path, tmp_path: Path) -> None:
    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(photo)
    assert dp.resolve_channels(DataConfig(), paths_of(films), seed=0) == 1
    assert dp.resolve_channels(DataConfig(), [*paths_of(films), str(photo)], seed=0) == 3
    assert dp.resolve_channels(DataConfig(colour="rgb"), paths_of(films), seed=0) == 3


# --- augmentation ---


def augmenter(**settings: float) -> dp.Augmenter:
    """With neither crop nor gamma unless asked for."""
    return dp.Augmenter(DataConfig(**{"image_size": 32, "min_crop_scale": 1.0, "gamma": 0.0, **settings}), seed=5)


@pytest.fixture(scope="module")
def film_32() -> np.ndarray:
    return synthetic.film(pneumonia=True, seed=3, size=32)[:, :, None]


def test_augmentation_depends_on_seed_epoch_and_index_alone(film_32: np.ndarray) -> None:
    first, second = augmenter(augmentation_prob=1.0), augmenter(augmentation_prob=1.0)
    for index in (9, 2, 5):
        second(film_32, epoch=3, index=index)  # another history must not matter
    assert np.array_equal(first(film_32, epoch=1, index=7), second(film_32, epoch=1, index=7))


def test_augmentation_differs_between_epochs_films_and_seeds(film_32: np.ndarray) -> None:
    one = augmenter(augmentation_prob=1.0)
    views = [one(film_32, epoch=e, index=i).tobytes() for e, i in ((1, 1), (1, 2), (2, 1))]
    views.append(
        dp.Augmenter(DataConfig(image_size=32, augmentation_prob=1.0), seed=6)(film_32, epoch=1, index=1).tobytes()
    )
    assert len(set(views)) == 4


def test_augmentation_at_probability_zero_is_the_film_itself(film_32: np.ndarray) -> None:
    assert np.array_equal(augmenter(augmentation_prob=0.0)(film_32, epoch=1, index=1), film_32)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_keeps_shape_and_type_and_leaves_the_film_alone(channels: int) -> None:
    film = np.repeat(synthetic.film(pneumonia=False, seed=1, size=32)[:, :, None], channels, axis=2)
    before = film.copy()
    for index in range(30):
        out = augmenter(augmentation_prob=1.0, min_crop_scale=0.6)(film, epoch=1, index=index)
        assert out.shape == film.shape and out.dtype == np.uint8
    assert np.array_equal(film, before)


def test_a_crop_falls_on_every_film_and_gamma_bends_the_grey_levels() -> None:
    ramp = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], 32, axis=0)
    # So rare that of the 40 draws only the crop, which is always made, can change a film.
    cropping = augmenter(augmentation_prob=1e-9, min_crop_scale=0.4)
    assert sum(not np.array_equal(cropping(ramp, epoch=1, index=i), ramp) for i in range(40)) > 36
    steps = augmenter(augmentation_prob=1.0, gamma=1.0).pipeline.transforms
    assert [step.gamma_limit for step in steps if type(step).__name__ == "RandomGamma"] == [(50, 200)]
    assert not any(
        type(step).__name__ == "RandomGamma" for step in augmenter(augmentation_prob=1.0).pipeline.transforms
    )


def test_a_higher_augmentation_probability_changes_more_films(film_32: np.ndarray) -> None:
    changed = {}
    for probability in (0.05, 0.3):
        one = augmenter(augmentation_prob=probability)
        changed[probability] = sum(not np.array_equal(one(film_32, epoch=1, index=i), film_32) for i in range(200))
    # 8 transforms at p: P(any) is about 0.25 at 0.05 and 0.85 at 0.3; 200 draws keep them far apart.
    assert changed[0.05] < 90 < 140 < changed[0.3]


PIPELINE = [
    "Rotate", "HorizontalFlip", "RandomBrightnessContrast", "CLAHE", "GaussNoise", "GaussianBlur", "CoarseDropout",
    "GridDropout",
]  # fmt: skip


def test_the_pipeline_is_the_published_list_with_crops_and_gamma_by_default() -> None:
    names = [type(item).__name__ for item in augmenter(augmentation_prob=0.5).pipeline.transforms]
    assert names == PIPELINE
    names = [type(item).__name__ for item in dp.Augmenter(DataConfig(), seed=5).pipeline.transforms]
    assert names == ["RandomResizedCrop", *PIPELINE[:3], "RandomGamma", *PIPELINE[3:]]


# --- order and loading ---

LABELS = np.repeat([0, 1], [10, 90])


def test_a_shuffled_epoch_is_a_permutation_that_changes_with_the_epoch() -> None:
    orders = [dp.epoch_order(LABELS, seed=0, epoch=e, n_classes=2, weighted=False) for e in (1, 2, 1)]
    assert sorted(orders[0]) == list(range(100))
    assert not np.array_equal(orders[0], orders[1]) and np.array_equal(orders[0], orders[2])


def test_weighted_draws_make_the_classes_equally_likely() -> None:
    drawn = np.concatenate([dp.epoch_order(LABELS, seed=0, epoch=e, n_classes=2, weighted=True) for e in range(100)])
    # 10,000 draws at p = 0.5: standard deviation 0.005; 4 of them.
    assert abs((LABELS[drawn] == 0).mean() - 0.5) < 0.02


def test_class_weights_average_one_over_the_films() -> None:
    weights = dp.class_weights(LABELS, 2)
    assert np.isclose(weights[LABELS].mean(), 1) and weights[0] == 9 * weights[1]


def test_training_batches_are_full_and_from_the_drawn_order() -> None:
    requests = dp.training_requests(LABELS, batch_size=16, seed=0, epoch=3, n_classes=2, weighted=False)
    assert [len(item.positions) for item in requests] == [16] * 6
    assert len(np.unique(np.concatenate([item.positions for item in requests]))) == 96


def test_a_batch_larger_than_the_set_is_an_error() -> None:
    with pytest.raises(DataError, match="batch size 101 is larger than the training split .100 films."):
        dp.training_requests(LABELS, batch_size=101, seed=0, epoch=1, n_classes=2, weighted=False)


def test_measuring_requests_cover_every_film_once_in_order() -> None:
    positions = np.concatenate([item.positions for item in dp.sequential_requests(103, 10)])
    assert np.array_equal(positions, np.arange(103))


@pytest.fixture
def dataset(films: Path) -> dp.FilmBatches:
    config = DataConfig(data_dir=str(films), image_size=32)
    manifest, pixels = dp.open_pixels(split_of(config), SPEC, config)
    return dp.FilmBatches(manifest.split("train"), pixels, dp.Augmenter(config, seed=1))


def test_workers_deliver_the_same_batches_as_the_main_process(dataset: dp.FilmBatches) -> None:
    batches = {}
    for workers in (0, 2):
        loader = dp.Loader(dataset, workers=workers)
        for epoch in (1, 2):
            requests = dp.training_requests(
                dataset.labels, batch_size=8, seed=0, epoch=epoch, n_classes=2, weighted=True
            )
            batches[workers, epoch] = list(loader(requests))
    for epoch in (1, 2):
        assert len(batches[0, epoch]) == len(batches[2, epoch]) > 0
        for a, b in zip(batches[0, epoch], batches[2, epoch]):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(batches[0, 1][0].inputs, batches[0, 2][0].inputs)


def test_a_loader_draws_nothing_from_the_global_random_stream(dataset: dp.FilmBatches) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(dp.Loader(dataset, workers=workers)([dp.Request(1, np.arange(4))]))
    assert torch.equal(before, torch.get_rng_state())


def test_a_fault_in_the_loading_thread_surfaces_where_batches_are_used() -> None:
    def items() -> object:
        yield 1
        raise DataError("film 2 is damaged")

    stream = dp.prefetch(items(), depth=2)
    assert next(stream) == 1
    with pytest.raises(DataError, match="film 2 is damaged"):
        next(stream)


def test_leaving_the_loading_early_ends_its_thread() -> None:
    import threading

    before = threading.active_count()
    stream = dp.prefetch(iter(range(10**9)), depth=2)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_self_check_runs(capsys: pytest.CaptureFixture[str]) -> None:
    dp.self_check()
    assert "data_preprocessing: ok" in capsys.readouterr().out


def test_a_damaged_film_met_by_a_worker_is_one_line(copied: Path) -> None:
    config = DataConfig(data_dir=str(copied), image_size=32, pixel_cache=False)
    manifest, pixels = dp.open_pixels(split_of(config), SPEC, config)
    dataset = dp.FilmBatches(manifest.split("train"), pixels, None)
    Path(manifest.split("train")["path"].iloc[2]).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty") as raised:
        list(dp.Loader(dataset, workers=1)([dp.Request(1, np.arange(4))]))
    assert "\n" not in str(raised.value)


def test_a_disk_that_fills_up_while_the_cache_is_written_is_a_clear_error(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="cannot be written .No space left on device."):
        dp.cached_pixels(paths_of(films), SPEC, tmp_path)
    assert not list((tmp_path / "pixels").glob("*.npy"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,A,\nb.png,B,\n", "rows have more fields than the header"),
        ("path;label\na.png;A\n", "separate the fields by commas"),
        ("path,label\na\0.png,A\n", "a NUL byte in column 'path'"),
    ],
)
def test_a_misshapen_csv_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_bytes(text.encode())
    with pytest.raises(DataError, match=message):
        dp.load_manifest(DataConfig(manifest=str(tmp_path / "m.csv")))


def test_a_csv_that_is_not_utf8_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("path,label\nä.png,A\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as CSV in UTF-8"):
        dp.load_manifest(DataConfig(manifest=str(tmp_path / "m.csv")))


def test_a_utf8_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("\ufeffpath,label\r\na.png,A\r\nb.png,B\r\n".encode())
    assert dp.load_manifest(DataConfig(manifest=str(tmp_path / "m.csv"))).classes == ("A", "B")


def test_skipping_every_film_of_a_class_is_an_error(copied: Path) -> None:
    for film in (copied / "train" / "NORMAL").iterdir():
        film.write_text("not a film")
    config = DataConfig(data_dir=str(copied), skip_unreadable=True)
    with pytest.raises(DataError, match="train split: no readable film of class 'NORMAL'"):
        dp.open_pixels(split_of(config), SPEC, config)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of this process from /proc")
def test_films_read_from_the_cache_do_not_pile_up_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resident_mb() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssFile"))

    films = np.random.default_rng(0).integers(0, 256, (800, 256, 256, 1), dtype=np.uint8)
    np.save(tmp_path / "films.npy", films)
    monkeypatch.setattr(dp.CachedPixels, "RELEASE_EVERY", 100)
    cache = dp.CachedPixels(tmp_path / "films.npy")
    first, before, most = cache[0], resident_mb(), 0.0
    for row in range(len(films)):
        assert cache[row][row % 256, 0, 0] == films[row, row % 256, 0, 0]
        cache[row].sum()
        most = max(most, resident_mb())
    assert most - before < 25  # of 50 MB
    assert np.array_equal(first, films[0])


# --- the class from the file name ---

PUBLISHED = r"(?P<bacteria>_bacteria_)|(?P<virus>_virus_)|(?P<normal>IM-\d)"
FILMS = ["person1_bacteria_2.jpeg", "person3_virus_9.jpeg", "IM-0115-0001.jpeg", "NORMAL2-IM-0927-0001.jpeg"]


def laid_out(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("place", ["train/PNEUMONIA", "train", "."])
def test_the_class_is_read_from_published_names_wherever_the_films_lie(tmp_path: Path, place: str) -> None:
    folder = laid_out(tmp_path / "films", [f"{place}/{name}" for name in FILMS])
    manifest = dp.load_manifest(DataConfig(data_dir=str(folder), label_regex=PUBLISHED))
    found = {Path(path).name: manifest.classes[code] for path, code in manifest.table[["path", "label"]].to_numpy()}
    assert found == dict(zip(FILMS, ["bacteria", "virus", "normal", "normal"]))
    assert set(manifest.table["split"]) == {"train" if place != "." else ""}


def test_without_named_groups_the_class_is_the_text_of_the_first(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "films", ["a/x_cat.png", "b/y_dog.png"])
    manifest = dp.load_manifest(DataConfig(data_dir=str(folder), label_regex=r"_(\w+)\."))
    assert manifest.classes == ("cat", "dog") and manifest.table["label"].tolist() == [0, 1]


def test_a_manifest_whose_paths_name_the_class_needs_no_label(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(FILMS) + "\n")
    config = DataConfig(manifest=str(tmp_path / "m.csv"), label_regex=PUBLISHED)
    assert dp.load_manifest(config).table["label"].tolist() == [0, 2, 1, 1]


def test_films_that_name_no_class_are_one_error_with_examples(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "films", [*FILMS, "odd.png", "more/odd2.png"])
    with pytest.raises(DataError, match=r"2 of 6 films name no class, e\.g\. more/odd2\.png, odd\.png; correct"):
        dp.load_manifest(DataConfig(data_dir=str(folder), label_regex=PUBLISHED))


@pytest.mark.parametrize(("pattern", "found"), [("IM-", "has no group"), ("(", "not a regular expression")])
def test_a_pattern_that_can_name_no_class_is_refused(tmp_path: Path, pattern: str, found: str) -> None:
    folder = laid_out(tmp_path / "films", FILMS)
    with pytest.raises(ConfigError, match=f"data.label_regex.*{found}"):
        dp.load_manifest(DataConfig(data_dir=str(folder), label_regex=pattern))
