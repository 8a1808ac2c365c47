"A game of one's own: from a recording to play, as data/README.md tells it."
import shutil
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from nfd_ref.cli_train import how_to_play
from nfd_ref.consistency import CONSISTENCY_RECIPE, keep_student
from nfd_ref.console import Console
from nfd_ref.environment import make_env
from nfd_ref.gains import as_keys
from nfd_ref.play import CAMERA, Hands, bindings, stroll
from nfd_ref.release import keep_starts
from nfd_ref.session import home_video, starts_of
from nfd_ref.speed import key_at, still
from nfd_ref.storage import DatasetInfo, WorldInfo, read_record, write_record
from nfd_ref.streaming import World
from nfd_ref.terminal import key_map
from nfd_ref.transformer import DiTConfig
from nfd_ref.video import ActionSpace, Clip, VideoFolder, import_clips, save_episode
from nfd_ref.vpt import MINEWORLD
from test_cli import fails, works
from tiny import world_folder

SPACE = ActionSpace('climber', {
    'move': ('left', 'none', 'right'),      # the choice at rest is not the first
    'hands': ('none', 'climb', 'throw'),
    'jump': ('none', 'jump')})

def own_clips(count=3, frames=24):
    "A bar that goes where `move` says."
    rng = np.random.default_rng(0)
    for _ in range(count):
        actions = rng.integers(0, SPACE.sizes, (frames, 3))
        actions[0] = -1
        place = 40 + np.cumsum((actions[:, 0] - 1) * (np.arange(frames) > 0)) * 2
        pictures = np.full((frames, 48, 80, 3), 60, np.uint8)
        for picture, x in zip(pictures, place.clip(4, 76)): picture[20:30, x - 4:x + 4] = 220
        yield Clip(pictures, actions, SPACE, 10.)

@pytest.fixture(scope='module')
def game(tmp_path_factory): return import_clips(tmp_path_factory.mktemp('own')/'game', own_clips())

@pytest.fixture
def own_world(tmp_path, game):
    "A world of this game: random weights, no start clips."
    cfg = DiTConfig(d=64, layers=1, heads=1, rope=(16, 24, 24), window=4, actions=SPACE.sizes)
    folder = world_folder(tmp_path/'mine', cfg)
    info = read_record(folder/'world.json', WorldInfo)
    write_record(folder/'world.json', replace(info, action_space=asdict(SPACE), fps=10.))
    return folder

# ---- start clips

def test_a_world_without_clips_says_what_to_do(tmp_path, capsys, own_world, game):
    fails(capsys, tmp_path, 'play', own_world, says='holds no clips to start from; name a folder')
    fails(capsys, tmp_path, 'play', own_world, '--data', 'data/my_way_home', says='of its own game')
    works(capsys, 'play', own_world, '--data', game.folder, '--frames', 3,
          '--out', tmp_path/'a.mp4')

def test_a_world_plays_from_the_clips_it_carries(tmp_path, capsys, own_world, game):
    starts = keep_starts(own_world, VideoFolder(game.folder, 'test'), window=4, count=3)
    assert [count for _, count in starts.episodes] == [4, 4, 4]
    assert home_video(own_world) == starts.folder
    assert len(starts_of(starts.folder, 4)) == 3
    works(capsys, 'play', own_world, '--frames', 3, '--out', tmp_path/'a.mp4')
    works(capsys, 'bench', own_world, '--engines', 'rolling', '--frames', 2)

def test_a_student_starts_from_the_clips_of_its_teacher(tmp_path, own_world, game):
    keep_starts(own_world, VideoFolder(game.folder, 'test'), window=4)
    student = tmp_path/'run'/'final'
    student.mkdir(parents=True)
    info = read_record(own_world/'world.json', WorldInfo)
    write_record(student/'world.json', replace(info, tokenizer='../../mine'))
    assert home_video(student).resolve() == (own_world/'starts').resolve()

def test_a_student_takes_the_clips_along(tmp_path, own_world, game):
    keep_starts(own_world, VideoFolder(game.folder, 'test'), window=4)
    world = World.load(own_world, device='cpu')
    info = read_record(own_world/'world.json', WorldInfo)
    final = tmp_path/'final'
    keep_student(final, world.model, str(own_world), info, CONSISTENCY_RECIPE, {}, data='',
                 length=4)
    shutil.rmtree(own_world)
    assert how_to_play(final) == f'-> nfd-ref play {final}'
    starts = starts_of(home_video(final), 4)
    World.load(final, device='cpu').reset(starts[0].clip())
    shutil.rmtree(final/'starts')
    assert how_to_play(final, 'mine') == f'-> nfd-ref play {final} --data mine'

def test_every_player_takes_the_clips(own_world, game):
    with pytest.raises(ValueError, match='name a folder of video'): Console(own_world)
    keep_starts(own_world, VideoFolder(game.folder, 'test'), window=4, count=2)
    console = Console(own_world, device='cpu')
    console.close()
    assert len(console.starts) == 2
    frame, _ = make_env(own_world, device='cpu').reset(seed=0)
    assert frame.shape == (48, 80, 3)

# ---- rest

def test_rest_is_rest(own_world, game):
    world = World.load(own_world, device='cpu')
    assert SPACE.label(SPACE.rest) == 'none'
    np.testing.assert_array_equal(Hands(SPACE).read()[0], SPACE.rest)
    np.testing.assert_array_equal(stroll(SPACE)[:15], np.tile(SPACE.rest, (15, 1)))
    crafted = as_keys(MINEWORLD, np.zeros((3, 1), int))
    np.testing.assert_array_equal(crafted[:, 1:], np.tile(MINEWORLD.rest[1:], (3, 1)))
    np.testing.assert_array_equal(key_at(MINEWORLD, 0)[1:], MINEWORLD.rest[1:])
    np.testing.assert_array_equal(still(world).actions, np.tile(SPACE.rest, (4, 1)))
    first_without_none = ActionSpace('a', {'move': ('left', 'noop', 'right')})
    assert first_without_none.label(first_without_none.rest) == 'noop'

# ---- sizes and rates

def odd_clips(height, width, fps=10.):
    for clip in own_clips():
        yield Clip(np.zeros((len(clip), height, width, 3), np.uint8), clip.actions, SPACE, fps)

def test_a_size_that_cannot_be_trained_is_refused_when_the_folder_is_made(tmp_path):
    wanted = '84x84 pixels.*crop to 80x80 or pad to 96x96'
    with pytest.raises(ValueError, match=wanted): import_clips(tmp_path/'a', odd_clips(84, 84))
    with pytest.raises(ValueError, match='160x120 pixels.*160x112 or pad to 160x128'):
        import_clips(tmp_path/'a', odd_clips(120, 160))
    assert not list(tmp_path.iterdir())

def own_folder(folder, clip, fps):
    "A folder as a script might write it, without `import_clips`."
    save_episode(folder, 'a', clip)
    write_record(folder/'dataset.json', DatasetInfo(fps=fps, action_space=SPACE.record))
    return folder

def test_a_size_that_cannot_be_trained_is_refused_when_the_folder_is_opened(tmp_path):
    folder = own_folder(tmp_path/'a', next(odd_clips(84, 84)), 10)
    with pytest.raises(ValueError, match='a.mp4: 84x84 pixels'): VideoFolder(folder)

def test_a_wrong_rate_is_noticed(tmp_path):
    folder = own_folder(tmp_path/'a', next(own_clips()), 20)
    with pytest.raises(ValueError, match='10 FPS by its time stamps'):
        VideoFolder(folder)

def test_record_refuses_a_size_before_it_begins(tmp_path, capsys):
    fails(capsys, tmp_path, 'record', tmp_path/'a', '--size', '84x84', says='crop to 80x80')

# ---- keys

SPACES = {
    'own': SPACE,
    'minecraft': MINEWORLD,
    'eighteen': ActionSpace('a', {'move': ['noop', *(f'move {i}' for i in range(1, 18))]}),
    'two words': ActionSpace('b', {'x': ('none', 'left', 'right'), 'y': ('none', 'up', 'down')})}

@pytest.mark.parametrize('name', SPACES)
def test_every_choice_has_a_key(name):
    space = SPACES[name]
    words = set(bindings(space).values())
    keys = key_map(space)
    assert 'x' not in keys                                      # it leaves
    for i, (field, choices) in enumerate(space.fields.items()):
        if field in CAMERA: continue
        for number, choice in enumerate(choices):
            if number == space.rest[i]: continue
            assert choice in words
            assert any(sets.get(field) == choice for sets in keys.values()), choice

def test_a_key_of_one_s_own_travels_with_the_world(tmp_path, own_world):
    space = replace(SPACE, keys={'c': 'climb', 'up': 'jump'})
    assert space == SPACE and 'keys' not in SPACE.record
    info = read_record(own_world/'world.json', WorldInfo)
    write_record(own_world/'world.json', replace(info, action_space=space.record))
    world = World.load(own_world, device='cpu')
    assert bindings(world.space)['KeyC'] == 'climb'
    assert key_map(world.space)['up'] == {'jump': 'jump'}
    with pytest.raises(ValueError, match='key "c" plays "fly"'): replace(SPACE, keys={'c': 'fly'})
    odd = replace(SPACE, keys={'F13': 'jump'})
    with pytest.raises(ValueError, match='no key "F13"'): bindings(odd)

def test_fields_are_held_together():
    hands = Hands(SPACE)
    hands.hold('me', ['KeyD', 'Space'])
    assert SPACE.label(hands.read()[0]) == 'right jump'

def test_a_turn_that_is_latched_is_played():
    "A replay latches what was recorded; the mouse must not undo it."
    hands = Hands(MINEWORLD)
    hands.latched = MINEWORLD.index({'camera_x': 'left 5.15', 'jump': 'jump'})
    np.testing.assert_array_equal(hands.read()[0], hands.latched)
    hands.latched = MINEWORLD.rest
    hands.look(100, 0)
    assert hands.read()[0][1] > MINEWORLD.rest[1]

def test_a_front_end_s_mouse_turns_the_view(tmp_path):
    "A message `look` moves the camera of the next frame; the walk knows by how much."
    fields = {name: MINEWORLD.fields[name] for name in ('jump', *CAMERA)}
    space = ActionSpace('looker', fields)
    pictures = np.full((24, 48, 80, 3), 60, np.uint8)
    actions = np.tile(space.rest, (24, 1))
    clips = [Clip(pictures, actions, space, 10.)] * 3
    video = import_clips(tmp_path/'game', clips)
    cfg = DiTConfig(d=64, layers=1, heads=1, rope=(16, 24, 24), window=4, actions=space.sizes)
    folder = world_folder(tmp_path/'mine', cfg)
    info = read_record(folder/'world.json', WorldInfo)
    write_record(folder/'world.json', replace(info, action_space=asdict(space), fps=10.))

    console = Console(folder, video.folder, device='cpu')
    def say(what, **more): console.hear(dict(view='tab', what=what, **more))
    say('hello')
    say('look', x=100, y=-40)
    say('step')
    say('step')
    ends = time.monotonic() + 60
    while len(console.session.take) < 2 and time.monotonic() < ends: time.sleep(.02)
    has_camera = console.menu()['camera']
    console.close()
    assert has_camera
    turned, still_turning = np.array(console.session.take)[:, 1:] - space.rest[1:]
    down, right = turned
    assert down < 0 < right
    assert (abs(still_turning) < abs(turned)).all()     # the rest of it, smaller
