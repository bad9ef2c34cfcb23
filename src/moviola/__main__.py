"""`python -m moviola` is the `moviola` command."""

from moviola.cli import main

if __name__ == "__main__":
    main()
