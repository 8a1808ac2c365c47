"""Is the token transformer a straw man? A GPT of the library `transformers` beside it, on the same
codes: `python tests/rival_gpt.py CODES RECORD` (pip install transformers; no dependency of ours).

CODES is the cache of encoded training video that `nfd-ref compare OUT` leaves in OUT/codes (and
OUT/codes_test), RECORD its comparison.json, into which the result is written as "library".
Protocol: GPT-2 and Llama of the same width, depth and heads; the same clips in the same order, the
same AdamW, warm-up and gradient clipping; the loss on held-out clips, nats a code. Then raster
generation with a cache, all in float32, one code a call, in turns."""
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nfd_ref.autoregression import CodeClips, TokenTransformer, nats
from nfd_ref.command import VIDEO
from nfd_ref.loop import TrainConfig, lr_scale
from nfd_ref.rivals import PLANS
from nfd_ref.storage import ComparisonRecord, read_record, write_record
from nfd_ref.token_world import TokenCache, choose
from nfd_ref.video import VideoFolder

CFG = TrainConfig(steps=80, batch=2, lr=2.5e-3, warmup=10)
OURS = PLANS['cpu'].tokens
LENGTH = PLANS['cpu'].length
PLACES = OURS.tokens + 1    # of a frame: the action, then its codes
BETWEEN = 20                # steps between two looks at the held-out loss


def clips_of(cache, split):
    "The clips that `compare` learned from, out of its cache."
    videos = VideoFolder(VIDEO, split)
    actions = np.concatenate([videos.actions(e) for e in range(len(videos))])
    first = np.cumsum([0] + [frames for _, frames in videos.episodes])
    latents = np.load(cache.with_suffix('.npy'), mmap_mode='r')
    return CodeClips(latents, actions, first, LENGTH, CFG.batch, CFG.seed)


def sentence(codes, actions):
    "The clip as a GPT reads it: int [b, frames * PLACES]. Actions are words behind the codes."
    word = OURS.vocabulary + 1 + actions                # NULL is the first of them
    return torch.cat([word, codes.flatten(2)], 2).flatten(1)


def library_nats(model, codes, actions):
    "Nats a code, [b, f]: what stands before a code answers for it."
    logits = model(sentence(codes, actions)).logits
    answers = logits.unflatten(1, (codes.shape[1], PLACES))[:, :, :-1, :]
    surprise = F.cross_entropy(answers.flatten(0, 2), codes.flatten(), reduction='none')
    return surprise.view(*codes.shape[:2], -1).mean(-1)


def our_nats(model, codes, actions): return nats(model(codes, actions), codes)


def library_models():
    "Two of the library's, of our width, depth and heads."
    words = OURS.vocabulary + 1 + OURS.actions[0]
    shared = dict(vocab_size=words, bos_token_id=0, eos_token_id=0)
    gpt2 = GPT2Config(n_embd=OURS.d, n_layer=OURS.layers, n_head=OURS.heads,
                      n_positions=LENGTH * PLACES, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.,
                      tie_word_embeddings=False, **shared)
    llama = LlamaConfig(hidden_size=OURS.d, num_hidden_layers=OURS.layers,
                        num_attention_heads=OURS.heads, intermediate_size=256,
                        max_position_embeddings=LENGTH * PLACES, tie_word_embeddings=False,
                        **shared)
    return dict(gpt2=GPT2LMHeadModel(gpt2), llama=LlamaForCausalLM(llama))


def learn(model, loss, train, test):
    "Train; the held-out nats every `BETWEEN` steps."
    optimizer = torch.optim.AdamW(model.parameters(), CFG.lr, betas=CFG.betas,
                                  weight_decay=CFG.weight_decay)
    found = []
    for step in range(CFG.steps):
        for group in optimizer.param_groups: group['lr'] = CFG.lr * lr_scale(step, CFG)
        optimizer.zero_grad()
        loss(model, *train(step)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CFG.clip)
        optimizer.step()
        if (step + 1) % BETWEEN == 0:
            model.eval()
            with torch.no_grad():
                held_out = np.mean([loss(model, *test(i)).mean().item() for i in range(4)])
            model.train()
            found.append(round(float(held_out), 4))
            print(type(model).__name__, step + 1, found[-1], flush=True)
    return found


@torch.inference_mode()
def time_library(model, context, codes):
    "Milliseconds a code of greedy cached generation behind `context`."
    past = model(context, use_cache=True)
    word = past.logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(codes):
        past = model(word, past_key_values=past.past_key_values, use_cache=True)
        word = past.logits[:, -1:].argmax(-1)
    return 1e3 * (time.perf_counter() - started) / codes


@torch.inference_mode()
def time_ours(model, codes, actions):
    "Milliseconds a code of a frame, as `TokenWorld` makes it, behind the same frames."
    order = model.order('raster')
    cache = TokenCache(model.cfg, len(order), model.head.weight)
    x = model.embed(codes.flatten(2), actions, order).flatten(1, 2)
    turn = model.turns(0, codes.shape[1], order, x)
    model.core(x, cache, turn=turn, causal=True)
    cache.past = x.shape[1]
    made = torch.zeros(1, 1, OURS.tokens, dtype=torch.long)
    started = time.perf_counter()
    asked, known = model.turns(codes.shape[1], 1, order, x)
    for i in range(OURS.tokens):
        fed = order.elements(i)
        one = model.embed(made, actions[:, :1], order, fed)[0]
        turn = [[part[fed] for part in pair] for pair in (asked, known)]
        y = model.core(one, cache, turn=turn)
        cache.held += 1
        made[0, 0, i] = choose(model.head(y[0]), torch.zeros(1), 0.)
    return 1e3 * (time.perf_counter() - started) / OURS.tokens


def race(models, codes, actions, turns=9):
    "Median milliseconds a code, in turns."
    codes, actions = codes[:1, :LENGTH - 1], actions[:1, :LENGTH - 1]
    took = {name: [] for name in models}
    for _ in range(turns):
        for name, model in models.items():
            if name == 'ours': took[name].append(time_ours(model, codes, actions))
            else:
                words = sentence(codes, actions)
                took[name].append(time_library(model, words, OURS.tokens))
    return {name: round(float(np.median(ms[1:])), 3) for name, ms in took.items()}


def main(cache, path):
    train = clips_of(cache, 'train')
    test = clips_of(cache.with_name(f'{cache.name}_test'), 'test')
    models = {}
    losses = {}
    record = read_record(path, ComparisonRecord)
    found = dict(record.library)
    for name in ('gpt2', 'llama', 'ours'):
        torch.manual_seed(0)
        models[name] = TokenTransformer(OURS) if name == 'ours' else library_models()[name]
        if 'nats' in found: continue
        loss = our_nats if name == 'ours' else library_nats
        losses[name] = learn(models[name], loss, train, test)
    if losses: found['nats'] = losses
    found |= dict(
        ms_a_code=race({name: model.eval() for name, model in models.items()}, *train(0)),
        threads=torch.get_num_threads(),
        parameters={name: sum(p.numel() for p in m.parameters()) for name, m in models.items()},
        steps=CFG.steps, batch=CFG.batch, length=LENGTH, every=BETWEEN,
        version=transformers.__version__)
    record.library = found
    write_record(path, record)
    print(found)


if __name__ == '__main__': main(Path(sys.argv[1]), Path(sys.argv[2]))
