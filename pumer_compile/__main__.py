"""`python -m pumer_compile` is `pumer-compile`."""

from .cli import main

if __name__ == "__main__":
    main()
