"""`python -m histodiffusion` is the `histodiffusion` command."""

import sys

from histodiffusion.app.cli import main

sys.exit(main())
