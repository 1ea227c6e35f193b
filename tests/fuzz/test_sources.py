"""The first odd texts, folders and configs of seed 0."""

from pathlib import Path

from tests.fuzz import sources


def test_odd_texts_folders_and_configs_are_read_right_or_refused_in_one_line(tmp_path: Path) -> None:
    found, kinds = [], set()
    for case in sources.cases(0, sources.QUICK):
        scratch = tmp_path / str(case.number)
        scratch.mkdir()
        kinds.add(case.name)
        if wrong := sources.check(case, scratch):
            found.append(f'{case.number} ({case.name}): {wrong}')
    assert not found
    assert kinds == {'texts', 'pairs', 'prompts', 'folder', 'config', 'overrides'}
