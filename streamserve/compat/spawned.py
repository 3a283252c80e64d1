"""The main module of processes that a script spawns which compat/sglang.py runs.

multiprocessing begins such a process by running the module that its parent's main module says it came from, as `__mp_main__`.
That is this one: it puts the name `sglang` in place, and then does with the script what multiprocessing would have done.
"""

import os
import runpy

from streamserve.compat.sglang import SCRIPT, install

if __name__ == "__mp_main__":
    install()
    names = runpy.run_path(os.environ[SCRIPT], run_name=__name__)
    globals().update({name: value for name, value in names.items() if name != "__spec__"})  # it may spawn others
