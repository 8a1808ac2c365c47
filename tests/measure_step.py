"""What a step of training costs on a CPU, and what it could cost at least: `python
tests/measure_step.py OUT.json`. Four ways to take the step of the recipe `cpu`, in turns; a profile
of the quickest; and two things that might make it quicker. Alone on the machine, please."""

import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nfd_ref.attention import attend, block_causal_mask
from nfd_ref.diffusion import NoiseLevels
from nfd_ref.loop import Run
from nfd_ref.speed import machine
from nfd_ref.storage import provenance, write_json
from nfd_ref.training import WORLD_RECIPE, SpoiltClips, world_loss
from nfd_ref.transformer import DiT, DiTConfig

FRAMES = 24             # of a clip
WARM = 3                # steps of each way that do not count
ROUNDS = 9
WAYS = {                # name: fields of `TrainConfig`
    'float32': {},
    'float32, compiled': dict(compile=True),
    'bfloat16': dict(bf16=True),
    'bfloat16, compiled': dict(bf16=True, compile=True)}
KINDS = {               # what a profile's operators are; the first that fits counts
    'attention, backward': 'flash_attention_for_cpu_backward',
    'attention, forward': 'flash_attention_for_cpu',
    'products': ('aten::mm', 'aten::addmm', 'aten::bmm'),
    'compiled: norms, gates, casts': 'CompiledFxGraph',
    'optimizer, clipping and average': (
        'aten::lerp_', 'aten::mul_', 'aten::sqrt', 'aten::addcdiv_', 'aten::addcmul_', 'aten::div',
        'aten::add_', 'aten::linalg_vector_norm', 'Optimizer.step#AdamW.step')}

def clips(step):
    "Noise in the place of latents: a step costs the same."
    numbers = torch.Generator().manual_seed(step)
    cfg = DiTConfig()
    x0 = torch.randn(WORLD_RECIPE.batch, FRAMES, cfg.latents, *cfg.grid, generator=numbers)
    return x0, torch.randint(0, 9, (WORLD_RECIPE.batch, FRAMES, 1), generator=numbers)

def run_of(way):
    run = Run(tempfile.mkdtemp(), DiT(), replace(WORLD_RECIPE, steps=1000, **way))
    run.begin({}, False)
    return run

def step(run, batches):
    "Milliseconds of one step."
    started = time.perf_counter()
    run.advance(world_loss, batches)['loss'].item()
    return 1e3 * (time.perf_counter() - started)

def operations(batches):
    "Multiplications and additions of a step; every pair of tokens counts, seen or not."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(run_of({}), batches)
    return counter.get_total_flops()

def kind_of(name):
    for kind, names in KINDS.items():
        if isinstance(names, str) and names in name: return kind
        if name in names: return kind
    return 'the rest'

def shares(run, batches, steps=3):
    "Of a step's time, by kind of operator."
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps): step(run, batches)
    spent = dict.fromkeys([*KINDS, 'the rest'], 0.)
    for row in profiled.key_averages(): spent[kind_of(row.key)] += row.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: round(part / whole, 3) for kind, part in spent.items()}

def written_out(q, k, v, mask):
    "Attention in plain operations, for the compiler."
    scores = (q * q.shape[-1]**-.5) @ k.mT
    scores = scores.float().masked_fill(~mask, float('-inf'))
    return scores.softmax(-1).to(v.dtype) @ v

def bands_of(mask, tokens):         # [(queries, keys)], slices
    "So many queries at a time, and the keys that one of them sees."
    bands = []
    for first in range(0, len(mask), tokens):
        seen = mask[first:first + tokens].any(0).nonzero()
        bands.append((slice(first, first + tokens), slice(int(seen[0]), int(seen[-1]) + 1)))
    return bands

def in_bands(bands, q, k, v, mask):
    "The same, band by band."
    parts = [written_out(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[rows, keys])
             for rows, keys in bands]
    return torch.cat(parts, 2)

def attentions():
    "Forward and backward of one layer's attention in bfloat16, milliseconds, and its error."
    cfg = DiTConfig()
    mask = block_causal_mask(FRAMES, cfg.tokens, window=cfg.window)
    shape = WORLD_RECIPE.batch, cfg.heads, len(mask), cfg.d // cfg.heads
    numbers = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=numbers) for _ in range(3)]
    rough = [z.bfloat16().requires_grad_() for z in exact]
    slope = torch.randn(shape, generator=numbers).bfloat16()
    bands = partial(in_bands, bands_of(mask, 8 * cfg.tokens))
    ways = {
        'fused': attend,
        'written out, compiled': torch.compile(written_out, dynamic=False),
        'in bands of 8 frames, compiled': torch.compile(bands, dynamic=False)}
    truth = attend(*exact, mask)
    found = {}
    for name, way in ways.items():
        ms = []
        for _ in range(WARM + ROUNDS):
            for z in rough: z.grad = None
            started = time.perf_counter()
            made = way(*rough, mask)
            made.backward(slope)
            ms.append(1e3 * (time.perf_counter() - started))
        error = (made.float() - truth).norm() / truth.norm()
        found[name] = dict(ms=round(min(ms), 2), error=round(error.item(), 4))
    return found

def optimizers(run):
    "Milliseconds of AdamW's step over all weights."
    found = {}
    for name, fused in (('AdamW', False), ('AdamW, fused', True)):
        optimizer = torch.optim.AdamW(run.bare.parameters(), 0., fused=fused)
        ms = []
        for _ in range(WARM + ROUNDS):
            started = time.perf_counter()
            optimizer.step()
            ms.append(1e3 * (time.perf_counter() - started))
        found[name] = round(min(ms), 2)
    return found

def main(out):
    torch.set_num_threads(2)
    batches = SpoiltClips(clips, NoiseLevels())
    flops = operations(batches)
    runs = {name: run_of(way) for name, way in WAYS.items()}
    ms = {name: [] for name in runs}
    for _ in range(WARM + ROUNDS):
        for name, run in runs.items(): ms[name].append(step(run, batches))
    rows = {}
    for name, run in runs.items():
        dtype = torch.bfloat16 if run.cfg.bf16 else torch.float32
        rate = machine(torch.device('cpu'), dtype)['flops']
        median = float(np.median(ms[name][WARM:]))
        least = 1e3 * flops / rate
        rows[name] = dict(ms=round(median, 1), least_ms=round(least, 1),
                          rate_gflops=round(rate / 1e9), of_ceiling=round(least / median, 3))
        print(name, rows[name], flush=True)
    quickest = runs['bfloat16, compiled']
    mask = block_causal_mask(FRAMES, 1, window=DiTConfig().window)
    found = dict(
        format=1,
        card=dict(
            command='python tests/measure_step.py data/records/step.json',
            clips=f'{WORLD_RECIPE.batch} of {FRAMES} frames',
            gflop=round(flops / 1e9, 1),
            seen_pairs=round(mask.float().mean().item(), 3),
            cpu=torch.backends.cpu.get_cpu_capability(),
            **provenance()),
        rows=rows,
        profile=shares(quickest, batches),
        attention=attentions(),
        optimizer=optimizers(quickest))
    write_json(out, found)
    for what in ('profile', 'attention', 'optimizer'): print(what, found[what])

if __name__ == '__main__': main(sys.argv[1])
