"""What steps a server's engine took while a bench ran: looks at GET /engine/steps all the while."""

import threading
import time
from collections.abc import Sequence

from bench.load import percentile
from bench.server import Server

ROWS = (0, 8, 32, 64, 128, 256)  # bounds of kinds: decode rows of a step,
TOKENS = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)  # and its prompt tokens


class Steps:
    """Looks at the engine's steps all the while: the server keeps the last 600 (GET /engine/steps)."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._last = 0
        self._columns: list[str] = []
        self._steps: list[tuple[float, list[float]]] = []  # when, by this process's clock
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.wait(0.5):
            self._look()

    def _look(self) -> None:
        found = self._server.get(f"/engine/steps?since={self._last}")
        shift_s = time.perf_counter() - found["now_s"]
        self._last, self._columns = found["last"], found["columns"]
        at = self._columns.index("time_s")
        self._steps += [(step[at] + shift_s, step) for step in found["steps"]]

    def close(self) -> None:
        """Look once more, then stop looking."""
        self._ends.set()
        self._thread.join()
        self._look()

    def told(self, begin_s: float, end_s: float) -> list[str]:
        """Of each kind of step between two moments: how many, and how long after the one before them they ended."""
        kinds: dict[tuple[int | str, ...], list[tuple[float, float, float]]] = {}
        before_s = 0.0
        for at_s, step in self._steps:
            value = dict(zip(self._columns, step, strict=True))
            if begin_s <= before_s and at_s < end_s:
                rows, tokens = value["decode_rows"], value["prompt_tokens"]
                marks = [name for name in ("drafted", "encodes") if value[name]]
                kinds.setdefault((_at_most(rows, ROWS), _at_most(tokens, TOKENS), *marks), []).append(
                    ((at_s - before_s) * 1e3, rows, tokens)
                )
            before_s = at_s
        lines = [f"{'steps':>7}{'p50 ms':>9}{'p90':>7}{'answers':>9}{'prompt tokens':>15}"]
        for kind, found in sorted(kinds.items(), key=lambda item: item[0][:2]):
            ms, rows_of, tokens_of = zip(*found, strict=True)
            lines.append(
                f"{len(ms):7}{percentile(ms, 50):9.1f}{percentile(ms, 90):7.1f}{sum(rows_of) / len(ms):9.0f}"
                f"{sum(tokens_of) / len(ms):15.0f}  {', '.join(map(str, kind[2:]))}"
            )
        return lines


def _at_most(value: float, bounds: Sequence[int]) -> int:
    return next((bound for bound in bounds if value <= bound), 1 << 30)
