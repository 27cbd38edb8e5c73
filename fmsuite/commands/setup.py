"""From names and paths on the command line to a domain, a configuration and an index."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import fmsuite.core.objectives  # noqa: F401  (registers the objectives)
from fmsuite.commands.indexing import build_index
from fmsuite.configs import Recipe, load_recipe
from fmsuite.core.config import RunConfig, apply_overrides, parse_run, validate
from fmsuite.core.controls import untrained
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import located
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.encoders import Encoder, load_encoder
from fmsuite.core.objectives.base import find_objective
from fmsuite.domains.base import Domain, Progress, domain_names, load_domain, no_progress
from fmsuite.errors import UsageError


def recipe_folders(domain: str | None = None) -> list[Path]:
    """Recipe folders of installed plugins: of one domain, or of all that can be loaded."""
    folders = []
    for name in [domain] if domain else domain_names():
        try:
            plugin = load_domain(name)
        except UsageError:
            if domain:
                raise
            continue
        if plugin.recipes is not None:
            folders.append(plugin.recipes)
    return folders


def resolve_run(
    domain: str, recipe: str | None = None, objective: str | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The checked configuration of a run.

    Args:
        recipe: name or path; the domain's default if not given.
        objective: another objective than the recipe's, with that objective's default options.
        overrides: ``a.b=value`` items, applied last.

    Raises:
        UsageError: for unknown names and keys, and for a recipe of another domain.
    """
    found = _recipe_of(domain, recipe or load_domain(domain).default_recipe)
    items = [f"objective.name={objective}", *overrides] if objective else list(overrides)
    raw = apply_overrides(found.raw, items)
    return parse(raw, f"recipe {found.name}")


def _recipe_of(domain: str, name: str) -> Recipe:
    plugin = load_domain(domain)
    found = load_recipe(name, [plugin.recipes] if plugin.recipes else [])
    if not found.domain:
        return replace(found, raw={**found.raw, "domain": domain})
    if found.domain != domain:
        raise UsageError(
            f"The recipe '{found.name}' is for --domain {found.domain}, not {domain}.",
            f"`fmsuite list recipes` shows those of {domain}.",
        )
    return found


def parse(raw: dict[str, Any], origin: str) -> RunConfig:
    """A configuration whose domain and objective are installed.

    Raises:
        UsageError: as ``parse_run``.
    """
    section = raw.get("objective")
    name = section.get("name") if isinstance(section, dict) else None
    options = find_objective(name).Config if isinstance(name, str) else None
    domain = raw.get("domain")
    if not isinstance(domain, str) or options is None:
        raise UsageError(f"{origin}: 'domain' and 'objective.name' must both be given.")
    return parse_run(raw, load_domain(domain).Options, options, origin)


def read_run_config(path: Path) -> RunConfig:
    """The ``config.yaml`` of a run folder.

    Raises:
        UsageError: if it is missing or does not fit the installed version.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read ({error}).", "Is this a run folder of `fmsuite pretrain`?") from error
    return parse(raw, str(path))


UNTRAINED = "untrained:"
"""Before the name of an encoder: the same network with fresh weights, a control."""


def open_encoder(what: str, *, channels: Sequence[str] | None = None, pooling: str | None = None) -> Encoder:
    """An encoder, or the untrained control of one (``untrained:WHAT``).

    Raises:
        UsageError, FmsuiteError: as ``load_encoder``.
    """
    trained = load_encoder(what.removeprefix(UNTRAINED), channels=channels, pooling=pooling)
    return untrained(trained) if what.startswith(UNTRAINED) else trained


def parts_of(index: Path) -> Path:
    """Where the finished sources of an index are kept while it is being built."""
    return index.with_name(f".{index.stem}.parts")


def open_domain(name: str, options: BaseModel) -> Domain:
    return load_domain(name)(options)  # type: ignore[arg-type]


def domain_options(
    name: str, overrides: Sequence[str], recipe: str | None = None, encoders: Iterable[Encoder] = ()
) -> BaseModel:
    """A domain's ``data:`` options: a recipe's; without one, those that read files as they were read for the first of
    the encoders that says how; or else the domain's defaults. Then ``data.key=value`` or ``key=value`` overrides.

    Whoever names encoders checks them against the input that comes of it (``Encoder.check_input``): an override, or the
    next encoder, may contradict the first.

    Raises:
        UsageError: for unknown keys and recipes.
    """
    plugin = load_domain(name)
    defaults: dict[str, Any] = {}
    if recipe is not None:
        defaults = _recipe_of(name, recipe).raw.get("data") or {}
    else:
        defaults = options_of_encoders(name, encoders)
    items = [item if item.startswith("data.") else f"data.{item}" for item in overrides]
    raw = apply_overrides({"data": defaults}, items)
    return validate(plugin.Options, raw["data"], "data", "command line")


def options_of_encoders(name: str, encoders: Iterable[Encoder]) -> dict[str, Any]:
    """The ``data:`` options, as plain values, under which a domain reads files as they were read for the first of the
    encoders that says how; none of them if none does."""
    specs = (encoder.spec for encoder in encoders)
    followed = next((spec for spec in specs if spec.reading is not None and spec.reading.domain == name), None)
    return {} if followed is None else load_domain(name).options_like(followed)


def open_index(
    domain: Domain,
    paths: Sequence[Path],
    skipped: SkippedLog,
    progress: Progress = no_progress,
    asked: Collection[str] = (),
    *,
    parts: Path | None = None,
    processes: int | None = 0,
    ray: str | None = None,
) -> tuple[Domain, SampleIndex]:
    """An index from a Parquet file, or made from sources.

    Args:
        asked: names of the options that the user gave; an index made with other values is refused.
        parts, processes, ray: of making it; see ``indexing.build_index``.

    Returns:
        The domain with its own options, except for those that the index records: its windows were made with them.

    Raises:
        UsageError: if the index belongs to another domain, was made with other options, or nothing usable was found.
    """
    own = domain.options.model_dump(mode="json")
    if len(paths) == 1 and paths[0].suffix == ".parquet":
        index = located(SampleIndex.read(paths[0]), paths[0])
        made_for = index.metadata.get("domain")
        if made_for != domain.name:
            raise UsageError(f"{paths[0]}: an index of the domain '{made_for}', not '{domain.name}'.")
        made_with = index.metadata.get("options") or {}
        for key in asked:
            if key in made_with and made_with[key] != own[key]:
                raise UsageError(
                    f"{paths[0]}: this index was made with data.{key}={made_with[key]}, not {own[key]}.",
                    "Leave the option out, or make another index with `fmsuite tile`.",
                )
        options = validate(type(domain).Options, {**own, **made_with}, "data", str(paths[0]))
        domain = type(domain)(options)  # type: ignore[arg-type]
    else:
        index = build_index(domain, paths, skipped, progress, parts=parts, processes=processes, ray=ray)
    if len(index) == 0:
        detail = skipped.summary()
        first = f" First: {skipped.entries[0].path}: {skipped.entries[0].reason}" if skipped.entries else ""
        raise UsageError(f"No usable window in {', '.join(map(str, paths))}. {detail}{first}")
    return domain, index
