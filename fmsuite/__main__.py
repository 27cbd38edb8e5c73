"""``python -m fmsuite``, which torchrun needs."""

from fmsuite.cli import main

# Processes that are spawned import this file under another name.
if __name__ == "__main__":
    main()
