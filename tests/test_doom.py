"What is too long for notebook 00b: many workers, killed recordings, the shipped set once more."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from nfd_ref.doom import Recorder, doom_game, drawn_at, observe, play_doom, record, recorder_of
from nfd_ref.guidance import is_flat
from nfd_ref.video import VideoFolder
from test_video import ROOT, SHIPPED

SHORT = Recorder(length=60)
PLAN = dict(episodes=6, test=2, seed=3)

CODE = '''
from nfd_ref.doom import Recorder, record
if __name__ == '__main__':
    record({folder!r}, Recorder(length=60), episodes=6, test=2, seed=3, workers=1)
'''

def parent(pid):
    "Of a process (Linux); None where it has ended."
    try:
        stat = Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return None
    return int(stat.rsplit(')', 1)[1].split()[1])

def descendants(pid):
    "This process and all below it, parents first."
    found = [pid]
    everyone = [int(path.name) for path in Path('/proc').glob('[0-9]*')]
    for child in everyone:
        if parent(child) == pid: found += descendants(child)
    return found

def kill_all(pid):
    "Kill a recording, all but Python's own cleaner, which removes the semaphores."
    for each in descendants(pid):
        if b'resource_tracker' in Path(f'/proc/{each}/cmdline').read_bytes(): continue
        os.kill(each, signal.SIGKILL)

def shared_by(pids):
    "Files in /dev/shm that these processes share: engines of other tests have theirs beside them."
    maps = [Path(f'/proc/{pid}/maps').read_text() for pid in pids]
    return {Path(line.split()[-1]) for lines in maps for line in lines.splitlines()
            if '/dev/shm/ViZDoom' in line and not line.endswith('(deleted)')}

@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    pytest.importorskip('vizdoom')
    sets = [record(tmp_path/f'{workers}', SHORT, **PLAN, workers=workers) for workers in (1, 3)]
    assert len({videos.hash() for videos in sets}) == 1
    assert record(tmp_path/'1', SHORT, **PLAN).hash() == sets[0].hash()
    other = record(tmp_path/'other', SHORT, **(PLAN | dict(seed=4)))
    assert other.hash() != sets[0].hash()

@pytest.mark.slow
def test_bare_episodes_are_played_again(tmp_path):
    pytest.importorskip('vizdoom')
    as_it_comes = record(tmp_path/'all', SHORT, episodes=6, test=1, seed=2)
    chosen = record(tmp_path/'chosen', replace(SHORT, tours=.2, flattest=.25), episodes=6, test=1,
                    seed=2)
    def bare(videos): return [is_flat(clip.frames).mean() for clip in map(videos.clip, range(6))]
    assert max(bare(as_it_comes)) > .25 >= max(bare(chosen))
    assert recorder_of(as_it_comes) == (SHORT, 2)
    with pytest.raises(ValueError, match='chosen, not to be reached again'): recorder_of(chosen)

@pytest.mark.slow
def test_killed_recording_goes_on(tmp_path):
    pytest.importorskip('vizdoom')
    code = CODE.format(folder=str(tmp_path/'a'))
    p = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stderr=subprocess.DEVNULL)
    started = time.time()
    while not list((tmp_path/'a').glob('ep_*.npz')) and time.time() - started < 120:
        time.sleep(.01)
    left = shared_by(descendants(p.pid))
    kill_all(p.pid)
    p.wait()
    for path in left: path.unlink(missing_ok=True)      # what a killed engine cannot tidy

    def written():
        return {path: path.stat().st_mtime_ns for path in (tmp_path/'a').glob('ep_*.npz')}
    done = written()
    assert 0 < len(done) < 6, 'killed too late to test anything'
    (tmp_path/'a'/'.ep_00005.999999999.part.mp4').write_bytes(b'half')
    videos = record(tmp_path/'a', SHORT, **PLAN, workers=2)
    assert written() | done == written()                # what was whole is kept
    assert not list((tmp_path/'a').glob('.*')) and len(videos) == 6
    assert videos.hash() == record(tmp_path/'b', SHORT, **PLAN, workers=1).hash()

def wait_for(happened, seconds=120):
    started = time.time()
    while not happened() and time.time() - started < seconds: time.sleep(.05)
    assert happened()

@pytest.mark.slow
@pytest.mark.parametrize('stop', (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_stopped_recording_leaves_nobody_behind(tmp_path, stop):
    pytest.importorskip('vizdoom')
    folder = tmp_path/'a'
    command = ['record', folder, '--episodes', '400', '--length', '40', '--workers', '2']
    p = subprocess.Popen([sys.executable, '-m', 'nfd_ref.cli', *command], cwd=ROOT,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(folder.glob('ep_*.npz')))
    everyone = descendants(p.pid)
    assert len(everyone) > 3                            # workers, and their games
    p.send_signal(stop)                                 # the parent alone
    said = p.communicate(timeout=60)[1]
    wait_for(lambda: not any(map(parent, everyone)), 30)
    if stop == signal.SIGKILL: return
    assert p.returncode == 130 and 'the same command goes on' in said
    assert not list(folder.glob('.*'))

def test_shipped_set_can_be_played_again():
    vizdoom = pytest.importorskip('vizdoom')
    videos = VideoFolder(SHIPPED)
    if vizdoom.__version__ != videos.info.recorder['vizdoom']:
        pytest.skip('another version of ViZDoom')
    rec, seed = recorder_of(videos)
    assert (rec.crf, rec.length, seed) == (18, 600, 0)
    game = doom_game(rec)
    for e in (1, 2, 7):         # short ones
        stored = videos.clip(e)
        played = play_doom(game, rec, e)
        np.testing.assert_array_equal(stored.actions, played.actions)
        np.testing.assert_array_equal(stored.pose, played.pose)
        error = ((stored.frames.astype(float) - played.frames)**2).mean()
        assert 10 * np.log10(255**2 / error) > 30
    game.close()

def coded(path):
    "The frames of a film as they are coded. (Around them stands the version of FFmpeg.)"
    with av.open(path) as film: return [bytes(packet) for packet in film.demux()]

@pytest.mark.slow
def test_shipped_episode_is_recorded_again_to_the_byte(tmp_path):
    vizdoom = pytest.importorskip('vizdoom')
    videos = VideoFolder(SHIPPED)
    if vizdoom.__version__ != videos.info.recorder['vizdoom']:
        pytest.skip('another version of ViZDoom')
    rec, seed = recorder_of(videos)
    record(tmp_path/'a', rec, episodes=2, test=1, seed=seed, workers=1)
    for name in ('ep_00000.npz', 'ep_00001.npz'):
        assert (tmp_path/'a'/name).read_bytes() == (SHIPPED/name).read_bytes(), name
    assert coded(tmp_path/'a'/'ep_00001.mp4') == coded(SHIPPED/'ep_00001.mp4')

WITHOUT = '''
import sys
sys.modules['vizdoom'] = None
from nfd_ref.doom import Recorder, doom_game, record
def game(): doom_game(Recorder())
def recording(): record({folder!r})
for action in (game, recording):
    try:
        action()
    except ImportError as e:
        print(e)
'''

@pytest.mark.parametrize('width, height, drawn', [
    (80, 48, '256X144'),
    (64, 64, '160X120'),
    (384, 224, '400X225'),
    (320, 240, '320X240'),
    (321, 100, '400X225'),
    (8, 225, '320X240')])
def test_drawn_at_least_as_large_as_asked(width, height, drawn):
    assert drawn_at(Recorder(width=width, height=height)) == drawn

def test_frames_too_large_for_the_simulator_are_refused():
    with pytest.raises(ValueError, match='frames of 2048x1152: ViZDoom draws at most 1920X1080'):
        drawn_at(Recorder(width=2048, height=1152))

def test_the_paper_s_size_is_no_enlargement():
    rec = Recorder(width=384, height=224)
    game = doom_game(rec)
    game.new_episode()
    screen = game.get_state().screen_buffer
    frame, _, _ = observe(game, rec)
    game.close()
    assert screen.shape[:2] == (225, 400) and frame.shape == (224, 384, 3)

def test_recording_without_vizdoom_says_so(tmp_path):
    code = WITHOUT.format(folder=str(tmp_path/'x'))
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                       check=True)
    assert p.stdout.count('pip install "nfd_ref[record]"') == 2 and not (tmp_path/'x').exists()
