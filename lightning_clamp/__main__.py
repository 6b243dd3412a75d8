"""``python -m lightning_clamp``: the command line."""

from lightning_clamp.cli import main

if __name__ == "__main__":
    main()
