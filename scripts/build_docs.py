"""Build the documentation to HTML without Quarto, and check it. nbdev processes `nbs/`, and the pages go to `_site/`.
A documented name in the prose becomes a link to the page that shows it.

The build fails on:

- a link, a picture or an anchor that leads to nothing, in the pages, `llms.txt` or the repository's Markdown files;
- a page that is missing from the sidebar, or that the sidebar lists and is missing;
- a public name that no `show_doc` shows, or a `show_doc` that shows nothing;
- a cell that ended in an error."""
import inspect
import os
import re
import shutil
import sys
from html import escape
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from bs4 import BeautifulSoup
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter, MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbdev.serve import proc_nbs
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
FORMULA = re.compile(r'(\$\$.+?\$\$|\$[^$]+\$)', re.S)
HEADINGS = [f'h{k}' for k in range(1, 7)]
MARKDOWN = 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'


# ---- The names to document ----

def public_names() -> dict[str, object]:
    "Every public function, class, method and property, by the name that `show_doc` shows."
    from fastai.basics import Learner
    from fastai.callback.core import _events

    import fastai_lsuv
    from fastai_lsuv import report
    from fastai_lsuv.recorder import diagnosis, tables
    names = {n: getattr(fastai_lsuv, n) for n in fastai_lsuv.__all__}
    results = report.Row, tables.Pairs, diagnosis.Finding, diagnosis.Diagnosis
    names |= {c.__name__: c for c in results}
    for n, o in list(names.items()):
        for c in getattr(o, '__mro__', ()):
            if not c.__module__.startswith('fastai_lsuv'): continue
            names |= {f'{n}.{k}': v for k, v in vars(c).items() if is_public(k, v) and k not in _events}
    return names | {'Learner.lsuv_init': Learner.lsuv_init}


def is_public(name: str, member: object) -> bool:
    "Is it a public method or property?"
    return name[0] != '_' and (inspect.isfunction(member) or isinstance(member, property))


# ---- From notebook to page ----

def shown(nb: nbformat.NotebookNode) -> tuple[set[str], list[str]]:
    "The names that `show_doc` shows in a processed notebook, and the calls that show nothing."
    names: set[str] = set()
    empty = []
    for cell in nb.cells:
        if cell.cell_type != 'code' or not re.search(r'^show_doc\(', cell.source, re.M): continue
        text = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.outputs)
        found = re.findall(r'^#+ ([\w.]+)$', text, re.M)
        names.update(found)
        if not found:
            empty.append(re.search(r'^show_doc\(.*', cell.source, re.M)[0])
    return names,empty


def prepared(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "`nb` as Quarto would show it. Front matter becomes a heading again. Directives are obeyed and removed."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == 'raw' and cell.source.startswith('---'):
            meta = yaml.safe_load(cell.source.strip('-\n'))
            cell = nbformat.v4.new_markdown_cell(f"# {meta.get('title', '')}\n\n> {meta.get('description', '')}")
        if cell.source.startswith('<!-- WARNING'): continue
        if cell.cell_type == 'code':
            cell.metadata.pop('execution', None)  # nbdev's timings are not strings, and the converter wants strings
            directives = dict(re.findall(r'^#\|\s*([\w-]+):?\s*(.*)$', cell.source, re.M))
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
            cell.metadata.tags = []
            if directives.get('echo') == 'false':
                cell.metadata.tags.append('no-input')
            if directives.get('code-fold') == 'true':
                cell.metadata.tags.append('fold')
        cells.append(cell)
    nb.cells = cells
    return nb


def heading_id(text: str) -> str:
    "The anchor that Quarto gives to a heading."
    text = re.sub(r'[^\w\s.-]', '', text.strip().lower())
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', text)) or 'section'


def finish(soup: BeautifulSoup) -> None:
    "Complete a page: anchors as Quarto's, links to pages instead of notebooks, folds around code, and MathML."
    add_anchors(soup)
    for a in soup.find_all('a', href=True):
        if not re.match('[a-z]+:', a['href']):
            a['href'] = re.sub(r'\.ipynb(?=#|$)', '.html', a['href'])
    for code in soup.select('.celltag_fold .input'):
        code.wrap(soup.new_tag('details')).insert(0, BeautifulSoup('<summary>Code</summary>', 'html.parser'))
    for text in list(soup.find_all(string=re.compile(r'\$'))):
        if FORMULA.search(text) and not text.find_parent(['pre', 'code', 'script', 'style']):
            text.replace_with(BeautifulSoup(with_mathml(text), 'html.parser'))


def add_anchors(soup: BeautifulSoup) -> None:
    "Give each heading its anchor. A number tells headings of one name apart."
    seen: dict[str, int] = {}
    for h in soup.find_all(HEADINGS):
        i = heading_id(h.get_text())
        seen[i] = seen.get(i, -1) + 1
        h['id'] = f'{i}-{seen[i]}' if seen[i] else i


# What names begin with in a Learner
IN_A_LEARNER = {'learn.lsuv.report': 'LSUVReport', 'learn.lsuv_init': 'Learner.lsuv_init', 'learn.lsuv': 'LSUVCallback',
                'learn.activation_stats_recorder': 'ActivationStatsRecorder'}


class ApiNames:
    "The documented names, and the page that shows each."
    def __init__(self): self.pages: dict[str, str] = {}

    def add(self, names: set[str], page: str) -> None: self.pages |= dict.fromkeys(names, page)

    def find(self, text: str, page: str) -> str | None:
        """The documented name that a piece of code in the prose of `page` is about.

        A method may stand by itself, as in `diagnose()`. If several classes have it, the page's own is meant: that of
        `api/recorder.html` on `recorder.html`."""
        name = re.sub(r'\(.*\)$', '', text, flags=re.S)
        for start, full in IN_A_LEARNER.items():
            if name == start or name.startswith(start + '.'):
                name = full + name[len(start):]
                break
        if name in self.pages: return name
        if name == text and text[:1] != '.': return None
        of = [n for n in self.pages if n.partition('.')[2] == name.lstrip('.')]
        here = [n for n in of if Path(self.pages[n]).name == Path(page).name]
        return next((found[0] for found in (of, here) if len(found) == 1), None)

    def link(self, soup: BeautifulSoup, page: str) -> None:
        "Make the names in the prose of a page links."
        for code in soup.find_all('code'):
            if code.find_parent(['pre', 'a', *HEADINGS]): continue
            name = self.find(code.get_text(), page)
            above = code.find_previous(HEADINGS)
            if name is None or above is not None and above.get_text() == name: continue
            code.wrap(soup.new_tag('a', href=f'{relative(self.pages[name], page)}#{heading_id(name)}'))


def with_mathml(text: str) -> str:
    "The HTML of a text, with its formulas in MathML. MathML needs no network."
    def formula(part: str) -> str:
        return mathml(part.strip('$').strip(), display='block' if part[:2] == '$$' else 'inline')
    parts = FORMULA.split(text)
    return ''.join(formula(p) if k % 2 else escape(p, quote=False) for k, p in enumerate(parts))


def html_name(notebook: str) -> str:
    "The page of a notebook."
    return re.sub('ipynb$', 'html', notebook)


class Sidebar:
    "The pages that `sidebar.yml` lists. An entry is a file, or a section of files or of a glob. Quarto reads it too."
    def __init__(self, nbs: Path):
        file = nbs/'sidebar.yml'
        if file.exists():
            contents = yaml.safe_load(file.read_text())['website']['sidebar']['contents']
        else:
            contents = sorted(p.name for p in nbs.glob('*.ipynb'))
        self.sections = [('', [e for e in contents if isinstance(e, str)])]
        for e in contents:
            if not isinstance(e, dict): continue
            files = e['contents']
            if isinstance(files, str):
                files = sorted(p.relative_to(nbs).as_posix() for p in nbs.glob(files))
            if files:
                self.sections.append((e['section'], files))
        self.sections = [(section, [html_name(f) for f in files]) for section, files in self.sections]
        self.pages = [p for _, pages in self.sections for p in pages]

    def html(self, page: str, titles: dict[str, str], headings: list[tuple[str, str]]) -> str:
        "The sidebar of `page`. The headings of `page` stand below its title."
        inner = ''.join(f'<li><a href="#{i}">{escape(t)}</a></li>' for i, t in headings)
        lines = []
        for section, pages in self.sections:
            if section:
                lines.append(f'<p>{escape(section)}</p>')
            lines.append('<ul>')
            for p in pages:
                here = p == page
                link = f'<a href="{relative(p, page)}"{" class=here" if here else ""}>{escape(titles.get(p, p))}</a>'
                lines.append(f'<li>{link}{f"<ul>{inner}</ul>" if here and inner else ""}</li>')
            lines.append('</ul>')
        return '\n'.join(lines)

    def beside(self, page: str, titles: dict[str, str]) -> str:
        "Links to the page before and the page after."
        if page not in self.pages: return ''
        k = self.pages.index(page)

        def link(p: str, before: str = '', after: str = '') -> str:
            return f'<a href="{relative(p, page)}">{before}{escape(titles.get(p, p))}{after}</a>'

        left = link(self.pages[k-1], before='← ') if k else '<span></span>'
        right = link(self.pages[k+1], after=' →') if k + 1 < len(self.pages) else ''
        return left + right


def relative(target: str, page: str) -> str:
    "The link from `page` to `target`, both as paths in the site."
    return os.path.relpath(target, Path(page).parent)


STYLE = '''
:root { color-scheme: light; --line: #dde1e6; --soft: #f6f7f9; --link: #1b6ca8; }
* { box-sizing: border-box; }
body {
  margin: 0; font: 16px/1.6 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #24292f;
  display: grid; grid-template-columns: 17rem minmax(0, 60rem);
}
nav.sidebar {
  position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 1.5rem 1rem 2rem 1.5rem;
  border-right: 1px solid var(--line); font-size: .92rem;
}
nav.sidebar ul { list-style: none; margin: 0; padding: 0; }
nav.sidebar ul ul { padding-left: .9rem; font-size: .88em; margin: .1rem 0 .5rem; }
nav.sidebar p { margin: 1rem 0 .2rem; font-weight: 600; }
nav.sidebar a { color: #444c56; display: block; padding: .12rem 0; }
nav.sidebar a.here { color: var(--link); font-weight: 600; }
main { padding: 1.5rem 2.5rem 4rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
h1, h2, h3, p, li { overflow-wrap: anywhere; }
h1 { margin: .3rem 0; font-size: 2rem; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); font-size: 1.45rem; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1.15rem; }
h1 + blockquote { margin: 0 0 1.5rem; padding: 0; border: 0; color: #57606a; font-size: 1.1rem; }
hr { border: 0; border-top: 1px solid var(--line); margin: 2.2rem 0 0; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); color: #57606a; }
code, pre { font: .86em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { background: var(--soft); padding: .1em .3em; border-radius: 3px; }
pre { font-size: .84rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
pre code { padding: 0; background: none; font-size: 1em; }
.highlight, main > pre, .rendered_html > pre {
  background: var(--soft) !important; border: 1px solid var(--line); border-radius: 5px;
  padding: .6rem .8rem; margin: .7rem 0;
}
.output_subarea { margin: .3rem 0 .9rem; overflow-x: auto; }
.output_subarea .highlight { margin: .4rem 0; }
.output_text pre, .output_stream pre { border-left: 3px solid var(--line); padding-left: .8rem; font-size: .8rem; }
table { border-collapse: collapse; border: 0; font-size: .88rem; margin: .8rem 0; }
th, td { padding: .3rem .7rem; border: 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.output_html td, .output_html th { text-align: right; white-space: nowrap; }
th { font-weight: 600; }
details summary { cursor: pointer; color: #57606a; font-size: .85rem; }
img { max-width: 100%; height: auto; }
math[display=block] { margin: .8rem 0; font-size: 1.1rem; }
footer {
  display: flex; justify-content: space-between; margin-top: 3rem; padding-top: 1rem;
  border-top: 1px solid var(--line);
}
@media (max-width: 800px) {
  body { display: flex; flex-direction: column; }
  nav.sidebar { order: 2; position: static; height: auto; border-right: 0; border-top: 1px solid var(--line); }
  main { padding: 1rem; }
}
'''

PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="{style}">
</head>
<body>
<nav class="sidebar">
{sidebar}
</nav>
<main>
{body}
<footer>{beside}</footer>
</main>
</body>
</html>
'''


# ---- The site ----

class Exporters:
    "A processed notebook as HTML and as Markdown."
    def __init__(self):
        config = Config(
            TagRemovePreprocessor=dict(enabled=True, remove_input_tags={'no-input'}),
            HTMLExporter=dict(preprocessors=[TagRemovePreprocessor]),
            MarkdownExporter=dict(preprocessors=[TagRemovePreprocessor]))
        self.to_html = HTMLExporter(template_name='basic', config=config, exclude_input_prompt=True,
                                    exclude_output_prompt=True, exclude_anchor_links=True)
        self.to_markdown = MarkdownExporter(config=config)

    def html(self, nb: nbformat.NotebookNode) -> BeautifulSoup:
        "The body of a page."
        soup = BeautifulSoup(self.to_html.from_notebook_node(nb)[0], 'html.parser')
        finish(soup)
        return soup

    def write_markdown(self, nb: nbformat.NotebookNode, target: Path, stem: str) -> None:
        "Write a page as Markdown, and its pictures into a folder beside it."
        markdown,resources = self.to_markdown.from_notebook_node(nb, resources={'output_files_dir': f'{stem}_files'})
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r'(\]\([^)\s:]+)\.ipynb(?=[#)])', r'\1.html.md', markdown))
        for name, data in resources['outputs'].items():
            picture = target.parent/name
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(data)


def build(processed: Path, nbs: Path, site: Path) -> list[str]:
    "Write the pages as HTML and as Markdown, with their pictures. Returns the faults."
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(processed, site, ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '_*', 'styles.css'))
    (site/'styles.css').write_text(STYLE + HtmlFormatter(style='default').get_style_defs('.highlight'))
    exporters,sidebar = Exporters(),Sidebar(nbs)
    soups: dict[str, BeautifulSoup] = {}
    documented = ApiNames()
    wrong = []
    for file in sorted(processed.rglob('*.ipynb')):
        page = file.relative_to(processed).with_suffix('.html').as_posix()
        nb = nbformat.read(file, as_version=4)
        names,empty = shown(nb)
        documented.add(names, page)
        wrong += [f'{page}: {call} shows nothing' for call in empty]
        errors = [o for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']
        wrong += [f'{page}: a cell ended in {o.ename}: {o.evalue}' for o in errors]
        nb = prepared(nb)
        soups[page] = exporters.html(nb)
        exporters.write_markdown(nb, site/f'{page}.md', file.stem)
    titles = {p: (s.h1.get_text() if s.h1 else p) for p, s in soups.items()}
    for page, soup in soups.items():
        documented.link(soup, page)
        headings = [(h['id'], h.get_text()) for h in soup.find_all('h2')]
        title = titles[page] if page == 'index.html' else f'{titles[page]} – fastai_lsuv'
        (site/page).write_text(PAGE.format(
            title=escape(title), style=relative('styles.css', page), sidebar=sidebar.html(page, titles, headings),
            body=soup, beside=sidebar.beside(page, titles)))
    wrong += [f'{p}: not in the sidebar (nbs/sidebar.yml)' for p in soups if p not in sidebar.pages]
    wrong += [f'sidebar: {p} is no page' for p in sidebar.pages if p not in soups]
    if (nbs/'api').exists():
        wrong += [f'{n}: no page shows it; add `show_doc({n})`' for n in public_names() if n not in documented.pages]
    return wrong


# ---- Links ----

def internal(link: str) -> bool:
    "Does the link stay in the site?"
    return not re.match(r'[a-z][a-z+.-]*:|//', link)


def ids(page: Path) -> set[str]:
    "The anchors of a page. GitHub makes those of a Markdown file from its headings."
    if page.suffix == '.html':
        soup = BeautifulSoup(page.read_text(), 'html.parser')
        return {e['id'] for e in soup.find_all(id=True)}
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    headings = (re.sub(r'[^\w\s-]', '', h.strip().lower()) for h in re.findall(r'^#+ (.*)$', text, re.M))
    return {re.sub(r'\s', '-', h) for h in headings}


def leads_nowhere(page: Path, link: str) -> bool:
    "Is the file or the anchor of a link of `page` missing?"
    file,_,anchor = unquote(link).partition('#')
    target = page.parent/file if file else page
    if not target.exists(): return True
    return bool(anchor) and target.suffix in ('.html', '.md') and anchor not in ids(target)


def broken_links(
    site: Path  # Folder of HTML pages, Markdown files and text files with Markdown links
) -> list[str]:
    "Links and pictures that lead to nothing."
    broken = []
    for page in sorted(site.rglob('*.html')):
        tags = BeautifulSoup(page.read_text(), 'html.parser').find_all(['a', 'img', 'link', 'script'])
        links = [t[k] for t in tags for k in ('href', 'src') if t.has_attr(k)]
        broken += [(page, link) for link in links if internal(link) and leads_nowhere(page, link)]
    for page in sorted([*site.rglob('*.html.md'), *site.glob('*.txt')]):
        links = markdown_links(page)
        broken += [(page, link) for link in links if leads_nowhere(page, link.partition('#')[0] or '.')]
    return [f'{page.relative_to(site)}: {link} leads nowhere' for page, link in broken]


def markdown_links(page: Path) -> list[str]:
    "The internal links and pictures of a Markdown file, outside its code."
    text = re.sub(r'```.*?```|`[^`\n]*`|^ {4}.*$', '', page.read_text(), flags=re.S | re.M)
    return [link for link in re.findall(r'\]\(<?([^)\s>]+)>?\)', text) if internal(link)]


def broken_in_repository(root: Path) -> list[str]:
    "Links of the repository's Markdown files that lead to nothing."
    files = [root/f for f in MARKDOWN if (root/f).exists()]
    broken = [(f, link) for f in files for link in markdown_links(f) if leads_nowhere(f, link)]
    return [f'{f.relative_to(root)}: {link} leads nowhere' for f, link in broken]


def main(
    root: Path = ROOT  # Repository: `pyproject.toml` with `[tool.nbdev]`, and `nbs/`
) -> int:  # 0 if there is no fault
    "Build the site, check it and print the faults."
    site,nbs = root/'_site',root/'nbs'
    wrong = build(Path(proc_nbs(str(nbs), force=True)), nbs, site)
    wrong += broken_links(site) + broken_in_repository(root)
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
    print(f'{len(pages)} pages in {site.name}/: {", ".join(pages)}')
    for w in wrong:
        print(f'broken: {w}')
    return 1 if wrong or not pages else 0


if __name__ == '__main__':
    sys.exit(main())
