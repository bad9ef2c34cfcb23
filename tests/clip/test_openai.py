"""OpenAI's `.pt` files, and everything a stranger's file may try instead."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moviola.clip import weights
from moviola.clip.config import ClipConfig, rn50, vit_b_16, vit_b_32, vit_l_14
from moviola.clip.formats import detect
from moviola.clip.formats.openai import infer_config
from moviola.clip.loaded import Model, load
from moviola.clip.model import CLIP
from moviola.clip.weights import is_torchscript, read_weights
from moviola.types import CheckpointError

Make = Callable[..., Model]


class Released(nn.Module):
    """A scriptable module whose tensors lie under a CLIP's names, with OpenAI's three extra integers.

    Its forward pass is beside the point: the reader must find the tensors without running anything.
    """

    def __init__(self, state: dict[str, torch.Tensor], config: ClipConfig | None = None) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            if tensor.is_floating_point():
                owner.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
            else:
                owner.register_buffer(last, tensor.clone())
        if config is not None:
            self.register_buffer("input_resolution", torch.tensor(config.vision.image_size))
            self.register_buffer("context_length", torch.tensor(config.text.context_length))
            self.register_buffer("vocab_size", torch.tensor(config.text.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale


def script(model: Model, path: Path, *, half: bool = False) -> Path:
    state = model.module.state_dict()
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    module = Released(state, ClipConfig.from_json(model.config)).eval()
    torch.jit.save(torch.jit.trace(module, torch.zeros(1)), path)  # type: ignore[no-untyped-call]
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("how", ["script", "traced", "half"])
def test_torchscript_archives(
    kind: str,
    how: str,
    make_model: Make,
    toy_tokenizer: object,
    tmp_path: Path,
    pictures: list[Image.Image],
    texts: list[str],
) -> None:
    model = make_model(kind)
    if how == "script":
        path = tmp_path / "model.pt"
        module = Released(model.module.state_dict(), ClipConfig.from_json(model.config))
        torch.jit.save(torch.jit.script(module), path)  # type: ignore[no-untyped-call]
    else:
        path = script(model, tmp_path / "model.pt", half=how == "half")
    assert is_torchscript(path)
    assert detect(path) == "openai"
    ours = load(path, device="cpu", tokenizer=toy_tokenizer)  # type: ignore[arg-type]
    assert {p.dtype for p in ours.module.parameters()} == {torch.float32}
    assert ours.config == model.config
    assert ours.recipe == model.recipe
    if how == "half":
        assert (ours.embed_texts(texts) * model.embed_texts(texts)).sum(1).min() > 0.999
    else:
        assert ours.hash == model.hash
        np.testing.assert_array_equal(ours.embed_pictures(pictures), model.embed_pictures(pictures))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_real_clip_traced_whole(make_model: Make, toy_tokenizer: object, tmp_path: Path) -> None:
    """As OpenAI made theirs: the whole model traced, with shared and nested modules."""
    model = make_model()
    tokens = torch.from_numpy(model.tokenizer(["a cat"]))  # type: ignore[misc]
    with torch.no_grad():
        traced = torch.jit.trace(model.module, (torch.zeros(1, 3, 32, 32), tokens), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, tmp_path / "clip.pt")  # type: ignore[no-untyped-call]
    with pytest.warns(UserWarning, match="QuickGELU is assumed"):
        ours = load(tmp_path / "clip.pt", device="cpu", tokenizer=toy_tokenizer)  # type: ignore[arg-type]
    assert ours.hash == model.hash


@pytest.mark.parametrize("how", ["zip", "legacy", "wrapped", "marked"])
def test_plain_state_dicts(how: str, make_model: Make, toy_tokenizer: object, tmp_path: Path) -> None:
    model, path = make_model("vit"), tmp_path / "model.pt"
    state: dict = dict(model.module.state_dict())
    if how == "marked":
        state |= {
            "input_resolution": torch.tensor(32),
            "context_length": torch.tensor(24),
            "vocab_size": torch.tensor(620),
        }
    if how == "wrapped":
        state = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, path, _use_new_zipfile_serialization=how != "legacy")
    if how == "marked":
        ours = load(path, device="cpu", tokenizer=toy_tokenizer)  # type: ignore[arg-type]
    else:
        with pytest.warns(UserWarning, match=r"QuickGELU is assumed.*open_clip_config\.json"):
            ours = load(path, device="cpu", tokenizer=toy_tokenizer)  # type: ignore[arg-type]
    assert ours.hash == model.hash
    assert ours.format == "openai"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_without_tokenizer_pictures_work_and_words_ask_for_one(
    make_model: Make, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    ours = load(script(make_model(), tmp_path / "model.pt"), device="cpu")
    assert ours.embed_pictures(pictures).shape == (3, 24)
    with pytest.raises(CheckpointError, match=r"tokenizer=PATH.*bpe_simple_vocab_16e6\.txt\.gz"):
        ours.embed_texts("a cat")


# --------------------------------------------------------------------------------------------------
# Paper sizes by their names and shapes
# --------------------------------------------------------------------------------------------------


def block_names(prefix: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {}
    for n in range(layers):
        at = f"{prefix}transformer.resblocks.{n}."
        names |= {
            f"{at}attn.in_proj_weight": (3 * width, width),
            f"{at}attn.in_proj_bias": (3 * width,),
            f"{at}attn.out_proj.weight": (width, width),
            f"{at}attn.out_proj.bias": (width,),
            f"{at}mlp.c_fc.weight": (4 * width, width),
            f"{at}mlp.c_fc.bias": (4 * width,),
            f"{at}mlp.c_proj.weight": (width, 4 * width),
            f"{at}mlp.c_proj.bias": (width,),
        }
        for norm in ("ln_1", "ln_2"):
            names |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
    return names


def text_names(width: int, embed: int) -> dict[str, tuple[int, ...]]:
    return {
        "positional_embedding": (77, width),
        "text_projection": (width, embed),
        "logit_scale": (),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        **block_names("", width, 12),
    }


def vit_names(width: int, layers: int, patch: int, grid: int, embed: int) -> dict[str, tuple[int, ...]]:
    norms = {f"visual.{n}.{p}": (width,) for n in ("ln_pre", "ln_post") for p in ("weight", "bias")}
    return {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid * grid + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        **norms,
        **block_names("visual.", width, layers),
    }


def rn50_names() -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {}

    def norm(at: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{at}.{part}"] = (width,)
        names[f"{at}.num_batches_tracked"] = ()

    for n, (given, width) in enumerate(((3, 32), (32, 32), (32, 64)), 1):
        names[f"visual.conv{n}.weight"] = (width, given, 3, 3)
        norm(f"visual.bn{n}", width)
    given = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            at = f"visual.layer{stage + 1}.{block}"
            shapes = ((width, given, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            for n, shape in enumerate(shapes, 1):
                names[f"{at}.conv{n}.weight"] = shape
                norm(f"{at}.bn{n}", shape[0])
            if block == 0:
                names[f"{at}.downsample.0.weight"] = (4 * width, given, 1, 1)
                norm(f"{at}.downsample.1", 4 * width)
            given = 4 * width
    names["visual.attnpool.positional_embedding"] = (50, 2048)
    for part, out in (("q", 2048), ("k", 2048), ("v", 2048), ("c", 1024)):
        names[f"visual.attnpool.{part}_proj.weight"] = (out, 2048)
        names[f"visual.attnpool.{part}_proj.bias"] = (out,)
    return names


@pytest.mark.parametrize(
    ("config", "names", "count"),
    [
        (vit_b_32(), vit_names(768, 12, 32, 7, 512) | text_names(512, 512), 302),
        (vit_b_16(), vit_names(768, 12, 16, 14, 512) | text_names(512, 512), 302),
        (vit_l_14(), vit_names(1024, 24, 14, 16, 768) | text_names(768, 768), 446),
        (rn50(), rn50_names() | text_names(512, 1024), None),
    ],
)
def test_paper_sizes_have_the_released_names_and_shapes(
    config: ClipConfig, names: dict[str, tuple[int, ...]], count: int | None
) -> None:
    with torch.device("meta"):
        module = CLIP(config)
    state = module.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == names
    if count is not None:
        assert len(state) == count
    assert infer_config(state, source="x") == config


# --------------------------------------------------------------------------------------------------
# Hostile and damaged files
# --------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled: proof that a loader ran a stranger's code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.target}'",)


def hostile_zip(path: Path, payload: object, *, scripted: bool) -> None:
    data = pickle.dumps(payload, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", b"\0" * 16)
        if scripted:
            archive.writestr("archive/constants.pkl", data)
            archive.writestr("archive/code/__torch__.py", "import os\n")


@pytest.mark.parametrize("where", ["plain pickle", "torch zip", "legacy torch", "torchscript", "nested"])
@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "open_clip_pytorch_model.bin", "shard"])
def test_a_hostile_pickle_is_refused_and_never_run(where: str, name: str, tmp_path: Path) -> None:
    proof, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    payload: object = Payload(proof)
    if where == "nested":
        payload = {"visual.proj": [payload]}
    path = folder / ("part.bin" if name == "shard" else name)
    if where in ("torch zip", "torchscript"):
        hostile_zip(path, payload, scripted=where == "torchscript")
    elif where == "legacy torch":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    source = path
    if name != "model.pt":
        source = folder
        (folder / "config.json").write_text('{"model_type": "clip"}')
    if name == "open_clip_pytorch_model.bin":
        (folder / "open_clip_config.json").write_text(
            '{"embed_dim": 8, "vision_cfg": {"patch_size": 8}, "text_cfg": {}}'
        )
    if name == "shard":
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"logit_scale": "part.bin"}}')
    with pytest.raises(CheckpointError, match=r"not run|was run"):
        load(source)
    assert not proof.exists()
    if where == "plain pickle":  # the payload does work where code is run
        pickle.loads(path.read_bytes())  # noqa: S301
        assert proof.exists()


@pytest.mark.parametrize(
    "call", ["builtins.eval", "os.system", "torch.load", "torch.hub.load", "torch._utils._rebuild_parameter"]
)
def test_torchscript_names_outside_the_list_are_refused(call: str, tmp_path: Path) -> None:
    module, _, name = call.rpartition(".")
    path = tmp_path / "x.pt"
    hostile_zip(path, {}, scripted=True)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants2", b"")
    body = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/constants.pkl", body)
    with pytest.raises(CheckpointError, match=f"asks for {call}"):
        read_weights(path)


@pytest.fixture
def archive(make_model: Make, tmp_path: Path) -> Path:
    return script(make_model(), tmp_path / "good.pt")


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            made = change(info.filename, old.read(info))
            if made is not None:
                new.writestr(*made)
    return target


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_entries_that_leave_the_archive_are_ignored(archive: Path, tmp_path: Path, make_model: Make) -> None:
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr("../../escaped.txt", "x")
        zipped.writestr("/absolute.txt", "x")
    assert load(archive, device="cpu").hash == make_model().hash
    assert not (tmp_path.parent / "escaped.txt").exists()
    assert not (tmp_path / "escaped.txt").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_damaged_archives_say_so(archive: Path, tmp_path: Path) -> None:
    root = zipfile.ZipFile(archive).namelist()[0].split("/")[0]
    bad = tmp_path / "bad.pt"
    whole = archive.read_bytes()
    for content in (b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n", whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match="neither a zip nor a pickle"):
            load(bad)
    bad.write_bytes(b"\x80\x02" + bytes(range(40)))
    with pytest.raises(CheckpointError, match="not open as plain tensors"):
        load(bad)

    def shorter(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data[:-4] if name == f"{root}/data/0" else data

    def without(name: str, data: bytes) -> tuple[str, bytes] | None:
        return None if name == f"{root}/data/1" else (name, data)

    def big_endian(name: str, data: bytes) -> tuple[str, bytes]:
        return name, b"big" if name.endswith("byteorder") else data

    for change, message in (
        (shorter, "storage"),
        (without, "storage '1' is not there"),
        (big_endian, "big-endian"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(rewrite(archive, bad, change))


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], offset: int, count: int) -> bytes:
    """A scripted module `m` with one tensor, spelled by hand so that it can lie."""

    class Write(pickle.Pickler):
        def persistent_id(self, value: object) -> tuple | None:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if value is storage else None

    storage = object()

    class Lie:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    out = io.BytesIO()
    Write(out, protocol=2).dump({"w": Lie()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset", "count"),
    [
        ((4,), (1,), 1, 4),
        ((100,), (1,), 0, 4),
        ((2, 2), (4, 1), 0, 4),
        ((10**6, 10**6), (0, 0), 0, 4),
        ((4,), (1,), -1, 4),
        ((-1,), (1,), 0, 4),
        ((4,), (1, 1), 0, 4),
        ((4,), (1,), 0, 10**12),
    ],
)
def test_tensors_that_lie_about_their_size_are_refused(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, count: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/data.pkl", tensor_pickle(size, stride, offset, count))
        zipped.writestr("a/constants.pkl", b"")
        zipped.writestr("a/data/0", b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"described wrongly|out of its storage|not there with"):
        read_weights(path)


def test_an_archive_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SLACK", 1 << 16)
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a/data.pkl", b"\x80\x02}.")
        zipped.writestr("a/constants.pkl", b"")
        with zipped.open("a/data/0", "w", force_zip64=True) as file:
            for _ in range(2):
                file.write(bytes(1 << 20))
    for scripted in (True, False):
        if not scripted:
            path = rewrite_deflated(path, tmp_path / "plain.pt")
        with pytest.raises(CheckpointError, match="would unpack to"):
            load(path)


def rewrite_deflated(source: Path, target: Path) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            if not info.filename.endswith("constants.pkl"):
                new.writestr(info.filename, old.read(info))
    return target


def test_files_that_are_not_clip_say_so(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    for data, message in (
        (
            {"fc.weight": torch.zeros(2)},
            r"not a CLIP of OpenAI's layout: it lacks text_projection.*fc\.weight",
        ),
        ([torch.zeros(2)], "holds no state dict, but a list"),
        ({"a": torch.zeros(1), "lr": 0.1}, "1 entries are no tensors, first lr"),
        ({}, "holds no state dict"),
    ):
        torch.save(data, path)
        with pytest.raises(CheckpointError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.onnx", "an ONNX file"),
        ("m.gguf", "a GGUF file"),
        ("m.pkl", "a pickle, which could run code"),
        ("flax_model.msgpack", "Flax weights"),
        ("model.safetensors", "Give the folder"),
        ("config.json", "Give its folder"),
    ],
)
def test_other_kinds_of_files_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"expected moviola\.json, config\.json or open_clip_config\.json, found nothing"),
        (["a.txt", "b.txt"], r"found a\.txt, b\.txt"),
        (["adapter_config.json"], "PEFT adapter"),
        (["modules.json"], "0_CLIPModel"),
        (["model.onnx"], r"an ONNX file \(model\.onnx\)"),
        (["ViT-B-32.pt"], r"Give the file itself: .*ViT-B-32\.pt"),
    ],
)
def test_folders_that_are_no_model_say_what_they_hold(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_shards_outside_their_folder_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside its folder"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no weights at"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_weights(index)
