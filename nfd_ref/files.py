"""Files that are whole or not there, folders that one process writes, logs and arrays. Written by
hand; the ground below `storage`."""

import glob
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from site import getuserbase

import numpy as np

__all__ = ['write_aside', 'require_out', 'sweep', 'lock', 'unlock', 'home',
           'work_from_nbs', 'read_log', 'append_line', 'trim_log', 'read_arrays', 'write_arrays']

# ---- whole files

@contextmanager
def write_aside(path):
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it
    fails: never half a file (or folder). What a killed process had under way for it goes, too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f'.{glob.escape(path.stem)}.*.part{glob.escape(path.suffix)}')
    tmp = path.with_name(f'.{path.stem}.{os.getpid()}.part{path.suffix}')
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        if tmp.is_dir(): shutil.rmtree(tmp)
        else: tmp.unlink(missing_ok=True)

SIGNS = {               # how a file of ours begins: so many bytes in
    '.mp4': (4, b'ftyp'),
    '.gif': (0, b'GIF8'),
    '.png': (0, b'\x89PNG')}

def require_out(
    path,               # where a result shall go
    *suffixes           # that it may have
):
    """An error before the work and not after it: another suffix, a name that is a folder, a device
    or a file of another kind (none is replaced), a folder in which nothing can be written."""
    path = Path(path)
    if path.suffix not in suffixes: raise ValueError(f'{path}: can write {" and ".join(suffixes)}')
    if path.exists() and not path.is_file():
        raise ValueError(f'{path}: there is something that is not a file; give another name')
    if path.exists() and path.suffix in SIGNS and path.stat().st_size:
        skipped, sign = SIGNS[path.suffix]
        with open(path, 'rb') as file: begins = file.read(16)
        if not begins[skipped:].startswith(sign):
            raise ValueError(f'{path}: this file is no {path.suffix} and is not replaced; '
                             'give another name')

    folder = path.absolute().parent
    while not folder.exists(): folder = folder.parent
    if not folder.is_dir(): raise NotADirectoryError(f'{path}: {folder} is a file, not a folder')
    with tempfile.TemporaryFile(dir=folder): pass

def sweep(folder, pattern='.*.part*'):
    "Remove what `write_aside` had under way in a folder when its process was killed."
    for half in Path(folder).glob(pattern):
        writer = re.search(r'\.(\d+)\.part', half.name)
        if writer and is_running(int(writer[1])): continue
        if half.is_dir(): shutil.rmtree(half)
        else: half.unlink()

def is_running(pid):
    "Has the process of this number not ended? (Where that cannot be asked: no.)"
    if os.name != 'posix': return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass                # someone else's
    return True

# ---- one writer at a time

_locked = {}            # {folder: file}, runs that this process writes

def lock(out):          # the run's folder
    """No other process may write this run until `unlock`, or until this one has ended.
    (Without POSIX locks nothing is locked.)"""
    folder = Path(out).resolve()
    if not find_spec('fcntl') or folder in _locked: return
    import fcntl
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/'.lock'
    file = open(path, 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FileExistsError(f'{out}: another process is writing this run') from None
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        file.close()        # its last owner has just removed it
        lock(out)
        return
    _locked[folder] = file

def unlock(out):
    "Other processes may go on with this run."
    file = _locked.pop(Path(out).resolve(), None)
    if file is None: return
    Path(file.name).unlink(missing_ok=True)
    file.close()

def home(here):
    """The folder with `data` in it: a clone's or, where a wheel was installed (`here` is then
    site-packages), what came with the wheel."""
    came_with = Path('share')/'nfd_ref'
    places = [here, here/came_with, Path(sys.prefix)/came_with, Path(getuserbase())/came_with]
    return next((place for place in places if (place/'data'/'world').is_dir()), here)

def work_from_nbs():
    "The working directory becomes nbs/, from which notebooks name files, wherever a kernel began."
    folder = Path(__file__).resolve().parent.parent/'nbs'
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder; notebooks run in a clone')
    os.chdir(folder)

# ---- arrays, and logs: a line of JSON for each step

# numpy has Python's parser read an array's header; up to Python 3.11 two threads that parse at once
# may end in "SystemError: AST constructor recursion depth mismatch"
READING = threading.Lock()

def read_arrays(path):
    "{name: array} of an .npz file, one thread at a time; no pickle."
    with READING, np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}

def write_arrays(path, arrays):     # {name: array}
    "An .npz file without a time of day in it: equal arrays are equal bytes."
    with write_aside(path) as tmp, zipfile.ZipFile(tmp, 'w') as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            entry = zipfile.ZipInfo(f'{key}.npy')
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED)

def read_log(path):
    "The lines of a log, a list of dicts."
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def append_line(path, line):
    "One more line for a log, a dict."
    with open(path, 'a') as f: f.write(json.dumps(line) + '\n')

def trim_log(path, step):
    "Drop the lines of a log after `step`, and a last line that was cut."
    path = Path(path)
    if not path.exists(): return
    def belongs(line):
        try: return json.loads(line)['step'] <= step
        except (ValueError, TypeError, KeyError): return False      # cut, or no line of a log
    keep = [line + '\n' for line in path.read_text(errors='replace').splitlines() if belongs(line)]
    with write_aside(path) as tmp: tmp.write_text(''.join(keep))
