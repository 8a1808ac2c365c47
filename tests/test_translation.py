"""Video in the look of a world: a tiny one on shipped video, and the command."""
import signal
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nfd_ref import translation
from nfd_ref.cli import main
from nfd_ref.streaming import World
from nfd_ref.tokenizer import load_tokenizer
from nfd_ref.translation import LOOKS, still, translate
from nfd_ref.transformer import DiT, DiTConfig
from nfd_ref.video import VideoFolder, save_episode, video_info

DATA = Path(__file__).parents[1]/'data'

@pytest.fixture(scope='module')
def clip(): return VideoFolder(DATA/'my_way_home', 'test').clip(1, 300, 310)

@pytest.fixture(scope='module')
def world(clip):
    torch.manual_seed(0)
    dit = DiT(DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), window=4))
    for p in dit.parameters(): nn.init.normal_(p, std=.1)
    return World(dit, load_tokenizer(DATA/'world'), clip.space, (48, 80), device='cpu',
                 engine='rolling', sampler='consistency', steps=2)

def made(*args, **kwargs): return np.stack(list(translate(*args, **kwargs)))

def test_a_stream_looks_back_and_not_ahead(world, clip):
    whole = made(world, clip, .5, calls=2)
    assert whole.shape == clip.frames.shape
    assert np.array_equal(made(world, clip[:6], .5, calls=2), whole[:6])
    other = replace(clip, frames=np.concatenate([255 - clip.frames[:1], clip.frames[1:]]))
    changed = made(world, other, .5, calls=2)
    assert not np.array_equal(changed[1], whole[1])

@pytest.mark.parametrize('engine', ('recompute', 'rebuild', 'static'))
def test_every_engine_begins_without_a_past(world, clip, engine):
    other = World(world.model, world.tok, clip.space, (48, 80), device='cpu', engine=engine,
                  sampler='consistency', steps=2)
    error = np.abs(made(other, clip, .5).astype(int) - made(world, clip, .5))
    assert error.max() <= 1

def test_each_frame_alone_has_no_past(world, clip):
    alone = made(world, clip, .5, remember=False)
    other = replace(clip, frames=np.concatenate([255 - clip.frames[:1], clip.frames[1:]]))
    assert np.array_equal(made(world, other, .5, remember=False)[1:], alone[1:])

def test_a_past_in_the_own_look_is_seen(world, clip):
    assert not np.array_equal(made(world, clip[4:], .5, past=clip[:4]), made(world, clip[4:], .5))

def test_little_strength_changes_little(world, clip):
    through = world.tok.decode(world.tok.encode(clip.frames)).numpy()
    assert np.abs(made(world, clip, .001).astype(int) - through).mean() < 2

def test_looks_keep_the_shape(clip):
    for look in LOOKS.values():
        bad = look(clip.frames)
        assert bad.shape == clip.frames.shape and bad.dtype == np.uint8

def test_a_still_picture_is_a_start(world, clip):
    start = still(clip.frames[0], clip.space, 6)
    assert (start.frames == clip.frames[0]).all() and start.actions[0, 0] == -1
    world.reset(start)
    assert world.step(1).shape == (48, 80, 3)

def test_command(tmp_path, clip, capsys):
    save_episode(tmp_path, 'in', replace(clip, frames=LOOKS['grey'](clip.frames)))
    def run(*words): return main(['translate', str(tmp_path/'in.mp4'), *map(str, words)])
    asked = ('--actions', tmp_path/'in.npz', '--out', tmp_path/'out.mp4', '--engine', 'rolling')
    assert run(*asked, '--look', tmp_path/'in.mp4') == 0
    assert video_info(tmp_path/'out.mp4') == (10, (48, 80))
    with av.open(str(tmp_path/'out.mp4')) as film:      # for people: every player shows 4:2:0
        assert film.streams.video[0].pix_fmt == 'yuv420p'
    assert run('--actions', tmp_path/'none.npz', '--out', tmp_path/'o.mp4') == 2
    assert 'no such action file' in capsys.readouterr().err
    assert run(*asked, '--strength', '1') == 2
    assert 'a noise level in (0, 1)' in capsys.readouterr().err

def test_the_command_keeps_what_it_has_when_stopped(tmp_path, clip, capsys, monkeypatch):
    def stopped(*args):
        for i, frame in enumerate(translate(*args)):
            if i == 3: signal.raise_signal(signal.SIGINT)
            yield frame
    monkeypatch.setattr(translation, 'translate', stopped)
    save_episode(tmp_path, 'in', clip)
    out = tmp_path/'out.mp4'
    asked = ('--actions', tmp_path/'in.npz', '--out', out, '--engine', 'rolling')
    assert main(['translate', str(tmp_path/'in.mp4'), *map(str, asked)]) == 130
    assert video_info(out)[0] == 4
    assert 'stopped after frame 4 of 10' in capsys.readouterr().err

def test_play_starts_from_a_picture(tmp_path, clip, capsys):
    Image.fromarray(clip.frames[0]).resize((160, 96)).save(tmp_path/'a.png')
    (tmp_path/'b.png').write_text('no picture')
    def run(name): return main(['play', '--picture', str(tmp_path/name), '--frames', '2',
                                '--engine', 'rolling', '--out', str(tmp_path/'p.mp4')])
    assert run('a.png') == 0
    assert run('b.png') == 2
    assert 'not a picture' in capsys.readouterr().err
