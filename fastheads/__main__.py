"""`python -m fastheads`, which `torchrun -m fastheads` needs."""

from fastheads.cli import main

if __name__ == "__main__":
    main()
