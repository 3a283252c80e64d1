"""What serving wants of its whole process: garbage collection that stalls no loop, and threads that get their turn soon.

For a process that is the server's own. Whoever has an engine in a process of his own keeps his settings.
"""

import gc
import sys


def settle() -> None:
    """Behind the start, when all that stays is here. Not undone."""
    gc.collect()
    gc.freeze()  # what is here now stays: looking through it again and again would stall the loop
    gc.set_threshold(5_000, 5, 40)  # so would a pass through all else: one large body used to bring about several
    # A step's thread needs the GIL many times over. While another thread walks a large schema, each time takes as long as this.
    sys.setswitchinterval(2e-4)
