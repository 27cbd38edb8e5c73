"""Embedding an index: fixed batches over groups, the same bytes however often it is interrupted, memory that stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.sample import ArraySample, View
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.embedding import embed, store_facts
from fmsuite.core.embedding_plan import batch_edges
from fmsuite.core.encoders import Encoder
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.errors import FmsuiteError, ReadFailure

SPEC = InputSpec(axes=("y", "x"), size=(4, 4), channels=(Channel(name="a"), Channel(name="b")))
COUNTS = (5, 1, 9, 2, 2, 12, 3)
BATCH = 4
SIZES = [4, 1, 1, 4, 4, 1, 4, 4, 4, 4, 3]
"""Of the batches: 5, 9 and 12 windows are cut up, 2 and 2 share one."""
EDGES = [0, *accumulate(SIZES)]
DIM = 32


def index_of(counts: Iterable[int] = COUNTS) -> SampleIndex:
    """Sources of so many windows, a window of each in turn: groups are not runs of rows."""
    left = list(counts)
    windows = []
    while any(left):
        for number, count in enumerate(left):
            if count:
                left[number] -= 1
                windows.append(Window(f"/s{number}", "g", (float(left[number]), 0.0), (4.0, 4.0)))
    return SampleIndex.from_windows(windows, {"domain": "none"})


@dataclass
class Reader:
    """Noise that its place decides.

    Attributes:
        broken: sources, or (source, position), that cannot be read.
        deadly: a source whose reading ends the process.
        nan: a source that holds NaN.
    """

    broken: set = field(default_factory=set)
    deadly: str = ""
    nan: str = ""

    def read(self, window: Window) -> ArraySample:
        if window.source == self.deadly:
            os._exit(7)
        if window.source in self.broken or (window.source, window.position[0]) in self.broken:
            raise ReadFailure(window.source, "read", "damaged", "Mend it.")
        values = np.random.default_rng([int(window.source[2:]), int(window.position[0])]).random((2, 8, 8))
        if window.source == self.nan:
            values[:] = np.nan
        return ArraySample(values.astype(np.float32))


class Mixing:
    """An embedder whose every vector depends on its whole batch, and on its place in it."""

    identity = "mixing"
    dim = DIM
    pooling = "none"
    normalisation = "nothing"
    spec = SPEC
    provenance: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, stop_at: int = -1) -> None:
        self.sizes: list[int] = []
        self.stop_at = stop_at

    def to(self, device: torch.device) -> None:
        pass

    def embed(self, view: View) -> Tensor:
        if len(self.sizes) == self.stop_at:
            raise KeyboardInterrupt
        self.sizes.append(len(view))
        flat = view.pixels.flatten(1)
        assert flat.shape[1] == DIM
        return torch.cumsum(torch.sin(flat) + flat.mean(0) * 3, 0)


def run(
    path: Path,
    index: SampleIndex,
    embedder: Any = None,
    reader: Reader | None = None,
    skipped: SkippedLog | None = None,
    **options: Any,
) -> FeatureStore:
    embedder = embedder or Mixing()
    facts = store_facts(embedder, index, name="m", by="source", batch_size=BATCH)
    with FeatureStore.create_or_resume(path, facts, index) as store:
        log = SkippedLog() if skipped is None else skipped
        embed(
            embedder,
            index,
            reader or Reader(),
            store,
            skipped=log,
            batch_size=BATCH,
            **{"workers": 0, **options},
        )
    return FeatureStore.open(path)


def content(store: FeatureStore) -> dict[str, tuple[bytes, bytes]]:
    groups = {id: store[id] for id in store.stored()}
    return {id: (group.rows.tobytes(), group.features.tobytes()) for id, group in groups.items()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, tuple[bytes, bytes]]:
    """What an uninterrupted run stores."""
    return content(run(tmp_path / "whole.zarr", index_of()))


@pytest.mark.parametrize(
    ("counts", "size", "sizes"),
    [
        (COUNTS, BATCH, SIZES),
        ([1] * 10, 4, [4, 4, 2]),
        ([3, 2, 2, 3, 1], 4, [3, 4, 4]),
        ([4, 8, 3, 4], 4, [4, 4, 4, 3, 4]),
        ([3, 9, 3], 4, [3, 4, 4, 1, 3]),
        ([7], 100, [7]),
        ([2, 3], 1, [1] * 5),
    ],
)
def test_large_groups_have_batches_of_their_own_and_small_ones_share_them_whole(
    counts: Iterable[int], size: int, sizes: list[int]
) -> None:
    assert np.diff(batch_edges(np.array(counts), size)).tolist() == sizes


def test_features_are_those_of_the_batches_of_the_groups(tmp_path: Path) -> None:
    index, embedder = index_of(), Mixing()
    store = run(tmp_path / "f.zarr", index, embedder)
    order = [row for number in range(len(COUNTS)) for row in range(len(index)) if index[row].source == f"/s{number}"]
    assert embedder.sizes == SIZES
    expected = np.empty((len(index), DIM), dtype=np.float32)
    for start, stop in pairwise(EDGES):
        rows = order[start:stop]
        # Views of 4 x 4 of windows of 8 x 8, by the mean of each 2 x 2.
        pixels = [Reader().read(index[row]).crop((0.0, 0.0), (8.0, 8.0), (4, 4)).values for row in rows]
        expected[rows] = Mixing().embed(View(torch.from_numpy(np.stack(pixels)))).numpy()
    features, rows = store.read_all()
    assert rows.tolist() == list(range(len(index)))
    assert np.array_equal(features.numpy(), expected)
    assert store.keys() == [f"s{number}" for number in range(len(COUNTS))]


def test_worker_processes_change_nothing(tmp_path: Path, whole: dict) -> None:
    assert content(run(tmp_path / "f.zarr", index_of(), workers=2)) == whole
    assert content(run(tmp_path / "g.zarr", index_of(), workers=-1)) == whole


@pytest.mark.parametrize("missing", [{"s0"}, {"s1"}, {"s3", "s6"}, {"s5"}, {"s0", "s2", "s4"}])
def test_missing_groups_are_added_byte_for_byte(tmp_path: Path, whole: dict, missing: set[str]) -> None:
    path, index = tmp_path / "whole.zarr", index_of()
    for id in missing:
        (path / id).rename(tmp_path / id)
    embedder = Mixing()
    before = {id: (path / id).stat().st_mtime_ns for id in whole if id not in missing}
    assert content(run(path, index, embedder)) == whole
    assert {id: (path / id).stat().st_mtime_ns for id in before} == before
    starts = np.cumsum([0, *COUNTS])
    places = {place for id in missing for place in range(starts[int(id[1:])], starts[int(id[1:]) + 1])}
    assert embedder.sizes == [stop - start for start, stop in pairwise(EDGES) if places & set(range(start, stop))]


@pytest.mark.parametrize("stop", range(len(SIZES)))
def test_what_is_done_stays_when_interrupted(tmp_path: Path, whole: dict, stop: int) -> None:
    path = tmp_path / "f.zarr"
    with pytest.raises(KeyboardInterrupt):
        run(path, index_of(), Mixing(stop_at=stop), workers=stop % 2)
    done = content(FeatureStore.open(path))
    edges = np.cumsum(COUNTS)
    assert list(done) == [f"s{number}" for number in range(len(COUNTS)) if edges[number] <= EDGES[stop]]
    assert done.items() <= whole.items()
    assert content(run(path, index_of())) == whole


def test_a_complete_store_needs_no_batch(tmp_path: Path, whole: dict) -> None:
    embedder = Mixing(stop_at=0)
    assert content(run(tmp_path / "whole.zarr", index_of(), embedder)) == whole


def test_unreadable_windows_are_left_out_and_recorded(tmp_path: Path) -> None:
    log = SkippedLog(tmp_path / "skipped.csv")
    store = run(tmp_path / "f.zarr", index_of(), reader=Reader({("/s2", 0.0), ("/s2", 5.0), "/s4"}), skipped=log)
    assert store.stored() == ["s0", "s1", "s2", "s3", "s5", "s6"]
    assert store.missing() == []
    assert store.unreadable() == {"s4": "/s4: damaged Mend it."}
    left = {store.index[int(row)].position[0] for row in store["s2"].rows}
    assert left == {1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0}
    assert [(entry.path, entry.stage, entry.reason) for entry in SkippedLog(tmp_path / "skipped.csv").entries] == [
        ("/s2", "read", "2 of 9 windows of 's2' left out: damaged Mend it."),
        ("/s4", "read", "2 of 2 windows of 's4' left out: damaged Mend it."),
    ]


def test_a_source_that_can_be_read_again_is_added(tmp_path: Path) -> None:
    path = tmp_path / "f.zarr"
    run(path, index_of(), reader=Reader({"/s4"}))
    embedder = Mixing()
    assert run(path, index_of(), embedder, Reader({"/s4"})).unreadable().keys() == {"s4"}
    assert len(embedder.sizes) == 1
    store = run(path, index_of())
    assert store.stored() == store.keys()
    assert store.unreadable() == {}


def test_nothing_readable_at_all_is_an_error(tmp_path: Path) -> None:
    broken = {f"/s{number}" for number in range(len(COUNTS))}
    with pytest.raises(FmsuiteError, match=r"None of the 34 windows could be read: /s0: damaged.*fmsuite tile"):
        run(tmp_path / "f.zarr", index_of(), reader=Reader(broken))


def test_strict_stops_at_the_first_window(tmp_path: Path) -> None:
    with pytest.raises(FmsuiteError, match="/s3: damaged"):
        run(tmp_path / "f.zarr", index_of(), reader=Reader({"/s3"}), skipped=SkippedLog(strict=True))
    assert FeatureStore.open(tmp_path / "f.zarr").stored() == ["s0", "s1", "s2"]


class Plain(Mixing):
    """An embedder of one window at a time."""

    identity = "plain"

    def embed(self, view: View) -> Tensor:
        return view.pixels.flatten(1)


def test_a_feature_that_is_not_finite_names_slide_and_row(tmp_path: Path) -> None:
    index = index_of()
    first = next(row for row in range(len(index)) if index[row].source == "/s3")
    with pytest.raises(FmsuiteError, match=rf"'s3'.*row {first} of the index, /s3 at .*--device cpu"):
        run(tmp_path / "f.zarr", index, Plain(), Reader(nan="/s3"))
    assert FeatureStore.open(tmp_path / "f.zarr").stored() == ["s0", "s1", "s2"]


def test_a_worker_that_dies_is_reported_and_what_is_done_stays(tmp_path: Path, whole: dict) -> None:
    with pytest.raises(FmsuiteError, match=r"A data worker died .*--workers 0"):
        run(tmp_path / "f.zarr", index_of(), reader=Reader(deadly="/s5"), workers=1)
    assert content(FeatureStore.open(tmp_path / "f.zarr")).items() <= whole.items()
    assert content(run(tmp_path / "f.zarr", index_of())) == whole


def test_progress_counts_the_windows_that_are_computed(tmp_path: Path, whole: dict) -> None:
    seen = []

    def progress(items: Iterable, total: int, title: str) -> Iterator:
        count = 0
        for item in items:
            count += 1
            yield item
        seen.append((count, total))

    run(tmp_path / "f.zarr", index_of(), progress=progress)
    (tmp_path / "f.zarr" / "s6").rename(tmp_path / "s6")
    run(tmp_path / "f.zarr", index_of(), progress=progress)
    assert seen == [(34, 34), (3, 3)]


def test_a_store_of_others_is_refused(tmp_path: Path) -> None:
    facts = store_facts(Mixing(), index_of(), name="m", by="source", batch_size=BATCH)
    with FeatureStore.create_or_resume(tmp_path / "f.zarr", facts, index_of()) as store:
        for index, embedder, size in (
            (index_of([1]), Mixing(), BATCH),
            (index_of(), Plain(), BATCH),
            (index_of(), Mixing(), 5),
        ):
            with pytest.raises(ValueError, match="made for another"):
                embed(embedder, index, Reader(), store, workers=0, skipped=SkippedLog(), batch_size=size)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_an_encoder_is_an_embedder(tmp_path: Path, pooling: str) -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(ModelConfig(name="vit_tiny", width=16, depth=1, heads=2, patch_size=2), SPEC)
    encoder = Encoder(backbone, SPEC, pooling, {"from": "here"})
    store = run(tmp_path / "f.zarr", index_of(), encoder)
    assert store.facts.provenance == {"from": "here"}
    assert (store.facts.pooling, store.facts.dim) == (pooling, 32 if pooling == "cls+mean" else 16)
    assert store.facts.identity == encoder.identity
    row = int(store["s5"].rows[3])
    sample = Reader().read(store.index[row]).crop((0.0, 0.0), (8.0, 8.0), (4, 4))
    alone = encoder.embed(torch.from_numpy(sample.values)[None])
    assert np.allclose(store["s5"].features[3], alone[0].numpy(), atol=1e-5)


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np, torch
from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.embedding import embed, store_facts
from fmsuite.core.features import FeatureStore
from fmsuite.core.inputs import Channel, InputSpec

class Reader:
    def read(self, window):
        return ArraySample(np.zeros((1, 4, 4), np.float32))

class Wide:
    identity, dim, pooling, normalisation, provenance = "wide", 8192, "none", "nothing", {}
    spec = InputSpec(axes=("y", "x"), size=(4, 4), channels=(Channel(name="a"),))
    def to(self, device):
        pass
    def embed(self, view):
        return torch.ones(len(view), self.dim)

for count in (5, 5, 100):
    windows = (Window(f"/s{n // 16}", "g", (0.0, 0.0), (4.0, 4.0)) for n in range(16 * count))
    index = SampleIndex.from_windows(windows, {"domain": "none"})
    path = Path(sys.argv[1]) / f"{count}.zarr"
    facts = store_facts(Wide(), index, name="w", by="source")
    with FeatureStore.create_or_resume(path, facts, index, overwrite=True) as store:
        embed(Wide(), index, Reader(), store, workers=0, skipped=SkippedLog())
    # Not ru_maxrss, which begins with that of the process that started this one.
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_slides(tmp_path: Path) -> None:
    """100 slides of half a MiB of features each; the largest memory in use rises by far less than that."""
    ran = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    first, few, many = map(int, re.findall(r"\d+", ran.stdout))
    assert few - first < 20
    assert many - few < 20
    assert sum(file.stat().st_size for file in (tmp_path / "100.zarr").rglob("*") if file.is_file()) > 50 * 2**20
