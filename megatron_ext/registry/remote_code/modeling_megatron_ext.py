"""Per-layer embeddings (PLE) and NPT layers on a Llama-like model of transformers, as trained by megatron-ext.

This file is part of an exported directory. It needs only torch and transformers (5 or later):

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

Two sections of config.json describe the additions to the base model; one of them may be missing.

`per_layer_embedding`: every layer gates a vector c into the residual stream x, before the layer or after its MLP. `e`
is the word embedding that enters the first layer, `id` the token's per-layer id, h the hidden size, p the width of c.

    E = table[id] * sqrt(p) * embed_scale            P = RMSNorm( (e @ W_context) * h**-0.5 )
        with j hash functions of n-grams: the sum of j rows, times embed_scale * sqrt(p / j)
    scaled_add   c = (P + E) / sqrt(2)
    concat       c = [P ; E] @ W
    gated        c = g * E + (1 - g) * P,            g = sigmoid([P ; E] @ W)
    x <- x + RMSNorm( W_out( act(W_gate x) * c ) )   then x <- x * layer_scalar, if the layer has one

`npt`: in some layers, the attention output `a` is not an input of the MLP; it changes the MLP's weights, for each
token. Here h is the residual stream that enters the layer, n = norm(h), `weight` the weight of this norm, `y` the
output of a weight matrix W for the input `x`, r the rank, k the number of components.

    low_rank         y = W x + scale * (x A * tanh(a A)) B
    outer_product    y = W x + scale / sqrt(k r) * sum over k of (v_a . x) * z W_b_up
                     z = a W_down / rms(a W_down),     v_a = (z W_a_up / sqrt(r) + c_a) / sqrt(size of x)
                     `down` divides v_a by rms(W_a_up x) instead of sqrt(size of x);
                     with np_normalize false, z is a W_down, and `down` divides by sqrt(size of x), too
    key_value        input of gate and up:  rho n + weight * (a A B) / rms(h + a),  rho = rms(h) / rms(h + a);
                     down              y = W x + a A B           (both for scale = 1)
    output = h + MLP(n), or h + a + MLP(n) with np_residual "keep"
"""

import functools
import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

_ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}
_EPS = 1e-6
"""Added to mean squares in outer_product."""

_PRIME = 2**31 - 1
"""The modulus of the hash functions of n-grams."""


def inverse_rms(values: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns 1 / sqrt(mean of squares + eps) over the last dimension, in fp32."""
    return torch.rsqrt(values.float().square().mean(-1, keepdim=True) + eps)


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return (values.float() * inverse_rms(values, eps) * weight).to(values.dtype)


class PerLayerNorm(nn.Module):
    """Holds the weight of an RMSNorm and applies it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return rms_norm(values, self.weight, self.eps)


class PerLayerEmbedding(nn.Module):
    """Per-layer embedding in one layer."""

    layer_scalar: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        settings, hidden, eps = config.per_layer_embedding, config.hidden_size, config.rms_norm_eps
        width = settings["per_layer_hidden_size"]
        self.method = settings["per_layer_combination_method"]
        self.activation = _ACTIVATIONS[settings["per_layer_gate_activation"]]
        self.dropout = settings["per_layer_projection_dropout"]
        rows_per_token = len(settings["ngrams"]["functions"]) if "ngrams" in settings else 1
        self.scale, self.eps = settings["per_layer_embed_scale"] * (width / rows_per_token) ** 0.5, eps
        self.embedding = nn.Embedding(settings["per_layer_vocab_size"], width)
        self.context_projection = nn.Linear(hidden, width, bias=False)
        if self.method != "scaled_add":
            self.combination = nn.Linear(2 * width, width, bias=False)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.projection = nn.Linear(width, hidden, bias=False)
        self.post_norm = PerLayerNorm(hidden, eps)
        self.has_scalar = settings["per_layer_preset"] == "gemma4"
        if self.has_scalar:
            self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, hidden_states: torch.Tensor, inputs: tuple[Any, ...]) -> torch.Tensor:
        """Adds the layer's vector to the residual stream.

        Args:
            hidden_states: [b, s, h].
            inputs: three items. The word embedding [b, s, h]; the per-layer ids [b, s] ([b, s, j] for j rows per
                token), or None; the weight [p] of the norm in P.
        """
        combined = F.dropout(self.combine(*inputs), self.dropout, self.training)
        gated = self.activation(self.gate(hidden_states)) * combined
        output = hidden_states + self.post_norm(self.projection(gated))
        return output * self.layer_scalar if self.has_scalar else output

    def combine(
        self, word_embedding: torch.Tensor, ids: torch.Tensor | None, norm_weight: torch.Tensor
    ) -> torch.Tensor:
        """Returns c [b, s, p]; P alone if there are no ids."""
        context = self.context_projection(word_embedding) * word_embedding.size(-1) ** -0.5
        context = rms_norm(context, norm_weight, self.eps)
        if ids is None:
            return context
        found = self.embedding(ids)
        token = (found.sum(-2) if ids.dim() == 3 else found) * self.scale
        if self.method == "scaled_add":
            return (context + token) * 0.5**0.5
        mixed = self.combination(torch.cat([context, token], dim=-1))
        return mixed if self.method == "concat" else torch.lerp(context, token, torch.sigmoid(mixed))


class Factors(nn.Module):
    """The factors that change one weight matrix of an NPT layer's MLP; a subclass for each form."""

    def __init__(self, config: Any, target: str, rank: int) -> None:
        super().__init__()
        self.settings = config.npt
        self.components, self.rank = self.settings["num_np_components"], rank
        self.total, self.scale = self.components * rank, self.settings["np_scale"]
        self.hidden, self.is_down = config.hidden_size, target == "down"
        sizes = (config.hidden_size, config.intermediate_size)
        self.output_size, self.input_size = sizes if self.is_down else sizes[::-1]
        for name, shape in self.shapes().items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Returns the shape of each factor by its name."""
        raise NotImplementedError

    def delta(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Returns the change that the update causes in the output of the weight matrix.

        Args:
            x: the input of the weight matrix.
            attention: the attention output.
        """
        raise NotImplementedError


class LowRank(Factors):
    A: torch.Tensor
    A_in: torch.Tensor
    B: torch.Tensor

    def shapes(self) -> dict[str, tuple[int, int]]:
        reader = {"A_in": (self.input_size, self.total)} if self.is_down else {}
        return {"A": (self.hidden, self.total), **reader, "B": (self.total, self.output_size)}

    def delta(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        read = x @ (self.A_in if self.is_down else self.A)
        return (read * torch.tanh(attention @ self.A) * self.scale) @ self.B


class OuterProduct(Factors):
    W_down: torch.Tensor
    W_a_up: torch.Tensor
    W_b_up: torch.Tensor
    c_a: torch.Tensor

    def shapes(self) -> dict[str, tuple[int, int]]:
        affine = {"c_a": (self.components, self.input_size)} if self.settings["np_affine"] else {}
        return {
            "W_down": (self.hidden, self.total),
            "W_a_up": (self.total, self.input_size),
            **affine,
            "W_b_up": (self.total, self.output_size),
        }

    def delta(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        normalize = self.settings["np_normalize"]
        z, read = self.by_component(attention @ self.W_down), self.by_component(x @ self.W_a_up.t())
        of_z = inverse_rms(z, _EPS) if normalize else 1.0
        product = (z * read).sum(-1, keepdim=True) * self.rank**-0.5 * of_z
        if self.settings["np_affine"]:
            product = product + (x @ self.c_a.t()).float().unsqueeze(-1)
        of_x = inverse_rms(read, _EPS) if normalize and self.is_down else self.input_size**-0.5
        product = product * of_z * of_x * (self.scale / math.sqrt(self.total))
        return (product * z).flatten(-2).to(x.dtype) @ self.W_b_up

    def by_component(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().unflatten(-1, (self.components, self.rank))


class KeyValue(Factors):
    A: torch.Tensor
    B: torch.Tensor

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"A": (self.hidden, self.rank), "B": (self.rank, self.hidden)}

    def delta(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return (attention @ self.A * self.scale) @ self.B

    def mlp_input(self, norm: Any, hidden: torch.Tensor, attention: torch.Tensor, eps: float) -> torch.Tensor:
        """Returns the vector that gate and up take as input instead of the normed input of the layer."""
        of_sum = inverse_rms(hidden.float() + attention.float(), eps)
        gain = 1 + self.scale * (of_sum / inverse_rms(hidden, eps) - 1)
        code = attention @ self.A * self.scale * of_sum.to(attention.dtype)
        return norm(hidden) * gain.to(hidden.dtype) + code @ (self.B * norm.weight).to(code.dtype)


_FORMS = {"low_rank": LowRank, "outer_product": OuterProduct, "key_value": KeyValue}


class ExtendedLayer(nn.Module):
    """Mixin that adds per-layer embedding, NPT or both to a decoder layer of transformers; list it before that
    class.
    """

    self_attn: Any
    mlp: Any
    np: Any
    per_layer: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        per_layer, npt = config.per_layer_embedding, config.npt or {"npt_layers": []}
        self.position = per_layer["per_layer_position"] if per_layer else None
        if per_layer:
            self.per_layer = PerLayerEmbedding(config)
        self.is_npt = layer_idx in npt["npt_layers"]
        if self.is_npt:
            of_fc1, of_down = npt["np_rank"][npt["npt_layers"].index(layer_idx)]
            self.keeps, self.eps = npt["np_residual"] == "keep", config.rms_norm_eps
            self.np = nn.ModuleDict(
                {
                    target: _FORMS[npt["np_form"]](config, target, of_down if target == "down" else of_fc1)
                    for target in npt["np_targets"]
                }
            )

    def forward(self, hidden_states: torch.Tensor, *, per_layer: Any = None, **kwargs: Any) -> torch.Tensor:
        if self.position == "before_layer":
            hidden_states = self.per_layer(hidden_states, per_layer)
        if self.is_npt:
            hidden_states = self.with_npt(hidden_states, **kwargs)
        else:
            hidden_states = super().forward(hidden_states, **kwargs)
        return self.per_layer(hidden_states, per_layer) if self.position == "after_mlp" else hidden_states

    def with_npt(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Returns the output of an NPT layer."""
        attention = self.self_attn(self.input_layernorm(hidden), **kwargs)[0]
        norm = self.post_attention_layernorm
        if "fc1" in self.np:
            normed = self.np["fc1"].mlp_input(norm, hidden, attention, self.eps)
        else:
            normed = norm(hidden)
        mlp, changed = self.mlp, self._changed
        if hasattr(mlp, "gate_up_proj"):  # Phi 3
            (gate, up), activation = mlp.gate_up_proj(normed).chunk(2, dim=-1), mlp.activation_fn
        else:
            gate, up, activation = mlp.gate_proj(normed), mlp.up_proj(normed), mlp.act_fn
        inner = activation(changed("gate", gate, normed, attention)) * changed("up", up, normed, attention)
        output = changed("down", mlp.down_proj(inner), inner, attention)
        return hidden + attention + output if self.keeps else hidden + output

    def _changed(
        self, target: str, output: torch.Tensor, x: torch.Tensor, attention: torch.Tensor
    ) -> torch.Tensor:
        return output + self.np[target].delta(x, attention) if target in self.np else output


class ExtendedModel(nn.Module):
    """Mixin that extends a model of transformers (without head) with `ExtendedLayer`s; list it before that class."""

    layer_class: Any
    config: Any
    embed_tokens: Any
    per_layer_ids: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([self.layer_class(config, number) for number in layers])
        settings = config.per_layer_embedding
        if settings:
            self.per_layer_norm = PerLayerNorm(settings["per_layer_hidden_size"], config.rms_norm_eps)
            if settings["per_layer_strategy"] != "identity" and "ngrams" not in settings:
                self.register_buffer("per_layer_ids", torch.zeros(config.vocab_size, dtype=torch.int32))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        per_layer_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model; `per_layer_ids` [b, s], if given, replaces the ids that are computed from `input_ids`.

        With hashed n-grams the ids are [b, s, j].
        """
        if self.config.per_layer_embedding:
            settings = self.config.per_layer_embedding
            keeps = self.config.use_cache if use_cache is None else use_cache
            depends = "marks" in settings or "ngrams" in settings
            if depends and past_key_values is None and keeps and not self.training:
                # The cache also stores the beginning of the current document, or the last tokens.
                past_key_values = DynamicCache(config=self.config)
            if per_layer_ids is None and input_ids is not None:
                per_layer_ids = self.ids_of(input_ids, attention_mask, position_ids, past_key_values)
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            # Granite multiplies the embedding only in the model's forward pass, so do it here.
            word_embedding = inputs_embeds * getattr(self.config, "embedding_multiplier", 1.0)
            kwargs["per_layer"] = (word_embedding, per_layer_ids, self.per_layer_norm.weight)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def ids_of(self, tokens: torch.Tensor, mask: Any, positions: Any, cache: Any) -> torch.Tensor:
        """Returns the per-layer id of each of the tokens [b, s]; with hashed n-grams, the table rows [b, s, j]."""
        settings = self.config.per_layer_embedding
        if "ngrams" in settings:
            return self.ngram_rows(tokens, mask, cache)
        ids = tokens if settings["per_layer_strategy"] == "identity" else self.per_layer_ids[tokens]
        return ids if settings.get("marks") is None else self.marked(ids, tokens, mask, positions, cache)

    def ngram_rows(self, tokens: torch.Tensor, mask: Any, cache: Any = None) -> torch.Tensor:
        """Returns the table rows [b, s, j] of tokens [b, s].

        Each of j functions hashes the n-gram that ends at a token to one row. An n-gram contains no tokens of an
        earlier document and no tokens that the mask excludes. A cache also stores the last tokens of each pass, with
        which the n-grams of the next pass begin.
        """
        settings = self.config.per_layer_embedding
        functions, end = settings["ngrams"]["functions"], settings["ngrams"]["end_token"]
        length, reach = tokens.size(1), max(len(function["factors"]) for function in functions) - 1
        digits = tokens + 1
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            digits = digits * mask[:, -length:].to(tokens.dtype)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            kept_at, kept = getattr(cache, "last_digits", (0, digits[:, :0]))
            if kept_at != past:
                raise ValueError(
                    "hashed n-grams: past_key_values does not contain the preceding tokens; pass per_layer_ids"
                )
            digits = torch.cat([kept, digits], dim=1)
        if cache is not None:
            cache.last_digits = past + length, digits[:, -reach:]
        after_end = F.pad(digits[:, :-1] == (-1 if end is None else end + 1), (1, 0))
        of_places = [digits]
        for _ in range(reach):
            of_places.append(F.pad(of_places[-1][:, :-1], (1, 0)).masked_fill(after_end, 0))
        found = []
        for function in functions:
            products = [
                place * factor % _PRIME for place, factor in zip(of_places, function["factors"], strict=False)
            ]
            found.append((sum(products) + function["offset"]) % _PRIME % settings["per_layer_vocab_size"])
        return torch.stack(found, dim=-1)[:, -length:]

    def marked(
        self, ids: torch.Tensor, tokens: torch.Tensor, mask: Any, positions: Any, cache: Any
    ) -> torch.Tensor:
        """Replaces the ids of those tokens whose id depends on their place in a document.

        These are the first token, every tenth token and the end token of each document.
        """
        marks, length = self.config.per_layer_embedding["marks"], tokens.size(1)
        is_token = torch.ones_like(tokens, dtype=torch.bool)
        if positions is None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + length, device=tokens.device).unsqueeze(0)
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                positions = positions - mask.int().argmax(
                    -1, keepdim=True
                )  # do not count padding on the left
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            is_token = mask[:, -length:].bool()
        is_end = (tokens == marks["end_token"]) & is_token
        # A document begins after the end of the previous one; the cache stores the beginning of the last one.
        begun = getattr(cache, "document_start", torch.zeros_like(tokens[:, :1]))
        starts = torch.cat([begun, torch.where(is_end, positions + 1, 0)], dim=1).cummax(dim=1).values
        if cache is not None:
            cache.document_start = starts[:, -1:]
        place = positions - starts[:, :-1]
        ids = ids.masked_fill(place % marks["period"] == 0, marks["repeated"])
        return ids.masked_fill(place == 0, marks["start"]).masked_fill(is_end, marks["end"])


class ExtendedForCausalLM(nn.Module):
    """Mixin that builds a model with head around an `ExtendedModel`; list it before the class of transformers."""

    model_class: Any
    config: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds the rows of hashed n-grams, computed from `input_ids`.

        The tokens in the cache are not used, because beam search reorders the sequences.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        if "ngrams" in (self.config.per_layer_embedding or {}) and inputs.get("input_ids") is not None:
            count = inputs["input_ids"].size(1)
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            if past + count > input_ids.size(1):
                raise ValueError(
                    "hashed n-grams require all tokens: omit prefill_chunk_size and inputs_embeds"
                )
            # An n-gram has at most three tokens.
            inputs["per_layer_ids"] = self.model.ngram_rows(input_ids[:, -count - 2 :], attention_mask)[
                :, -count:
            ]
        return inputs


@functools.cache
def _classes(name: str, kind: str) -> dict[str, Any]:
    """Returns three classes by name that extend one architecture: configuration, model, and model with head."""
    modeling, configuration = (
        importlib.import_module(f"transformers.models.{kind}.{what}_{kind}")
        for what in ("modeling", "configuration")
    )
    ours, text = f"MegatronExt{name}", "Text" if name == "Gemma3" else ""
    base = getattr(configuration, f"{name}{text}Config")
    # The parallel plans of transformers do not cover the added parts.
    plain = dict.fromkeys(("per_layer_embedding", "npt", "base_model_tp_plan", "base_model_pp_plan"))
    config = type(f"{ours}Config", (base,), {"model_type": f"megatron_ext_{base.model_type}", **plain})
    layer = type(f"{ours}DecoderLayer", (ExtendedLayer, getattr(modeling, f"{name}DecoderLayer")), {})
    shared = {"config_class": config, "_no_split_modules": [layer.__name__], "_tp_plan": None}
    bases = getattr(modeling, f"{name}{text}Model"), getattr(modeling, f"{name}ForCausalLM")
    model = type(f"{ours}Model", (ExtendedModel, bases[0]), {"layer_class": layer, **shared})
    causal = type(f"{ours}ForCausalLM", (ExtendedForCausalLM, bases[1]), {"model_class": model, **shared})
    return {found.__name__: found for found in (config, model, causal)}


_BASES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Phi3", "Olmo2", "Olmo3", "SmolLM3", "Granite")


def __getattr__(name: str) -> Any:
    """Creates a base model's classes at the first access, such as `MegatronExtLlamaForCausalLM`."""
    for base in _BASES:
        if name.startswith(f"MegatronExt{base}"):
            return _classes(base, base.lower())[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
