"""Other people's training loops: Lightning, Hugging Face's Trainer, accelerate in two processes; a Mix that travels with its batch.

The two processes run this file: `accelerate launch ... tests/clients/test_loops.py FOLDER`."""
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # where `tape` is, also for the processes

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from tape import close, cross_entropy, lerped, paired
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup_ext import Mix, blend, cutmix, mix_input, mixed_loss, mixup

root = Path(__file__).parents[2]
CLASSES = 3

def rows(n=48): return TensorDataset(torch.randn(n, 2, 6, 6), torch.arange(n)%CLASSES)
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES))

class Collate:
    "Rows to a batch that has its mix with it"
    def __init__(self, recipe): self.recipe = recipe
    def __call__(self, rows):
        x,y = torch.utils.data.default_collate(rows)
        return x, y, self.recipe(x, y)

def holds(x, y, mix, got, pred, loss):
    "What the model got is the mix of `x`, and the loss is that of the pairs"
    want = lerped(x, mix) if mix.mask is None else torch.where(mix.mask, x, x[mix.partner])
    close(got, want)
    close(loss, paired(cross_entropy, pred, [y], mix))

# a Mix in a batch

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('recipe', [mixup(.4),cutmix(1.)], ids=['mixup','cutmix'])
def test_workers_draw_the_mix(recipe, workers):
    model,drawn = net(),[]
    for x,y,mix in DataLoader(rows(), 8, collate_fn=Collate(recipe), num_workers=workers):
        assert type(mix) is Mix and len(mix)==8
        pred = model(blend(x, mix))
        holds(x, y, mix, blend(x, mix), pred, mixed_loss(nn.CrossEntropyLoss(), pred, y, mix))
        drawn.append(tuple(mix.partner.tolist()))
    assert len(set(drawn))==6  # workers do not repeat each other

@pytest.mark.parametrize('recipe', [mixup(.4),cutmix(1.)], ids=['mixup','cutmix'])
def test_a_mix_moves_and_keeps_what_it_says(recipe):
    mix = recipe(torch.randn(8, 2, 6, 6), torch.arange(8))
    there = mix.to('meta')
    assert type(there) is Mix and there.lam.device.type==there.partner.device.type=='meta'
    if mix.mask is not None: assert there.mask.device.type=='meta'
    back = mix.to(torch.device('cpu'))
    assert torch.equal(back.lam, mix.lam) and torch.equal(back.partner, mix.partner)

# Lightning

class Module(lightning.LightningModule):
    "Mixes in `training_step`, or takes the mix that came with the batch; notes what it did"
    def __init__(self, recipe=None):
        super().__init__()
        self.net,self.recipe,self.seen,self.checked = net(),recipe,[],[]
    def training_step(self, batch, i):
        x,y,*mix = batch
        mix = mix[0] if mix else self.recipe(x, y)
        got = mix_input(x, mix)
        pred = self.net(got)
        loss = mixed_loss(F.cross_entropy, pred, y, mix)
        self.seen.append([o.detach().clone() if isinstance(o, torch.Tensor) else o for o in (x, y, mix, got, pred, loss)])
        return loss
    def validation_step(self, batch, i):
        x,y = batch
        self.checked.append(F.cross_entropy(self.net(x), y))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 1e-2)

def fit_lightning(module, loader, folder):
    trainer = lightning.Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder)
    trainer.fit(module, loader, DataLoader(rows(16), 8))
    assert len(module.seen)==12 and len(module.checked)==4
    for o in module.seen: holds(*o)

@pytest.mark.parametrize('recipe', [mixup(.4),cutmix(1.)], ids=['mixup','cutmix'])
def test_lightning(recipe, tmp_path): fit_lightning(Module(recipe), DataLoader(rows(), 8, shuffle=True), tmp_path)

@pytest.mark.parametrize('recipe', [mixup(.4),cutmix(1.)], ids=['mixup','cutmix'])
def test_lightning_moves_a_mix_with_its_batch(recipe, tmp_path):
    fit_lightning(Module(), DataLoader(rows(), 8, shuffle=True, collate_fn=Collate(recipe)), tmp_path)

def test_lightning_moves_every_part():
    from lightning.fabric.utilities.apply_func import move_data_to_device
    x,y,mix = Collate(cutmix(1.))(list(rows(8)))
    _,_,there = move_data_to_device((x, y, mix), torch.device('meta'))
    assert {o.device.type for o in (there.partner, there.lam, there.mask)}=={'meta'}

# Hugging Face's Trainer

class MixTrainer(transformers.Trainer):
    "Trains on mixes of the batch and notes what it did"
    recipe,seen = mixup(.4),None
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        y = inputs.pop('labels')
        mix = self.recipe(y, y) if model.training else None
        outputs = model(**(mix_input(dict(inputs), mix) if mix else inputs))
        loss = mixed_loss(F.cross_entropy, outputs.logits, y, mix) if mix else F.cross_entropy(outputs.logits, y)
        if mix: self.seen.append((inputs['input_ids'], inputs['attention_mask'], y, outputs.logits.detach(), loss.detach(), mix))
        return (loss, outputs) if return_outputs else loss

def test_trainer(tmp_path):
    "Training is mixed, evaluation is not"
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=CLASSES, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 20, (32,8)) * (torch.arange(8)<torch.randint(4, 9, (32,1)))
    items = [dict(input_ids=o, attention_mask=(o>0).long(), labels=i%CLASSES) for i,o in enumerate(ids)]
    args = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=8, num_train_epochs=2, learning_rate=0.,
        report_to=[], save_strategy='no', use_cpu=True, disable_tqdm=True)
    trainer = MixTrainer(model, args, train_dataset=items, eval_dataset=items)
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen)==8
    w = model.bert.embeddings.word_embeddings.weight
    for ids,keep,y,pred,loss,mix in trainer.seen:
        lam = mix.lam.view(-1, 1, 1)
        with torch.no_grad():
            by_hand = lam*w[ids] + (1-lam)*w[ids[mix.partner]]
            want = model(inputs_embeds=by_hand, attention_mask=keep | keep[mix.partner]).logits
        close(pred, want)
        close(loss, paired(cross_entropy, pred, [y], mix))
    trainer.evaluate()
    assert len(trainer.seen)==8

# accelerate

def worker(folder):
    "A loop in each of two processes, with the mix drawn by the loader or in the loop"
    seen = []
    for collate in (None, Collate(cutmix(1.))):
        accelerate.utils.set_seed(1)
        acc = accelerate.Accelerator(cpu=True)
        model = net()
        model,opt,loader = acc.prepare(model, torch.optim.SGD(model.parameters(), 1e-2), DataLoader(rows(), 8, collate_fn=collate))
        torch.manual_seed(acc.process_index)
        for x,y,*mix in loader:
            mix = mix[0] if mix else mixup(.4)(x, y)
            got = blend(x, mix)
            pred = model(got)
            loss = mixed_loss(F.cross_entropy, pred, y, mix)
            acc.backward(loss)
            opt.step()
            opt.zero_grad()
            seen.append((x, y, mix, got, pred.detach(), loss.detach()))
    weights = [p.detach() for p in model.parameters()]
    torch.save(dict(seen=seen, weights=weights, n=acc.num_processes), folder/f'rank{acc.process_index}')
    acc.wait_for_everyone()
    acc.end_training()

def test_accelerate_in_two_processes(tmp_path):
    "Every process mixes its own part of the rows with draws of its own; all end with the same weights"
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--main_process_port', '0', '--num_processes', '2']
    job = subprocess.run([*launch, __file__, tmp_path], timeout=300, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(root)})
    assert job.returncode==0, job.stdout
    a,b = (torch.load(tmp_path/f'rank{i}', weights_only=False) for i in range(2))
    assert a['n']==b['n']==2 and len(a['seen'])==len(b['seen'])==6
    for o,p in zip(a['seen'], b['seen']):
        holds(*o)
        holds(*p)
        assert not torch.equal(o[0], p[0]) and not torch.equal(o[2].lam, p[2].lam)
    assert all(map(torch.equal, a['weights'], b['weights']))

if __name__=='__main__': worker(Path(sys.argv[1]))
