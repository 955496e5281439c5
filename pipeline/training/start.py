"""The network that training starts from: pretrained, with a new head from the probe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.images.shards import Facts
from pipeline.nets.automatic import STAGE_1_AT, top_blocks
from pipeline.nets.backbone import backbone_of, build, head_name, rebuild, set_head
from pipeline.nets.blocks import match, trained_with
from pipeline.nets.checkpoint import refuse_other_classes
from pipeline.nets.network import Network, for_images
from pipeline.probing.probes import head_of, read_probes
from pipeline.stage_runtime.schema import Auto
from pipeline.training.freeze import everything


def start_network(
    file: Path,
    packed: Facts,
    image_size: int | Auto,
    head_init: Literal["probe", "random"],
    precision: Literal["fp32", "bf16"],
) -> tuple[Network, dict[str, Any]]:
    """Build the pretrained network that computed the codes, with a head for the images' classes.

    The head is the linear probe of `file`, so that the initial logits are the probe's (LP-FT, Kumar
    et al. 2022, arXiv 2202.10054), or it is random. Without pretrained weights it is always random,
    because a probe on such codes has weights that training can't recover from.

    Returns the network and the probe's metadata. Raises CheckpointError if the probe has other
    classes, and ParamError if the network can't take images of this size.
    """
    _, linear, meta = read_probes(file)
    backbone = backbone_of(meta)
    refuse_other_classes("probe", file, meta["classes"], packed.classes)
    model = rebuild(backbone)
    set_head(model, len(packed.classes))
    if head_init == "probe" and backbone.weights != "none":
        weight, bias = head_of(linear)
        head = model.get_submodule(head_name(model))
        head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return for_images(model, backbone, packed, image_size, precision, STAGE_1_AT), meta


def what_trains(network: Network, unfreeze: Sequence[str] | Auto) -> list[str]:
    """Return the modules that stage 1 trains: the unfrozen ones and the head.

    Without pretrained weights nothing is worth freezing, so all modules train.
    """
    if unfreeze == "auto":
        with torch.random.fork_rng(devices=[]):  # weights are drawn, and don't matter
            unfused = build(network.backbone.name, network.n_outputs).requires_grad_(False)
        unfreeze = top_blocks(unfused)
    named = trained_with(network.model, match(network.model, unfreeze, "stage1.unfreeze"))
    return everything(network.model) if network.backbone.weights == "none" else named
