"""Commands that train: `train ...`, `distill ...`. Written by hand (see `command`)."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from fastcore.meta import delegates

from nfd_ref.command import BRANCHES, GROUPS, JUDGE, MANY, SEEDS, STUDENT, VIDEO, WORLD, Wanted
from nfd_ref.command import chosen, command, within

GROUPS.update({
    'train': """Train a tokenizer, its decoder, a world or a judge of actions.
        `torchrun --nproc_per_node=N -m nfd_ref.cli train ...` uses N processes.""",
    'distill': """Make a trained world need fewer steps.
        OUT/final is playable; a run that was stopped goes on with --resume."""})

def train_config(
    recipe,                     # a `TrainConfig`
    steps:int=None,             # optimizer steps, instead of the recipe's
    batch:int=None,             # clips (or frames) a step, over all processes
    accumulate:int=None,        # passes in which a process goes over its part of the batch
    lr:float=None,              # learning rate after the warm-up
    seed:int=None,              # of weights, order and noise
    save_every:int=None,        # steps between checkpoints
    bf16:bool=False,            # bf16 autocast: pays on CUDA, and on CPUs with AMX or AVX-512 bf16
    compile:bool=False,         # torch.compile: pays after some hundred steps
):                              # a `TrainConfig`
    "The recipe, with what was given in its place. (A switch can only turn on.)"
    within(1, 1000 * MANY, steps=steps, save_every=save_every)
    within(1, MANY, batch=batch, accumulate=accumulate)
    within(0, SEEDS, seed=seed)
    if lr is not None and not 0 < lr <= 1: raise ValueError(f'--lr {lr}: a rate in (0, 1]')
    numbers = chosen(steps=steps, batch=batch, accumulate=accumulate, lr=lr, seed=seed,
                     save_every=save_every)
    return replace(recipe, **numbers, bf16=bf16 or recipe.bf16, compile=compile or recipe.compile)

def tell_cost(work, model, one_pass, cfg, share):
    """Before a training: how large, how long on this machine. `one_pass` goes forth and back over
    `share` of a step's batch; the second time it is timed."""
    import torch
    for _ in range(2):
        started = time.perf_counter()
        one_pass().backward()
        if torch.cuda.is_available(): torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / share * cfg.steps
    seconds /= int(os.environ.get('WORLD_SIZE', 1))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    time_needed = f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'
    if seconds < 60: time_needed = 'less than a minute'
    if os.environ.get('RANK', '0') != '0': return
    print(f'{millions:.1f} million parameters; {cfg.steps} steps of {cfg.batch} {work}: about '
          f'{time_needed} on this machine, if it does nothing else', flush=True)

def tell_tokenizer_cost(size, cfg):
    "Of frames of this size, (height, width)."
    import torch
    from nfd_ref.tokenizer import Tokenizer, tokenizer_loss
    tok = Tokenizer()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    tok.to(device)
    frames = min(cfg.batch, 32 if device == 'cuda' else 4)
    x = torch.zeros(frames, 3, *size, device=device)
    eps = torch.zeros(frames, tok.cfg.latents, *tok.grid(*size), device=device)
    tell_cost(f'frames of {size[1]}x{size[0]}', tok, lambda: tokenizer_loss(tok, x, eps=eps)[0],
              cfg, frames / cfg.batch)

def tell_world_cost(shape, tok, videos, length, cfg):
    "Of a preset, on clips of this length."
    import torch
    from nfd_ref.transformer import DiT
    grid = tok.grid(*videos.size)
    shape = replace(shape, latents=tok.cfg.latents, grid=grid, actions=videos.space.sizes)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = DiT(shape).to(device)
    clips = max(1, cfg.batch // cfg.accumulate) if device == 'cuda' else 1
    x = torch.randn(clips, length, shape.latents, *grid, device=device)
    t = torch.full((clips, length), .5, device=device)
    actions = torch.zeros(clips, length, len(shape.actions), dtype=torch.long, device=device)
    tell_cost(f'clips of {length} frames', model, lambda: model(x, t, actions).square().mean(),
              cfg, clips / cfg.batch)

def how_to_play(folder, data='VIDEO'):
    "The command that plays what was trained: a world without start clips wants video."
    from nfd_ref.session import home_video
    try:
        home_video(folder)
    except ValueError:
        return f'-> nfd-ref play {folder} --data {data}'
    return f'-> nfd-ref play {folder}'

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
    videos = VideoFolder(data, 'train')
    tell_tokenizer_cost(videos.size, cfg)
    train_tokenizer(out, videos, cfg, resume=resume)
    print(f'done -> {out/"final"}')

@command()
@delegates(train_config)
def cmd_train_decoder(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    tokenizer:Path=WORLD,                   # folder of the tokenizer it is the decoder of
    idm:Path=JUDGE,                         # from nfd-ref train idm: the eyes of --perceptual
    perceptual:float=.02,                   # weight of the distance in these eyes; 0: none
    adversarial:float=.003,                 # weight of the critic of patches; 0: none
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """Another decoder for the same latents, which paints grain.
    OUT/final is a tokenizer; worlds that play with the old one play with it. Recipe: 3000 steps of
    8 films of 4 frames, learning rate 0.0003, a checkpoint every 500."""
    from nfd_ref.decoder import DECODER_RECIPE, train_decoder
    from nfd_ref.video import VideoFolder
    cfg = train_config(DECODER_RECIPE, **kwargs)
    train_decoder(out, VideoFolder(data, 'train'), tokenizer, idm, cfg, perceptual, adversarial,
                  resume=resume)
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
    from nfd_ref.tokenizer import load_tokenizer
    from nfd_ref.training import WORLD_RECIPE, train_world
    from nfd_ref.transformer import preset_shape
    from nfd_ref.video import VideoFolder
    shape = preset_shape(preset)
    within(1, MANY, length=length)
    if not 0 <= mistakes <= 1: raise ValueError(f'--mistakes {mistakes}: a share in [0, 1]')
    cfg = train_config(WORLD_RECIPE, **kwargs)
    videos = VideoFolder(data, 'train')
    held_out = VideoFolder(data, 'test')
    tok = load_tokenizer(tokenizer)
    tell_world_cost(shape, tok, videos, length, cfg)
    train_world(out, videos, tok, cfg, shape, length, mistakes=mistakes, init=init,
                held_out=held_out, resume=resume)
    print(f'done -> {out/"final"}')

@command()
@delegates(train_config)
def cmd_train_teacher(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    tokenizer:Annotated[Path, Wanted]=None, # folder of a trained tokenizer
    preset:str='small',                     # small, nfd_130m, nfd_310m or nfd_774m
    init:Path=None,                         # folder of a causal world of this shape to begin with
    length:int=16,                          # frames of a clip, all of which see each other
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """A world that looks both ways: it can teach, not be played.
    Recipe: 3400 steps of 16 clips, learning rate 0.0015, a checkpoint every 500."""
    from nfd_ref.tokenizer import load_tokenizer
    from nfd_ref.training import WORLD_RECIPE
    from nfd_ref.trajectories import train_teacher
    from nfd_ref.transformer import preset_shape
    from nfd_ref.video import VideoFolder
    shape = preset_shape(preset)
    within(2, MANY, length=length)
    cfg = train_config(WORLD_RECIPE, **kwargs)
    train_teacher(out, VideoFolder(data, 'train'), tokenizer, load_tokenizer(tokenizer), cfg,
                  shape, length, init=init, held_out=VideoFolder(data, 'test'),
                  resume=resume)
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
    init:Path=None,                         # folder of a student to go on from
    draft:int=1,                            # most frames that it learns to make together
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
    within(1, length, draft=draft)
    if not 0 <= solver_step < 1: raise ValueError(f'--solver-step {solver_step}: a step in [0, 1)')
    if float32: cfg = replace(cfg, bf16=False)
    method = ConsistencyConfig(solver_step=solver_step, draft=draft)
    if not adversarial: method = replace(method, adversarial=0.)

    videos = VideoFolder(data, 'train')
    distill_consistency(out, teacher, videos, cfg, method, length, init, resume=resume)
    sampling = choose_sampling(out/'final', videos, clips=clips)
    print(json.dumps(sampling))
    print(how_to_play(out/'final', data))

@command()
def cmd_distill_trajectories(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # folder for them; one that was begun goes on
    teacher:Annotated[Path, Wanted]=None,   # folder of a world from nfd-ref train teacher
    count:int=1000,                         # clips
    steps:int=48,                           # of the teacher's solver, a multiple of --calls
    calls:int=4,                            # of the student that shall learn from them
    given:int=4,                            # real frames that a clip begins with
    length:int=16,                          # frames of a clip
    batch:int=8,                            # clips at a time
    seed:int=0,                             # of clips and noise
    latents:Path=None,                      # encoded video: where it is (OUT/latents)
):
    """Walk the teacher from noise to video, for nfd-ref distill ode."""
    from nfd_ref.trajectories import Calls, make_trajectories
    from nfd_ref.video import VideoFolder
    within(1, MANY, count=count, steps=steps, calls=calls, given=given, length=length, batch=batch)
    within(0, SEEDS, seed=seed)
    make_trajectories(out, teacher, VideoFolder(data, 'train'), count, Calls(calls, given=given),
                      length, steps, batch, seed, latents)
    print(f'{count} trajectories -> {out}')

@command()
@delegates(train_config)
def cmd_distill_ode(
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    teacher:Annotated[Path, Wanted]=None,   # folder of a world from nfd-ref train teacher
    trajectories:Annotated[Path, Wanted]=None,  # folder from nfd-ref distill trajectories
    chunk:int=1,                            # frames that the student makes at a time
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """A causal student that learns where the teacher's paths end: a start for distribution.
    Recipe: 800 steps of 8 clips, learning rate 0.0001, a checkpoint every 200."""
    from nfd_ref.trajectories import ODE_RECIPE, distill_ode
    within(1, MANY, chunk=chunk)
    distill_ode(out, teacher, trajectories, train_config(ODE_RECIPE, **kwargs), chunk,
                resume=resume)
    print(how_to_play(out/'final'))

@command()
@delegates(train_config)
def cmd_distill_distribution(
    data:Annotated[Path, Wanted]=None,      # a folder of video (see data/README.md)
    out:Annotated[Path, Wanted]=None,       # the run's folder; must be new, or --resume
    teacher:Annotated[Path, Wanted]=None,   # folder of a world, best from nfd-ref train teacher
    start:Path=None,                        # folder of the world the student begins as (teacher)
    context:str='real',                     # what it looks back at: real or rollout (its own)
    ratio:int=5,                            # updates of the critic for one of the student
    calls:int=4,                            # of the student, for a frame or a chunk
    given:int=4,                            # real frames that a clip begins with
    chunk:int=1,                            # frames made at a time, where there is no --start
    length:int=16,                          # frames of a training clip
    latents:Path=None,                      # encoded video: where it is (OUT/latents)
    idm:Path=None,                          # judge that chooses the checkpoint (none: the last)
    resume:bool=False,                      # go on from the last checkpoint of the run
    **kwargs
):
    """Distribution matching: CausVid; with --context rollout Self-Forcing.
    Recipe: 1200 steps of 32 clips in 4 passes, learning rate 0.00005, a checkpoint every 120."""
    from nfd_ref.distribution_matching import (
        MATCHING_RECIPE, MatchingConfig, distill_distribution)
    from nfd_ref.trajectories import Calls
    from nfd_ref.video import VideoFolder
    within(1, MANY, ratio=ratio, calls=calls, given=given, chunk=chunk, length=length)
    cfg = train_config(MATCHING_RECIPE, **kwargs)
    method = MatchingConfig(calls=Calls(calls, given=given), context=context, ratio=ratio)
    videos = VideoFolder(data, 'train')
    watch = None
    if idm:
        from nfd_ref.arms import Watch
        from nfd_ref.streaming import tokenizer_of
        watch = Watch(out, videos, idm, tokenizer_of(teacher), method.calls.sampling)
    distill_distribution(out, teacher, videos, cfg, method, start, chunk, length, latents,
                         resume=resume, on_save=watch)
    if watch: print(f'step {watch.keep_best(out/"final")} is kept')
    print(how_to_play(out/'final', data))

@command('runs')
def cmd_distill_compare(
    runs:Path,                              # folder with a run in each of its folders
    out:Annotated[Path, Wanted]=None,       # .json; rows of the same weights in it are kept
    world:Path=WORLD,                       # causal world they are compared with
    student:Path=STUDENT,                   # consistency student, the same
    data:Path=VIDEO,                        # video: its test episodes judge
    branches:Path=BRANCHES,                 # from nfd-ref branches, of the same episodes
    idm:Path=JUDGE,                         # from nfd-ref train idm
    clips:int=64,                           # held-out clips
    long:int=300,                           # frames of a long walk
    speed:bool=False,                       # time the streams too: when nothing else runs
):
    """Measure teacher and students beside the world and the consistency student.
    The arms are what lies in the folder; a record that is there is gone on with."""
    from nfd_ref.arms import ArmsProtocol, ArmsRecord, compare_arms
    from nfd_ref.storage import require_record
    require_record(out, ArmsRecord)
    within(2, MANY, clips=clips)
    within(100, MANY, long=long)
    record = compare_arms(out, runs, world, student, data, branches, idm,
                          ArmsProtocol(clips=clips, long=long), speed)
    for name, row in record.rows.items():
        print(f'{name:28} F1 {row["f1"]:.3f}  texture {row["texture"]:.3f}')
    print(f'-> {out}')
