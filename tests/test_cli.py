"The command as a new user meets it: it plays, and every mistake is one line that says what to do, leaving nothing half-written."
import json, os, pty, re, select, shutil, subprocess, sys, time
from pathlib import Path
import av, numpy as np, pytest
from nfd_ref import cli
from nfd_ref.video import VideoFolder, video_info, read_frames

ROOT = Path(__file__).parents[1]
WORLD, DATA = ROOT/'data'/'world', ROOT/'data'/'my_way_home'

def run(capsys, *args):
    code = cli.main([str(a) for a in args]); out = capsys.readouterr()
    return code, out.out, out.err

def files(d): return sorted(str(p.relative_to(d)) for p in Path(d).rglob('*'))

def fails(capsys, folder, *args, says):
    "The command fails with one line that says `says`, and leaves `folder` as it was."
    before = files(folder); code, _, err = run(capsys, *args)
    line = [l for l in err.splitlines() if l.startswith('nfd-ref ')]
    assert code != 0 and len(line) == 1 and says in line[0] and 'Traceback' not in err, err
    assert files(folder) == before

def test_help_reads_well():
    r = subprocess.run([Path(sys.executable).with_name('nfd-ref'), '--help'], capture_output=True, text=True); assert r.returncode == 0
    for c in ('play', 'record', 'branches', 'train', 'distill', 'release', 'evaluate', 'bench', 'build', 'lab'): assert re.search(rf'^    {c} ', r.stdout, re.M)
    for c in (['play'], ['record'], ['train', 'world'], ['train', 'tokenizer'], ['train', 'idm'], ['distill', 'consistency'], ['bench'], ['branches'], ['release'], ['evaluate'], ['build'], ['lab']):
        assert subprocess.run([Path(sys.executable).with_name('nfd-ref'), *c, '--help'], capture_output=True).returncode == 0

@pytest.mark.parametrize('world, how', [('world', '4 euler steps'), ('distilled', '2 consistency steps')])
def test_play_writes_what_it_made_and_says_how_fast(tmp_path, capsys, world, how):
    code, out, _ = run(capsys, 'play', WORLD.parent/world, '--frames', 30, '--out', tmp_path/'a.mp4', '--gif', tmp_path/'a.gif')
    assert code == 0 and files(tmp_path) == ['a.gif', 'a.mp4'] and video_info(tmp_path/'a.mp4')[0] == 30
    assert re.search(r'30 frames at \d+\.\d FPS', out) and f'80x48 pixels, {how}, engine native, CPU' in out
    assert read_frames(tmp_path/'a.mp4').std(0).mean() > 5          # it moves

def test_play_is_reproducible(tmp_path, capsys):
    for n in 'ab': run(capsys, 'play', '--actions', 'forward*6, turn left*6', '--out', tmp_path/f'{n}.mp4')
    assert (tmp_path/'a.mp4').read_bytes() == (tmp_path/'b.mp4').read_bytes()
    run(capsys, 'play', '--actions', 'forward*6, turn left*6', '--seed', 1, '--out', tmp_path/'c.mp4')
    assert (tmp_path/'a.mp4').read_bytes() != (tmp_path/'c.mp4').read_bytes()

@pytest.fixture
def world(tmp_path): shutil.copytree(WORLD, tmp_path/'w'); return tmp_path/'w'

def test_mistakes_in_the_arguments(tmp_path, capsys):
    f = lambda *a, says: fails(capsys, tmp_path, *a, '--out', tmp_path/'o.mp4', says=says)
    f('play', tmp_path/'nowhere', says='no such folder')
    f('play', WORLD/'world.json', says='no such folder')
    f('play', '--data', tmp_path/'nowhere', says='no such folder of video')
    f('play', '--steps', 0, says='at least 1 is needed')
    f('play', '--engine', 'warp', says='no engine "warp"')
    f('play', '--engine', 'static+fp4', says='after + comes bf16')
    f('play', '--frames', -5, says='at least 1')
    f('play', '--frames', 0, says='at least 1')
    f('play', '--clip', 99, says='held-out episodes, 0..')
    f('play', '--start', 100000, says='wanted, it has')
    f('play', '--actions', 'fly*3', says='no choice "fly"')
    f('play', '--actions', 'forward*0', says='1 or more')
    f('play', '--device', 'cuda', says='no CUDA GPU') if not __import__('torch').cuda.is_available() else None
    fails(capsys, tmp_path, 'play', '--out', tmp_path/'film.avi', '--frames', 2, says='can write .mp4 and .gif')
    f('play', '--keys', says='needs a terminal')
    fails(capsys, tmp_path, 'record', tmp_path/'r', '--size', '80by48', says='wanted WIDTHxHEIGHT')
    fails(capsys, tmp_path, 'record', tmp_path/'r', '--scenario', 'nowhere', says='no ViZDoom scenario') if __import__('importlib').util.find_spec('vizdoom') else None
    fails(capsys, tmp_path, 'train', 'world', '--data', DATA, '--out', tmp_path/'t', '--tokenizer', tmp_path, says='no such file')
    fails(capsys, tmp_path, 'train', 'tokenizer', '--data', DATA, '--out', tmp_path/'t', '--steps', 0, says='steps is 0')

def test_bench(tmp_path, capsys):
    code, out, _ = run(capsys, 'bench', '--engines', 'recompute,static+bf16', '--frames', 2, '--device', 'cpu', '--out', tmp_path/'b.json')
    lines = out.splitlines(); r = json.loads(lines[-1]); assert code == 0
    assert r == json.loads((tmp_path/'b.json').read_text()) and list(r['ladder']) == ['recompute', 'static+bf16'] and r['card']['timed_frames'] == 2
    assert lines[0].startswith('commit') and all(x['step']['median'] >= x['latents']['median'] > x['ceiling_ms'] > 0 for x in r['ladder'].values())
    for *a, says in (('--engines', 'warp', 'no engine "warp"'), ('--engines', 'static+fp4', 'after + comes bf16'), ('--engines', 'rolling+bf16', 'needs one of ring'), ('--preset', 'nfd_1b', 'no preset'), ('--window', '8', 'goes with --preset'), ('--frames', 0, 'at least 1')):
        fails(capsys, tmp_path, 'bench', *a, says=says)

def test_spoilt_weights(tmp_path, world, capsys):
    play = lambda says: fails(capsys, tmp_path, 'play', world, '--out', tmp_path/'o.mp4', says=says)
    whole = (world/'world.safetensors').read_bytes()
    for n in (0, 7, 100, len(whole) // 2, len(whole) - 1): (world/'world.safetensors').write_bytes(whole[:n]); play('not a whole safetensors file')
    (world/'world.safetensors').write_bytes((world/'tokenizer.safetensors').read_bytes()); play('model of another shape')
    (world/'world.safetensors').unlink(); play('no such weights')
    (world/'world.safetensors').write_bytes(whole)
    info = json.loads((world/'world.json').read_text())
    for change, says in ((dict(shape=info['shape'] | dict(layers=5)), 'another shape'), (dict(shape=info['shape'] | dict(colour=3)), 'not a valid DiTConfig'), (dict(kind='tokenizer'), 'not the config of a world'), (dict(action_space=dict(name='x', fields=dict(a=['p', 'q']))), 'action space has')):
        (world/'world.json').write_text(json.dumps(info | change)); play(says)
    (world/'world.json').write_text('{"format": 1,'); play('not readable as JSON')

def test_spoilt_video(tmp_path, capsys):
    d = tmp_path/'video'; shutil.copytree(DATA, d); test = json.loads((d/'dataset.json').read_text())['test']
    play = lambda says, **kw: fails(capsys, tmp_path, 'play', '--data', d, '--out', tmp_path/'o.mp4', says=says)
    mp4, whole = d/f'{test[0]}.mp4', (d/f'{test[0]}.mp4').read_bytes()
    for n in (0, 1000, len(whole) // 2): mp4.write_bytes(whole[:n]); play(mp4.name)
    mp4.write_text('this is not a video'); play('not a readable video')
    mp4.write_bytes(whole); mp4.with_suffix('.npz').write_bytes(b'PK\x03\x04 no'); play('not a readable .npz')
    np.savez(mp4.with_suffix('.npz'), actions=np.zeros((7, 1), int)); play('7 actions')
    np.savez(mp4.with_suffix('.npz'), actions=np.full((video_info(mp4)[0], 1), 11)); play('out of range')
    (d/'dataset.json').unlink(); play('no such file')

def test_another_action_space_is_refused(tmp_path, capsys):
    from nfd_ref.video import ActionSpace, save_episode, write_json
    from dataclasses import asdict, replace
    v = VideoFolder(DATA, 'test'); space = ActionSpace('two', dict(go=('no', 'yes')))
    save_episode(tmp_path/'v', 'a', replace(v.clip(0, 0, 20), space=space, actions=np.zeros((20, 1), int)))
    write_json(tmp_path/'v'/'dataset.json', dict(fps=20, action_space=asdict(space), test=['a']))
    fails(capsys, tmp_path, 'play', '--data', tmp_path/'v', '--out', tmp_path/'o.mp4', says='this world of "doom9"')

def test_no_codec(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(av, 'codecs_available', av.codecs_available - {'libx264'})
    fails(capsys, tmp_path, 'play', '--frames', 2, '--out', tmp_path/'o.mp4', says='cannot encode H.264')

@pytest.mark.skipif(os.name != 'posix' or os.geteuid() != 0, reason='mounting a small file system needs root')
def test_full_disk(tmp_path, capsys):
    d = tmp_path/'small'; d.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=24k', 'tmpfs', str(d)], capture_output=True).returncode: pytest.skip('cannot mount a tmpfs here')
    try:
        fails(capsys, d, 'play', '--frames', 40, '--out', d/'o.mp4', says='No space left')
        fails(capsys, d, 'play', '--frames', 4, '--out', tmp_path/'o.mp4', '--gif', d/'o.gif', says='No space left')
        fails(capsys, d, 'release', WORLD, WORLD, d/'w', '--clips', 4, says='No space left')
    finally: subprocess.run(['umount', str(d)])

def test_keys_in_a_real_terminal(tmp_path):
    "Drive `play --keys` through a pseudo-terminal: walk, turn, leave."
    pid, fd = pty.fork()
    if pid == 0: os.execv(sys.executable, [sys.executable, '-m', 'nfd_ref.cli', 'play', '--keys', '--out', str(tmp_path/'k.mp4')])
    seen, t = '', time.time()
    def read(until, limit=90):
        nonlocal seen
        while until not in seen and time.time() - t < limit:
            if select.select([fd], [], [], .2)[0]:
                try: seen += os.read(fd, 65536).decode(errors='replace')
                except OSError: return
    read('FPS possible'); assert '▀' in seen
    os.write(fd, b'w'); seen = ''; read('\nforward ')
    os.write(fd, b'qe'); read('\nturn right ')          # two keys at once: the last one counts
    assert '\nforward ' in seen and '\nturn right ' in seen
    os.write(fd, b'x'); read('frames ->', 30)
    assert re.search(r'\d+ frames -> ', seen), seen[-300:]
    assert os.waitpid(pid, 0)[1] == 0 and video_info(tmp_path/'k.mp4')[0] > 2

def test_evaluate_measures_and_keeps_a_row(tmp_path, capsys):
    code, out, err = run(capsys, 'evaluate', '--quick', '--engine', 'native+bf16', '--out', tmp_path/'r.json', '--leaderboard', tmp_path/'board.json', '--name', 'shipped'); assert code == 0, err
    r, board = json.loads((tmp_path/'r.json').read_text()), json.loads((tmp_path/'board.json').read_text())
    assert r['quality']['recorded']['psnr']['mean'][0] == 60 and 'counterfactual' in out
    assert r['world']['engine'] == 'native bfloat16' and '--engine native+bf16' in board[0]['command']
    assert [x['world'] for x in board] == ['shipped'] and board[0]['data'] == VideoFolder(DATA, 'test').hash() and (tmp_path/'r.png').exists()
    e = lambda *a, says: fails(capsys, tmp_path, 'evaluate', *a, says=says)
    e('--out', tmp_path/'r.json', says='give another name'); e('--out', tmp_path/'r.txt', says='name it .json')
    e('--out', tmp_path/'n.json', '--branches', DATA, says='not of branches'); e('--out', tmp_path/'n.json', '--idm', WORLD, says='no such file')
    e('--out', tmp_path/'n.json', '--i3d', tmp_path/'none.pt', says='i3d_torchscript.pt'); e('--out', tmp_path/'n.json', '--vgg', tmp_path/'r.json', says='not a TorchScript file')
    e('--out', tmp_path/'n.json', '--data', tmp_path, says='no such file')

def test_branches_repeat_the_shipped_ones(tmp_path, capsys):
    pytest.importorskip('vizdoom'); from nfd_ref.evaluation import load_branches
    code, _, err = run(capsys, 'branches', tmp_path/'b', '--states', 1); assert code == 0, err
    (a, turn), (b, _) = load_branches(tmp_path/'b')[0][0], load_branches(ROOT/'data'/'branches')[0][0]
    assert all((x.pose == y.pose).all() and (x.actions == y.actions).all() and (x.frames == y.frames).all() for x, y in zip(a, b)) and len(turn) == 68
    fails(capsys, tmp_path, 'branches', tmp_path/'c', '--states', 0, says='at least 1')
    fails(capsys, tmp_path, 'branches', tmp_path/'c', '--data', ROOT/'data'/'branches', says='no usable test episode')

def test_build_goes_from_nothing_to_a_world_that_plays(tmp_path, capsys):
    pytest.importorskip('vizdoom')
    code, out, err = run(capsys, 'build', tmp_path/'b', '--recipe', 'tiny'); assert code == 0, err
    code, out, err = run(capsys, 'play', tmp_path/'b'/'play', '--frames', 3, '--out', tmp_path/'o.mp4'); assert code == 0, err
    assert video_info(tmp_path/'o.mp4')[0] == 3
    fails(capsys, tmp_path, 'build', tmp_path/'b', '--recipe', 'tiny', says='choose a new folder')
