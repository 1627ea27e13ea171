"""``python -m fastconv``; see :mod:`fastconv.cli`."""

import sys

from fastconv.cli import main

sys.exit(main())
