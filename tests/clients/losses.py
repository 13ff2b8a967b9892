"""Every loss of timm, kornia, segmentation_models_pytorch and monai that has a target: how it is made, and batches for it."""
from __future__ import annotations
from dataclasses import dataclass, replace
from functools import partial
from collections.abc import Callable

import kornia.losses as K
import monai.losses as M
import segmentation_models_pytorch.losses as S
import timm.loss as T
import torch

N,C,VOID = 6,4,255   # rows (JsdCrossEntropy splits them into three parts), classes, the label that some losses ignore
MAP,VOLUME = (8,8),(6,6,6)

# What a loss compares

@dataclass(frozen=True)
class Data:
    "Predictions of `shape`, made of logits by `act`, and what `target(kind of batch)` draws"
    shape:tuple
    target:Callable
    act:Callable = lambda p: p
    dtype:torch.dtype = torch.float64

    def batch(self, kind, n=N):
        "Logits that require a gradient, and targets; `kind` 0: any, 1: with labels to ignore if the loss knows such, 2: one class only"
        y = self.target(n, kind)
        return (2*torch.randn(n, *self.shape, dtype=self.dtype)).requires_grad_(), y.to(self.dtype) if y.is_floating_point() else y

def labels(*size, classes=C, void=None):
    def target(n, kind):
        y = torch.randint(classes, (n, *size))
        if kind==1 and void is not None: y.view(n, -1)[::2,::3] = void
        return torch.ones_like(y) if kind==2 else y
    return target

def hot(*size, classes=C):
    "One-hot maps, floating"
    def target(n, kind): return torch.nn.functional.one_hot(labels(*size, classes=classes)(n, kind), classes).movedim(-1, 1).double()
    return target

def switches(*size):
    def target(n, kind): return (torch.rand(n, *size)<(.5 if kind<2 else .9)).double()
    return target

def numbers(*size):
    def target(n, kind): return torch.rand(n, *size, dtype=torch.float64) * (.5 if kind==2 else 1)
    return target

def boxes(n, kind):
    start = torch.rand(n, 2, dtype=torch.float64)
    return torch.cat([start, start+.1+torch.rand(n, 2, dtype=torch.float64)], 1)

def heat(p): return p.flatten(2).softmax(-1).view_as(p)
def as_boxes(p): return torch.cat([p[:,:2].sigmoid(), p[:,:2].sigmoid()+.1+p[:,2:].sigmoid()], 1)
def as_list(p): return [p, torch.nn.functional.avg_pool2d(p, 2)]
softmax = partial(torch.softmax, dim=1)

classes = Data((C,), labels())
several = Data((C,), switches(C))
maps,void_maps = Data((C,*MAP), labels(*MAP)),Data((C,*MAP), labels(*MAP, void=VOID))
channel_maps,hot_maps = Data((C,*MAP), labels(1, *MAP)),Data((C,*MAP), hot(*MAP))
switch_maps,one_map = Data((C,*MAP), switches(C, *MAP)),Data((1,*MAP), switches(1, *MAP))
int_map = Data((1,*MAP), labels(1, *MAP, classes=2))
void_map = Data((1,*MAP), labels(1, *MAP, classes=2, void=VOID))
plain_map = Data((1,*MAP), labels(*MAP, classes=2))
pictures = Data((3,16,16), numbers(3, 16, 16), torch.sigmoid)
vectors = Data((C,), numbers(C))

# How each is made: name -> (how, data). A name is the class's or function's, with what is special behind a space

def weights(): return torch.tensor([.1, 3., 1., .5])

timm = {
    'AsymmetricLossMultiLabel': (T.AsymmetricLossMultiLabel, several),
    'AsymmetricLossSingleLabel': (T.AsymmetricLossSingleLabel, classes),
    'BinaryCrossEntropy': (T.BinaryCrossEntropy, classes),
    'BinaryCrossEntropy several': (partial(T.BinaryCrossEntropy, smoothing=0.), several),
    'DistributionBalancedLoss': (lambda: T.DistributionBalancedLoss([10, 20, 30, 40], 100), several),
    'JsdCrossEntropy': (T.JsdCrossEntropy, classes),
    'LabelSmoothingCrossEntropy': (T.LabelSmoothingCrossEntropy, classes),
    'PolyBinaryCrossEntropy': (T.PolyBinaryCrossEntropy, several),
    'PolyCrossEntropy': (T.PolyCrossEntropy, classes),
    'PolyCrossEntropy soft': (T.PolyCrossEntropy, Data((C,), hot())),
    'SoftTargetCrossEntropy': (T.SoftTargetCrossEntropy, Data((C,), hot())),
    'TwoWayLoss': (T.TwoWayLoss, several),
    'ZlprLoss': (T.ZlprLoss, several)}

kornia = {
    'BinaryFocalLossWithLogits': (partial(K.BinaryFocalLossWithLogits, alpha=.25, reduction='mean'), switch_maps),
    'CauchyLoss': (partial(K.CauchyLoss, reduction='mean'), pictures),
    'CharbonnierLoss': (partial(K.CharbonnierLoss, reduction='mean'), pictures),
    'DiceLoss': (K.DiceLoss, maps),
    'DiceLoss macro, weighted, void': (lambda: K.DiceLoss('macro', weight=weights(), ignore_index=VOID), void_maps),
    'FocalLoss': (partial(K.FocalLoss, alpha=.5, reduction='mean'), maps),
    'FocalLoss weighted, void': (lambda: K.FocalLoss(.5, reduction='mean', weight=weights(), ignore_index=VOID), void_maps),
    'FocalLoss classes': (partial(K.FocalLoss, alpha=.5, reduction='mean'), classes),
    'GemanMcclureLoss': (partial(K.GemanMcclureLoss, reduction='mean'), pictures),
    'HausdorffERLoss': (K.HausdorffERLoss, Data((C,*MAP), labels(1, *MAP), softmax)),
    'HausdorffERLoss3D': (K.HausdorffERLoss3D, Data((2,*VOLUME), labels(1, *VOLUME, classes=2), softmax)),
    'InverseDepthSmoothnessLoss': (K.InverseDepthSmoothnessLoss, Data((1,*MAP), numbers(3, *MAP))),
    'LovaszHingeLoss': (K.LovaszHingeLoss, plain_map),
    'LovaszSoftmaxLoss': (K.LovaszSoftmaxLoss, maps),
    'MS_SSIMLoss': (K.MS_SSIMLoss, pictures),
    'PSNRLoss': (partial(K.PSNRLoss, max_val=1.), pictures),
    'SSIM3DLoss': (partial(K.SSIM3DLoss, window_size=3), Data((1,*VOLUME), numbers(1, *VOLUME), torch.sigmoid)),
    'SSIMLoss': (partial(K.SSIMLoss, window_size=5), pictures),
    'TverskyLoss': (partial(K.TverskyLoss, alpha=.3, beta=.7), maps),
    'WelschLoss': (partial(K.WelschLoss, reduction='mean'), pictures),
    'js_div_loss_2d': (lambda: K.js_div_loss_2d, Data((2,*MAP), lambda n, kind: heat(numbers(2, *MAP)(n, kind)), heat)),
    'kl_div_loss_2d': (lambda: K.kl_div_loss_2d, Data((2,*MAP), lambda n, kind: heat(numbers(2, *MAP)(n, kind)), heat))}
no_kornia = dict(
    MIKernel='no loss: the kinds of a kernel',
    TotalVariation='has no target',
    **{f'{o}MILossFromRef{d}': 'has no target: what to compare with is given when it is made' for o in ('', 'N') for d in ('', '2D', '3D')})

def narrow(data): return replace(data, dtype=torch.float32)  # it can't take anything else

modes = dict(multiclass=void_maps, multilabel=switch_maps, binary=one_map)
smp = {f'{o.__name__} {mode}': (partial(o, mode, ignore_index=VOID if mode=='multiclass' else None), data)
       for o in (S.DiceLoss, S.JaccardLoss, S.FocalLoss, S.TverskyLoss) for mode,data in modes.items()}
smp |= {
    'LovaszLoss binary': (partial(S.LovaszLoss, 'binary'), narrow(one_map)),
    'LovaszLoss multiclass': (partial(S.LovaszLoss, 'multiclass', ignore_index=VOID), narrow(void_maps)),
    'DiceLoss some classes, log': (partial(S.DiceLoss, 'multiclass', classes=[1, 3], log_loss=True), maps),
    'DiceLoss binary integers': (partial(S.DiceLoss, 'binary', ignore_index=VOID), void_map),
    'FocalLoss normalized': (partial(S.FocalLoss, 'multiclass', normalized=True, ignore_index=VOID), void_maps),
    'LovaszLoss per image': (partial(S.LovaszLoss, 'multiclass', per_image=True, ignore_index=VOID), narrow(void_maps)),
    'MCCLoss': (S.MCCLoss, Data((1,*MAP), labels(1, *MAP, classes=2), torch.sigmoid)),
    'SoftBCEWithLogitsLoss': (S.SoftBCEWithLogitsLoss, switch_maps),
    'SoftBCEWithLogitsLoss smoothed': (partial(S.SoftBCEWithLogitsLoss, smooth_factor=.1), switch_maps),
    'SoftCrossEntropyLoss': (partial(S.SoftCrossEntropyLoss, smooth_factor=0., ignore_index=VOID), void_maps),
    'SoftCrossEntropyLoss smoothed': (partial(S.SoftCrossEntropyLoss, smooth_factor=.1, ignore_index=VOID), void_maps)}

to_hot = dict(to_onehot_y=True, softmax=True)
wasserstein = 1-torch.eye(C)
monai = {o.__name__: (partial(o, **to_hot), channel_maps) for o in (
    M.DiceLoss, M.DiceCELoss, M.DiceFocalLoss, M.GeneralizedDiceLoss, M.GeneralizedDiceFocalLoss, M.TverskyLoss, M.MCCLoss,
    M.HausdorffDTLoss, M.LogHausdorffDTLoss, M.SoftclDiceLoss, M.SoftDiceclDiceLoss, M.BoundaryLoss, M.MaskedDiceLoss)}
monai |= {
    'AUCMLoss': (M.AUCMLoss, int_map),
    'AsymmetricUnifiedFocalLoss': (partial(M.AsymmetricUnifiedFocalLoss, to_onehot_y=True),
        Data((2,*MAP), labels(1, *MAP, classes=2), softmax)),
    'BarlowTwinsLoss': (M.BarlowTwinsLoss, vectors),
    'BoxGIoULoss': (M.BoxGIoULoss, Data((4,), boxes, as_boxes)),
    'ContrastiveLoss': (M.ContrastiveLoss, vectors),
    'DeepSupervisionLoss': (lambda: M.DeepSupervisionLoss(M.DiceLoss(softmax=True)), Data((C,*MAP), hot(*MAP), as_list)),
    'DiceLoss batch': (partial(M.DiceLoss, batch=True, **to_hot), channel_maps),
    'DiceLoss weighted, without background': (lambda: M.DiceLoss(include_background=False, weight=weights()[1:], **to_hot), channel_maps),
    'DiceLoss sum': (partial(M.DiceLoss, reduction='sum', **to_hot), channel_maps),
    'DiceLoss floating': (partial(M.DiceLoss, softmax=True), hot_maps),
    'DiceCELoss floating': (partial(M.DiceCELoss, softmax=True), hot_maps),
    'FocalLoss': (partial(M.FocalLoss, to_onehot_y=True), channel_maps),
    'FocalLoss softmax, weighted': (lambda: M.FocalLoss(to_onehot_y=True, use_softmax=True, weight=weights()), channel_maps),
    'FocalLoss floating': (M.FocalLoss, switch_maps),
    'GeneralizedWassersteinDiceLoss': (lambda: M.GeneralizedWassersteinDiceLoss(wasserstein), channel_maps),
    'GlobalMutualInformationLoss': (partial(M.GlobalMutualInformationLoss, num_bins=8), pictures),
    'JukeboxLoss': (partial(M.JukeboxLoss, spatial_dims=2), pictures),
    'LocalNormalizedCrossCorrelationLoss': (partial(M.LocalNormalizedCrossCorrelationLoss, spatial_dims=2), pictures),
    'MaskedLoss': (lambda: M.MaskedLoss(M.DiceLoss, **to_hot), channel_maps),
    'MultiScaleLoss': (lambda: M.MultiScaleLoss(torch.nn.MSELoss(), scales=[0, 1]), pictures),
    'NACLLoss': (partial(M.NACLLoss, classes=C, dim=2), maps),
    'SSIMLoss': (partial(M.SSIMLoss, spatial_dims=2, win_size=5), pictures)}
no_monai = dict(
    BendingEnergyLoss='has no target', DiffusionLoss='has no target',
    Dice='another name of DiceLoss',
    PatchAdversarialLoss='its target is one bool for all',
    PerceptualLoss='needs the weights of a network',
    SURELoss='has no target: it calls the network itself')

def public(module):
    "Names of the classes that `module` offers"
    return {o for o in dir(module) if isinstance(getattr(module, o), type) and o[0].isupper()}

libraries = dict(timm=(T, timm, {}), kornia=(K, kornia, no_kornia), smp=(S, smp, {}), monai=(M, monai, no_monai))
cases = {f'{lib}: {name}': case for lib,(_, table, _) in libraries.items() for name,case in table.items()}
