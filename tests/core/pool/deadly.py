"""A reader that ends its process, for tests of workers that die."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmsuite.core.data.index import Window


@dataclass
class Deadly:
    """
    Attributes:
        reader: reads what does not kill.
        source: the end of the path that kills.
        mark: made at the first death; with it there is no other, unless ``always``.
    """

    reader: Any
    source: str
    mark: Path
    always: bool = False

    def read(self, window: Window) -> Any:
        if window.source.endswith(self.source) and (self.always or not self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader.read(window)
