"""``python -m fmsuite``, which torchrun needs."""

from fmsuite.cli import main

main()
