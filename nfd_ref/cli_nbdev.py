"""`nbdev_test`, the name and the `--path` that readers know from nbdev 2, for nbdev 3's
`nbdev-test`. Written by hand."""

import os
import sys
from pathlib import Path

__all__ = ['without_path', 'main']

def without_path(args):
    "Arguments with `--path NB` (or `--path=NB`) as nbdev 3 wants it: NB alone."
    return [arg.removeprefix('--path=') for arg in args if arg != '--path']

def main():
    "Become nbdev 3's command, with the arguments of nbdev 2."
    command = str(Path(sys.executable).with_name('nbdev-test'))
    os.execv(command, [command, *without_path(sys.argv[1:])])

if __name__ == '__main__': main()
