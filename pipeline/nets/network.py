"""A classifier with everything that is needed to use it: network, classes, size, normalisation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images.shards import Facts
from pipeline.images.tones import PLAIN, Tones, of_facts
from pipeline.nets import checkpoint
from pipeline.nets.automatic import input_size
from pipeline.nets.backbone import Backbone, backbone_of, build, head_name
from pipeline.nets.blocks import trace
from pipeline.nets.device import device, device_of
from pipeline.nets.fuse import NUMBER_FORMATS, fuse
from pipeline.nets.normalise import normalised, shrunk
from pipeline.stage_runtime.errors import CheckpointError
from pipeline.stage_runtime.schema import Auto


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
    tones: Tones = PLAIN  # how images with more bits become 8 bits, and transparent ones opaque

    def take(self, image_size: int) -> None:
        """Set the input size; raises ParamError if the network can't take such images."""
        trace(self.model, image_size)
        self.image_size = image_size

    @property
    def n_outputs(self) -> int:
        """Return the number of logits: the classes, or for a probe's network its source's."""
        head = self.model.get_submodule(head_name(self.model))
        assert isinstance(head, nn.Linear)
        return head.out_features

    @property
    def device(self) -> torch.device:
        """Return the network's device."""
        return device_of(self.model)

    def on(self, device: torch.device) -> "Network":
        """Move the network to a device and return it."""
        self.model.to(device)
        return self

    def facts(self) -> dict[str, Any]:
        """Return everything except the weights, for a checkpoint's metadata."""
        apart = ("model", "tones")
        facts = {name: value for name, value in vars(self).items() if name not in apart}
        return {**facts, "backbone": self.backbone.facts(), **self.tones.facts()}

    def save(self, file: Path, **more: Any) -> None:
        """Write the checkpoint; `more` is added to the metadata."""
        tensors = {
            name: t.detach().contiguous().cpu().numpy()
            for name, t in self.model.state_dict().items()
        }
        weights = {"weights_sha256": checkpoint.digest(tensors)}
        checkpoint.write(file, tensors, {**self.facts(), **weights, **more})

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn uint8 or 0..255 pixels (B, H, W) or (B, H, W, 3) into the input (B, 3, h, w)."""
        dtype = NUMBER_FORMATS[self.precision]
        return normalised(self.shrink(pixels), self.backbone.mean, self.backbone.std, dtype)

    def shrink(self, pixels: Tensor) -> Tensor:
        """Resize larger pixels (B, H, W) or (B, H, W, 3) to the network's input size."""
        return shrunk(pixels, self.image_size, self.backbone.interpolation)

    def load_state(self, tensors: dict[str, NDArray[Any]], where: Path) -> None:
        """Load weights strictly.

        Raises CheckpointError if a tensor is missing, unexpected or of another shape.
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


def for_images(
    model: nn.Module,
    backbone: Backbone,
    packed: Facts,
    image_size: int | Auto,
    precision: Literal["fp32", "bf16"],
    of: float = 1.0,
) -> Network:
    """Make a network for packed images from a model, on this process's device.

    An `image_size` of auto is a share `of` the size that the network is made for. Raises ParamError
    if the network can't take images of this size.
    """
    size = input_size(model, image_size, packed.size, of)
    trace(model, size)
    facts = (packed.classes, size, packed.size, packed.fit, packed.channels)
    fused = fuse(model, precision)
    return Network(fused, backbone, *facts, precision, packed.tones).on(device())


def from_facts(model: nn.Module, facts: dict[str, Any]) -> Network:
    """Make a network from a model and another network's facts, on this process's device."""
    return Network(fuse(model, facts["precision"]), **facts).on(device())


def load(
    file: Path, precision: Literal["fp32", "bf16"] | None = None
) -> tuple[Network, dict[str, Any]]:
    """Build the network of a checkpoint and load its weights strictly.

    Returns the network and the checkpoint's metadata. Raises CheckpointError if it can't be loaded.
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

    `precision` overrides the checkpoint's precision. `n_outputs` overrides its number of classes,
    as a probe's network keeps the head of its source. Raises CheckpointError if tensors and
    metadata don't match.
    """
    if missing := [name for name in FACTS if name not in meta]:
        raise CheckpointError(f"{file}: holds no network (no {missing[0]!r}); choose another file")
    with checkpoint.checked_metadata(file):
        facts = facts_of(meta)
        if precision:
            facts["precision"] = precision
        model = build(facts["backbone"].name, n_outputs or len(facts["classes"]))
        network = from_facts(model, facts)
        network.load_state(tensors, file)
    network.model.eval().requires_grad_(False)
    return network


def facts_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Return a network's facts from a checkpoint's metadata, in the types of Network's fields.

    Raises KeyError if one is missing.
    """
    facts = {name: meta[name] for name in FACTS}
    return {**facts, "backbone": backbone_of(meta), "tones": of_facts(dict(meta))}
