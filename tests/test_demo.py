"""The command, end to end: on a folder of pictures, on every wrong use, and stopped half-way."""
import base64
import csv
import re
import runpy
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastai_mixup_ext

script = Path(sys.executable).with_name('mixup-demo')
files = ['curves.png', 'mixed_batch.png', 'report.html', 'results.csv']
methods = ['plain', 'fastai MixUp', 'MixUpCallback']
quick = ['--epochs', '1', '--seeds', '2', '--size', '8', '--bs', '4', '--device', 'cpu']

def picture(file, colour, rng):
    "A noisy picture of one colour"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((colour + rng.integers(-40, 40, (12,10,3))).clip(0, 255).astype('uint8')).save(file)

@pytest.fixture
def folder(tmp_path):
    "Red, green and <b>lue pictures, in a folder for each"
    rng = np.random.default_rng(0)
    for i,c in enumerate(('red', 'green', '<b>lue')):
        for k in range(6): picture(tmp_path/'pics'/c/f'{k}.png', 200*np.eye(3)[i], rng)
    return tmp_path/'pics'

@pytest.fixture
def demo(monkeypatch, capfd):
    "Runs the installed command in this process: its exit status, stdout and stderr"
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['mixup-demo', *map(str, args)])
        status = 0
        try: runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e: status = e.code or 0
        return status, *capfd.readouterr()
    return run

def contents(folder): return {str(o.relative_to(folder)): o.read_bytes() if o.is_file() else None for o in folder.rglob('*')}

def rows(text):
    "The printed table, as lists of words"
    lines = text.splitlines()
    start = next(i for i,l in enumerate(lines) if l.startswith('method '))
    return [re.split(r'\s{2,}', l) for l in lines[start:lines.index('', start)]]

def read(out): return list(csv.DictReader((out/'results.csv').read_text().splitlines()))

def check_results(out, printed, seeds):
    "The file of results has a row for each run, and the printed table follows from them"
    res = read(out)
    assert [(r['method'], int(r['seed'])) for r in res] == [(m,s) for s in range(seeds) for m in methods][:len(res)]
    head,*body = rows(printed)
    assert head == ['method', 'accuracy', 'loss', 's/epoch', 'runs']
    for method,acc,loss,secs,n in body:
        mine = [r for r in res if r['method']==method]
        for said,col in (acc,'accuracy'), (loss,'loss'):
            v = np.array([float(r[col]) for r in mine])
            assert said == f'{v.mean():.4f}' + (f' ± {v.std(ddof=1):.4f}' if len(v)>1 else '')
        assert secs == f"{np.mean([float(r['seconds']) for r in mine]):.2f}"
        assert int(n) == len(mine)
    assert sum(int(r[-1]) for r in body) == len(res)
    return res

class Page(HTMLParser):
    "The cells of the tables of a page, its pictures, and whatever else it asks for"
    def __init__(self, html):
        super().__init__()
        self.cells, self.images, self.links, self.tags = [], [], [], []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for k,v in attrs:
            if k in ('src','href','data','srcset'): (self.images if tag=='img' else self.links).append(v)
    def handle_data(self, data):
        if self.tags and self.tags[-1] in ('td','th') and data.strip(): self.cells.append(data.strip())

def test_folder(demo, folder, tmp_path):
    out = tmp_path/'new'/'out'
    status, said, err = demo('--data', folder, '--out', out, *quick)
    assert status == 0 and not err
    assert sorted(o.name for o in out.iterdir()) == files
    res = check_results(out, said, 2)
    assert len(res) == 6
    loss = {(r['method'],r['seed']): float(r['loss']) for r in res}
    for s in '01': assert loss['MixUpCallback',s] == pytest.approx(loss['fastai MixUp',s], abs=1e-4)
    assert len({round(v, 4) for v in loss.values()}) == 4  # plain differs, and so do the seeds
    for f in 'curves.png', 'mixed_batch.png': assert np.asarray(Image.open(out/f).convert('L')).std() > 5

    html = (out/'report.html').read_text(encoding='utf-8')
    page = Page(html)
    assert page.cells == sum(rows(said), [])
    for src,f in zip(page.images, ('mixed_batch.png','curves.png'), strict=True):
        assert base64.b64decode(src.removeprefix('data:image/png;base64,')) == (out/f).read_bytes()
    assert not page.links and 'script' not in page.tags and 'url(' not in html and '@import' not in html
    assert 'color-scheme: light dark' in html
    assert [o.name for o in out.parent.iterdir()] == ['out']

def test_seeds_repeat(demo, folder, tmp_path):
    "The same command gives the same numbers"
    for o in 'ab': assert demo('--data', folder, '--out', tmp_path/o, *quick, '--seeds', 1)[0] == 0
    a,b = ([{k:v for k,v in r.items() if k!='seconds'} for r in read(tmp_path/o)] for o in 'ab')
    assert a == b

def test_digits_and_version(demo, tmp_path):
    status, said, err = demo('--out', tmp_path, '--epochs', 1, '--seeds', 1, '--size', 8, '--bs', 512)
    assert status == 0 and not err
    assert '1797 in 10 classes, 8×8' in said
    check_results(tmp_path, said, 1)
    assert demo('--version') == (0, f'mixup-demo {fastai_mixup_ext.__version__}\n', '')

def test_earlier_results_are_kept(demo, folder, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    (out/'mine.txt').write_text('mine')
    (out/'results.csv').write_text('also mine')
    before = contents(out)
    for _ in range(2): assert demo('--data', folder, '--out', out, *quick, '--seeds', 1)[0] == 0
    after = contents(out)
    assert after['mine.txt'] == before['mine.txt'] and after['earlier-1/results.csv'] == before['results.csv']
    assert sorted(o.name for o in (out/'earlier-2').iterdir()) == files == sorted(o for o in after if o in files)

@pytest.mark.parametrize('class_names', [['a'], ['a', 'b']])
def test_bigger_batch_than_pictures(demo, tmp_path, class_names):
    "Two classes of two pictures are enough, whatever the batch; one class is not"
    for c in class_names:
        for k in range(2): picture(tmp_path/'pics'/c/f'{k}.png', 100, np.random.default_rng(k))
    status, _, err = demo('--data', tmp_path/'pics', '--out', tmp_path/'out', '--epochs', 1, '--seeds', 1)
    assert (status, 'only one class' in err) == ((2, True) if len(class_names)==1 else (0, False))

def no_folder(d): return d/'nowhere', f"{d/'nowhere'}: No such file"
def a_file(d): return d/'red'/'0.png', 'Not a directory'
def empty(d):
    (d/'empty').mkdir()
    return d/'empty', 'no pictures'
def empty_classes(d):
    for c in 'ab': (d/'empty'/c).mkdir(parents=True)
    return d/'empty', 'no pictures'
def one_class(d):
    picture(d/'one'/'red'/'0.png', 100, np.random.default_rng(0))
    return d/'one', "only one class, 'red'"
def one_picture(d):
    picture(d/'pink'/'0.png', 100, np.random.default_rng(0))
    return d, "class 'pink' has 1 picture;"
def an_empty_class(d):
    (d/'pink').mkdir()
    return d, "class 'pink' has no pictures"
def text(d):
    (d/'red'/'notes.txt').write_text('not a picture')
    return d, 'notes.txt is no picture'
def text_as_png(d):
    (d/'red'/'7.png').write_text('not a picture')
    return d, '7.png is no picture'
def truncated(d):
    f = d/'red'/'0.png'
    f.write_bytes(f.read_bytes()[:200])
    return d, '0.png is no picture'
def nothing_in_it(d):
    (d/'red'/'7.jpg').touch()
    return d, '7.jpg is no picture'

def refused(res, said):
    "One line on stderr that contains `said`, and status 2"
    status, _, err = res
    assert status == 2 and err.startswith('mixup-demo: ') and said in err
    assert err.count('\n') == 1 and err.endswith('\n'), err

@pytest.mark.parametrize('spoil',
    [no_folder, a_file, empty, empty_classes, one_class, one_picture, an_empty_class, text, text_as_png, truncated, nothing_in_it])
def test_bad_data(demo, folder, tmp_path, spoil):
    data, said = spoil(folder)
    for out in tmp_path/'new', tmp_path/'old':
        if out.name=='old':
            out.mkdir()
            (out/'results.csv').write_text('mine')
        before = contents(tmp_path)
        refused(demo('--data', data, '--out', out, *quick), said)
        assert contents(tmp_path) == before

@pytest.mark.parametrize('out', ['file', 'file/out', '/proc/mixup-demo', 'x'*300])
def test_bad_out(demo, folder, tmp_path, out):
    (tmp_path/'file').write_text('mine')
    before = contents(tmp_path)
    refused(demo('--data', folder, '--out', tmp_path/out, *quick), '--out')
    assert contents(tmp_path) == before

def test_out_without_permission(demo, folder, tmp_path):
    out = tmp_path/'locked'
    out.mkdir()
    out.chmod(0o500)
    try: (out/'probe').touch()
    except PermissionError: refused(demo('--data', folder, '--out', out, *quick), 'Permission denied')
    else: pytest.skip("this user may write anywhere")

@pytest.mark.parametrize('option,value',
    [(o,v) for o in ('epochs','seeds','size','bs') for v in ('0', '-1', 'ten', '1.5', 'nan', '1e9', '')]
    + [('alpha', v) for v in ('0', '-1', 'nan', 'inf', 'many', '1e-9')] + [('device', v) for v in ('abacus', 'meta', 'cuda:99', '')])
def test_bad_value(demo, tmp_path, option, value):
    refused(demo('--out', tmp_path/'out', f'--{option}={value}'), f'--{option} {value!r}')
    assert not list(tmp_path.iterdir())

def start(*args):
    "The installed command, in a process of its own"
    return subprocess.Popen([script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8')

def test_interrupted(folder, tmp_path):
    "Ctrl-C after the first run: what is finished is reported"
    out = tmp_path/'out'
    p = start('--data', folder, '--out', out, *quick, '--epochs', 3, '--seeds', 50)
    said = ''
    while not said.endswith('\n') or '[1/150]' not in said.splitlines()[-1]:
        line = p.stdout.readline()
        assert line, p.stderr.read()
        said += line
    p.send_signal(signal.SIGINT)
    rest, err = p.communicate(timeout=120)
    assert p.returncode == 130, err
    assert 'Traceback' not in err
    assert sorted(o.name for o in out.iterdir()) == files
    res = check_results(out, said+rest, 50)
    assert 1 <= len(res) < 150
    assert f'{len(res)} of 150 runs' in rest and f'{len(res)} of 150 runs' in (out/'report.html').read_text(encoding='utf-8')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['out', 'pics']

def test_interrupted_at_once(folder, tmp_path):
    "Ctrl-C before any run is finished: nothing is written"
    p = start('--data', folder, '--out', tmp_path/'out', *quick, '--epochs', 1000)
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 130, err
    assert err.splitlines()[-1] == 'mixup-demo: stopped; nothing is written' and 'Traceback' not in err
    assert [o.name for o in tmp_path.iterdir()] == ['pics']
