"""`python -m fastheads`, which `torchrun -m fastheads` needs."""

from fastheads.cli.commands import main

if __name__ == "__main__":
    main()
