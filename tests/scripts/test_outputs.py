"""What a script writes replaces regular files alone, and it says so before the work."""

import os
import stat
import sys
from pathlib import Path

import pytest

from weft.runtime.errors import UserError, shown
from weft.scripts import convert, decode, plan, prove, score

# Of each output option what else is given. Neither run, config nor case exists: whoever reads them first answers of them.
OPTIONS = {
    ('score', '--logits'): ['runs/none', '--tokens', 'none.npy'],
    ('score', '--embeddings'): ['runs/none', '--texts', 'none.txt'],
    ('decode', '--out'): ['runs/none', '--prompt', 'x'],
    ('plan', '--html'): ['none.yaml', '--chip', 'h100', '--chips', '8'],
    ('prove', '--page'): ['--only', 'none'],
    ('prove', '--results'): ['--only', 'none', '--page', 'page.md'],
}
SCRIPTS = {'score': score, 'decode': decode, 'plan': plan, 'prove': prove}
KINDS = ('device', 'fifo', 'link', 'dangling link', 'folder', 'link to a folder', 'half of it is a link')


def made(folder: Path, kind: str) -> Path:
    """Something of this kind that has the name of a result."""
    path, other = folder / 'result', folder / 'other'
    other.write_text('precious')
    if kind == 'device':
        if os.geteuid():
            return Path('/dev/null')
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'half of it is a link':
        (folder / 'result.partial').symlink_to(other)
    else:
        path.symlink_to({'link': other, 'dangling link': folder / 'nowhere', 'link to a folder': folder}[kind])
    return path


def refused(monkeypatch, folder: Path, option: tuple[str, str], path: Path | str) -> str:
    """What a script says of a result that is to go there."""
    monkeypatch.chdir(folder)
    script, flag = option
    monkeypatch.setattr(sys, 'argv', [script, *OPTIONS[option], flag, str(path)])
    with pytest.raises(UserError) as error:
        SCRIPTS[script].main()
    assert str(error.value).startswith(f'{flag} {shown(str(path))}')
    return str(error.value)


@pytest.mark.parametrize('option', OPTIONS, ids=' '.join)
def test_only_regular_files_are_replaced_and_what_else_has_the_name_is_told_before_the_work(
    tmp_path, monkeypatch, option
):
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = made(folder, kind)
        before = {one: one.lstat()[:8] for one in (*folder.iterdir(), path) if os.path.lexists(one)}
        said = refused(monkeypatch, folder, option, path)
        assert said.endswith(
            'is a folder; name a file in it' if kind == 'folder' else 'is there and is no regular file; name another'
        )
        after = {one: one.lstat()[:8] for one in (*folder.iterdir(), path) if os.path.lexists(one)}
        assert after == before
        assert (folder / 'other').read_text() == 'precious'


@pytest.mark.parametrize('option', OPTIONS, ids=' '.join)
def test_a_result_without_a_folder_to_write_in_is_told_before_the_work(tmp_path, monkeypatch, option):
    assert refused(monkeypatch, tmp_path, option, 'no/result').endswith('there is no folder no')
    (tmp_path / 'file').write_text('')
    assert refused(monkeypatch, tmp_path, option, 'file/result').endswith('file is no folder')
    assert 'name too long' in refused(monkeypatch, tmp_path, option, 'x' * 300)
    # The user of these tests may be one whom nothing is forbidden.
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    assert refused(monkeypatch, tmp_path, option, 'result').endswith('Permission denied: .')


@pytest.mark.parametrize(
    ('option', 'read'),
    [(('score', '--logits'), 1), (('score', '--embeddings'), 1), (('plan', '--html'), -5), (('prove', '--page'), None)],
    ids=str,
)
def test_a_result_does_not_replace_what_it_is_made_of(tmp_path, monkeypatch, option, read):
    monkeypatch.chdir(tmp_path)
    given = OPTIONS[option]
    name = '.cache/proof.jsonl' if read is None else given[2] if read == 1 else given[0]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text('precious')
    assert refused(monkeypatch, tmp_path, option, name).endswith('is what is read: name another file')
    os.link(name, 'same')
    assert refused(monkeypatch, tmp_path, option, 'same').endswith('is what is read: name another file')
    assert Path(name).read_text() == 'precious'


def test_answers_do_not_replace_their_questions(tmp_path, monkeypatch):
    questions = tmp_path / 'q.jsonl'
    questions.write_text('{"prompt": "x"}\n')
    for flag in ('--prompts-file', '--chat'):
        monkeypatch.setattr(sys, 'argv', ['decode', 'runs/none', flag, str(questions), '--out', str(questions)])
        with pytest.raises(UserError, match='is what is read: name another file'):
            decode.main()


@pytest.mark.parametrize('way', [['import', 'none'], ['export', 'runs/none']], ids=lambda way: way[0])
def test_a_folder_of_results_replaces_nothing_and_says_so_before_anything_is_read(tmp_path, monkeypatch, way):
    for number, kind in enumerate(KINDS[:-1]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = made(folder, kind)
        before = path.lstat()[:8]
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, 'argv', ['convert', *way, str(path)])
        with pytest.raises(UserError, match='exists already, and nothing is overwritten'):
            convert.main()
        assert path.lstat()[:8] == before
        assert (folder / 'other').read_text() == 'precious'
