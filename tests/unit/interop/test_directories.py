"""A directory from which no model can be read: one line says what is in it and what to do, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.interop import import_checkpoint
from tests.unit.interop.hf_models import KINDS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama: `one`, a single file of weights; `many`, several and their index."""
    path = tmp_path_factory.mktemp("saved")
    KINDS["Llama"].build().save_pretrained(path / "one")
    KINDS["Llama"].build().save_pretrained(path / "many", max_shard_size="30KB")
    return path


def _renamed(name: str, *, config: bool = True) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / name)
        if not config:
            (folder / "config.json").unlink()

    return change


def _tensors(rename: Callable[[str], str]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)

    return change


def _base_model(folder: Path) -> None:
    """As `LlamaModel` saves itself, whatever its config.json says since."""
    shutil.rmtree(folder)
    model = KINDS["Llama"].build().model
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "architectures": ["LlamaForCausalLM"]}))


def _adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    peft.LoraConfig(target_modules=["q_proj"], r=2).save_pretrained(str(folder))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 32)}, folder / "adapter_model.safetensors")


def _adapter_with_config(folder: Path) -> None:
    content = (folder / "config.json").read_text()
    _adapter(folder)
    (folder / "config.json").write_text(content)


def _link(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.symlink(folder / "blobs" / "0", folder / WEIGHTS)


def _cache(folder: Path) -> None:
    shutil.move(folder, folder.with_name("moved"))
    shutil.copytree(folder.with_name("moved"), folder / "snapshots" / "a1b2")
    shutil.rmtree(folder.with_name("moved"))


def _pointer(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(POINTER)


def _quantized(content: dict[str, Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": content}))

    return change


DIRECTORIES: dict[str, Callable[[Path], Any]] = {
    r"no config.json in it; it holds model-q4.gguf: a model in the format of llama.cpp; .*give the path": _renamed(
        "model-q4.gguf", config=False
    ),
    r"neither .* in it; it holds model-q4.gguf: a model in the format of llama.cpp": _renamed(
        "model-q4.gguf"
    ),
    r"no config.json in it; it holds consolidated.safetensors: a model in its publisher's own format": _renamed(
        "consolidated.safetensors", config=False
    ),
    r"it holds consolidated.00.pth: a model in Meta's format": _renamed("consolidated.00.pth"),
    r"it holds model.fp16.safetensors: weights of a variant such as fp16, which are not read; .*rename": _renamed(
        "model.fp16.safetensors"
    ),
    r"it holds pytorch_model.bin: pickled weights, which are not read; .*save_pretrained": _renamed(
        "pytorch_model.bin"
    ),
    r"it holds tf_model.h5: TensorFlow weights": _renamed("tf_model.h5"),
    r"it holds my-model.safetensors: weights under another name; rename": _renamed("my-model.safetensors"),
    r"no config.json in it; it holds adapter_config.json: a peft adapter, .*merge_and_unload": _adapter,
    r"neither .* in it; it holds adapter_config.json: a peft adapter": _adapter_with_config,
    r"no config.json in it; it is a cache of the Hugging Face hub; the model is in .*snapshots/a1b2": _cache,
    r"all tensor names begin with 'language_model.', so the language model is part of a larger model": _tensors(
        lambda name: f"language_model.{name}"
    ),
    r"all tensor names begin with 'model.language_model.', so": _tensors(
        lambda name: f"model.language_model.{name}"
    ),
    r"the tensor names lack the prefix 'model.', so the model was saved without its head": _base_model,
    r"quantized \(GPTQ or AWQ: tensors ....qweight\) and cannot be imported; save them dequantized": _tensors(
        lambda name: name.replace("q_proj.weight", "q_proj.qweight")
    ),
    r"quantization_config .*: awq weights cannot be imported; save them dequantized": _quantized(
        {"quant_method": "awq", "bits": 4}
    ),
    r"quantization_config .*: bitsandbytes weights cannot be imported": _quantized(
        {"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    r"model.safetensors: is a git-lfs pointer, not the file itself; fetch the content with `git lfs pull`": _pointer(
        WEIGHTS
    ),
    r"tokenizer.json: is a git-lfs pointer": _pointer("tokenizer.json"),
    r"tokenizer.model: is a git-lfs pointer": _pointer("tokenizer.model"),
    r"model.safetensors is a link to a missing file": _link,
}


@pytest.mark.parametrize("message", DIRECTORIES)
def test_what_a_directory_holds_is_named_with_what_to_do_and_nothing_is_left(
    message: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved / "one", folder)
    DIRECTORIES[message](folder)
    with pytest.raises((ValueError, OSError), match=f"{folder}.*{message}") as caught:
        import_checkpoint(folder, tmp_path / "out" / "ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_shards_and_pointers_among_them_are_told(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved / "many", folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].write_text(POINTER)
    with pytest.raises(ValueError, match=f"{shards[1].name}: is a git-lfs pointer"):
        import_checkpoint(folder, tmp_path / "out")
    shards[1].unlink()
    shards[2].unlink()
    expected = (
        f"{shards[1].name} is missing .in all, 2 of the {len(shards)} files listed in {INDEX} are missing.; "
        "copy the whole directory"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        import_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _index(change: Callable[[dict[str, str], list[str]], Any]) -> Callable[[Path], Any]:
    """Changes the index's map of tensors to files; `change` also gets the names of the files."""

    def rewrite(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"], sorted(set(content["weight_map"].values())))
        (folder / INDEX).write_text(json.dumps(content))

    return rewrite


NORM = "model.norm.weight"


def _without_norm(folder: Path) -> None:
    """Neither the index nor its file has the tensor."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    save_file({name: tensor for name, tensor in load_file(file).items() if name != NORM}, file)
    _index(lambda found, _: found.pop(NORM))(folder)


def _with_another(folder: Path) -> None:
    """Index and file have a tensor that is not the model's."""
    save_file({"model.other.weight": torch.ones(2)}, folder / "model-other.safetensors")
    _index(lambda found, _: found.update({"model.other.weight": "model-other.safetensors"}))(folder)


INDICES: dict[str, Callable[[Path], Any]] = {
    rf"{INDEX}: {NORM} is in model-.*safetensors, but the index does not list it": _index(
        lambda found, _: found.pop(NORM)
    ),
    rf"{INDEX}: model.extra is in no file, but the index says model-00001-": _index(
        lambda found, files: found.update({"model.extra": files[0]})
    ),
    rf"{INDEX}: {NORM} is in model-.*, but the index says model-00001-": _index(
        lambda found, files: found.update({NORM: files[0]})
    ),
    rf"{NORM} is missing from its tensors": _without_norm,
    "model.other.weight is not part of the model in config.json": _with_another,
}


@pytest.mark.parametrize("message", INDICES)
def test_an_index_that_does_not_fit_its_files_or_the_model_is_one_line(
    message: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved / "many", folder)
    INDICES[message](folder)
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_stands_beside_a_model_and_is_not_taken_is_told(saved: Path, tmp_path: Path) -> None:
    from megatron_ext.interop import load_hf

    folder = tmp_path / "hf"
    shutil.copytree(saved / "one", folder)
    torch.save({}, folder / "training_args.bin")
    (folder / "modeling_x.py").write_text("raise SystemExit\n")
    (folder / "onnx").mkdir()
    (folder / "README.md").write_text("A model.\n")
    (folder / ".gitattributes").write_text("x\n")
    found = load_hf(folder)
    assert "files not imported: modeling_x.py, onnx/, training_args.bin" in found.messages
    assert found.imported.files == ("README.md",)
