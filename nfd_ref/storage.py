"""What is kept on disk and how: whole files or none, JSON that is checked, weights without pickles.
Written by hand; the ground that every other module may stand on."""

import json
import math
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nfd_ref.files import home, lock, require_out, sweep, unlock, write_aside

__all__ = [
    'write_aside', 'require_out', 'sweep', 'lock', 'unlock', 'write_json', 'read_json', 'from_json',
    'read_record', 'require_record', 'write_record', 'DatasetInfo', 'ModelInfo', 'TokenizerInfo',
    'CodesInfo', 'WorldInfo', 'TokensInfo', 'JudgeInfo', 'Report', 'BenchRecord', 'GrowthRecord',
    'ComparisonRecord', 'PlayRecord', 'STARTS', 'save_tensors', 'new_array', 'load_tensors',
    'load_into', 'fingerprint', 'save_model', 'load_model', 'shipped', 'provenance']

# ---- JSON

def write_json(path, obj):
    """Write `obj` as indented JSON, whole or not at all. JSON has no NaN: what is no number (a mean
    over nothing, say) is null there, and a warning says where."""
    lost = []
    clean = json_numbers(obj, '', lost)
    if lost: warnings.warn(f'{path}: no number at {", ".join(lost[:5])}; null is written')
    with write_aside(path) as tmp: tmp.write_text(json.dumps(clean, indent=1) + '\n')

def json_numbers(obj, place, lost):
    "`obj` with None for each float that is nan or infinite; their places are added to `lost`."
    if isinstance(obj, dict):
        return {key: json_numbers(value, f'{place}/{key}', lost) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [json_numbers(value, f'{place}/{i}', lost) for i, value in enumerate(obj)]
    if not isinstance(obj, float) or math.isfinite(obj): return obj
    lost.append(place or '/')
    return None

def read_json(path):
    "Read a JSON file, or say what is wrong with it."
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f'{path}: not readable as JSON ({e})') from None

# ---- records: JSON files that several places read or write, each declared once
PAIR = tuple[int, int]

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
    for f in fields(cls):
        if f.name in given and not fits(given[f.name], f):
            raise ValueError(f'{where}: not a valid {cls.__name__}: {f.name} is {wanted(f)}, '
                             f'not {given[f.name]!r}')
    try:
        return cls(**given)
    except (AttributeError, TypeError, ValueError) as e:
        raise ValueError(f'{where}: not a valid {cls.__name__}: {e}') from None

def fits(value, declared):
    "Is a value of the type that a field declares? Numbers: finite. In a tuple: as in its default."
    if value is None: return declared.default is None
    if declared.type is float: return is_number(value)
    if declared.type is int: return isinstance(value, int) and not isinstance(value, bool)
    if declared.type == PAIR: return isinstance(value, tuple) and [*map(type, value)] == [int, int]
    if declared.type is tuple and isinstance(value, tuple):
        like = {type(item) for item in declared.default or ()} if has_default(declared) else set()
        return len(like) != 1 or {type(item) for item in value} <= like
    return not isinstance(declared.type, type) or isinstance(value, declared.type)

def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

def has_default(declared): return declared.default is not MISSING

def wanted(declared):
    "The type of a field, in words."
    words = {int: 'a whole number', float: 'a number', str: 'text', bool: 'true or false',
             dict: 'an object', tuple: 'a list', PAIR: 'two whole numbers'}
    text = words.get(declared.type, str(declared.type))
    if declared.type is tuple and has_default(declared) and declared.default:
        text += f' such as {list(declared.default)}'
    return text

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

def require_record(path, cls):
    """`require_out` for a record: a file that is there already must look like one of this class,
    in this format or another."""
    require_out(path, '.json')
    path = Path(path)
    if not path.exists() or not path.stat().st_size: return
    try:
        values = read_json(path)
    except ValueError:
        values = None
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    kind = getattr(cls, 'kind', None)
    ours = isinstance(values, dict) and needed <= set(values)
    if not ours or values.get('kind', kind) != kind:
        raise ValueError(f'{path}: this file is no {cls.__name__} and is not replaced; '
                         'give another name')

def write_record(path, record):
    """Write a record as JSON, in place of none but its own kind (`require_record`). Fields that are
    None are left out."""
    require_record(path, type(record))
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
        if self.test is not None and not all(isinstance(name, str) for name in self.test):
            raise ValueError('test is a list of names of episodes')

@dataclass(kw_only=True)
class ModelInfo:
    "What stands in the JSON beside a file of weights."
    format: int = 1
    kind: str = 'model'
    shape: dict                     # fields of the model's config
    train: dict                     # fields of `TrainConfig`
    data: str                       # fingerprint of the video it was trained on
    weights: str = None             # fingerprint of the weights, checked when they are read
    commit: str = None              # of this package, when it was trained
    torch: str = None               # versions and processor, from `provenance`
    python: str = None
    device: str = None

@dataclass(kw_only=True)
class TokenizerInfo(ModelInfo):
    "tokenizer.json"
    kind: str = 'tokenizer'

@dataclass(kw_only=True)
class CodesInfo(ModelInfo):
    "codes.json: a tokenizer whose latents are whole numbers."
    kind: str = 'codes'
    init: str = None                # fingerprint of the tokenizer whose trunk it began with

@dataclass(kw_only=True)
class JudgeInfo(ModelInfo):
    "idm.json"
    kind: str = 'idm'

STARTS = 'starts'       # in a world's folder: clips to begin from, a folder of video

@dataclass(kw_only=True)
class WorldInfo(ModelInfo):
    "world.json: a trained or distilled world, and how it is best played."
    kind: str = 'world'
    action_space: dict              # fields of `ActionSpace`
    fps: float                      # frames per second it was trained at
    size: PAIR                      # (height, width) of a frame in pixels
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

    def history(self):
        "The trainings up to and with this one, oldest first: `before` of a world that goes on."
        this = {name: getattr(self, name) for name in ('train', 'data', 'commit', 'device')}
        return (*self.before, this)

@dataclass(kw_only=True)
class TokensInfo(ModelInfo):
    "tokens.json: a token transformer and how it is best played; codes.* lie beside it."
    kind: str = 'tokens'
    action_space: dict              # fields of `ActionSpace`
    fps: float                      # frames per second it was trained at
    size: PAIR                      # (height, width) of a frame in pixels
    length: int                     # frames of a training clip
    order: str                      # in which a frame's codes were learned
    codes: str                      # fingerprint of the weights of its tokenizer
    init: str = None                # fingerprint of the weights its training began with
    before: tuple = ()              # the trainings before this one, oldest first
    sampling: dict = field(default_factory=dict)    # arguments of `TokenWorld` measured best
    sampling_trial: tuple = None    # what was tried to find them

    def history(self):
        "The trainings up to and with this one, oldest first."
        this = {name: getattr(self, name) for name in ('train', 'data', 'commit', 'device')}
        return (*self.before, this)

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
class PlayRecord:
    "What stands beside the film of a walk: all that is needed to make the same frames again."
    format: int = 1
    kind: str = 'play'
    setting: dict                   # fields of `session.Setting`, folders from this file's
    weights: str                    # fingerprint of the world's
    clip: str                       # sha256 of the frames that it starts from
    actions: str                    # as `parse_actions` reads them
    frames: int                     # that were made
    digest: str                     # sha256 of them all, in a row
    fps: float
    threads: int = None             # of PyTorch; None: not noted
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
class SpeculationRecord:
    "What `bench --speculate` writes: what drafts cost, gain and spoil."
    format: int = 1
    worlds: dict                    # {world: {'card', 'costs', 'throughput', 'paced', 'quality'}}

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

@dataclass(kw_only=True)
class ComparisonRecord:
    "What `compare` writes: words against frames."
    format: int = 1
    kind: str = 'comparison'
    card: dict                      # the protocol
    plan: dict                      # fields of `Plan`
    codes: dict                     # {bottleneck: what was measured}
    held_out: dict                  # {arm: its loss at the end of the training}
    rows: dict = field(default_factory=dict)        # {who plays: what was measured}
    speed: dict = field(default_factory=dict)       # {who plays: {'cached', 'fastest'}}
    library: dict = field(default_factory=dict)     # a GPT that others wrote, on the same codes

# ---- weights

def save_tensors(path, tensors, dtype=None):
    "Write tensors as safetensors, whole or not at all; `dtype` converts the floating ones."
    def kept(v):
        v = v.detach()
        if dtype is not None and v.is_floating_point(): v = v.to(dtype)
        return v.contiguous().cpu()
    with write_aside(path) as tmp:
        try:
            save_file({k: kept(v) for k, v in tensors.items()}, tmp)
        except SafetensorError as e:
            raise OSError(f'{path}: not written ({e}); is there room on the disk?') from None

def new_array(path, dtype, shape):
    """A NumPy file to be filled through memory. Its room on the disk is taken first: to write into
    a file that has none would end the process without a word."""
    array = np.lib.format.open_memmap(path, 'w+', dtype, shape)
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'r+b') as file:
            try:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
            except OSError as e:
                raise OSError(e.errno, e.strerror, str(path)) from None
    return array

def load_tensors(path):
    "The tensors of a safetensors file, or an error that names it."
    if not Path(path).exists(): raise FileNotFoundError(f'{path}: no such weights')
    try:
        return load_file(str(path))
    except SafetensorError as e:
        raise ValueError(f'{path}: not a whole safetensors file ({e}); '
                         'it may be cut short, get it again') from None

def require_fit(tensors, own, what):
    "Are `tensors` those of `own` {name: tensor}, in its shapes? A `ValueError` names what is not."
    other = 'these weights belong to a model of another shape'
    for k in sorted(own.keys() | tensors.keys()):
        if k not in tensors: raise ValueError(f'{what}: no tensor "{k}"; {other}')
        if k not in own: raise ValueError(f'{what}: tensor "{k}" is not of this model; {other}')
        if own[k].shape != tensors[k].shape:
            raise ValueError(f'{what}: "{k}" is {list(tensors[k].shape)}, '
                             f'the config says {list(own[k].shape)}')
        if own[k].is_floating_point() != tensors[k].is_floating_point():
            raise ValueError(f'{what}: "{k}" is of type {tensors[k].dtype}, '
                             f'this model has {own[k].dtype}')
        if not tensors[k].isfinite().all():
            raise ValueError(f'{what}: "{k}" holds values that are no numbers (nan or infinite): '
                             'its training failed, or the file is spoilt')

def load_into(model, tensors, what):
    "Put `tensors` into `model`, all of them and in the right shapes, or say what does not fit."
    own = model.state_dict()
    require_fit(tensors, own, what)
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()})
    return model

def fingerprint(path):
    "Of a file of weights, 16 hex digits of sha256: what was trained from it, measured with it."
    return sha256(Path(path).read_bytes()).hexdigest()[:16]

def save_model(
    folder,         # KIND.safetensors is written into it, then KIND.json
    model,          # its weights
    info,           # a `ModelInfo` of some kind
    dtype=torch.float16,
    beside=()       # files that it needs, copied into the folder
):
    """Keep a model: weights as safetensors, its shape and history as JSON beside them. Of several
    processes the first one writes."""
    if os.environ.get('RANK', '0') != '0': return
    folder = Path(folder)
    if not folder.exists():         # it appears with both files in it
        with write_aside(folder) as tmp:
            tmp.mkdir()
            save_model(tmp, model, info, dtype, beside)
        return
    for file in beside: shutil.copy(file, folder)
    weights = folder/f'{info.kind}.safetensors'
    save_tensors(weights, model.state_dict(), dtype)
    write_record(weights.with_suffix('.json'), replace(info, weights=fingerprint(weights)))

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
    cfg = from_json(config_cls, info.shape, path)
    check_sizes(cfg, path)
    model = load_into(model_cls(cfg), load_tensors(weights), weights)
    if info.weights and fingerprint(weights) != info.weights:
        raise ValueError(f'{weights}: not the weights that {path.name} tells of; '
                         'one of the two was changed or spoilt, get both again')
    return model.eval(), info

MOST = 10_000       # no number of a shape is larger: what is asked for has to fit into memory

def check_sizes(cfg, where):
    "Every whole number of a model's config is at least 1 and no more than `MOST`."
    for name, value in asdict(cfg).items():
        for number in value if isinstance(value, tuple) else (value,):
            whole = isinstance(number, int) and not isinstance(number, bool)
            if whole and not 1 <= number <= MOST:
                raise ValueError(f'{where}: {name} is {value}, wanted 1 to {MOST}')

def shipped(name):
    "The path of something in the repository's data/, from wherever we are."
    path = home(Path(__file__).resolve().parent.parent)/'data'/name
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such file; data/ comes with a clone of the repository')
    return Path(os.path.relpath(path))

def provenance():
    "Where a result comes from: package commit, versions, processor."
    here = Path(__file__).parent
    command = ['git', 'rev-parse', '--short', 'HEAD']
    try:
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:             # no git on this machine, or one that does not start
        commit = ''
    device = f'CPU, {torch.get_num_threads()} threads'
    if torch.cuda.is_available(): device = torch.cuda.get_device_name()
    return dict(
        commit=commit or None,
        torch=torch.__version__,
        python=platform.python_version(),
        device=device)
