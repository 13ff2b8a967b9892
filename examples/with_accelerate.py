"""Mix in a loop of accelerate's, in several processes:

    accelerate launch --multi_gpu --num_processes 2 examples/with_accelerate.py
"""
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from fastai_mixup_ext import blend, mixed_loss, mixup

digits = load_digits()
pictures = torch.tensor(digits.images[:,None]/16).float()
data = TensorDataset(pictures, torch.tensor(digits.target))
model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
recipe,opt = mixup(.4),torch.optim.Adam(model.parameters(), 1e-2)

acc = Accelerator(cpu=not torch.cuda.is_available())
model,opt,loader = acc.prepare(model, opt, DataLoader(data, 64, shuffle=True))
torch.manual_seed(acc.process_index)  # or else all would draw the same shares
for x,y in loader:
    mix = recipe(x, y)
    pred = model(blend(x, mix))
    loss = mixed_loss(F.cross_entropy, pred, y, mix)
    acc.backward(loss)
    opt.step()
    opt.zero_grad()

lam = mix.lam[:,None]
soft = lam*F.one_hot(y, 10) + (1-lam)*F.one_hot(y[mix.partner], 10)
assert_close(loss, -(soft*pred.log_softmax(1)).sum(1).mean())
where = f'process {acc.process_index} of {acc.num_processes}'
print(f'{where}: {len(loader)} batches, loss {loss.item():.2f}')
acc.end_training()
