"""Template sets and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from moviola.data.templates import SETS, SIMPLE, read_templates
from moviola.types import UsageError


def test_sets_are_what_they_say() -> None:
    assert read_templates() == read_templates("simple") == SIMPLE == ("a photo of a {}.",)
    assert len(read_templates("general")) == 20
    for templates in SETS.values():
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)


def test_given_and_from_files(tmp_path: Path) -> None:
    assert read_templates("one {}") == ("one {}",)
    assert read_templates(["one {}", "two {}"]) == ("one {}", "two {}")
    (tmp_path / "t.txt").write_text("one {}\n\n two {} \n")
    assert read_templates(tmp_path / "t.txt") == ("one {}", "two {}")
    (tmp_path / "t.json").write_text('["one {}"]')
    assert read_templates(str(tmp_path / "t.json")) == ("one {}",)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs \{\} where the class name goes, got 'two'"):
        read_templates(["one {}", "two"])
    with pytest.raises(UsageError, match="not one template"):
        read_templates([])
    with pytest.raises(UsageError, match="no set of templates and no file"):
        read_templates("opulent")
    (tmp_path / "t.json").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="must be a JSON list"):
        read_templates(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("[")
    with pytest.raises(UsageError, match="no JSON"):
        read_templates(tmp_path / "t.json")
