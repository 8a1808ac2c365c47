"A play that is stopped, a play that is long, and films that cannot be written."
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfd_ref import cli
from nfd_ref.play import gif_timing, play, write_gif
from nfd_ref.storage import (
    BenchRecord, GrowthRecord, PlayRecord, require_out, require_record, write_json, write_record)
from nfd_ref.video import ActionSpace, read_frames, video_info

SPACE = ActionSpace('two', dict(go=('no', 'yes')))
DATA = Path(__file__).parents[1]/'data'

class Noise:
    "A stand-in for a world: frame i is noise. At frame `stops_at` someone presses Ctrl-C."
    space = SPACE
    fps = 20

    def __init__(self, stops_at=None): self.stops_at = stops_at
    def action(self, a): return a
    def reset(self, clip): self.count = 0

    def step(self, action):
        self.count += 1
        if self.count == self.stops_at: os.kill(os.getpid(), signal.SIGINT)
        numbers = np.random.default_rng(self.count)
        return numbers.integers(0, 255, (16, 16, 3), dtype=np.uint8)

def at_rest(frames): return np.zeros((frames, 1), int)

def test_ctrl_c_keeps_the_films_so_far(tmp_path):
    paths = [tmp_path/'a.mp4', tmp_path/'a.gif']
    frames, speed = play(Noise(stops_at=7), None, at_rest(20), paths, progress=False)
    assert len(frames) == speed.frames == 7
    assert video_info(paths[0])[0] == 7
    assert Image.open(paths[1]).n_frames == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.gif', 'a.mp4']

def test_two_ctrl_c_stop_at_once_and_leave_nothing_half(tmp_path):
    class Deaf(Noise):
        def step(self, action):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().step(action)
    with pytest.raises(KeyboardInterrupt):
        play(Deaf(), None, at_rest(20), [tmp_path/'a.mp4', tmp_path/'a.gif'], progress=False)
    assert not list(tmp_path.iterdir())

@pytest.mark.slow
def test_the_command_keeps_the_film_and_says_where_it_stopped(tmp_path):
    words = ('play', '--frames', '100000', '--out', tmp_path/'a.mp4')
    process = subprocess.Popen([sys.executable, '-m', 'nfd_ref.cli', *words], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = ''
    while '/100000' not in seen and process.poll() is None: seen += process.stderr.read(1)
    time.sleep(4)                                       # not a terminal: the next line is far away
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    count = video_info(tmp_path/'a.mp4')[0]
    assert process.returncode == 130
    assert count >= 20
    assert out.startswith(f'{count} frames at ')
    assert f'stopped after frame {count} of 100000' in err

def test_a_push_is_played_and_said(tmp_path, capsys):
    words = ['play', '--frames', '2', '--out', str(tmp_path/'a.mp4'), '--guidance']
    assert cli.main([*words, '1.5']) == 0
    assert 'steps, guidance 1.5, engine' in capsys.readouterr().out
    assert cli.main([*words, '21']) == 2
    assert 'guidance is between 0 and 20, not 21' in capsys.readouterr().err

def test_memory_does_not_grow_with_the_frames(tmp_path):
    def most(frames):
        tracemalloc.start()
        play(Noise(), None, at_rest(frames), [tmp_path/'a.mp4', tmp_path/'a.gif'],
             progress=False, keep=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    most(20)
    assert most(170) - most(20) < 150 * 3000           # a drawn frame is 12 kB

def test_a_gif_shows_the_frames_that_were_given(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (8, 3), dtype=np.uint8)
    frames = colours[np.random.default_rng(1).integers(0, 8, (5, 12, 17))]
    write_gif(tmp_path/'a.gif', frames, fps=10)
    with Image.open(tmp_path/'a.gif') as gif:
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert gif.info['duration'] == 100
            assert np.array_equal(np.asarray(gif.convert('RGB')), frame)

@pytest.mark.parametrize('rate', [12.5, 20, 30, 60])
def test_a_gif_keeps_time(tmp_path, rate):
    frames = np.random.default_rng(0).integers(0, 255, (40, 12, 16, 3), dtype=np.uint8)
    write_gif(tmp_path/'a.gif', frames, rate)
    shown, durations = gif_timing(40, rate)
    with Image.open(tmp_path/'a.gif') as gif:
        assert gif.n_frames == len(shown)
        found = []
        for i in range(gif.n_frames):
            gif.seek(i)
            found.append(gif.info['duration'])
    assert found[:-1] == durations[:-1]

# ---- where nothing can be written, nothing is begun

def other_files(folder):
    "{name: what stands there} of files that no film and no record may replace."
    (folder/'file').write_text('mine')
    (folder/'notes.mp4').write_text('not a film at all')
    (folder/'notes.gif').write_text('not a picture')
    (folder/'notes.json').write_text('{"mine": 1}')
    (folder/'list.json').write_text('[1]')
    (folder/'folder.mp4').mkdir()
    return {path: path.read_text() for path in folder.iterdir() if path.is_file()}

@pytest.mark.parametrize('words, says', [
    ('--out T/a.avi', 'can write .mp4 and .gif'),
    ('--out T/a.mp4 --gif T/a.mp4', 'can write .gif'),
    ('--out T/notes.mp4', 'is not replaced'),
    ('--out T/a.mp4 --gif T/notes.gif', 'is not replaced'),
    ('--out T/folder.mp4', 'not a file'),
    ('--out T/file/a.mp4', 'is a file, not a folder'),
    ('--out T/notes.mp4 --keys', 'is no PlayRecord and is not replaced'),
    ('--out T/a.gif --keys', 'can write .mp4'),
    ('--out /proc/nowhere/a.mp4', '/proc'),
    ('--out T/notes.mp4 --replay none.json', 'is not replaced')])
def test_a_film_is_tried_before_the_world_is_loaded(tmp_path, capsys, words, says):
    before = other_files(tmp_path)
    args = ['play', 'nowhere', *words.replace('T/', f'{tmp_path}/').split()]
    assert cli.main(args) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_text() for path in before} == before

def test_what_is_ours_is_replaced(tmp_path):
    for _ in range(2): play(Noise(), None, at_rest(2), tmp_path/'a.mp4', progress=False)
    assert len(read_frames(tmp_path/'a.mp4')) == 2
    (tmp_path/'empty.gif').touch()
    require_out(tmp_path/'empty.gif', '.gif')
    write_json(tmp_path/'a.json', dict(setting={}, weights='', clip='', actions='', frames=1,
                                       digest='', fps=1, kind='play', format=7, more=1))
    require_record(tmp_path/'a.json', PlayRecord)

@pytest.mark.parametrize('words', [
    'bench --out T/notes.json', 'bench --out T/list.json', 'bench --growth --out T/notes.json',
    'bench --speculate --out T/notes.json', 'bench --out T/notes.txt',
    'evaluate --out T/r.json --leaderboard T/notes.json', 'evaluate --out T/file/r.json',
    'distill compare T --out T/notes.json', 'translate T/notes.mp4 --actions a --out T/notes.gif',
    'translate T/notes.mp4 --actions a --out T/notes.mp4'])
def test_only_a_file_of_our_own_kind_is_replaced(tmp_path, capsys, words):
    before = other_files(tmp_path)
    args = words.replace('T/', f'{tmp_path}/').replace(' T ', f' {tmp_path} ').split()
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert any(text in said for text in ('not replaced', 'can write', 'not a folder')), said
    assert {path: path.read_text() for path in before} == before

def test_a_record_replaces_only_its_own_kind(tmp_path):
    path = tmp_path/'world.json'
    write_json(path, dict(format=1, kind='world', shape={}))
    for record in (BenchRecord(card={}, machine={}, ladder={}), GrowthRecord(
            card={}, machine={}, frames=(), window=(), steps=(), batch=(), size=())):
        with pytest.raises(ValueError, match='is not replaced'): write_record(path, record)
