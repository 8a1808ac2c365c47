"""A game that nobody here wrote, from recording to play, by the commands of data/README.md: the
mountain car of Gymnasium. Trained for a minute, so it shows that the way leads there, no more."""
import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nfd_ref.video import VideoFolder, video_info, write_video
from test_cli import Terminal, works

README = Path(__file__).parents[1]/'data'/'README.md'
PUSH = 'left', 'none', 'right'          # the actions 0, 1, 2 of MountainCar-v0
TAKES = 4
FRAMES = 90

LESS = {                                # what makes each command small
    'train tokenizer': ('--steps', 30, '--batch', 8),
    'train world': ('--steps', 12, '--batch', 4, '--length', 8),
    'release': ('--clips', 4),
    'play': ('--frames', 12),
    'train idm': ('--steps', 8, '--batch', 8),
    'evaluate': ('--quick',),
    'distill consistency': ('--steps', 2, '--batch', 1, '--length', 6, '--clips', 1)}

def record(folder):
    "Somebody pushes the car to and fro. Films of 600x400 pixels, and a row for each frame."
    gym = pytest.importorskip('gymnasium')
    pytest.importorskip('pygame')
    os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
    env = gym.make('MountainCar-v0', render_mode='rgb_array', max_episode_steps=FRAMES + 1)
    folder.mkdir()
    for take in range(TAKES):
        env.reset(seed=take)
        rng = np.random.default_rng(take)
        pushes = rng.integers(0, 3, FRAMES // 9 + 1).repeat(9)[:FRAMES]
        frames = []
        for push in pushes:
            frames.append(env.render())
            env.step(int(push))                         # chosen on seeing this frame
        write_video(folder/f'take_{take}.mp4', frames, fps=20, pix_fmt='yuv420p')
        with open(folder/f'take_{take}.csv', 'w', newline='') as file:
            table = csv.writer(file)
            table.writerows([['push'], *([PUSH[push]] for push in pushes)])

def commands():
    "Those of the README, word by word."
    block = re.search(r'<!-- the commands -->\n```\n(.*?)```', README.read_text(), re.S)[1]
    return [line.split()[1:] for line in block.splitlines()]

@pytest.mark.slow
@pytest.mark.long
def test_a_second_game_by_the_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(tmp_path/'takes')
    space = dict(name='car', fields=dict(push=PUSH), keys=dict(j='left', l='right'))
    Path('my_space.json').write_text(json.dumps(space))

    said = {}
    for words in commands():
        name = ' '.join(words[:2]) if ' '.join(words[:2]) in LESS else words[0]
        if '--keys' in words: continue                  # below, behind a terminal
        said[' '.join(words)] = works(capsys, *words, *LESS.get(name, ()))

    videos = VideoFolder('my_game')
    assert (len(videos), videos.frames, videos.size) == (TAKES, TAKES * FRAMES, (48, 80))
    assert videos.info.test == ('ep_00003',)
    moved = [list(action) for action in videos.clip(0).actions[1:10]]
    assert moved == [moved[0]] * 9                      # a push is held for nine frames
    everything = '\n'.join(said.values())
    assert 'million parameters; 12 steps of 4 clips of 8 frames: about' in everything
    assert 'PSNR of changed pixels' in everything
    assert 'left out: counterfactual, memory' in everything
    assert '-> nfd-ref play runs/distilled/final\n' in everything       # it needs no --data
    assert video_info('play.mp4')[0] == 12
    in_a_terminal()
    in_a_notebook()

def in_a_terminal():
    "Stand, push, stand, leave."
    terminal = Terminal('play', 'my_world', '--keys', '--out', 'keys.mp4')
    seen = terminal.read('frames/s')
    assert 'j left' in seen + terminal.read('x leave')
    assert re.search(r'none +\d', seen), 'it moves unasked'
    terminal.press('l')
    terminal.read('right ')
    terminal.press(' x')
    terminal.read('keys.json')
    assert os.waitpid(terminal.pid, 0)[1] == 0
    assert 'right' in json.loads(Path('keys.json').read_text())['actions']

def in_a_notebook():
    "The widget, played by its own messages: no browser."
    from nfd_ref.player import Player
    player = Player('my_world', out='films')
    try:
        player.hear(dict(view='me', what='keys', held=['KeyJ'], press=1))
        assert player.session.hands.read()[0] == [PUSH.index('left')]
        player.hear(dict(view='me', what='keys', held=[], press=2))
        assert player.session.hands.read()[0] == [PUSH.index('none')]
        assert player.menu()['codes']['KeyL'] == 'right'
        assert len(player.starts) > 0
    finally:
        player.close()
