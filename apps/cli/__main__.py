"""`python -m apps.cli`, the same as `streamo-edge`."""

import sys

from apps.cli.main import main

sys.exit(main())
