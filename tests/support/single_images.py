"""``da3-export`` that measures parity on batches of one: larger ones take most of that time."""

import sys

from da3_export.__main__ import main
from da3_export.parity import cases

if __name__ == "__main__":
    single = [case for case in cases.all_cases(large=False) if case.batch == 1]
    cases.all_cases = lambda large: single
    sys.exit(main())
