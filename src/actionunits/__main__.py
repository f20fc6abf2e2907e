"""`python -m actionunits`: the command `actionunits` where its script is not on the path."""

import sys

from actionunits.cli import console

if __name__ == "__main__":
    sys.exit(console())
