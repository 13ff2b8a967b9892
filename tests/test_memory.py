"""The mixed batch may use the memory of the one before; whoever still holds a part of that one finds it unchanged."""
import copy, gc
import pytest, torch
from fastai.basics import Callback, CancelBackwardException, CrossEntropyLossFlat, DataLoaders, Learner, TrainEvalCallback
from fastai.vision.core import TensorImage
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import dlpack
from torch.utils.checkpoint import checkpoint
from common import Watch
from fastai_mixup_ext import MixUpCallback, blend, mixup
from fastai_mixup_ext.memory import Scratch

ROWS,WIDTH,STEPS = 32,10_000,5   # 1.28 MB a batch: above the size from which memory is used again

class Step(nn.Module):
    "A linear layer, to be watched"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, 2)
    def forward(self, *xs): return sum(map(self.lin, xs))

def batches(n_inp=1):
    return [(*(torch.randn(ROWS, WIDTH) for _ in range(n_inp)), torch.randint(2, (ROWS,))) for _ in range(STEPS)]

def fit(cbs, n_inp=1, bs=None, model=None, **kwargs):
    dls = DataLoaders(bs or batches(n_inp), [])
    dls.n_inp = n_inp
    learn = Learner(dls, model or Step(), CrossEntropyLossFlat(), lr=.001, default_cbs=False, cbs=[TrainEvalCallback(), *cbs], **kwargs)
    learn.fit(1)
    return learn

class Keep(Callback):
    "Holds every mixed batch in its own way, beside a copy to compare with"
    order,run_valid = 50,False
    def __init__(self, hold, event='after_pred'):
        self.held,self.copies,self.hold = [],[],hold
        setattr(self, event, self.keep)

    def keep(self):
        self.copies.append(self.learn.xb[0].clone())
        self.held.append(self.hold(self.learn.xb[0]))

# Each way to hold a batch, and the way back to its values
def same(t): return t
HOLDS = dict(
    list=(same, same),
    view=(lambda x: x[1:3], lambda v: v._base if v._base is not None else v),
    flat=(lambda x: x.view(-1), same),
    detached=(lambda x: x.detach(), same),
    data=(lambda x: x.data, same),
    alias=(lambda x: torch.empty(0).set_(x), same),
    real=(lambda x: torch.view_as_complex(x.view(ROWS, -1, 2)), torch.view_as_real),
    bytes=(lambda x: x.view(torch.uint8), lambda v: v.view(torch.float32)),
    subclass=(lambda x: x.as_subclass(TensorImage), same),
    shallow_copy=(copy.copy, same),
    parameter=(lambda x: nn.Parameter(x), same),
    unbound=(lambda x: x.unbind(), torch.stack),
    numpy=(lambda x: x.numpy(), torch.from_numpy),
    memoryview=(lambda x: memoryview(x.numpy()), lambda m: torch.frombuffer(m, dtype=torch.float32)),
    dlpack=(dlpack.to_dlpack, dlpack.from_dlpack),
    untyped=(lambda x: x.untyped_storage(), lambda s: torch.empty(0).set_(s, 0, (ROWS*WIDTH,))),
    typed=(lambda x: x.storage(), lambda s: torch.empty(0).set_(s.untyped(), 0, (ROWS*WIDTH,))),
    closure=(lambda x: lambda: x, lambda f: f()),
    graph=(lambda x: (x*nn.Parameter(torch.ones(1))), lambda y: y.grad_fn._saved_self),
    shared=(lambda x: x.share_memory_(), same),
)

@pytest.mark.filterwarnings('ignore:TypedStorage')
@pytest.mark.parametrize('how', HOLDS)
def test_what_is_held_does_not_change(how):
    "Every batch of a run, held by one who runs on"
    hold,back = HOLDS[how]
    fit([MixUpCallback(), keep := Keep(hold)])
    assert len(keep.held)==STEPS
    for held,copied in zip(keep.held, keep.copies):
        got = back(held).reshape(-1)
        assert torch.equal(got[:ROWS*WIDTH], copied.reshape(-1)[:len(got)])

def test_what_a_hook_keeps_does_not_change():
    model,kept = Step(),[]
    model.lin.register_forward_hook(lambda m, args, out: kept.append((args[0], args[0].clone())))
    fit([MixUpCallback()], model=model)
    assert len(kept)==STEPS and all(torch.equal(*o) for o in kept)

class Checkpointed(Step):
    def forward(self, x): return checkpoint(self.lin, x, use_reentrant=False)

@pytest.mark.parametrize('model', [Step, Checkpointed])
def test_what_autograd_saved_does_not_change(model):
    "A loss that is kept can go backward after later batches"
    late = []
    class Late(Callback):
        def after_loss(self):
            late.append((self.learn.loss_func(self.learn.pred, self.learn.yb[0]), self.learn.xb[0].clone(), self.learn.yb[0]))
        def before_backward(self): raise CancelBackwardException()  # only memory can change a gradient
    learn = fit([MixUpCallback(), Late()], model=model())
    assert len(late)==STEPS
    def grad(loss): return torch.autograd.grad(loss, learn.model.lin.weight)[0]
    for loss,x,y in late: assert torch.equal(grad(loss), grad(learn.loss_func(learn.model(x), y)))

class InPlace(Step):
    def forward(self, x): return self.lin(x.mul_(2).relu_())

@pytest.mark.parametrize('write', [InPlace, Step])
def test_nobody_writes_to_the_data(write):
    "Neither the callback nor a model that works in place changes the batches of the loader"
    bs = batches()
    copies = copy.deepcopy(bs)
    fit([MixUpCallback()], bs=bs, model=write())
    assert all(torch.equal(a, b) for o,p in zip(bs, copies) for a,b in zip(o, p))

# What is free is used again

def test_memory_is_used_again():
    "One place for each input through the whole run; a batch that is held takes its own with it"
    places = Watch('after_pred', lambda learn: [x.data_ptr() for x in learn.xb])
    fit([MixUpCallback(), places], n_inp=2)
    assert len(set(map(tuple, places.seen)))==1 and len(set(places.seen[0]))==2
    places.seen.clear()
    fit([MixUpCallback(), places, Keep(same)])
    assert len({p for p, in places.seen})==STEPS
    places.seen.clear()
    held = []
    class Once(Callback):
        def after_pred(self): held[:] = [self.learn.xb[0]] if self.learn.train_iter==1 else []
    fit([MixUpCallback(), places, Once()])
    assert len({p for p, in places.seen})==2

LIKE = dict(plain=torch.empty(600, 600), transposed=torch.empty(600, 600).t(), expanded=torch.empty(1, 1000).expand(700, 1000),
    channels_last=torch.empty(4, 3, 200, 200).to(memory_format=torch.channels_last), strided=torch.empty(800, 1000)[::2,1:],
    complex=torch.empty(300_000, dtype=torch.complex64))

@pytest.mark.parametrize('name', LIKE)
def test_scratch_is_like(name):
    "Shape, strides, dtype and device are those of fresh memory"
    def facts(t): return t.shape, t.stride(), t.dtype, t.device, t.requires_grad
    assert facts(Scratch().like(LIKE[name]))==facts(torch.empty_like(LIKE[name]))

def test_scratch_serves_any_size():
    "A smaller tensor lies in the same memory, a larger one in more; a held one is left alone"
    scratch,x = Scratch(),torch.empty(600, 1000)
    places = [scratch.like(o).data_ptr() for o in (x, x[:500], x.double()[:300])]
    assert len(set(places))==1
    assert scratch.like(x[:3]) is None, "small memory is warm anyway"
    held = scratch.like(torch.empty(900, 1000)).zero_()
    scratch.like(x).fill_(1)
    assert not held.any()

def peak(f):
    "Bytes that `f` allocates: the most at any one time, and what is left of them"
    gc.collect()  # nothing older than `f` is to be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = f()  # noqa: F841  alive until the end
        gc.collect()
    now = torch.tensor([e.nbytes() for e in prof.profiler.kineto_results.events() if e.name()=='[memory]']+[0]).cumsum(0)
    return max(now), now[-1]

def test_extra_memory_is_one_batch():
    "A step needs memory for one mixed batch, and the next one for none; `blend` alone for one"
    x = torch.randn(64, 3, 64, 64)
    small = .02*x.nbytes
    learn = Learner(DataLoaders([], []), nn.Flatten(), CrossEntropyLossFlat(), default_cbs=False, cbs=[cb := MixUpCallback()])
    learn.pct_train = 0.
    def step():
        learn.xb,learn.yb = (x,),(torch.arange(64),)
        cb.before_batch()
    first,left = peak(step)
    assert x.nbytes<=left<=first<=x.nbytes+small
    learn.xb = None
    assert peak(step)[0]<=small
    mix = mixup()(x)
    high,_ = peak(lambda: blend(x, mix))
    assert x.nbytes<=high<=x.nbytes+small

@pytest.mark.parametrize('cbs', [[], [MixUpCallback()]], ids=['plain', 'mixed'])
def test_nothing_is_left_after_a_fit(cbs):
    "The weights and their gradients, but no batch"
    bs = batches()
    high,left = peak(lambda: fit(cbs, bs=bs))
    assert high>=bs[0][0].nbytes*len(cbs) and 0<left<2**20
