"""The documentation site in a real browser: built once, served on this machine, every page opened on a telephone and on a desk."""
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urldefrag

import pytest
from axe_playwright_python.sync_playwright import Axe
from nbdev.config import get_config
from playwright.sync_api import Error, expect, sync_playwright

root = Path(__file__).parents[1]
screenshots = root/'build/screenshots'  # CI keeps them
phone, desk = dict(width=390, height=844), dict(width=1280, height=900)
themes = 'light', 'dark'
sections = ['Home', 'Tutorials', 'How-to', 'Explanations', 'Evidence', 'API', 'Changelog']

def build(project, out):
    return subprocess.run([sys.executable, 'tools/build_site.py', '--out', str(out)], cwd=project, capture_output=True, text=True)

@pytest.fixture(scope='session')
def browser():
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    with sync_playwright() as p:
        try: res = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        except Error as e:
            give_up = pytest.fail if os.environ.get('CI') in ('true', '1') else pytest.skip
            give_up(f"no browser to read the site in: install chromium, or run `playwright install chromium`\n{e.message}")
        yield res
        res.close()

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

Site = namedtuple('Site', 'folder url pages')

@pytest.fixture(scope='session')
def site(browser, tmp_path_factory):
    "The whole site, built once and served on this machine"
    out = tmp_path_factory.mktemp('site')
    res = build(root, out)
    assert res.returncode==0, res.stdout + res.stderr
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=out)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Site(out, f'http://127.0.0.1:{server.server_port}/', sorted(o.relative_to(out).as_posix() for o in out.rglob('*.html')))
        server.shutdown()

@contextmanager
def tab(browser, complaints=None, **kwargs):
    "A fresh browser tab; what goes wrong in it is added to `complaints`"
    context = browser.new_context(**kwargs)
    page = context.new_page()
    if complaints is not None:
        page.on('request', lambda o: o.url.startswith(('http://127.0.0.1:', 'data:')) or complaints.append(f'{page.url} asks for {o.url}'))
        page.on('response', lambda o: o.status<400 or complaints.append(f'{page.url}: {o.status} for {o.url}'))
        page.on('console', lambda o: o.type in ('error', 'warning') and complaints.append(f'{page.url}: {o.text}'))
        page.on('pageerror', lambda o: complaints.append(f'{page.url}: {o}'))
    yield page
    context.close()

facts = """() => {
    const main = document.querySelector('main'), edge = main.getBoundingClientRect().right + 1;
    const scrolls = o => o && (/auto|scroll/.test(getComputedStyle(o).overflowX) || scrolls(o.parentElement));
    const all = (css, keep=o => true) => [...main.querySelectorAll(css)].filter(keep);
    const html = o => o.outerHTML.slice(0, 200);
    const prose = main.cloneNode(true);
    prose.querySelectorAll('pre, code, math').forEach(o => o.remove());
    return {
        links: [...document.querySelectorAll('a[href]')].map(o => o.href),
        ids: [...document.querySelectorAll('[id]')].map(o => o.id),
        wide: document.documentElement.scrollWidth > innerWidth ? ['the page'] :
            all('*', o => o.getBoundingClientRect().right > edge && !scrolls(o.parentElement)).map(html),
        pictures: all('img, svg:not([aria-hidden])').length,
        mute: all('img', o => !(o.complete && o.naturalWidth && o.alt.trim())).map(html),
        formulas: all('.math').length,
        raw: all('.math', o => !o.querySelector('math')?.getBoundingClientRect().width).map(html)
            .concat(prose.textContent.match(/\\\\[(\\[]|\\$\\$|^#\\|.*/gm) ?? []),
    }}"""

@pytest.fixture(scope='session')
def walk(browser, site):
    "What every page says of itself, on a telephone and on a desk, and all that went wrong on the way"
    found, complaints = {}, []
    for name,size in dict(phone=phone, desk=desk).items():
        with tab(browser, complaints, viewport=size) as page:
            for o in site.pages:
                page.goto(site.url + o)
                found[name,o] = page.evaluate(facts)
    return found, complaints

def collect(walk, fact): return [f'{page}, {size}: {o}' for (size,page),res in walk[0].items() for o in res[fact]]

def test_pages_are_self_contained(walk):
    assert not walk[1], 'a request that leaves the machine or fails, or an error in the console'

def test_pages_fit(walk): assert not collect(walk, 'wide')

def test_pictures(walk):
    assert sum(o['pictures'] for o in walk[0].values())
    assert not collect(walk, 'mute'), 'a picture that does not load, or has no alternative text'

def test_formulas(walk):
    assert sum(o['formulas'] for o in walk[0].values())
    assert not collect(walk, 'raw'), 'a formula or a directive that is shown as written'

def test_links(site, walk):
    ids = {site.url + page: o['ids'] for (size,page),o in walk[0].items() if size=='desk'}
    ours, source = get_config(root).doc_url, f'{get_config(root).git_url}/blob/main/'
    def broken(link):
        url,anchor = urldefrag(link)
        if url.startswith(source): return not re.fullmatch(r'L\d+|', anchor) or not (root/url.removeprefix(source)).exists()
        if not url.startswith(site.url): return url.startswith(ours.rstrip('/'))
        if url.endswith('/'): url += 'index.html'
        if url in ids: return anchor and anchor not in ids[url]
        return not (site.folder/url.removeprefix(site.url)).is_file()
    assert not {f'{page}: {o}' for (_,page),res in walk[0].items() for o in res['links'] if broken(o)}

def test_sidebar(browser, site):
    with tab(browser, viewport=desk) as page:
        page.goto(site.url)
        assert page.locator('.sidebar-menu-container > ul > li > .sidebar-item-container .menu-text').all_inner_texts()==sections
        listed = page.locator('.sidebar-menu-container a[href$=".html"]').evaluate_all('os => os.map(o => o.href)')
    assert {site.url + o for o in site.pages}==set(listed), 'a page that the sidebar does not list'

def test_markdown_copies(site):
    index = (site.folder/'llms.txt').read_text()
    for o in site.pages:
        assert f'{o}.md' in index
        assert (site.folder/f'{o}.md').read_text().startswith('#')

@pytest.mark.parametrize('size', [phone, desk], ids=['phone', 'desk'])
def test_search_finds_and_opens(browser, site, size):
    with tab(browser, viewport=size) as page:
        page.goto(site.url)
        if size is phone: page.get_by_label('Toggle navigation').click()
        page.get_by_label('Search', exact=True).fill('MixUpCallback')
        page.locator('.search-result').first.click()
        page.wait_for_url('**/api/*.html#mixupcallback')
        expect(page.locator('h3#mixupcallback')).to_be_in_viewport()

def test_copy_button(browser, site):
    with tab(browser, viewport=desk, permissions=['clipboard-read', 'clipboard-write']) as page:
        page.goto(site.url)
        block = page.locator('main :has(> .code-copy-button)').first
        block.hover()
        block.locator('.code-copy-button').click()
        expect(block.locator('.code-copy-button-checked')).to_be_visible()
        assert page.evaluate('navigator.clipboard.readText()').strip()==block.locator('code').inner_text().strip()!=''

def test_dark_mode_switches_and_stays(browser, site):
    def background(): return page.evaluate("getComputedStyle(document.body).backgroundColor")
    with tab(browser, viewport=desk, color_scheme='light') as page:
        page.goto(site.url)
        light = background()
        page.get_by_title('Toggle dark mode').click()
        expect(page.locator('html')).to_have_class(re.compile('quarto-dark'))
        dark = background()
        page.goto(site.url + 'changelog.html')
        assert background()==dark!=light

@pytest.mark.parametrize('theme', themes)
def test_accessible(browser, site, theme):
    found = []
    with tab(browser, viewport=desk, color_scheme=theme) as page:
        for o in site.pages:
            page.goto(site.url + o)
            bad = [v for v in Axe().run(page).response['violations'] if v['impact'] in ('serious', 'critical')]
            found += [f"{o}: {v['id']}: {n['html'][:150]}" for v in bad for n in v['nodes']]
    assert not found

@pytest.mark.parametrize('theme', themes)
def test_screenshots(browser, site, theme):
    screenshots.mkdir(parents=True, exist_ok=True)
    firsts = [next(o for o in site.pages if o.startswith(f'{s}/')) for s in ('tutorials', 'explanations', 'evidence')]
    with tab(browser, viewport=desk, color_scheme=theme) as page:
        for o in ['index.html', *firsts, 'api/callback.html']:
            page.goto(site.url + o)
            page.screenshot(path=screenshots/f"{o.replace('/', '-').removesuffix('.html')}-{theme}.png", full_page=True)

def test_build_fails_on_bad_pages(tmp_path):
    "A broken link, a picture without alternative text and a formula that can't be shown are named, and the build fails"
    for o in 'pyproject.toml', 'nbs/_quarto.yml', 'tools':
        (shutil.copytree if (root/o).is_dir() else shutil.copy)(root/o, (tmp_path/'nbs').mkdir(exist_ok=True) or tmp_path/o)
    (tmp_path/'nbs/index.qmd').write_text('# Home\n\n[gone](gone.ipynb) $\\nonsense$\n\n<img src="x.png">\n')
    res = build(tmp_path, tmp_path/'out')
    assert res.returncode
    for o in 'gone.ipynb', 'nonsense', 'alternative text': assert o in res.stderr
