"Small things that several tests begin with: two short episodes, a world of random weights."
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from nfd_ref.storage import WorldInfo, read_record, save_model, write_record
from nfd_ref.transformer import DiT
from nfd_ref.video import VideoFolder, save_episode

DATA = Path(__file__).parents[1]/'data'

def noisy_dit(cfg, seed=0):
    "A network none of whose layers is zero."
    torch.manual_seed(seed)
    dit = DiT(cfg)
    for p in dit.parameters(): nn.init.normal_(p, std=.1)
    return dit

def two_episodes(folder, frames=60):
    "A folder of two short episodes, one of them held out: its training split."
    shipped = VideoFolder(DATA/'my_way_home', 'train')
    for i in range(2): save_episode(folder, f'ep_{i}', shipped.clip(i, 0, frames))
    write_record(folder/'dataset.json', replace(shipped.info, test=('ep_1',)))
    return VideoFolder(folder, 'train')

def world_folder(folder, cfg, seed=0):
    "A world of this shape, with random weights and the shipped tokenizer."
    info = read_record(DATA/'world'/'world.json', WorldInfo)
    save_model(folder, noisy_dit(cfg, seed), replace(info, shape=asdict(cfg)))
    for name in ('tokenizer.json', 'tokenizer.safetensors'):
        shutil.copy(DATA/'world'/name, folder/name)
    return folder
