"""Small random transformers of Hugging Face in fastai's learners: token ids are mixed where they become vectors, pictures as they are."""
import pytest
import torch
from fastai.basics import Learner
from looking import blends_inputs, fit
from tape import close, cross_entropy, loaders, paired, pairs
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from fastai_mixup_ext import CutMixCallback, MixUpCallback

WORDS,LONG,CLASSES = 30,12,3
tiny = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=CLASSES,
    hidden_dropout_prob=0., attention_probs_dropout_prob=0.)

class Logits(nn.Module):
    "What fastai's losses take of a model's answer"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return (self.model(**x) if isinstance(x, dict) else self.model(x)).logits

def bert(attention='sdpa'):
    return Logits(BertForSequenceClassification(BertConfig(vocab_size=WORDS, **tiny, attn_implementation=attention)))

def texts(kind, n=24):
    "Ids alone, or as a tokenizer gives them, with padding of various lengths"
    for i in range(n):
        length = LONG-i%5
        ids = torch.randint(1, WORDS, (LONG,)) * (torch.arange(LONG)<length)
        x = ids if kind=='ids' else dict(input_ids=ids, attention_mask=(ids>0).to(kind))
        yield x, torch.tensor(i%CLASSES)

@pytest.mark.parametrize('attention', ['eager','sdpa'])
@pytest.mark.parametrize('kind', ['ids',torch.int64,torch.bool], ids=str)
def test_bert(kind, attention):
    "The embedding's output is the blend of two texts' vectors; a token counts if it counts in either of them"
    items = list(texts(kind))
    learn = Learner(loaders(items, bs=8, n_inp=1), bert(attention), loss_func=nn.CrossEntropyLoss(), lr=1e-3)
    table,vectors,tables = learn.model.model.bert.embeddings.word_embeddings,[],[]
    def note(m, args, out):
        if not m.training: return
        vectors.append(out.detach().clone())
        tables.append(m.weight.detach().clone())
    hook = table.register_forward_hook(note)
    steps = fit(learn, MixUpCallback(seed=1))
    hook.remove()
    for o,v,w in zip(steps, vectors, tables):
        ids = o.x[0] if kind=='ids' else o.x[0]['input_ids']
        want = torch.stack([lam*w[ids[i]].double() + (1-lam)*w[ids[j]].double() for i,(j,lam) in enumerate(pairs(o.mix))])
        close(v, want)
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

@pytest.mark.parametrize('kind', ['ids',torch.int64,torch.bool], ids=str)
def test_bert_is_asked_what_a_plain_model_would_be(kind):
    "The prediction for a mixed batch is that of the same model for the vectors blended by hand"
    items = list(texts(kind))
    learn = Learner(loaders(items, bs=8, n_inp=1), bert(), loss_func=nn.CrossEntropyLoss(), lr=0.)
    for o in fit(learn, MixUpCallback(seed=1)):
        ids = o.x[0] if kind=='ids' else o.x[0]['input_ids']
        keep = torch.ones_like(ids) if kind=='ids' else (ids>0).long()
        w = learn.model.model.bert.embeddings.word_embeddings.weight
        lam = o.mix.lam.view(-1, 1, 1)
        by_hand = lam*w[ids] + (1-lam)*w[ids[o.mix.partner]]
        with torch.no_grad(): want = learn.model.model(inputs_embeds=by_hand, attention_mask=keep | keep[o.mix.partner]).logits
        close(o.pred, want)

@pytest.mark.parametrize('cb', [MixUpCallback,CutMixCallback])
def test_vit(cb):
    model = Logits(ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **tiny)))
    items = [(torch.randn(3, 32, 32), torch.tensor(i%CLASSES)) for i in range(24)]
    steps = fit(Learner(loaders(items), model, loss_func=nn.CrossEntropyLoss(), lr=1e-3), cb(seed=1))
    blends_inputs(steps)
    for o in steps: close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))
