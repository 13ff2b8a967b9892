"`mixed_accuracy` against loops: lam for a hit of the row's own label, 1-lam for one of its partner's."
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn

from fastai_mixup_ext import CutMixCallback, FMixCallback, MixCallback, MixUpCallback, cutmix, mixed_accuracy, mixup, one_of
from tape import close, loaders, pairs, train

def flat(n_in, n_out): return nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_out))

def by_hand(steps):
    "Row by row; labels (n,), classes last"
    hits = []
    for o in steps:
        y,guess = o.y[0].flatten().tolist(),o.pred.argmax(1).tolist()
        for i,(j,lam) in enumerate(pairs(o.mix)): hits.append(lam*(guess[i]==y[i]) + (1-lam)*(guess[i]==y[j]))
    return sum(hits)/len(hits)

def fit(items, model, cb, loss=None, metrics=None, train_metrics=True, bs=16):
    "The steps, and the metrics of the last epoch by name"
    learn = Learner(loaders(items, bs), model, loss_func=loss or CrossEntropyLossFlat(), metrics=metrics or [mixed_accuracy(), accuracy])
    learn.recorder.train_metrics = train_metrics
    steps = train(learn, cb, 2)
    n = len(steps)//2
    return learn, steps[n:], dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))

def pictures(n=56, shape=()): return [(torch.randn(1,6,6), torch.randint(0, 3, shape)) for _ in range(n)]

@pytest.mark.parametrize('cb', [MixUpCallback, CutMixCallback, FMixCallback])
@pytest.mark.parametrize('shape', [(), (1,)])
def test_training_and_validation(cb, shape):
    "Weighted while training; afterwards plain, over all rows of batches of several sizes"
    learn,steps,got = fit(pictures(shape=shape), flat(36, 3), cb(1.))
    close(got['train_mixed_accuracy'], by_hand(steps))
    assert got['train_mixed_accuracy']!=got['train_accuracy']
    assert 0<got['valid_mixed_accuracy']<1
    close(got['valid_mixed_accuracy'], got['valid_accuracy'])

def test_without_train_metrics():
    learn,_,got = fit(pictures(), flat(36, 3), MixUpCallback(), train_metrics=False)
    close(got['mixed_accuracy'], got['accuracy'])

@pytest.mark.parametrize('cb', [None, MixUpCallback(p=0), MixUpCallback(alpha=0)], ids=['none', 'p', 'alpha'])
def test_without_a_mix(cb):
    "Plain accuracy, also while training"
    items = pictures()
    learn = Learner(loaders(items, 16), flat(36, 3), loss_func=CrossEntropyLossFlat(), metrics=[mixed_accuracy(), accuracy], cbs=cb)
    learn.recorder.train_metrics = True
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    got = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    close(got['train_mixed_accuracy'], got['train_accuracy'])
    close(got['valid_mixed_accuracy'], got['valid_accuracy'])

def test_half_of_the_batches():
    "Each batch counts by its own mix, or none"
    items = pictures(64)
    learn,steps,got = fit(items, flat(36, 3), MixUpCallback(p=.5, seed=1), bs=4)
    hits = []
    assert {o.mix is None for o in steps}=={True,False}
    for o in steps:
        if o.mix is None: hits += (o.pred.argmax(1)==o.y[0]).tolist()
        else: hits.append(by_hand([o])*4)
    close(got['train_mixed_accuracy'], sum(hits)/64)

@pytest.mark.parametrize('cb', [MixUpCallback, CutMixCallback, lambda: MixCallback(one_of(mixup(1.), cutmix(1.), per_row=True))],
                         ids=['mixup', 'cutmix', 'one_of'])
def test_segmentation(cb):
    "Position by position: by its share under mixup, against the pasted mask under a cut"
    learn,steps,got = fit(pictures(32, (6,6)), nn.Conv2d(1, 3, 3, padding=1), cb(), CrossEntropyLossFlat(axis=1), mixed_accuracy(axis=1))
    total = 0.
    for o in steps:
        mask,y = o.mix.mask,o.y[0]
        for i,(j,lam) in enumerate(pairs(o.mix)):
            guess = o.pred[i].argmax(0)
            share = torch.full((6,6), lam) if mask is None else mask.expand(16, 1, 6, 6)[i,0].float()
            total += (share*(guess==y[i]) + (1-share)*(guess==y[j])).mean().item()
    close(got['train_mixed_accuracy'], total/32)
    pred,y = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*[(learn.model(x).argmax(1), y) for x,y in learn.dls.valid]))
    close(got['valid_mixed_accuracy'], (pred==y).double().mean())

def test_soft_targets():
    "Where the targets are blended, the prediction hits by the blended share of its class"
    eye = torch.eye(3)
    items = [(torch.randn(1,6,6), eye[torch.randint(0, 3, ())]) for _ in range(32)]
    learn,steps,got = fit(items, flat(36, 3), MixUpCallback(), nn.CrossEntropyLoss(), mixed_accuracy())
    hits = []
    for o in steps:
        y,guess = o.y[0],o.pred.argmax(1)
        hits += [(lam*y[i,guess[i]] + (1-lam)*y[j,guess[i]]).item() for i,(j,lam) in enumerate(pairs(o.mix))]
    close(got['train_mixed_accuracy'], sum(hits)/len(hits))

def test_categories_made_one_hot_by_a_float_loss():
    "Float multi-label targets of one class each"
    items = [(torch.randn(1,6,6), torch.eye(3)[torch.randint(0, 3, ())].long()) for _ in range(32)]
    learn,steps,got = fit(items, flat(36, 3), MixUpCallback(), BCEWithLogitsLossFlat(), mixed_accuracy())
    hits = []
    for o in steps:
        y,guess = o.y[0].float(),o.pred.argmax(1)
        hits += [(lam*y[i,guess[i]] + (1-lam)*y[j,guess[i]]).item() for i,(j,lam) in enumerate(pairs(o.mix))]
    close(got['train_mixed_accuracy'], sum(hits)/len(hits))

def test_no_batch_stays():
    learn,_,_ = fit(pictures(), flat(36, 3), MixUpCallback())
    metric = learn.metrics[0]
    assert not [o for o in vars(metric).values() if isinstance(o, torch.Tensor) and o.numel()>1]

@pytest.mark.parametrize('pred,y', [((8,1), torch.ones(8, 1)), ((8,1), torch.ones(8).long()), ((8,), torch.ones(8)), ((8,3), torch.ones(8)),
                                    ((8,3,4,8), torch.ones(8, 4, 8).long())], ids=['logit', 'label', 'number', 'numbers', 'masks'])
def test_no_classes(pred, y):
    "One logit, numbers and another axis would give figures that mean nothing"
    learn = Learner(loaders(pictures(4), 4), flat(36, 3), loss_func=CrossEntropyLossFlat())
    learn.pred,learn.yb,metric = torch.randn(pred),(y,),mixed_accuracy()
    metric.reset()
    with pytest.raises(ValueError, match='no classes on this axis of a prediction of shape .*axis=1'): metric.accumulate(learn)
