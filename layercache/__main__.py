"""``python -m layercache``: the command line."""

from layercache.tools.cli.app import main

if __name__ == "__main__":
    main()
