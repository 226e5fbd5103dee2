"""``python -m layered_store``."""

from layered_store.cli import main

if __name__ == "__main__":
    main()
