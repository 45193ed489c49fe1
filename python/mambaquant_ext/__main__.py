"""`python -m mambaquant_ext` is the command `mambaquant`."""

from mambaquant_ext.cli import main

main()
