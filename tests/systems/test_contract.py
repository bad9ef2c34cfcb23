"""What every system of the house must satisfy: registration, example, gradients, files and pages."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moviola.clip.keys import Keys
from moviola.systems import ROOMS
from moviola.systems.registry import all_systems, entry_class, entry_module, find
from moviola.types import Claim, UsageError
from moviola.verbs.systems_page import systems_json, systems_page

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = all_systems()
LONGEST_FILE = 400


@pytest.fixture(params=SYSTEMS, ids=lambda system: system.slug)
def system(request):
    return request.param


def example(system, seed=0):
    return entry_module(system).example(seed)


def detached(outputs):
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.items()}


def test_numbers_and_slugs_are_unique():
    assert len({s.number for s in SYSTEMS}) == len({s.slug for s in SYSTEMS}) == len(SYSTEMS)
    assert [s.number for s in SYSTEMS] == sorted(s.number for s in SYSTEMS)


def test_the_line_is_the_registration(system):
    """The entry lies in the room that lists it, under the system's own name."""
    assert system.room in ROOMS
    module, _, name = system.entry.partition(":")
    assert module == f"moviola.systems.{system.room}.{system.slug.replace('-', '_')}"
    assert entry_class(system).__name__ == name
    assert system.title
    assert system.url.startswith("https://")
    assert find(system.slug) == find(system.number) == find(str(system.number)) == system


def test_the_file_says_what_it_must(system):
    module = entry_module(system)
    assert "Known differences" in module.__doc__
    assert "Axis letters" in module.__doc__
    assert is_dataclass(module.Config)
    assert module.Config.__dataclass_params__.frozen
    assert all(f.default is not f.default_factory for f in fields(module.Config)), (
        "a constant without a default"
    )
    assert isinstance(module.KEYS, Keys)
    assert len(Path(module.__file__).read_text().splitlines()) <= LONGEST_FILE


def test_has_an_oracle(system, oracles_dir):
    wanted = "00-*" if system.number == 0 else f"{system.number:02d}-{system.slug}"
    folders = list(oracles_dir.glob(wanted))
    assert folders
    assert all(any(folder.glob("*.safetensors")) and any(folder.glob("*.json")) for folder in folders)


def test_has_a_claim(system):
    claim = entry_module(system).CLAIM
    assert isinstance(claim, Claim)
    assert {claim.ours, claim.baseline} <= set(claim.arms)
    assert set(claim.cached) <= set(claim.arms) - {claim.ours}
    assert len(claim.seeds) >= 3


def test_example_gives_the_shapes_it_declares(system):
    made = example(system)
    outputs = made.run(**made.inputs)
    assert {k: tuple(v.shape) for k, v in outputs.items()} == dict(made.shapes)
    for name, value in outputs.items():
        assert value.device.type == "cpu"
        assert torch.isfinite(value).all(), name


def test_example_is_deterministic(system):
    first, second = example(system), example(system)
    a, b, again = first.run(**first.inputs), second.run(**second.inputs), first.run(**first.inputs)
    for name in first.shapes:
        assert torch.equal(a[name], b[name]), name
        assert torch.equal(a[name], again[name]), name
    other = example(system, 1)
    assert any(not torch.equal(a[name], v) for name, v in other.run(**other.inputs).items())


def test_example_does_not_touch_the_callers_randomness(system):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = example(system)
    made.run(**made.inputs)
    assert torch.equal(torch.get_rng_state(), before)


def reordered(value, order):
    if isinstance(value, Tensor):
        return value[order]
    if is_dataclass(value):  # a ClipBatch
        tensors = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{k: reordered(v, order) for k, v in tensors.items() if v is not None})
    return [value[i] for i in order.tolist()]


def test_rows_of_a_batch_do_not_see_each_other(system):
    """Reordering the batch reorders the outputs; taking a part of it gives that part."""
    made = example(system)
    inputs = [name for name in made.inputs if name in made.batched]
    outputs = [name for name in made.shapes if name in made.batched]
    if not made.batched:
        pytest.skip("the example names nothing batched")
    assert inputs
    assert outputs
    count = made.shapes[outputs[0]][0]
    whole = detached(made.run(**made.inputs))
    for order in (torch.arange(count - 1, -1, -1), torch.arange(count - 1)):
        part = made.run(**{k: reordered(v, order) if k in inputs else v for k, v in made.inputs.items()})
        for name in outputs:
            torch.testing.assert_close(part[name].detach(), whole[name][order], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter(system):
    made = example(system)
    if made.loss is None:
        pytest.skip("nothing trains")
    made.run(**made.inputs)[made.loss].backward()
    trained = {k: p for k, p in made.module.named_parameters() if p.requires_grad}
    assert trained
    missing = [k for k, p in trained.items() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    moved = [k for k, p in trained.items() if p.grad.abs().max() > 0]
    assert len(moved) > 0.9 * len(trained), sorted(set(trained) - set(moved))


def test_weights_survive_a_round_trip_through_safetensors(system, tmp_path):
    made = example(system)
    if made.module is None:
        pytest.skip("no weights")
    save_file(made.module.state_dict(), tmp_path / "weights.safetensors")
    other = example(system, 1)
    other.module.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    wanted, got = made.run(**made.inputs), other.run(**made.inputs)
    for name in made.shapes:
        assert torch.equal(wanted[name], got[name]), name


def test_keys_there_and_back(system):
    made = example(system)
    if made.module is None:
        pytest.skip("no weights")
    keys, state = entry_module(system).KEYS, made.module.state_dict()
    back = keys.from_official(keys.to_official(state))
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_builds_from_the_json_of_its_configuration(system):
    """What `load` does with a model folder; plain CLIP has a loader of its own."""
    cls = entry_class(system)
    if hasattr(cls, "from_base"):
        pytest.skip("built on its base: tests/verbs/test_adapt_systems.py")
    if not hasattr(cls, "from_config"):
        assert system.number == 0 or not isinstance(example(system).module, cls)
        pytest.skip("no model folder of its own")
    config = example(system).module.config
    module = cls.from_config(json.loads(json.dumps(config.to_json())))
    assert isinstance(module, nn.Module)
    assert module.config == config


def test_lists_and_types_import_no_torch():
    code = (
        "import sys; from moviola.systems.registry import all_systems, find; all_systems(); find('xpool');"
        "heavy = {'torch', 'av', 'lancedb', 'pyarrow', 'transformers', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UsageError, match="Did you mean xpool"):
        find("x-pool")
    with pytest.raises(UsageError, match="moviola systems"):
        find("999")


def test_every_room_is_listed_and_nothing_else():
    folder = ROOT / "src" / "moviola" / "systems"
    assert {p.parent.name for p in folder.glob("*/__init__.py")} == set(ROOMS)


def test_every_file_in_a_room_is_registered():
    entries = {s.entry.partition(":")[0] for s in SYSTEMS}
    for room in ROOMS:
        for path in (ROOT / "src" / "moviola" / "systems" / room).glob("*.py"):
            assert path.stem == "__init__" or f"moviola.systems.{room}.{path.stem}" in entries, path


def test_the_committed_page_is_current():
    page = ROOT / "docs" / "systems.md"
    assert page.read_text() == systems_page(), "run: python -m moviola.verbs.systems_page docs/systems.md"


def test_the_json_table():
    rows = systems_json()["systems"]
    assert [row["number"] for row in rows] == [s.number for s in SYSTEMS]
    assert all(set(row) == {"number", "name", "room", "title", "call"} for row in rows)
