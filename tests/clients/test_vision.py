"""Bodies of timm in fastai's learners, U-Nets of fastai and of segmentation_models_pytorch, and the latter's losses."""
import kornia.losses as K
import monai.losses as M
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.vision.core import PILImage, PILMask
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import unet_learner, vision_learner
from fastai.basics import Learner, TensorImage, TensorMask
from looking import blends_inputs, fit, mixed
from losses import VOID
from tape import close, cross_entropy, lerped, loaders, paired
from torchvision.models import resnet18

from fastai_mixup_ext import CutMixCallback, MixCallback, MixUpCallback, cutmix, mixup, one_of

CODES = 'sky','road','tree'

def numbered(n, seed=0): return list(np.random.default_rng(seed).integers(2**31, size=n))
def picture(seed): return PILImage.create(np.random.default_rng(seed).integers(256, size=(32,32,3), dtype='uint8'))
def mask(seed): return PILMask.create(np.random.default_rng(seed).integers(len(CODES), size=(32,32), dtype='uint8'))
def kind(seed): return 'abc'[seed%3]

def dls(block, get_y, bs=8, n=24):
    data = DataBlock((ImageBlock, block), get_items=numbered, get_x=picture, get_y=get_y,
        splitter=lambda o: (list(range(16)), list(range(16, n))))
    return data.dataloaders(n, bs=bs, num_workers=0, device='cpu')

def switch(seed=2): return MixCallback(one_of(mixup(.4), cutmix(1.)), seed=seed)

# timm

@pytest.mark.parametrize('cb', [MixUpCallback,CutMixCallback])
@pytest.mark.parametrize('body,more', [('resnet18',{}), ('convnext_atto',{}), ('vit_tiny_patch16_224',dict(img_size=32))])
def test_a_body_of_timm(body, more, cb):
    learn = vision_learner(dls(CategoryBlock, kind), body, pretrained=False, normalize=False, **more)
    steps = fit(learn, cb(seed=1))
    blends_inputs(steps)
    for o in steps:
        assert type(o.x[0]) is TensorImage
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix), 1e-4)

@pytest.mark.parametrize('body', ['resnet18','convnext_atto'])
def test_a_body_of_timm_mixed_inside(body):
    "At the first module of the body: what the next one gets is mixed, the model's input is not"
    learn = vision_learner(dls(CategoryBlock, kind), body, pretrained=False, normalize=False)
    first,second = list(learn.model[0].model.children())[:2]
    made,got = [],[]
    hooks = (first.register_forward_pre_hook(lambda m, args: made.append(m.forward(args[0]).detach())),
             second.register_forward_pre_hook(lambda m, args: got.append(args[0].detach().clone())))
    steps = fit(learn, MixUpCallback(at=first, seed=1))
    for h in hooks: h.remove()
    for o,x,z in zip(steps, made, got):
        close(o.args[0], o.x[0])
        close(z, lerped(x, o.mix))
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix), 1e-4)

# U-Nets: class maps are pasted under a mask, and else need two losses

def map_formula(o, whole=None):
    "The loss of a step from its prediction, targets as loaded and mix; `whole`: a loss that is called whole"
    pred,(y,),mix = o.pred,o.y,o.mix
    pred,y = (t.as_subclass(torch.Tensor) for t in (pred, y))
    loss = whole or (lambda p, t: torch.nn.functional.cross_entropy(p.double(), t))
    if mix.mask is not None: return loss(pred, torch.where(mix.mask[:,0] if y.dim()==3 else mix.mask, y, y[mix.partner]))
    if whole is None: return paired(cross_entropy, pred, [y], mix)
    lam = mix.lam[0].item()
    assert (mix.lam==lam).all()
    return lam*loss(pred, y) + (1-lam)*loss(pred, y[mix.partner])

unet_losses = {
    'its own': None,
    'smp Dice': lambda: smp.losses.DiceLoss('multiclass'),
    'kornia focal': lambda: K.FocalLoss(.5, reduction='mean'),
    'kornia Lovasz': K.LovaszSoftmaxLoss,
    'monai NACL': lambda: M.NACLLoss(len(CODES), 2)}

@pytest.mark.parametrize('name', unet_losses)
def test_unet_learner(name):
    make = unet_losses[name]
    learn = unet_learner(dls(MaskBlock(list(CODES)), mask), resnet18, pretrained=False, normalize=False, n_out=len(CODES),
        **(dict(loss_func=make()) if make else {}))
    steps = fit(learn, switch(), epochs=2)
    assert {o.mix.mask is None for o in steps}=={True, False} and type(steps[0].y[0]) is TensorMask
    blends_inputs(steps)
    for o in steps: close(o.loss, map_formula(o, make and make()), 1e-4)

smp_losses = dict(
    Dice=lambda: smp.losses.DiceLoss('multiclass', ignore_index=VOID),
    Jaccard=lambda: smp.losses.JaccardLoss('multiclass'),
    Focal=lambda: smp.losses.FocalLoss('multiclass', ignore_index=VOID),
    Tversky=lambda: smp.losses.TverskyLoss('multiclass'),
    Lovasz=lambda: smp.losses.LovaszLoss('multiclass', ignore_index=VOID),
    SoftCrossEntropy=lambda: smp.losses.SoftCrossEntropyLoss(smooth_factor=.1))

def scenes(classes, void=False, n=24):
    "Pictures and their class maps, some with pixels to ignore"
    x,y = torch.randn(n, 3, 32, 32),torch.randint(classes, (n, 32, 32))
    if void: y[::3,:5] = VOID
    return list(zip(x, y))

def small_unet(classes): return smp.Unet('resnet18', encoder_depth=3, encoder_weights=None, decoder_channels=(32,16,8), classes=classes)

@pytest.mark.parametrize('name', smp_losses)
def test_a_model_and_a_loss_of_smp(name):
    make,model = smp_losses[name],small_unet(3)
    items = scenes(3, void=name in ('Dice', 'Focal', 'Lovasz'))
    steps = fit(Learner(loaders(items, bs=6), model, loss_func=make(), lr=1e-3), switch(), epochs=2)
    assert {o.mix.mask is None for o in steps}=={True, False}
    blends_inputs(steps)
    for o in steps: close(o.loss, map_formula(o, make()), 1e-4)

@pytest.mark.parametrize('dtype', [torch.int64,torch.float32], ids=str)
def test_a_binary_model_of_smp(dtype):
    "Its targets are 0 or 1: integers need two losses, numbers are blended"
    def make(): return smp.losses.DiceLoss('binary')
    items = [(x, y[None].to(dtype)) for x,y in scenes(2)]
    learn = Learner(loaders(items, bs=6), small_unet(1), loss_func=make(), lr=1e-3)
    steps = fit(learn, switch(), epochs=2)
    blends_inputs(steps)
    for o in steps:
        if dtype==torch.float32: close(o.loss, make()(o.pred, mixed(o.y[0], o.mix).float()), 1e-4)
        else: close(o.loss, map_formula(o, make()), 1e-4)
