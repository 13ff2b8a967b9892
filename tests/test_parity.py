"""With the same seed, `MixUpCallback` trains as fastai's `MixUp` wherever that is right; and its shares follow the Beta distribution."""
from functools import partial
import pytest, torch
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.torch_core import set_seed
from scipy import stats
from common import Watch, make_learner
from fastai_mixup_ext import MixUpCallback, by_row, mixup
from fastai_mixup_ext.recipes import draw_beta

LOSSES = dict(
    ce=CrossEntropyLossFlat, ce_sum=partial(CrossEntropyLossFlat, reduction='sum'), ce_ignore=partial(CrossEntropyLossFlat, ignore_index=9),
    smooth=LabelSmoothingCrossEntropyFlat, smooth_sum=partial(LabelSmoothingCrossEntropyFlat, eps=.3, reduction='sum'),
    focal=FocalLossFlat, focal_5=partial(FocalLossFlat, gamma=5.))
BLENDED = dict(bce=BCEWithLogitsLossFlat, bce_sum=partial(BCEWithLogitsLossFlat, reduction='sum'), mse=MSELossFlat)

class MyCE(CrossEntropyLossFlat):
    "A user's own loss, which can be taken apart"
    def __call__(self, pred, *yb, **kw): return 2*super().__call__(pred, *yb, **kw)

def history(cb, loss, kind='labels', more=(), epochs=2):
    "Every training loss, then the validation losses and the weights at the end"
    set_seed(7)
    learn = make_learner(kind, [cb, *(o() for o in more)], loss_func=loss())
    learn.fit(epochs, lr=.05, cbs=(seen := Watch('after_batch', lambda learn: learn.loss.detach().clone())))
    return torch.stack(seen.seen), torch.stack([torch.tensor(v) for v in learn.recorder.values]), *learn.model.parameters()

def check_parity(*args, alpha=.4, **kwargs):
    theirs,ours = history(MixUp(alpha), *args, **kwargs),history(MixUpCallback(alpha), *args, **kwargs)
    assert len(theirs[0])>=4 and len(theirs[0].unique())==len(theirs[0])
    for a,b in zip(theirs, ours): torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('name', [*LOSSES, *BLENDED])
@pytest.mark.parametrize('accumulate', [False, True], ids=['', 'accumulate'])
def test_losses_step_by_step(name, accumulate):
    more = [partial(GradientAccumulation, n_acc=10)] if accumulate else []
    if name in LOSSES: check_parity(LOSSES[name], more=more)
    else: check_parity(BLENDED[name], 'blended', more=more)

def test_a_loss_of_the_users_own_step_by_step():
    "Marked, since nobody else can know that it is by row"
    check_parity(lambda: by_row(MyCE()))

@pytest.mark.parametrize('alpha', [.01, .05, .1, .2, .4, 1., 4., 100.])
@pytest.mark.parametrize('kind', ['labels', 'blended'])
def test_alphas_step_by_step(alpha, kind): check_parity(CrossEntropyLossFlat if kind=='labels' else MSELossFlat, kind, alpha=alpha)

def test_draws_are_the_same():
    "The same seed gives the same shares, then the same partners, and leaves the generator in the same state"
    for alpha in .02, .4, 1.5:
        cb = MixUp(alpha)
        x,y = torch.randn(9, 3),torch.arange(9.)
        cb.learn = type('Learn', (), dict(xb=(x,), yb=(y,), x=x, y=y))()
        cb.stack_y = True
        torch.manual_seed(3); cb.before_batch(); theirs = torch.random.get_rng_state()
        torch.manual_seed(3); mix = mixup(alpha)(x); ours = torch.random.get_rng_state()
        assert torch.equal(cb.lam, mix.lam) and torch.equal(cb.yb1[0], y[mix.partner]) and torch.equal(theirs, ours)

def distance(draws, cdf, grid):
    "Kolmogorov and Smirnov's: the largest distance between the distributions, looked for at the points of `grid`"
    at = torch.searchsorted(draws.double().sort().values, grid, right=True) / len(draws)
    return (at - torch.from_numpy(cdf(grid.numpy()))).abs().max()

GRID = torch.logspace(-6, -.31, 200, dtype=torch.float64)
GRID = torch.cat([GRID, 1-GRID])  # nearer to 0 and 1 than 1e-6 float32 is coarse, and a share is as good as 0 or 1
ALPHAS = [1e-6, 1e-5, 1e-4, 1e-3, .009, .01, .03, .1, .4, 1., 3., 30.]

@pytest.mark.parametrize('alpha', ALPHAS)
def test_shares_follow_beta(alpha):
    "Chance alone would exceed these bounds once in a million"
    n,bound = 200_000,stats.kstwobign.isf(1e-6)
    beta = stats.beta(alpha, alpha)
    assert distance(draw_beta(n, alpha), beta.cdf, GRID) < bound/n**.5
    folded = mixup(alpha)(torch.empty(n, 1)).lam
    assert folded.min()>=.5 and folded.max()<=1
    assert distance(folded, lambda t: (beta.cdf(t)-beta.cdf(1-t)).clip(0), GRID[GRID>=.5]) < bound/n**.5

@pytest.mark.parametrize('alpha', ALPHAS)
def test_share_of_real_mixes(alpha):
    "For small alphas hardly any row is mixed: the number with a share in (.05,.95) is binomial"
    n = 2_000_000
    beta = stats.beta(alpha, alpha)
    count = ((b := draw_beta(n, alpha))>.05).logical_and(b<.95).sum().item()
    assert stats.binomtest(count, n, beta.cdf(.95)-beta.cdf(.05)).pvalue > 1e-5
