"""The page that a person reads: what it says and shows, and that a browser draws it offline."""

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import look
from conftest import paths, read_params, run, write_photos
from sklearn.calibration import calibration_curve

from pipeline.final_model import classifier
from pipeline.final_model.grad_cam import activation_maps, explained_blocks
from pipeline.final_model.graph import Graph
from pipeline.final_model.operating_point import Decision
from pipeline.images.shards import read_images
from pipeline.inference.taps import Taps
from pipeline.nets.network import load
from pipeline.statistics.reliability import Bin, calibration_error, reliability

STAGE_FILES = ("prepared", "models")


class Page(HTMLParser):
    """Elements and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if data.strip() and self.elements[-1][0] not in ("style", "script"):
            self.words += f" {' '.join(data.split())}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Path:
    return paths(folder)["report"]["out"]


def copied(finished: Path, tmp_path: Path) -> Path:
    for name in STAGE_FILES:
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Path:
    """A run on random labels, in colour, with names that are markup: it makes mistakes."""
    folder = tmp_path_factory.mktemp("hard")
    write_photos(folder / "drawn", classes=3, each=24)
    random = np.random.default_rng(0)
    names = ["<img src=x onerror=alert(1)>", 'a "b" & {{ c }}', "größe"]
    for i, file in enumerate(sorted((folder / "drawn").rglob("*.png"))):
        target = folder / "photos" / names[random.integers(3)] / f"<b>{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_CACHE", str(folder / "cache"))
        run(folder, read_params(prepare={"path": str(folder / "photos")}))
    return folder


def test_the_page_says_what_evaluate_found(hard):
    page = Page(page_of(hard).read_text())
    found = json.loads((page_of(hard).parent / "metrics.json").read_text())
    gain = found["stage2_minus_probe"]
    assert f"stage 2 minus probe {100 * gain['accuracy']:+.1f} points" in page.words
    final = found["test"][found["chosen"]]
    assert f"{100 * final['accuracy']:.1f} %" in page.words
    rows = re.findall(r"(?:probe|stage [12]) ([\d.]+) % [\d.]+ % [\d.]+ ", page.words)
    models = ("probe_linear", "probe", "stage1", "stage2")
    assert rows == [f"{100 * found['test'][m]['accuracy']:.1f}" for m in models]


def answers(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def surest_mistakes(rows: list[dict[str, str]], model: str) -> list[str]:
    by_trust = sorted(rows, key=lambda row: -float(row["probability"]))
    return [row["path"] for row in by_trust if row[model] != row["label"]][:12]


def test_the_page_shows_mistakes_and_doubts_of_validation_and_held_out_training_images(hard):
    report = page_of(hard).parent
    rows = answers(report / "validation.csv")
    held_out = answers(report.parent / "probe" / "out_of_fold.csv")
    chosen = json.loads((report / "metrics.json").read_text())["chosen"]
    wrong = surest_mistakes(rows, chosen)
    wrong_of_train = surest_mistakes([row for row in held_out if row["probe"]], "probe")
    assert wrong
    assert wrong_of_train
    doubtful = sorted(rows, key=lambda row: float(row["probability"]))[:12]
    pictures = [str(i["alt"]) for i in Page(page_of(hard).read_text()).all("img")]
    shown = [alt.split(": ")[0] for alt in pictures if not alt.startswith("where")]
    assert shown[: len(wrong)] == wrong
    unsure = shown[len(wrong) : len(wrong) + len(doubtful)]
    assert set(unsure) == {row["path"] for row in doubtful}
    assert shown[-len(wrong_of_train) :] == wrong_of_train
    maps = len(shown) - len(doubtful) - len(wrong_of_train)
    assert len([alt for alt in pictures if alt.startswith("where")]) == maps
    tested = {row["path"] for row in answers(report / "predictions.csv")}
    assert tested
    assert not tested & set(shown)


def test_the_page_runs_no_name_and_asks_for_no_other_file(hard):
    text = page_of(hard).read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert [] == [a for tag, a in page.elements if tag == "img" and "onerror" in a]
    assert page.words.count("<img src=x onerror=alert(1)>") > 2
    sources = [
        str(value) for _, a in page.elements for k, value in a.items() if k in ("src", "href")
    ]
    own = re.compile(r"data:|#|\.\./\w+/timing\.json$")
    assert [] == [source[:80] for source in sources if not own.match(source)]
    urls = set(re.findall(r"https?://[^\"' <]+", text))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_every_picture_and_chart_has_a_text_and_no_two_a_name(hard):
    page = Page(page_of(hard).read_text())
    assert all(image["alt"] for image in page.all("img"))
    assert all(chart["aria-label"] and chart["role"] == "img" for chart in page.all("svg"))
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_all_of_it_offline(width, hard, tmp_path):
    shutil.copytree(hard / "models", tmp_path / "models")
    page = page_of(tmp_path)
    seen = look(page, width)
    assert seen.width == width
    assert seen.needs <= width
    assert [] == seen.wide
    assert [] == seen.console
    assert [] == seen.requests
    assert seen.broken == 0
    assert seen.drawn == len(Page(page.read_text()).all("svg"))
    assert page.stat().st_size < 3e6


def test_the_page_follows_the_reader_into_the_dark(finished, tmp_path):
    shutil.copytree(finished / "models", tmp_path / "models")
    light = look(page_of(tmp_path), 500).paper
    dark = look(page_of(tmp_path), 501, "--blink-settings=preferredColorScheme=0").paper
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 23, 26)")


def test_the_same_run_gives_the_same_page(finished, tmp_path):
    folder = copied(finished, tmp_path)
    page_of(folder).unlink()
    run(folder, read_params(prepare={"path": str(finished / "photos")}), "report")
    assert page_of(finished).read_bytes() == page_of(folder).read_bytes()


def test_without_test_images_there_is_a_page_and_no_verdict(photos, tmp_path):
    run(tmp_path, read_params(prepare={"path": str(photos), "test_fraction": 0.0}))
    page = Page(page_of(tmp_path).read_text())
    assert "No labelled test split, so no verdict" in page.words
    assert page.all("img")  # of validation and training images
    assert len(page.all("svg")) == 4  # curves, interpolation and profile


@pytest.mark.long
def test_many_classes_get_tables_instead_of_a_matrix(tmp_path):
    photos = write_photos(tmp_path / "photos", classes=36, each=6)
    run(tmp_path, read_params(prepare={"path": str(photos), "least_per_class": 2}))
    text = page_of(tmp_path).read_text()
    assert "Confusion matrix" not in text
    assert "6 more" in Page(text).words
    assert all(f"class{i}" in text for i in range(36))


# Class activation maps.


@pytest.fixture
def images(finished):
    return np.array(read_images(paths(finished)["prepare"]["out"], "test"))


def final_of(finished: Path, name: str) -> classifier.Classifier:
    """Make a final model of a stage's network."""
    found = classifier.load(paths(finished)["report"]["final"])
    network, _ = load(paths(finished)[name]["out"] / "model.safetensors")
    member = classifier.Member(name, network, None, "average", found.members[0].tta)
    return classifier.Classifier([member], 1.0, Decision([0.0, 0.0]), name)


def test_where_a_linear_head_follows_averages_the_maps_are_its_weights_on_the_features(
    finished, images
):
    graph = Graph(final_of(finished, "stage2"))
    [part], [block_name] = graph.parts, explained_blocks(graph)
    features: list[torch.Tensor] = []
    block = part.model.get_submodule(block_name)
    handle = block.register_forward_hook(lambda m, i, output: features.append(output))
    with torch.no_grad():
        part.scores(torch.from_numpy(images), (0,))
    handle.remove()
    weight = part.model.classifier.weight.detach()  # (C, D)
    answers = np.arange(len(images)) % 2
    expected = torch.einsum("nd,ndhw->nhw", weight[answers], features[0]).clamp(min=0).numpy()
    found = activation_maps(graph, images, answers)
    strongest = expected.max((1, 2), keepdims=True)
    assert (strongest > 0).any()
    assert np.allclose(found, expected / np.where(strongest > 0, strongest, 1), atol=1e-5)


def test_a_probes_maps_follow_the_slope_of_its_scores(finished, images):
    final = classifier.load(paths(finished)["report"]["final"])
    (probed,) = (member for member in final.members if member.probe)
    graph = Graph(replace(final, members=[replace(probed, weight=1.0)]))
    [part], [block] = graph.parts, explained_blocks(graph)
    assert block == probed.probe.depth.split("+")[-1]
    features: list[torch.Tensor] = []
    handle = part.model.get_submodule(block).register_forward_hook(
        lambda m, i, output: features.append(output.double())
    )
    with torch.no_grad(), Taps(part.model, [block], probed.pooling):
        part.scores(torch.from_numpy(images[:1]), (0,))
    handle.remove()
    [maps] = features[0].numpy()  # (D, h, w)

    def score(maps: np.ndarray) -> float:
        codes = np.concatenate([maps.mean((1, 2)), maps.max((1, 2))])
        return float(probed.probe.scores(codes[None])[0, 0])

    step, slopes = 1e-4, np.zeros_like(maps)
    for place in np.ndindex(maps.shape):
        up, down = maps.copy(), maps.copy()
        up[place] += step
        down[place] -= step
        slopes[place] = (score(up) - score(down)) / (2 * step)
    evidence = (maps * slopes.mean((1, 2), keepdims=True)).sum(0).clip(min=0)
    [found] = activation_maps(graph, images[:1], np.zeros(1, np.int64))
    assert evidence.max() > 0
    assert np.allclose(found, evidence / evidence.max(), atol=1e-2)


def test_the_maps_of_a_blend_are_the_weighted_mean_of_its_members_maps(finished, images):
    final = classifier.load(paths(finished)["report"]["final"])
    answers = np.arange(len(images)) % 2
    alone = []
    for member in final.members:
        graph = Graph(replace(final, members=[replace(member, weight=1.0)]))
        alone.append(torch.from_numpy(activation_maps(graph, images, answers))[:, None])
    size = max((found.shape[-2:] for found in alone), key=np.prod)
    resized = [torch.nn.functional.interpolate(found, size, mode="bilinear") for found in alone]
    weights = [member.weight for member in final.members]
    expected = sum(w * found[:, 0].numpy() for w, found in zip(weights, resized, strict=True))
    strongest = expected.max((1, 2), keepdims=True)
    assert len(alone) > 1
    found = activation_maps(Graph(final), images, answers)
    assert np.allclose(found, expected / np.where(strongest > 0, strongest, 1), atol=1e-5)


# Calibration.


def test_reliability_is_scikit_learns_by_quantiles():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1, 1000)
    right = random.uniform(size=1000) < confidence**2
    accuracy, mean = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    bins = reliability(confidence, right)
    assert np.allclose([b.accuracy for b in bins], accuracy)
    assert np.allclose([b.confidence for b in bins], mean)
    assert [b.images for b in bins] == [100] * 10


def test_the_calibration_error_weighs_bins_by_their_images():
    bins = [Bin(0.6, 0.5, 30), Bin(0.9, 1.0, 10)]
    assert calibration_error(bins) == pytest.approx(0.75 * 0.1 + 0.25 * 0.1)
    assert calibration_error([Bin(0.9, 0.5, 10)]) == pytest.approx(0.4)


@pytest.mark.parametrize(("images", "bins"), [(0, 0), (5, 1), (19, 1), (25, 2), (999, 10)])
def test_of_few_images_there_are_few_bins(images, bins):
    assert len(reliability(np.linspace(0.5, 1, images), np.ones(images, bool))) == bins


def test_where_test_groups_are_too_few_the_page_says_so(hard, tmp_path):
    folder = copied(hard, tmp_path)
    file = page_of(folder).parent / "metrics.json"
    metrics = json.loads(file.read_text())
    for found in metrics["test"].values():
        found |= {"accuracy_low": None, "accuracy_high": None}
    for gain in ("stage2_minus_probe", "chosen_minus_probe"):
        metrics[gain] |= {"low": None, "high": None, "p_value": None}
    file.write_text(json.dumps(metrics))
    run(folder, read_params(), "report")
    page = Page(page_of(folder).read_text())
    assert "too few groups of images for an interval" in page.words
    assert "; too few groups for an interval, so this says nothing about other" in page.words
    charts = " ".join(str(chart["aria-label"]) for chart in page.all("svg"))
    assert charts.count("too few groups for an interval") >= 4
    assert "None" not in page.words
