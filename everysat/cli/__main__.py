"""``python -m everysat.cli``."""

from everysat.cli import main

main()
