"""Train on the same images with PyTorch's tutorial, fastai and Lightning, with their defaults.

    python -m bench.peers fastai             # or tutorial, lightning; after `dvc repro prepare`
    python -m bench.peers tutorial --epochs 1    # a quick look

Each one reads the image files in the splits of data/prepared, starts from the weights in
params.yaml, trains at 160 pixels as in its own documentation, and prints its test accuracy.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.dataset.sources import elpv
from pipeline.images.rows import Rows
from pipeline.images.shards import read_facts, read_rows
from pipeline.nets.backbone import Backbone, head_name, pretrained, set_head
from pipeline.nets.torchvision_import import torchvision
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import threads

PREPARED = Path("data/prepared")
SIZE, WORKERS, SEED = 160, 2, 0
Loaders = dict[str, DataLoader[Any]]


class Files(Dataset[tuple[Tensor, int]]):
    """The image files of one split, decoded on each access."""

    def __init__(self, split: str, transform: Callable[[Image.Image], Tensor]) -> None:
        self.rows, self.transform = read_rows(PREPARED, split), transform
        self.folder = source()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Decode one image."""
        image = Image.open(self.folder / self.rows.paths[i]).convert("RGB")
        return self.transform(image), int(self.rows.labels[i])


def loaders(batch_size: int) -> tuple[Loaders, nn.Module]:
    """Return loaders as in PyTorch's tutorial (at our size), and the network with a new head."""
    model, backbone = network()
    t = torchvision.transforms
    ends = [t.ToTensor(), t.Normalize(backbone.mean, backbone.std)]
    crops = [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()]
    whole = [t.Resize(round(SIZE * 256 / 224)), t.CenterCrop(SIZE)]
    found = {
        split: DataLoader(
            Files(split, t.Compose([*(crops if split == "train" else whole), *ends])),
            batch_size,
            shuffle=split == "train",
            num_workers=WORKERS,
        )
        for split in ("train", "val", "test")
    }
    return found, model


def read_params() -> dict[str, Any]:
    """Read the params of the run."""
    params: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    return params


def source() -> Path:
    """Return the folder that the paths of index.csv are relative to."""
    prepare = read_params()["prepare"]
    return elpv().folder if prepare["source"] == "elpv" else Path(prepare["path"])


def start() -> tuple[nn.Module, Backbone]:
    """Build the pretrained network with its own head."""
    of = read_params()["backbone"]
    return pretrained(of["name"], of["weights"], of["sha256"], SEED)


def network() -> tuple[nn.Module, Backbone]:
    """Build the pretrained network with a new head."""
    model, backbone = start()
    set_head(model, len(read_facts(PREPARED).classes))
    return model, backbone


def tutorial(epochs: int) -> Tensor:
    """Train as in docs.pytorch.org's transfer learning tutorial; keep the best epoch."""
    data, model = loaders(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best, state = -1.0, model.state_dict()
    for epoch in range(epochs):
        model.train()
        for x, y in data["train"]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        found = float((logits(model, data["val"]).argmax(1) == labels("val")).float().mean())
        say(f"epoch {epoch + 1}  val acc {found:.4f}")
        if found > best:
            best, state = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return logits(model, data["test"])


def fastai(epochs: int) -> Tensor:
    """Train with fastai's `fine_tune` and its defaults: one epoch of the head, then all layers."""
    import pandas
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, vision_learner

    rows = {split: read_rows(PREPARED, split) for split in ("train", "val", "test")}
    table = pandas.DataFrame(
        [
            (path, label, split == "val")
            for split in ("train", "val")
            for path, label in zip(rows[split].paths, named(rows[split]), strict=True)
        ],
        columns=["path", "label", "is_val"],
    )
    folder = source()
    data = ImageDataLoaders.from_df(
        table,
        folder,
        fn_col="path",
        label_col="label",
        valid_col="is_val",
        item_tfms=Resize(SIZE),
        batch_tfms=aug_transforms(),
        seed=SEED,
        num_workers=WORKERS,
    )
    model, backbone = start()
    with tempfile.TemporaryDirectory() as scratch:
        save_file(model.state_dict(), f"{scratch}/weights.safetensors")
        weights = {"file": f"{scratch}/weights.safetensors"}
        learn = vision_learner(
            data,
            backbone.name.removeprefix("timm/"),
            metrics=accuracy,
            path=Path(scratch),
            pretrained_cfg_overlay=weights,
        )
        learn.fine_tune(epochs)
        test = data.test_dl([folder / path for path in rows["test"].paths])
        found: Tensor = learn.get_preds(dl=test)[0]
    return found


def lightning(epochs: int) -> Tensor:
    """Train with Lightning's `BackboneFinetuning`: the head, then all layers from epoch 3 on."""
    import lightning as pl
    from lightning.pytorch.callbacks import BackboneFinetuning

    data, model = loaders(32)
    name = head_name(model)
    head = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())

    class Classifier(pl.LightningModule):  # type: ignore[misc]
        """A backbone and a head, as the callback expects them."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model, head

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.backbone(x))
            return y

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
            right = self(batch[0]).argmax(1) == batch[1]
            self.log("val_acc", right.float().mean(), prog_bar=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            wanted = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.Adam(wanted, lr=1e-3)

    classifier = Classifier()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = pl.Trainer(
            max_epochs=epochs,
            default_root_dir=scratch,
            callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2)],
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(classifier, data["train"], data["val"])
    return logits(classifier, data["test"])


# With the number of epochs in the comparison.
PEERS: dict[str, tuple[Callable[[int], Tensor], int]] = {
    "tutorial": (tutorial, 6),
    "fastai": (fastai, 5),
    "lightning": (lightning, 8),
}


@torch.inference_mode()
def logits(model: nn.Module, data: DataLoader[Any]) -> Tensor:
    """Return the logits (N, C) of a split."""
    model.eval()
    return torch.cat([model(x) for x, _ in data])


def labels(split: str) -> Tensor:
    """Return a split's labels (N,)."""
    return torch.from_numpy(read_rows(PREPARED, split).labels)


def named(rows: Rows) -> list[str]:
    """Return the names of the labels."""
    classes = read_facts(PREPARED).classes
    return [classes[label] for label in rows.labels]


def main() -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--epochs", type=int, help="instead of those of the comparison")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    torch.manual_seed(SEED)
    train, epochs = PEERS[options.peer]
    began = time.perf_counter()
    found = train(options.epochs or epochs)
    accuracy = float((found.argmax(1) == labels("test")).float().mean())
    seconds = time.perf_counter() - began
    say(f"{options.peer}: test accuracy {accuracy:.4f} after {seconds:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"accuracy": accuracy, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
