"""How a voice is trained: a few numbers in `recipes/voice-*.yaml`, checked when they are read."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from duet_moe.finetune.corpus import RECIPES

METHODS = ("lora", "rslora", "dora")
LAYERS = ("gate_proj", "up_proj", "down_proj", "unembed")  # of the diversity head; nothing else may learn
NAMES = ("quick", "standard", "careful", "prefer")


@dataclass(frozen=True)
class VoiceRecipe:
    """Settings of one training.

    Args:
        method (`str`): `lora` (Hu et al. 2021, arXiv 2106.09685), `rslora` (Kalajdzievski 2023, arXiv 2312.03732) or
            `dora` (Liu et al. 2024, arXiv 2402.09353).
        rank, alpha, dropout: as in `peft.LoraConfig`.
        layers (`tuple[str, ...]`): linear layers of the diversity head that get an adapter.
        epochs (`int`): at most; `patience` of them without a better held-out loss end the training.
        batch_size (`int`): texts per step, over all processes.
        lr (`float`): peak of AdamW's rate, after `warmup` (share of all steps) and before a cosine to zero.
        samples_per_prompt (`int`): answers to each held-out prompt that the style report is made of.
        beta (`float`): of `prefer_voice` only: how dearly leaving the reference is paid for (Rafailov et al. 2023,
            arXiv 2305.18290, equation 7).
    """

    method: str = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1
    layers: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    epochs: int = 12
    patience: int = 3
    batch_size: int = 8
    lr: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    samples_per_prompt: int = 4
    beta: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {METHODS}.")
        if not self.layers or not set(self.layers) <= set(LAYERS):
            raise ValueError(f"layers is {list(self.layers)}; choose some of {list(LAYERS)}.")
        for name in ("rank", "alpha", "epochs", "patience", "batch_size", "lr", "samples_per_prompt", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be above 0.")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be from 0 to below 1.")

    @property
    def target_modules(self) -> str:
        """The expression that names the adapted layers; PEFT matches it against whole names."""
        return rf"diversity_head\.({'|'.join(self.layers)})"

    def save(self, path: Path) -> None:
        """Write the settings as the YAML file that `read_voice_recipe` reads."""
        settings = asdict(self) | {"layers": list(self.layers)}
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def read_voice_recipe(name_or_path: str | Path) -> VoiceRecipe:
    """Return a recipe of the package (`quick`, `standard`, `careful`) or of a YAML file.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: on a setting that does not exist or a value out of range.
    """
    path = Path(name_or_path)
    path = path if path.suffix else RECIPES / f"voice-{name_or_path}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"No recipe {str(name_or_path)!r}: give a YAML file or one of {list(NAMES)}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    allowed = [field.name for field in fields(VoiceRecipe)]
    if not isinstance(content, dict) or not content.keys() <= set(allowed):
        raise ValueError(f"{path.name} may have only the settings {allowed}, one a line, as in `lr: 0.003`.")
    return VoiceRecipe(**content)
