"""`python -m streamserve.launch_server --model-path ... --port ...`: `streamserve serve` in SGLang's spelling.

Flags that mean nothing here are taken, each with a line on standard error that says why; see sglang_flags.
"""

import sys
from collections.abc import Sequence

from streamserve import cli
from streamserve.flags import UsageError
from streamserve.sglang_flags import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; returns the exit code."""
    try:
        found = read(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"streamserve: {error}", file=sys.stderr)
        return cli.USAGE
    for note in found.notes:
        print(f"streamserve: {note}", file=sys.stderr)
    return cli.main(["serve", *found.flags])


if __name__ == "__main__":
    sys.exit(main())
