"""Nothing grows: not in many steps, not in many fits, not in many that are interrupted.

2,000 steps by default; the full run is `LONG_STEPS=20000 pytest tests/test_long.py`."""
import gc, os, tracemalloc
from pathlib import Path
import pytest, torch
from common import BS, KINDS, N, Raise, arm, global_hooks, hooks_on, make_dls, make_learner, make_mixer

STEPS = int(os.environ.get('LONG_STEPS', 2000))
STATM = Path('/proc/self/statm')

def resident(): return int(STATM.read_text().split()[1])*os.sysconf('SC_PAGE_SIZE') if STATM.exists() else 0

def things(learn):
    "All that could grow: tensors, hooks, callbacks, attributes"
    learn.validate()
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    attrs = [len(vars(o)) for o in (learn, *learn.cbs, *learn.model.modules())]
    return dict(tensors=tensors, hooks=hooks_on(learn.model)+global_hooks(), cbs=len(learn.cbs), attrs=attrs)

def flat(learn, run, warm, times, slack):
    "`run`, done `times` over after some to warm up, leaves the same things, fewer than `slack` objects and no more memory"
    for _ in range(warm): run()
    before,objects,rss = things(learn),len(gc.get_objects()),resident()
    for _ in range(times): run()
    assert things(learn)==before and len(gc.get_objects())-objects<slack and resident()-rss<4*2**20

def learner(kind, n=N):
    "One without a Recorder, which keeps the loss of every step"
    learn = make_learner(kind, [make_mixer(kind, seed=0)], dls=make_dls(kind, n=n))
    learn.remove_cb(learn.recorder)
    return learn

@pytest.mark.parametrize('kind', KINDS)
def test_many_steps(kind):
    learn = learner(kind, n=BS*50*3//2)
    flat(learn, lambda: learn.fit(1), 1, STEPS//len(KINDS)//50, slack=STEPS//len(KINDS)//5)

@pytest.mark.parametrize('kind', KINDS)
def test_many_interrupted_fits(kind):
    "200 fits, left in turn at every point of a step, by Ctrl-C and by errors"
    learn,done = learner(kind),[]
    points = 'before_batch after_pred after_loss before_backward after_step after_batch before_validate forward loss backward'.split()
    def run():
        point,exc = points[len(done)%10],(KeyboardInterrupt, RuntimeError)[len(done)//5%2]('stop')
        arm(point, exc)
        with pytest.raises(type(exc)): learn.fit(1, cbs=Raise(point, exc, (-5, 5)[len(done)//10%2]))
        done.append(point)
    flat(learn, run, 20, 200, slack=50)

def test_traced_memory():
    "Python's own account: a step more keeps less than the smallest object, beside the free lists of the interpreter"
    learn,steps = learner('place', n=BS*50*3//2),STEPS//5
    tracemalloc.start()
    for _ in range(2): learn.fit(1)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(steps//50): learn.fit(1)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0]-before
    tracemalloc.stop()
    assert grown < 50_000 + 16*steps
