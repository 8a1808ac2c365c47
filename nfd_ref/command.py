"""From functions to a command line: parameters, with the comments beside them, are arguments.
Written by hand."""

import argparse
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from fastcore.script import anno_parser

from nfd_ref.files import home

__all__ = ['COMMANDS', 'GROUPS', 'command', 'parser', 'main', 'chosen', 'within', 'engine_kwargs',
           'called', 'world_class']

ROOT = home(Path(__file__).resolve().parent.parent)     # defaults are shown from here

SHIPPED = ROOT/'data'
WORLD = SHIPPED/'world'
STUDENT = SHIPPED/'distilled'
VIDEO = SHIPPED/'my_way_home'
BRANCHES = SHIPPED/'branches'
JUDGE = SHIPPED/'idm'
WALKS = SHIPPED/'walks'
DEPTH = SHIPPED/'depth'

Wanted = dict(required=True)            # of a flag that must be given

EXPECTED = ValueError, OSError, RuntimeError, ImportError, FloatingPointError
COMMANDS = {}                           # {words of a command: (function, positional arguments)}
GROUPS = {}                             # {first word of two: what --help says of it}

def command(*positional):
    "Decorator: `cmd_train_world` is the command `train world`; `positional` need no flag."
    def register(func):
        words = tuple(func.__name__.split('_')[1:])
        COMMANDS[words] = (func, list(positional))
        return func
    return register

def add_command(commands, word, about):
    "A subcommand, without arguments yet; the first line of `about` stands in the list of commands."
    first_line = about.splitlines()[0].rstrip('.')
    return commands.add_parser(word, help=first_line[0].lower() + first_line[1:], description=about)

def add_arguments(parser, func, positional):
    "A function's parameters as fastcore reads them, with defaults as one would type them."
    for action in anno_parser(func, pos=positional)._actions:
        if action.dest in ('help', 'pdb', 'xtra'): continue             # added by fastcore
        default = f' (default: {action.default})'
        is_switch = action.nargs == 0
        shown = '' if is_switch else default.replace(f'{ROOT}/', '')
        action.help = action.help.replace(default, shown)
        parser._add_action(action)

def parser():
    "All commands and their arguments; `parse_args` gives the arguments and `run`, the function."
    top = argparse.ArgumentParser(
        'nfd-ref',
        description='Next-Frame Diffusion: record a game, train a network to be it, play it.',
        epilog='A command with --help says more, for instance: nfd-ref play --help')
    top.add_argument('--debug', action='store_true', help='show where in the code an error arose')
    commands = top.add_subparsers(dest='command', metavar='COMMAND')
    groups = {}
    for (word, *what), (func, positional) in COMMANDS.items():
        if what and word not in groups:
            choices = '|'.join(more[0] for first, *more in COMMANDS if first == word)
            group = add_command(commands, word, GROUPS[word])
            groups[word] = group.add_subparsers(dest='what', metavar=choices, required=True)
        where = groups[word] if what else commands
        one = add_command(where, (what or [word])[0], func.__doc__)
        add_arguments(one, func, positional)
        one.set_defaults(run=func)
    return top

def plain(problem):
    "What an error says, as one line that a terminal only shows: a name may hold escape codes."
    text = ' '.join(str(problem).split('\n'))
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)

class Lines:
    """A stream that is no terminal (a log, a pipe), for progress bars: where they would draw over
    themselves, a line now and then, and their last."""
    def __init__(self, stream, every=30.):
        self.stream = stream
        self.every = every              # seconds from line to line
        self.due = 0.                   # when there may be another
        self.bar = ''                   # drawn, and not written yet
        self.drawing = False            # was a bar the last thing?

    def write(self, text):
        if text.startswith('\r'):
            self.drawing = True
            self.bar = text.strip()
            if self.bar and time.monotonic() >= self.due: self.put()
            return
        if not text: return             # tqdm moves by no lines
        if self.bar: self.put()
        if not (self.drawing and text == '\n'): self.stream.write(text)     # `put` has ended it
        self.drawing = False

    def put(self):
        "The bar, as a line of its own."
        self.stream.write(f'{self.bar}\n')
        self.stream.flush()
        self.bar = ''
        self.due = time.monotonic() + self.every

    def __getattr__(self, name): return getattr(self.stream, name)

@contextmanager
def progress_in_lines():
    "Where stderr is no terminal, progress bars write lines to it."
    terminal = sys.stderr
    if not terminal.isatty(): sys.stderr = Lines(terminal)
    try:
        yield
    finally:
        sys.stderr = terminal

@contextmanager
def stoppable():
    "SIGTERM stops a command as Ctrl-C does: what it has made is kept. (In the main thread only.)"
    def stop(number, frame): raise KeyboardInterrupt
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

def main(argv=None):
    "Run a command; gives the exit code. A mistake of the user's is one line and exit code 2."
    top = parser()
    given = vars(top.parse_args(argv))
    word = given.pop('command')
    debug = given.pop('debug')
    given.pop('what', None)
    if word is None:
        top.print_help()
        return 0
    run = given.pop('run')
    try:
        with stoppable(), progress_in_lines(): run(**given)
    except KeyboardInterrupt as why:
        print(f'\nstopped {why}'.rstrip(), file=sys.stderr)
        return 130
    except EXPECTED as problem:
        if debug: raise
        print(f'nfd-ref {word}: {plain(problem)}', file=sys.stderr)
        return 2
    except Exception as problem:
        if debug: raise
        print(f'nfd-ref {word}: {type(problem).__name__}: {plain(problem)} '
              f'(nfd-ref --debug {word} ... shows where)', file=sys.stderr)
        return 2
    return 0

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

def called(folder):
    "A world's name in a record: that of its folder, or of the run whose end it is."
    return folder.parent.name if folder.name == 'final' else folder.name

def world_class(folder):
    "What loads a folder: a world of diffusion or, where there is a tokens.json, one of tokens."
    if not (folder/'tokens.json').exists():
        from nfd_ref.streaming import World
        return World
    from nfd_ref.token_world import TokenWorld
    return TokenWorld
