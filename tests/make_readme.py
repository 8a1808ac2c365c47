"""README.md from nbs/index.ipynb: `python tests/make_readme.py`. Markdown as it is, code fenced,
saved outputs as they were, hidden cells left out, links as seen from the top of the tree."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def as_on_github(link):
    "The heading `Make it, or not` is #Make-it,-or-not in JupyterLab and #make-it-or-not on GitHub."
    return '](#' + re.sub(r'[^\w-]', '', link[1].lower()) + ')'

def relink(markdown):
    "Links between notebooks lead into nbs/; links out of nbs/ lose their dots."
    inside = re.sub(r'\]\((?!http|\.\./|#)', '](nbs/', markdown)
    return re.sub(r'\]\(#([^)]+)\)', as_on_github, inside.replace('](../', ']('))

def readme():
    "The text that README.md must have."
    parts = []
    for cell in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(relink(source))
            continue
        if source.startswith('#| hide'): continue
        if not source.startswith('#| echo: false'):
            lines = [line for line in source.splitlines() if not line.startswith('#|')]
            parts.append('```python\n' + '\n'.join(lines) + '\n```')
        for output in cell['outputs']:
            if 'text/markdown' in output.get('data', {}):
                parts.append(relink(''.join(output['data']['text/markdown'])))
    return '\n\n'.join(parts).rstrip() + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme())
