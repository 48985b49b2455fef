"""A differential fuzz test: random calls of the loss, compared with a formula in float64.

`formula` says what the loss is, `cases` draws inputs and options, `calls` hands them to
fastvae, `check` compares. `python -m tests.fuzz --help` runs many.
"""

from .calls import Case as Case
from .calls import call as call
from .cases import case as case
from .check import discrepancies as discrepancies
