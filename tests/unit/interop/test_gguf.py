"""A GGUF file gives the model and the tokenizer of the Hugging Face directory that it was made from."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ext.interop import import_checkpoint, load_hf
from megatron_ext.interop.gguf.gguf_metadata import GGUFMetadata
from megatron_ext.interop.gguf.gguf_tensors import GGUFTensors
from tests.unit.interop.gguf_files import byte_level_metadata, random_blocks, write_gguf
from tests.unit.interop.hf_models import KINDS, LLAMA3_SCALING, Kind, alone

Type = gguf.GGMLQuantizationType
END = "<|end|>"
TEXT = (
    "The year's 2024; it'LL cost 1234567 yen (or ½).\n\n\tdef f(x):\r\n    return x ** 2  # Größe naïve ΩΜΈΓΑ "
    "Привет 漢字かな e\u0301 \u00a0 ... don't we're I'M   trailing   \n"
)


_LLAMA3 = {**LLAMA3_SCALING, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA = {
    # What the format does not store is as in Gemma's own models.
    "num_hidden_layers": 7,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 10,
}
# The format's converters write no windows of single layers, and these two rope scalings in another form.
_OTHERWISE = ("Qwen2, sliding windows", "Llama, yarn", "Llama, dynamic")
STORED = {
    name: kind
    for name, kind in KINDS.items()
    if kind.name in ("Llama", "Mistral", "Qwen2", "Qwen3") and name not in _OTHERWISE
}
STORED |= {
    "Llama 3 scaling": Kind("Llama", {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5}, "head_dim": 32}),
    "Gemma3": Kind("Gemma3", {**_GEMMA, "final_logit_softcapping": 3.0}),
    "Gemma3, linear scaling": Kind(
        "Gemma3",
        {
            **_GEMMA,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        },
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_a_file_gives_the_tensors_and_the_configuration_of_its_directory(name: str, tmp_path: Path) -> None:
    model = STORED[name].build()
    if STORED[name].name == "Gemma3":
        # Files hold 1 + weight: take weights for which the sum is exact.
        for parameter in (value for key, value in model.named_parameters() if "norm" in key):
            parameter.data.mul_(1024).round_().div_(1024)
    model.save_pretrained(tmp_path / "hf")
    write_gguf(model, tmp_path / "model.gguf")
    theirs, ours = load_hf(tmp_path / "hf"), load_hf(tmp_path / "model.gguf")
    assert ours.model == theirs.model
    assert list(ours.state) == list(theirs.state)
    for key in theirs.state:
        assert torch.equal(ours.state[key], theirs.state[key]), key


@pytest.mark.parametrize(
    "dtype",
    [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1],
    ids=lambda t: t.name,
)
def test_transformers_reads_the_same_tensors_from_a_quantized_file(dtype: Type, tmp_path: Path) -> None:
    vocab, merges = _trained([TEXT] * 3)
    model = Kind("Llama", {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(vocab)}).build()
    entries = byte_level_metadata(vocab, merges, "gpt-2")
    write_gguf(model, tmp_path / "model.gguf", quantize=dtype, metadata=entries)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    tensors = GGUFTensors(GGUFMetadata(tmp_path / "model.gguf"))
    assert len(tensors.names) == len(theirs)
    for name in tensors.names:
        assert torch.equal(tensors.read(name).float(), theirs[name]), name
    assert dtype.name in tensors.types


@pytest.mark.parametrize("dtype", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda t: t.name)
def test_k_quantized_tensors_are_dequantized_row_by_row(dtype: Type, tmp_path: Path) -> None:
    blocks = random_blocks(dtype, (96, 512))
    writer = gguf.GGUFWriter(str(tmp_path / "one.gguf"), "qwen2")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = GGUFTensors(GGUFMetadata(tmp_path / "one.gguf"))
    values = tensors.read("model.embed_tokens.weight")
    assert tensors.shape("model.embed_tokens.weight") == (96, 512)
    assert values.isfinite().all()
    row = gguf.quants.dequantize(blocks[7:8], dtype)
    assert torch.equal(values[7], torch.from_numpy(row.copy())[0])


def test_a_split_model_is_read_from_all_its_files(tmp_path: Path) -> None:
    model = KINDS["Qwen2"].build()
    whole = write_gguf(model, tmp_path / "whole.gguf")[0]
    files = write_gguf(model, tmp_path / "part.gguf", split=3)
    expected, found = load_hf(whole), load_hf(files[1])
    for key in expected.state:
        assert torch.equal(found.state[key], expected.state[key]), key
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"are missing in its directory: part-00003-of-00003\.gguf"):
        load_hf(files[0])


def test_a_checkpoint_from_a_file_keeps_the_tokenizer(tmp_path: Path) -> None:
    vocab, merges = _trained([TEXT] * 3)
    model = Kind("Llama", {"vocab_size": len(vocab)}).build()
    entries = byte_level_metadata(vocab, merges, "smollm") | {
        "tokenizer.chat_template": "{{ messages[0]['content'] }}"
    }
    path = write_gguf(model, tmp_path / "model.gguf", metadata=entries)[0]
    found = alone(import_checkpoint, path, tmp_path / "checkpoint")
    folder = tmp_path / "checkpoint" / "tokenizer"
    assert found.tokenizer_config.tokenizer_model == str(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT)["input_ids"] == found.tokenizer.tokenize(TEXT)
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert theirs.eos_token == END


def _trained(texts: list[str]) -> tuple[dict[str, int], list[str]]:
    """Trains a byte-level tokenizer that cuts no words, so that how words are cut decides the tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text[i : i + 40] for text in texts for i in range(0, 120, 7)], trainer)
    content = json.loads(tokenizer.to_str())["model"]
    vocab = dict(content["vocab"])
    vocab[END] = len(vocab)
    return vocab, [" ".join(merge) for merge in content["merges"]]


def _pairs(merges: list[str]) -> Any:
    return [tuple(merge.split(" ")) for merge in merges]


def _gpt2(vocab: dict[str, int], merges: list[str]) -> Any:
    return transformers.GPT2Tokenizer(vocab=vocab, merges=_pairs(merges), unk_token=END)


def _smollm(vocab: dict[str, int], merges: list[str]) -> Any:
    """The steps in the tokenizer.json of SmolLM2."""
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(merges)))
    steps = [{"type": "Digits", "individual_digits": True}]
    steps += [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    content = json.loads(backend.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def _qwen2(vocab: dict[str, int], merges: list[str]) -> Any:
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=_pairs(merges))


def _llama3(vocab: dict[str, int], merges: list[str]) -> Any:
    """tiktoken's cl100k pattern, from which Llama 3's was made, in transformers' converter."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = TikTokenConverter(vocab_file="").pattern
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(merges), ignore_merges=True))
    from tokenizers import Regex

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("pre", "reference"), [("gpt-2", _gpt2), ("smollm", _smollm), ("qwen2", _qwen2), ("llama-bpe", _llama3)]
)
def test_a_byte_level_tokenizer_gives_the_ids_of_the_models_own(
    pre: str, reference: Any, tmp_path: Path
) -> None:
    vocab, merges = _trained([TEXT] * 3)
    model = Kind("Llama", {"vocab_size": len(vocab)}).build()
    entries = byte_level_metadata(vocab, merges, pre)
    path = write_gguf(model, tmp_path / "model.gguf", metadata=entries)[0]
    ours = load_hf(path).tokenizer
    expected = reference(vocab, merges)(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.tokenize(TEXT) == expected
    assert ours.adds_bos == (pre == "llama-bpe")
    # The rules differ on this text, so a wrong name would be seen.
    others = {str(make(vocab, merges)(TEXT, add_special_tokens=False)["input_ids"]) for make in _REFERENCES}
    assert len(others) == len(_REFERENCES)


_REFERENCES = (_gpt2, _smollm, _qwen2, _llama3)


@pytest.mark.parametrize("spaces", [[], ["\u2581\u2581", "\u2581\u2581\u2581"]], ids=["Llama", "Gemma"])
def test_a_sentencepiece_tokenizer_gives_the_ids_of_its_model_file(spaces: list[str], tmp_path: Path) -> None:
    source = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, *(f"{TEXT} {word}" for word in TEXT.split())]),
        model_writer=source,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        user_defined_symbols=spaces,
        bos_piece="<bos>" if spaces else "<s>",
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=source.getvalue())
    count = original.get_piece_size()
    entries = {
        "tokenizer.ggml.model": "llama",
        # The format spells spaces in texts that are never cut as themselves.
        "tokenizer.ggml.tokens": [
            piece.replace("\u2581", " ") if piece in spaces else piece
            for piece in (original.id_to_piece(i) for i in range(count))
        ],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": [
            4 if original.id_to_piece(i) in spaces else _piece_type(original, i) for i in range(count)
        ],
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
    }
    model = Kind("Llama", {"vocab_size": count}).build()
    path = write_gguf(model, tmp_path / "model.gguf", metadata=entries)[0]
    ours = load_hf(path).tokenizer
    for text in (*TEXT.split(), "\u3042 unseen", "two  spaces", "a   b     c"):
        assert ours.tokenize(text) == original.encode(text), text
    assert ours.adds_bos
    assert ours.bos == original.bos_id() == 1


def _piece_type(model: Any, number: int) -> int:
    checks = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    return next((kind for kind, check in checks.items() if check(number)), 1)


def _llama(path: Path, **metadata: Any) -> Path:
    entries = {key.replace("__", "."): value for key, value in metadata.items()}
    return write_gguf(KINDS["Llama"].build(), path, metadata=entries)[0]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__rope__scaling__type": "yarn"}, r"rope\.scaling\.type yarn: only none and linear are read"),
        ({"llama__attention__head_count_kv": [4, 4, 2, 4]}, r"head_count_kv differs from layer to layer"),
        ({"llama__rope__dimension_count": 4}, r"rope\.dimension_count 4: must be the head size 8"),
        ({"llama__block_count": None}, r"the metadata has no llama\.block_count"),
        ({"llama__block_count": 3}, r"not part of the model in its metadata"),
        ({"llama__feed_forward_length": 40}, r"its metadata requires \[40, 32\]"),
        ({"tokenizer__ggml__model": "bert"}, r"tokenizer\.ggml\.model bert: only gpt2 and llama are read"),
        (
            {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "tekken"},
            r"tokenizer\.ggml\.pre tekken: only gpt-2, smollm, llama-bpe, qwen2 are read",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = _llama(tmp_path / "model.gguf", **metadata)
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 3, 40, 3000, -1000])
def test_a_file_that_was_cut_is_refused_in_one_line(keep: int, tmp_path: Path) -> None:
    path = _llama(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a GGUF file|damaged, incomplete") as caught:
        load_hf(path)
    assert "\n" not in str(caught.value)


def test_another_architecture_and_a_tensor_type_that_is_not_read_are_named(tmp_path: Path) -> None:
    for architecture, dtype, message in [
        ("gemma2", Type.F32, "general.architecture gemma2: must be one of llama, qwen2, qwen3, gemma3"),
        ("llama", Type.TQ1_0, "holds tensors of type TQ1_0"),
    ]:
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), architecture)
        values = gguf.quants.quantize(torch.ones(4, 256).numpy(), dtype)
        writer.add_tensor("token_embd.weight", values, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=message):
            load_hf(tmp_path / "x.gguf")
