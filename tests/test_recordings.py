"Recordings as people have them: films of any size and rate, logs of keys and of rows."
import json
from fractions import Fraction

import av
import numpy as np
import pytest

from nfd_ref.recordings import pictures
from nfd_ref.video import VideoFolder, read_frames, write_video
from nfd_ref.vpt import MINEWORLD
from test_cli import fails, works
from test_video import turned
from test_vpt import tick

RATE = 30
LOG = [(.5, 'w', 'down'), (1.01, 'Key.space', 'press'), (1.02, 'Key.space', 'release'),
       (1.5, 'w', 'up')]

def counted(frames=60, height=60, width=90):
    "Frame i is grey of 4 i."
    grey = 4 * np.arange(frames, dtype=np.uint8)[:, None, None, None]
    return np.tile(grey, (1, height, width, 3))

def take(folder, name, log=LOG, frames=60, fps=RATE):
    folder.mkdir(exist_ok=True)
    write_video(folder/f'{name}.mp4', counted(frames), fps=fps)
    rows = ['time,key,event', *(','.join(map(str, row)) for row in log)]
    (folder/f'{name}.csv').write_text('\n'.join(rows))

@pytest.fixture
def takes(tmp_path):
    for name in ('a', 'b'): take(tmp_path/'takes', name)
    return tmp_path/'takes'

def said(videos, e=0):
    return [videos.space.label(action) for action in videos.clip(e).actions]

def test_a_log_of_keys(tmp_path, capsys, takes):
    out = works(capsys, 'import', tmp_path/'game', takes/'*.mp4', '--fps', 10)
    assert '2 episodes, 40 frames' in out
    videos = VideoFolder(tmp_path/'game')
    assert videos.size == (48, 80)
    assert videos.info.test == ('ep_00001',)
    wanted = [('start', 1), ('none', 5), ('w', 5), ('space w', 1), ('w', 4), ('none', 4)]
    assert said(videos) == [label for label, times in wanted for _ in range(times)]
    greys = videos.clip(0).frames.mean((1, 2, 3))
    np.testing.assert_allclose(greys, 12 * np.arange(20), atol=3)           # every third frame

def test_a_space_of_one_s_own(tmp_path, capsys, takes):
    space = dict(name='mine', fields=dict(go=['none', 'ahead']), keys=dict(w='ahead'))
    (tmp_path/'space.json').write_text(json.dumps(space))
    out = works(capsys, 'import', tmp_path/'game', takes, '--space', tmp_path/'space.json')
    assert 'keys that play nothing: space (2)' in out
    assert said(VideoFolder(tmp_path/'game'))[10:13] == ['none', 'ahead', 'ahead']

def test_a_film_that_lay_on_its_side_is_upright(tmp_path):
    film = counted(4, 64, 48)
    film[:, 32:] = 0                                # dark below
    write_video(tmp_path/'plain.mp4', np.rot90(film, 1, (1, 2)), fps=RATE)
    turned(tmp_path/'plain.mp4', tmp_path/'t.mp4', 0, 1, -1, 0)
    last, _ = list(pictures(tmp_path/'t.mp4', RATE, (64, 48)))[-1]
    np.testing.assert_allclose(last, film[-1], atol=4)

@pytest.mark.parametrize('suffix', ['csv', 'json', 'jsonl'])
def test_a_row_for_each_frame(tmp_path, capsys, suffix):
    rows = [dict(frame=i, move='left' if i == 6 else 'noop') for i in range(60)]
    for name in 'ab':
        write_video(tmp_path/f'{name}.mp4', counted(), fps=RATE)
        text = dict(
            csv='\n'.join(['frame,move', *(f'{row["frame"]},{row["move"]}' for row in rows)]),
            json=json.dumps(rows),
            jsonl='\n'.join(map(json.dumps, rows)))[suffix]
        (tmp_path/f'{name}.{suffix}').write_text(text)
    works(capsys, 'import', tmp_path/'game', tmp_path/'a.mp4', tmp_path/'b.mp4', '--fps', 15)
    videos = VideoFolder(tmp_path/'game')
    assert videos.space.fields == dict(move=('noop', 'left'))
    assert said(videos)[:6] == ['start', 'noop', 'noop', 'noop', 'left', 'noop']    # 6 led to 8

def test_frames_that_come_when_they_like_and_sound(tmp_path):
    "A screen recorder's file: frame 20 is shown for eight frames' time; beside it, a sound."
    mp4 = tmp_path/'v.mp4'
    with av.open(str(mp4), 'w') as out:
        stream = out.add_stream('libx264', rate=20)
        stream.height, stream.width, stream.pix_fmt = 48, 80, 'yuv444p'
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = out.add_stream('aac', rate=44100)
        hush = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
        hush.sample_rate = 44100
        for i, pixels in enumerate(counted(40, 48, 80)):
            frame = av.VideoFrame.from_ndarray(pixels, 'rgb24')
            frame.pts, frame.time_base = 50 * i + 350 * (i > 20), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(sound.encode(hush))
        for each in (stream, sound): out.mux(each.encode(None))
    numbers = [number for _, number in pictures(mp4, 20, (48, 80))]
    assert numbers[:47] == [*range(20), *[20] * 8, *range(21, 40)]

def test_two_parts_of_a_recording_stay_together(tmp_path, capsys, takes):
    works(capsys, 'import', tmp_path/'game', takes, '--fps', 10, '--length', 8)
    videos = VideoFolder(tmp_path/'game')
    assert [count for _, count in videos.episodes] == [8, 8, 4] * 2
    assert videos.info.test == ('ep_00003', 'ep_00004', 'ep_00005')
    assert [*said(videos, 0), *said(videos, 1), *said(videos, 2)][11] == 'space w'

@pytest.mark.parametrize('args, says', [
    (['--fps', 60], 'it has 30 frames a second, 60 are wanted'),
    (['--size', '84x84'], 'crop to 80x80 or pad to 96x96'),
    (['--fit', 'squeeze'], 'no way to fit called "squeeze"'),
    (['--test', 2], '2 of 2 recordings held out')])
def test_mistakes(tmp_path, capsys, takes, args, says):
    fails(capsys, tmp_path, 'import', tmp_path/'game', takes, *args, says=says)

def test_mistakes_in_logs(tmp_path, capsys, takes):
    def refused(says): fails(capsys, tmp_path, 'import', tmp_path/'game', takes, says=says)
    good = (takes/'a.csv').read_text()
    (takes/'a.csv').write_text('time,key,event\n500,w,down\n1500,w,up')
    refused('are these milliseconds?')
    (takes/'a.csv').write_text('time,key,event\nnoon,w,down')
    refused('a.csv, row 1: wanted time in seconds')
    (takes/'a.csv').write_text('move\nleft\nnone')
    (takes/'b.csv').write_text('move\nleft\nnone')
    refused('a.csv: 2 rows, but')
    (takes/'a.csv').write_text('x\n' + '\n'.join(map(str, np.linspace(0, 1, 99))))
    refused('column "x" has 99 different values')
    (takes/'a.csv').write_text(good)
    (takes/'b.csv').unlink()
    refused('b.mp4: no log beside it')

def test_vpt_in_one_command(tmp_path, capsys):
    for name in 'ab':
        write_video(tmp_path/f'{name}.mp4', counted(20, 90, 160), fps=20)
        lines = [tick(isGuiOpen=i == 9, keyboard=dict(keys=['key.keyboard.w'])) for i in range(20)]
        (tmp_path/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    works(capsys, 'import', tmp_path/'minecraft', tmp_path/'*.mp4', '--size', '96x48')
    videos = VideoFolder(tmp_path/'minecraft')
    assert (videos.space, videos.size) == (MINEWORLD, (48, 96))
    assert [count for _, count in videos.episodes] == [9, 10] * 2
    assert videos.info.test == ('ep_00002', 'ep_00003')     # no half of a recording on each side

def test_a_folder_gets_another_size(tmp_path, capsys, takes):
    "Also one whose size cannot be trained: it is padded."
    works(capsys, 'import', tmp_path/'game', takes, '--fps', 10)
    game = tmp_path/'game'
    for mp4 in game.glob('*.mp4'): write_video(mp4, read_frames(mp4, size=(84, 84)), fps=10)
    with pytest.raises(ValueError, match='pad to 96x96'): VideoFolder(game)
    works(capsys, 'import', tmp_path/'wide', game, '--fps', 10, '--size', '96x96', '--fit', 'pad')
    wide = VideoFolder(tmp_path/'wide')
    np.testing.assert_array_equal(wide.actions(0), np.load(game/'ep_00000.npz')['actions'])
    frame = wide.clip(0).frames[10]
    assert frame[:6].max() < 12 < frame[8:-8, 8:-8].min()
