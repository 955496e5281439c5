"""Wrong images, params, weights and checkpoints: one clear line, exit code 1, nothing written."""

import csv
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from conftest import FORMATS, ROOT, STAGES, TINY, call, paths, read_params, run
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from PIL import Image
from safetensors.torch import save_file

from pipeline.commands import export, predict
from pipeline.final_model import classifier
from pipeline.final_model import onnx as portable
from pipeline.launcher.command import one_line_errors
from pipeline.launcher.supervise import INTERRUPTED
from pipeline.nets import backbone, checkpoint
from pipeline.stage2 import _refuse_other_score
from pipeline.stage_runtime.errors import (
    CheckpointError,
    DataError,
    ParamError,
    PipelineError,
    WeightsError,
    suggest,
)
from pipeline.stage_runtime.schema import read_params as read_params_file
from pipeline.training.fit import DivergedError

Params = dict[str, Any]


def pattern(line: str) -> str:
    """Match a line given as it is read, where three dots stand for anything."""
    return ".*".join(map(re.escape, line.split("...")))


def refuses(
    error: type[PipelineError], line: str, name: str, ways: dict[str, Path], params: Params
) -> None:
    """Run a stage that must end with one line and leave none of its outputs, not even a part."""
    with pytest.raises(error, match=pattern(line)) as caught:
        call(name, ways, params)
    assert "\n" not in str(caught.value)
    for out in (ways[way] for way in ("out", "final") if way in ways):
        assert not out.exists()
        assert not out.with_name(f"{out.name}.part").exists()


def elsewhere(finished: Path, name: str, tmp_path: Path, **ways: Path) -> dict[str, Path]:
    """Give a stage what the finished run gave it, but another place for its outputs."""
    outs = {way: tmp_path / way for way in ("out", "final") if way in paths(finished)[name]}
    return {**paths(finished)[name], **outs, **ways}


# The images


def unreadable_jpeg(photos: Path) -> None:
    file = photos / "class1" / "broken.jpg"
    Image.effect_noise((90, 90), 60).save(file)
    file.write_bytes(file.read_bytes()[:1500])


def text_as_png(photos: Path) -> None:
    (photos / "class1" / "text.png").write_text("not a picture")


def empty_file(photos: Path) -> None:
    (photos / "class1" / "empty.png").touch()


def huge(photos: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(photos / "class1" / "huge.png")


def broken_link(photos: Path) -> None:
    (photos / "class1" / "gone.png").symlink_to("nowhere.png")


def notes(photos: Path) -> None:
    (photos / "class1" / "notes.txt").write_text("taken in spring")


def animation(photos: Path) -> None:
    frames = [Image.new("L", (9, 9), level) for level in (0, 255)]
    frames[0].save(photos / "class1" / "moving.gif", save_all=True, append_images=frames[1:])


def emptied(photos: Path) -> None:
    shutil.rmtree(photos)
    photos.mkdir()


def one_class(photos: Path) -> None:
    shutil.rmtree(photos / "class1")


def small_class(photos: Path) -> None:
    for i in range(4, 16):
        (photos / "class1" / f"{i:03d}.png").unlink()


def no_class_folder(photos: Path) -> None:
    shutil.copy(photos / "class1" / "000.png", photos / "alone.png")


def under(*splits: str) -> Callable[[Path], None]:
    def spoil(photos: Path) -> None:
        classes = list(photos.iterdir())
        for split in splits:
            for folder in classes:
                shutil.copytree(folder, photos / split / folder.name)
        for folder in classes:
            shutil.rmtree(folder)

    return spoil


def split_beside_class(photos: Path) -> None:
    (photos / "class0").rename(photos / "train")


def one_folder_each(photos: Path) -> None:
    for folder in list(photos.iterdir()):
        folder.rename(photos / "all")
        folder.mkdir()
        (photos / "all").rename(folder / "all")


SPOILT_IMAGES = [
    (shutil.rmtree, {}, "photos: no such folder; set prepare.path to the folder of your images"),
    (emptied, {}, "photos: no images here; expected ...photos/CLASS/*.jpg"),
    (one_class, {}, "photos: only one class (['class0']); at least two are needed"),
    (small_class, {}, "class 'class1' has 2 training images and needs 5 (prepare.least_per_class)"),
    (
        unreadable_jpeg,
        {},
        "class1/broken.jpg: can't be read as an image (...truncated...); move it away, or set "
        "prepare.not_images: skip",
    ),
    (text_as_png, {}, "class1/text.png: can't be read as an image (...prepare.not_images: skip"),
    (empty_file, {}, "class1/empty.png: can't be read as an image (...prepare.not_images: skip"),
    (huge, {}, "class1/huge.png: claims 10000 x 10000 pixels; make it smaller"),
    (broken_link, {}, "class1/gone.png: ...prepare.not_images: skip"),
    (
        notes,
        {},
        "class1/notes.txt: not an image (1 such files); move it away, or set "
        "prepare.not_images: skip",
    ),
    (animation, {}, "class1/moving.gif: holds 2 pictures; keep one in a file of its own; move"),
    (no_class_folder, {}, "photos/alone.png: is not in a class folder; move it into one"),
    (
        split_beside_class,
        {},
        "photos: class1 is beside train, which looks like a split; move it away, or set "
        "prepare.splits: none if both are classes",
    ),
    (
        under("val", "valid"),
        {},
        "photos: more than one folder for the val split (val, valid); keep one, or set "
        "prepare.splits",
    ),
    (under("val", "test"), {}, "class 'class0' has 0 training images and needs 5"),
    (
        under("train", "val", "test"),
        {"val_as": "test"},
        "prepare.val_as: test, but there is a test folder already; use val",
    ),
    (
        one_folder_each,
        {},
        "all training images are in one group, so no val split can be cut from them; set "
        "prepare.split_by: image, or give split folders",
    ),
]


@pytest.mark.parametrize(
    ("spoil", "changes", "line"),
    SPOILT_IMAGES,
    ids=[line.replace("photos: ", "")[:32] for _, _, line in SPOILT_IMAGES],
)
def test_prepare_names_the_file_or_the_class(spoil, changes, line, photos, tmp_path):
    spoil(photos)
    params = read_params(prepare={"path": str(photos), **changes})
    refuses(DataError, line, "prepare", paths(tmp_path)["prepare"], params)


def test_a_refused_set_leaves_the_last_good_one_as_it_was(photos, tmp_path):
    params = read_params(prepare={"path": str(photos)})
    run(tmp_path, params, "prepare")
    index = (tmp_path / "prepared" / "index.csv").read_bytes()
    text_as_png(photos)
    with pytest.raises(DataError, match=r"text\.png"):
        run(tmp_path, params, "prepare")
    assert index == (tmp_path / "prepared" / "index.csv").read_bytes()
    assert not (tmp_path / "prepared.part").exists()


def test_prepare_says_how_to_get_a_data_package_that_is_not_there(tmp_path, monkeypatch):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    line = "prepare.source: elpv needs the package elpv-dataset; run `make install`"
    params = read_params(prepare={"source": "elpv"})
    refuses(DataError, line, "prepare", paths(tmp_path)["prepare"], params)


def test_probe_refuses_a_class_with_fewer_images_than_folds(finished, tmp_path):
    line = "class 'class0' has 9 training images, fewer than probe.folds = 10; add images or lower"
    params = read_params(probe={"folds": 10})
    refuses(DataError, line, "probe", elsewhere(finished, "probe", tmp_path), params)


def test_probe_refuses_folds_that_leave_one_class_to_learn_from(finished, tmp_path):
    features = shutil.copytree(paths(finished)["probe"]["features"], tmp_path / "features")
    with (features / "labels.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    with (features / "labels.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        for row in rows:  # all of class1 is one group
            writer.writerow({**row, "group": "99"} if row["label"] == "1" else row)
    ways = elsewhere(finished, "probe", tmp_path, features=features)
    refuses(DataError, "class 'class1'...group", "probe", ways, read_params())


@pytest.mark.parametrize(("name", "before"), [("extract", "prepare"), ("probe", "extract")])
def test_a_stage_names_the_one_to_run_before_it(name, before, tmp_path):
    line = f"facts.json: no such file; run `dvc repro {before}`"
    refuses(DataError, line, name, paths(tmp_path)[name], read_params())


@pytest.mark.parametrize(("name", "file"), [("stage1", "probe"), ("stage2", "stage1")])
def test_a_stage_names_the_checkpoint_it_misses(name, file, finished, tmp_path):
    ways = elsewhere(finished, name, tmp_path, **{file: tmp_path / "gone.safetensors"})
    line = "gone.safetensors: no such file; run `dvc repro` or `dvc pull`"
    refuses(CheckpointError, line, name, ways, read_params())


def test_extract_refuses_a_label_that_is_none_of_the_classes(finished, tmp_path):
    prepared = relabelled(finished, tmp_path, lambda label: label.replace("class1", "klass1"))
    ways = elsewhere(finished, "extract", tmp_path, prepared=prepared)
    line = "index.csv: row ... has the unknown label 'klass1'"
    refuses(DataError, line, "extract", ways, read_params())


def relabelled(finished: Path, tmp_path: Path, change: Callable[[str], str]) -> Path:
    """Copy the prepared images with every label of index.csv changed."""
    prepared = shutil.copytree(paths(finished)["prepare"]["out"], tmp_path / "relabelled")
    with (prepared / "index.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    with (prepared / "index.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows({**row, "label": change(row["label"])} for row in rows)
    return prepared


# The params


SPOILT_PARAMS = [
    ("prepare", "prepare: {siez: 64}", "unknown key prepare.siez; did you mean size?"),
    ("stage2", "stage2: {bach_size: 8}", "unknown key stage2.bach_size; did you mean batch_size"),
    ("stage1", "augment: {zoom: 1.0}", "unknown key augment.zoom; expected one of: crop, "),
    ("extract", "backbone: {nmae: x}", "unknown key backbone.nmae; did you mean name"),
    ("prepare", "prepare: {1: 2}", "unknown key prepare.1; expected one of: background, "),
    ("prepare", "prepare: []", "no section 'prepare:'"),
    ("prepare", "prepare: {size: big}", "prepare.size = 'big': input should be a valid integer"),
    ("prepare", "prepare: {size: '64'}", "prepare.size = '64': input should be a valid integer"),
    ("prepare", "prepare: {size: 64.0}", "prepare.size = 64.0: input should be a valid integer"),
    ("prepare", "prepare: {size: }", "prepare.size = None: input should be a valid integer"),
    ("prepare", "prepare: {size: [64]}", "prepare.size = [64]: input should be a valid integer"),
    ("prepare", "seed: true", "params.yaml: seed = True: input should be a valid integer"),
    ("stage2", "stage2: {interpolate: 1}", "stage2.interpolate = 1: input should be a valid bool"),
    ("prepare", "prepare: {path: 3}", "prepare.path = 3: input should be a valid string"),
    (
        "prepare",
        "prepare: {fit: stretch}",
        "prepare.fit = 'stretch': input should be 'squash', 'crop' or 'pad'",
    ),
    ("prepare", "prepare: {val_as: no}", "prepare.val_as = False: input should be 'val' or 'test'"),
    ("stage1", "precision: fp16", "precision = 'fp16': input should be 'auto', 'fp32' or 'bf16'"),
    ("stage1", "stage1: {lr: fast}", "stage1.lr = 'fast': input should be a valid number"),
    ("stage1", "stage1: {lr: -0.001}", "stage1.lr = -0.001: input should be greater than 0"),
    ("stage2", "stage2: {lr: 0}", "stage2.lr = 0: input should be greater than 0"),
    ("stage2", "stage2: {lr: .nan}", "stage2.lr = nan: input should be a finite number"),
    ("stage2", "stage2: {lr: .inf}", "stage2.lr = inf: input should be a finite number"),
    ("stage2", "stage2: {momentum: 1}", "stage2.momentum = 1: input should be less than 1"),
    ("stage1", "stage1: {batch_size: 1}", "stage1.batch_size = 1: input should be greater"),
    ("stage1", "augment: {crop: 0}", "augment.crop = 0: input should be greater than 0"),
    ("prepare", "prepare: {test_fraction: 1}", "test_fraction = 1: input should be less than 1"),
    ("prepare", "prepare: {test_fraction: -0.1}", "test_fraction = -0.1: input should be greater"),
    ("prepare", "prepare: {val_fraction: 0}", "val_fraction = 0: input should be greater than 0"),
    ("prepare", "prepare: {val_fraction: .nan}", "val_fraction = nan: input should be a finite"),
    ("prepare", "prepare: {size: 0}", "prepare.size = 0: input should be greater than or equal"),
    ("extract", "extract: {image_size: 9999}", "extract.image_size = 9999: input should be less"),
    ("extract", "extract: {depths: blocks.1}", "extract.depths = 'blocks.1': input should be"),
    ("probe", "probe: {folds: 1}", "probe.folds = 1: input should be greater than or equal to 2"),
    ("probe", "probe: {kinds: []}", "probe.kinds = []: list should have at least 1 item"),
    ("probe", "probe: {kinds: [tree]}", "probe.kinds = ['tree']: input should be 'linear', "),
    ("probe", "probe: {linear_c: [1, -1]}", "probe.linear_c = [1, -1]: input should be greater"),
    ("probe", "probe: {linear_c: [.nan]}", "probe.linear_c = [nan]: input should be a finite"),
    ("stage1", "stage1: {unfreeze: conv}", "stage1.unfreeze = 'conv': input should be 'auto' or "),
    ("evaluate", "evaluate: {views: 0}", "evaluate.views = 0: input should be greater"),
    *[
        (name, "seed: -1", "seed = -1: input should be greater than or equal to 0")
        for name in STAGES
        if name not in ("evaluate", "report")  # which draw nothing
    ],
    ("probe", "seed: 4294967296", "seed = 4294967296: input should be less than"),
]


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    SPOILT_PARAMS,
    ids=[f"{name}, {changes}" for name, changes, _ in SPOILT_PARAMS],
)
def test_a_stage_names_the_key_and_the_value(name, changes, line, finished, tmp_path):
    params = read_params()
    for key, value in yaml.safe_load(changes).items():
        if isinstance(value, dict):
            params[key].update(value)
        else:
            params[key] = value
    params = through_a_file(params, tmp_path)
    refuses(ParamError, line, name, elsewhere(finished, name, tmp_path), params)


def through_a_file(params: Params, tmp_path: Path) -> Params:
    """Write params and read them as a stage does."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return read_params_file(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("prepare.size", "params.yaml: prepare.size is missing"),
        ("seed", "params.yaml: seed is missing"),
        ("prepare", "params.yaml: no section 'prepare:'; "),
    ],
)
def test_a_missing_key_or_section_is_named(key, line, tmp_path):
    params = read_params()
    *sections, last = key.split(".")
    del (params[sections[0]] if sections else params)[last]
    params = through_a_file(params, tmp_path)
    refuses(ParamError, line, "prepare", paths(tmp_path)["prepare"], params)


def test_a_misspelt_section_is_hinted_at(tmp_path):
    params = read_params()
    params["perpare"] = params.pop("prepare")
    line = "no section 'prepare:'; did you mean perpare"
    refuses(ParamError, line, "prepare", paths(tmp_path)["prepare"], params)


def test_a_section_is_missed_beside_keys_that_are_no_words(tmp_path):
    line = "params.yaml: no section 'prepare:'; expected one of: 1"
    params = through_a_file({1: 2}, tmp_path)
    refuses(ParamError, line, "prepare", paths(tmp_path)["prepare"], params)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"prepare: [64", "not readable as YAML: while parsing a flow sequence"),
        (b"prepare:\n\tsize: 64", "not readable as YAML: while scanning"),
        (b"\xff\xfe\x00", "not readable as YAML: "),
        (b"", "expected sections such as 'prepare:', found None"),
        (b"- prepare", "expected sections such as 'prepare:', found ['prepare']"),
        (b"prepare", "expected sections such as 'prepare:', found 'prepare'"),
    ],
)
def test_a_params_file_that_is_no_mapping_is_refused(content, line, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(ParamError, match=pattern(f"{file}: {line}")) as caught:
        read_params_file(file)
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_named(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("stage1:\n  lr: 0.1\n  epochs: 3\n  lr: 0.2\n")
    with pytest.raises(ParamError, match=r"'lr' occurs twice in one section.*line 4"):
        read_params_file(file)


def test_a_missing_params_file_is_named(tmp_path):
    line = "params.yaml: no such file; run this in the project's folder"
    with pytest.raises(ParamError, match=pattern(line)):
        read_params_file(tmp_path / "params.yaml")


def test_a_yaml_tag_with_code_is_refused_and_not_executed(tmp_path):
    file, marker = tmp_path / "params.yaml", tmp_path / "executed"
    file.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']")
    with pytest.raises(ParamError, match="could not determine a constructor for the tag"):
        read_params_file(file)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["extract", "stage1", "stage2"])
def test_no_stage_asks_for_more_pixels_than_prepare_kept(name, finished, tmp_path):
    line = (
        f"params.yaml: {name}.image_size = 65 is more than prepare.size = 64; "
        "raise prepare.size, or lower it"
    )
    params = read_params(**{name: {"image_size": 65}})
    refuses(ParamError, line, name, elsewhere(finished, name, tmp_path), params)


@pytest.mark.parametrize(
    ("name", "key", "modules", "line"),
    [
        ("stage1", "unfreeze", ["bloks.4"], "no module is called 'bloks.4'; did you mean blocks.4"),
        ("stage1", "unfreeze", ["layer9.*"], "no module is called 'layer9.*'; "),
        ("extract", "depths", ["blocks.44"], "no module is called 'blocks.44'; did you mean"),
        ("extract", "depths", ["classifier"], "classifier outputs no feature maps; choose a block"),
    ],
)
def test_an_unknown_module_is_named_with_near_ones(name, key, modules, line, finished, tmp_path):
    params = read_params(**{name: {key: modules}})
    ways = elsewhere(finished, name, tmp_path)
    refuses(ParamError, f"{name}.{key}: {line}", name, ways, params)


WILD = {"optimizer": "sgd", "lr": 1e30, "schedule": "constant", "warmup_epochs": 0}


def test_a_loss_that_is_no_number_names_the_epoch_and_the_rate(finished, tmp_path):
    ways = elsewhere(finished, "stage1", tmp_path)
    line = "epoch 1: the validation loss is nan after learning rate 1e+30; lower stage1.lr"
    with pytest.raises(DivergedError, match=pattern(line)):
        call("stage1", ways, read_params(stage1=WILD))
    assert not (ways["out"] / "model.safetensors").exists()


def test_weights_that_the_last_step_spoilt_are_not_kept(finished, tmp_path):
    ways = elsewhere(finished, "stage1", tmp_path)
    params = read_params(stage1={**WILD, "epochs": 1})
    with pytest.raises(DivergedError, match=pattern("epoch 1: ...; lower stage1.lr")):
        call("stage1", ways, params)
    assert not (ways["out"] / "model.safetensors").exists()


def test_known_words_are_listed_only_up_to_twelve():
    assert suggest("x", [f"word{i}" for i in range(13)]).endswith("word11, ...")


# The backbone and its weights


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resnet18", "backbone.name = 'resnet18': expected timm/NAME or torchvision/NAME"),
        ("keras/resnet18", "backbone.name = 'keras/resnet18': expected timm/NAME or torchvision/"),
        ("torchvision/resnet81", "no such network; did you mean torchvision/resnet18"),
        ("timm/resnet 18", "no such network; did you mean timm/resnet18"),
        ("torchvision/squeezenet1_1", "SqueezeNet has no linear head"),
        ("torchvision/vit_b_16", "backbone.name: VisionTransformer can't take images of 64 px"),
        ("timm/levit_128s", "backbone.name: LevitDistilled has 2 heads"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_named(name, line, finished, tmp_path):
    params = read_params(backbone={"name": name})
    ways = elsewhere(finished, "extract", tmp_path)
    refuses(ParamError, line, "extract", ways, params)


@pytest.mark.parametrize("stage", ["extract", "stage1"])
def test_images_too_small_for_the_network_are_refused(stage, finished, tmp_path):
    """Where stage 1 is given fewer pixels than the codes were made of, too."""
    name = {"backbone": {"name": "torchvision/alexnet"}}  # its kernels need 63 px
    run(tmp_path, read_params(prepare={"path": str(finished / "photos")}), "prepare")
    if stage == "stage1":
        run(tmp_path, read_params(extract={"image_size": 64}, **name), "extract", "probe")
    params = read_params(
        extract={"image_size": 48}, stage1={"image_size": 48, "unfreeze": ["features.10"]}, **name
    )
    line = "backbone.name: AlexNet can't take images of 48 px"
    refuses(ParamError, f"{line} (", stage, paths(tmp_path)[stage], params)


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def tiny() -> dict[str, torch.Tensor]:
    """Draw weights for the small network with the head of its source."""
    return backbone.build(TINY, backbone.SOURCE_CLASSES).state_dict()


def of_another_network(file: Path) -> None:
    save_file({**tiny(), "conv_stem.weight": torch.zeros(1)}, file)


def of_another_shape(file: Path) -> None:
    torch.save({**tiny(), "classifier.bias": torch.zeros(9)}, file)


def truncated(file: Path) -> None:
    torch.save(tiny(), file)
    file.write_bytes(file.read_bytes()[:100_000])


def with_code(file: Path) -> None:
    torch.save(Evil(file.with_name("executed")), file)


def complete(file: Path) -> None:
    torch.save(tiny(), file)


@pytest.mark.parametrize(
    ("write", "name", "line"),
    [
        (
            of_another_network,
            "w.safetensors",
            "w.safetensors: not weights of this network: 1 tensors of another shape (such as "
            "conv_stem.weight); choose another file",
        ),
        (of_another_shape, "w.pth", "a head of inconsistent shapes (such as classifier.weight)"),
        (truncated, "w.pth", "w.pth: can't be read as weights ("),
        (truncated, "w.safetensors", "w.safetensors: can't be read as weights ("),
        (with_code, "w.pth", "w.pth: holds objects besides tensors ("),
        (with_code, "w.safetensors", "w.safetensors: can't be read as weights ("),
    ],
)
def test_a_weights_file_that_does_not_fit_is_named(write, name, line, finished, tmp_path):
    file = tmp_path / name
    write(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    params = read_params(backbone={"weights": str(file), "sha256": digest})
    refuses(WeightsError, line, "extract", elsewhere(finished, "extract", tmp_path), params)
    assert not (tmp_path / "executed").exists()


def test_the_code_in_that_pickle_would_have_run(tmp_path):
    with_code(tmp_path / "w.pth")
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("error", "sha256", "line"),
    [
        (ParamError, "", "backbone.sha256 is empty; set it to {digest}, so that a changed file"),
        (WeightsError, "0" * 64, "w.pth: its SHA-256 is {digest}, backbone.sha256 says 0000"),
    ],
)
def test_weights_of_ones_own_are_held_by_their_hash(error, sha256, line, finished, tmp_path):
    file = tmp_path / "w.pth"
    complete(file)
    line = line.format(digest=hashlib.sha256(file.read_bytes()).hexdigest())
    params = read_params(backbone={"weights": str(file), "sha256": sha256})
    refuses(error, line, "extract", elsewhere(finished, "extract", tmp_path), params)


def test_the_packaged_weights_are_held_by_their_hash_too(finished, tmp_path):
    params = read_params(
        backbone={"name": "timm/tf_efficientnet_lite0", "weights": "imagenet", "sha256": "0" * 64}
    )
    line = "its SHA-256 is ..., backbone.sha256 says 0000"
    refuses(WeightsError, line, "extract", elsewhere(finished, "extract", tmp_path), params)


@pytest.mark.parametrize(
    ("error", "name", "weights", "line"),
    [
        (WeightsError, TINY, "gone/w.pth", "backbone.weights: no file gone/w.pth; put it there"),
        (
            ParamError,
            TINY,
            "imagenette",
            f"backbone.weights = 'imagenette': no weights of {TINY}; did you mean imagenet",
        ),
        (
            ParamError,
            "torchvision/resnet18",
            "IMAGENET1K_V9",
            "backbone.weights = 'IMAGENET1K_V9': no weights of torchvision/resnet18; "
            "did you mean IMAGENET1K_V1",
        ),
    ],
)
def test_unknown_or_missing_weights_are_named(error, name, weights, line, finished, tmp_path):
    params = read_params(backbone={"name": name, "weights": weights})
    refuses(error, line, "extract", elsewhere(finished, "extract", tmp_path), params)


RESNET18 = {"name": "torchvision/resnet18", "weights": "imagenet"}
RESNET18_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


@pytest.fixture
def hub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Say where torchvision's weights would be kept, with no network to fetch them from."""

    def no_network(request: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"


def test_weights_that_cannot_be_fetched_name_their_url_and_place(hub_file, finished, tmp_path):
    line = f"can't be fetched (...not known...); put {RESNET18_URL} at {hub_file}"
    params = read_params(backbone=RESNET18)
    refuses(WeightsError, line, "extract", elsewhere(finished, "extract", tmp_path), params)


def test_fetched_weights_with_another_hash_are_not_kept(hub_file, finished, tmp_path, monkeypatch):
    complete(tmp_path / "other.pth")
    url = (tmp_path / "other.pth").as_uri()
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: urllib.request.urlopen(url))
    line = f"can't be fetched (invalid hash value...); put {RESNET18_URL} at {hub_file}"
    params = read_params(backbone=RESNET18)
    refuses(WeightsError, line, "extract", elsewhere(finished, "extract", tmp_path), params)
    assert list(hub_file.parent.iterdir()) == []


def test_weights_put_in_that_place_are_the_ones_the_network_holds(hub_file):
    torch.manual_seed(1)
    put = backbone.build("torchvision/resnet18", backbone.SOURCE_CLASSES).state_dict()
    hub_file.parent.mkdir(parents=True)
    torch.save(put, hub_file)
    model, facts = backbone.pretrained("torchvision/resnet18", "imagenet", "", seed=2)
    held = model.state_dict()
    assert list(put) == list(held)
    assert all(torch.equal(put[name], held[name]) for name in put)
    assert hashlib.sha256(hub_file.read_bytes()).hexdigest() == facts.sha256
    assert facts.mean == (0.485, 0.456, 0.406)


# Checkpoints


Tensors = dict[str, np.ndarray[Any, Any]]


def rewritten(file: Path, out: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """Copy a checkpoint with its tensors and metadata changed."""
    tensors, meta = checkpoint.read(file)
    change(tensors, meta)
    checkpoint.write(out, tensors, meta)
    return out


def another_network(tensors: Tensors, meta: dict[str, Any]) -> None:
    meta["backbone"]["name"] = "timm/test_resnet"


def more_classes(tensors: Tensors, meta: dict[str, Any]) -> None:
    meta["classes"].append("class2")


def other_classes(tensors: Tensors, meta: dict[str, Any]) -> None:
    meta["classes"] = ["cats", "dogs"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (another_network, "another network than timm/test_resnet with 2 outputs ("),
        (more_classes, f"another network than {TINY} with 3 outputs (2 tensors differ, such as"),
        (
            other_classes,
            "its classes ['cats', 'dogs'] aren't those of the images, ['class0', 'class1']; "
            "run `dvc repro stage1`",
        ),
    ],
)
def test_stage2_refuses_a_checkpoint_of_another_network(change, line, finished, tmp_path):
    first = paths(finished)["stage2"]["stage1"]
    other = rewritten(first, tmp_path / "other.safetensors", change)
    ways = elsewhere(finished, "stage2", tmp_path, stage1=other)
    refuses(CheckpointError, f"other.safetensors: ...{line}", "stage2", ways, read_params())


def test_stage1_refuses_a_probe_of_other_classes(finished, tmp_path):
    probes = paths(finished)["stage1"]["probe"]
    other = rewritten(probes, tmp_path / "other.safetensors", other_classes)
    ways = elsewhere(finished, "stage1", tmp_path, probe=other)
    line = "its classes ['cats', 'dogs'] aren't those of the images...run `dvc repro probe`"
    refuses(CheckpointError, line, "stage1", ways, read_params())


def test_evaluate_refuses_a_model_of_other_classes(finished, tmp_path):
    second = paths(finished)["evaluate"]["stage2"]
    other = rewritten(second, tmp_path / "other.safetensors", other_classes)
    ways = elsewhere(finished, "evaluate", tmp_path, stage2=other)
    line = "its classes ['cats', 'dogs'] aren't those of the images...run `dvc repro stage2`"
    refuses(CheckpointError, line, "evaluate", ways, read_params())


def other_weights(tensors: Tensors, meta: dict[str, Any]) -> None:
    tensors["classifier.bias"][:] += 1e-6  # which no score would tell


def other_loss(tensors: Tensors, meta: dict[str, Any]) -> None:
    meta["val"]["loss"] += 0.03


def other_accuracy(tensors: Tensors, meta: dict[str, Any]) -> None:
    meta["val"]["accuracy"] -= 3 / 6  # of the six validation images


def other_images(tensors: Tensors, meta: dict[str, Any]) -> None:
    meta["val_images"] = "0" * 64


def earlier_version(tensors: Tensors, meta: dict[str, Any]) -> None:
    del meta["weights_sha256"], meta["val_images"]


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (other_weights, "the weights have SHA-256 ..., stage 1 had ...; run `dvc repro -f stage1`"),
        (
            other_images,
            "the validation images and labels have SHA-256 ..., stage 1 had 000000000000",
        ),
        (other_loss, "on validation, stage 1 had ...; run `dvc repro -f stage1`"),
        (other_accuracy, "on validation, stage 1 had ...; run `dvc repro -f stage1`"),
        (earlier_version, "the weights have SHA-256 ..., stage 1 had None"),
    ],
)
def test_stage2_refuses_what_stage_1_did_not_leave(change, line, precision, finished, tmp_path):
    """In either number format, whichever stage 1 was computed in."""
    other = rewritten(paths(finished)["stage2"]["stage1"], tmp_path / "o.safetensors", change)
    ways = elsewhere(finished, "stage2", tmp_path, stage1=other)
    refuses(CheckpointError, line, "stage2", ways, read_params(precision=precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage2_refuses_validation_images_with_other_labels(precision, finished, tmp_path):
    swapped = {"class0": "class1", "class1": "class0"}
    prepared = relabelled(finished, tmp_path, swapped.__getitem__)
    ways = elsewhere(finished, "stage2", tmp_path, prepared=prepared)
    line = "the validation images and labels have SHA-256 ...; run `dvc repro -f stage1`"
    refuses(CheckpointError, line, "stage2", ways, read_params(precision=precision))


def test_a_score_may_be_off_by_what_rounding_explains():
    """Two images or one in a hundred, and .02 of the loss; no more."""
    meta = {"val": {"accuracy": 0.9, "loss": 0.3}}

    def off(images: float, loss: float, n: int) -> None:
        _refuse_other_score(
            {"accuracy": 0.9 - images / n, "loss": 0.3 + loss}, meta, Path("m.safetensors"), n
        )

    for images, loss, n in ((2, 0.0199, 20), (-2, -0.0199, 200), (5, 0, 500), (0, 0, 20)):
        off(images, loss, n)
    for images, loss, n in ((3, 0, 20), (3, 0, 200), (6, 0, 500), (0, 0.021, 20), (0, np.nan, 9)):
        with pytest.raises(CheckpointError, match="run `dvc repro -f stage1`"):
            off(images, loss, n)


@pytest.mark.parametrize("kept", [0, 5, 500, 100_000])
def test_stage2_refuses_a_damaged_checkpoint(kept, finished, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(paths(finished)["stage2"]["stage1"].read_bytes()[:kept])
    ways = elsewhere(finished, "stage2", tmp_path, stage1=damaged)
    line = "damaged.safetensors: damaged (...); run `dvc checkout` or repeat"
    refuses(CheckpointError, line, "stage2", ways, read_params())


def test_stage2_refuses_a_checkpoint_that_is_not_of_this_pipeline(finished, tmp_path):
    save_file(tiny(), tmp_path / "foreign.safetensors")
    ways = elsewhere(finished, "stage2", tmp_path, stage1=tmp_path / "foreign.safetensors")
    line = "foreign.safetensors: not a checkpoint of this pipeline (no metadata)"
    refuses(CheckpointError, line, "stage2", ways, read_params())


def test_stage2_refuses_metadata_that_is_no_json(finished, tmp_path):
    save_file(tiny(), tmp_path / "odd.safetensors", {checkpoint.KEY: "{"})
    ways = elsewhere(finished, "stage2", tmp_path, stage1=tmp_path / "odd.safetensors")
    refuses(CheckpointError, "odd.safetensors: damaged (", "stage2", ways, read_params())


def test_stage2_refuses_a_pickle_and_does_not_execute_it(finished, tmp_path):
    with_code(tmp_path / "model.safetensors")
    ways = elsewhere(finished, "stage2", tmp_path, stage1=tmp_path / "model.safetensors")
    refuses(CheckpointError, "model.safetensors: damaged (", "stage2", ways, read_params())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "asked", "given", "line"),
    [
        ("stage2", "stage1", "probe", "probe.safetensors: "),
        ("stage1", "probe", "stage1", "stage1/model.safetensors: holds no probes; run `dvc repro"),
        ("evaluate", "stage1", "stage2", "stage2/model.safetensors: "),
        ("evaluate", "stage2", "probe", "probe.safetensors: "),
    ],
)
def test_checkpoints_are_not_taken_for_each_other(name, asked, given, line, finished, tmp_path):
    ways = elsewhere(finished, name, tmp_path, **{asked: paths(finished)["evaluate"][given]})
    refuses(CheckpointError, line, name, ways, read_params())


def test_a_checkpoint_without_a_network_is_named(tmp_path):
    checkpoint.write(tmp_path / "bare.safetensors", {}, {"sure_above": 0.5, "n_outputs": 2})
    with pytest.raises(CheckpointError, match=pattern("bare.safetensors: holds no network (no '")):
        classifier.load(tmp_path / "bare.safetensors")


# Predict


def final_model(finished: Path) -> Path:
    return paths(finished)["evaluate"]["final"] / "model.safetensors"


@pytest.mark.parametrize(
    ("choose", "line"),
    [
        (lambda f: f / "gone.safetensors", "gone.safetensors: no such file; run `dvc repro` or"),
        (lambda f: paths(f)["evaluate"]["final"], "models/final: "),
        (lambda f: paths(f)["stage2"]["stage1"], "not a final model; use models/final/model.safet"),
        (lambda f: paths(f)["stage1"]["probe"], "not a final model; use models/final/model.safet"),
        (lambda f: f / "photos/class0/000.png", "000.png: damaged ("),
    ],
    ids=["missing", "a folder", "stage 1", "probe", "an image"],
)
def test_predict_refuses_what_is_no_final_model(choose, line, finished):
    with pytest.raises(CheckpointError, match=pattern(line)):
        classifier.load(choose(finished))


# The command line


def command(module: str, *options: object, debug: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a stage or command as dvc and people do."""
    env = {**os.environ, "PIPELINE_DEBUG": "1" if debug else ""}
    words = [sys.executable, "-m", "pipeline", module, *map(str, options)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def prepare_command(
    tmp_path: Path, params: Params, debug: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run prepare on its own params.yaml; whatever goes wrong, nothing may be written."""
    file, out, timing = (tmp_path / name for name in ("params.yaml", "prepared", "timing.json"))
    file.write_text(yaml.safe_dump(params))
    ended = command("prepare", "--params", file, "--out", out, "--timing", timing, debug=debug)
    assert not any(path.exists() for path in (out, tmp_path / "prepared.part", timing))
    return ended


def test_the_command_line_names_a_missing_folder_in_one_line(tmp_path):
    ended = prepare_command(tmp_path, read_params(prepare={"path": "no/such"}))
    line = "error: no/such: no such folder; set prepare.path to the folder of your images\n"
    assert (1, line) == (ended.returncode, ended.stderr)


def test_the_command_line_names_a_wrong_value_in_one_line(tmp_path):
    ended = prepare_command(tmp_path, read_params(prepare={"val_fraction": 1.5}))
    line = "error: params.yaml: prepare.val_fraction = 1.5: input should be less than 1\n"
    assert (1, line) == (ended.returncode, ended.stderr)


def test_the_command_line_names_an_unreadable_image_in_one_line(photos, tmp_path):
    unreadable_jpeg(photos)
    ended = prepare_command(tmp_path, read_params(prepare={"path": str(photos)}))
    assert ended.returncode == 1
    assert re.fullmatch(f"error: {photos}/class1/broken.jpg: can't be read .*\n", ended.stderr)


def test_with_debug_the_command_line_shows_the_traceback(tmp_path):
    ended = prepare_command(tmp_path, read_params(prepare={"path": "no/such"}), debug=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert ended.stderr.splitlines()[-1].startswith(
        "pipeline.stage_runtime.errors.DataError: no/such: "
    )


def test_predict_names_a_missing_file_in_one_line(finished):
    ended = command("predict", "no/such.jpg", "--model", final_model(finished))
    assert (ended.returncode, ended.stderr) == (1, "error: no/such.jpg: no such file\n")


def test_predict_names_a_missing_model_in_one_line(finished):
    photo = finished / "photos" / "class0" / "000.png"
    ended = command("predict", photo, "--model", "no/such.safetensors")
    line = "error: no/such.safetensors: no such file; run `dvc repro` or `dvc pull`\n"
    assert (1, "", line) == (ended.returncode, ended.stdout, ended.stderr)


def test_an_interrupted_command_says_how_to_go_on():
    with pytest.raises(SystemExit, match="interrupted; run the same"), one_line_errors(INTERRUPTED):
        raise KeyboardInterrupt


def ask_for(n_bytes: int) -> None:
    torch.empty(n_bytes, dtype=torch.uint8)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeException("Failed to allocate memory for requested buffer of size 20000000000"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=[type(e).__name__ for e in OUT_OF_MEMORY])
def test_memory_that_runs_out_is_said_in_one_line(error):
    line = "error: out of memory; use smaller images or batches"
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert line == caught.value.code


def test_memory_that_the_processor_has_not_is_said_in_one_line():
    line = "error: out of memory; use smaller images or batches; start again"
    with pytest.raises(SystemExit) as caught, one_line_errors(recover="start again"):
        ask_for(1 << 60)
    assert line == caught.value.code


@pytest.mark.parametrize("name", ["predict", "export"])
def test_a_command_that_runs_out_of_memory_says_so_in_one_line(
    name, finished, monkeypatch, capsys, tmp_path
):
    module = {"predict": predict, "export": export}[name]
    words = [str(finished / "photos"), "--model", str(final_model(finished)), "--csv"]
    monkeypatch.setattr("sys.argv", [name, *(words if name == "predict" else [])])
    monkeypatch.setattr(classifier.Classifier, "probabilities", lambda *_: ask_for(1 << 60))
    monkeypatch.setattr(portable, "write", lambda *_: ask_for(1 << 60))
    for constant, file in (("FINAL", final_model(finished)), ("PREPARED", finished / "prepared")):
        monkeypatch.setattr(export, constant, file)
    monkeypatch.setattr(export, "REPORT", paths(finished)["evaluate"]["out"] / "metrics.json")
    monkeypatch.setattr(export, "LOCK", ROOT / "dvc.lock")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == "error: out of memory; use smaller images or batches"
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "export").exists()


def test_another_error_of_torch_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="must match"), one_line_errors():
        torch.zeros(2) + torch.zeros(3)
