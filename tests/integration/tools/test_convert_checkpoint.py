"""tools/convert_checkpoint.py as a user calls it, and the tools and the training that go on from what it writes."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.per_layer.per_layer_ids import write_aligned
from megatron_ext.data.per_layer.per_layer_table import save_table
from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL_TOKENS, save_vocabulary
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.inference.load_model import load_model
from megatron_ext.inference.perplexity import evaluate_perplexity
from megatron_ext.interop import export_checkpoint
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.np_weight_files import write_np_weights
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.pretrain import pretrain
from tests.unit.interop.hf_models import KINDS, LENGTH, Kind, alone, logits_of, tensors_in, tokens
from tools.convert_checkpoint import ExportConfig, main

ROOT = Path(__file__).parents[3]
TEXT = "ab ba cab"
# A model with more embeddings (96) than its tokenizer has ids.
WORDS = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "</s>": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a Qwen2 with a tokenizer; `checkpoint`: imported; `data`: indexed for its tokenizer's first ids."""
    path = tmp_path_factory.mktemp("tool")
    KINDS["Qwen2"].build().save_pretrained(path / "hf")
    backend = tokenizers.Tokenizer(models.BPE(vocab=WORDS, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.save_pretrained(path / "hf")
    random = np.random.default_rng(1)
    write_dataset(str(path / "data"), [[random.integers(0, 6, 60).tolist()] for _ in range(20)])
    assert alone(_import, str(path)) == 0
    return path


def _import(path: str) -> int:
    return main(["import", "--model-dir", f"{path}/hf", "--save", f"{path}/checkpoint"])


def _evaluated_and_generated(path: str) -> tuple[float, list[list[int]], list[int], int]:
    loaded = load_model(f"{path}/checkpoint", {})
    found = evaluate_perplexity(
        [loaded.model], [], f"{path}/data", sequence_length=LENGTH, micro_batch_size=4
    )
    prompt = loaded.tokenizer.tokenize(TEXT)
    sampling = Sampling(max_new_tokens=6, temperature=0)
    new = generate(loaded.model, [], [prompt], sampling, loaded.tokenizer.vocab_size)
    return found.loss, new, prompt, found.tokens


def test_evaluation_and_generation_load_an_import_and_agree_with_transformers(folder: Path) -> None:
    loss, new, prompt, count = alone(_evaluated_and_generated, str(folder))
    model = KINDS["Qwen2"].build()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    assert new == [expected.tolist()]
    assert transformers.AutoTokenizer.from_pretrained(folder / "hf")(TEXT).input_ids == prompt
    stream = np.fromfile(f"{folder}/data.bin", dtype=np.uint16).astype(np.int64)
    assert count == len(stream) - 1
    windows = torch.from_numpy(stream[: LENGTH * 24 + 1])
    inputs, labels = windows[:-1].view(-1, LENGTH), windows[1:].view(-1, LENGTH)
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    assert loss == pytest.approx(float(whole), rel=0.02)  # all but the last, short window


def test_the_checkpoint_stands_alone_and_knows_its_tokenizer(folder: Path) -> None:
    stored = read_run_config(str(folder / "checkpoint"))
    assert stored["tokenizer"]["tokenizer_model"] == str(folder / "checkpoint" / "tokenizer")
    assert stored["vocab_size"] == stored["tokenizer"]["vocab_size"] == 96
    # Ids beyond the tokenizer's make it no other tokenizer: data that it has encoded stays usable.
    tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "hf"))
    assert stored["tokenizer_fingerprint"] == build_tokenizer(tokenizer).fingerprint()
    assert (folder / "checkpoint" / "tokenizer" / "tokenizer.json").is_file()
    assert (folder / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "0"


def test_an_export_has_the_tokenizer_and_transformers_loads_both(folder: Path, tmp_path: Path) -> None:
    argv = ["export", "--load", f"{folder}/checkpoint", "--model-dir", f"{tmp_path}/out"]
    assert alone(main, argv) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer(TEXT).input_ids == transformers.AutoTokenizer.from_pretrained(folder / "hf")(TEXT).input_ids
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(model.eval()), logits_of(KINDS["Qwen2"].build()))
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (folder / "hf", tmp_path / "out")
    )
    same = ("architectures", "model_type", "tie_word_embeddings", "vocab_size")
    assert [before[name] for name in same] == [after[name] for name in same]
    assert after["eos_token_id"] == tokenizer.eos_token_id == 5
    # A second export over it is refused, unless asked for; then it takes the other's place whole.
    with pytest.raises(ValueError, match="--model-dir .* not empty"):
        alone(main, argv)
    assert alone(main, [*argv, "--overwrite", "--no-tokenizer", "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {torch.bfloat16}
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


QUICKSTART = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 32 --swiglu "
    "--ffn-hidden-size 64 --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--tokenizer-type NullTokenizer --vocab-size 20 --init-method-std 0.2"
)
RUN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 2 --lr 1e-3 --eval-iters 0 --num-workers 0 --train-iters 2"
)
STILL = ("--lr", "1e-30", "--weight-decay", "0")
"""Training that changes no weight."""


def _train(flags: list[str], families: list[Any]) -> int:
    return pretrain(parse(RunConfig, [*RUN, *flags]), lambda *_: families)


@torch.no_grad()
def _checkpoint_logits(path: str, families: dict[str, Any]) -> torch.Tensor:
    model = load_model(path, families).model
    ids = tokens()[:, :32] % 20
    result: torch.Tensor = model(ids, torch.arange(32).expand_as(ids), None)
    return result


def _trained(path: str, data: str) -> torch.Tensor:
    flags = [*QUICKSTART, "--data-path", data, "--save", f"{path}/trained"]
    assert _train(flags, []) == 0
    assert main(["export", "--load", f"{path}/trained", "--model-dir", f"{path}/hf"]) == 0
    return _checkpoint_logits(f"{path}/trained", {})


def test_a_base_model_trained_here_is_a_llama(folder: Path, tmp_path: Path) -> None:
    logits = alone(_trained, str(tmp_path), str(folder / "data"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(model) is transformers.LlamaForCausalLM and model.config.vocab_size == 21
    with torch.no_grad():
        expected = model(tokens()[:, :32] % 20).logits
    # The checkpoint's vocabulary is padded to 128 rows, the export's is not.
    assert logits.size(-1) == 128 and expected.std() > 0.1
    torch.testing.assert_close(logits[..., :21], expected, atol=1e-5, rtol=0)


def _finetuned(path: str, out: str) -> dict[str, Any]:
    config = [
        "--config",
        f"{path}/checkpoint/model.yaml",
        "--load",
        f"{path}/checkpoint",
        "--seq-length",
        "32",
    ]
    flags = [*config, "--data-path", f"{path}/data"]
    # With such a learning rate the model that is saved is the one that was loaded.
    assert _train([*flags, "--save", f"{out}/same", *STILL, "--finetune"], []) == 0
    errors = []
    for extra in ([], ["--no-load-optim"]):
        with pytest.raises(ValueError, match="--finetune") as caught:
            _train([*flags, *extra], [])
        errors.append(str(caught.value))
    return {"errors": errors, "config": read_run_config(f"{out}/same")["model"]}


def test_training_goes_on_from_an_import_and_says_what_it_asks_for(folder: Path, tmp_path: Path) -> None:
    found = alone(_finetuned, str(folder), str(tmp_path))
    assert "contains an imported model, not a run that can be resumed" in found["errors"][1]
    assert found["config"]["add_qkv_bias"] and found["config"]["seq_length"] == 32
    # transformers would read this tokenizer beside a Qwen2 with Qwen's own splitting.
    argv = ["export", "--load", f"{tmp_path}/same", "--model-dir", f"{tmp_path}/out"]
    with pytest.raises(ValueError, match="transformers reads the tokenizer differently"):
        alone(main, argv)
    assert alone(main, [*argv, "--no-tokenizer"]) == 0
    before, after = tensors_in(folder / "hf"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _with_families(path: str, data: str) -> None:
    flags = [*QUICKSTART, "--data-path", data]
    settings = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=8
    )
    _train([*flags, "--save", f"{path}/per_layer"], [PerLayerFamily(settings, 21)])
    npt = NPTModuleConfig(npt_layers="all", np_rank=2)
    _train([*flags, "--save", f"{path}/npt"], [NPTFamily(npt)])
    _train([*flags, "--save", f"{path}/base", *STILL], [])
    for name, extra in (("npt", ["--base-only"]), ("base", [])):
        main(["export", "--load", f"{path}/{name}", "--model-dir", f"{path}/hf-{name}", *extra])


def test_a_frozen_base_is_exported_alone_and_families_with_their_code(folder: Path, tmp_path: Path) -> None:
    alone(_with_families, str(tmp_path), str(folder / "data"))
    # NPT does not train its base, so it is that of a run which does not train at all.
    base, of_npt = tensors_in(tmp_path / "hf-base"), tensors_in(tmp_path / "hf-npt")
    assert base.keys() == of_npt.keys() and all(torch.equal(base[name], of_npt[name]) for name in base)
    out = tmp_path / "out"
    for name, flags, message in (
        (
            "per_layer",
            ["--base-only"],
            "--base-only requires a base that was frozen; the base of .* was trained together with",
        ),
        (
            "base",
            ["--tokenizer-model", "x", "--ckpt-step", "7"],
            "contains no complete checkpoint of this step",
        ),
        ("base", ["--architecture", "Qwen3ForCausalLM"], "--architecture Qwen3ForCausalLM: cannot express"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            main(["export", "--load", str(tmp_path / name), "--model-dir", str(out), *flags])
    assert not out.exists()
    for name in ("npt", "per_layer"):
        assert (
            alone(
                main,
                ["export", "--load", str(tmp_path / name), "--model-dir", str(tmp_path / f"code-{name}")],
            )
            == 0
        )
        config = json.loads((tmp_path / f"code-{name}" / "config.json").read_text())
        assert config["architectures"] == ["MegatronExtLlamaForCausalLM"]
        assert (tmp_path / f"code-{name}" / "modeling_megatron_ext.py").is_file()
    # What the export of interop alone, which knows no family, says.
    with pytest.raises(
        ValueError, match="no Llama-like model can express the model family npt; use --base-only"
    ):
        export_checkpoint(str(tmp_path / "npt"), out)


def test_a_model_trained_on_aligned_data_needs_its_table_for_the_export(folder: Path, tmp_path: Path) -> None:
    alone(_with_aligned_ids, str(tmp_path), str(folder))
    argv = ["export", "--load", f"{tmp_path}/run", "--model-dir", f"{tmp_path}/out"]
    with pytest.raises(ValueError, match="was trained on aligned per-layer data .* --per-layer-vocab-file"):
        alone(main, argv)
    with pytest.raises(ValueError, match="has no per-layer embedding"):
        alone(
            main, ["export", "--load", f"{folder}/checkpoint", *argv[3:], "--per-layer-vocab-file", "x.json"]
        )
    assert not (tmp_path / "out").exists()
    assert alone(main, [*argv, "--per-layer-vocab-file", f"{tmp_path}/vocab.json"]) == 0
    tensors = tensors_in(tmp_path / "out")
    assert tensors["model.per_layer_ids"].tolist() == [3 + token % 4 for token in range(21)]


def test_a_model_that_npt_refuses_gets_no_advice_to_convert_it_and_no_calibration(
    folder: Path, tmp_path: Path
) -> None:
    KINDS["Olmo2"].build().save_pretrained(tmp_path / "hf")
    where = ["--model-dir", f"{tmp_path}/hf", "--save", f"{tmp_path}/base"]
    advice = run_script("tools/convert_checkpoint.py", "import", *where).stdout
    assert "pretrain_gpt_per_layer.py" in advice and "pretrain_npt.py" not in advice
    data = ["--load", f"{tmp_path}/base", "--data-path", f"{folder}/data", "--save", f"{tmp_path}/npt"]
    flags = "--mode multi_layer --train-iters 1 --lr 1e-3 --np-form key_value --np-target gate+up --np-residual keep"
    calibrated = ["--np-rank", "auto:0.1", "--np-init", "calibrated"]
    refused = run_script("pretrain_npt.py", *data, *flags.split(), *calibrated)
    assert refused.stderr.strip() == "error: --post-norm: not supported by the model family npt"
    assert refused.returncode == 2 and not (tmp_path / "npt").exists()


def test_np_weights_that_do_not_fit_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    argv = ["export", "--load", f"{folder}/checkpoint", "--model-dir", f"{tmp_path}/out", "--npt-weights"]
    torch.save({}, weights / "npt_weights.pt")
    with pytest.raises(ValueError, match="--npt-weights .*: config.json, which specifies the layers"):
        alone(main, [*argv, f"{weights}/npt_weights.pt"])
    for settings, message in (
        (NPTModuleConfig(np_rank=2), "layer_2_np.gate.A is missing in the NP weights"),
        (NPTModuleConfig(np_rank=2, np_target="fc1"), "--np-target fc1: the model's MLP is gated"),
    ):
        write_np_weights(weights, {}, settings)
        with pytest.raises(ValueError, match=message):
            alone(main, [*argv, f"{weights}/npt_weights.safetensors"])
    with pytest.raises(SystemExit):
        main([*argv, f"{weights}/npt_weights.pt", "--base-only"])
    assert not (tmp_path / "out").exists()


def _with_aligned_ids(path: str, data: str) -> None:
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_hidden_size=8,
        per_layer_vocab_size=16,
        per_layer_data_path=(f"{path}/aligned",),
    )
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=20))
    save_vocabulary(
        f"{path}/vocab.json", {name: number for number, name in enumerate([*SPECIAL_TOKENS, "a"])}
    )
    table = np.array([3 + token % 4 for token in range(21)], dtype=np.int32)
    fingerprint = tokenizer.fingerprint()
    save_table(f"{path}/vocab.json", "syntax_focus", table, tokenizer_fingerprint=fingerprint, seed=0)
    index = open_index(f"{data}/data")
    write_aligned(index, f"{path}/aligned", table, "syntax_focus", eod=20, per_layer_vocab_size=7)
    family = PerLayerFamily(settings, 21)
    _train([*QUICKSTART, "--data-path", f"{data}/data", "--save", f"{path}/run"], [family])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert"], "unknown command 'convert': must be one of import, export"),
        ([], "unknown command ''"),
    ],
)
def test_an_unknown_command_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_a_user_sees_one_line_and_exit_code_two(tmp_path: Path) -> None:
    kind: Kind = KINDS["Llama"]
    kind.build().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"x" * 100)
    flags = ["--model-dir", f"{tmp_path}/hf", "--save", f"{tmp_path}/c"]
    result = run_script("tools/convert_checkpoint.py", "import", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "c").exists()


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["export", "--load", "c", "--model-dir", "d", "--max-shard-size", "many"])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == "error: --max-shard-size many: must be a size such as 500MB or 2GiB\n"
    sizes = {"20KB": 20_000, "1.5GiB": 3 * 2**29, "7": 7}
    for text, size in sizes.items():
        config = ExportConfig(load="c", model_dir="d", max_shard_size=text)
        assert config.resolved_max_shard_size() == size
