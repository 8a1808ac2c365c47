"Numbers that are none: means over nothing, batches without a target, actions nobody knows."
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nfd_ref.attention import attend_flex, frame_mask
from nfd_ref.judge import IDMConfig, Transitions, action_scores, idm_loss, InverseDynamics
from nfd_ref.storage import read_json, write_json
from nfd_ref.training import world_loss
from nfd_ref.trials import Drift
from nfd_ref.video import NULL, ActionSpace, Clip

SPACE = ActionSpace('keys', {'move': ('none', 'left', 'right')})

def random_clip(count, unknown):
    "A clip of which some actions are not known."
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, (count, 1))
    actions[list(unknown)] = NULL
    return Clip(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), actions, SPACE)

def test_what_is_no_number_is_null_and_said(tmp_path):
    found = dict(good=[1., 2], psnr=dict(mean=(np.nan, 3.)), far=float('inf'), text='nan')
    with pytest.warns(UserWarning, match='a.json: no number at /psnr/mean/0, /far; null'):
        write_json(tmp_path/'a.json', found)
    kept = read_json(tmp_path/'a.json')
    assert kept == dict(good=[1., 2], psnr=dict(mean=[None, 3.]), far=None, text='nan')
    json.loads((tmp_path/'a.json').read_text(), parse_constant=pytest.fail)

@pytest.mark.parametrize('part', [slice(None), slice(0, 1), slice(1, 2)])
def test_a_batch_that_is_all_context_teaches_nothing_and_breaks_nothing(part):
    model = torch.nn.Linear(4, 4)
    def velocity(x, t, actions): return model(x)
    x0 = torch.randn(2, 3, 1, 4, 4)
    batch = dict(
        x0=x0,
        actions=torch.zeros(2, 3, 1, dtype=torch.int64),
        t=torch.rand(2, 3),
        weight=torch.zeros(2, 3),
        eps=torch.randn_like(x0))
    loss, _ = world_loss(velocity, batch, None, part, 'cpu')
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad.eq(0).all() for weight in model.parameters())

def test_the_judge_learns_from_known_actions_only():
    shape = IDMConfig(size=(16, 16), actions=(3,))
    clip = random_clip(40, unknown=(0, 11, 12, 30))
    batches = Transitions([clip], shape, 16)
    inside = set(range(shape.before, 40 - shape.after))
    assert set(batches.ends.tolist()) == inside - {0, 11, 12, 30}
    for step in range(4):
        batch = batches(step)
        assert (batch[1] != NULL).all()
    loss, _ = idm_loss(InverseDynamics(shape), batch, None, slice(None), 'cpu')
    assert loss.isfinite()

def test_a_judge_with_nothing_to_learn_from_says_so():
    with pytest.raises(ValueError, match='no frame with a known action'):
        Transitions([random_clip(20, range(20))], IDMConfig(size=(16, 16), actions=(3,)), 4)

def test_scores_of_nothing_are_refused():
    nothing = np.zeros((0, 1), int)
    with pytest.raises(ValueError, match='no known action in what was judged'):
        action_scores(nothing, nothing, SPACE)

@pytest.mark.parametrize('chunk, window', [(2, 1), (2, 3), (1, 0), (3, -3)])
def test_every_attention_refuses_the_same_windows(chunk, window):
    q = torch.randn(1, 1, 12, 8)
    says = f'a window of {window} frames does not hold whole chunks of {chunk}'
    frames = torch.arange(6)
    with pytest.raises(ValueError, match=says): frame_mask(frames, frames, chunk, window)
    with pytest.raises(ValueError, match=says): attend_flex(q, q, q, 2, chunk, window)

@pytest.mark.parametrize('obeyed, says', [([], 'no judge'), ([.5], '')])
def test_the_drift_panel_is_never_silently_empty(obeyed, says):
    run = dict(collapse=None, why=[], frames=150, obeyed=obeyed, statistics=[])
    fig, ax = plt.subplots()
    Drift().plot(dict(real=[run], world=[run]), ax)
    assert says in ' '.join(text.get_text() for text in ax.texts)
    assert bool(says) != any(len(line.get_xdata()) for line in ax.lines)
    plt.close(fig)
