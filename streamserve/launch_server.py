"""`python -m streamserve.launch_server --model-path ... --port ...`: `streamserve serve` in SGLang's spelling."""

import sys

from streamserve.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
