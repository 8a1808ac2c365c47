"""Kill it at any moment: every long command goes on to the same bits.

    python -m tests.chaos.kill --seconds 600 --seed 0

Each command is run once to its end. Then again, killed (SIGKILL, with all its processes) once or
twice, and gone on with: at a random moment, or just before a random one of its file operations.
After a kill every file under its final name must be whole, and in the end every result must have
the bytes of the run that nobody disturbed."""
import argparse
import json
import os
import random
import re
import shutil
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
PATIENCE = 1800         # seconds for one run that nobody kills

@dataclass
class Job:
    """A long command: its words, where OUT stands for its folder, KIT for small ones of everything
    and DONE for what the jobs it comes after have made; and what makes it go on. Without that it
    makes all or nothing, and is told again where there is nothing."""
    words: tuple
    again: tuple = ('--resume',)    # or None
    after: tuple = ()
    needs: str = None       # a package that it cannot do without
    timed: tuple = ()       # results that hang on a time that was measured, so on no bits

TRAIN = ('--steps', '6', '--batch', '2', '--save-every', '2', '--out', 'OUT')
VIDEO = ('--data', 'KIT/video')
TEACHER = ('--teacher', 'DONE/teacher/final')
MATCH = (*TRAIN, *VIDEO, *TEACHER, '--length', '4', '--given', '1', '--ratio', '2',
         '--accumulate', '1')
JOBS = {
    'record': Job(('record', 'OUT', '--episodes', '3', '--test', '1', '--length', '40',
                   '--workers', '2'), (), needs='vizdoom'),
    'branches': Job(('branches', 'OUT', '--states', '2'), None, needs='vizdoom'),
    'walks': Job(('walks', 'OUT', '--walks', '2', '--length', '80'), None, needs='vizdoom'),
    'depths': Job(('depths', 'OUT', '--episodes', '2', '--length', '80'), None, needs='vizdoom'),
    'import': Job(('import', 'OUT', 'KIT/takes', '--size', '80x48'), None),
    'tokenizer': Job(('train', 'tokenizer', *TRAIN, *VIDEO)),
    'world': Job(('train', 'world', *TRAIN, *VIDEO, '--tokenizer', 'KIT/world', '--length', '4')),
    'judge': Job(('train', 'idm', *TRAIN, *VIDEO)),
    'student': Job(('distill', 'consistency', *TRAIN, *VIDEO, '--teacher', 'KIT/world',
                    '--length', '4', '--clips', '1', '--float32', '--no-adversarial')),
    'teacher': Job(('train', 'teacher', *TRAIN, *VIDEO, '--tokenizer', 'KIT/world',
                    '--length', '4')),
    'trajectories': Job(('distill', 'trajectories', '--out', 'OUT', *VIDEO, *TEACHER,
                         '--count', '6', '--steps', '8', '--length', '4', '--given', '1',
                         '--batch', '2'), (), ('teacher',)),
    'ode': Job(('distill', 'ode', *TRAIN, *TEACHER, '--trajectories', 'DONE/trajectories'),
               after=('teacher', 'trajectories')),
    'matching': Job(('distill', 'distribution', *MATCH), after=('teacher',)),
    'forcing': Job(('distill', 'distribution', *MATCH, '--context', 'rollout',
                    '--idm', 'KIT/judge'), after=('teacher',)),
    'release': Job(('release', 'KIT/world', 'KIT/world', 'OUT', *VIDEO, '--clips', '4'), None),
    'play': Job(('play', 'KIT/world', *VIDEO, '--frames', '40', '--out', 'OUT.mp4'), ()),
    'translate': Job(('translate', 'KIT/takes/0.mp4', '--actions', 'KIT/takes/0.npz',
                      '--world', 'KIT/world', '--out', 'OUT.mp4'), ()),
    'build': Job(('build', 'OUT', '--recipe', 'tiny'), (), needs='vizdoom'),
    'compare': Job(('compare', 'OUT', '--recipe', 'tiny'), (),
                   timed=('world_hours', 'films/3.npz', 'comparison.mp4'))}

# ---- a process that ends itself

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate')

def die_at(number, out):
    """Be killed just before file operation `number` (0: never, count them) of those on a result or
    on what lies aside for it: what Python opens for writing, renames, removes and makes."""
    folder, name = os.path.split(out)
    done = 0

    def hook(event, args):
        nonlocal done
        if event == 'open': counts = (args[2] or 0) & WRITING
        else: counts = event in CHANGES
        if not counts: return
        path = str(args[0])
        if not path.startswith(folder) or name not in path: return
        done += 1
        if done == number: os.killpg(os.getpgid(0), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: done

def run_job(number, out, words):
    "The command, with that hook; says at its end how many operations there were."
    from nfd_ref.cli import main
    counted = die_at(number, out)
    code = main(words)
    print(f'file operations: {counted()}', file=sys.stderr)
    return code

def start(job, kit, out, number=0, more=()):
    "The command, in a group of processes of its own."
    places = dict(KIT=str(kit), OUT=str(out), DONE=str(kit.parent))
    words = [re.sub('KIT|OUT|DONE', lambda found: places[found[0]], word) for word in job.words]
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'tests.chaos.kill', '--die', str(number), str(out)]
    return subprocess.Popen([*command, *words, *more], cwd=ROOT, env=env, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def finish(process):
    "Let it run to its end; gives the number of its file operations."
    said = process.communicate(timeout=PATIENCE)[1]
    if process.returncode: raise RuntimeError(said[-1000:])
    return int(re.findall(r'file operations: (\d+)', said)[-1])

# ---- what must hold

def made(out):
    "The files that a command has made so far, at their final names or not."
    if out.is_dir(): return [path for path in out.rglob('*') if path.is_file()]
    return [path for path in (out, out.with_suffix('.mp4'), out.with_suffix('.json'))
            if path.is_file()]

def results(out, timed=()):
    "{name: fingerprint} of what a command is run for: weights, video, actions; without `timed`."
    kinds = ('.safetensors', '.mp4', '.npz')
    final = out/'final' if (out/'final').exists() else out
    found = {}
    for path in made(final):
        name = str(path.relative_to(out.parent)).removeprefix(out.name)
        if path.suffix not in kinds or any(part in name for part in timed): continue
        found[name] = sha256(path.read_bytes()).hexdigest()
    return found

def left_aside(out):
    "Halves that a killed process had under way and that nobody has removed."
    halves = [*out.parent.glob(f'.{out.name}.*.part*'), *out.rglob('.*.part*')]
    return [str(half.relative_to(out.parent)) for half in halves]

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
    for path in made(out):
        if any(part.startswith('.') for part in path.relative_to(out.parent).parts): continue
        try:
            whole(path)
        except Exception as problem:
            found.append(f'{path.relative_to(out.parent)}: {problem}')
    return found

@dataclass
class Truth:
    "A run that nobody disturbed: its seconds, its file operations and its results."
    seconds: float
    operations: int
    results: dict

def kill_once(job, kit, out, truth, rng, more):
    "Begin or go on, and kill; gives when, and whether it was still running then."
    if rng.random() < .5:
        moment = rng.uniform(0, truth.seconds)
        process = start(job, kit, out, more=more)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        when = f'after {moment:.2f} s'
    else:
        number = rng.randint(1, truth.operations)
        process = start(job, kit, out, number, more)
        when = f'before file operation {number}'
    said = process.communicate()[1]
    killed = process.returncode == -signal.SIGKILL
    if process.returncode and not killed: raise RuntimeError(said[-1000:])
    return when, killed

def trial(job, kit, out, truth, rng):
    "One run with one or two kills; gives the kills, when they were, and what is wrong, or None."
    kills = 0
    moments = []
    for i in range(rng.choice((1, 1, 2))):
        try:
            when, killed = kill_once(job, kit, out, truth, rng, job.again or () if i else ())
        except RuntimeError as problem:
            return kills, moments, f'does not go on: {problem}'
        moments.append(when)
        if not killed: break
        kills += 1
        broken = torn(out)
        if broken: return kills, moments, f'torn: {broken}'
        if job.again is None and made(out): break
    try:
        if kills and not (job.again is None and made(out)):
            finish(start(job, kit, out, more=job.again or ()))
    except RuntimeError as problem:
        return kills, moments, f'does not go on: {problem}'
    if left_aside(out): return kills, moments, f'left: {left_aside(out)}'
    same = results(out, job.timed) == truth.results
    return kills, moments, None if same else 'another result'

def make_takes(folder, video):
    "The kit's episodes as films of somebody's game: a log of rows beside each."
    from nfd_ref.video import VideoFolder, load_actions
    videos = VideoFolder(video)
    folder.mkdir()
    for i, episode in enumerate(videos.episodes):
        shutil.copy(video/f'{episode.name}.mp4', folder/f'{i}.mp4')
        shutil.copy(video/f'{episode.name}.npz', folder/f'{i}.npz')
        rows = [','.join(videos.space.fields)]
        for action in load_actions(video/f'{episode.name}.npz')[0]:
            chosen = zip(videos.space.fields.values(), action, strict=True)
            rows.append(','.join(choices[choice] for choices, choice in chosen))
        (folder/f'{i}.csv').write_text('\n'.join(rows) + '\n')

def kill(seconds, seed=0, names=tuple(JOBS)):
    "So many seconds of kills, the commands in turns; gives the number of kills and the findings."
    rng = random.Random(seed)
    names = [name for name in names if not JOBS[name].needs or find_spec(JOBS[name].needs)]
    findings = []
    truths = {}
    count = 0
    turn = 0
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        kit = make_kit(tmp/'kit')
        make_takes(kit/'takes', kit/'video')

        def truth_of(name):
            if name in truths: return truths[name]
            for other in JOBS[name].after: truth_of(other)
            began = time.time()
            operations = finish(start(JOBS[name], kit, tmp/name))
            took = time.time() - began
            truths[name] = Truth(took, operations, results(tmp/name, JOBS[name].timed))
            return truths[name]

        until = time.time() + seconds
        while time.time() < until:
            name = names[turn % len(names)]
            turn += 1
            truth = truth_of(name)
            out = tmp/f'{name}_{turn}'
            kills, moments, wrong = trial(JOBS[name], kit, out, truth, rng)
            count += kills
            done = dict(job=name, turn=turn, kills=kills, moments=moments, wrong=wrong)
            if wrong: findings.append(done)
            print(json.dumps(done), flush=True)
            if out.is_dir(): shutil.rmtree(out)
    return count, findings

if __name__ == '__main__':
    if sys.argv[1:2] == ['--die']: sys.exit(run_job(int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', nargs='+', choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    kills, found = kill(args.seconds, args.seed, args.jobs)
    print(f'{kills} kills, {len(found)} findings')
    sys.exit(bool(found))
