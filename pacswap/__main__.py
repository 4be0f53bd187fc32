"""`python -m pacswap` is the command `pacswap`."""

from pacswap.cli import main

if __name__ == "__main__":
    main()
