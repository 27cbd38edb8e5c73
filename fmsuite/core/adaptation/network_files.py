"""A fine-tuned network as files: backbone, head or decoder, and everything that its input has to be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

import fmsuite
from fmsuite.core.adaptation.adapters import adapted_layers
from fmsuite.core.adaptation.lora import fold_lora
from fmsuite.core.adaptation.task import TASKS, Task
from fmsuite.core.adaptation.tuning import TuningOptions
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.weights import read_checkpoint
from fmsuite.core.encoders import _model_options, save_encoder
from fmsuite.core.inputs import InputSpec
from fmsuite.core.weight_files import METADATA_KEY, contiguous, write_weights
from fmsuite.errors import FmsuiteError, UsageError

WEIGHTS = "network.safetensors"
DESCRIPTION = "network.json"
FORMAT = 1


@dataclass(frozen=True)
class Network:
    """
    Attributes:
        task: in evaluation mode, on the CPU.
        spec: of its input, with the normalisation that it was trained with.
        classes: names: of a segmentation the background included, of a regression those of the numbers.
        domain, data: the field and its ``data:`` options, as JSON values.
        provenance: where it came from, JSON values.
    """

    task: Task
    spec: InputSpec
    classes: tuple[str, ...]
    domain: str
    data: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)


def save_network(
    folder: Path,
    task: Task,
    spec: InputSpec,
    classes: Sequence[str],
    domain: str,
    data: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> list[str]:
    """Write ``network.safetensors`` and ``network.json``, and the backbone alone as an encoder
    (``encoder.safetensors``), where it can be one. Low-rank adapters are folded into the weights, in place.

    Args:
        task: on any device.
        spec: of the input.
        classes, domain, data, provenance: see ``Network``.

    Returns:
        What could not be written, in sentences.

    Raises:
        FmsuiteError: if the files cannot be written.
    """
    fold_lora(task.backbone)
    options = task.config.model_dump(mode="json")
    options["scratch"] = False
    # The model's own description holds its windows.
    for key in TuningOptions.model_fields:
        if key == "attention" or key.startswith("rvsa_"):
            options[key] = TuningOptions.model_fields[key].default
    if options["tune"] != "adapters":
        # Nothing else changes what there is; how it was trained stands in the provenance.
        options["tune"] = "full"
        for key in TuningOptions.model_fields:
            if key.startswith("lora_") or key == "last_blocks":
                options[key] = TuningOptions.model_fields[key].default
    described = {
        "format": FORMAT,
        "task": task.name,
        "options": options,
        "classes": list(classes),
        "model": _model_options(task.backbone),
        "input": spec.model_dump(mode="json"),
        "domain": domain,
        "data": dict(data),
        "provenance": {"fmsuite": fmsuite.__version__, "tune": task.config.tune, **provenance},
    }
    notes = []
    if adapted_layers(task.backbone):
        notes.append("Bottleneck adapters are no part of a plain encoder, so none was exported; the network was.")
    else:
        save_encoder(folder, task.backbone, spec, task.pooling, provenance)
    write_weights(folder / WEIGHTS, folder / DESCRIPTION, contiguous(task.state_dict()), described)
    return notes


def load_network(folder: str | Path) -> Network:
    """Open what ``save_network`` wrote.

    Raises:
        UsageError: if there is none.
        FmsuiteError: if a file is damaged, or of a newer version.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        inside = sorted(str(found.parent) for found in Path(folder).glob(f"**/{WEIGHTS}"))
        raise UsageError(
            f"{folder}: holds no {WEIGHTS}.",
            f"Name one of the runs in it: {', '.join(inside[:4])}." if inside else "Make one with `fmsuite finetune`.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[METADATA_KEY])
        if described["format"] > FORMAT:
            raise FmsuiteError(f"{path}: has format {described['format']}; this version reads {FORMAT}.", "Upgrade.")
        spec = InputSpec.model_validate(described["input"])
        kind = TASKS[described["task"]]
        options = kind.Config.model_validate(described["options"])
        model = ModelConfig.model_validate(described["model"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise FmsuiteError(f"{path}: not a network of `fmsuite finetune` ({error}).") from error
    task = kind(options, build_backbone(model, spec))  # type: ignore[arg-type]
    try:
        task.load_state_dict(read_checkpoint(path))
    except RuntimeError as error:
        raise FmsuiteError(f"{path}: the weights do not fit their description: {error}.") from error
    task.eval().requires_grad_(False)
    return Network(
        task, spec, tuple(described["classes"]), described["domain"], described["data"], described["provenance"]
    )
