"Beside everything else that fastai can do to a learner: on small real data, each time with a look at what was mixed and what was lost."
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import (Callback, Categorize, CrossEntropyLossFlat, DataLoaders, Datasets, Learner, MSELossFlat,
                           SGD, accuracy, load_learner)
from fastai.callback.all import (ChannelsLast, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixedPrecision, ModelToHalf,
                                 NonNativeMixedPrecision, ReduceLROnPlateau, SaveModelCallback, minimum)
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.tabular.all import Categorify, CategoryBlock, TabularDataLoaders, tabular_learner
from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorImageBW, set_seed
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import nn

from fastai_mixup_ext import CutMixCallback, MixUpCallback, until
from fastai_mixup_ext.losses import is_by_row
from tape import Tape, close, cross_entropy, lerped, paired, squared, train

def digits(n=96, bs=16, to=TensorImageBW):
    "Pictures (1,8,8) of ten digits; two thirds to train"
    x,y = load_digits(return_X_y=True)
    x = torch.tensor(x[:n], dtype=torch.float32).view(n, 1, 8, 8)/16
    dsets = Datasets(range(n), [[lambda i: to(x[i])], [lambda i: str(y[i]), Categorize()]], splits=[range(2*n//3), range(2*n//3, n)])
    return dsets.dataloaders(bs=bs, num_workers=0, device='cpu')

def convnet(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

def learner(*cbs, dls=None, model=None, **kwargs):
    return Learner(dls or digits(), model or convnet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, **kwargs)

def check(steps, tol=1e-5):
    "Every step was mixed: inputs and loss as the formula says"
    assert steps
    for o in steps:
        close(o.xb[0], lerped(o.x[0], o.mix))
        assert o.mix.lam.dtype==torch.float32 and len(o.mix.lam.unique())>1
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix), tol)

def valid(learn):
    "The plain loss and accuracy of the validation set, in float64"
    model = deepcopy(learn.model).double().eval()
    x,y = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*learn.dls.valid))
    pred = model(x.double())
    return [F.cross_entropy(pred, y).item(), (pred.argmax(1)==y).double().mean().item()]

def quiet(learn, method, *args, **kwargs):
    "Run a method of the learner, and give back its training steps"
    tape = Tape()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(tape): getattr(learn, method)(*args, **kwargs)
    return tape.steps

# precision

class OnCPU(MixedPrecision):
    "fastai's names the device 'cuda'"
    def before_fit(self):
        super().before_fit()
        dtype = torch.float16 if self.kwargs['enabled'] else torch.bfloat16
        self.autocast,self.learn.scaler = torch.autocast('cpu', dtype=dtype),torch.amp.GradScaler('cpu', **self.kwargs)

@pytest.mark.filterwarnings('ignore:.*cuda.*')
@pytest.mark.parametrize('mode,dtype', [('fp16', torch.float16), ('bf16', torch.bfloat16)])
def test_mixed_precision(mode, dtype):
    learn = learner(MixUpCallback(), OnCPU(mode))
    before = deepcopy(learn.model)
    steps = train(learn)
    check(steps)
    for o in steps: assert torch.equal(o.pred, o.pred.to(dtype).float())  # it was low precision
    assert not torch.equal(before[3].weight, learn.model[3].weight) and all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.filterwarnings('ignore')
def test_non_native_mixed_precision():
    half = NonNativeMixedPrecision(dynamic=False)
    half.dls = SimpleNamespace(device=torch.device('cuda'))  # it asks before it starts
    learn = learner(MixUpCallback(), ModelToHalf(), half, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    seen = []
    learn.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    steps = quiet(learn, 'fit', 1)
    assert {*seen}=={torch.float16}
    for o in steps:
        close(o.xb[0], lerped(o.x[0], o.mix), 1e-3)  # rounded to half after the mix
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

class InChannelsLast(Callback):
    order = -6
    def before_batch(self): self.learn.xb = tuple(o.contiguous(memory_format=torch.channels_last) for o in self.xb)

@pytest.mark.parametrize('cb', [MixUpCallback, CutMixCallback])
def test_channels_last(cb):
    x = torch.randn(32, 3, 8, 8)
    dls = DataLoaders.from_dsets(*[[*zip(x, torch.arange(32)%10)]]*2, bs=16, device='cpu')
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    steps = train(learner(ChannelsLast(), InChannelsLast(), dls=dls, model=model), cb())
    for o in steps: assert o.xb[0].is_contiguous(memory_format=torch.channels_last) and not o.xb[0].is_contiguous()
    for o in steps: close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

# steps

def gradients(model, steps):
    "Of the mean of the steps' losses, in float64"
    model = deepcopy(model).double()
    loss = torch.stack([paired(cross_entropy, model(lerped(o.x[0], o.mix)), o.y, o.mix) for o in steps]).mean()
    return torch.autograd.grad(loss, [*model.parameters()])

class Gradients(Callback):
    "Note the gradients just before the optimizer sees them"
    order,run_valid = 50,False
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([p.grad.clone() for p in self.model.parameters()])

def test_gradient_accumulation():
    "Two batches and one step: the step is along the gradient of the mean of their mixed losses"
    note = Gradients()
    learn = learner(MixUpCallback(), GradientAccumulation(32), note, opt_func=SGD)
    before = deepcopy(learn.model)
    steps = train(learn)
    assert len(steps)==4 and len(note.seen)==2
    for got,want in zip(note.seen[0], gradients(before, steps[:2])): close(got, want)
    check(steps)

def test_gradient_clip():
    note = Gradients()
    learn = learner(MixUpCallback(), GradientClip(.01), note)
    before = deepcopy(learn.model)
    steps = train(learn)
    want = gradients(before, steps[:1])
    norm = torch.stack([g.norm() for g in want]).norm()
    assert norm>.01
    for got,g in zip(note.seen[0], want): close(got, g*.01/norm, 1e-6)

# trackers: they watch the validation set, which is not mixed

def test_recorder_with_train_metrics():
    learn = learner(MixUpCallback())
    learn.recorder.train_metrics = True
    steps = quiet(learn, 'fit', 1)
    check(steps)
    assert learn.recorder.metric_names==['epoch','train_loss','train_accuracy','valid_loss','valid_accuracy','time']
    loss,acc,*rest = learn.recorder.values[-1]
    pred,y = torch.cat([o.pred for o in steps]),torch.cat([o.y[0] for o in steps])
    weights = [.98**(3-k) for k in range(4)]  # fastai's is a smooth one
    close(loss, sum(w*o.loss.double() for w,o in zip(weights, steps))/sum(weights))
    close(acc, (pred.argmax(1)==y).double().mean())  # of the rows' own labels; mixed_accuracy knows better
    close(torch.tensor(rest), torch.tensor(valid(learn)))

def test_early_stopping():
    learn = learner(MixUpCallback(), EarlyStoppingCallback(min_delta=100., patience=2))
    loss_func = learn.loss_func
    check(quiet(learn, 'fit', 9))
    assert len(learn.recorder.values)==3 and learn.loss_func is loss_func and learn.mix_up.mix is None
    close(learn.recorder.values[-1][1], valid(learn)[0])

def test_save_model(tmp_path):
    "An epoch is chosen by its plain validation loss, and comes back"
    learn = learner(MixUpCallback(), SaveModelCallback(comp=np.greater), path=tmp_path)  # the worst, which is not the last
    check(quiet(learn, 'fit', 3, lr=.01))
    losses = [o[1] for o in learn.recorder.values]
    assert losses.index(max(losses))<2
    close(valid(learn)[0], max(losses))

def test_reduce_lr_on_plateau():
    learn = learner(MixUpCallback(), ReduceLROnPlateau(min_delta=100., patience=1, factor=10.))
    check(quiet(learn, 'fit', 3, lr=.1))
    close(learn.opt.hypers[-1]['lr'], .001)
    close(learn.recorder.values[-1][1], valid(learn)[0])

# ways to fit

def test_fine_tune():
    "Both of its fits are mixed, and validated without"
    learn = learner(MixUpCallback(), splitter=lambda m: [[*m[0].parameters()], [*m[3].parameters()]])
    steps = quiet(learn, 'fine_tune', 2, freeze_epochs=1)
    assert len(steps)==3*4
    check(steps)
    close(torch.tensor(learn.recorder.values[-1][1:]), torch.tensor(valid(learn)))

def test_fit_one_cycle_with_a_schedule():
    "Half of the steps are mixed, the others are plain"
    learn = learner(MixUpCallback(p=until(.5)))
    steps = quiet(learn, 'fit_one_cycle', 2)
    check(steps[:4])
    for o in steps[4:]:
        assert o.mix is None and torch.equal(o.xb[0], o.x[0])
        close(o.loss, F.cross_entropy(o.pred.double(), o.y[0]))

def test_lr_find(tmp_path):
    learn = learner(MixUpCallback(), path=tmp_path)
    before = deepcopy(learn.model.state_dict())
    steps = quiet(learn, 'lr_find', num_it=12, show_plot=False, suggest_funcs=minimum)
    assert len(steps)>=8
    check(steps, 1e-4)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    close(learn.recorder.losses[0], steps[0].loss)

# after training: as if there had been no mixing

@pytest.fixture(scope='module')
def trained():
    learn = learner(MixUpCallback())
    quiet(learn, 'fit', 2)
    return learn

def preds(learn):
    x,y = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*learn.dls.valid))
    return learn.model(x).detach(),y

def test_tta(trained):
    with trained.no_bar(): got,y = trained.tta(n=2)
    close(got, preds(trained)[0].softmax(1))
    assert torch.equal(y, preds(trained)[1])

def test_interpretation(trained):
    with trained.no_bar(): losses,idxs = Interpretation.from_learner(trained).top_losses()
    pred,y = preds(trained)
    want = F.cross_entropy(pred, y, reduction='none').sort(descending=True)
    close(losses, want.values)
    assert torch.equal(idxs, want.indices)

def test_classification_interpretation(trained):
    with trained.no_bar(): got = ClassificationInterpretation.from_learner(trained).confusion_matrix()
    pred,y = preds(trained)
    want = torch.zeros(10, 10)
    for i,j in zip(y, pred.argmax(1)): want[i,j] += 1
    close(got, want)

def test_get_preds_of_the_training_set(trained):
    "It is not training"
    with trained.no_bar(): x,pred,y = trained.get_preds(dl=trained.dls.train.new(shuffle=False, drop_last=False), with_input=True)
    close(pred, trained.model(x).softmax(1))
    close(x, torch.stack([o[0] for o in trained.dls.train_ds]))

def test_summary(capsys):
    set_seed(1)
    learner().summary()
    state = torch.get_rng_state()
    set_seed(1)
    learn = learner(MixUpCallback())
    text = learn.summary()
    for word in ('16 x 1 x 8 x 8', 'Conv2d', '2,610', 'MixUpCallback'): assert word in text, text
    assert learn.mix_up.mix is None and torch.equal(torch.get_rng_state(), state)
    check(quiet(learn, 'fit', 1))

def test_show_training_loop(capsys):
    learn = learner(MixUpCallback())
    learn.show_training_loop()
    lines = capsys.readouterr().out.splitlines()
    def event(name): return next(o for o in lines if o.strip().startswith(f'- {name}'))
    for name in ('before_batch', 'after_pred', 'after_loss', 'after_batch'): assert 'MixUpCallback' in event(name)
    assert event('before_batch').index('MixUpCallback')<event('before_batch').index('CastToTensor')

# copies

class Interrupt(Callback):
    "As by hand, in the middle of a batch"
    def after_backward(self): raise KeyboardInterrupt

@pytest.mark.parametrize('how', ['trained', 'interrupted'])
def test_export_and_load(tmp_path, how):
    "No batch goes along, nor a changed loss; what is loaded predicts and trains"
    dls = wine()
    learn = tabular_learner(dls, layers=[8], metrics=accuracy, path=tmp_path, cbs=MixUpCallback(seed=1))
    if how=='trained': quiet(learn, 'fit', 1)
    else:
        with pytest.raises(KeyboardInterrupt): quiet(learn, 'fit', 1, cbs=Interrupt())
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, Tape)])
    learn.export('wine.pkl')
    got = load_learner(tmp_path/'wine.pkl')
    assert type(got.loss_func) is CrossEntropyLossFlat and got.mix_up.mix is None
    assert not [m for m in got.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    item = wine_table().iloc[0]
    with learn.no_bar(), got.no_bar(): close(got.predict(item)[2], learn.predict(item)[2])
    assert len(torch.load(tmp_path/'wine.pkl', weights_only=False).mix_up.__dict__['_scratch'])==0
    got.dls = dls
    check_tables(quiet(got, 'fit', 1))

def wine_table():
    df = load_wine(as_frame=True).frame
    df['strong'] = (df.alcohol>13).map({True:'yes', False:'no'})
    df['kind'] = df.pop('target').astype(str)
    names = [o for o in df.columns if o not in ('kind','strong')]
    df[names] = (df[names]-df[names].mean())/df[names].std()
    return df.astype(dict.fromkeys(names, 'float32'))

def wine():
    df = wine_table()
    return TabularDataLoaders.from_df(df, cat_names=['strong'], cont_names=[*df.columns[:-2]], procs=[Categorify], y_names='kind',
                                      y_block=CategoryBlock(), bs=32, valid_idx=range(0, 178, 3))

def check_tables(steps):
    for o in steps:
        close(o.xb[1], lerped(o.x[1], o.mix))
        close(o.loss, paired(cross_entropy, o.pred, [o.y[0][:,0]], o.mix))

def test_wine(): check_tables(train(tabular_learner(wine(), layers=[8]), MixUpCallback()))

def test_diabetes():
    "A number to predict, with a score computed on the validation set"
    x,y = (torch.tensor(o, dtype=torch.float32) for o in load_diabetes(return_X_y=True))
    items = [*zip(x*20, (y[:,None]-y.mean())/y.std())]
    learn = Learner(DataLoaders.from_dsets(items[:300], items[300:], bs=50, device='cpu'), nn.Linear(10, 1), loss_func=MSELossFlat())
    for o in train(learn, MixUpCallback(1.)): close(o.loss, squared(o.pred.double(), lerped(o.y[0], o.mix)))
    xv,yv = (torch.stack(o).double() for o in zip(*items[300:]))
    close(learn.recorder.values[-1][1], squared(deepcopy(learn.model).double()(xv), yv))

@pytest.mark.parametrize('cb,targets', [(MixUpCallback, TensorCategory), (CutMixCallback, TensorCategory), (MixUpCallback, TensorImage)])
def test_fastais_tensors_are_asked_nothing(monkeypatch, cb, targets):
    "A question to a subclass costs as much as a small operator; the tensor under it answers at once"
    y = torch.arange(12)%3
    items = list(zip(map(TensorImage, torch.rand(12, 3, 4, 4)), map(targets, y if targets is TensorCategory else F.one_hot(y).float())))
    asked,event,answer = [],[],TensorImage.__torch_function__.__func__
    class Watched(cb):
        def __call__(self, event_name):
            event.append(event_name)
            super().__call__(event_name)
            event.pop()
    def note(cls, func, *args, **kwargs):
        if event: asked.append((*event, func))
        return answer(cls, func, *args, **kwargs)
    monkeypatch.setattr(TensorBase, '__torch_function__', classmethod(note))
    learn = Learner(DataLoaders.from_dsets(items, items, bs=4, device='cpu', num_workers=0), nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
        loss_func=CrossEntropyLossFlat() if targets is TensorCategory else nn.CrossEntropyLoss(), cbs=Watched())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.losses and not asked

def test_deepcopy():
    "The copy has a callback of its own, which begins at its seed"
    learn = learner(MixUpCallback(seed=3), dls=digits(bs=64))
    first, = quiet(learn, 'fit', 1)
    other = deepcopy(learn)
    assert other.mix_up is not learn.mix_up and other.mix_up.learn is other
    a,b = quiet(learn, 'fit', 1),quiet(other, 'fit', 1)
    check(a), check(b)
    assert torch.equal(first.mix.lam, b[0].mix.lam) and torch.equal(first.mix.partner, b[0].mix.partner)
    assert not torch.equal(a[0].mix.lam, b[0].mix.lam)

# compiled models

@pytest.mark.parametrize('cb', [MixUpCallback, CutMixCallback])
def test_compiled(cb):
    "One graph for all mixed batches"
    graphs = []
    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward
    learn = learner(cb(), model=convnet())
    plain = deepcopy(learn.model)
    learn.model = torch.compile(learn.model, backend=backend)
    steps = quiet(learn, 'fit', 2)
    for o in steps: close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))
    close(steps[0].pred, plain(steps[0].xb[0]))
    assert len(graphs)<=2  # one to train, one to validate

class Twice(nn.CrossEntropyLoss):
    def forward(self, pred, y): return 2*super().forward(pred, y)

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), nn.MultiMarginLoss(), Twice()], ids=str)
def test_compiled_loss(loss):
    "It is mixed as the loss that it wraps, each row by its own lam if that is known by row, and stays as it was"
    learn = learner(MixUpCallback())
    learn.loss_func = torch.compile(loss, backend='eager')
    for o in quiet(learn, 'fit', 2):
        assert (len(o.mix.lam.unique())>1)==is_by_row(loss)
        close(o.loss, paired(loss, o.pred, o.y, o.mix))
    assert loss.reduction==learn.loss_func.reduction=='mean'

def test_compiled_tables():
    "Mixed ids too go through a compiled model"
    learn = tabular_learner(wine(), layers=[8])
    plain = deepcopy(learn.model).train()
    learn.model = torch.compile(learn.model, backend='eager')
    o,*rest = train(learn, MixUpCallback())
    close(o.pred, plain(*o.xb))
    check_tables([o, *rest])
