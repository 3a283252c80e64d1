"""A bar that shows how many programs are done. Owns nothing else; rich is loaded when a bar is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counting(total: int, *, is_shown: bool) -> Iterator[Callable[[], None]]:
    """Shows a bar of so many until the block ends. What it gives is called when one more is done, from any thread."""
    if not is_shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
