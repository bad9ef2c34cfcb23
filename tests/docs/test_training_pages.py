"""The Python in the training pages runs as it stands, in a folder that holds `pairs.parquet`."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import moviola
from moviola.data.world import picture

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [DOCS / "training.md", *sorted((DOCS / "pretraining").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for n in range(40):
        scene, data = picture(0, n, size=64), io.BytesIO()
        Image.fromarray(scene.pixels_HWC).save(data, "JPEG", quality=95)
        caption = scene.captions[0]
        rows.append(
            {
                "id": f"p{n}",
                "image": data.getvalue(),
                "caption": caption,
                "synthetic_caption": f"a made picture of {caption}" if n % 5 else None,
                "caption_pt": caption[::-1],
                "boxes": [[4.0, 4.0, 40.0, 40.0]],
                "regions": [caption],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), "pairs.parquet")
    found = blocks(page)
    assert found, "the page has no Python"
    names: dict[str, object] = {"moviola": moviola}
    for number, block in enumerate(found):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_every_option_named_in_the_pages_is_there():
    """Command lines in any page use options that the commands have."""
    from typer.main import get_command

    from moviola.cli.commands import app

    commands = get_command(app).commands

    def flags(command):
        return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}

    known = {
        name: flags(commands[name])
        for name in ("reinforce", "adapt", "audit", "match", "classify", "evaluate")
    }
    train = commands["train"].commands
    known |= {"train": flags(train["pairs"]), "recognition": flags(train["recognition"]) | {"--task"}}
    for page in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = page.read_text().replace("\\\n", " ")
        for name, rest in re.findall(rf"moviola ({'|'.join(known)}) ([^\n#`]*)", text):
            name = "recognition" if "--task recognition" in rest and name == "train" else name
            used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
            assert used <= known[name] | {"--help"}, f"{page.name}: {sorted(used - known[name])}"
