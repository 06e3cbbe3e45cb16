"""``python -m normdrop`` is ``normdrop``."""

import sys

from normdrop.cli import main

if __name__ == "__main__":
    sys.exit(main())
