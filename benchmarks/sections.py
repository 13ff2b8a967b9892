"""What is measured: each section returns tables, and a table is a list of records"""
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from types import SimpleNamespace
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage, set_seed
from fastcore.basics import noop
from fastai_mixup_ext import (MixCallback, MixUpCallback, balanced, blend, cutmix, fmix, mixed_loss, mixup, one_of, per_batch, regmixup,
    remix, resizemix, spanmix)
from . import peers
from .measure import about, alternate, name, peak_bytes, slope, spread, traffic
from .tried import tried

@dataclass
class Run:
    "How to measure"
    device:str='cpu'
    rounds:int=25
    quick:bool=False  # small shapes: does everything run?

    def some(self, cases): return cases[:1] if self.quick else cases
    def time(self, fs, times=1, **kwargs): return alternate(fs, times*self.rounds, self.device, **kwargs)
    def rand(self, *shape): return torch.rand(*shape, device=self.device)
    def labels(self, high, *shape): return torch.randint(0, high, shape, device=self.device)

    def inputs(self, *shape):
        "Inputs to take in turn: on a GPU more than its cache holds"
        x = self.rand(*shape)
        return [x] if self.device=='cpu' else [x, *(self.rand(*shape) for _ in range(min(16, 2**28//x.nbytes)))]

# The callback in a fit

class First(nn.Module):
    "The first values of each row: a model that costs next to nothing"
    def __init__(self, n=32, classes=10):
        super().__init__()
        self.n,self.head = n,nn.Linear(n, classes)
    def forward(self, x): return self.head(x.flatten(1)[:,:self.n])

def learner(run, shape, steps, cbs=(), model=None, types=()):
    "A learner over `steps` ready batches of random inputs and labels, of these types or plain tensors, without validation"
    xs,model = run.inputs(*shape),First() if model is None else model
    to_x,to_y = types or (noop, noop)
    batches = [(to_x(xs[i%len(xs)]), to_y(run.labels(10, shape[0]))) for i in range(steps)]
    dls = DataLoaders(batches, [], device=torch.device(run.device))
    learn = Learner(dls, model.to(run.device), CrossEntropyLossFlat(), lr=1e-4, cbs=cbs)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

callbacks = {'none': list, 'fastai': lambda: [MixUp()], 'ours': lambda: [MixUpCallback()]}
cost_cases = [((64,3,32,32),), ((64,3,32,32), TensorImage, TensorCategory), ((64,3,128,128),), ((64,3,224,224),), ((64,40),),
    ((64,1,1000),)]

def callback(run):
    "The callback's cost per training step: a fit with it minus a fit without, over fastai's"
    rows = []
    for shape,*types in run.some(cost_cases):
        steps = 3 if run.quick else 20
        fits = {k:learner(run, shape, steps, cbs(), types=types) for k,cbs in callbacks.items()}
        times = 1 if run.quick or np.prod(shape)>1e6 else 4  # a small difference of two fits takes more of them
        took = run.time({k:lambda i, o=o: o.fit(1) for k,o in fits.items()}, times, least=0, settle=True)
        cost = {k:took[k]-took['none'] for k in ('fastai', 'ours')}
        batch = ', '.join([name(shape), *(o.__name__ for o in types)])
        rows.append(dict(batch=batch, **spread(cost['ours']/np.maximum(cost['fastai'], 1e-9), 'ours/fastai')))
    return {'callback': rows}

def switch(run):
    "The cost of one of two recipes: a fit with the choice minus one without mixing, over the same for the dearer of the two"
    ways = {'none': list, 'mixup': lambda: [MixCallback(mixup(.4))], 'cutmix': lambda: [MixCallback(cutmix(1.))],
        'switch': lambda: [MixCallback(one_of(mixup(.4), cutmix(1.)))],
        'switch by row': lambda: [MixCallback(one_of(mixup(.4), cutmix(1.), per_row=True))]}
    rows = []
    for shape in run.some([(32,3,224,224)]):
        fits = {k:learner(run, shape, 3 if run.quick else 20, cbs()) for k,cbs in ways.items()}
        took = run.time({k:lambda i, o=o: o.fit(1) for k,o in fits.items()}, least=0, settle=True)
        cost = {k:np.maximum(took[k]-took['none'], 1e-9) for k in ways}
        dearer = max(('mixup', 'cutmix'), key=lambda k: np.median(cost[k]))
        rows += [dict(batch=name(shape), who=k, dearer=dearer, **spread(cost[k]/cost[dearer], 'cost/dearer'))
            for k in ways if k!='none']
    return {'switch': rows}

# The rest of the family

def _stages(): return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()), First())
def _reader(): return nn.Sequential(nn.Embedding(1000, 16), First())
def _ids(x): return (x*1000).long()

def family(run):
    "A training step with each recipe over one with mixup, on the same model"
    pictures = {'remix': lambda: MixCallback(remix(mixup(.4), torch.arange(1, 11))),
        'balanced partners': lambda: MixUpCallback(pair=balanced()), 'regmixup': lambda: MixCallback(regmixup()),
        'cutmix': lambda: MixCallback(cutmix()), 'fmix': lambda: MixCallback(fmix()), 'resizemix': lambda: MixCallback(resizemix())}
    cases = [((64,3,128,128), First, (), pictures),
        ((64,3,128,128), _stages, (), {"at='stages'": lambda: MixUpCallback(at='stages')}),
        ((64,128), _reader, (_ids, noop), {'spanmix': lambda: MixCallback(spanmix(pad=1))})]
    rows = []
    for shape,model,types,ways in run.some(cases):
        fits = {k:learner(run, shape, 3 if run.quick else 20, cb(), model(), types)
            for k,cb in {'mixup': MixUpCallback, **ways}.items()}
        took = run.time({k:lambda i, o=o: o.fit(1) for k,o in fits.items()}, least=0, settle=True)
        rows += [dict(batch=name(shape), who=k, **spread(took[k]/took['mixup'], 'time/mixup')) for k in ways]
    return {'family': rows}

# Mixing alone

mixing_cases = [(64,40), (64,3,32,32), (64,3,64,64), (64,3,128,128), (64,3,224,224)]
growth_cases = {'batch': [(n,3,64,64) for n in (16, 32, 64, 128, 256, 512)], 'size': [(64,3,s,s) for s in (32, 64, 96, 128, 192, 256)]}

def contenders(run, shape, makers):
    "Functions of the number of the call, beside a copy to fresh memory and one to existing memory"
    xs,y = run.inputs(*shape),run.labels(10, shape[0])
    out = torch.empty_like(xs[0])
    fs = {'clone': lambda x, y: x.clone(), 'copy into existing memory': lambda x, y: out.copy_(x), **makers}
    return {k:lambda i, f=f: f(xs[i%len(xs)], y) for k,f in fs.items()},xs[0].nbytes

def over_clone(run, shape, makers):
    fs,size = contenders(run, shape, makers)
    took = run.time(fs, settle=True)
    return [dict(batch=name(shape), who=k, **spread(took[k]/took['clone'], 'time/clone'), counted=traffic(lambda: fs[k](0))/size,
        gb_s=traffic(lambda: fs[k](0))/float(np.median(took[k]))/1e9) for k in fs]

def pictures_only(makers, shape): return makers if len(shape)==4 else {k:v for k,v in makers.items() if k not in ('torchvision', 'kornia')}

def mixing(run):
    "Mixing inputs, with its draws; the counted bytes are in batches"
    mine = {'ours': peers.ours(mixup()), 'ours, fresh memory': peers.ours(mixup(), reuse=False)}
    rows = [r for shape in run.some(mixing_cases) for r in over_clone(run, shape, pictures_only({**mine, **peers.mixups()}, shape))]
    growth = []
    for by,shapes in growth_cases.items():
        shapes = shapes[:2] if run.quick else shapes
        fs = {'clone': lambda x, y: x.clone(), **mine, 'fastai': peers.mixups()['fastai']}
        cases = {(k,shape):contenders(run, shape, {k:f})[0][k] for shape in shapes for k,f in fs.items()}
        took = run.time(cases, least=.001)
        sizes = [np.prod(s) for s in shapes]
        for k in fs:
            times = np.array([np.median(took[k,s]) for s in shapes])
            growth.append(dict(by=by, who=k, slope=slope(sizes, times), values=[int(s) for s in sizes],
                relative=(times/np.median(took['clone',shapes[0]])).tolist()))
    return {'mixing': rows, 'growth': growth}

# The loss of a mix

loss_cases = [((64,10), ()), ((64,1000), ()), ((64,50000), ()), ((8,21,128,128), (128,128))]

def _fastai_pair(loss_func, pred, y, mix):
    "fastai's own code; it has one lam per row and fails on masks, so that they get theirs position by position"
    cb = MixUp()
    cb.learn,cb.old_lf,cb.yb1 = SimpleNamespace(training=True),loss_func,(y[mix.partner],)
    cb.lam = mix.lam if y.dim()==1 else mix.lam.repeat_interleave(y[0].numel())
    return cb.lf(pred, y)

def _soft_targets(loss_func, pred, y, mix):
    "What most libraries do: one-hot labels, mixed"
    hot = F.one_hot(y, pred.shape[1]).to(pred.dtype)
    return F.cross_entropy(pred, blend(hot.movedim(-1, 1), mix))

def loss(run):
    "The mixed loss over the plain one; memory in predictions, beyond the prediction itself"
    ways = {'plain': lambda f, pred, y, mix: f(pred, y), "fastai's pair": _fastai_pair, 'soft targets': _soft_targets, 'ours': mixed_loss}
    rows = []
    for shape,positions in run.some(loss_cases):
        pred,y = run.rand(*shape).requires_grad_(),run.labels(shape[1], shape[0], *positions)
        mix,f = mixup()(pred, y),CrossEntropyLossFlat(axis=1 if positions else -1)
        forward = {k:lambda i, w=w: w(f, pred, y, mix) for k,w in ways.items()}
        both = {k:lambda i, w=w: torch.autograd.grad(w(f, pred, y, mix), pred) for k,w in ways.items()}
        took = run.time({**{(k,'forward'):v for k,v in forward.items()}, **{(k,'both'):v for k,v in both.items()}}, settle=True)
        for k in ways:
            rows.append(dict(prediction=name(shape), who=k, **spread(took[k,'both']/took['plain','both'], 'forward+backward'),
                forward=float(np.median(took[k,'forward']/took['plain','forward'])),
                memory=peak_bytes(lambda: both[k](0), run.device)/pred.nbytes))
    return {'loss': rows}

# Memory

def memory(run):
    "The most memory of a fit beyond that of a fit without mixing, in batches"
    rows = []
    for shape in run.some([(64,3,32,32), (64,3,224,224)]):
        size = run.rand(*shape).nbytes
        for model,make in {'next to none': First, 'convolution': lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), First())}.items():
            fits = {k:learner(run, shape, 4, cbs(), make()) for k,cbs in callbacks.items()}
            peak = {k:peak_bytes(lambda: o.fit(1), run.device) for k,o in fits.items()}
            rows.append(dict(batch=name(shape), model=model, **{k:(peak[k]-peak['none'])/size for k in ('fastai', 'ours')}))
    return {'memory': rows}

# Cut methods

def cut(run):
    "Cut methods, with their draws, over a copy to fresh memory"
    mine = {'ours': cutmix(), 'ours, one box for the batch': per_batch(cutmix()), 'ours: fmix': fmix(), 'ours: resizemix': resizemix()}
    rows = [r for shape in run.some([(64,3,32,32), (64,3,128,128), (64,3,224,224)])
        for r in over_clone(run, shape, {**{k:peers.ours(o) for k,o in mine.items()}, **peers.cutmixes()})]
    return {'cut': rows}

# Real training

def _digits(run):
    from sklearn.datasets import load_digits
    x,y = load_digits(return_X_y=True)
    x,y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)/16,torch.tensor(y)
    return list(zip(x.to(run.device).split(64), y.to(run.device).split(64)))

def _convnet():
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

def training(run):
    "An epoch with mixing over an epoch without"
    from torchvision.models import resnet18, resnet50
    cases = {'digits, small convnet': lambda cbs: _with_batches(learner(run, (64,1,8,8), 1, cbs, _convnet()), _digits(run)),
        'resnet18, 64×3×128×128': lambda cbs: learner(run, (64,3,128,128), 2, cbs, resnet18(num_classes=10))}
    if run.device!='cpu': cases['resnet50, 64×3×224×224'] = lambda cbs: learner(run, (64,3,224,224), 20, cbs, resnet50(num_classes=10))
    rows = []
    for case,make in list(cases.items())[:1 if run.quick else None]:
        fits = {k:make(cbs()) for k,cbs in callbacks.items()}
        took = run.time({k:lambda i, o=o: o.fit(1) for k,o in fits.items()}, least=0)
        rows += [dict(epoch=case, who=k, **spread(took[k]/took['none'], 'time/none')) for k in fits]
    return {'training': rows}

def _with_batches(learn, batches):
    learn.dls.loaders[0] = batches
    return learn

# A training step

def step(run):
    "A step of a resnet18 in bfloat16 with mixing over one without; on a CPU it would take an hour"
    if run.device=='cpu' and not run.quick: return {}
    from torchvision.models import resnet18
    shape,steps = ((2,3,32,32), 1) if run.quick else ((512,3,32,32), 30)
    def make(cbs):
        learn = learner(run, shape, steps, cbs, resnet18(num_classes=10))
        return learn if run.device=='cpu' else learn.to_bf16()  # fastai's is for GPUs
    fits = {k:make(cbs()) for k,cbs in callbacks.items()}
    took = run.time({k:lambda i, o=o: o.fit(1) for k,o in fits.items()}, least=0, settle=True)
    return {'step': [dict(batch=name(shape), who=k, **spread(took[k]/took['none'], 'time/none'),
        ms=float(np.median(took[k]))*1000/steps) for k in fits]}

# torch.compile

def compiled(run):
    "Draw, blend and mixed loss: compiled over not compiled"
    rows = []
    recipes = {'mixup': mixup(), 'cutmix': cutmix(), 'fmix': fmix(), 'resizemix': resizemix(),
        'one_of by row': one_of(mixup(), cutmix(), per_row=True)}  # a choice for the batch is made before the graph begins
    for shape in run.some([(64,3,32,32), (64,3,128,128)]):
        x,y,w = run.rand(*shape),run.labels(10, shape[0]),run.rand(shape[1]*4, 10).requires_grad_()
        for k,recipe in list(recipes.items())[:1 if run.quick else None]:
            def step(x, y, recipe=recipe):
                mix = recipe(x, y)
                mixed = blend(x, mix)
                return mixed, mixed_loss(F.cross_entropy, mixed.flatten(2)[:,:,:4].flatten(1) @ w, y, mix)
            torch._dynamo.reset()
            fast = torch.compile(step, fullgraph=True)
            took = run.time({'eager': lambda i: step(x, y), 'compiled': lambda i: fast(x, y)})
            rows.append(dict(batch=name(shape), recipe=k, **spread(took['compiled']/took['eager'], 'compiled/eager')))
    return {'compiled': rows}

# Only on a GPU

class NoSync(MixUpCallback):
    "An error where an event of ours waits for the device"
    def __call__(self, event_name):
        torch.cuda.set_sync_debug_mode('error')
        try: super().__call__(event_name)
        finally: torch.cuda.set_sync_debug_mode('default')

def gpu(run):
    "Kernels of one mixing; our callback fits without waiting for the device, or it fails"
    if run.device=='cpu': return {}
    learner(run, (64,3,224,224), 3, [NoSync()]).fit(1)
    x,y = run.rand(64, 3, 224, 224),run.labels(10, 64)
    mixers = {'ours': peers.ours(mixup()), 'ours: cutmix': peers.ours(cutmix()), **peers.mixups()}
    return {'kernels': [dict(who=k, kernels=_kernels(partial(f, x, y))) for k,f in mixers.items()]}

def _kernels(f):
    f()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        f()
        torch.cuda.synchronize()
    return sum(e.count for e in prof.key_averages() if e.device_type==torch.autograd.DeviceType.CUDA)

_all = callback, switch, family, mixing, loss, memory, cut, training, step, compiled, tried, gpu
sections = {f.__name__:f for f in _all}

def measured(
    section:str, # A key of `sections`
    run:Run,
    threads:int
)->tuple: # The section's tables, and what they were measured with
    "Run one section"
    torch.set_num_threads(threads)
    set_seed(42)
    before = about(run.device)
    tables = sections[section](run)
    return tables,{**before, 'load': max(before['load'], about(run.device)['load'])}

def apart(*args):
    "`measured` in a process of its own: none inherits the memory that another has warmed"
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(measured, *args).result()

# The budgets

_budgets = [  # table, what identifies the row, figure, and the most that it may be
    ('callback', dict(batch='64×3×32×32'), 'ours/fastai', .2),
    ('callback', dict(batch='64×3×32×32, TensorImage, TensorCategory'), 'ours/fastai', .2),
    ('callback', dict(batch='64×3×224×224'), 'ours/fastai', .2),
    ('switch', dict(batch='32×3×224×224', who='switch'), 'cost/dearer', 1.1),
    *(('family', dict(batch='64×3×128×128', who=o), 'time/mixup', 1.3) for o in ('remix', 'balanced partners', 'regmixup', "at='stages'")),
    ('family', dict(batch='64×128', who='spanmix'), 'time/mixup', 1.3),
    ('mixing', dict(batch='64×3×224×224', who='ours, fresh memory'), 'time/clone', 1.3),
    ('mixing', dict(batch='64×3×224×224', who='ours'), 'time/clone', .4),
    ('loss', dict(prediction='64×1000', who='ours'), 'forward+backward', .9),
    ('loss', dict(prediction='64×50000', who='ours'), 'forward+backward', .5),
    ('loss', dict(prediction='8×21×128×128', who='ours'), 'forward+backward', .8),
    ('memory', dict(batch='64×3×224×224', model='next to none'), 'ours', 1.)]

_on_a_gpu = [
    ('step', dict(batch='512×3×32×32', who='ours'), 'time/none', 1.01),
    *(('mixing', dict(batch=name(o), who=k), 'time/clone', 1.3) for o in mixing_cases for k in ('ours', 'ours, fresh memory')),
    *(('memory', dict(batch=o), 'ours', 1.) for o in ('64×3×32×32', '64×3×224×224'))]
_peers = 'torchvision', 'timm, into its input', 'fastai'  # on a GPU ours is no slower, in any size

def budgets(
    results:dict, # The tables so far
    device:str='cpu'
)->list:
    "What each figure may be, and what it was"
    rows = []
    for table,key,figure,most in _budgets if device=='cpu' else [*_on_a_gpu, *_beside_peers(results)]:
        for r in results.get(table, {}).get('rows', []):
            if key.items()<=r.items():
                met = 'yes' if round(r[figure], 2)<=most else 'missed'
                rows.append(dict(table=table, row=', '.join(key.values()), figure=figure, budget=most, measured=r[figure], met=met))
    return rows

def _beside_peers(results):
    "For each size, what the quickest peer took"
    for batch in map(name, mixing_cases):
        took = [r['time/clone'] for r in results.get('mixing', {}).get('rows', []) if r['batch']==batch and r['who'] in _peers]
        if took: yield 'mixing', dict(batch=batch, who='ours'), 'time/clone', round(min(took), 2)
