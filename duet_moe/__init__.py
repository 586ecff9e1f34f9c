"""Duet-MoE: one sparse trunk, two voices. Importing this package registers the Auto classes of transformers."""

from pathlib import Path as _Path

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "setup.cfg").is_file():  # source tree: the sub-packages are the repository's top-level folders
    __path__.append(str(_checkout))

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig  # noqa: E402
from duet_moe.configuration.modes import Mode, NotInThisVersionError  # noqa: E402
from duet_moe.modeling import hub as _hub  # noqa: E402
from duet_moe.modeling.checkpoints import bundled  # noqa: E402
from duet_moe.modeling.modeling_duet_moe import DuetMoeForCausalLM, DuetMoeModel  # noqa: E402
from duet_moe.modeling.writer import Writer  # noqa: E402

AutoConfig.register("duet_moe", DuetMoeConfig, exist_ok=True)
AutoModel.register(DuetMoeConfig, DuetMoeModel, exist_ok=True)
AutoModelForCausalLM.register(DuetMoeConfig, DuetMoeForCausalLM, exist_ok=True)
DuetMoeConfig.register_for_auto_class("AutoConfig")
DuetMoeModel.register_for_auto_class("AutoModel")
DuetMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
DuetMoeForCausalLM.fill_card = _hub.fill_empty_card

__all__ = [
    "DuetMoeConfig",
    "DuetMoeForCausalLM",
    "DuetMoeModel",
    "Mode",
    "NotInThisVersionError",
    "Writer",
    "bundled",
]
