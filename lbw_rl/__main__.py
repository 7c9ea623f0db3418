"""`python -m lbw_rl` is `lbw-rl`: torchrun and other launchers start modules."""

from lbw_rl.cli import main

if __name__ == "__main__":
    main()
