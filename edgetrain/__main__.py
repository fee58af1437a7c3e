"""``python -m edgetrain``."""

from edgetrain.cli.main import main

main()
