"""`python -m pumer_compile` is `pumer-compile`."""

from .cli.commands import main

if __name__ == "__main__":
    main()
