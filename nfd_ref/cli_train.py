"""Commands that train: `train ...`, `distill ...`. Written by hand (see `command`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from fastcore.meta import delegates

from nfd_ref.command import GROUPS, MANY, SEEDS, WORLD, Wanted
from nfd_ref.command import chosen, command, load_tokenizer, within

GROUPS.update({
    'train': """Train a tokenizer, a world or a judge of actions.
        `torchrun --nproc_per_node=N -m nfd_ref.cli train ...` uses N processes.""",
    'distill': """Make a trained world need fewer steps.
        OUT/final is playable; a run that was stopped goes on with --resume."""})

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
