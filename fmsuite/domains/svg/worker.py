"""Rendering under a clock: a child process that draws files one after the other, and is killed when one takes too long.

Run as ``python -m fmsuite.domains.svg.worker`` it is the child: a line of JSON asks for a file, a line of JSON answers.
It relies on POSIX pipes and alarms.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from fmsuite.domains.svg.render import Canvas, Rgba, render_region
from fmsuite.domains.svg.safety import Document, Limits, load
from fmsuite.errors import FmsuiteError, ReadFailure

START_TIMEOUT = 120.0
"""Seconds that a child may take to import its libraries; a busy machine is no fault of a file's."""

_LOOK_EVERY_S = 0.5

MEMORY_LIMIT = 4 << 30
"""Bytes of address space that a child may use."""


@dataclass(frozen=True)
class Drawn:
    """A file that renders.

    Attributes:
        canvas: where the drawing lies.
        content: share of the window's pixels that are not background.
        not_drawn: elements that the renderer leaves out, with counts.
    """

    canvas: Canvas
    content: float
    not_drawn: dict[str, int]


def draw(document: Document, path: str, size: int, background: Rgba) -> Drawn:
    """Render the whole window once, and look whether anything can be seen.

    Raises:
        ReadFailure: if rendering fails, or the picture has one colour only.
    """
    canvas = document.canvas
    try:
        pixels = render_region(document.source, canvas, canvas.corner, (canvas.side,) * 2, (size, size), background)
    except MemoryError:
        raise ReadFailure(path, "render", "rendering it needs too much memory", "Simplify the drawing.") from None
    except Exception as error:
        raise render_failure(path, error) from error
    content = float(np.mean((pixels != np.rint(np.array(background[:3]) * 255).astype(np.uint8)).any(-1)))
    if (pixels == pixels[0, 0]).all():
        raise ReadFailure(
            path,
            "render",
            "its picture has a single colour",
            "Nothing of it is drawn, or it has the background's colour: try another data.background.",
        )
    return Drawn(canvas, content, document.not_drawn)


def render_failure(path: str, error: Exception) -> ReadFailure:
    """What CairoSVG raised for a drawing, as a reason."""
    what = str(error) or type(error).__name__
    return ReadFailure(
        path,
        "render",
        f"CairoSVG cannot render it: {type(error).__name__}: {what[:200]}",
        "Export it again as plain SVG.",
    )


class RenderWorker:
    """One child process, restarted after it was killed. Close it, or use it in a ``with`` statement.

    Args:
        size, background: how to render.
        limits: what is refused before rendering.
        timeout: seconds for one file.
    """

    def __init__(self, size: int, background: Rgba, limits: Limits, timeout: float) -> None:
        self.settings = {"size": size, "background": background, "limits": asdict(limits), "timeout": timeout}
        self.timeout = timeout
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def try_file(self, path: str) -> Drawn:
        """Check and render one file.

        Raises:
            ReadFailure: for whatever is wrong with it, too long a time and a crash of the renderer included.
        """
        self._start()
        try:
            answer = self._ask({"path": path}, self.timeout)
        except TimeoutError:
            self.close()
            raise ReadFailure(
                path,
                "render",
                f"rendering it takes more than {self.timeout:g} s",
                "Simplify the drawing, or raise data.timeout_s.",
            ) from None
        except (EOFError, BrokenPipeError):
            self.close()
            raise ReadFailure(path, "render", "the renderer crashed on it", "Simplify the drawing.") from None
        if "stage" in answer:
            raise ReadFailure(path, answer["stage"], answer["reason"], answer["hint"])
        return Drawn(Canvas(**answer["canvas"]), answer["content"], answer["not_drawn"])

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fmsuite.domains.svg.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        )
        try:
            self._ask(self.settings, START_TIMEOUT)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self.close()
            raise FmsuiteError(
                "The process that renders drawings does not start.",
                f"Try `{sys.executable} -m fmsuite.domains.svg.worker`: it should wait for input.",
            ) from error

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """Kill the child and wait until it is gone."""
        self._buffer = b""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process = None

    def __enter__(self) -> RenderWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve() -> None:
    """The child's loop: settings first, then one path a line, until its input ends."""
    # Answers go to a copy of stdout: nothing that a library prints can get between them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _limit_memory()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    settings = json.loads(sys.stdin.readline())
    limits = Limits(**settings["limits"])
    _answer(answers, {})
    for line in sys.stdin:
        path = json.loads(line)["path"]
        # Should the parent not ask for this process's end, the system sees to it.
        signal.alarm(math.ceil(settings["timeout"]) + 10)
        try:
            found = draw(load(path, limits), path, settings["size"], tuple(settings["background"]))
            answer = asdict(found)
        except ReadFailure as failure:
            answer = {"stage": failure.stage, "reason": failure.reason, "hint": failure.hint}
        signal.alarm(0)
        _answer(answers, answer)


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, in the middle of a drawing too."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(0)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


if __name__ == "__main__":
    serve()
