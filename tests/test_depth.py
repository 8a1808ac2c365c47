"Distances: recorded beside frames, learned, and refused where they do not belong."
import numpy as np
import pytest

from nfd_ref import cli, evaluation
from nfd_ref.depth import NEAR, REACH, faces_wall, load_depth_judge, view_distance
from nfd_ref.storage import shipped
from nfd_ref.video import VideoFolder

def test_a_doorway_of_a_fifth_is_a_view():
    depth = np.full((48, 80), 3, np.uint8)
    assert view_distance(depth) == 3
    depth[:, :8] = 40               # a tenth of the width
    assert view_distance(depth) == 3
    depth[:, :20] = 40              # a quarter
    assert view_distance(depth) == 40
    depth[:20] = 3                  # the ceiling says nothing
    assert view_distance(depth) == 40

def test_a_film_has_an_answer_for_every_frame():
    reader = load_depth_judge(shipped('depth'))
    clip = VideoFolder(shipped('walks')).clip(0, 90, 130)
    faces = faces_wall(reader, clip.frames)
    assert faces.shape == (40,)
    assert faces.any() and not faces.all()
    assert (faces[:2] == faces[2]).all() and faces[-1] == faces[-2]

def test_judges_are_not_exchanged():
    with pytest.raises(ValueError, match='a judge of .9,. choices; .6,. are wanted'):
        load_depth_judge(shipped('idm'))
    world, data = shipped('distilled'), shipped('my_way_home')
    with pytest.raises(ValueError, match='a judge of .6,. choices; .9,. are wanted'):
        evaluation.Setting(world, data, idm=shipped('depth'))
    with pytest.raises(ValueError, match='distances are read on walks; give these, too'):
        evaluation.Setting(world, data, depth=shipped('depth'))

@pytest.mark.slow
def test_distances_are_recorded_and_learned(tmp_path):
    pytest.importorskip('vizdoom')
    depths, run = tmp_path/'depths', tmp_path/'run'
    def works(*args): assert cli.main([str(arg) for arg in args]) in (None, 0)

    works('depths', depths, '--episodes', 2, '--length', 60)
    videos = VideoFolder(depths)
    assert (len(videos), videos.space) == (2, REACH)
    near = np.concatenate([videos.actions(e)[:, 0] for e in range(2)]) < NEAR
    assert near.any() and not near.all()

    works('train', 'idm', '--data', depths, '--out', run, '--steps', 2, '--batch', 4)
    assert load_depth_judge(run/'final').cfg.actions == REACH.sizes
