"""The log of a run, one JSON object a line, and the wish to stop it."""

from __future__ import annotations

import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

from everysat.io.output import replacing


class Logbook:
    """``log.jsonl`` of a folder. Beginning at step n drops what an earlier start wrote beyond n, so that the log of a run
    that was killed and resumed is that of one that was not. Rows hold ``step``, the number of finished steps, and numbers.

    Raises:
        ImportError: ``tensorboard`` is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = folder / "log.jsonl"
        kept = [row for row in self.read(folder) if row["step"] <= step]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._writer = _tensorboard(folder, step) if tensorboard else None

    def __enter__(self) -> Logbook:
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, step: int, **values: float) -> None:
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """Rows of a folder's log; a last line that was cut off is left out. Empty when there is no log."""
        path = folder / "log.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows


class Stop:
    """Inside the block, Ctrl-C and SIGTERM set ``asked`` and nothing else, so that a step is never half done. A second Ctrl-C
    stops at once. Signals reach the main thread alone; in another, this does nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: true needs the package: pip install 'everysat[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
