"What is too long for notebook 00: cut files, every start, killed writers, odd strips."
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nfd_ref.mp4 import timeline
from nfd_ref.storage import write_aside
from nfd_ref.video import (
    ActionSpace, VideoFolder, film_strip, import_clips, load_actions, read_frames, video_info,
    write_video)

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT/'data'/'my_way_home'

@pytest.fixture(scope='module')
def clip(): return VideoFolder(SHIPPED, 'test').clip(0, 0, 64)

@pytest.fixture
def folder(tmp_path, clip):
    return import_clips(tmp_path/'set', [clip[:32], clip[32:]], test=1).folder

def repack(source, target, **options):
    "Copy the packets of a video into a file of another layout."
    with av.open(str(source)) as old, av.open(str(target), 'w', options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is None: continue
            packet.stream = stream
            new.mux(packet)

# ---- film strips

def drawn(fig):
    "The pixels of a figure, and for each of its axes the rows and columns it covers."
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3]
    boxes = []
    for ax in fig.axes:
        left, bottom, right, top = ax.get_window_extent().extents.round().astype(int)
        boxes.append((slice(len(page) - top, len(page) - bottom), slice(left, right)))
    return page, boxes

@pytest.mark.parametrize('height,width,factor', [(48, 80, 2), (48, 64, 3), (90, 160, 1)])
@pytest.mark.parametrize('title', [None, 'a title'])
def test_strip_shows_every_pixel(height, width, factor, title):
    frames = np.random.default_rng(0).integers(0, 256, (9, height, width, 3), dtype=np.uint8)
    page, boxes = drawn(film_strip({'one': frames, 'the other': 255 - frames}, 3, title=title))
    wanted = [film[i] for film in (frames, 255 - frames) for i in (0, 4, 8)]
    assert len(boxes) == len(wanted)
    for box, frame in zip(boxes, wanted):
        np.testing.assert_array_equal(page[box], frame.repeat(factor, 0).repeat(factor, 1))

def test_strip_fits_the_page_with_large_frames():
    page, boxes = drawn(film_strip(np.zeros((2, 224, 384, 3), np.uint8), columns=6))
    assert len(boxes) == 2 and page[boxes[0]].shape == (99, 170, 3)

def test_strip_labels_stay_off_the_frames(clip):
    "With white frames, whatever is written is dark, and none of it lies inside a frame."
    white = np.full_like(clip.frames, 255)
    captions = ['a rather long caption that has to be folded into lines'] * len(white)
    fig = film_strip({'row\nof two lines': white, 'a long label': white}, captions=captions)
    page, boxes = drawn(fig)
    for box in boxes: assert (page[box] == 255).all()
    assert (page < 128).any()
    extents = [text.get_window_extent() for text in fig.texts]
    for i, extent in enumerate(extents):
        assert not any(extent.overlaps(other) for other in extents[:i])
        assert extent.x0 >= 0 and extent.y0 >= 0
        assert extent.x1 <= page.shape[1] and extent.y1 <= page.shape[0]

def test_strip_of_two_films_ends_with_the_shorter(clip):
    fig = film_strip({'long': clip.frames, 'short': clip.frames[:5]})
    assert [text.get_text() for text in fig.texts[:5]] == [f'frame {i}' for i in range(5)]
    assert len(fig.axes) == 10

# ---- reading

@pytest.mark.parametrize('gop', [30, 250])
def test_every_start_equals_sequential(tmp_path, gop):
    mp4 = SHIPPED/'ep_00015.mp4'
    whole = read_frames(mp4)
    if gop != 30:
        mp4 = tmp_path/'long.mp4'
        write_video(mp4, whole[:200], gop=gop)
        whole = read_frames(mp4)
    for start in range(len(whole)):
        stop = start + 1 + start % 3
        if stop > len(whole): continue
        np.testing.assert_array_equal(read_frames(mp4, start, stop), whole[start:stop],
                                      err_msg=f'start {start}')

@pytest.mark.parametrize('fps', [12.5, 17.5, 20, 30, 29.97])
def test_every_start_at_other_rates(tmp_path, clip, fps):
    mp4 = tmp_path/'v.mp4'
    write_video(mp4, clip.frames, fps=fps, gop=10)
    whole = read_frames(mp4)
    assert video_info(mp4) == (64, (48, 80))
    for start in range(63):
        np.testing.assert_array_equal(read_frames(mp4, start, start + 2), whole[start:start + 2])

CUTS = 0, 7, 100, .1, .25, .5, .75, .99
LAYOUTS = [
    *(('index at the end', keep) for keep in CUTS),
    *(('index in front', keep) for keep in (*CUTS, -1))]    # at the end, the last byte is a comment

@pytest.mark.parametrize('layout,keep', LAYOUTS)
def test_cut_video_is_named(folder, layout, keep):
    mp4 = folder/'ep_00000.mp4'
    if layout == 'index in front':
        repack(mp4, folder/'.front.mp4', movflags='faststart')
        os.replace(folder/'.front.mp4', mp4)
        VideoFolder(folder)
    data = mp4.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    mp4.write_bytes(data[:size])
    with pytest.raises(ValueError, match='ep_00000.mp4'): VideoFolder(folder)
    with pytest.warns(UserWarning, match='1 of 2 episodes skipped; first: .*ep_00000.mp4'):
        assert len(VideoFolder(folder, on_bad='skip')) == 1

@pytest.mark.parametrize('keep', [.3, .6, .9])
def test_video_cut_after_opening_is_named(folder, keep):
    videos = VideoFolder(folder)
    mp4 = folder/'ep_00000.mp4'
    size = int(mp4.stat().st_size * keep)
    repack(mp4, folder/'.front.mp4', movflags='faststart')
    mp4.write_bytes((folder/'.front.mp4').read_bytes()[:size])
    with pytest.raises(ValueError, match='ep_00000.mp4'): videos.clip(0)

@pytest.mark.parametrize('part', range(16))
def test_cut_actions_are_named(folder, part):
    npz = folder/'ep_00001.npz'
    data = npz.read_bytes()
    npz.write_bytes(data[:len(data) * part // 16])
    with pytest.raises(ValueError, match='ep_00001.npz'): VideoFolder(folder)

def test_flipped_byte_in_actions_is_named(folder):
    npz = folder/'ep_00001.npz'
    data = bytearray(npz.read_bytes())
    data[len(data) // 3] ^= 255
    npz.write_bytes(data)
    with pytest.raises(ValueError, match='ep_00001'): VideoFolder(folder)

def test_one_thread_at_a_time_reads_actions(folder, monkeypatch):
    "Python up to 3.11 may raise SystemError where two threads parse an array's header at once."
    inside = threading.Semaphore(1)
    load = np.load

    def slow(*args, **kwargs):
        assert inside.acquire(blocking=False), 'two threads at once'
        time.sleep(0.01)
        inside.release()
        return load(*args, **kwargs)

    monkeypatch.setattr(np, 'load', slow)
    with ThreadPoolExecutor(4) as pool:
        for actions, _ in pool.map(load_actions, [folder/'ep_00000.npz'] * 8):
            assert len(actions)

@pytest.mark.parametrize('bad', [b'', b'junk' * 99, 'npy', 'pickle'])
def test_other_files_as_actions(folder, bad):
    buffer = io.BytesIO()
    if bad == 'npy': np.save(buffer, np.zeros((32, 1), int))
    elif bad == 'pickle': np.savez(buffer, actions=np.array([{}], dtype=object))
    else: buffer.write(bad)
    (folder/'ep_00000.npz').write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match='ep_00000.npz'): VideoFolder(folder)

def test_uneven_timing_is_refused(tmp_path, clip):
    "A screen recorder's file: frame 20 is shown for eight frames' time."
    tick = Fraction(1, 1000)
    mp4 = tmp_path/'v.mp4'
    with av.open(str(mp4), 'w') as out:
        stream = out.add_stream('libx264', rate=20)
        stream.height = 48
        stream.width = 80
        stream.pix_fmt = 'yuv444p'
        stream.codec_context.time_base = tick
        for i, pixels in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(pixels, 'rgb24')
            frame.pts = 50 * i + 350 * (i > 20)
            frame.time_base = tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(ValueError, match='v.mp4: its frames are not evenly spaced'):
        video_info(mp4)
    assert len(read_frames(mp4)) == 64       # whole, in order, it can be read: load_vpt does

def test_only_audio_or_a_folder(tmp_path):
    with av.open(str(tmp_path/'a.mp4'), 'w') as out:
        stream = out.add_stream('aac', rate=44100)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format='fltp', layout='mono')
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(ValueError, match='a.mp4: holds no video'): video_info(tmp_path/'a.mp4')
    (tmp_path/'d.mp4').mkdir()
    with pytest.raises(ValueError, match='d.mp4'): read_frames(tmp_path/'d.mp4')

BAD_META = [
    '[]',
    '{}',
    '{"fps": "x"}',
    '{"fps": 20, "action_space": 3}',
    '{"fps": 20, "action_space": {"name": "a", "fields": ["b"]}}',
    '{"fps": 20, "action_space": {"name": "a", "fields": {"b": ["one"]}}}',
    '{"fps": 20, "action_space": {"name": "a", "fields": {"b": 3}}}',
    '{"fps": "20", "action_space": {"name": "a", "fields": {"b": ["one", "two"]}}}',
    '{"fps": 20, "action_space": {"name": "a", "fields": {"b": ["one", "two"]}}, "tset": []}',
    '{"fps": 20, "action_space": {"name": "a", "fields": {"b": ["one", "two"]}}, "test": [[]]}',
    '{"fps":']

@pytest.mark.parametrize('meta', BAD_META)
def test_bad_dataset_json_is_named(folder, meta):
    (folder/'dataset.json').write_text(meta)
    with pytest.raises(ValueError, match='dataset.json'): VideoFolder(folder)

def test_the_shipped_data_is_what_it_was():
    assert VideoFolder(SHIPPED).hash() == '72af36efab52ef1c'
    assert VideoFolder(SHIPPED, 'train').hash() == 'bfccc768c0b48e80'
    assert VideoFolder(SHIPPED, 'test').hash() == '3df0c430d34b6bdb'

# ---- files that others wrote

OTHERS = {                              # name: (codec, its options)
    'plain.mp4': ('libx264', {}),
    'open.mp4': ('libx264', {'x264-params': 'open-gop=1'}),
    'x265.mp4': ('libx265', {'x265-params': 'log-level=none'}),     # its groups are open by default
    'far.mp4': ('libx264', {'g': '999'}),
    'never.mp4': ('libx264', {'x264-params': 'intra-refresh=1'}),   # renewed strip by strip
    'vp9.mp4': ('libvpx-vp9', {'deadline': 'realtime', 'cpu-used': '8'}),
    'old.mp4': ('mpeg4', {}),
    'older.mp4': ('mpeg2video', {'bf': '2'}),
    'a.mkv': ('libx264', {}),
    'a.avi': ('libx264', {}),           # has no time stamps
    'a.mov': ('libx264', {}),
    'a.ts': ('libx264', {})}            # its first one is not 0
TRIMMED = {'cut.mp4': 'plain.mp4', 'cut x265.mp4': 'x265.mp4'}
COUNT = 48

@pytest.fixture(scope='module')
def others(tmp_path_factory, clip):
    "A folder of them, and two that were trimmed without being encoded again."
    folder = tmp_path_factory.mktemp('others')
    for name, (codec, options) in OTHERS.items():
        with av.open(str(folder/name), 'w') as out:
            stream = out.add_stream(codec, rate=20)
            stream.height = 48
            stream.width = 80
            stream.pix_fmt = 'yuv420p'
            stream.options = {'g': '12'} | options
            for pixels in clip.frames[:COUNT]:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, 'rgb24')))
            out.mux(stream.encode(None))
    for name, source in TRIMMED.items(): trim(folder/source, folder/name, 17)
    return folder

def trim(source, target, first):
    "What `ffmpeg -ss ... -c copy` does: packets from a key frame on, an edit list hides some."
    with av.open(str(source)) as old, av.open(str(target), 'w') as new:
        video = old.streams.video[0]
        stream = new.add_stream_from_template(video)
        begin = int(first / video.average_rate / video.time_base)
        old.seek(begin, stream=video)
        for packet in old.demux(video):
            if packet.dts is None: continue
            packet.pts -= begin
            packet.dts -= begin
            packet.stream = stream
            new.mux(packet)

def as_played(path):
    "Every frame that a player shows, in order."
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])

@pytest.mark.parametrize('name', [*OTHERS, *TRIMMED])
def test_every_start_and_length_of_any_file(others, name):
    shown = as_played(others/name)
    assert len(shown) == (COUNT - 17 if name in TRIMMED else COUNT)
    assert video_info(others/name) == (len(shown), (48, 80))
    np.testing.assert_array_equal(read_frames(others/name), shown)
    for start in range(len(shown)):
        for length in (1 + start % 5, 20):
            if start + length > len(shown): continue
            np.testing.assert_array_equal(read_frames(others/name, start, start + length),
                                          shown[start:start + length], err_msg=f'start {start}')
    with pytest.raises(ValueError, match='shorter'): read_frames(others/name, 3, len(shown) + 1)

def test_of_a_trimmed_file_the_shown_frames_count(others):
    with av.open(str(others/'cut.mp4')) as container:
        stored = sum(packet.size > 0 for packet in container.demux(video=0))
    assert stored > video_info(others/'cut.mp4')[0] == COUNT - 17

@pytest.mark.parametrize('kind', ['mp4', 'mkv'])
@pytest.mark.parametrize('fps', [5, 10, 50])
def test_time_stamps_count_and_not_the_rate_in_the_header(tmp_path, clip, kind, fps):
    "The header says 20 frames a second."
    path = tmp_path/f'v.{kind}'
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('libx264', rate=20)
        stream.height = 48
        stream.width = 80
        stream.pix_fmt = 'yuv420p'
        stream.options = {'g': '10'}
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(clip.frames[:30]):
            frame = av.VideoFrame.from_ndarray(pixels, 'rgb24')
            frame.pts = 1000 * i // fps
            frame.time_base = Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert timeline(path).rate == pytest.approx(fps)
    assert video_info(path) == (30, (48, 80))
    shown = as_played(path)
    for start in range(30):
        np.testing.assert_array_equal(read_frames(path, start, start + 1), shown[start:start + 1])

QUARTERS = {
    'as it is': (1, 0, 0, 1, lambda film: film),
    'to the right': (0, 1, -1, 0, lambda film: np.rot90(film, -1, (1, 2))),
    'on its head': (-1, 0, 0, -1, lambda film: np.rot90(film, 2, (1, 2))),
    'to the left': (0, -1, 1, 0, lambda film: np.rot90(film, 1, (1, 2))),
    'in a mirror': (-1, 0, 0, 1, lambda film: film[:, :, ::-1]),
    'in water': (1, 0, 0, -1, lambda film: film[:, ::-1])}

def turned(source, target, a, b, c, d):
    "A copy whose header says how to turn it: the matrix of the track."
    data = bytearray(source.read_bytes())
    at = data.index(b'tkhd') + 44
    matrix = [a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30]
    data[at:at + 36] = np.array(matrix, dtype='>i4').tobytes()
    target.write_bytes(data)

@pytest.mark.parametrize('how', QUARTERS)
def test_a_turned_film_is_upright(others, tmp_path, how):
    *matrix, turn = QUARTERS[how]
    turned(others/'plain.mp4', tmp_path/'t.mp4', *matrix)
    upright = turn(as_played(others/'plain.mp4'))
    np.testing.assert_array_equal(read_frames(tmp_path/'t.mp4'), upright)
    np.testing.assert_array_equal(read_frames(tmp_path/'t.mp4', 30, 33), upright[30:33])
    assert video_info(tmp_path/'t.mp4') == (COUNT, upright.shape[1:3])
    small = read_frames(tmp_path/'t.mp4', 0, 1, size=(24, 40))[0].astype(float)
    tall = upright.shape[1] > upright.shape[2]
    if not tall: assert np.abs(small - upright[0, ::2, ::2]).mean() < 12
    assert small.shape == (24, 40, 3)

def test_a_slanting_film_is_refused(others, tmp_path):
    turned(others/'plain.mp4', tmp_path/'t.mp4', 1, 1, -1, 1)
    with pytest.raises(ValueError, match='t.mp4: turned by an angle that is no quarter'):
        video_info(tmp_path/'t.mp4')

def test_damage_is_seen_when_it_is_decoded(others, tmp_path):
    "One to eight bits turned over: most are refused; a lenient reader says nothing."
    source = others/'plain.mp4'
    whole = source.read_bytes()
    plain = as_played(source)
    with av.open(str(source)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(40):
        spoilt = bytearray(whole)
        for at in rng.integers(min(places), max(places), rng.integers(1, 9)):
            spoilt[at] ^= 1 << rng.integers(8)
        (tmp_path/'v.mp4').write_bytes(spoilt)
        try:
            if not np.array_equal(read_frames(tmp_path/'v.mp4'), plain): refused.append(False)
        except ValueError as e:
            assert 'v.mp4' in str(e)
            refused.append(True)
    assert np.mean(refused) > .75

def test_a_file_that_changes_is_looked_at_again(tmp_path, clip):
    write_video(tmp_path/'v.mp4', clip.frames[:30])
    assert len(read_frames(tmp_path/'v.mp4', 3)) == 27
    write_video(tmp_path/'v.mp4', clip.frames[:40])
    assert len(read_frames(tmp_path/'v.mp4', 3)) == 37

def test_another_rate_than_dataset_json_says(folder):
    meta = json.loads((folder/'dataset.json').read_text())
    (folder/'dataset.json').write_text(json.dumps(meta | dict(fps=30)))
    with pytest.raises(ValueError, match='ep_00000.mp4: 20 FPS by its time stamps, 30 by'):
        VideoFolder(folder)

@pytest.mark.parametrize('old, new', [
    ('ep_00001.mp4', 'ep_00001.MP4'),
    ('ep_00001.npz', 'ep_00001.NPZ'),
    ('ep_00000.mp4', 'ep_00000.mkv')])
def test_other_endings_are_named(folder, old, new):
    (folder/old).rename(folder/new)
    with pytest.raises(FileNotFoundError, match=f'{old}: no such file, but {new} is there'):
        VideoFolder(folder)

def test_a_whole_film_is_in_memory_once(others):
    tracemalloc.start()
    film = read_frames(others/'plain.mp4', size=(224, 384))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1.2 * film.nbytes

# ---- writing

def test_an_episode_is_written_as_it_always_was(tmp_path, clip):
    "The bytes of files that others may have fingerprinted: actions and pose, no time of day."
    videos = VideoFolder(SHIPPED)
    whole = videos.clip(1)
    import_clips(tmp_path/'set', [whole], test=0)
    assert (tmp_path/'set'/'ep_00000.npz').read_bytes() == (SHIPPED/'ep_00001.npz').read_bytes()

def test_same_frames_same_bytes(tmp_path, clip):
    "x264 with AVX-512 read uninitialised memory on small frames; litter the heap and look again."
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(16):
        pieces = rng.integers(1, 60)
        litter = [rng.integers(0, 255, rng.integers(1000, 20000), dtype=np.uint8)
                  for _ in range(pieces)]
        if i % 2: del litter
        write_video(tmp_path/'v.mp4', clip.frames[:40])
        seen.add((tmp_path/'v.mp4').read_bytes())
    assert len(seen) == 1

def test_no_time_of_day_in_actions(folder):
    with zipfile.ZipFile(folder/'ep_00000.npz') as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}

def test_failing_frames_leave_nothing(tmp_path, clip):
    def frames():
        yield from clip.frames[:10]
        raise OSError('the camera fell off')
    def clips():
        yield clip
        raise OSError('the camera fell off')
    with pytest.raises(OSError, match='fell off'): write_video(tmp_path/'v.mp4', frames())
    with pytest.raises(OSError, match='fell off'): import_clips(tmp_path/'set', clips())
    assert not list(tmp_path.iterdir())

ENDLESS = '''
import itertools
import numpy as np
from nfd_ref.video import write_video

def frames():
    for i in itertools.count():
        yield np.full((48, 80, 3), i % 255, np.uint8)
        print(i, flush=True)

write_video({path!r}, frames())
'''

def test_killed_writer_leaves_no_episode(folder):
    "SIGKILL in the middle of a video: the folder reads as before."
    code = ENDLESS.format(path=str(folder/'ep_00002.mp4'))
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=ROOT) as p:
        for _ in range(50): p.stdout.readline()
        p.kill()
    assert len(list(folder.glob('.ep_00002.*.part.mp4'))) == 1
    assert not (folder/'ep_00002.mp4').exists()
    assert len(VideoFolder(folder)) == 2

def test_a_killed_folder_is_no_folder(tmp_path, clip):
    "What `write_aside` leaves behind when it is killed does not count as an episode or a file."
    with write_aside(tmp_path/'a.mp4') as aside:
        write_video(aside, clip.frames[:2])
        assert aside.name.startswith('.') and not (tmp_path/'a.mp4').exists()

# ---- what data/README.md tells people to do

def test_the_recipe_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT/'data'/'README.md').read_text()
    block, = re.findall(r'```python\n(.*?)```', text, re.S)
    exec(block, {})
    videos = VideoFolder('my_game')
    assert len(videos) == 4
    assert VideoFolder('my_game', 'test').episodes == [('ep_00003', 64)]
    example = json.loads(re.search(r'```json\n(.*?)```', text, re.S)[1])
    assert ActionSpace(**example['action_space']) == videos.space
