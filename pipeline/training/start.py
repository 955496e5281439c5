"""The network that training starts from: pretrained, its new head set from the probe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.images.shards import Facts
from pipeline.nets.backbone import backbone_of, head_name, rebuild, set_head
from pipeline.nets.blocks import match, trace, trained_with
from pipeline.nets.checkpoint import refuse_other_classes
from pipeline.nets.network import Network, for_images
from pipeline.probing.probes import head_of, read_probes
from pipeline.training.freeze import everything


def start_network(
    file: Path,
    packed: Facts,
    image_size: int,
    head_init: Literal["probe", "random"],
    precision: Literal["fp32", "bf16"],
) -> tuple[Network, dict[str, Any]]:
    """Build the pretrained network that made the codes, with a head for the classes at hand.

    The head is the linear probe of `file`, so that its logits are the probe's before any step
    (LP-FT, Kumar et al. 2022, arXiv 2202.10054), or drawn at random. It is always drawn where there
    are no pretrained weights: a probe on such codes has weights that no training gets over.

    Returns it with the probe's metadata. Raises CheckpointError where that knows other classes,
    ParamError where the network can't take images of this size.
    """
    _, linear, meta = read_probes(file)
    backbone = backbone_of(meta)
    refuse_other_classes("probe", file, meta["classes"], packed.classes)
    model = rebuild(backbone)
    trace(model, image_size)
    set_head(model, len(packed.classes))
    if head_init == "probe" and backbone.weights != "none":
        weight, bias = head_of(linear)
        head = model.get_submodule(head_name(model))
        head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return for_images(model, backbone, packed, image_size, precision), meta


def what_trains(network: Network, unfreeze: Sequence[str]) -> list[str]:
    """List the modules that stage 1 trains: the unfrozen ones and the head.

    Without pretrained weights there is nothing worth freezing: all of them then.
    """
    named = trained_with(network.model, match(network.model, unfreeze, "stage1.unfreeze"))
    return everything(network.model) if network.backbone.weights == "none" else named
