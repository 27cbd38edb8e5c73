"""``fmsuite list``: what there is to choose from."""

from __future__ import annotations

import inspect

import fmsuite.core.objectives  # noqa: F401  (registers the objectives)
from fmsuite.commands.bench_jobs import FEWSHOT, FEWSHOT_METHOD
from fmsuite.commands.setup import recipe_folders
from fmsuite.configs import recipes
from fmsuite.core.backbones.config import VIT_SIZES
from fmsuite.core.evaluation.classifiers import CLASSIFIERS
from fmsuite.core.evaluation.findings import FINDINGS_TASKS
from fmsuite.core.evaluation.numbers import CONSTANT, NUMBER_TASKS
from fmsuite.core.evaluation.retrieval import RETRIEVAL
from fmsuite.core.evaluation.retrieval import TITLE as RETRIEVAL_TITLE
from fmsuite.core.evaluation.tiles import TASKS
from fmsuite.core.objectives.base import OBJECTIVES, Objective
from fmsuite.domains.base import domain_names, load_domain
from fmsuite.domains.remote_sensing.sensors import SENSORS
from fmsuite.errors import UsageError, nearest

Row = tuple[str, ...]


def catalogue(what: str) -> tuple[Row, list[Row]]:
    """Headings and rows.

    Args:
        what: ``recipes``, ``objectives``, ``models``, ``domains``, ``sensors`` (remote sensing), ``methods``
            (few-shot classification) or ``tasks`` (benchmarks).

    Raises:
        UsageError: for anything else.
    """
    tables = {
        "recipes": _recipes,
        "objectives": _objectives,
        "models": _models,
        "domains": _domains,
        "sensors": _sensors,
        "methods": _methods,
        "tasks": _tasks,
    }
    if what not in tables:
        raise UsageError(f"Cannot list '{what}'.", nearest(what, tables))
    return tables[what]()


def _recipes() -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for recipe in recipes(recipe_folders()).values():
        objective = (recipe.raw.get("objective") or {}).get("name", "")
        model = (recipe.raw.get("model") or {}).get("name", "")
        rows.append((recipe.name, recipe.domain or "any", objective, model, recipe.description))
    return ("recipe", "domain", "objective", "model", "what it is"), sorted(rows, key=lambda row: (row[1], row[0]))


def _objectives() -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for name, objective in sorted(OBJECTIVES.items()):
        what = (inspect.getdoc(objective) or "").split("\n\n")[0].replace("\n", " ")
        rows.append((name, what, ", ".join(_needs(objective))))
    return ("objective", "what it is", "needs"), rows


def _needs(objective: type[Objective]) -> list[str]:
    """What a user has to give beside the images."""
    options = objective.Config.model_fields.items()
    needs = [f"objective.{key}" for key, field in options if field.is_required()]
    if objective.needs_pairs:
        needs.append("--pairs")
    if objective.support_request is not Objective.support_request:
        needs.append("labels")
    return needs


def _models() -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for name, size in VIT_SIZES.items():
        parameters = size.depth * size.width**2 * (4 + 2 * size.mlp_ratio) / 1e6
        rows.append((name, str(size.width), str(size.depth), str(size.heads), f"{parameters:.0f} M"))
    rows.append(("swin_unetr", "768", "8", "3", "8 M (MONAI's encoder; masks tokens, drops none)"))
    rows.append(("timm:NAME", "", "", "", "any timm model as it is (2D; no token dropping or masking)"))
    return ("model", "width", "depth", "heads", "parameters in the blocks"), rows


def _domains() -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for name in domain_names():
        try:
            domain = load_domain(name)
            rows.append((name, domain.default_recipe, domain.title))
        except UsageError as error:
            rows.append((name, "", str(error)))
    return ("domain", "default recipe", "what it is"), rows


def _sensors() -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for name, sensor in SENSORS.items():
        rows.append((name, " ".join(sensor.band_names) or "those of the file", sensor.title))
    return ("sensor", "bands", "what it is"), rows


def _methods() -> tuple[Row, list[Row]]:
    return ("method", "what it is"), [(name, classifier.title) for name, classifier in CLASSIFIERS.items()]


def _tasks() -> tuple[Row, list[Row]]:
    rows: list[Row] = [(name, task.title) for name, task in TASKS.items()]
    rows.append((RETRIEVAL, RETRIEVAL_TITLE))
    rows.append((FEWSHOT, f"Few-shot curves: {CLASSIFIERS[FEWSHOT_METHOD].title}"))
    rows += [(f"{name} (--regress)", task.title) for name, task in NUMBER_TASKS.items() if name != CONSTANT]
    rows += [(f"{name} (--findings)", task.title) for name, task in FINDINGS_TASKS.items()]
    return ("task", "what it is"), rows
