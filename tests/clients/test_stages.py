"""The word 'stages' with bodies of timm in fastai's learners, and with a transformer of Hugging Face."""
import pytest
import torch
from fastai.basics import Learner
from fastai.vision.learner import create_timm_model
from stages import mixes_at_each_stage
from tape import loaders
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

BODIES = {
    'resnet18': ({}, [f'0.model.layer{i}' for i in range(1, 5)]),
    'convnext_atto': ({}, [f'0.model.stages.{i}' for i in range(4)]),
    'vit_tiny_patch16_224': (dict(img_size=32, depth=3), [f'0.model.blocks.{i}' for i in range(3)])}

def mixed_at(model, data):
    "The names of the places; each was mixed"
    learn = Learner(loaders(data, bs=4), model, nn.CrossEntropyLoss(), lr=1e-3)
    names = {m:name for name,m in model.named_modules()}
    return [names[m] for m in mixes_at_each_stage(learn, 1e-4)[1:]]

@pytest.mark.parametrize('body', BODIES)
def test_bodies_of_timm(body):
    more,places = BODIES[body]
    model,_ = create_timm_model(body, 3, pretrained=False, **more)
    assert mixed_at(model, [(torch.randn(3, 32, 32), torch.tensor(i%3)) for i in range(8)])==places

class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12, num_labels=3)
        self.bert = BertForSequenceClassification(config)
    def forward(self, ids): return self.bert(ids).logits

def test_layers_of_bert():
    data = [(torch.randint(1, 20, (6,)), torch.tensor(i%3)) for i in range(8)]
    assert mixed_at(Bert(), data)==[f'bert.bert.encoder.layer.{i}' for i in range(2)]
