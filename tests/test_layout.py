"""What folders are taken for: splits, classes, groups, as people name and nest them."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pipeline.dataset import layout, sources
from pipeline.dataset.layout import split_of, splits_of
from pipeline.stage_runtime.errors import DataError, ParamError

Found = tuple[set[tuple[str, str, str]], list[str]]


def read(*images: str, splits: str = "auto") -> Found:
    found = layout.read(Path("data"), images, splits)
    assert [item.path for item in found.items] == list(images)
    return {(item.split, item.label, item.group) for item in found.items}, found.said


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("TRAIN", "train"), ("training_set", "train"),
        ("trainset", "train"), ("Train Images", "train"), ("train2017", "train"),
        ("TrainingData", "train"), ("images-train", "train"), ("train_val", "train"),
        ("valid", "val"), ("Validation", "val"), ("val_images", "val"), ("dev", "val"),
        ("validation-set", "val"), ("Testing", "test"), ("test_set", "test"), ("TEST", "test"),
        ("testset", "test"), ("hold_out", "test"), ("evaluation", "test"), ("test-data", "test"),
        ("cats", ""), ("trainers", ""), ("attest", ""), ("data", ""), ("pregnancy_test", ""),
        ("contest", ""), ("invalid", ""), ("protest march", ""), ("", ""), ("123", ""),
    ],
)  # fmt: skip
def test_a_folder_is_a_split_by_the_words_people_use(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["seg_train", "seg_test"], {"seg_train": "train", "seg_test": "test"}),
        (
            ["asl_alphabet_train", "asl_alphabet_test"],
            {"asl_alphabet_train": "train", "asl_alphabet_test": "test"},
        ),
        (["flowers-train", "flowers-valid"], {"flowers-train": "train", "flowers-valid": "val"}),
        (["blood_test", "urine_test"], {}),
        (["seg_train", "seg_test", "seg_pred"], {"seg_train": "train", "seg_test": "test"}),
    ],
)
def test_words_that_all_folders_share_say_nothing(names, found):
    assert splits_of(names) == found


TRAINING = ["Training/a/1.png", "Training/b/1.png", "Testing/a/2.png", "Testing/b/2.png"]


@pytest.mark.parametrize(
    ("images", "found", "said"),
    [
        (
            TRAINING,
            {("train", "a", ""), ("train", "b", ""), ("test", "a", ""), ("test", "b", "")},
            ["split folders: Testing is test (2 images), Training is train (2 images)",
             "class folders: 2 (a, b); no folders of groups below"],
        ),
        # Splits below the classes.
        (
            ["cats/train/1.png", "cats/test/2.png", "dogs/train/p1/3.png", "dogs/test/4.png"],
            {("train", "cats", ""), ("test", "cats", ""), ("train", "dogs", "dogs/p1"),
             ("test", "dogs", "")},
            ["split folders below the classes: test is test (2 images), train is train (2 images)",
             "class folders: 2 (cats, dogs); 1 folders of groups below them"],
        ),
        # One folder that holds all, as archives have it.
        (
            ["PetImages/Cat/1.png", "PetImages/Dog/1.png"],
            {("", "Cat", ""), ("", "Dog", "")},
            ["passed over: PetImages, which holds all other folders",
             "class folders: 2 (Cat, Dog); no folders of groups below"],
        ),
        (
            ["x/y/train/a/1.png", "x/y/valid/a/1.png"],
            {("train", "a", ""), ("val", "a", "")},
            ["passed over: x/y, which holds all other folders",
             "split folders: train is train (1 images), valid is val (1 images)",
             "class folders: 1 (a); no folders of groups below"],
        ),
        # A split's folder twice, as unpacking leaves it.
        (
            ["seg_train/seg_train/sea/1.png", "seg_train/seg_train/ice/2.png",
             "seg_test/seg_test/sea/1.png"],
            {("train", "sea", ""), ("train", "ice", ""), ("test", "sea", "")},
            ["split folders: seg_test is test (1 images), seg_train is train (2 images)",
             "class folders: 2 (ice, sea); no folders of groups below"],
        ),
        # Classes with folders of patients, some of which are in both.
        (
            ["ill/p1/1.png", "ill/p2/1.png", "ill/p3/1.png", "well/p2/1.png", "well/p9/1.png"],
            {("", "ill", "ill/p1"), ("", "ill", "ill/p2"), ("", "ill", "ill/p3"),
             ("", "well", "well/p2"), ("", "well", "well/p9")},
            ["class folders: 2 (ill, well); 5 folders of groups below them"],
        ),
        # One class with groups below isn't passed over for them.
        (["Flags/1/a.png", "Flags/1/b.png"], {("", "Flags", "Flags/1")},
         ["class folders: 1 (Flags); 1 folders of groups below them"]),
        # A split alone stays one.
        (["train/a/1.png", "train/b/1.png"], {("train", "a", ""), ("train", "b", "")},
         ["split folders: train is train (2 images)",
          "class folders: 2 (a, b); no folders of groups below"]),
    ],
)  # fmt: skip
def test_folders_are_read_as_they_are_meant_and_said(images, found, said):
    assert read(*images) == (found, said)


def test_classes_that_are_called_like_splits_can_be_had():
    images = ["bus/1.png", "car/1.png", "train/1.png"]
    with pytest.raises(DataError, match=r"bus is beside train, .* prepare.splits: none if both"):
        read(*images)
    assert read(*images, splits="none")[0] == {("", n, "") for n in ("bus", "car", "train")}
    both = ["train/1.png", "test/1.png"]
    with pytest.raises(DataError, match=r"is in train, a split, but not in a class folder"):
        read(*both)
    assert read(*both, splits="none")[0] == {("", "train", ""), ("", "test", "")}


def test_splits_by_other_names_are_refused_and_can_be_named():
    images = ["lot1/a/1.png", "lot1/b/1.png", "lot2/a/1.png", "lot2/b/1.png"]
    with pytest.raises(DataError, match=r"these look like splits: lot1, lot2 \(each holds a, b\)"):
        read(*images)
    assert {s for s, _, _ in read(*images, splits="lot1:train, lot2:test")[0]} == {"train", "test"}
    groups = read(*images, splits="none")[0]
    assert ("", "lot1", "lot1/a") in groups
    smaller = ["lot1/a/1.png", "lot1/b/1.png", "lot2/a/1.png"]
    with pytest.raises(DataError, match="look like splits"):
        read(*smaller)


@pytest.mark.parametrize(
    ("splits", "error", "line"),
    [
        ("Training", ParamError, "expected auto, none, or folders and splits"),
        ("Training:tr", ParamError, "expected auto, none, or folders and splits"),
        ("training:train,Testing:test", ParamError, "no folder 'training' in data; did you mean"),
        ("Training:train", DataError, "prepare.splits doesn't name Testing; name it, or move it"),
    ],
)
def test_a_wrong_splits_param_is_named(splits, error, line):
    with pytest.raises(error, match=line):
        read(*TRAINING, splits=splits)


def test_two_folders_of_one_split_are_refused_unless_named():
    images = ["train/a/1.png", "training/a/2.png", "train/b/1.png"]
    with pytest.raises(DataError, match=r"the train split \(train, training\); keep one, or set"):
        read(*images)
    found, _ = read(*images, splits="train:train,training:train")
    assert Counter(split for split, _, _ in found) == {"train": 2}


def test_no_one_classifies_training_against_testing(tmp_path):
    """The fault that was: both folders became classes, without a word."""
    for name in TRAINING:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(file)
    found = sources.folder(tmp_path)
    assert {item.label for item in found.items} == {"a", "b"}
    assert "Testing is test (2 images)" in found.layout[0]
