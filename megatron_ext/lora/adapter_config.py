"""Flags for LoRA adapters on the frozen model of a checkpoint."""

from dataclasses import dataclass

from megatron_ext.config.command_line.field_checks import check_at_least, check_positive


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Flags for LoRA adapters on every linear module of the layers; all weights of the loaded checkpoint are
    frozen.
    """

    lora_rank: int | None = None
    """Freeze the model loaded with --load and --finetune, and train LoRA adapters of this rank. Default: no
    adapters.
    """

    lora_alpha: float = 32.0
    """Alpha of the adapters of --lora-rank; their output is scaled by alpha / rank."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lora_rank")
        check_positive(self, "lora_alpha")
        if self.lora_rank is None and self.lora_alpha != type(self).lora_alpha:
            raise ValueError(f"--lora-alpha {self.lora_alpha:g}: has no effect; it requires --lora-rank")
