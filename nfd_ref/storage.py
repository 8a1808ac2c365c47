"""What is kept on disk and how: whole files or none, JSON that is checked, weights without pickles.
Written by hand; the ground that every other module may stand on."""

import json
import os
import platform
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

__all__ = [
    'write_aside', 'write_json', 'read_json', 'from_json', 'read_record', 'write_record',
    'DatasetInfo',
    'ModelInfo', 'TokenizerInfo', 'WorldInfo', 'JudgeInfo', 'Report', 'BenchRecord', 'GrowthRecord',
    'save_tensors', 'load_tensors', 'load_into', 'fingerprint', 'save_model', 'load_model',
    'provenance']

# ---- whole files

@contextmanager
def write_aside(path):
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it
    fails: never half a file (or folder)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'.{path.stem}.{os.getpid()}.part{path.suffix}')
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        if tmp.is_dir(): shutil.rmtree(tmp)
        else: tmp.unlink(missing_ok=True)

def write_json(path, obj):
    "Write `obj` as indented JSON, whole or not at all."
    with write_aside(path) as tmp: tmp.write_text(json.dumps(obj, indent=1) + '\n')

def read_json(path):
    "Read a JSON file, or say what is wrong with it."
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f'{path}: not readable as JSON ({e})') from None

# ---- records: JSON files that several places read or write, each declared once

def from_json(
    cls,            # a dataclass
    values,         # dict, as it came from JSON
    where           # the file, named in errors
):
    "The dataclass with these values. A field that is unknown, missing or invalid: `ValueError`."
    if not isinstance(values, dict):
        raise ValueError(f'{where}: not a valid {cls.__name__}: a JSON object is wanted')
    known = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    for name in values:
        if name not in known:
            raise ValueError(f'{where}: not a valid {cls.__name__}: unknown field "{name}"; '
                             f'it has {", ".join(sorted(known))}')
    missing = sorted(needed - set(values))
    if missing:
        raise ValueError(f'{where}: not a valid {cls.__name__}: no field "{missing[0]}"')
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**given)
    except (AttributeError, TypeError, ValueError) as e:
        raise ValueError(f'{where}: not a valid {cls.__name__}: {e}') from None

def read_record(
    path,           # a JSON file
    cls             # the dataclass that declares it, one of those below
):
    "A record from its file; unknown or missing fields and other formats or kinds are errors."
    values = read_json(path)
    declared = {f.name: f.default for f in fields(cls)}
    for name in ('format', 'kind'):     # first, for another format has other fields
        if name not in declared or not isinstance(values, dict): continue
        given = values.get(name, declared[name])
        if given != declared[name]:
            raise ValueError(f'{path}: {name} {given!r}, '
                             f'but {cls.__name__} is {name} {declared[name]!r}')
    return from_json(cls, values, path)

def write_record(path, record):
    "Write a record as JSON. Fields that are None are left out."
    write_json(path, {k: v for k, v in asdict(record).items() if v is not None})

@dataclass(kw_only=True)
class DatasetInfo:
    "dataset.json: what a folder of video says of itself."
    format: int = 1
    fps: float                      # frames per second
    action_space: dict              # fields of `ActionSpace`
    test: tuple = None              # names of the held-out episodes; None: every eighth
    recorder: dict = None           # how ViZDoom was recorded, where it was
    branches: dict = None           # how its episodes branch, where they do

    def __post_init__(self):
        if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)) or self.fps <= 0:
            raise ValueError(f'fps is a number above 0, not {self.fps!r}')

@dataclass(kw_only=True)
class ModelInfo:
    "What stands in the JSON beside a file of weights."
    format: int = 1
    kind: str = 'model'
    shape: dict                     # fields of the model's config
    train: dict                     # fields of `TrainConfig`
    data: str                       # fingerprint of the video it was trained on
    commit: str = None              # of this package, when it was trained
    torch: str = None               # versions and processor, from `provenance`
    python: str = None
    device: str = None

@dataclass(kw_only=True)
class TokenizerInfo(ModelInfo):
    "tokenizer.json"
    kind: str = 'tokenizer'

@dataclass(kw_only=True)
class JudgeInfo(ModelInfo):
    "idm.json"
    kind: str = 'idm'

@dataclass(kw_only=True)
class WorldInfo(ModelInfo):
    "world.json: a trained or distilled world, and how it is best played."
    kind: str = 'world'
    action_space: dict              # fields of `ActionSpace`
    fps: float                      # frames per second it was trained at
    size: tuple                     # (height, width) of a frame in pixels
    length: int = None              # frames of a training clip
    levels: dict = None             # fields of `NoiseLevels`
    mistakes: float = 0.            # share of context frames that were the model's own guesses
    method: dict = None             # how it was distilled, where it was
    teacher: dict = None            # fingerprints of the weights it was distilled from
    init: str = None                # fingerprint of the weights its training began with
    before: tuple = ()              # the trainings before this one, oldest first
    tokenizer: str = '.'            # folder of the tokenizer, from this file's
    sampling: dict = field(default_factory=dict)    # arguments of `World` measured best
    sampling_trial: tuple = None    # what was tried to find them
    metrics: dict = None            # measured at release

@dataclass(kw_only=True)
class Report:
    "What `evaluate` writes."
    format: int = 2
    protocol: dict                  # fields of `Protocol`
    seed: int
    data: str                       # fingerprint of the video that judged
    weights: dict                   # fingerprints: tokenizer, world, idm
    world: dict                     # how it was played: steps, sampler, context_noise, engine
    metrics: dict                   # {name of the metric: what it found}
    commit: str = None
    torch: str = None
    python: str = None
    device: str = None

@dataclass(kw_only=True)
class BenchRecord:
    "What `bench` writes: protocol, machine, race."
    format: int = 1
    card: dict                      # the protocol
    machine: dict                   # {dtype: {'flops', 'bytes'} per second, measured}
    ladder: dict                    # {engine: what was measured}

@dataclass(kw_only=True)
class GrowthRecord:
    "What `bench --growth` writes: what a frame costs as one thing grows."
    format: int = 1
    card: dict
    machine: dict
    frames: tuple
    window: tuple
    steps: tuple
    batch: tuple
    size: tuple

# ---- weights

def save_tensors(path, tensors, dtype=None):
    "Write tensors as safetensors, whole or not at all; `dtype` converts the floating ones."
    def kept(v):
        v = v.detach()
        if dtype is not None and v.is_floating_point(): v = v.to(dtype)
        return v.contiguous().cpu()
    with write_aside(path) as tmp: save_file({k: kept(v) for k, v in tensors.items()}, tmp)

def load_tensors(path):
    "The tensors of a safetensors file, or an error that names it."
    if not Path(path).exists(): raise FileNotFoundError(f'{path}: no such weights')
    try:
        return load_file(str(path))
    except SafetensorError as e:
        raise ValueError(f'{path}: not a whole safetensors file ({e}); '
                         'it may be cut short, get it again') from None

def load_into(model, tensors, what):
    """Put `tensors` into `model`, all of them and in the right shapes, or raise a `ValueError` that
    names the first that does not fit."""
    own = model.state_dict()
    other = 'these weights belong to a model of another shape'
    for k in sorted(own.keys() | tensors.keys()):
        if k not in tensors: raise ValueError(f'{what}: no tensor "{k}"; {other}')
        if k not in own: raise ValueError(f'{what}: tensor "{k}" is not of this model; {other}')
        if own[k].shape != tensors[k].shape:
            raise ValueError(f'{what}: "{k}" is {list(tensors[k].shape)}, '
                             f'the config says {list(own[k].shape)}')
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()})
    return model

def fingerprint(path):
    "Of a file of weights, 16 hex digits of sha256: what was trained from it, measured with it."
    return sha256(Path(path).read_bytes()).hexdigest()[:16]

def save_model(
    folder,         # KIND.safetensors is written into it, then KIND.json
    model,          # its weights
    info,           # a `ModelInfo` of some kind
    dtype=torch.float16
):
    "Keep a model: weights as safetensors, its shape and history as JSON beside them."
    save_tensors(Path(folder)/f'{info.kind}.safetensors', model.state_dict(), dtype)
    write_record(Path(folder)/f'{info.kind}.json', info)

def load_model(
    folder,         # where `save_model` put it
    info_cls,       # `TokenizerInfo`, `WorldInfo`, `JudgeInfo`
    model_cls,      # made from its config
    config_cls
):                  # the model in eval mode, float32, and its info
    "The model that `save_model` kept."
    if not Path(folder).is_dir(): raise FileNotFoundError(f'{folder}: no such folder')
    kind = {f.name: f.default for f in fields(info_cls)}['kind']
    path = Path(folder)/f'{kind}.json'
    weights = path.with_suffix('.safetensors')
    info = read_record(path, info_cls)
    model = model_cls(from_json(config_cls, info.shape, path))
    return load_into(model, load_tensors(weights), weights).eval(), info

def provenance():
    "Where a result comes from: package commit, versions, processor."
    here = Path(__file__).parent
    command = ['git', 'rev-parse', '--short', 'HEAD']
    try:
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:   # no git on this machine
        commit = ''
    device = f'CPU, {torch.get_num_threads()} threads'
    if torch.cuda.is_available(): device = torch.cuda.get_device_name()
    return dict(
        commit=commit or None,
        torch=torch.__version__,
        python=platform.python_version(),
        device=device)
