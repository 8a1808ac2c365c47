"What is too long for notebook 00c: cut files, odd lines, every kind of GUI span."
import json
import tracemalloc

import numpy as np
import pytest

from nfd_ref.video import NULL, VideoFolder, read_frames, write_video
from nfd_ref.vpt import MINEWORLD, load_vpt, vpt_actions
from test_video import SHIPPED

@pytest.fixture(scope='module')
def clip(): return VideoFolder(SHIPPED, 'test').clip(0, 0, 64)

def tick(**more): return dict(mouse=dict(dx=0, dy=0, buttons=[]), keyboard=dict(keys=[])) | more

@pytest.mark.parametrize('keep', [.2, .5, .8, .99])
def test_cut_jsonl_is_named(tmp_path, keep):
    text = '\n'.join(json.dumps(tick(hotbar=i)) for i in range(9))
    (tmp_path/'a.jsonl').write_text(text[:int(len(text) * keep)])
    with pytest.raises(ValueError, match=r'a.jsonl, line \d+: not a tick of VPT'):
        vpt_actions(tmp_path/'a.jsonl')

ODD_LINES = [
    '',
    '[]',
    '3',
    '{"mouse": 1, "keyboard": {"keys": []}}',
    '{"mouse": {"dx": 0}, "keyboard": {"keys": []}}',
    '{"mouse": {"dx": "a", "dy": 0, "buttons": []}, "keyboard": {"keys": []}}',
    '{"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {"keys": [3]}}']

@pytest.mark.parametrize('line', ODD_LINES)
def test_odd_lines_are_named(tmp_path, line):
    (tmp_path/'a.jsonl').write_text('\n'.join([json.dumps(tick()), line, json.dumps(tick())]))
    with pytest.raises(ValueError, match='a.jsonl, line 2: not a tick'):
        vpt_actions(tmp_path/'a.jsonl')

def test_line_separators_inside_text_are_no_lines(tmp_path):
    "People type strange characters into the chat; `splitlines` would cut there."
    line = tick()
    line['keyboard']['chars'] = 'a\u2028b\x85c'
    text = '\r\n'.join(json.dumps(line, ensure_ascii=False) for _ in range(3))
    (tmp_path/'a.jsonl').write_text(text + '\r\n\r\n', encoding='utf8')
    assert len(vpt_actions(tmp_path/'a.jsonl')[0]) == 3

GUI = [
    ([], [12]),
    (range(12), []),
    (range(4), [8]),
    (range(8, 12), [8]),
    ([4], [4, 7]),
    ([1, 3], [8]),
    ([4, 5, 9], [4, 3, 2])]

@pytest.mark.parametrize('gui,lengths', GUI)
def test_gui_spans(tmp_path, clip, gui, lengths):
    write_video(tmp_path/'a.mp4', clip.frames[:12])
    lines = []
    for i in range(12):
        keys = ['key.keyboard.w'] if i % 2 else []
        lines.append(json.dumps(tick(isGuiOpen=i in gui, keyboard=dict(keys=keys))))
    (tmp_path/'a.jsonl').write_text('\n'.join(lines))
    clips = load_vpt(tmp_path/'a.mp4', tmp_path/'a.jsonl', size=(48, 80))
    whole = read_frames(tmp_path/'a.mp4', size=(48, 80))
    assert [len(made) for made in clips] == lengths

    for made in clips:
        count = len(made)
        start = next(i for i in range(12) if np.array_equal(whole[i:i + count], made.frames))
        frames = range(start, start + count)                # no frame was left out
        assert not set(gui) & set(frames) and (made.actions[0] == NULL).all()
        said = [MINEWORLD.label(action) for action in made.actions[1:]]
        assert said == ['forward' if (i - 1) % 2 else 'none' for i in frames[1:]]

def test_a_recording_is_in_memory_once(tmp_path, clip):
    write_video(tmp_path/'a.mp4', clip.frames)
    (tmp_path/'a.jsonl').write_text('\n'.join(json.dumps(tick()) for _ in range(len(clip))))
    load_vpt(tmp_path/'a.mp4', tmp_path/'a.jsonl')          # what is loaded only once
    tracemalloc.start()
    one, = load_vpt(tmp_path/'a.mp4', tmp_path/'a.jsonl')
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1.2 * one.frames.nbytes
