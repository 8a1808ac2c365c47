"README.md from nbs/index.ipynb: `python tests/make_readme.py`. Markdown as it is, code fenced, saved outputs as they were, hidden cells left out."
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def readme():
    "The text that README.md must have."
    out = []
    for c in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']:
        src = ''.join(c['source'])
        if src.startswith('#| hide'): continue
        if c['cell_type'] == 'markdown': out.append(src); continue
        if not src.startswith('#| echo: false'): out.append('```python\n' + '\n'.join(l for l in src.splitlines() if not l.startswith('#|')) + '\n```')
        out += [''.join(o['data']['text/markdown']) for o in c['outputs'] if 'text/markdown' in o.get('data', {})]
    return '\n\n'.join(out).replace('](../', '](').rstrip() + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme())
