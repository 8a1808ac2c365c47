"""The `nfd-ref` command: a thin face over the package. Written by hand; a command is a function
(see `command`), and `nfd-ref --help` lists them in the order of these imports."""

import sys

from nfd_ref import cli_play, cli_make, cli_train, cli_measure, cli_lab
from nfd_ref.command import COMMANDS, main, parser

__all__ = ['COMMANDS', 'parser', 'main', 'cli_play', 'cli_make', 'cli_train', 'cli_measure',
           'cli_lab']

if __name__ == '__main__': sys.exit(main())
