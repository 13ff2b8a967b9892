"""Every peer behind the same face: `f(x, y)` gives mixed inputs, parameters drawn and targets mixed as the peer does"""
from types import SimpleNamespace
import torch
from torch.distributions.beta import Beta
from fastai.callback.mixup import CutMix, MixUp
from fastai_mixup_ext import blend
from fastai_mixup_ext.memory import Scratch

def ours(recipe, reuse=True):
    "A recipe and `blend`; with `reuse` into the memory of the call before, as the callback does"
    scratch = Scratch()
    def f(x, y):
        mix = recipe(x, y)
        return blend(x, mix, scratch.like(x) if reuse else None)
    return f

def fastai(cls, *args):
    "fastai's own code, with a stand-in for the learner"
    cb = cls(*args)
    cb.stack_y = True
    def f(x, y):
        cb.learn = SimpleNamespace(x=x, y=y, xb=(x,), yb=(y,))
        cb.before_batch()
        return cb.learn.xb[0]
    return f

def paper(alpha):
    "The formula of the paper, with one lam for the batch"
    beta = Beta(torch.tensor(alpha), torch.tensor(alpha))
    def f(x, y):
        lam,index = beta.sample().item(),torch.randperm(len(x), device=x.device)
        return lam*x + (1-lam)*x[index]
    return f

def _torchvision(name, alpha, classes):
    from torchvision.transforms import v2
    transform = getattr(v2, name)(alpha=alpha, num_classes=classes)
    return lambda x, y: transform(x, y)[0]

def _timm(mixup_alpha, cutmix_alpha, classes):
    from timm.data import Mixup
    mixup = Mixup(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, label_smoothing=0., num_classes=classes)
    return lambda x, y: mixup(x, y)[0]

def _kornia(name):
    import kornia.augmentation as K
    mix = getattr(K, name)(p=1., data_keys=['input', 'class'])
    return lambda x, y: mix(x, y)[0]

def _installed(makers):
    "Those of `makers` whose library is there"
    res = {}
    for name,make in makers.items():
        try: res[name] = make()
        except ImportError as e: print(f"{name} is left out: {e}")
    return res

def mixups(alpha=.4, classes=10):
    "All that mix whole inputs"
    return {'fastai': fastai(MixUp, alpha), "the paper's formula": paper(alpha), **_installed({
        'torchvision': lambda: _torchvision('MixUp', alpha, classes), 'timm, into its input': lambda: _timm(alpha, 0., classes),
        'kornia': lambda: _kornia('RandomMixUpV2')})}

def cutmixes(alpha=1., classes=10):
    "All that paste boxes"
    return {'fastai, into its input': fastai(CutMix, alpha), **_installed({
        'torchvision': lambda: _torchvision('CutMix', alpha, classes), 'timm, into its input': lambda: _timm(0., alpha, classes),
        'kornia': lambda: _kornia('RandomCutMixV2')})}
