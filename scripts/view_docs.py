"""Look at the built site in headless Chromium: `python scripts/view_docs.py [folder for pictures]`.

Each page of `_site/` is laid out in a narrow and a wide window. The script names the pages that scroll sideways, and
what sticks out. With a folder, it writes a picture of each page there. Run `build_docs.py` first. Chromium must be
installed."""
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent/'_site'
WIDTHS = 420, 1280
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome'
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--virtual-time-budget=20000']

# A page with a frame for each page and width. It writes down the width and the height that the content takes.
MEASURE = '''<!DOCTYPE html><body><script>
const sticksOut = (e, width) => e.getBoundingClientRect().right > width + 1 && !e.closest('.output_subarea, .lsuv');
const found = [];
const frames = %s.map(([page, width]) => new Promise(done => {
  const f = document.createElement('iframe');
  f.style.width = width + 'px'; f.style.height = '800px'; f.style.border = 0; f.src = page;
  f.onload = () => {
    const d = f.contentDocument, s = d.scrollingElement;
    const out = [...d.querySelectorAll('main *')].filter(e => sticksOut(e, width)).slice(0, 3);
    found.push([page, width, s.scrollWidth, s.scrollHeight, out.map(e => e.textContent.trim().slice(0, 60))]); done();
  };
  document.body.append(f);
}));
Promise.all(frames).then(() => { document.body.innerHTML = '<pre id=found>' + JSON.stringify(found) + '</pre>'; });
</script></body>'''


class Quiet(SimpleHTTPRequestHandler):
    "Serves the site, and the page that measures."
    html = b''

    def log_message(self, *args): pass

    def do_GET(self):
        if self.path != '/measure': return super().do_GET()
        self.send_response(200)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        self.wfile.write(self.html)


def chromium(*args: str) -> str:
    "What Chromium prints."
    browser = next((b for b in map(shutil.which, BROWSERS) if b), None)
    if browser is None: sys.exit('view_docs.py needs Chromium')
    return subprocess.run([browser, *FLAGS, *args], capture_output=True, text=True, timeout=300).stdout


def main() -> int:  # 0 if no page scrolls sideways
    pages = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html'))
    Quiet.html = (MEASURE % json.dumps([[p, w] for p in pages for w in WIDTHS])).encode()
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    dom = chromium('--dump-dom', f'{url}/measure')
    found = json.loads(unescape(re.search(r'<pre id="found">(.*)</pre>', dom, re.S)[1]))
    wide = [(page, width, takes, out) for page, width, takes, _, out in found if takes > width]
    for page, width, takes, out in wide:
        print(f'{page} takes {takes} pixels in a window of {width}: {out}')
    print(f'{len(found)} views of {len(pages)} pages, {len(wide)} scroll sideways')
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        for page, width, _, height, _ in found:
            picture = folder/f"{page.replace('/', '_').removesuffix('.html')}_{width}.png"
            chromium(f'--window-size={width},{height}', f'--screenshot={picture}', f'{url}/{page}')
    return int(bool(wide) or len(found) != 2*len(pages))


if __name__ == '__main__':
    sys.exit(main())
