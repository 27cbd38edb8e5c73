"""From the paths a user gives to the files of a domain, each with an id that no other file has."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmsuite.errors import UsageError


@dataclass(frozen=True)
class SourceFile:
    """One file to look at.

    Attributes:
        path: absolute.
        group: a readable id, unique among the files found together: the path below the folder that was given, without
            its suffix. Files of one name in different folders differ in it; where that is not enough (``a.svs`` beside
            ``a.tif``, equal trees under two given folders), the suffix, then the given folder's name, then the whole
            path is added.
        relative: the path below the folder that was given, with forward slashes; the bare name of a file given itself.
        root: the folder that was given, or the folder of the file that was.
        suffix: the end of its name that says what it is, such as ``.nii.gz``, as it is written; may be empty.
    """

    path: Path
    group: str
    relative: str
    root: Path
    suffix: str


def find_files(
    paths: Sequence[str | os.PathLike],
    suffixes: Iterable[str],
    what: str = "usable files",
    also: Callable[[str], bool] | None = None,
) -> list[SourceFile]:
    """Every file with one of the suffixes, folders searched through, in an order that depends on names alone.

    Symbolic links are followed, each folder once; hidden files and folders are left out below a given folder. A file
    given by name is taken whatever its suffix. A file that two of the paths lead to is returned once.

    Args:
        paths: files and folders.
        suffixes: such as ``".svs"`` or ``".nii.gz"``, in any case.
        what: what to call such files in an error message.
        also: says of a file's name whether it is looked for as well: some formats have no suffix.

    Raises:
        UsageError: if no path is given, one does not exist or cannot be listed, or a given folder holds no such file.
    """
    if not paths:
        raise UsageError(f"No path given: name files, or folders that hold {what}.")
    endings = tuple(sorted({suffix.lower() for suffix in suffixes}))
    found: dict[str, tuple[Path, str, Path]] = {}
    for given in paths:
        root = Path(os.path.abspath(os.path.expanduser(given)))
        if root.is_dir():
            inside = [p for p in _walk(root) if p.name.lower().endswith(endings) or (also is not None and also(p.name))]
            if not inside:
                raise UsageError(
                    f"{given}: this folder holds no {what}.", f"Looked for files that end in {', '.join(endings)}."
                )
            for path in inside:
                found.setdefault(os.path.realpath(path), (path, path.relative_to(root).as_posix(), root))
        elif root.is_file():
            found.setdefault(os.path.realpath(root), (root, root.name, root.parent))
        else:
            raise UsageError(f"{given}: there is no such file or folder.", "Check the path.")
    members = list(found.values())
    groups = _unique_ids([(relative, root) for _, relative, root in members], endings)
    return [
        SourceFile(path, group, relative, root, _suffix(relative, endings))
        for (path, relative, root), group in zip(members, groups, strict=True)
    ]


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder, by name, folder after folder."""
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be listed ({error.strerror}).", "Check its permissions.")

    for folder, names, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _unique_ids(members: list[tuple[str, Path]], endings: tuple[str, ...]) -> list[str]:
    """The shortest form for each member that no other member has."""
    forms = [
        (
            relative.removesuffix(_suffix(relative, endings)),
            relative,
            f"{root.name}/{relative}",
            (root / relative).as_posix(),
        )
        for relative, root in members
    ]
    counts = Counter(form for row in forms for form in set(row))
    return [next(form for form in row if counts[form] == 1) if counts[row[0]] > 1 else row[0] for row in forms]


def _suffix(relative: str, endings: tuple[str, ...]) -> str:
    name = Path(relative).name
    fitting = [len(ending) for ending in endings if name.lower().endswith(ending) and len(name) > len(ending)]
    return name[-max(fitting) :] if fitting else Path(relative).suffix
