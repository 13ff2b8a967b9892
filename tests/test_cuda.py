"""What a GPU asks for: draws on the device, no waiting, half precision, channels last, compiled steps, memory, fastai's distribution.

`pytest -m cuda` runs it on a GPU. Every test runs on the CPU too, and some on a GPU that is only made believe."""
from contextlib import contextmanager, nullcontext

import fastai.callback.progress  # noqa: F401  Learner.no_bar
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from scipy.stats import beta, chisquare, ks_2samp, kstest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from benchmarks.measure import peak_bytes
from common import torch_27
from fastai_mixup_ext.mix import _select
from fastai_mixup_ext import Batch, Mix, MixCallback, MixUpCallback, blend, cutmix, mixed_accuracy, mixed_loss, mixup, one_of
from test_nosync import Reads, batch, check_compiled, each_recipe, losses, policies, pred_and_target, recipes, shuffled, train


cells = {k:(o, shuffled) for k,o in recipes.items()} | {k:(mixup(.4), o) for k,o in policies.items()}
each_cell = pytest.mark.parametrize('recipe,pair', cells.values(), ids=cells)
plain_losses = {k:o for k,o in losses.items() if k!='weighted'}
each_loss = pytest.mark.parametrize('f,pred,dtype,target', plain_losses.values(), ids=plain_losses)

@contextmanager
def nothing_waits(device):
    "An error where the host waits for the device; the CPU is never waited for, so there what is read is counted"
    if device=='cpu':  # which looks which rows keep all of their own; an accelerator selects at once
        with pytest.MonkeyPatch.context() as patch, Reads() as reads:
            patch.setattr('fastai_mixup_ext.mix._kept', lambda x, res, own, pure: _select(x, res, own==1, pure))
            yield
        assert reads.seen==[]
    else:
        torch.cuda.set_sync_debug_mode('error')
        try: yield
        finally: torch.cuda.set_sync_debug_mode('default')

def generator(device, seed): return torch.Generator(device).manual_seed(seed)

def tensors(mix): return [t for t in vars(mix).values() if t is not None]

class Small(nn.Module):
    "A convolution and a head"
    def __init__(self, classes=5):
        super().__init__()
        self.conv,self.head = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8, classes)
    def forward(self, x): return self.head(F.relu(self.conv(x)).mean((2,3)))

def learner(device, *cbs, n=32, bs=8, model=None, dtype=torch.float32, form=torch.contiguous_format, **kw):
    "A learner over ready batches on the device"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n, 3, 8, 6, generator=g),torch.randint(5, (n,), generator=g)
    batches = [(a.to(device, dtype).to(memory_format=form), b.to(device)) for a,b in zip(x.split(bs), y.split(bs))]
    model = (Small() if model is None else model).to(device, dtype)
    return Learner(DataLoaders(batches, batches, device=torch.device(device)), model, loss_func=CrossEntropyLossFlat(), cbs=[*cbs], **kw)

def fit(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, **kw)
    return learn

class Losses(Callback):
    "Keeps the loss of each training step, on the device"
    run_valid = False
    def __init__(self): self.seen = []
    def after_loss(self): self.seen.append(self.learn.loss.detach())


# ---- draws are made on the device

@each_cell
def test_draws_are_on_the_device_and_come_from_its_generator(device, recipe, pair):
    x,yb = batch(device=device)
    recipe = recipe.chosen(0., generator('cpu', 1))
    state = torch.get_rng_state(),generator(device, 0).get_state()
    a,b = (recipe(x, yb, pair=pair, generator=generator(device, 3)) for _ in range(2))
    other = recipe(x, yb, pair=pair, generator=generator(device, 4))
    for s,t in zip(tensors(a), tensors(b), strict=True): assert s.device==x.device and torch.equal(s, t)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert not all(torch.equal(s, t) for s,t in zip(tensors(a), tensors(other)))

@torch_27
@each_cell
def test_nothing_is_made_on_another_device(recipe, pair):
    "Fake tensors may be on a GPU that is not there; they refuse operations between devices, and values that the host would need"
    if 'counts' in {**vars(recipe), **getattr(pair, '__dict__', {})}: return  # real ones, copied to a device once
    recipe = recipe.chosen(0.)
    with FakeTensorMode():
        x,yb = batch(device='cuda')
        mix = recipe.checked_draw(Batch(x, yb, pair=pair))
        assert {t.device.type for t in (*tensors(mix), blend(x, mix), blend(yb[1], mix))}=={'cuda'}
        for name,(f,*shapes) in losses.items():
            if name not in ('cross-entropy', 'weighted', 'mse'): continue  # fastai's cast to a tensor of their own, and take no fake one
            if getattr(f, 'weight', None) is not None: f = nn.CrossEntropyLoss(weight=torch.ones(5, device='cuda'), label_smoothing=.1)
            p,y = pred_and_target(*shapes, 8, 'cuda')
            assert mixed_loss(f, p.detach(), y, mix).device.type=='cuda'

def test_a_seeded_callback_draws_from_a_generator_on_the_device(device):
    def mixes(state=None, epochs=1):
        cb = MixCallback(one_of(mixup(1.), cutmix()), seed=7)
        if state is not None: cb.load_state_dict(state)
        seen = []
        class Keep(Callback):
            order,run_valid = 50,False
            def after_pred(self): seen.append(cb.mix)
        fit(learner(device, cb, Keep()), epochs, lr=0.)
        return cb.state_dict(),seen
    state,first = mixes()
    assert {*state}=={'cpu', device}
    torch.rand(3, device=device)  # others may draw
    both = mixes(epochs=2)[1]
    for a,b in zip(both, first + mixes(state)[1], strict=True):
        assert all(torch.equal(s, t) and s.device.type==device for s,t in zip(tensors(a), tensors(b), strict=True))


# ---- the host never waits

def test_a_wait_is_seen(device):
    with pytest.raises((RuntimeError, AssertionError)), nothing_waits(device): torch.rand(3, device=device).sum().item()

@each_cell
def test_drawing_and_blending_wait_for_nothing(device, recipe, pair):
    x,yb = batch(device=device)
    recipe = recipe.chosen(0.)
    for watch in (nullcontext(), nothing_waits(device)):  # the first time a GPU loads its kernels
        with watch:
            mix = recipe(x, yb, pair=pair)
            blend(x, mix), blend(yb[1], mix)

@torch_27
@each_loss
@each_recipe
def test_losses_and_their_gradients_wait_for_nothing(device, recipe, f, pred, dtype, target):
    p,y = pred_and_target(pred, dtype, target, 8, device)
    mix = recipe(*batch(device=device))
    for watch in (nullcontext(), nothing_waits(device)):
        with watch: mixed_loss(f, p, y, mix).backward()

class Unwaited(MixCallback):
    "An error where one of its events waits for the device"
    watched = False
    def __call__(self, event_name):
        watch = nothing_waits('cuda') if self.watched and next(self.learn.model.parameters()).is_cuda else nullcontext()
        with watch: super().__call__(event_name)
        if event_name=='after_batch': self.watched = True

@pytest.mark.parametrize('p', [1., .5])
@each_recipe
def test_the_callback_waits_for_nothing(device, recipe, p):
    cb = Unwaited(recipe, p=p)
    learn = fit(learner(device, cb, metrics=mixed_accuracy()), 2)
    assert cb.watched and torch.isfinite(torch.tensor(learn.recorder.losses)).all()


# ---- precision and memory formats

@pytest.mark.parametrize('dtype,tol', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last], ids=str)
@each_recipe
def test_half_precision_against_float64(device, recipe, dtype, tol, form):
    x,yb = batch(device=device)
    x = x.to(dtype).to(memory_format=form)
    mix = recipe(x, yb)
    res = blend(x, mix)
    assert res.dtype==dtype and res.device==x.device and (res.stride()==x.stride() or mix.box is not None)
    assert_close(res.double(), blend(x.double(), mix), rtol=tol, atol=tol)

def test_channels_last_stays_through_a_step(device):
    seen = []
    class Look(Callback):
        order = 50
        def after_pred(self): seen.append(self.learn.xb[0].is_contiguous(memory_format=torch.channels_last))
    model = Small().to(memory_format=torch.channels_last)
    fit(learner(device, MixUpCallback(), Look(), model=model, form=torch.channels_last))
    assert seen and all(seen)

@pytest.mark.parametrize('recipe', [mixup(.4), cutmix(1.), recipes['one_of rows']], ids=['mixup', 'cutmix', 'one_of rows'])
def test_a_fit_in_bfloat16_is_near_one_in_float32(device, recipe):
    def losses(dtype):
        torch.manual_seed(3)
        learn = learner(device, MixCallback(recipe, seed=1), keep := Losses(), dtype=dtype)
        learn.remove_cb(learn.recorder)  # fastai's takes no loss in bfloat16
        fit(learn, lr=0.)
        return torch.stack(keep.seen).float()
    assert_close(losses(torch.bfloat16), losses(torch.float32), rtol=.05, atol=.02)

@pytest.mark.filterwarnings('ignore:.*cuda.*')
@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16'])
def test_mixed_precision(device, how):
    import fastai.callback.fp16  # noqa: F401
    def losses(half):
        torch.manual_seed(3)
        learn = learner(device, MixUpCallback(seed=1), keep := Losses())
        fit(getattr(learn, how)() if half else learn, lr=0.)
        return torch.stack(keep.seen).float()
    assert_close(losses(True), losses(False), rtol=.05, atol=.02)


# ---- compiled

@pytest.mark.cuda
@each_recipe
def test_a_step_compiles_to_one_graph(recipe):
    "On the CPU test_nosync.py does the same"
    check_compiled(train(recipe.chosen(0.), shuffled), 'inductor', (8,5), 'cuda')

@torch_27
def test_a_compiled_model_trains_on_mixed_batches(device):
    def losses(model):
        torch.manual_seed(3)
        fit(learner(device, MixUpCallback(seed=1), keep := Losses(), model=model))
        return torch.stack(keep.seen)
    torch.manual_seed(0)
    model = Small()
    twin = Small()
    twin.load_state_dict(model.state_dict())
    twin.compile(backend='eager' if device=='cpu' else 'inductor')
    assert_close(losses(model), losses(twin), rtol=1e-3, atol=1e-4)


# ---- memory

def test_a_fit_takes_one_batch_more(device):
    "By `max_memory_allocated` on a GPU"
    x = torch.rand(64, 3, 64, 64, device=device)  # 3 MB: the parameters and the mix are small beside it
    y = torch.randint(5, (64,), device=device)
    def peak(*cbs):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).to(device)
        learn = Learner(DataLoaders([(x, y)]*4, [], device=torch.device(device)), model, loss_func=CrossEntropyLossFlat(), cbs=[*cbs])
        fit(learn)  # what is only made once
        return peak_bytes(lambda: fit(learn), device)
    assert peak(MixUpCallback())-peak() <= 1.1*x.nbytes


# ---- fastai's distribution

def fastai_lams(device, alpha, n, times):
    "What fastai's MixUp draws"
    cb,res = MixUp(alpha),[]
    x,y = torch.zeros(n, 1, device=device),torch.arange(n, device=device)
    cb.stack_y = True
    for _ in range(times):
        cb.learn = type('Learn', (), dict(xb=(x,), yb=(y,), x=x, y=y))()
        cb.before_batch()
        res.append(cb.lam.reshape(-1))
    return torch.cat(res).cpu().numpy()

@pytest.mark.parametrize('alpha', [.1, .4, 1., 8.])
def test_shares_are_distributed_as_fastais(device, alpha):
    "Chance alone would fail this once in ten thousand"
    lam = mixup(alpha)(torch.zeros(20_000, 1, device=device)).lam.cpu().numpy()
    dist = beta(alpha, alpha)
    assert lam.min()>=.5 and kstest(lam.clip(max=1-1e-6), lambda t: (dist.cdf(t)-dist.cdf(1-t)).clip(0)).pvalue > 1e-4 or alpha<.4
    assert ks_2samp(lam.round(5), fastai_lams(device, alpha, 1000, 20).round(5)).pvalue > 1e-4

@pytest.mark.parametrize('alpha', [.1, .4, 1.])
def test_bailey_is_fastais_distribution_too(alpha):
    "What a GPU computes, on a CPU: the formula runs where a step is compiled"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.compiler, 'is_compiling', lambda: True)
        lam = mixup(alpha)(torch.zeros(20_000, 1)).lam.numpy()
    assert ks_2samp(lam.round(5), fastai_lams('cpu', alpha, 1000, 20).round(5)).pvalue > 1e-4

def test_partners_are_a_uniform_permutation(device):
    x,count = torch.zeros(5, 1, device=device),torch.zeros(5, 5)
    for _ in range(3000):
        p = shuffled(x).cpu()
        assert p.sort().values.tolist()==list(range(5))
        count[torch.arange(5), p] += 1
    assert all(chisquare(o).pvalue > 1e-4 for o in count.numpy())

def test_losses_of_steps_are_distributed_as_fastais(device):
    "With weights that stay, a step's loss is a draw of the mix"
    def losses(cb):
        torch.manual_seed(3)
        fit(learner(device, cb, keep := Losses(), n=64, bs=16), 60, lr=0.)
        return torch.stack(keep.seen).cpu().numpy()
    torch.manual_seed(0)
    assert ks_2samp(losses(MixUp(.4)), losses(MixUpCallback(.4))).pvalue > 1e-4


# ---- the value travels

def test_a_mix_goes_to_the_device(device):
    mix = cutmix()(torch.rand(6, 3, 8, 6))
    there = mix.to(device, non_blocking=True)
    assert all(t.device.type==device for t in tensors(there)) and isinstance(there, Mix)
    assert_close(blend(torch.ones(6, 3, 8, 6, device=device), there), torch.ones(6, 3, 8, 6, device=device))
    if device=='cuda': assert all(t.is_pinned() for t in tensors(mix.pin_memory()))
