"""The `nfd-ref` command: a thin face over the package. Written by hand; a command is a function
(see `command`)."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from fastcore.meta import delegates

from nfd_ref.command import COMMANDS, GROUPS, ROOT, command, main, parser

__all__ = ['COMMANDS', 'parser', 'main']

SHIPPED = ROOT/'data'
WORLD = SHIPPED/'world'
STUDENT = SHIPPED/'distilled'
VIDEO = SHIPPED/'my_way_home'
BRANCHES = SHIPPED/'branches'
JUDGE = SHIPPED/'idm'
VIEW = (0, 150)                         # episode and frame of the shipped video with a good view

Wanted = dict(required=True)            # of a flag that must be given

# ---- commands of two words

GROUPS.update({
    'train': """Train a tokenizer, a world or a judge of actions.
        `torchrun --nproc_per_node=N -m nfd_ref.cli train ...` uses N processes.""",
    'distill': """Make a trained world need fewer steps.
        OUT/final is playable; a run that was stopped goes on with --resume."""})

# ---- what several commands want

def chosen(**values):
    "Those that were chosen; the others are left to what they are for."
    return {name: value for name, value in values.items() if value is not None}

MANY = 10**6            # frames, steps, episodes: no count is larger
SEEDS = 2**32 - 1       # the largest seed

def within(least, most, **values):
    "Numbers that were given are in this range, or the flag is named."
    for name, value in values.items():
        if value is None: continue
        flag = f'--{name.replace("_", "-")} {value}'
        if value < least: raise ValueError(f'{flag}: at least {least}')
        if value > most: raise ValueError(f'{flag}: at most {most}')

def engine_kwargs(name):
    "'native+bf16' -> what `World` wants to know."
    import torch
    engine, _, half = (name or '').partition('+')
    if half not in ('', 'bf16'): raise ValueError(f'engine "{name}": after + comes bf16')
    return chosen(engine=engine or None, dtype=torch.bfloat16 if half else None)

def train_config(
    recipe,                     # a `TrainConfig`
    steps:int=None,             # optimizer steps, instead of the recipe's
    batch:int=None,             # clips (or frames) a step, over all processes
    lr:float=None,              # learning rate after the warm-up
    seed:int=None,              # of weights, order and noise
    save_every:int=None,        # steps between checkpoints
    bf16:bool=False,            # bf16 autocast: pays on CUDA, and on CPUs with AMX or AVX-512 bf16
    compile:bool=False,         # torch.compile: pays after some hundred steps
):                              # a `TrainConfig`
    "The recipe, with what was given in its place. (A switch can only turn on.)"
    within(1, 1000 * MANY, steps=steps, save_every=save_every)
    within(1, MANY, batch=batch)
    within(0, SEEDS, seed=seed)
    if lr is not None and not 0 < lr <= 1: raise ValueError(f'--lr {lr}: a rate in (0, 1]')
    numbers = chosen(steps=steps, batch=batch, lr=lr, seed=seed, save_every=save_every)
    return replace(recipe, **numbers, bf16=bf16 or recipe.bf16, compile=compile or recipe.compile)

def load_tokenizer(folder):
    from nfd_ref.storage import TokenizerInfo, load_model
    from nfd_ref.tokenizer import Tokenizer, TokenizerConfig
    tok, _ = load_model(folder, TokenizerInfo, Tokenizer, TokenizerConfig)
    return tok

# ---- the commands

@command('world')
def cmd_play(
    world:Path=STUDENT,         # folder of a world
    data:Path=VIDEO,            # video folder to start from
    clip:int=None,              # held-out episode to start from (0)
    start:int=None,             # frame of it to start at (0; of the shipped video 150, a view)
    actions:str=None,           # a trace: "forward*20, turn left*15" (none: a walk of 240 frames)
    keys:bool=False,            # play with the keys, in this terminal
    frames:int=None,            # how many: the trace is cut or repeated (its own length)
    steps:int=None,             # denoising steps a frame (those measured best for this world)
    seed:int=0,                 # of the noise and of the made-up player
    device:str=None,            # cpu or cuda (cuda where there is one)
    out:Path=Path('play.mp4'),  # mp4 to write
    gif:Path=None,              # GIF to write as well
    engine:str=None,            # see 06b_engines; +bf16: half precision (the fastest that starts)
):
    """Play a trained world: writes an mp4, prints the speed.
    It starts after a held-out clip and streams frames under a trace of actions or your keys."""
    import numpy as np
    from nfd_ref.play import parse_actions, play, play_keys, stroll
    from nfd_ref.streaming import World
    from nfd_ref.video import VideoFolder, write_video
    within(1, MANY, frames=frames, steps=steps)
    within(0, SEEDS, seed=seed)

    settings = chosen(steps=steps, device=device, seed=seed) | engine_kwargs(engine)
    game = World.load(world, **settings)
    videos = VideoFolder(data, 'test')
    if data == VIDEO and clip is None and start is None: clip, start = VIEW
    clip = clip or 0
    start = start or 0
    last = len(videos) - 1
    if not 0 <= clip <= last:
        raise ValueError(f'--clip {clip}: there are {last + 1} held-out episodes, 0..{last}')
    stop = min(start + game.model.cfg.window, videos.episodes[clip].frames)
    past = videos.clip(clip, start, max(stop, start + 1))

    if keys:
        seen, _ = play_keys(game, past, frames)
        if len(seen): write_video(out, seen, game.fps)
        print(f'{len(seen)} frames -> {out}')
        return

    trace = parse_actions(actions, game.space) if actions else stroll(game.space, seed)
    if frames: trace = np.resize(trace, (frames, trace.shape[1]))       # cut, or repeated
    paths = [out, gif] if gif else [out]
    _, speed = play(game, past, trace, paths)
    print(f'{speed.frames} frames at {speed.fps:.1f} FPS (median {speed.ms_median:.1f} ms, '
          f'p95 {speed.ms_p95:.1f} ms a frame, decoding included)')
    print(f'{about_world(game)} -> {", ".join(map(str, paths))}')

def about_world(world):
    "How a world is being played, in one line."
    import torch
    height, width = world.size
    precision = str(world.engine.dtype).removeprefix('torch.')
    engine = world.engine.name if precision == 'float32' else f'{world.engine.name}, {precision}'
    machine = f'CPU, {torch.get_num_threads()} threads'
    if world.device.type == 'cuda': machine = torch.cuda.get_device_name(world.device)
    return (f'{width}x{height} pixels, {world.steps} {world.sampler} steps, '
            f'engine {engine}, {machine}')

@command('out')
def cmd_record(
    out:Path,                       # folder to record into; goes on where it was stopped
    episodes:int=24,                # how many
    test:int=4,                     # of these, held out
    length:int=600,                 # frames an episode at most
    scenario:str='my_way_home',     # of ViZDoom
    size:Annotated[str, dict(metavar='WxH')]='80x48',   # width and height in pixels
    crf:int=20,                     # H.264 quality, smaller is better
    seed:int=0,                     # the same seed gives the same frames
    workers:int=None,               # processes (one per core)
):
    """Record ViZDoom into a folder of video.
    Episodes of a scenario, played by a sticky, wall-avoiding player."""
    from nfd_ref.doom import Recorder, record
    try:
        width, height = map(int, size.split('x'))
    except ValueError:
        raise ValueError(f'--size {size}: wanted WIDTHxHEIGHT, such as 80x48') from None
    for side in (width, height):
        if not 8 <= side <= 2048: raise ValueError(f'--size {size}: sides of 8 to 2048 pixels')
    within(1, MANY, episodes=episodes)
    within(0, MANY, test=test)
    within(2, MANY, length=length)
    within(0, 51, crf=crf)
    within(0, SEEDS, seed=seed)
    within(1, 1024, workers=workers)
    recorder = Recorder(scenario, height, width, length, crf=crf)
    videos = record(out, recorder, episodes, test, seed, workers)
    print(f'{len(videos)} episodes, {videos.frames} frames -> {out} (fingerprint {videos.hash()})')

@command('out')
def cmd_branches(
    out:Path,                   # folder to record into: new
    data:Path=VIDEO,            # the recording
    states:int=16,              # how many
    seed:int=0,                 # of the choice of states
):
    """Play every action from saved simulator states.
    From states of the held-out episodes of a ViZDoom recording, record what every action leads to;
    `evaluate` compares the world with it."""
    from nfd_ref.doom import record_branches
    from nfd_ref.video import VideoFolder
    within(1, MANY, states=states)
    within(0, SEEDS, seed=seed)
    record_branches(out, VideoFolder(data, 'test'), states, seed=seed)
    print(f'{states} states -> {out}')

@command()
@delegates(train_config)
def cmd_train_tokenizer(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """The per-frame autoencoder.
    Recipe: 3000 steps of 32 frames, learning rate 0.0015, a checkpoint every 500."""
    from nfd_ref.training import TOKENIZER_RECIPE, train_tokenizer
    from nfd_ref.video import VideoFolder
    cfg = train_config(TOKENIZER_RECIPE, **kwargs)
    train_tokenizer(out, VideoFolder(data, 'train'), cfg, resume=resume)
    print(f'done -> {out/"final"}')

@command()
@delegates(train_config)
def cmd_train_world(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    tokenizer:Annotated[Path, Wanted]=None, # folder of a trained tokenizer
    preset:str='small',                     # small, small64, nfd_130m, nfd_310m or nfd_774m
    init:Path=None,                         # folder of a world of this shape to go on from
    length:int=24,                          # frames of a training clip
    mistakes:float=0.,                      # share of context frames that are its own guesses
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """The diffusion transformer.
    Recipe: 3400 steps of 16 clips, learning rate 0.0015, a checkpoint every 500."""
    from nfd_ref.training import WORLD_RECIPE, train_world
    from nfd_ref.transformer import DITS
    from nfd_ref.video import VideoFolder
    if preset not in DITS: raise ValueError(f'no preset "{preset}"; there are {", ".join(DITS)}')
    within(1, MANY, length=length)
    if not 0 <= mistakes <= 1: raise ValueError(f'--mistakes {mistakes}: a share in [0, 1]')
    cfg = train_config(WORLD_RECIPE, **kwargs)
    videos = VideoFolder(data, 'train')
    held_out = VideoFolder(data, 'test')
    tok = load_tokenizer(tokenizer)
    train_world(out, videos, tok, cfg, DITS[preset], length, mistakes=mistakes, init=init,
                held_out=held_out, resume=resume)
    print(f'done -> {out/"final"}')

@command()
@delegates(train_config)
def cmd_train_idm(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """The inverse-dynamics network that reads actions from video.
    Recipe: 4000 steps of 128 clips, learning rate 0.002, a checkpoint every 500."""
    from nfd_ref.judge import IDM_RECIPE, train_idm
    from nfd_ref.video import VideoFolder
    cfg = train_config(IDM_RECIPE, **kwargs)
    train_idm(out, VideoFolder(data, 'train'), cfg, resume=resume)
    print(f'done -> {out/"final"}')

@command()
@delegates(train_config)
def cmd_distill_consistency(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    teacher:Path=WORLD,                     # folder of the world to distil
    adversarial:bool=True,                  # without the discriminator
    solver_step:float=0.,                   # of discrete distillation, in [0, 1); 0: none
    length:int=24,                          # frames of a training clip
    clips:int=16,                           # training clips on which the sampling is chosen
    float32:bool=False,                     # no bf16 autocast: right where the CPU has no bf16
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """NFD+: continuous-time consistency distillation, with a discriminator.
    Recipe: 800 steps of 4 clips in bf16, learning rate 0.0001, a checkpoint every 100."""
    from nfd_ref.consistency import CONSISTENCY_RECIPE, ConsistencyConfig, distill_consistency
    from nfd_ref.release import choose_sampling
    from nfd_ref.video import VideoFolder
    cfg = train_config(CONSISTENCY_RECIPE, **kwargs)
    if cfg.compile:
        raise ValueError('--compile: forward-mode derivatives are not compiled here; leave it out')
    within(1, MANY, clips=clips, length=length)
    if not 0 <= solver_step < 1: raise ValueError(f'--solver-step {solver_step}: a step in [0, 1)')
    if float32: cfg = replace(cfg, bf16=False)
    method = ConsistencyConfig(solver_step=solver_step)
    if not adversarial: method = replace(method, adversarial=0.)

    videos = VideoFolder(data, 'train')
    distill_consistency(out, teacher, videos, cfg, method, length, resume=resume)
    sampling = choose_sampling(out/'final', videos, clips=clips)
    print(json.dumps(sampling))
    print(f'-> nfd-ref play {out/"final"}')

@command('tokenizer', 'world', 'out')
def cmd_release(
    tokenizer:Path,             # folder of the trained tokenizer
    world:Path,                 # folder of the trained world
    out:Path,                   # the playable folder: must be new
    data:Path=VIDEO,            # video that judges it
    clips:int=64,               # held-out clips it is measured on
):
    "Put a tokenizer and a world together, measured on held-out video."
    from nfd_ref.release import release
    within(4, MANY, clips=clips)
    print(json.dumps(release(tokenizer, world, out, data, clips), indent=1))

@command('world')
def cmd_evaluate(
    world:Path=WORLD,                   # folder of a world
    out:Annotated[Path, Wanted]=None,   # report, NAME.json; NAME.png is written as well
    data:Path=VIDEO,                    # video folder: its test episodes judge
    branches:Path=BRANCHES,             # from nfd-ref branches, of the same episodes
    idm:Path=JUDGE,                     # from nfd-ref train idm
    quick:bool=False,                   # under a minute: to see that it works, not to compare
    seed:int=0,                         # of the clips and the noise
    engine:str=None,                    # see 06b_engines; +bf16: half precision (the fastest)
    leaderboard:Path=None,              # JSON file to put a row into
    name:str=None,                      # of the world there (its folder)
    i3d:Path=None,                      # i3d_torchscript.pt of StyleGAN-V, if you have it: adds FVD
    vgg:Path=None,                      # vgg16.pt of StyleGAN3, if you have it: adds LPIPS
):
    """Measure a world: quality, distance, actions, counterfactuals, drift, memory.
    Held-out video and the simulator judge. Writes the numbers as JSON and a page of plots and film
    strips beside it."""
    from nfd_ref.evaluation import QUICK, Protocol, add_to_leaderboard, evaluate, leaderboard_row
    within(0, SEEDS, seed=seed)
    protocol = QUICK if quick else Protocol()
    report = evaluate(world, data, branches, idm, out, protocol, seed, i3d=i3d, vgg=vgg,
                      **engine_kwargs(engine))

    words = 'nfd-ref evaluate'
    if world != WORLD: words += f' {world}'
    words += f' --out report.json --seed {seed}'
    if engine: words += f' --engine {engine}'
    if quick: words += ' --quick'
    row = leaderboard_row(report, name or world.name, words)
    if leaderboard: add_to_leaderboard(leaderboard, row)
    for key, value in row.items(): print(f'{key:20} {value}')
    print(f'-> {out}, {out.with_suffix(".png")}')

@command('world')
def cmd_bench(
    world:Path=WORLD,           # folder of a world
    preset:str=None,            # random weights at this shape: nfd_130m, nfd_310m or nfd_774m
    engines:str=None,           # comma-separated, baseline first; +bf16: half (all that run here)
    frames:int=100,             # timed frames of each
    steps:int=None,             # denoising steps a frame (those of the world)
    window:int=None,            # frames looked back at, with --preset
    growth:bool=False,          # instead: cost as frames, window, steps, batch and size grow
    threads:int=None,           # CPU threads (PyTorch's choice)
    device:str=None,            # cpu or cuda (cuda where there is one)
    out:Path=None,              # JSON file to write as well
):
    """How fast is it: the engines in turns, beside what the machine could do.
    Prints a protocol card, the measured roofline of this machine, the time of each engine, and the
    JSON of it all as the last line."""
    import torch
    from nfd_ref import speed
    from nfd_ref.engines import ENGINES
    from nfd_ref.growth import growth as measure_growth
    from nfd_ref.streaming import World
    within(1, 1024, threads=threads)
    if threads: torch.set_num_threads(threads)
    within(1, MANY, frames=frames, steps=steps, window=window)
    if window and not preset:
        raise ValueError('--window goes with --preset: a trained world keeps its own')
    if growth:
        measure_growth(out, device)
        return

    def load(name):
        kwargs = chosen(steps=steps, device=device) | engine_kwargs(name)
        if preset: return speed.random_world(preset, window, **kwargs)
        return World.load(world, **kwargs)

    kind = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu')).type
    names = [name for name, engine in ENGINES.items() if kind in engine.devices]
    names += ['static+bf16', 'compiled+bf16', f'{names[-1]}+bf16']
    if engines: names = engines.split(',')
    worlds = {name: load(name) for name in names}
    start = speed.still(worlds[names[0]])
    speed.bench(worlds, start, out, frames, min(10, frames))

@command('out')
def cmd_build(
    out:Path,                   # folder for all of it; OUT/play is playable
    recipe:str='cpu',           # cpu (two hours on two cores), cuda (a GPU) or tiny (a minute)
    tokenizer:Path=None,        # folder of a trained tokenizer (none: one is trained)
    data:Path=VIDEO,            # video that judges it
):
    """All of it: record, train both, release.
    Goes on where it was stopped. The recipe tiny shows that the path works, not what it can do;
    cuda is that of the shipped world, with --tokenizer data/world: five minutes of steps on an
    H100, beside recording and encoding."""
    from nfd_ref.doom import Recorder, record
    from nfd_ref.release import release
    from nfd_ref.training import RECIPES, train_tokenizer, train_world
    from nfd_ref.transformer import DITS
    from nfd_ref.video import VideoFolder
    if recipe not in RECIPES:
        raise ValueError(f'no recipe "{recipe}"; there are {", ".join(RECIPES)}')
    plan = RECIPES[recipe]
    world = out/'world'
    finish = out/'finish'

    record(out/'video', Recorder(crf=18), plan.episodes, plan.test, plan.seed)
    train = VideoFolder(out/'video', 'train')
    test = VideoFolder(out/'video', 'test')
    if tokenizer is None:
        tokenizer = out/'tokenizer'/'final'
        if not tokenizer.exists():
            train_tokenizer(tokenizer.parent, train, plan.tokenizer, resume=True)
    tok = load_tokenizer(tokenizer)

    def train_stage(folder, cfg, **kwargs):
        if (folder/'final').exists(): return
        train_world(folder, train, tok, cfg, DITS[plan.preset], plan.length, plan.levels,
                    held_out=test, resume=True, **kwargs)
    train_stage(world, plan.world)
    if plan.finish:
        train_stage(finish, plan.finish, mistakes=plan.mistakes, init=world/'final')
        world = finish
    metrics = release(tokenizer, world/'final', out/'play', data)
    print(json.dumps(metrics['psnr']))
    print(f'-> nfd-ref play {out/"play"}')

@command()
def cmd_lab():
    "Open JupyterLab at the notebooks."
    if not find_spec('jupyterlab'):
        raise ImportError('JupyterLab is not installed: pip install -c constraints.txt jupyterlab')
    sys.exit(subprocess.call([sys.executable, '-m', 'jupyterlab', str(ROOT/'nbs')]))

if __name__ == '__main__': sys.exit(main())
