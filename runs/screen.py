"""Try changed params of stages 1 and 2 over data sets and seeds, judged by validation images alone.

    python -m runs.screen elpv-group clothing=FOLDER --variant stage2.epochs=8
    python -m runs.screen elpv-image --seeds 5 6 --variant "stage1.lr=1e-3 stage1.epochs=20"

A variant is a list of params; the one without any is always run. Each run is a row of a table: the
validation accuracy and loss of the best probe, and those of each stage at epoch 0, at its best
epoch and at its last one. Rows that the table has are not run again, so a killed screening goes on.
Prints the mean difference of each variant from the params as they are, paired by set and seed, with
its standard error. The best epoch is chosen by the same images: its accuracy is too high, so losses
and last epochs count. Test images are not used.
"""

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.commands.table import aligned
from pipeline.stage_runtime.files import write_csv
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import load_yaml
from runs.trials import Trial, fine_tuned

FIGURES = (
    *("probe_accuracy", "probe_loss"),
    *(
        f"stage{n}_{when}_{what}"
        for n in (1, 2)
        for when in ("start", "best", "last")
        for what in ("accuracy", "loss")
    ),
    "seconds",
)
COLUMNS = ("set", "seed", "variant", *FIGURES)
Row = dict[str, str]


def main() -> None:
    """Run what the table lacks, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("sets", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5, 10))
    parser.add_argument("--variant", action="append", default=[], metavar="'KEY=VALUE ...'")
    parser.add_argument("--keep", type=Path, default=Path("data/trials"), help="for finished parts")
    options = parser.parse_args()
    file = options.keep / "screened.csv"
    variants = ["", *options.variant]
    trials = [Trial.named(text, options.keep) for text in options.sets]
    for seed in options.seeds:
        for trial in trials:
            for variant in variants:
                rows = read(file)
                if not any(is_of(row, trial, seed, variant) for row in rows):
                    rows.append(screened(trial, seed, variant))
                    write_csv(file, [COLUMNS, *([row[c] for c in COLUMNS] for row in rows)])
    names = [trial.name for trial in trials]
    wanted = [r for r in read(file) if r["set"] in names and int(r["seed"]) in options.seeds]
    for line in aligned(differences(wanted, variants)):
        say(line)


def read(file: Path) -> list[Row]:
    """Read the table; empty if there is none yet."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def is_of(row: Row, trial: Trial, seed: int, variant: str) -> bool:
    """Return whether a row is of this run."""
    return (row["set"], row["seed"], row["variant"]) == (trial.name, str(seed), variant)


def screened(trial: Trial, seed: int, variant: str) -> Row:
    """Run both stages on the splits that a seed draws; return the row of the table."""
    params = changed(trial.params() | {"seed": seed}, variant)
    backbone = params["backbone"]["name"]
    probed, prepared = trial.probed(backbone, seed), trial.prepared(seed)
    found = {**_of_probe(probed)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ones, twos = fine_tuned(prepared, probed / "probe.safetensors", params, Path(folder))
        found |= {**_of_stage(ones, "stage1"), **_of_stage(twos, "stage2")}
    found["seconds"] = time.perf_counter() - start
    said = {name: f"{value:.4f}" for name, value in found.items()}
    return {"set": trial.name, "seed": str(seed), "variant": variant, **said}


def changed(params: dict[str, Any], variant: str) -> dict[str, Any]:
    """Change params by a list of KEY=VALUE."""
    for setting in variant.split():
        key, _, value = setting.partition("=")
        *sections, name = key.split(".")
        place = params
        for section in sections:
            place = place[section]
        if name not in place:
            raise SystemExit(f"--variant {setting}: no such param")
        place[name] = load_yaml(value)
    return params


def _of_probe(folder: Path) -> dict[str, float]:
    val = json.loads((folder / "metrics.json").read_text())["probe"]["val"]
    return {"probe_accuracy": val["accuracy"], "probe_loss": val["loss"]}


def _of_stage(folder: Path, name: str) -> dict[str, float]:
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    val = json.loads((folder / "metrics.json").read_text())[name]["val"]
    before = [row for row in history if row["epoch"] == "0"][-1]
    return {
        **{f"{name}_start_{what}": float(before[f"val_{what}"]) for what in ("accuracy", "loss")},
        **{f"{name}_best_{what}": val[what] for what in ("accuracy", "loss")},
        **{
            f"{name}_last_{what}": float(history[-1][f"val_{what}"])
            for what in ("accuracy", "loss")
        },
    }


def differences(rows: Sequence[Row], variants: Sequence[str]) -> list[list[str]]:
    """Return a table: for each variant, the mean difference of each figure from the first's."""
    of = {(row["set"], row["seed"], row["variant"]): row for row in rows}
    lines = [["variant", "runs", *FIGURES]]
    for variant in variants:
        pairs = [
            (row, of[one, seed, ""])
            for (one, seed, name), row in of.items()
            if name == variant and (one, seed, "") in of
        ]
        cells = []
        for figure in FIGURES:
            if not variant:
                cells.append(f"{mean(float(row[figure]) for row, _ in pairs):.4f}")
                continue
            gaps = [float(row[figure]) - float(base[figure]) for row, base in pairs]
            error = f" ± {stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 else ""
            cells.append(f"{mean(gaps):+.4f}{error}")
        lines.append([variant or "as they are", str(len(pairs)), *cells])
    return [list(column) for column in zip(*lines, strict=True)]  # a figure a line


if __name__ == "__main__":
    main()
