"""A C++ compiler that remembers, for tests: the kernel of a world is compiled once in a run, not
once in every process. `python kept_compiler.py FOLDER COMPILER ...` is that compiler: it keeps in
the folder what it makes of a `kernel.cpp`."""
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

def main(folder, *command):
    *flags, out, source = command
    key = hashlib.sha256('\0'.join(flags).encode() + Path(source).read_bytes()).hexdigest()
    kept = Path(folder, key)
    if not kept.exists():
        done = subprocess.run(command)
        if done.returncode: return done.returncode
        half = kept.with_suffix(f'.{os.getpid()}')
        shutil.copy(out, half)
        half.rename(kept)               # whole or not at all: others may be looking
    shutil.copy(kept, out)
    return 0

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
