"""Going on from a model: adapters over imported Llamas, Phis and Gemmas, a PLE and an NPT model, from the command line.

Saved, resumed bit for bit, merged and written for `peft`, read back by transformers and `peft`.
"""

import contextlib
import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.command_line.error_lines import main_guard
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.load_model import load_model
from megatron_ext.platform import process_groups
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.optimizer_state import PREFIX
from megatron_ext.training.interface.family_interface import auxiliary_inputs
from pretrain_gpt_per_layer import main as pretrain_gpt
from pretrain_npt import main as pretrain_npt
from pretrain_progressive import main as pretrain_progressive
from tests.unit.interop.hf_models import KINDS, alone, tensors_in
from tools.convert_checkpoint import main as convert
from tools.evaluate import main as evaluate
from tools.generate import main as generate

LENGTH = 32
IMPORTED = ("Llama", "Gemma3", "Gemma4", "Gemma3n", "Phi3")
TRAIN = "--lr 1e-2 --lr-decay-style constant --eval-iters 0 --micro-batch-size 2 --global-batch-size 4 --num-workers 0"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
SHAPE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --tokenizer-type NullTokenizer --vocab-size 95"
)
PLE = "--use-per-layer-embedding --per-layer-preset gemma4 --per-layer-hidden-size 8"


def called(main: Callable[[], Any], line: str) -> tuple[int, str, str]:
    """Exit code, standard error and output of an entry point, in a process of its own."""
    return alone(_called, main, line.split())


def _called(main: Callable[[], Any], arguments: list[str]) -> tuple[int, str, str]:
    sys.argv = ["tool", *arguments]
    errors, printed = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        try:
            code = main_guard(main)() or 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, errors.getvalue(), printed.getvalue()


def succeeds(main: Callable[[], Any], line: str) -> str:
    code, errors, printed = called(main, line)
    assert code == 0, errors
    return printed


def _everything(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the optimizer's included."""
    process_groups.initialize(ParallelConfig(), seed=1)
    return read_plain(str(find_checkpoint(path)))


def _tensors(path: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in _everything(path).items() if not name.startswith(PREFIX)}


def _whole(path: str) -> set[str]:
    """The names of all tensors of a model, those of its own base checkpoint included."""
    process_groups.initialize(ParallelConfig(), seed=1)
    return {name for name in BaseCheckpoint.find(path).tensor_names if not name.startswith(PREFIX)}


def _logits(path: str) -> torch.Tensor:
    loaded = load_model(path, FAMILIES)
    tokens = some_tokens()
    positions = torch.arange(LENGTH).expand_as(tokens)
    inputs = auxiliary_inputs(loaded.families, {"tokens": tokens})
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(tokens, positions, None, auxiliary_inputs=inputs)
    return logits[..., :95]


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 95, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`: documents that end with token 95; `hf` and the models in it: imported; `PLE`, `NPT`: trained here."""
    path = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(1)
    lengths = random.integers(1, 40, 60)
    write_dataset(str(path / "data"), [[[*random.integers(0, 95, n).tolist(), 95]] for n in lengths])
    (path / "prompts").write_text("70 71\n3 14 15 92\n")
    for name in IMPORTED:
        KINDS[name].build().save_pretrained(path / "hf" / name)
        succeeds(convert, f"import --model-dir {path}/hf/{name} --save {path}/{name}")
    data = f"--data-path {path}/data --seq-length {LENGTH} {TRAIN}"
    succeeds(pretrain_gpt, f"{SHAPE} {PLE} {data} --train-iters 2 --save {path}/PLE")
    npt = "--mode lm --np-rank 2 --npt-layers upper_half --train-iters 2"
    succeeds(pretrain_npt, f"--load {path}/Llama {npt} {data} --save {path}/NPT")
    return path


def over(folder: Path, model: str, save: str, *flags: str) -> str:
    """Begins a run with adapters over a model."""
    data = f"--data-path {folder}/data --seq-length {LENGTH} {TRAIN} {DOCUMENTS}"
    begin = f"--load {folder}/{model} --finetune --lora-rank 4 --lora-alpha 8"
    return succeeds(pretrain_gpt, " ".join([data, begin, "--save", save, *flags]))


def resumed(folder: Path, save: str, *flags: str) -> str:
    data = f"--data-path {folder}/data --seq-length {LENGTH} {TRAIN} {DOCUMENTS}"
    return succeeds(pretrain_gpt, " ".join([data, f"--load {save} --save {save}", *flags]))


@pytest.mark.parametrize("model", ["Llama", "Gemma3", "Gemma3n", "PLE", "NPT"])
def test_a_run_over_a_frozen_model_saves_adapters_only_and_resumes_bit_for_bit(
    folder: Path, tmp_path: Path, model: str
) -> None:
    straight, stopped = str(tmp_path / "straight"), str(tmp_path / "stopped")
    printed = over(folder, model, straight, "--train-iters 4")
    assert "LoRA adapters of rank 4, alpha 8 over" in printed
    assert ("warning: adapters over NPT layers" in printed) == (model == "NPT")
    over(folder, model, stopped, "--train-iters 4 --exit-interval 2")
    assert "the run continues after step 2" in resumed(folder, stopped, "--train-iters 4")
    ours, again = alone(_everything, straight), alone(_everything, stopped)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    ours = {name: value for name, value in ours.items() if not name.startswith(PREFIX)}
    assert len(ours) == 4 * 4 * 2  # all have four layers
    assert all(".adapters.lora." in name for name in ours)
    assert all(bool(tensor.any()) for tensor in ours.values())  # B is no longer zero


@pytest.mark.parametrize("model", ["Llama", "Gemma4", "PLE", "NPT"])
def test_every_tool_loads_the_model_with_its_adapters_and_merged(
    folder: Path, tmp_path: Path, model: str
) -> None:
    save = str(tmp_path / "run")
    over(folder, model, save, "--train-iters 2")
    with_adapters, without = alone(_logits, save), alone(_logits, f"{folder}/{model}")
    assert float((with_adapters - without).abs().max()) > 1e-3
    succeeds(convert, f"merge --load {save} --save {tmp_path}/merged")
    merged = alone(_logits, f"{tmp_path}/merged")
    assert float((with_adapters - merged).abs().max()) < 1e-5 * float(merged.abs().max())
    assert _families(f"{tmp_path}/merged") == _families(f"{folder}/{model}")
    assert alone(_tensors, f"{tmp_path}/merged").keys() == alone(_whole, f"{folder}/{model}")
    if model in ("PLE", "NPT"):
        code, errors, _ = called(convert, f"export --load {save} --model-dir {tmp_path}/out --merge-adapters")
        assert code == 2 and "use convert_checkpoint.py merge, and export its result" in errors


def _families(path: str) -> dict[str, Any]:
    """The model families of a checkpoint, with all their settings."""
    stored = read_run_config(path)["families"]
    return {name: FAMILIES[name].from_configuration(found).configuration() for name, found in stored.items()}


def _measured(folder: Path, load: str, output: Path) -> tuple[float, str]:
    """The loss that tools/evaluate.py writes, and what tools/generate.py prints."""
    data = f"--data-path {folder}/data --max-tokens 300 --output {output}"
    succeeds(evaluate, f"--load {load} {data}")
    (found,) = json.loads(output.read_text()).values()
    greedy = f"--prompt-file {folder}/prompts --temperature 0 --max-new-tokens 40"
    return found["loss"], succeeds(generate, f"--load {load} {greedy}")


@pytest.mark.parametrize("model", ["Llama", "Gemma4"])
def test_evaluation_and_generation_with_adapters_are_those_of_the_merged_model_at_two_ranks_too(
    folder: Path, tmp_path: Path, model: str
) -> None:
    save, output = str(tmp_path / "run"), tmp_path / "loss.json"
    over(folder, model, save, "--train-iters 2")
    succeeds(convert, f"merge --load {save} --save {tmp_path}/merged")
    loss, text = _measured(folder, save, output)
    merged, merged_text = _measured(folder, f"{tmp_path}/merged", output)
    plain, _ = _measured(folder, f"{folder}/{model}", output)
    assert loss == pytest.approx(merged, rel=1e-6) and text == merged_text
    assert abs(loss - plain) > 1e-4
    for layout in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
        flags = f"--load {save} {layout} 2 --data-path {folder}/data --max-tokens 300 --output {output}"
        done = run_script("tools/evaluate.py", *flags.split(), processes=2)
        assert done.returncode == 0, done.stderr
        assert next(iter(json.loads(output.read_text()).values()))["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_ids_that_end_a_text_go_through_adapters_to_generation_and_export(
    folder: Path, tmp_path: Path
) -> None:
    # Gemma's <end_of_turn> is in generation_config.json only: public issues 25 and 259 of apple/coreai-models.
    shutil.copytree(folder / "hf" / "Gemma3", tmp_path / "hf")
    for file in folder.glob("data.*"):
        shutil.copy(file, tmp_path)
    ends = {"eos_token_id": [1, 70], "do_sample": False}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(ends))
    succeeds(convert, f"import --model-dir {tmp_path}/hf --save {tmp_path}/Gemma3")
    over(tmp_path, "Gemma3", f"{tmp_path}/run", "--train-iters 1")
    assert set(alone(_stops, f"{tmp_path}/run")) == {1, 70, 95}
    succeeds(convert, f"export --load {tmp_path}/run --model-dir {tmp_path}/out --merge-adapters")
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: exported[name] for name in ends} == ends


def _stops(path: str) -> tuple[int, ...]:
    return load_model(path, FAMILIES).stop_tokens


def test_adapters_may_be_trained_further_over_another_run_of_adapters(folder: Path, tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    over(folder, "Llama", first, "--train-iters 2")
    code, errors, _ = called(
        pretrain_gpt,
        f"--data-path {folder}/data --seq-length {LENGTH} {TRAIN} --train-iters 1 --lr 1e-30 "
        f"--load {first} --finetune --save {second}",
    )
    assert code == 0, errors
    before, after = alone(_tensors, first), alone(_tensors, second)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(alone(_logits, first), alone(_logits, second))


def _theirs(base: str, adapter: str | None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():  # peft imports every quantization library that is installed
            warnings.simplefilter("ignore")
            import peft

            model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits: torch.Tensor = model(some_tokens()).logits
    return logits[..., :95]


@pytest.mark.parametrize("model", IMPORTED)
def test_merged_and_as_peft_adapter_transformers_computes_the_same(
    folder: Path, tmp_path: Path, model: str
) -> None:
    save, merged, base = (str(tmp_path / name) for name in ("run", "merged", "base"))
    over(folder, model, save, "--train-iters 3")
    succeeds(convert, f"export --load {save} --model-dir {merged} --merge-adapters")
    ours, without = alone(_logits, save), alone(_theirs, f"{folder}/hf/{model}", None)
    size = float(ours.abs().max())
    assert float((ours - without).abs().max()) > 1e-3 * size
    assert float((ours - alone(_theirs, merged, None)).abs().max()) < 1e-5 * size
    before, after = tensors_in(folder / "hf" / model), tensors_in(Path(merged))
    assert before.keys() == after.keys()
    as_peft = f"export --load {save} --model-dir {base} --adapter-dir {tmp_path}/peft"
    if model == "Phi3":
        code, errors, _ = called(convert, as_peft)
        assert code == 2 and "separate projections (got Phi3ForCausalLM)" in errors
        return
    succeeds(convert, as_peft)
    assert float((ours - alone(_theirs, base, f"{tmp_path}/peft/lora")).abs().max()) < 1e-5 * size
    assert torch.equal(alone(_theirs, base, None), without)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_finetuned_ple_model_keeps_frozen_tables_to_the_bit(
    folder: Path, tmp_path: Path, frozen: bool
) -> None:
    save, flag = str(tmp_path / "run"), "--freeze-per-layer-embedding" if frozen else ""
    line = (
        f"--load {folder}/PLE --finetune {flag} --data-path {folder}/data --seq-length {LENGTH} {TRAIN} {DOCUMENTS} "
        f"--train-iters 2 --save {save}"
    )
    succeeds(pretrain_gpt, line)
    before, after = alone(_tensors, f"{folder}/PLE"), alone(_tensors, save)
    assert before.keys() == after.keys()
    tables = {name for name in before if name.endswith("embedding.weight") and name.startswith("per_layer.")}
    assert len(tables) == 4
    kept = {name for name in before if torch.equal(before[name], after[name])}
    constants = {name for name in before if name.endswith(".layer_scalar")}
    assert kept == constants | (tables if frozen else set())


def test_per_layer_embedding_may_be_new_over_a_frozen_model(folder: Path, tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    over(folder, "Llama", save, PLE, "--train-iters 2")
    found = alone(_tensors, save)
    assert {name.split(".")[0] for name in found if ".adapters." not in name} == {"per_layer", "decoder"}
    assert read_run_config(save)["families"].keys() == {"per_layer", "lora"}
    assert not any("linear_qkv.weight" in name or "word_embeddings" in name for name in found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-rank 4 --lora-alpha 8 {shape}", "--lora-rank 4: requires a model to freeze"),
        ("--lora-rank 4 --load {folder}/Llama", "contains no run with adapters; add --finetune"),
        ("--lora-alpha 8 {shape}", "--lora-alpha 8: has no effect; it requires --lora-rank"),
        ("--lora-rank 0 {shape}", "--lora-rank 0"),
        (
            "--lora-rank 4 --load {folder}/rack/progressive_rack --finetune",
            "not supported for the model in --load, a rack",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, flags: str, words: str) -> None:
    if "rack" in flags and not (folder / "rack").exists():
        shape = SHAPE.replace("--num-layers 4 ", "")
        line = f"{shape} --target-stacks 1 --n-blocks 2 --stack-steps 1 --training-objective clm {TRAIN}"
        data = f"--data-path {folder}/data --seq-length {LENGTH}"
        succeeds(pretrain_progressive, f"{line} {data} --save {folder}/rack")
    data = f"--data-path {folder}/data --seq-length {LENGTH} {TRAIN} --train-iters 1"
    code, errors, _ = called(pretrain_gpt, f"{data} {flags.format(shape=SHAPE, folder=folder)}")
    assert code == 2
    assert errors.count("error: ") == 1
    assert words in errors
