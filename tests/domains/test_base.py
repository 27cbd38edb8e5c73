from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fmsuite.commands.cohort import units_of
from fmsuite.core import plugins
from fmsuite.domains.base import Units, domain_names, load_domain
from fmsuite.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
BUILT_IN = ("medical", "pathology", "remote_sensing", "svg")
LIBRARIES = {
    "pathology": ("openslide", "tifffile"),
    "medical": ("monai", "nibabel"),
    "remote_sensing": ("rasterio",),
    "svg": ("cairosvg",),
}
HEAVY = ("openslide", "monai", "rasterio", "cairosvg", "albumentations", "pandas", "nibabel")


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    script = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_built_in_domains_are_found_without_importing_them() -> None:
    assert set(BUILT_IN) <= set(domain_names())


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'pathology'") as caught:
        load_domain("patology")
    for name in BUILT_IN:
        assert name in str(caught.value)


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(UsageError, match="There is no domain 'zzz'") as caught:
        load_domain("zzz")
    assert "Did you mean" not in str(caught.value)
    assert "svg" in str(caught.value)


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("pathology", ("tile", "slide", "patient")),
        ("medical", ("window", "image", "patient")),
        ("remote_sensing", ("window", "raster", "scene")),
        ("svg", ("drawing", "drawing", "group")),
    ],
)
def test_each_domain_calls_things_by_its_own_words(domain: str, words: tuple[str, str, str]) -> None:
    units = load_domain(domain).units

    assert (units.window, units.of("source"), units.of("group")) == words
    assert units.of("folder") == "folder"


def test_a_domain_that_is_not_installed_leaves_general_words() -> None:
    assert units_of("nowhere") == Units("window", "source", "group")


@pytest.fixture
def broken_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The only installed domain, ``remote_sensing``; its module imports a library that is not there."""
    (tmp_path / "plugin_in_need.py").write_text("import a_library_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("remote_sensing", "plugin_in_need:Domain", plugins.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    return entry.name


def test_a_missing_library_is_answered_with_the_extra_to_install(broken_plugin: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_domain(broken_plugin)
    assert "a_library_that_nobody_has" in str(caught.value)
    assert "pip install 'fmsuite[remote-sensing]'" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_domain_imports_its_own_libraries_and_no_other_domain(name: str) -> None:
    modules = imported_by(
        f"from fmsuite.domains.base import load_domain\nassert load_domain({name!r}).name == {name!r}"
    )
    packages = {module.split(".")[2] for module in modules if module.startswith("fmsuite.domains.")}
    assert packages == {"base", name}
    foreign = {library for other in BUILT_IN if other != name for library in LIBRARIES[other]} - set(LIBRARIES[name])
    assert not modules & foreign


@pytest.mark.slow
def test_the_core_imports_no_domain_library() -> None:
    statement = (
        "import pkgutil, importlib, fmsuite, fmsuite.core\n"
        "names = [m.name for m in pkgutil.walk_packages(fmsuite.core.__path__, 'fmsuite.core.')]\n"
        "for name in names:\n    importlib.import_module(name)\n"
        "import fmsuite.domains.base\nassert len(names) > 20"
    )
    modules = imported_by(statement)
    assert {module for module in modules if module.startswith("fmsuite.domains.")} == {"fmsuite.domains.base"}
    assert not modules & set(HEAVY)


def test_every_domain_that_the_project_declares_can_be_loaded() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    domains = declared[plugins.ENTRY_POINT_GROUP]
    assert set(domains) == set(BUILT_IN)
    for name, target in domains.items():
        assert EntryPoint(name, target, plugins.ENTRY_POINT_GROUP).load().name == name
