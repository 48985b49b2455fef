"""`python -m fastvae` is the command `fastvae`."""

import sys

from fastvae.cli import main

sys.exit(main())
