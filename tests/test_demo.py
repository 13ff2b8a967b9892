"""The command, end to end: on folders of pictures of every kind, on every wrong use, and stopped at any time."""
import base64
import csv
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastai_mixup_ext
from fastai_mixup_ext import demo_pictures, demo_report
from fastai_mixup_ext.demo import staging
from fastai_mixup_ext.demo_folders import find_pictures

script = Path(sys.executable).with_name('mixup-demo')
files = ['curves.png', 'forest.png', 'mixed_batch.png', 'report.html', 'results.csv']
methods = ['none', "fastai's MixUp", 'MixUpCallback', 'CutMixCallback']
quick = ['--epochs', '2', '--seeds', '2', '--size', '8', '--bs', '4', '--device', 'cpu']
colours = {'red': (200,0,0), 'green': (0,200,0), '<b>lue': (0,0,200)}

def picture(file, colour=(100,100,100), seed=0):
    "A noisy picture of one colour"
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 40, (12,10,3))
    Image.fromarray((colour + noise).clip(0, 255).astype('uint8')).save(file)

def pictures(folder, n=6):
    "A folder for each colour"
    for c,rgb in colours.items():
        for k in range(n): picture(folder/c/f'{k}.png', rgb, k)
    return folder

@pytest.fixture
def folder(tmp_path): return pictures(tmp_path/'pics')

@pytest.fixture
def demo(monkeypatch, capfd):
    "Runs the installed command in this process: its exit status, stdout and stderr"
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['mixup-demo', *map(str, args)])
        status,old = 0,signal.getsignal(signal.SIGINT)
        try: runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e: status = e.code or 0
        finally: signal.signal(signal.SIGINT, old)
        return status, *capfd.readouterr()
    return run

def contents(folder): return {str(o.relative_to(folder)): o.read_bytes() if o.is_file() else None for o in folder.rglob('*')}
def visible(folder): return sorted(o.name for o in folder.iterdir() if o.name[0]!='.')
def read(out): return list(csv.DictReader((out/'results.csv').read_text().splitlines()))

class Page(HTMLParser):
    "The rows of the table of a page, its words, its pictures, and whatever else it asks for"
    def __init__(self, html):
        super().__init__()
        self.rows, self.images, self.links, self.tags, self.text = [], [], [], [], ''
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag=='tr': self.rows.append([])
        if tag in ('td', 'th'): self.rows[-1].append('')
        for k,v in attrs:
            if k in ('src', 'data', 'srcset') or (tag=='link' and k=='href'): (self.images if tag=='img' else self.links).append(v)
    def handle_data(self, data):
        self.text += data
        if data.strip() and self.tags and self.tags[-1] in ('td', 'th'): self.rows[-1][-1] += data.strip()

# A run

def test_folder(demo, folder, tmp_path):
    out = tmp_path/'new'/'out'
    status, said, err = demo('--data', folder, '--out', out, *quick)
    assert status==0 and not err
    assert visible(out)==files and visible(out.parent)==['out']
    assert (out/'.gitignore').read_text()=='*\n'
    res = read(out)
    assert [(r['candidate'], int(r['seed'])) for r in res]==[(m,s) for s in range(2) for m in methods]
    lines = said.splitlines()
    assert '18 pictures in 3 classes, 8×8, on cpu' in lines[0]
    assert [o for o in lines if re.match(r'8 runs of 2 epochs: about .* in all', o)]
    assert [o.split(']')[0] for o in lines if o[0:1]=='[']==[f'[{i}/8' for i in range(1, 9)]
    c = demo_report.read_results(out/'results.csv')
    for words in c.conclusion, "agrees with fastai's MixUp", 'A training step takes', demo_report.as_text(c): assert words in said

    html = (out/'report.html').read_text(encoding='utf-8')
    page = Page(html)
    assert page.rows==[['', *demo_report.table(c).columns], *([o, *r] for o,r in zip(methods, demo_report.table(c).values.tolist()))]
    for words in c.conclusion, 'CutMix', 'weighted averages', 'learn.mix_find', '--data', demo_report.SITE: assert words in page.text
    embedded = [base64.b64decode(o.removeprefix('data:image/png;base64,')) for o in page.images]
    assert embedded[8:]==[(out/o).read_bytes() for o in ('forest.png', 'curves.png')], 'after four pictures from each of two methods'
    assert not page.links and 'script' not in page.tags and 'url(' not in html and '@import' not in html
    assert 'color-scheme: light dark' in html and 'name="viewport"' in html
    for o in 'forest.png', 'curves.png': assert Image.open(out/o).convert('RGBA').getpixel((0,0))[3]==0, 'its background is transparent'

def test_digits(demo, tmp_path):
    "A fifth of the labels is wrong by default; the same command gives the same numbers; one run has no curves, no interval"
    args = '--epochs', 1, '--seeds', 1, '--bs', 128
    for o in 'ab':
        status, said, err = demo('--out', tmp_path/o, *args)
        assert status==0 and not err and visible(tmp_path/o)==[o for o in files if o!='curves.png']
        assert '1,797 pictures in 10 classes, 8×8, 20 % of the training labels replaced by wrong ones' in said
        assert 'On clean digits there is little to gain' in said
    a,b = ([{k: r[k] for k in ('candidate', 'accuracy', 'loss')} for r in read(tmp_path/o)] for o in 'ab')
    assert a==b and len(a)==4

def test_earlier_results_are_kept(demo, folder, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    for o in 'mine.txt', 'results.csv': (out/o).write_text('mine')
    args = '--data', folder, '--out', out, '--epochs', 1, '--seeds', 1, '--size', 8
    for _ in range(2): assert demo(*args)[0]==0
    after = contents(out)
    assert after['mine.txt']==after['earlier-1/results.csv']==b'mine'
    assert visible(out/'earlier-2')==[o for o in files if o!='curves.png'] and '.gitignore' not in after

# Folders

def test_train_and_valid(tmp_path):
    for part in 'train', 'val', 'test': pictures(tmp_path/part, 2)
    picture(tmp_path/'val'/'pink'/'0.png')
    found = find_pictures(tmp_path)
    assert found.vocab==sorted(colours) and found.y==[0,0,1,1,2,2]*2 and found.valid==[False]*6+[True]*6
    assert [o.parts[-3] for o in found.files]==['train']*6+['val']*6
    assert found.said==['recognised: train/ to train, val/ to validate', 'passed over beside them: test/',
        'passed over in val/, for train/ has no such class: pink']

def test_folders_as_people_have_them(folder):
    "Nested, linked in circles, with other files, empty and hidden folders"
    picture(folder/'red'/'a'/'b'/'deep.JPG')
    for f in 'Thumbs.db', 'notes.txt', '.hidden.png': (folder/'red'/f).write_text('no picture')
    for o in 'empty', '.git': (folder/o).mkdir()
    for name,target in ('up','..'), ('self','self'), ('a/red','..'): (folder/'red'/name).symlink_to(target)
    found = find_pictures(folder)
    assert found.vocab==sorted(colours)
    assert sorted(o.name for o,y in zip(found.files, found.y) if found.vocab[y]=='red')==[*(f'{k}.png' for k in range(6)), 'deep.JPG']
    assert found.said==['passed over, for they hold no pictures: empty']

def test_unreadable_pictures_are_skipped(demo, folder, tmp_path):
    broken = folder/'red'/'0.png', folder/'red'/'1.png', folder/'green'/'8.jpg', folder/'green'/'9.gif'
    for f in broken[1:]: f.write_text('no picture')
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    status, said, err = demo('--data', folder, '--out', tmp_path/'out', '--epochs', 1, '--seeds', 1, '--size', 8)
    assert status==0 and not err
    line = "skipped 4 pictures that can't be read: green/8.jpg, green/9.gif, red/0.png and 1 more"
    assert said.splitlines()[0]==line and line in (tmp_path/'out'/'report.html').read_text()
    for f in (folder/'red').iterdir(): f.write_text('no picture')
    refused(demo('--data', folder, '--out', tmp_path/'new', *quick), "class 'red' has no pictures that can be read")
    assert not (tmp_path/'new').exists()

def mean(im, file):
    im.save(file)
    return demo_pictures.read(file, 8).mean(axis=(1,2))

def test_kinds_of_pictures(tmp_path):
    half = np.full((9,7), 32768, 'uint16')
    palette = Image.new('P', (9,7), 1)
    palette.putpalette([0,0,0, 0,200,0])
    for im,ending,rgb in [(Image.fromarray(half), 'png', (128,)*3), (Image.fromarray(half), 'tif', (128,)*3),
        (Image.fromarray(half/np.float32(65536)), 'tif', (128,)*3), (palette, 'gif', (0,200,0)),
        (Image.new('L', (9,7), 60), 'png', (60,)*3),
        (Image.new('RGBA', (9,7), (200,0,0,0)), 'png', (255,)*3), (Image.new('LA', (9,7), (90,255)), 'png', (90,)*3),
        (Image.new('CMYK', (9,7), (0,255,255,0)), 'jpg', (255,0,0)), (Image.new('1', (9,7), 1), 'png', (255,)*3)]:
        assert np.allclose(mean(im, tmp_path/f'a.{ending}'), rgb, atol=2), im.mode

@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(tmp_path, orientation):
    "What a camera held in any way has taken comes upright"
    upright = np.zeros((16,16,3), 'uint8')
    upright[:8,:8],upright[8:,8:] = 255,120
    turns = [None, Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE, Image.ROTATE_90, Image.TRANSVERSE,
        Image.ROTATE_270]  # what the camera did: the inverse of what the tag asks for
    im = Image.fromarray(upright)
    if turns[orientation-1] is not None: im = im.transpose(turns[orientation-1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    im.save(tmp_path/'a.png', exif=exif)
    assert (demo_pictures.read(tmp_path/'a.png', 16)==upright.transpose(2,0,1)).all()

def test_processes_read_what_one_reads(folder, monkeypatch):
    names = find_pictures(folder).files*4 + [folder/'nowhere.png']
    alone = [demo_pictures.read(o, 8) for o in names]
    monkeypatch.setattr(demo_pictures, 'PATIENCE', 0)
    monkeypatch.setattr(demo_pictures, '_cores', lambda: 2)
    monkeypatch.setattr(demo_pictures.ProcessPoolExecutor, 'submit', counted := Counted(demo_pictures.ProcessPoolExecutor.submit))
    together = demo_pictures.read_all(names, 8)
    assert counted.n and together[-1] is None and all(np.array_equal(a, b) for a,b in zip(alone, together, strict=True))

class Counted:
    "A method that counts its calls"
    def __init__(self, f): self.f,self.n = f,0
    def __get__(self, o, owner): return lambda *args, **kwargs: self(o, *args, **kwargs)
    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.f(*args, **kwargs)

# Wrong use

def no_folder(d): return d/'nowhere', f"{d/'nowhere'}: No such file"
def a_file(d): return d/'red'/'0.png', 'Not a directory'
def no_name(d): return '', "--data '' must be the name of a folder"
def empty(d):
    (d/'empty').mkdir()
    return d/'empty', 'holds no pictures'
def empty_classes(d):
    for c in 'ab': (d/'empty'/c).mkdir(parents=True)
    return d/'empty', 'holds no pictures'
def no_classes(d): return d/'red', 'holds pictures but no class folders'
def one_class(d):
    picture(d/'one'/'red'/'0.png')
    return d/'one', "only one class, 'red'"
def one_picture(d):
    picture(d/'pink'/'0.png')
    return d, "class 'pink' has 1 picture;"
def parts_without_classes(d):
    for part in 'train', 'valid': picture(d/'flat'/part/'0.png')
    return d/'flat', 'train/ has no class folders with pictures'
def other_classes(d):
    for part,c in ('train','ab'), ('valid','cd'):
        for o in c: picture(d/'parts'/part/o/'0.png')
    return d/'parts', 'one of its parts has no pictures'

def refused(res, said):
    "One line on stderr that contains `said`, and status 2"
    status, _, err = res
    assert status==2 and err.startswith('mixup-demo: ') and said in err
    assert err.count('\n')==1 and err.endswith('\n'), err

@pytest.mark.parametrize('spoil',
    [no_folder, a_file, no_name, empty, empty_classes, no_classes, one_class, one_picture, parts_without_classes, other_classes])
def test_bad_data(demo, folder, tmp_path, spoil):
    data, said = spoil(folder)
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'results.csv').write_text('mine')
    before = contents(tmp_path)
    for out in 'new', 'old': refused(demo('--data', data, '--out', tmp_path/out, *quick), said)
    assert contents(tmp_path)==before

@pytest.mark.parametrize('out', ['file', 'file/out', 'link', 'link/out', '/proc/mixup-demo', 'x'*300])
def test_bad_out(demo, folder, tmp_path, out):
    (tmp_path/'file').write_text('mine')
    (tmp_path/'link').symlink_to('nowhere')
    before = contents(tmp_path)
    refused(demo('--data', folder, '--out', tmp_path/out, *quick), '; name another folder')  # before the training
    assert contents(tmp_path)==before

def test_out_in_data(demo, folder, tmp_path, monkeypatch):
    "The report's pictures would be a class of the next run"
    (tmp_path/'link').symlink_to(folder)
    before = contents(tmp_path)
    for out in folder, folder/'new'/'out', tmp_path/'link'/'out':
        refused(demo('--data', folder, '--out', out, *quick), 'must not lie in --data')
    monkeypatch.chdir(folder)
    refused(demo('--data', '.', *quick), '--out mixup-demo must not lie in --data .')
    assert contents(tmp_path)==before

@pytest.mark.parametrize('option,value',
    [(o,v) for o in ('epochs','seeds','size','bs') for v in ('0', '-1', 'ten', '1.5', 'nan', '1e9', '')]
    + [('alpha', v) for v in ('0', '-1', 'nan', 'inf', 'many', '1e-9')] + [('noise', v) for v in ('-.1', '1.1', 'nan', 'much')]
    + [('device', v) for v in ('abacus', 'meta', 'cuda:99', '', 'cuda:')] + [('out', '')])
def test_bad_value(demo, tmp_path, option, value):
    refused(demo('--out', tmp_path/'out', f'--{option}={value}'), f'--{option} {value!r}')
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize('args', [['--epochs'], ['--epoch', '3'], ['pics'], ['--dtaa', 'pics']])
def test_bad_options(demo, args): refused(demo(*args), 'mixup-demo --help lists the options')

@pytest.mark.parametrize('args', [['--help'], ['--version'], ['--epochs=ten'], ['--data=nowhere'], ['--out=/proc/demo'],
    ['--device=abacus'], ['--data', 'pics']])
def test_nothing_heavy_is_imported_to_refuse(tmp_path, args):
    picture(tmp_path/'pics'/'red'/'0.png')  # one class
    code = 'import sys; from fastai_mixup_ext.demo import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)'
    res = subprocess.run([sys.executable, '-c', code, *args], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    heavy = {'torch', 'fastai', 'fastcore', 'numpy', 'PIL', 'pandas', 'matplotlib', 'scipy', 'sklearn'}
    assert not heavy & {*res.stdout.splitlines()[-1].split()}

def test_help_and_version(demo):
    status, said, err = demo('--help')
    assert status==0 and not err
    for o in 'data noise epochs seeds alpha size bs device out version'.split(): assert f'--{o}' in said
    assert demo('--version')==(0, f'mixup-demo {fastai_mixup_ext.__version__}\n', '')

# Ctrl-C

def start(*args):
    "The installed command, in a process of its own"
    return subprocess.Popen([script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8')

def test_interrupted_in_the_first_import():
    code = '''if True:
        import builtins, os, signal
        from fastai_mixup_ext.demo_start import main
        load = builtins.__import__
        def interrupted(name, *args, **kwargs):
            if name=='argparse': os.kill(os.getpid(), signal.SIGINT)
            return load(name, *args, **kwargs)
        builtins.__import__ = interrupted
        main()'''
    res = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    assert (res.returncode, res.stderr)==(130, '\nmixup-demo: stopped; nothing is written\n')

def test_interrupted_after_a_run(folder, tmp_path):
    "What is finished is reported"
    out = tmp_path/'out'
    p = start('--data', folder, '--out', out, *quick, '--seeds', 50)
    said = ''
    while not re.search(r'^\[2/200\].*\n', said, re.M):
        line = p.stdout.readline()
        assert line, p.stderr.read()
        said += line
    p.send_signal(signal.SIGINT)
    rest, err = p.communicate(timeout=120)
    assert p.returncode==130 and 'Traceback' not in err, err
    assert visible(out)==files and visible(tmp_path)==['out', 'pics']
    n = len(read(out))
    assert 2<=n<200
    for text in rest, (out/'report.html').read_text(encoding='utf-8'): assert f'Stopped: {n} of 200 runs were finished.' in text

@pytest.mark.parametrize('seconds', [.3, .8, 1.5, 3])
def test_interrupted_early(folder, tmp_path, seconds):
    "While modules are imported, while pictures are read, in the first run: nothing is written"
    p = start('--data', folder, '--out', tmp_path/'out', *quick, '--epochs', 1000)
    time.sleep(seconds)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=120)
    assert p.returncode==130 and 'Traceback' not in err, err
    assert err.splitlines()[-1]=='mixup-demo: stopped; nothing is written'
    assert visible(tmp_path)==['pics'] and not [*tmp_path.glob('.mixup*')]

def test_not_interrupted_while_files_are_moved(tmp_path, monkeypatch):
    rename = os.rename
    def interrupted(a, b):
        signal.raise_signal(signal.SIGINT)
        rename(a, b)
    monkeypatch.setattr(os, 'rename', interrupted)
    for word in 'first', 'second':
        with staging(tmp_path/'out') as tmp: (tmp/'report.html').write_text(word)
    assert [(tmp_path/'out'/o/'report.html').read_text() for o in ('earlier-1', '.')]==['first', 'second']

def test_nobody_reads_on():
    "As with `| head`: it ends without a traceback"
    code = """if True:
        import sys
        from fastai_mixup_ext import demo
        demo.demonstrate = lambda args: demo.say('one line')
        sys.exit(demo.main([]))"""
    read,write = os.pipe()
    os.close(read)
    res = subprocess.run([sys.executable, '-c', code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (res.returncode, res.stderr)==(141, '')
