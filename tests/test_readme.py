"""The README's example prints what stands below it, the pages' commands are understood, and links lead somewhere."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from timm_msar_command import main

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'train_configs' / 'README.md']


def test_commands_are_understood():
    blocks = re.findall(r'```bash\n(.*?)```', ''.join(page.read_text(encoding='utf-8') for page in PAGES), re.S)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith('timm-msar ')]
    assert len(found) >= 12
    for _, name, *words in found:
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f'timm_msar.cli.{name}').add_arguments(parser)
        parser.parse_args(words)


def test_the_example_prints_what_the_readme_shows(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, printed = re.search(r'```python\n(.*?)```\n```\n(.*?)```', README, re.S).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
    assert main(['predict', 'docs/sneaker.png', '--model', 'cifar_resnet20_msar']) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:4]] == [
        line.split(maxsplit=1) for line in printed.splitlines()
    ]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', page.read_text(encoding='utf-8')):
        assert (page.parent / target).exists(), target
