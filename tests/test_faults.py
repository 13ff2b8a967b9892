"""Faults of the kinds that nobody plans: anything in any order, Ctrl-C at any instant, no memory at any operation."""
import random, signal, subprocess, sys, tempfile, time
from itertools import count
from pathlib import Path
import pytest, torch
import fastai_mixup_ext
from fastai import layers
from fastai.basics import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, load_learner, noop
from fastai.callback import schedule  # noqa: F401  lr_find
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.torch_core import set_seed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.nn import MultiMarginLoss
from torch.utils._python_dispatch import TorchDispatchMode
from common import (Raise, TripCE, TripMSE, arm, cancel, global_hooks, hooks_on, make_dls, make_items, make_learner,
    make_mixer, torch_27)
from test_exits import CANCELS, PLACES
from fastai_mixup_ext import MixCallback, deranged, mixup

EXTRAS = [lambda: GradientAccumulation(10), lambda: GradientClip(.1)]
LOSSES = [TripCE, CrossEntropyLossFlat, MultiMarginLoss]  # called to see, known, called
CASES = [*(('labels', loss) for loss in LOSSES), ('blended', TripMSE), ('ids', TripCE), ('place', TripCE)]

@pytest.mark.filterwarnings('ignore')
class Life(RuleBasedStateMachine):
    "One learner through all that a user may do to it; whatever came before, it is as if it had never mixed"
    @initialize(kind=st.sampled_from(['labels', 'ids', 'place']), mixed=st.booleans())
    def start(self, kind, mixed):
        set_seed(42)
        self.dir = tempfile.TemporaryDirectory()
        self.kind = kind
        self.learn,self.never = (make_learner(kind, path=self.dir.name) for _ in range(2))
        self.loss,self.extra = self.learn.loss_func,{}
        if mixed: self.add_mixer(1., None)

    def teardown(self):
        if hasattr(self, 'dir'): self.dir.cleanup()

    def mixers(self): return [cb for cb in self.learn.cbs if isinstance(cb, MixCallback)]

    @rule(n=st.integers(1, 2))
    def fit(self, n): self.learn.fit(n)

    @rule(place=st.sampled_from(PLACES), exc=st.sampled_from(['ctrl-c', 'error', *CANCELS]), nth=st.integers(1, 3))
    def fit_and_leave(self, place, exc, nth):
        exc = KeyboardInterrupt('stop') if exc=='ctrl-c' else RuntimeError('stop') if exc=='error' else cancel(exc)
        arm(place[0], exc)
        try: self.learn.fit(1, cbs=Raise(place[0], exc, place[1], nth))
        except BaseException as e: assert e is exc
        arm(None, None)

    @precondition(lambda self: not self.mixers())
    @rule(place=st.sampled_from(PLACES), p=st.sampled_from([.5, 1.]))
    def fit_mixed_once(self, place, p):
        exc = KeyboardInterrupt('stop')
        arm(place[0], exc)
        try: self.learn.fit(1, cbs=[make_mixer(self.kind, p=p), Raise(place[0], exc, place[1])])
        except KeyboardInterrupt as e: assert e is exc
        arm(None, None)

    @precondition(lambda self: not self.mixers())
    @rule(p=st.sampled_from([.5, 1.]), seed=st.sampled_from([None, 0]))
    def add_mixer(self, p, seed): self.learn.add_cb(make_mixer(self.kind, p=p, seed=seed))

    @precondition(lambda self: self.mixers())
    @rule()
    def remove_mixer(self): self.learn.remove_cb(self.mixers()[0])

    @precondition(lambda self: self.mixers())
    @rule()
    def two_mixers(self):
        with pytest.raises(ValueError, match='mix the same batches'): self.learn.fit(1, cbs=MixCallback(mixup(1.), pair=deranged))

    @rule(i=st.sampled_from([0, 1]))
    def toggle_extra(self, i):
        if i in self.extra: self.learn.remove_cb(self.extra.pop(i))
        else:
            self.extra[i] = EXTRAS[i]()
            self.learn.add_cb(self.extra[i])

    @rule()
    def find_lr(self): self.learn.lr_find(num_it=7, show_plot=False)

    @rule()
    def save_and_load(self):
        before = [p.clone() for p in self.learn.model.parameters()]
        self.learn.save('here')
        self.learn.fit(1)
        self.learn.load('here')
        assert all(map(torch.equal, before, self.learn.model.parameters()))

    @rule()
    def export_and_load(self):
        self.learn.export('export.pkl')
        loaded,item = load_learner(Path(self.dir.name)/'export.pkl'),make_items(self.kind)[0]
        assert torch.equal(loaded.predict(item)[2], self.learn.predict(item)[2])

    @rule(loss=st.sampled_from([*LOSSES, LabelSmoothingCrossEntropyFlat]))
    def change_loss(self, loss):
        self.learn.loss_func = self.never.loss_func = self.loss = loss()
        self.learn.assigned.clear()

    @rule(bs=st.sampled_from([1, 4, 5, 7]))
    def change_batch_size(self, bs): self.learn.dls = self.never.dls = make_dls(self.kind, bs)

    @invariant()
    def nothing_is_left(self):
        if not hasattr(self, 'learn'): return
        assert self.learn.loss_func is self.loss and not self.learn.assigned and self.loss.reduction=='mean'
        assert not hooks_on(self.learn.model)
        self.never.model.load_state_dict(self.learn.model.state_dict())
        assert torch.equal(self.learn.get_preds()[0], self.never.get_preds()[0])
        assert not global_hooks() and all(cb.mix is None for cb in self.mixers())

TestLife = Life.TestCase
TestLife.settings = settings(max_examples=10, stateful_step_count=12, suppress_health_check=list(HealthCheck))
TestLife = pytest.mark.filterwarnings('ignore')(TestLife)

# No memory

class Failing(TorchDispatchMode):
    "The operation number `at` of torch finds no memory"
    def __init__(self, at):
        self.at,self.count = at,0
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count==self.at: raise torch.cuda.OutOfMemoryError('no memory, says the test')
        return func(*args, **(kwargs or {}))

def check_clean(learn, never, loss):
    never.model.load_state_dict(learn.model.state_dict())
    assert torch.equal(learn.get_preds(act=noop)[0], never.get_preds(act=noop)[0])
    assert learn.loss_func is loss and not learn.assigned and loss.reduction=='mean'
    assert not hooks_on(learn.model) and not global_hooks()

@torch_27
@pytest.mark.parametrize('kind,loss', CASES)
def test_out_of_memory_anywhere(kind, loss):
    "Whichever operation of a fit it is, the error comes out, and the learner is clean and fits again"
    learn,never = make_learner(kind, [make_mixer(kind)]),make_learner(kind)
    learn.remove_cb(learn.recorder)  # which swallows errors
    for at in count(1, 5):
        learn.loss_func = loss_func = loss()  # nothing is known about a new one
        learn.assigned.clear()
        try:
            with Failing(at) as failing: learn.fit(1)
        except torch.cuda.OutOfMemoryError: check_clean(learn, never, loss_func)
        else: break
    assert failing.count<at and at>200, "every operation has failed once"

# Ctrl-C

class InterruptAt:
    "Raises KeyboardInterrupt when the `n`th line in these files is about to run; notes which lines were"
    def __init__(self, n, files): self.n,self.files,self.lines = n,files,[]

    def __call__(self, frame, event, arg):
        if event=='call' and not frame.f_code.co_filename.startswith(self.files): return None
        if event=='line':
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines)==self.n: raise KeyboardInterrupt(f"{frame.f_code.co_name}:{frame.f_lineno}")
        return self

    def __enter__(self):
        self.old = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *args): sys.settrace(self.old)

@pytest.mark.parametrize('kind,loss', CASES)
def test_ctrl_c_at_any_line(kind, loss):
    "Ctrl-C at each line of ours, and of what we borrow from fastai to unreduce a loss: the first time that it runs, and the last"
    files = str(Path(fastai_mixup_ext.__file__).parent),layers.__file__
    learn,never = make_learner(kind, [make_mixer(kind)], dls=make_dls(kind, n=12)),make_learner(kind, dls=make_dls(kind, n=12))
    def fit(n):
        learn.loss_func = loss()
        learn.assigned.clear()
        with InterruptAt(n, files) as ctrl_c: learn.fit(1)
        return ctrl_c.lines
    fit(0)  # what is looked up only once
    times,left = {},[]
    for n,line in enumerate(fit(0), 1): times.setdefault(line, []).append(n)
    for n in sorted({n for ns in times.values() for n in (ns[0], ns[-1])}):
        try:
            fit(n)
            left.append((n, 'swallowed'))
        except KeyboardInterrupt as e: where = str(e)
        if not torch.is_grad_enabled(): left.append((where, 'no gradients'))
        torch.set_grad_enabled(True)
        try: check_clean(learn, never, learn.loss_func)
        except AssertionError as e: left.append((where, str(e).splitlines()[-1]))
    assert len(times)>50 and not left

SCRIPT = '''
import torch
from common import *
for kind in KINDS:
    learn,never = make_learner(kind, [cb := make_mixer(kind)]),make_learner(kind)
    learn.remove_cb(learn.recorder)
    loss = learn.loss_func
    for _ in range(3):
        try:
            print('fit', flush=True)
            learn.fit(200)
            print('never interrupted')
        except KeyboardInterrupt: torch.set_grad_enabled(True)  # Python may have left `no_grad` half-way
        never.model.load_state_dict(learn.model.state_dict())
        assert torch.equal(learn.get_preds()[0], never.get_preds()[0])
        assert learn.loss_func is loss and not learn.assigned and not hooks_on(learn.model) and not global_hooks() and cb.mix is None
        learn.fit(1)
print('clean')
'''

def test_ctrl_c_for_real():
    "Twelve signals at random instants; each time the learner is clean and fits again"
    r = random.Random(0)
    job = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent)
    try:
        for line in job.stdout:
            if line!='fit\n': break
            time.sleep(.05+r.random()*.2)
            job.send_signal(signal.SIGINT)
        assert line=='clean\n', job.stderr.read()
        assert job.wait(20)==0
    finally: job.kill()
