"""The final classifier as one ONNX graph, which needs neither PyTorch nor this project to run."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.final_model.classifier import Classifier
from pipeline.final_model.graph import Graph, Inputs
from pipeline.final_model.operating_point import Decision
from pipeline.images.tones import of_facts
from pipeline.nets.batches import EVAL_BATCH
from pipeline.stage_runtime.errors import CheckpointError, one_line

KEY = "pipeline"  # of the graph's metadata


def write(classifier: Classifier, graph: Graph, file: Path) -> None:
    """Write the graph, with the metadata that `Portable` needs."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        program = torch.onnx.export(
            graph,
            (torch.zeros((2, *graph.inputs.shape), dtype=torch.uint8),),
            input_names=["pixels"],
            output_names=["probabilities", "answers"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("n", min=1, max=65536)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    more = {**classifier.decision.facts(), "chosen": classifier.chosen}
    inputs = {name: value for name, value in vars(graph.inputs).items() if name != "tones"}
    facts = {**inputs, **graph.inputs.tones.facts(), **more}
    program.model.metadata_props[KEY] = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    program.save(str(file), external_data=False)


class Portable:
    """A classifier read from ONNX, with the interface of `Classifier`."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own types, for missing and for damaged files
            said = one_line(error, 120)
            raise CheckpointError(f"{file}: can't be read as ONNX ({said})") from None
        found = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if found is None:
            raise CheckpointError(f"{file}: not written by `python -m pipeline export`")
        facts: dict[str, Any] = json.loads(found)
        decision = {key: facts.pop(key, None) for key in ("sure_above", "point")}
        self.decision = Decision.of_facts(decision, len(facts["classes"]))
        self.chosen: str = facts.pop("chosen")
        tones = of_facts(facts)
        self.network = Inputs(**facts, tones=tones)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return calibrated probabilities (N, C) of packed images (N, H, W[, 3])."""
        batches = np.array_split(images, max(1, -(-len(images) // EVAL_BATCH)))
        parts = [
            self.session.run(["probabilities"], {"pixels": np.ascontiguousarray(b)})[0]
            for b in batches
        ]
        return np.concatenate(parts).astype(np.float64)
