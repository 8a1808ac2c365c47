"The `nfd-ref` command: a thin face over the package. Written by hand; every command calls one or two functions of the notebooks."
import argparse, json, subprocess, sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
WORLD, PLAYED, DATA, BRANCHES, IDM = (HERE/'data'/d for d in ('world', 'distilled', 'my_way_home', 'branches', 'idm'))

def train_flags(p):
    p.add_argument('--data', required=True, type=Path, help='a folder of video (see data/README.md)')
    p.add_argument('--out', required=True, type=Path, help="the run's folder; must be new, or --resume")
    p.add_argument('--steps', type=int, help="optimizer steps (the recipe's, in nfd_ref.training)")
    p.add_argument('--batch', type=int, help='clips (or frames) a step, over all processes')
    p.add_argument('--lr', type=float, help='learning rate after the warm-up')
    p.add_argument('--seed', type=int)
    p.add_argument('--save-every', type=int, help='steps between checkpoints')
    p.add_argument('--bf16', action='store_true', default=None, help='bf16 autocast: pays on CUDA and on CPUs with AMX or AVX-512 bf16')
    p.add_argument('--compile', action='store_true', default=None, help='torch.compile: pays after some hundred steps')
    p.add_argument('--resume', action='store_true', help='go on from the last checkpoint of the run')

ENGINE = 'how frames are computed, see 06_streaming (the fastest that starts at once); +bf16 behind it for half precision'

def parser():
    p = argparse.ArgumentParser('nfd-ref', description='Next-Frame Diffusion: record a game, train a network to be that game, play it.', epilog='A command with --help says more, for instance: nfd-ref play --help')
    s = p.add_subparsers(dest='command', metavar='COMMAND')
    c = s.add_parser('play', help='play a trained world: writes an mp4, prints the speed', description='Start from a held-out clip and stream frames under a trace of actions, or under your keys.')
    c.add_argument('world', nargs='?', type=Path, default=PLAYED, help='folder of a world (the shipped student)')
    c.add_argument('--data', type=Path, default=DATA, help='video folder to start from (the shipped one)')
    c.add_argument('--clip', type=int, help='which held-out episode to start from (0; in the shipped set one with a view)')
    c.add_argument('--start', type=int, help='frame of it to start at (0)')
    c.add_argument('--actions', help='a trace, such as "forward*20, turn left*15"; without it, a walk of 240 frames')
    c.add_argument('--keys', action='store_true', help='play with the keys, in this terminal')
    c.add_argument('--frames', type=int, help='how many frames: the trace is cut, or repeated (as long as the trace)')
    c.add_argument('--steps', type=int, help='denoising steps a frame')
    c.add_argument('--seed', type=int, default=0, help='of the noise and of the made-up player (%(default)s)')
    c.add_argument('--device', help='cpu or cuda (cuda where there is one)')
    c.add_argument('--out', type=Path, default=Path('play.mp4'), help='mp4 to write (%(default)s)')
    c.add_argument('--gif', type=Path, help='GIF to write as well')
    c.add_argument('--engine', help=ENGINE)
    c = s.add_parser('record', help='record ViZDoom into a folder of video', description='Record episodes of a ViZDoom scenario with a sticky, wall-avoiding player. The same seed gives the same frames.')
    c.add_argument('out', type=Path)
    c.add_argument('--episodes', type=int, default=24); c.add_argument('--test', type=int, default=4, help='of these, held out (%(default)s)')
    c.add_argument('--length', type=int, default=600, help='frames an episode at most (%(default)s)')
    c.add_argument('--scenario', default='my_way_home'); c.add_argument('--size', default='80x48', metavar='WxH')
    c.add_argument('--crf', type=int, default=20, help='H.264 quality, smaller is better (%(default)s)')
    c.add_argument('--seed', type=int, default=0); c.add_argument('--workers', type=int)
    c = s.add_parser('branches', help='play every action from saved simulator states', description='From states of the held-out episodes of a ViZDoom recording, record what every action leads to. `evaluate` compares the world with it.')
    c.add_argument('out', type=Path); c.add_argument('--data', type=Path, default=DATA, help='the recording (the shipped one)')
    c.add_argument('--states', type=int, default=16, help='how many (%(default)s)'); c.add_argument('--seed', type=int, default=0)
    c = s.add_parser('train', help='train a tokenizer, a world or a judge of actions', description='Train one part. `torchrun --nproc_per_node=N -m nfd_ref.cli train ...` uses N processes.')
    t = c.add_subparsers(dest='what', metavar='tokenizer|world|idm', required=True)
    k = t.add_parser('tokenizer', help='the per-frame autoencoder'); train_flags(k)
    k = t.add_parser('idm', help='the inverse-dynamics network that reads actions from video'); train_flags(k)
    k = t.add_parser('world', help='the diffusion transformer'); train_flags(k)
    k.add_argument('--tokenizer', type=Path, required=True, help='folder of a trained tokenizer')
    k.add_argument('--preset', default='small', help='small, nfd_130m, nfd_310m or nfd_774m (%(default)s)')
    k.add_argument('--init', type=Path, help='folder of a trained world of the same shape to go on from')
    k.add_argument('--length', type=int, default=24, help='frames of a training clip (%(default)s)')
    c = s.add_parser('distill', help='make a trained world need fewer steps', description='Distil a world. OUT/final is playable; a run that was stopped goes on with --resume.')
    t = c.add_subparsers(dest='what', metavar='consistency', required=True)
    k = t.add_parser('consistency', help='NFD+: continuous-time consistency distillation, with a discriminator'); train_flags(k)
    k.add_argument('--teacher', type=Path, default=WORLD, help='folder of the world to distil (the shipped one)')
    k.add_argument('--no-adversarial', dest='adversarial', action='store_false', help='without the discriminator')
    k.add_argument('--solver-step', type=float, default=0., help='discrete distillation with steps of this size, for comparison (0: continuous time)')
    k.add_argument('--clips', type=int, default=16, help='training clips on which the sampling is chosen (%(default)s)')
    k.add_argument('--float32', action='store_true', help='no bf16 autocast: slower, and right where the processor has no bf16')
    c = s.add_parser('release', help='put a tokenizer and a world together, measured on held-out video')
    c.add_argument('tokenizer', type=Path); c.add_argument('world', type=Path); c.add_argument('out', type=Path)
    c.add_argument('--data', type=Path, default=DATA); c.add_argument('--clips', type=int, default=64)
    c = s.add_parser('evaluate', help='measure a world: quality, distance, actions, counterfactuals, drift, memory', description='Measure a world against held-out video and the simulator. Writes the numbers as JSON and a page of plots and film strips beside it.')
    c.add_argument('world', nargs='?', type=Path, default=WORLD, help='folder of a world (the shipped one)')
    c.add_argument('--out', type=Path, required=True, help='report, NAME.json; NAME.png is written as well')
    c.add_argument('--data', type=Path, default=DATA, help='video folder: its test episodes judge (the shipped one)')
    c.add_argument('--branches', type=Path, default=BRANCHES, help='from nfd-ref branches, of the same episodes')
    c.add_argument('--idm', type=Path, default=IDM, help='from nfd-ref train idm')
    c.add_argument('--quick', action='store_true', help='under a minute, few clips: to see that it works, not to compare')
    c.add_argument('--seed', type=int, default=0); c.add_argument('--engine', help=ENGINE)
    c.add_argument('--leaderboard', type=Path, help='JSON file to put a row into'); c.add_argument('--name', help='of the world there (its folder)')
    c.add_argument('--i3d', type=Path, help='i3d_torchscript.pt of StyleGAN-V, if you have it: adds FVD'); c.add_argument('--vgg', type=Path, help='vgg16.pt of StyleGAN3, if you have it: adds LPIPS')
    c = s.add_parser('bench', help='how fast is it: the engines in turns, beside what the machine could do', description='Prints a protocol card, the measured ceiling of this machine, the time of each engine, and the JSON of it all as the last line.')
    c.add_argument('world', nargs='?', type=Path, default=WORLD, help='folder of a world (the shipped one)')
    c.add_argument('--preset', help='random weights at this shape instead: nfd_130m, nfd_310m or nfd_774m')
    c.add_argument('--engines', help='comma-separated, the baseline first; +bf16 for half precision (all that this device supports)')
    c.add_argument('--frames', type=int, default=100, help='timed frames of each (%(default)s)'); c.add_argument('--steps', type=int, help='denoising steps a frame')
    c.add_argument('--window', type=int, help='frames looked back at, with --preset'); c.add_argument('--growth', action='store_true', help='instead: time and memory against frame number, window, steps, batch and size')
    c.add_argument('--threads', type=int, help='CPU threads'); c.add_argument('--device', help='cpu or cuda (cuda where there is one)'); c.add_argument('--out', type=Path, help='JSON file to write as well')
    c = s.add_parser('build', help='all of it: record, train both, release', description='Record, train the tokenizer, train the world, measure, and put the playable world into OUT/play. Goes on where it was stopped.')
    c.add_argument('out', type=Path); c.add_argument('--recipe', default='cpu', help='cpu (two hours on two cores), cuda (minutes; not yet timed) or tiny (a minute, to see the path work)')
    c.add_argument('--data', type=Path, default=DATA, help='video that judges it (the shipped one)')
    c = s.add_parser('lab', help='open JupyterLab at the notebooks')
    return p

def cmd_play(a):
    import numpy as np, torch
    from nfd_ref.play import parse_actions, play, play_keys, stroll
    from nfd_ref.streaming import World
    from nfd_ref.video import VideoFolder, write_video
    if a.frames is not None and a.frames < 1: raise ValueError(f'--frames {a.frames}: at least 1')
    world = World.load(a.world, **engine(a.engine), **{k: v for k, v in dict(steps=a.steps, device=a.device, seed=a.seed).items() if v is not None})
    videos = VideoFolder(a.data, 'test')
    n, start = (1, 270) if a.data == DATA and a.clip is None and a.start is None else (a.clip or 0, a.start or 0)
    if not 0 <= n < len(videos): raise ValueError(f'--clip {n}: there are {len(videos)} held-out episodes, 0..{len(videos) - 1}')
    clip = videos.clip(n, start, start + world.model.cfg.window)
    if a.keys:
        frames, _ = play_keys(world, clip, a.frames)
        if len(frames): write_video(a.out, frames, world.fps)
        return print(f'{len(frames)} frames -> {a.out}')
    actions = parse_actions(a.actions, world.space) if a.actions else stroll(world.space, a.seed)
    if a.frames: actions = np.resize(actions, (a.frames, actions.shape[1]))     # cut, or repeated
    _, r = play(world, clip, actions, [a.out] + ([a.gif] if a.gif else []))
    r |= dict(width=world.size[1], height=world.size[0], steps=world.steps, sampler=world.sampler, device=torch.cuda.get_device_name(world.device) if world.device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads')
    print(f'{r["frames"]} frames at {r["fps"]:.1f} FPS (median {r["ms_median"]:.1f} ms, p95 {r["ms_p95"]:.1f} ms a frame, decoding included)')
    print(f'{r["width"]}x{r["height"]} pixels, {r["steps"]} {r["sampler"]} steps, engine {world.rung}, {r["device"]} -> {a.out}' + (f', {a.gif}' if a.gif else ''))

def cmd_record(a):
    from nfd_ref.video import Recorder, record
    try: w, h = map(int, a.size.split('x'))
    except ValueError: raise ValueError(f'--size {a.size}: wanted WIDTHxHEIGHT, such as 80x48') from None
    v = record(a.out, Recorder(a.scenario, h, w, a.length, crf=a.crf), a.episodes, a.test, a.seed, a.workers)
    print(f'{len(v)} episodes, {v.frames} frames -> {a.out} (fingerprint {v.hash()})')

def given(cfg, a):
    "A TrainConfig with the flags that were given."
    return replace(cfg, **{k: v for k in ('steps', 'batch', 'lr', 'seed', 'save_every', 'bf16', 'compile') if (v := getattr(a, k)) is not None})

def cmd_train(a):
    from nfd_ref import training as T
    from nfd_ref.tokenizer import Tokenizer, TokenizerConfig, load_model
    from nfd_ref.transformer import DITS
    from nfd_ref.video import VideoFolder
    videos = VideoFolder(a.data, 'train')
    if a.what == 'tokenizer': T.train_tokenizer(a.out, videos, given(T.TOKENIZER_RECIPE, a), resume=a.resume)
    elif a.what == 'idm':
        from nfd_ref.evaluation import IDM_RECIPE, train_idm
        train_idm(a.out, videos, given(IDM_RECIPE, a), resume=a.resume)
    else:
        if a.preset not in DITS: raise ValueError(f'no preset "{a.preset}"; there are {", ".join(DITS)}')
        tok, _ = load_model(a.tokenizer, 'tokenizer', Tokenizer, TokenizerConfig)
        T.train_world(a.out, videos, tok, given(T.WORLD_RECIPE, a), DITS[a.preset], a.length, init=a.init, held_out=VideoFolder(a.data, 'test'), resume=a.resume)
    print(f'done -> {a.out/"final"}')

def cmd_distill(a):
    from nfd_ref.consistency import CONSISTENCY_RECIPE, ConsistencyConfig, choose_sampling, distill_consistency
    from nfd_ref.video import VideoFolder
    if a.compile: raise ValueError('--compile: derivatives in forward mode are not compiled here; leave it out')
    if not 0 <= a.solver_step < 1: raise ValueError(f'--solver-step {a.solver_step}: a step in [0, 1)')
    cfg, method = given(CONSISTENCY_RECIPE, a), ConsistencyConfig(step=a.solver_step, **({} if a.adversarial else dict(adversarial=0.)))
    distill_consistency(a.out, a.teacher, VideoFolder(a.data, 'train'), replace(cfg, bf16=False) if a.float32 else cfg, method, resume=a.resume)
    print(json.dumps(choose_sampling(a.out/'final', VideoFolder(a.data, 'train'), clips=a.clips)), f'-> nfd-ref play {a.out/"final"}', sep='\n')

def cmd_branches(a):
    from nfd_ref.evaluation import record_branches
    from nfd_ref.video import VideoFolder
    if a.states < 1: raise ValueError(f'--states {a.states}: at least 1')
    record_branches(a.out, VideoFolder(a.data, 'test'), a.states, seed=a.seed)
    print(f'{a.states} states -> {a.out}')

def cmd_evaluate(a):
    from nfd_ref.evaluation import QUICK, Protocol, add_to_leaderboard, evaluate, leaderboard_row
    r = evaluate(a.world, a.data, a.branches, a.idm, a.out, QUICK if a.quick else Protocol(), a.seed, i3d=a.i3d, vgg=a.vgg, **engine(a.engine))
    row = leaderboard_row(r, a.name or a.world.name, 'nfd-ref evaluate' + (f' {a.world}' if a.world != WORLD else '') + f' --out report.json --seed {a.seed}' + (f' --engine {a.engine}' if a.engine else '') + (' --quick' if a.quick else ''))
    if a.leaderboard: add_to_leaderboard(a.leaderboard, row)
    for k, v in row.items(): print(f'{k:20} {v}')
    print(f'-> {a.out}, {a.out.with_suffix(".png")}')

def engine(name):
    "'native+bf16' -> what `World` wants to know."
    import torch
    name, _, half = (name or '').partition('+')
    if half not in ('', 'bf16'): raise ValueError(f'engine "{name}+{half}": after + comes bf16')
    return (dict(engine=name) if name else {}) | (dict(dtype=torch.bfloat16) if half else {})

def cmd_bench(a):
    import torch
    from nfd_ref.speed import bench, growth, random_world, still
    from nfd_ref.streaming import ENGINES, World
    if a.threads: torch.set_num_threads(a.threads)
    if a.frames < 1: raise ValueError(f'--frames {a.frames}: at least 1')
    if a.window and not a.preset: raise ValueError('--window goes with --preset: a trained world keeps its own')
    if a.growth: return growth(a.out, a.device)
    given = {k: v for k, v in dict(steps=a.steps, device=a.device).items() if v is not None}
    def load(name):
        kw = given | engine(name)
        return random_world(a.preset, a.window, **kw) if a.preset else World.load(a.world, **kw)
    cuda = (a.device or ('cuda' if torch.cuda.is_available() else 'cpu')).startswith('cuda')
    names = [n for n in ENGINES if n != ('native' if cuda else 'graph')]
    names = a.engines.split(',') if a.engines else names + ['static+bf16', 'compiled+bf16', f'{names[-1]}+bf16']
    worlds = {n: load(n) for n in names}
    bench(worlds, still(next(iter(worlds.values()))), a.out, a.frames, min(10, a.frames))

def cmd_release(a):
    from nfd_ref.streaming import release
    print(json.dumps(release(a.tokenizer, a.world, a.out, a.data, a.clips), indent=1))

def cmd_build(a):
    from nfd_ref import training as T
    from nfd_ref.streaming import release
    from nfd_ref.tokenizer import Tokenizer, TokenizerConfig, load_model
    from nfd_ref.transformer import DITS
    from nfd_ref.video import Recorder, VideoFolder, record
    if a.recipe not in T.RECIPES: raise ValueError(f'no recipe "{a.recipe}"; there are {", ".join(T.RECIPES)}')
    r, done = T.RECIPES[a.recipe], lambda part: (a.out/part/'final').exists()
    record(a.out/'video', Recorder(crf=18), r.episodes, r.test, r.seed)
    train, test = VideoFolder(a.out/'video', 'train'), VideoFolder(a.out/'video', 'test')
    if not done('tokenizer'): T.train_tokenizer(a.out/'tokenizer', train, r.tokenizer, resume=True)
    tok, _ = load_model(a.out/'tokenizer'/'final', 'tokenizer', Tokenizer, TokenizerConfig)
    if not done('world'): T.train_world(a.out/'world', train, tok, r.world, DITS[r.preset], r.length, held_out=test, resume=True)
    metrics = release(a.out/'tokenizer'/'final', a.out/'world'/'final', a.out/'play', a.data)
    print(json.dumps(metrics['psnr']), f'-> nfd-ref play {a.out/"play"}', sep='\n')

def cmd_lab(a):
    if not find_spec('jupyterlab'): raise ImportError('JupyterLab is not installed: pip install -c constraints.txt jupyterlab')
    sys.exit(subprocess.call([sys.executable, '-m', 'jupyterlab', str(HERE/'nbs')]))

def main(argv=None):
    "Run a command; a mistake of the user's is one line and exit code 2."
    p = parser(); a = p.parse_args(argv)
    if not a.command: p.print_help(); return 0
    try: globals()[f'cmd_{a.command}'](a)
    except KeyboardInterrupt: print('\nstopped', file=sys.stderr); return 130
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as e:
        print(f'nfd-ref {a.command}: {e}', file=sys.stderr); return 2
    return 0

if __name__ == '__main__': sys.exit(main())
