"The word 'stages': which places it names in fastai's models, that each is mixed, and what can't be read."
import pytest
import torch
from common import global_hooks
from fastai.basics import Callback, CrossEntropyLossFlat, Learner
from fastai.tabular.model import TabularModel
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.vision.learner import create_unet_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18
from hypothesis import given, strategies as st
from stages import mixes_at_each_stage, seen_at
from tape import close, cross_entropy, lerped, loaders, paired, pairs
from test_data import text_loaders
from torch import nn
from torchvision.models import googlenet, resnet18, vgg11
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from fastai_mixup_ext import CutMixCallback, Mix, MixUpCallback
from fastai_mixup_ext.places import find_places, first_rows

def picture(size=32): return torch.randn(3, size, size)

def items(make, target, n=8): return [(*make(), target(i)) for i in range(n)]

def kind(i): return torch.tensor(i%3)

def learner(model, data, n_inp=1, axis=-1, **kwargs):
    dls = loaders(data, bs=4, n_inp=n_inp)
    return Learner(dls, model, CrossEntropyLossFlat(axis=axis), lr=1e-3, **kwargs)

def vision(arch): return lambda: learner(create_vision_model(arch, 3, pretrained=False), items(lambda: (picture(),), kind))

def convnext(**kwargs):
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, 16, 1), CNBlockConfig(16, 16, 1), CNBlockConfig(16, None, 1)])

def tables():
    def row(): return torch.randint(0, 3, (2,)), torch.randn(2)
    return learner(TabularModel([(3,2), (3,3)], 2, 3, [8, 6]), items(row, kind), n_inp=2)

def maps():
    model = create_unet_model(resnet18, 3, (32,32), pretrained=False)
    return learner(model, items(lambda: (picture(),), lambda i: torch.randint(0, 3, (32,32)), 4), axis=1)

def plain():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3))
    return learner(model, items(lambda: (picture(),), kind))

models = {
    'resnet': (vision(resnet18), '0.3 0.4 0.5 0.6 0.7'),
    'convnext': (vision(convnext), ' '.join(f'0.0.{i}' for i in range(8))),
    'xresnet': (lambda: learner(xresnet18(n_out=3), items(lambda: (picture(),), kind)), '0 1 3 4 5 6 7'),
    'unet': (maps, ' '.join(f'layers.0.{i}' for i in range(3, 8))),
    'tabular': (tables, 'layers.0 layers.1'),
    'Sequential': (plain, '2 4')}

def names(places, model):
    "The names of the modules, 'input' for None"
    by_module = {m:name for name,m in model.named_modules()}
    return ' '.join('input' if m is None else by_module[m] for m in places)

@pytest.mark.parametrize('name', models)
def test_each_stage_is_mixed(name):
    make,places = models[name]
    learn = make()
    assert names(find_places('stages', learn.model), learn.model)==f'input {places}'
    mixes_at_each_stage(learn)

def test_every_stage_has_its_turn():
    "And the input: the place is drawn for each batch"
    learn,seen = plain(),set()
    class Where(Callback):
        order = 1
        def before_batch(self):
            if self.training: seen.add(self.learn.mix_up.place and self.learn.mix_up.place.module)
    with learn.no_bar(), learn.no_logging(): learn.fit(12, cbs=[MixUpCallback(at='stages', seed=0), Where()])
    assert seen==set(find_places('stages', learn.model))

# Recurrent layers, and texts that come in parts

def texts(seq_len, n_layers=2):
    dls = text_loaders(seq_len)
    config = awd_lstm_clas_config | dict(emb_sz=6, n_hid=7, n_layers=n_layers)
    return text_classifier_learner(dls, AWD_LSTM, seq_len=seq_len, config=config, pretrained=False)

@pytest.mark.parametrize('n_layers', [1, 2, 3])
def test_texts_in_one_part(n_layers):
    learn = texts(72, n_layers)
    places = mixes_at_each_stage(learn)
    layers = [f'0.module.rnns.{i}' for i in range(n_layers)] if n_layers>1 else ['0']  # one layer is no list: the encoder is the stage
    assert names(places, learn.model)==' '.join(['input', *layers])

def in_part(x, mix):
    "`x` of the rows that have begun: mixed where the partner has too, else as it is"
    x = x.double()
    return torch.stack([lam*x[i] + (1-lam)*x[j] if j<len(x) else x[i] for i,(j,lam) in enumerate(pairs(mix)[:len(x)])])

def test_long_texts():
    "Every part of a text is mixed, with one mix; the state that goes on to the next part is each row's own"
    learn = texts(8)
    for module in find_places('stages', learn.model)[1:]:
        steps,before,after = seen_at(learn, module)
        assert len(steps)==2 and len(before)==len(after)>4
        mixes = iter(steps)
        for i,(x,z) in enumerate(zip(before, after)):
            if not i or len(x)<len(before[i-1]): o = next(mixes)  # a new batch begins with the few rows that are longest
            close(z, in_part(x, o.mix))
        assert min(map(len, before))<16==max(map(len, before))
        for o in steps: close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))
    assert not global_hooks()

class Last(nn.Module):
    "The last output of a recurrent network"
    def __init__(self, rnn): super().__init__(); self.rnn,self.head = rnn,nn.Linear(5, 3)
    def forward(self, x): return self.head(self.rnn(x)[0][:,-1])

@pytest.mark.parametrize('rnn', [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer(rnn):
    "Its output is mixed, its state is not; a layer with the rows on axis 1 is refused"
    learn = learner(Last(rnn(4, 5, batch_first=True)), items(lambda: (torch.randn(6, 4),), kind))
    steps,before,after = seen_at(learn, learn.model.rnn)
    for o,x,z in zip(steps, before, after): close(z, lerped(x, o.mix))
    with pytest.raises(ValueError, match='batch_first=True'): find_places(lambda m: m.rnn, Last(rnn(4, 5)))

@given(st.integers(1, 6), st.integers(0, 100))
def test_first_rows(k, seed):
    torch.manual_seed(seed)
    lam,x = torch.rand(6),torch.randn(6, 3)
    mix = Mix(torch.randperm(6), lam)
    close(first_rows(mix, k).blend(x[:k]), in_part(x[:k], mix))
    by_value = first_rows(Mix(mix.partner, torch.rand(6), lam), k)
    close(by_value.blend(x[:k]), in_part(x[:k], mix))
    assert first_rows(mix, 6) is mix

# What can be seen, and what can't be read

def test_names_with_shapes():
    learn = plain()
    model = learn.model
    model[1].eval()
    shown = repr(find_places('stages', model, picture()[None])).splitlines()
    assert [o.split() for o in shown]==[['input', '(1,', '3,', '32,', '32)'], ['2', '(ReLU)', '(1,', '4,', '15,', '15)'],
        ['4', '(ReLU)', '(1,', '6,', '7,', '7)']]
    assert repr(find_places('stages', model)).splitlines()==['input', '2 (ReLU)', '4 (ReLU)']
    assert model.training and not model[1].training and model[2].training  # as they were
    assert not any(m._forward_hooks for m in model.modules())
    assert find_places('stages', model)==[None, model[2], model[4]]

def test_a_place_that_is_not_called_is_shown():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.aux = nn.Linear(3, 3)
    model.forward = lambda x: model[1](model[0](x))
    assert 'not called' in repr(find_places(lambda m: [m.aux], model, torch.randn(2, 3)))

class Net(nn.Module):
    def __init__(self): super().__init__(); self.first,self.second = nn.Linear(4, 4),nn.Linear(4, 3)
    def forward(self, x): return self.second(self.first(x).relu())

@pytest.mark.parametrize('model,children', [(Net(), r'first \(Linear\), second \(Linear\)'), (nn.Linear(3, 2), 'none'),
    (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), r'0 \(Flatten\), 1 \(Linear\)'), (nn.Sequential(), 'none'),
    (googlenet(init_weights=False), r'conv1 \(BasicConv2d\).*fc \(Linear\)')], ids=lambda o: type(o).__name__)
def test_a_model_that_cannot_be_read(model, children):
    with pytest.raises(ValueError, match=f"{type(model).__name__}; name them.*Its children are: {children}"): find_places('stages', model)
    if isinstance(model, Net):
        learn = learner(model, items(lambda: (torch.randn(4),), kind))
        with pytest.raises(ValueError, match='Its children are'): learn.fit(1, cbs=MixUpCallback(at='stages'))

@pytest.mark.parametrize('at', ['stage', 'layers', ''])
def test_no_other_word(at):
    with pytest.raises(ValueError, match="must be 'stages'"): find_places(at, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="must be 'stages'"): MixUpCallback(at=at)

def test_shared_and_inner_layers():
    "A shared activation ends no stage, since its first call is another's; a part of a body is not taken for the body"
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 2))
    assert names(find_places('stages', model), model)=='input 0 2'
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU())
    model = nn.Sequential(block(3, 4), block(4, 4), block(4, 4), nn.Flatten(), nn.LazyLinear(2))
    assert names(find_places('stages', model), model)=='input 0 1 2'
    assert names(find_places('stages', nn.Sequential(nn.Sequential(model))), nn.Sequential(nn.Sequential(model)))=='input 0.0.0 0.0.1 0.0.2'

def test_whole_models_of_torchvision():
    for model,want in ((resnet18(), 'input layer1 layer2 layer3 layer4'), (vgg11(), ' '.join(['input', *(f'features.{i}' for i in
            (2, 5, 7, 10, 12, 15, 17, 20))]))): assert names(find_places('stages', model), model)==want

class Windows(nn.Module):
    "Four rows for each, as attention in windows has them"
    def forward(self, x): return x.unflatten(1, (4, 3)).flatten(0, 1)

def test_rows_that_are_not_the_batch_are_refused():
    model = nn.Sequential(Windows(), nn.Linear(3, 3), nn.Unflatten(0, (-1, 4)), nn.Flatten(), nn.Linear(12, 3))
    learn = learner(model, items(lambda: (torch.randn(12),), kind))
    with pytest.raises(ValueError, match=r'output of Linear has shape \(16, 3\), but the batch has 4 rows'):
        learn.fit(1, cbs=MixUpCallback(at=model[1]))
    assert not global_hooks()

def test_a_place_without_tensors_is_refused():
    class Bag(nn.Module):
        def forward(self, x): return {}
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bag,self.lin = Bag(),nn.Linear(3, 3)
        def forward(self, x): return self.bag(x) or self.lin(x)
    learn = learner(Two(), items(lambda: (torch.randn(3),), kind))
    with pytest.raises(TypeError, match='at: Bag returned no tensor'): learn.fit(1, cbs=MixUpCallback(at=learn.model.bag))

def test_boxes_at_the_stages_of_pictures():
    learn = plain()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=CutMixCallback(at='stages'))

class TimeFirst(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 2, enable_nested_tensor=False)

@pytest.mark.parametrize('at', [lambda m: m.body, lambda m: m.body.layers[0], lambda m: m.body.layers[1].self_attn])
def test_attention_with_time_first_is_refused(at):
    "Its rows are on axis 1, which a square batch does not show"
    with pytest.raises(ValueError, match='has its rows on axis 1; build it with batch_first=True'): find_places(at, TimeFirst(False))
    assert len(find_places(at, TimeFirst(True)))==1

class SideBySide(nn.Module):
    "Two lists of parts that the model calls one by one"
    def __init__(self):
        super().__init__()
        self.a,self.b = (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))
        self.parts = nn.ModuleList([self.a, self.b])
        self.head = nn.Linear(4, 2)

def test_no_stage_is_a_list_that_is_never_called():
    try: places = find_places('stages', SideBySide())
    except ValueError as e: assert 'finds no list of stages' in str(e)
    else: assert not any(isinstance(o, nn.ModuleList) for o in places)
