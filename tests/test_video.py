"What is too long for notebook 00: cut files, every start, killed writers, many workers."
import io, json, os, re, signal, subprocess, sys, time, zipfile
from fractions import Fraction
from pathlib import Path
import av, numpy as np, pytest
from nfd_ref.video import *
from nfd_ref.video import DOOM9, MINEWORLD, NULL

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT/'data'/'my_way_home'

@pytest.fixture(scope='module')
def clip(): return VideoFolder(SHIPPED, 'test').clip(0, 0, 64)

@pytest.fixture
def folder(tmp_path, clip):
    return import_clips(tmp_path/'set', [clip[:32], clip[32:]], test=1).folder

def repack(src, dst, **options):
    "Copy the packets of a video into a file of another layout."
    with av.open(str(src)) as a, av.open(str(dst), 'w', options=options) as b:
        out = b.add_stream_from_template(a.streams.video[0])
        for p in a.demux(video=0):
            if p.dts is not None: p.stream = out; b.mux(p)

# ---- reading

@pytest.mark.parametrize('gop', [30, 250])
def test_every_start_equals_sequential(tmp_path, gop):
    mp4 = SHIPPED/'ep_00015.mp4'
    whole = read_frames(mp4)
    if gop != 30: write_video(tmp_path/'long.mp4', whole[:200], gop=gop); mp4 = tmp_path/'long.mp4'; whole = read_frames(mp4)
    for s in range(len(whole)):
        n = 1 + s % 3
        if s + n <= len(whole): np.testing.assert_array_equal(read_frames(mp4, s, s + n), whole[s:s+n], err_msg=f'start {s}')

@pytest.mark.parametrize('fps', [12.5, 17.5, 20, 30, 29.97])
def test_every_start_at_other_rates(tmp_path, clip, fps):
    write_video(tmp_path/'v.mp4', clip.frames, fps=fps, gop=10)
    whole = read_frames(tmp_path/'v.mp4')
    assert video_info(tmp_path/'v.mp4') == (64, (48, 80))
    for s in range(0, 63): np.testing.assert_array_equal(read_frames(tmp_path/'v.mp4', s, s + 2), whole[s:s+2])

CUTS = 0, 7, 100, .1, .25, .5, .75, .99
@pytest.mark.parametrize('layout,keep', [*(('index at the end', k) for k in CUTS), *(('index in front', k) for k in (*CUTS, -1))])   # at the end, the last byte is a comment
def test_cut_video_is_named(folder, layout, keep):
    mp4 = folder/'ep_00000.mp4'
    if layout == 'index in front': repack(mp4, folder/'.front.mp4', movflags='faststart'); os.replace(folder/'.front.mp4', mp4); VideoFolder(folder)
    data = mp4.read_bytes()
    mp4.write_bytes(data[:int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match='ep_00000.mp4'): VideoFolder(folder)
    with pytest.warns(UserWarning, match='1 of 2 episodes skipped; first: .*ep_00000.mp4'): assert len(VideoFolder(folder, on_bad='skip')) == 1

@pytest.mark.parametrize('keep', [.3, .6, .9])
def test_video_cut_after_opening_is_named(folder, keep):
    videos, mp4 = VideoFolder(folder), folder/'ep_00000.mp4'
    repack(mp4, folder/'.front.mp4', movflags='faststart')
    mp4.write_bytes((folder/'.front.mp4').read_bytes()[:int(mp4.stat().st_size * keep)])
    with pytest.raises(ValueError, match='ep_00000.mp4'): videos.clip(0)

@pytest.mark.parametrize('part', range(16))
def test_cut_actions_are_named(folder, part):
    npz = folder/'ep_00001.npz'; data = npz.read_bytes()
    npz.write_bytes(data[:len(data) * part // 16])
    with pytest.raises(ValueError, match='ep_00001.npz'): VideoFolder(folder)

def test_flipped_byte_in_actions_is_named(folder):
    npz = folder/'ep_00001.npz'; data = bytearray(npz.read_bytes()); data[len(data) // 3] ^= 255; npz.write_bytes(data)
    with pytest.raises(ValueError, match='ep_00001'): VideoFolder(folder)

@pytest.mark.parametrize('bad', [b'', b'junk' * 99, 'npy', 'pickle'])
def test_other_files_as_actions(folder, bad):
    b = io.BytesIO()
    if bad == 'npy': np.save(b, np.zeros((32, 1), int))
    elif bad == 'pickle': np.savez(b, actions=np.array([{}], dtype=object))
    else: b.write(bad)
    (folder/'ep_00000.npz').write_bytes(b.getvalue())
    with pytest.raises(ValueError, match='ep_00000.npz'): VideoFolder(folder)

def test_uneven_timing_is_refused(tmp_path, clip):
    "A screen recorder's file: frame 20 is shown for eight frames' time."
    with av.open(str(tmp_path/'v.mp4'), 'w') as out:
        s = out.add_stream('libx264', rate=20); s.height, s.width, s.pix_fmt = 48, 80, 'yuv444p'; s.codec_context.time_base = Fraction(1, 1000)
        for k, f in enumerate(clip.frames):
            v = av.VideoFrame.from_ndarray(f, 'rgb24'); v.pts, v.time_base = 50 * k + 350 * (k > 20), Fraction(1, 1000); out.mux(s.encode(v))
        out.mux(s.encode(None))
    with pytest.raises(ValueError, match='v.mp4: its frames are not evenly spaced'): video_info(tmp_path/'v.mp4')
    assert len(read_frames(tmp_path/'v.mp4')) == 64       # whole, in order, it can be read: load_vpt does

def test_only_audio_or_a_folder(tmp_path):
    with av.open(str(tmp_path/'a.mp4'), 'w') as out:
        s = out.add_stream('aac', rate=44100); f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono'); f.sample_rate = 44100
        out.mux(s.encode(f)); out.mux(s.encode(None))
    with pytest.raises(ValueError, match='a.mp4: holds no video'): video_info(tmp_path/'a.mp4')
    (tmp_path/'d.mp4').mkdir()
    with pytest.raises(ValueError, match='d.mp4'): read_frames(tmp_path/'d.mp4')

@pytest.mark.parametrize('meta', ['[]', '{}', '{"fps": "x"}', '{"fps": 20, "action_space": 3}', '{"fps": 20, "action_space": {"name": "a", "fields": ["b"]}}', '{"fps": 20, "action_space": {"name": "a", "fields": {"b": ["one"]}}}', '{"fps":'])
def test_bad_dataset_json_is_named(folder, meta):
    (folder/'dataset.json').write_text(meta)
    with pytest.raises(ValueError, match='dataset.json'): VideoFolder(folder)

# ---- writing

def test_same_frames_same_bytes(tmp_path, clip):
    "x264 with AVX-512 read uninitialised memory on small frames; litter the heap and look again."
    rng, seen = np.random.default_rng(0), set()
    for i in range(16):
        litter = [rng.integers(0, 255, rng.integers(1000, 20000), dtype=np.uint8) for _ in range(rng.integers(1, 60))]
        if i % 2: del litter
        write_video(tmp_path/'v.mp4', clip.frames[:40]); seen.add((tmp_path/'v.mp4').read_bytes())
    assert len(seen) == 1

def test_no_time_of_day_in_actions(folder):
    with zipfile.ZipFile(folder/'ep_00000.npz') as z: assert {i.date_time for i in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_write_aside_leaves_nothing(tmp_path, error):
    (tmp_path/'old.txt').write_text('old')
    with pytest.raises(error):
        with write_aside(tmp_path/'old.txt') as t: t.write_text('new'); raise error
    with pytest.raises(error):
        with write_aside(tmp_path/'dir') as t: t.mkdir(); (t/'x').write_text('x'); raise error
    assert [p.name for p in tmp_path.iterdir()] == ['old.txt'] and (tmp_path/'old.txt').read_text() == 'old'

def test_failing_frames_leave_nothing(tmp_path, clip):
    def frames(): yield from clip.frames[:10]; raise OSError('the camera fell off')
    with pytest.raises(OSError, match='fell off'): write_video(tmp_path/'v.mp4', frames())
    def clips(): yield clip; raise OSError('the camera fell off')
    with pytest.raises(OSError, match='fell off'): import_clips(tmp_path/'set', clips())
    assert not list(tmp_path.iterdir())

def test_killed_writer_leaves_no_episode(tmp_path, clip, folder):
    "SIGKILL in the middle of a video: the folder reads as before."
    code = f'import itertools, numpy as np; from nfd_ref.video import *\ndef f():\n  for i in itertools.count(): yield np.full((48, 80, 3), i % 255, np.uint8); print(i, flush=True)\nwrite_video({str(folder/"ep_00002.mp4")!r}, f())'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=ROOT) as p:
        for _ in range(50): p.stdout.readline()
        p.kill()
    assert len(list(folder.glob('.ep_00002.*.part.mp4'))) == 1 and not (folder/'ep_00002.mp4').exists()
    assert len(VideoFolder(folder)) == 2

# ---- VPT

def tick(**kw): return dict(mouse=dict(dx=0, dy=0, buttons=[]), keyboard=dict(keys=[])) | kw

@pytest.mark.parametrize('keep', [.2, .5, .8, .99])
def test_cut_jsonl_is_named(tmp_path, keep):
    text = '\n'.join(json.dumps(tick(hotbar=i)) for i in range(9))
    (tmp_path/'a.jsonl').write_text(text[:int(len(text) * keep)])
    with pytest.raises(ValueError, match=r'a.jsonl, line \d+: not a tick of VPT'): vpt_actions(tmp_path/'a.jsonl')

@pytest.mark.parametrize('line', ['', '[]', '3', '{"mouse": 1, "keyboard": {"keys": []}}', '{"mouse": {"dx": 0}, "keyboard": {"keys": []}}', '{"mouse": {"dx": "a", "dy": 0, "buttons": []}, "keyboard": {"keys": []}}', '{"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {"keys": [3]}}'])
def test_odd_lines_are_named(tmp_path, line):
    (tmp_path/'a.jsonl').write_text('\n'.join([json.dumps(tick()), line, json.dumps(tick())]))
    with pytest.raises(ValueError, match='a.jsonl, line 2: not a tick'): vpt_actions(tmp_path/'a.jsonl')

def test_line_separators_inside_text_are_no_lines(tmp_path):
    "People type strange characters into the chat; `splitlines` would cut there."
    t = tick(); t['keyboard']['chars'] = 'a\u2028b\x85c'
    (tmp_path/'a.jsonl').write_text('\r\n'.join(json.dumps(t, ensure_ascii=False) for _ in range(3)) + '\r\n\r\n', encoding='utf8')
    assert len(vpt_actions(tmp_path/'a.jsonl')[0]) == 3

@pytest.mark.parametrize('gui,lengths', [('', [12]), ('0-11', []), ('0-3', [8]), ('8-11', [8]), ('4', [4, 7]), ('1,3', [8]), ('4-5,9', [4, 3, 2])])
def test_gui_spans(tmp_path, clip, gui, lengths):
    open_ = {i for a in filter(None, gui.split(',')) for i in range(int(a.split('-')[0]), int(a.split('-')[-1]) + 1)}
    write_video(tmp_path/'a.mp4', clip.frames[:12])
    ticks = [tick(isGuiOpen=i in open_, keyboard=dict(keys=['key.keyboard.w'] if i % 2 else [])) for i in range(12)]
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, ticks)))
    clips, whole = load_vpt(tmp_path/'a.mp4', tmp_path/'a.jsonl', size=(48, 80)), read_frames(tmp_path/'a.mp4', size=(48, 80))
    assert [len(c) for c in clips] == lengths
    for c in clips:
        s = next(i for i in range(12) if np.array_equal(whole[i:i+len(c)], c.frames))      # no frame left out
        assert not open_ & set(range(s, s + len(c))) and (c.actions[0] == NULL).all()
        assert [MINEWORLD.label(a) for a in c.actions[1:]] == ['forward' if (i - 1) % 2 else 'none' for i in range(s + 1, s + len(c))]

# ---- the recorder

def rec_code(out, **kw): return f"from nfd_ref.video import *\nif __name__ == '__main__': record({str(out)!r}, Recorder(length=60), episodes=6, test=2, seed=3, **{kw!r})"

def descendants(pid):
    "This process and all below it (Linux), parents first."
    below = [int(s.parent.name) for s in Path('/proc').glob('[0-9]*/stat') if (t := s.read_text() if s.exists() else '') and int(t.rsplit(')', 1)[1].split()[1]) == pid]
    return [pid] + [d for b in below for d in descendants(b)]

def test_workers_change_nothing(tmp_path):
    pytest.importorskip('vizdoom')
    sets = [record(tmp_path/str(w), Recorder(length=60), episodes=6, test=2, seed=3, workers=w) for w in (1, 2, 3)]
    assert len({s.hash() for s in sets}) == 1 and len({record(tmp_path/'1', Recorder(length=60), 6, 2, 3).hash(), sets[0].hash()}) == 1
    assert record(tmp_path/'other', Recorder(length=60), 6, 2, seed=4).hash() != sets[0].hash()

def test_killed_recording_goes_on(tmp_path):
    pytest.importorskip('vizdoom')
    shared = lambda: set(Path('/dev/shm').glob('ViZDoom*'))
    before = shared()
    p = subprocess.Popen([sys.executable, '-c', rec_code(tmp_path/'a', workers=1)], cwd=ROOT, stderr=subprocess.DEVNULL)
    t = time.time()
    while not list((tmp_path/'a').glob('ep_*.npz')) and time.time() - t < 120: time.sleep(.01)
    for pid in descendants(p.pid):                         # all but Python's own cleaner, which removes the semaphores
        if b'resource_tracker' not in Path(f'/proc/{pid}/cmdline').read_bytes(): os.kill(pid, signal.SIGKILL)
    p.wait()
    for f in shared() - before: f.unlink()                 # what a killed engine cannot tidy
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path/'a').glob('ep_*.npz')}
    assert 0 < len(done) < 6, 'killed too late to test anything'
    (tmp_path/'a'/'.ep_00005.1.part.mp4').write_bytes(b'half')
    a = record(tmp_path/'a', Recorder(length=60), episodes=6, test=2, seed=3, workers=2)
    assert {n: (tmp_path/'a'/n).stat().st_mtime_ns for n in done} == done                    # what was whole is kept
    assert not list((tmp_path/'a').glob('.*')) and len(a) == 6
    assert a.hash() == record(tmp_path/'b', Recorder(length=60), episodes=6, test=2, seed=3, workers=1).hash()

def test_shipped_set_can_be_played_again():
    vizdoom = pytest.importorskip('vizdoom')
    v = VideoFolder(SHIPPED); made = v.meta['recorder']
    if vizdoom.__version__ != made['vizdoom']: pytest.skip('another version of ViZDoom')
    rec = Recorder(**{k: made[k] for k in Recorder.__dataclass_fields__}); g = doom_game(rec)
    for e in (1, 2, 7):                                                                       # short ones
        c, d = v.clip(e), play_doom(g, rec, e)
        np.testing.assert_array_equal(c.actions, d.actions); np.testing.assert_array_equal(c.pose, d.pose)
        assert 10 * np.log10(255**2 / ((c.frames.astype(float) - d.frames)**2).mean()) > 30
    g.close()

def test_recording_without_vizdoom_says_so(tmp_path):
    code = f"import sys; sys.modules['vizdoom'] = None\nimport nfd_ref.video as v\nfor f in (lambda: v.doom_game(v.Recorder()), lambda: v.record({str(tmp_path/'x')!r})):\n  try: f()\n  except ImportError as e: print(e)"
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.count('pip install "nfd_ref[record]"') == 2 and not (tmp_path/'x').exists()

# ---- what data/README.md tells people to do

def test_readme_recipes_run(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video('recording.mp4', clip.frames.repeat(2, 1).repeat(2, 2)); np.save('recording_actions.npy', np.where(clip.actions > 3, 0, clip.actions))
    write_video('a.mp4', clip.frames); write_video('b.mp4', clip.frames)
    for n in 'ab': Path(f'{n}.jsonl').write_text('\n'.join(json.dumps(tick()) for _ in range(64)))
    blocks = re.findall(r'```python\n(.*?)```', (ROOT/'data'/'README.md').read_text(), re.S)
    assert len(blocks) == 3
    for b in blocks: exec(b, {})
    assert [len(VideoFolder(d)) for d in ('my_game', 'my_mp4s', 'minecraft')] == [4, 1, 2]
    assert VideoFolder('minecraft').space.sizes == MINEWORLD.sizes == (21, 21, 10, 3, 3, 3, 3, 2, 3)
    assert VideoFolder('my_game', 'test').episodes == [('ep_00003', 64)]
    example = json.loads(re.search(r'```json\n(.*?)```', (ROOT/'data'/'README.md').read_text(), re.S)[1])
    assert ActionSpace(**example['action_space']) == VideoFolder('my_game').space
