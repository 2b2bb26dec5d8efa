"""`python -m launcher`, and the console script: --version answers before Click is even imported."""

import gc
import sys

from launcher import __version__


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"dslaunch {__version__}")
        return
    gc.set_threshold(100_000)  # modules and tables stay: looking for garbage among them took 4 % of a rendering
    try:
        from launcher.cli import main as cli
    except KeyboardInterrupt:  # nothing was begun
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    cli()


if __name__ == "__main__":
    main()
