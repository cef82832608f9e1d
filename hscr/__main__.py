"""`python -m hscr` is the command line of hscr.cli: the very program that the service's worker runs."""

from hscr.cli import main

if __name__ == "__main__":
    main()
