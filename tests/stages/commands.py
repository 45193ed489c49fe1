"""The command line, run inside the test process."""

import sys

from mambaquant_ext.cli import main


def in_process(*arguments):
    """The exit status of main(); an exception that is not SystemExit would be a traceback."""
    before = sys.argv
    sys.argv = ["mambaquant", *map(str, arguments)]
    try:
        main()
    except SystemExit as status:
        return status.code or 0
    finally:
        sys.argv = before
    return 0
