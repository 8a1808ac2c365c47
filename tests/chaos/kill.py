"""Kill it at any moment: every long command goes on to the same bits.

    python -m tests.chaos.kill --seconds 600 --seed 0

Each command is run once to its end. Then again, killed (SIGKILL, with all its processes) once or
twice at random moments, and gone on with. After a kill every file under its final name must be
whole, and in the end every result must have the bytes of the run that nobody disturbed."""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tests.chaos.fuzz import make_kit

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300          # seconds for one run that nobody kills

@dataclass
class Job:
    "A long command: its words, where OUT stands for its folder, and what makes it go on."
    words: tuple
    again: tuple = ('--resume',)
    needs: str = None       # a package that it cannot do without

TRAIN = ('--steps', '6', '--batch', '2', '--save-every', '2', '--data', 'KIT/video', '--out', 'OUT')
JOBS = {
    'record': Job(('record', 'OUT', '--episodes', '3', '--test', '1', '--length', '40',
                   '--workers', '2'), (), 'vizdoom'),
    'tokenizer': Job(('train', 'tokenizer', *TRAIN)),
    'world': Job(('train', 'world', *TRAIN, '--tokenizer', 'KIT/world', '--length', '4')),
    'judge': Job(('train', 'idm', *TRAIN)),
    'student': Job(('distill', 'consistency', *TRAIN, '--teacher', 'KIT/world', '--length', '4',
                    '--clips', '1', '--float32', '--no-adversarial'))}

def start(job, kit, out, more=()):
    "The command, in a group of processes of its own."
    words = [word.replace('KIT', str(kit)).replace('OUT', str(out)) for word in job.words]
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return subprocess.Popen([sys.executable, '-m', 'nfd_ref.cli', *words, *more], cwd=ROOT, env=env,
                            start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)

def finish(process):
    "Let it run to its end."
    said = process.communicate(timeout=PATIENCE)[1]
    if process.returncode: raise RuntimeError(said[-1000:])

def results(out):
    "{name: fingerprint} of what a command is run for: weights, video, actions."
    kinds = ('.safetensors', '.mp4', '.npz')
    final = out/'final' if (out/'final').exists() else out
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
            for path in sorted(final.rglob('*')) if path.suffix in kinds}

def whole(path):
    "Can a file under its final name be read?"
    from nfd_ref.storage import load_tensors, read_json
    from nfd_ref.video import video_info
    if path.suffix == '.json': read_json(path)
    if path.suffix == '.safetensors': load_tensors(path)
    if path.suffix == '.mp4': video_info(path)
    if path.suffix in ('.npz', '.npy'): np.load(path)

def torn(out):
    "Files under final names that cannot be read."
    found = []
    for path in out.rglob('*'):
        if not path.is_file() or any(part.startswith('.') for part in path.parts): continue
        try:
            whole(path)
        except Exception as problem:
            found.append(f'{path.relative_to(out)}: {problem}')
    return found

def trial(job, kit, out, lasts, rng):
    "One run with one or two kills; gives how many there were, and what is wrong, or None."
    kills = rng.choice((1, 1, 2))
    for i in range(kills):
        process = start(job, kit, out, job.again if i else ())
        moment = rng.uniform(0, lasts)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        broken = torn(out) if out.exists() else []
        if broken: return i + 1, f'killed after {moment:.2f} s: {broken}'
    try:
        finish(start(job, kit, out, job.again))
    except RuntimeError as problem:
        return kills, f'does not go on: {problem}'
    return kills, None

def kill(seconds, seed=0, names=tuple(JOBS)):
    "So many seconds of kills, the commands in turns; gives the number of kills and the findings."
    rng = random.Random(seed)
    names = [name for name in names if not JOBS[name].needs or find_spec(JOBS[name].needs)]
    findings = []
    count = 0
    turn = 0
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        kit = make_kit(tmp/'kit')
        truth = {}
        until = time.time() + seconds
        while time.time() < until:
            name = names[turn % len(names)]
            if name not in truth:
                began = time.time()
                finish(start(JOBS[name], kit, tmp/name))
                truth[name] = (time.time() - began, results(tmp/name))
            lasts, expected = truth[name]
            out = tmp/f'{name}_{turn}'
            turn += 1
            kills, wrong = trial(JOBS[name], kit, out, lasts, rng)
            if not wrong and results(out) != expected: wrong = 'another result'
            if wrong: findings.append(dict(job=name, turn=turn, wrong=wrong))
            count += kills
    return count, findings

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    kills, found = kill(args.seconds, args.seed)
    for finding in found: print(json.dumps(finding))
    print(f'{kills} kills, {len(found)} findings')
    sys.exit(bool(found))
