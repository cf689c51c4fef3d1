"""The charts of an NPT run's losses, norms and curriculum; `layer_losses` and `npt_monitoring` compute the values."""

from megatron_ext.reports.scalar_charts import LOSSES, ScalarChart

_LAYERS = "NPT layers"
_CURRICULUM = "Curriculum"

_LAYER_LOSSES = {
    "mlp_direct_loss": (
        "Direct MLP loss",
        "Mean square error between the modulated MLP's output and its target, divided by the target's RMS",
    ),
    "equivalence_loss": (
        "Equivalence loss",
        "Difference between the outputs of an NPT layer and of the base layer for the same input",
    ),
    "attention_reconstruction_loss": (
        "Attention reconstruction loss",
        "Difference between v_a and the attention output (stage 1)",
    ),
    "regularization_loss": (
        "Regularization loss",
        "Size of the NP factors, or of the vectors that they generate",
    ),
}
_SIZES = {
    "v_a_norm": (
        "Norm of v_a",
        "Norm of the generated vector v_a; if it is near zero, the NP component has collapsed",
    ),
    "v_b_norm": (
        "Norm of v_b",
        "Norm of the generated vector v_b; if it is near zero, the NP component has collapsed",
    ),
    "v_a_attention_similarity": (
        "Similarity of v_a and the attention output",
        "Cosine similarity of v_a and the attention output",
    ),
    "delta_norm": (
        "Norm of the weight update",
        "Norm of the update that attention applies to the MLP's weights",
    ),
}

NPT_CHARTS = (
    ScalarChart(
        section=LOSSES,
        title="NPT loss",
        tags="npt loss",
        shows="The minimized loss: the sum of all losses with their weights.",
    ),
    ScalarChart(
        section=LOSSES,
        title="Fidelity loss",
        tags="fidelity_loss",
        shows="Distance between the logits of NPT and of the base model: KL divergence, or mean square error.",
    ),
    *(
        ScalarChart(section=LOSSES, title=title, tags=name, shows=f"{shows}; mean over the NPT layers.")
        for name, (title, shows) in _LAYER_LOSSES.items()
    ),
    ScalarChart(
        section=LOSSES,
        title="Perplexity, NPT / base",
        tags="npt/perplexity_ratio (validation|test)",
        shows="Perplexity of the NPT model divided by that of its base model on the same batches; 1 means equal.",
    ),
    *(
        ScalarChart(section=_LAYERS, title=f"{title} per layer", tags=rf"{name}/layer_\d+", shows=f"{shows}.")
        for name, (title, shows) in _LAYER_LOSSES.items()
    ),
    ScalarChart(
        section=_LAYERS,
        title="Total loss per layer",
        tags=r"npt_loss/layer_\d+",
        shows="Sum of a layer's losses with their weights.",
    ),
    *(
        ScalarChart(
            section=_LAYERS,
            title=title,
            tags=rf"npt/{name}|{name}/layer_\d+",
            shows=f"{shows}; one line per NPT layer, and their mean.",
        )
        for name, (title, shows) in _SIZES.items()
    ),
    ScalarChart(
        section=_CURRICULUM,
        title="Stage",
        tags="curriculum/stage",
        shows="Index of the curriculum's current stage, from 0.",
    ),
    ScalarChart(
        section=_CURRICULUM,
        title="Student's share",
        tags="curriculum/(attention|mlp)_share",
        shows="Share of the student's hidden state in the input of attention and MLP; the rest is the teacher's.",
    ),
)
