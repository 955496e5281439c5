"""A classifier with all that is needed to use it: network, classes, size, normalisation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images.tones import PLAIN, Tones, of_facts
from pipeline.nets import checkpoint
from pipeline.nets.backbone import Backbone, backbone_of, build, head_name
from pipeline.nets.blocks import trace
from pipeline.nets.device import device, device_of
from pipeline.nets.device_images import DeviceImages
from pipeline.nets.fuse import NUMBER_FORMATS, fuse
from pipeline.stage_runtime.distributed import Arrays, all_gather_batches
from pipeline.stage_runtime.errors import CheckpointError, ParamError
from pipeline.stage_runtime.files import Rowwise

# The size of a batch may change an image's last bits, its place in the batch doesn't: so one size.
EVAL_BATCH, ON_A_GPU = 32, 256


@dataclass
class Network:
    """A network as it is trained, stored and used."""

    model: nn.Module  # folded, channels_last
    backbone: Backbone
    classes: list[str]
    image_size: int  # pixels a side, at its input
    packed_size: int  # pixels a side that an image is first fitted to
    fit: Literal["squash", "crop", "pad"]  # how an image becomes a square
    channels: int  # of the images it was made with: 1 for grey, else 3
    precision: Literal["fp32", "bf16"]
    tones: Tones = PLAIN  # how deeper pictures become 8 bits, and transparent ones opaque

    def take(self, image_size: int) -> None:
        """Change the size of its input; raises ParamError for one that the network can't take."""
        trace(self.model, image_size)
        self.image_size = image_size

    @property
    def n_outputs(self) -> int:
        """Count the logits: the classes, or for a probe's network those of its source."""
        head = self.model.get_submodule(head_name(self.model))
        assert isinstance(head, nn.Linear)
        return head.out_features

    @property
    def device(self) -> torch.device:
        """Give where the network is."""
        return device_of(self.model)

    def on(self, device: torch.device) -> "Network":
        """Bring the network to a device; gives it."""
        self.model.to(device)
        return self

    def facts(self) -> dict[str, Any]:
        """Give everything but the weights, for a checkpoint's metadata."""
        apart = ("model", "tones")
        facts = {name: value for name, value in vars(self).items() if name not in apart}
        return {**facts, "backbone": asdict(self.backbone), **self.tones.facts()}

    def save(self, file: Path, **more: Any) -> None:
        """Write the checkpoint; `more` joins the metadata."""
        tensors = {
            name: t.detach().contiguous().cpu().numpy()
            for name, t in self.model.state_dict().items()
        }
        weights = {"weights_sha256": checkpoint.digest(tensors)}
        checkpoint.write(file, tensors, {**self.facts(), **weights, **more})

    def shrink(self, pixels: Tensor) -> Tensor:
        """Resize pixels (B, H, W) or (B, H, W, 3) that are larger to `image_size`, in float32.

        With antialiasing. Flips and quarter turns may come before or after.
        """
        if pixels.shape[2] == self.image_size:
            return pixels
        x = pixels.to(torch.float32)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)  # (B, 1 or 3, H, W)
        size = [self.image_size, self.image_size]
        x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return x[:, 0] if pixels.ndim == 3 else x.permute(0, 2, 3, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn uint8 or 0..255 pixels (B, H, W) or (B, H, W, 3) into the input (B, 3, h, w).

        Shrunk to `image_size`, in the layout and number format that the first convolution likes:
        channels last, and half the bytes where that is bfloat16.
        """
        x, dtype = self.shrink(pixels), NUMBER_FORMATS[self.precision]
        # Whole numbers up to 255 are exact in either, resized pixels are none.
        x = x.to(dtype if x.dtype == torch.uint8 else torch.float32)
        means, stds = self.backbone.mean, self.backbone.std
        if x.ndim == 4:
            return _standardised(x, means, stds).to(dtype).permute(0, 3, 1, 2)
        # Grey: one plane for all channels that are normalised alike.
        kinds = list(zip(means, stds, strict=True))
        planes = {(m, s): _standardised(x, [m], [s]).to(dtype) for m, s in set(kinds)}
        y = torch.empty(*x.shape, len(kinds), dtype=dtype, device=x.device)
        for channel, kind in enumerate(kinds):
            y[..., channel] = planes[kind]
        return y.permute(0, 3, 1, 2)

    def load_state(self, tensors: dict[str, NDArray[Any]], where: Path) -> None:
        """Load weights strictly.

        Raises CheckpointError naming a tensor that is missing, too many or of another shape.
        """
        own = self.model.state_dict()
        wrong = [k for k in own if k not in tensors or tensors[k].shape != tuple(own[k].shape)]
        wrong += [k for k in tensors if k not in own]
        if wrong:
            raise CheckpointError(
                f"{where}: a checkpoint of another network than {self.backbone.name} with "
                f"{self.n_outputs} outputs ({len(wrong)} tensors differ, such as {wrong[0]})"
            )
        self.model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})


FACTS = [name for name in Network.__dataclass_fields__ if name not in ("model", "tones")]


def _standardised(pixels: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Subtract and divide by each channel's 255-fold mean and deviation: (B, H, W[, D]).

    In float32 inside, whatever the input's format, in one pass over whole rows.
    """
    rows = pixels.flatten(2).flatten(0, 1)  # (B * H, W * D)
    columns = torch.tensor([means, stds], device=pixels.device).repeat(1, pixels.shape[2])
    mean, std = 255 * columns
    return F.batch_norm(rows, mean, std**2, eps=0).view(pixels.shape)


def load(
    file: Path, precision: Literal["fp32", "bf16"] | None = None
) -> tuple[Network, dict[str, Any]]:
    """Build the network of a checkpoint without pretrained weights and load it strictly.

    Returns it with the checkpoint's metadata. Raises CheckpointError if it can't be.
    """
    tensors, meta = checkpoint.read(file)
    return from_checkpoint(tensors, meta, file, precision), meta


def from_checkpoint(
    tensors: dict[str, NDArray[Any]],
    meta: dict[str, Any],
    file: Path,
    precision: Literal["fp32", "bf16"] | None = None,
    n_outputs: int | None = None,
) -> Network:
    """Make a network from a checkpoint's tensors and metadata.

    `precision` overrides what it was made with, `n_outputs` its number of classes: a probe's
    network keeps the head of its source. Raises CheckpointError if they don't belong together.
    """
    if missing := [name for name in FACTS if name not in meta]:
        raise CheckpointError(f"{file}: holds no network (no {missing[0]!r}); choose another")
    with checkpoint.checked_metadata(file):
        facts = facts_of(meta)
        if precision:
            facts["precision"] = precision
        model = build(facts["backbone"].name, n_outputs or len(facts["classes"]))
        network = Network(fuse(model, facts["precision"]), **facts)
        network.load_state(tensors, file)
    network.model.eval().requires_grad_(False)
    return network.on(device())


def facts_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Take a network's facts from a checkpoint's metadata, in the kinds that Network holds.

    Raises KeyError if one is missing.
    """
    facts = {name: meta[name] for name in FACTS}
    return {**facts, "backbone": backbone_of(meta), "tones": of_facts(dict(meta))}


def refuse_larger(stage: str, image_size: int, packed_size: int) -> None:
    """Raise ParamError where a stage wants more pixels than prepare kept."""
    if image_size > packed_size:
        raise ParamError(
            f"params.yaml: {stage}.image_size = {image_size} is more than prepare.size = "
            f"{packed_size}; raise prepare.size, or lower it"
        )


def refuse_other_classes(
    stage: str, file: Path, classes: Sequence[str], packed: Sequence[str]
) -> None:
    """Raise CheckpointError where what a stage wrote knows other classes than the images have."""
    if list(classes) != list(packed):
        raise CheckpointError(
            f"{file}: its classes {classes} aren't those of the images, {packed}; "
            f"run `dvc repro {stage}`"
        )


def versions() -> dict[str, str]:
    """Give the versions of the libraries that compute, for a checkpoint's metadata."""
    names = ("torch", "torchvision", "timm", "numpy")
    # Without the local part: +cpu and +cu126 say which build, not which version.
    return {name: metadata.version(name).split("+")[0] for name in names}


def eval_batch() -> int:
    """Give how many images go through a network at once where nothing trains."""
    return EVAL_BATCH if device().type == "cpu" else ON_A_GPU


def in_batches(
    n: int, compute: Callable[[NDArray[np.int64]], Arrays], first: int = 0
) -> Iterator[Arrays]:
    """Compute a function of rows for rows `first` to n - 1, in batches of one size.

    The last repeats row n - 1 to be full; what comes of that is left out. Processes that share the
    stage share the batches.
    """
    size = eval_batch()

    def batch(i: int) -> NDArray[np.int64]:
        return np.minimum(np.arange(first + i * size, first + (i + 1) * size), n - 1)

    for i, parts in enumerate(
        all_gather_batches(-(-(n - first) // size), lambda i: compute(batch(i)))
    ):
        yield [part[: n - first - i * size] for part in parts]


def run_in_batches(
    images: Rowwise, network: Network, run: Callable[[Tensor], Sequence[Tensor]], first: int = 0
) -> Iterator[Arrays]:
    """Run a function on images (N, H, W[, 3]) from the `first` on, in inference mode.

    Yields its float32 outputs a batch. It gets them where the network is.
    """
    feed = DeviceImages(images, network.device)

    def outputs(rows: NDArray[np.int64]) -> Arrays:
        with torch.inference_mode():
            return [output.float().cpu().numpy() for output in run(feed(rows))]

    return in_batches(len(images), outputs, first)
