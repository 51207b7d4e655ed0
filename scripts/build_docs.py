"Build the documentation to HTML without Quarto: `nbs/`, as nbdev processes it, into `_site/`. Fails on a broken internal link."
import re
import shutil
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent


def broken_links(site: Path) -> list[str]:
    "Links and pictures of the pages that lead to nothing."
    ids = {p.name: set(re.findall(r'\bid="([^"]+)"', p.read_text())) for p in site.glob('*.html')}
    broken = []
    for page in site.glob('*.html'):
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            if re.match(r'[a-z]+:', link) or link.startswith('//'): continue
            file,_,anchor = link.partition('#')
            file = file or page.name
            if not (site/file).exists() or (anchor and anchor not in ids.get(file, ())): broken.append(f'{page.name}: {link}')
    return broken


def titled(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "`nb` with the front matter that nbdev makes of its title and summary turned back into a heading."
    for cell in nb.cells:
        if cell.cell_type != 'raw' or not cell.source.startswith('---'): continue
        meta = yaml.safe_load(cell.source.strip('-\n'))
        cell.update(nbformat.v4.new_markdown_cell(f"# {meta.get('title', '')}\n\n> {meta.get('description', '')}"))
    return nb


def main() -> int:
    site = ROOT/'_site'
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir()
    processed = Path(proc_nbs())
    for nb in sorted(processed.glob('*.ipynb')):
        page,_ = HTMLExporter(template_name='lab').from_notebook_node(titled(nbformat.read(nb, as_version=4)))
        (site/f'{nb.stem}.html').write_text(re.sub(r'href="([\w-]+)\.ipynb', r'href="\1.html', page))
    if (processed/'images').exists(): shutil.copytree(processed/'images', site/'images')
    pages = sorted(p.name for p in site.glob('*.html'))
    broken = broken_links(site)
    print(f'{len(pages)} pages in {site.name}/: {", ".join(pages)}')
    for b in broken: print(f'broken link in {b}')
    return 1 if broken or not pages else 0


if __name__ == '__main__': sys.exit(main())
