"""What ``bench`` and ``fewshot`` share: names of encoders, how to repeat it, and the folder that they leave."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from fmsuite.commands.setup import UNTRAINED
from fmsuite.core.backbones.timm_backbone import PREFIX
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.core.encoders import HUB, WEIGHTS
from fmsuite.core.evaluation.result_files import RESULTS
from fmsuite.core.evaluation.results import Facts, Results
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.core.store_root import read_facts
from fmsuite.core.training.run_folder import RunFolder
from fmsuite.core.versions import package_versions
from fmsuite.errors import UsageError

Kind = Literal["bench", "fewshot"]

_PACKAGES = ("fmsuite", "torch", "timm", "numpy", "scipy", "scikit-learn", "zarr", "pyarrow", "pydantic")
_WEIGHT_SUFFIXES = (".safetensors", ".zarr", ".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True)
class Compared:
    """What a comparison left.

    Attributes:
        out: the folder.
        results: what stands in its ``results.json``.
        skipped: one sentence on what could not be used; empty if everything was.
    """

    out: Path
    results: Results
    skipped: str


@dataclass(frozen=True)
class Start:
    """When a comparison began; made first thing."""

    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    clock: float = field(default_factory=time.monotonic)

    def facts(
        self,
        command: Sequence[str],
        seed: int,
        index_hash: str,
        inputs: Mapping[str, str] | None = None,
        normalisations: Mapping[str, str] | None = None,
    ) -> Facts:
        """How to repeat what was begun here and ends now.

        Args:
            command: the command line; this process's own if empty.
            index_hash: ``SampleIndex.hash`` of the windows; several are joined with a comma.
            inputs: path as given to a hash, of stores, labels and the like.
            normalisations: by encoder one sentence.
        """
        return Facts(
            command=list(command) or list(sys.argv),
            started=self.at,
            seconds=round(time.monotonic() - self.clock, 3),
            seed=seed,
            versions=package_versions(_PACKAGES),
            python=platform.python_version(),
            platform=platform.platform(),
            index_hash=index_hash,
            inputs=dict(inputs or {}),
            normalisations=dict(normalisations or {}),
        )


def short_names(given: Sequence[str | os.PathLike]) -> list[str]:
    """A unique name for each encoder or store, as short as its neighbours allow.

    A path gives its last part without a suffix (a run's weight file that of its folder), with as many folders before
    it as tell it from the others; ``timm:NAME@FILE`` gives ``NAME``, or ``NAME@FILE``'s last part; what is given
    twice is numbered.
    """
    forms = [_forms(str(what)) for what in given]
    lengths = [0] * len(forms)
    while True:
        names = [form[length] for form, length in zip(forms, lengths, strict=True)]
        counts = Counter(names)
        longer = [n for n, name in enumerate(names) if counts[name] > 1 and lengths[n] + 1 < len(forms[n])]
        if not longer:
            return _numbered(names)
        for n in longer:
            lengths[n] += 1


def class_order(label: str) -> tuple[float, str]:
    """Sorts classes: grades by number, names by letter; quadratic kappa takes the order of the classes for one."""
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    return number if math.isfinite(number) else math.inf, label


def file_name(name: str) -> str:
    """An encoder's name as the name of a file: what file systems do not take becomes a hyphen."""
    return re.sub(r"[^\w.+@=-]+", "-", name).strip("-.") or "encoder"


def open_out(out: Path, kind: Kind, strict: bool, keep_skipped: bool = False) -> SkippedLog:
    """The log of what is skipped, in a folder that may hold results of the same kind (they will be replaced).

    Args:
        keep_skipped: go on with the folder's ``skipped.csv``, because what it names was not used again.

    Raises:
        UsageError: if ``out`` is a file or a feature store, or holds a pretraining run or results of the other kind.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: this is a file.", "Choose another folder with --out.")
    run = RunFolder(out)
    if run.facts_path.exists() or run.metrics_path.exists():
        raise UsageError(f"{out}: this is the folder of a pretraining run.", "Choose another folder with --out.")
    if read_facts(out) is not None:
        raise UsageError(f"{out}: this is a feature store.", "Choose another folder with --out.")
    if (out / RESULTS).exists():
        before = _kind_of(out / RESULTS)
        if before != kind:
            raise UsageError(
                f"{out}: this folder holds results of `fmsuite {before}`.", "Choose another folder with --out."
            )
    log = out / FILE_NAME
    if not keep_skipped:
        log.unlink(missing_ok=True)
    return SkippedLog(log, strict)


def _kind_of(results: Path) -> str:
    """By which command results were made, whatever else is wrong with them: they are about to be replaced.

    Raises:
        UsageError: if they do not say so.
    """
    try:
        found = json.loads(results.read_text(encoding="utf-8"))["kind"]
        if found in get_args(Kind):
            return str(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{results}: damaged, or of another program.", "Remove it, or choose another folder with --out.")


def leave(out: Path, results: Results, exhibits: Exhibits, skipped: SkippedLog) -> Compared:
    """Write the pictures, then the results that go with them."""
    exhibits.write(out)
    results.write(out)
    return Compared(out, results, skipped.summary())


def _forms(what: str) -> list[str]:
    """Names from short to long."""
    if what.startswith(UNTRAINED):
        return [f"{form} untrained" for form in _forms(what.removeprefix(UNTRAINED))]
    if what.startswith(PREFIX):
        name, _, file = what.removeprefix(PREFIX).partition("@")
        return [name, *(f"{name}@{form}" for form in _path_forms(file))] if file else [name]
    if what.startswith(HUB):
        owner, _, name = what.removeprefix(HUB).rpartition("/")
        return [name, f"{owner}/{name}"]
    return _path_forms(what)


def _path_forms(text: str) -> list[str]:
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.name == WEIGHTS:
        path = path.parent
    while path.suffix in _WEIGHT_SUFFIXES:
        path = path.with_suffix("")
    parts = [part for part in path.parts if part != path.anchor] or ["encoder"]
    return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _numbered(names: Sequence[str]) -> list[str]:
    taken: set[str] = set()
    unique = []
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name} ({number})"
        taken.add(candidate)
        unique.append(candidate)
    return unique
