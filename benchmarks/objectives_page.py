"""``docs/objectives.md``: what each objective's card says, and what ``objectives.py`` measured. No number is typed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import fmsuite.core.objectives  # noqa: F401  (registers the objectives)
from fmsuite.core.objectives.base import OBJECTIVES, Objective

FAMILIES = {
    "pixels": "Pixels and hand-made targets",
    "tokens": "Learned targets",
    "embedding": "Joint embedding",
    "predictive": "Prediction of features",
    "pairs": "Pairs",
}

HEAD = """# Objectives

<!-- Written by benchmarks/objectives.py from the objectives' cards and from what it measured; edit those. -->

Each is chosen with `--objective NAME` in every domain whose inputs it fits, with defaults that are its paper's; the
recipe of the same name holds the paper's model and schedule as well (`fmsuite pretrain --domain D --recipe NAME`).
Every option is documented in the objective's own file in `fmsuite/core/objectives/`.

**Cost** is the CPU time of one training step relative to MAE's, on one network and batch (below), reading and
augmentation included. **Checked against** says what the numbers were held against, besides what every objective is
tested for: 2D, many channels in groups, 3D and time series; invalid pixels; saving and restoring.
"""

PATTERNS = (
    (
        "`random`",
        "places drawn one by one; on `(time, y, x)` or `(z, y, x)` the spacetime-agnostic masking of MAE-ST",
        "He et al. 2021; Feichtenhofer et al. 2022",
    ),
    ("`block`", "boxes", "Bao et al. 2021"),
    ("`inverse_block`", "all but one box, moved round the edges", "Darcet et al. 2025 (CAPI)"),
    ("`tube`", "places drawn on one frame, repeated over time", "Tong et al. 2022"),
    (
        "`group`",
        "the same number in every channel group, each with a pattern of its own",
        "Cong et al. 2022 (SatMAE)",
    ),
    (
        "`noise`",
        "where filtered noise is high (`mask_noise`: red, green, blue, purple)",
        "Hinojosa et al. 2024 (ColorMAE)",
    ),
    (
        "`attention_high`, `attention_hint`, `attention_low`",
        "what the teacher attends to most, the same with a few hints left, or least",
        "Kakogeorgiou et al. 2022 (AttMask)",
    ),
)

MASKS = f"""
## Masks

Objectives with `masking`, `mask_ratio` and `alike` take any of these patterns; each hides an exact number of places.
`alike: [time]` or `[group]` repeats a pattern along those axes. I-JEPA and V-JEPA draw several blocks a view; MultiMAE
draws a pattern in each channel group, whose shares of the visible places are those of a Dirichlet distribution.

| `masking` | what | paper |
|---|---|---|
{chr(10).join(f"| {name} | {what} | {paper} |" for name, what, paper in PATTERNS)}
"""


def write_page(record: dict[str, Any], path: Path) -> None:
    path.write_text(page(record), encoding="utf-8")


def page(record: dict[str, Any]) -> str:
    """The whole page of a record of ``objectives.py``."""
    parts = [HEAD]
    own = {name: cls for name, cls in OBJECTIVES.items() if cls.__module__.startswith("fmsuite.")}
    for family, title in FAMILIES.items():
        members = sorted(name for name, cls in own.items() if cls.card is not None and cls.card.family == family)
        if members:
            parts.append(f"\n## {title}\n\n{_family(members, own, record)}")
    return "".join([*parts, MASKS, _measured(record)])


def _family(names: list[str], own: dict[str, type[Objective]], record: dict[str, Any]) -> str:
    lines = ["| objective | paper | predicts | masked | cost | checked against |", "|---|---|---|---|---|---|"]
    for name in names:
        card = own[name].card
        assert card is not None
        lines.append(
            f"| `{name}` | {card.paper} | {card.predicts} | {card.masks} | {_cost(name, record)} | {card.checked} |"
        )
    return "\n".join(lines) + "\n"


def _cost(name: str, record: dict[str, Any]) -> str:
    costs = record["costs"]
    return f"{costs[name]['seconds'] / costs['mae']['seconds']:.1f}" if name in costs else "–"


def _measured(record: dict[str, Any]) -> str:
    settings = record["settings"]
    model, seeds = settings["model"], record["seeds"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for key, found in sorted(record["runs"].items()):
        runs.setdefault(key.rpartition("/")[0], []).append(found)
    rows = []
    for pooling in ("mean", "cls"):
        fresh = [found[f"untrained_{pooling}"] for found in runs.get("mae", []) if f"untrained_{pooling}" in found]
        if fresh:
            rows.append(("untrained", pooling, 0, fresh))
    for name, found in runs.items():
        rows.append((f"`{name}`", found[0]["pooling"], found[0]["steps"], found))
    rows.sort(key=lambda row: -statistics.mean(each["linear"] for each in row[3]))
    mae_seconds = settings["mae_steps"] * record["costs"]["mae"]["seconds"]
    lines = [
        "\n## Side by side, on a small budget\n",
        "```",
        f"python benchmarks/objectives.py --data {record['data']}",
        "```\n",
        f"Data: {record['windows']} windows of `{record['data']}`, trained on its training side without labels (but "
        "for PAWS, which needs some) and judged on the other; no group is on both. "
        f"Network: {model['depth']} blocks of width {model['width']}, patches of {model['patch_size']} px, "
        f"{model['input_size']} px. Every objective had the same learning rate and schedule, none was tuned, and each "
        f"took the steps that cost the CPU time of {settings['mae_steps']} steps of MAE ({mae_seconds:.0f} s of one "
        f"thread; {record['machine']}). Balanced accuracy of 20-NN and of a linear probe on frozen features, mean and "
        f"standard deviation of {seeds} seeds; `features` is the objective's own convention. Sizes of all heads are "
        "in `benchmarks/objectives.yaml`.\n",
        "What this shows is how the objectives behave on the budget of a laptop and on tiles whose colour tells much; "
        "papers train a thousand times longer, where the order is another. Teachers and tokenizers that an objective "
        "needs from outside are random networks here: those rows show the mechanism, not its worth.\n",
        "| objective | features | steps | 20-NN | linear |",
        "|---|---|---|---|---|",
    ]
    for title, pooling, steps, found in rows:
        lines.append(f"| {title} | {pooling} | {steps} | {_spread(found, 'knn')} | {_spread(found, 'linear')} |")
    refused = record.get("refused", {})
    if refused:
        reasons = "; ".join(f"`{name}`: {reason.rstrip('.')}" for name, reason in sorted(refused.items()))
        lines.append(f"\nNot in the table, because they do not fit this data: {reasons}.")
    return "\n".join(lines) + "\n"


def _spread(found: list[dict[str, Any]], key: str) -> str:
    values = [each[key] for each in found]
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
