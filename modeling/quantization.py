"""Quantisation that reaches the experts, on load, from the user's plain `BitsAndBytesConfig`.

transformers swaps `nn.Linear` for bitsandbytes' layers, which passes over fused experts and damages heads. The
quantisers here do the same for attention and shared experts, pack the experts too, and leave both heads alone.
This file travels inside saved checkpoints: it imports only torch, transformers and flat siblings, and reaches
bitsandbytes through transformers' integration and the operators that it registers with torch.
"""

import copy
import importlib
import logging as python_logging

import torch
from torch import nn
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig, TorchAoConfig
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from .footprint import footprint_table
from .moe import DuetMoeExperts
from .packed_experts import BLOCK, PROJECTIONS, PackedExperts, pack

logger = logging.get_logger("transformers.duet_moe")  # follows the verbosity that users set there

# the gate and the router are small, and decide
HEADS = ("coherence_head", "diversity_head", "token_gate", "task_router")
METHODS = {"duet_moe_bnb_4bit": "load_in_4bit", "duet_moe_bnb_8bit": "load_in_8bit"}  # `quant_method` in config.json
POSSIBLE = (
    "Possible are BitsAndBytesConfig(load_in_4bit=True) or (load_in_8bit=True), and TorchAoConfig; in an FqnToConfig "
    r"the experts are 're:.*experts\.\w+_proj'. See docs/quantisation.md."
)


class DuetMoeBitsAndBytesConfig(BitsAndBytesConfig):
    """A `BitsAndBytesConfig` whose quantiser reaches the experts and never touches the heads.

    Users need not make one: `from_pretrained` turns their `BitsAndBytesConfig` into it.

    Raises:
        ValueError: on a choice that the experts cannot follow; the message has the value and what is allowed.
    """

    def __init__(
        self, quant_method: str | None = None, llm_int8_skip_modules: list[str] | None = None, **settings: object
    ):
        for flag in ("_load_in_4bit", "_load_in_8bit"):
            settings.pop(flag, None)
        if quant_method in METHODS:
            settings[METHODS[quant_method]] = True
        skipped = dict.fromkeys([*(llm_int8_skip_modules or ()), *HEADS])
        super().__init__(llm_int8_skip_modules=list(skipped), **settings)
        if not self.is_quantizable():
            raise ValueError("BitsAndBytesConfig asks for nothing: set load_in_4bit=True or load_in_8bit=True.")
        _require(self.load_in_8bit or self.quantization_method(), self, "bnb_4bit_quant_type", "'nf4' or 'fp4'")
        _require(self.bnb_4bit_quant_storage == torch.uint8, self, "bnb_4bit_quant_storage", "torch.uint8")
        _require(not self.llm_int8_has_fp16_weight, self, "llm_int8_has_fp16_weight", "False, or nothing is saved")
        self.quant_method = list(METHODS)[self.load_in_8bit]

    def to_dict(self) -> dict:
        # with these flags in config.json transformers would take its own quantiser instead
        flags = {f"{prefix}load_in_{bits}bit" for prefix in ("", "_") for bits in (4, 8)}
        return {name: value for name, value in super().to_dict().items() if name not in flags}


def _require(holds: object, config: BitsAndBytesConfig, name: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r} is not possible for the experts: it must be {allowed}.")


def reaching_experts(config: QuantizationConfigMixin | dict | None) -> QuantizationConfigMixin | None:
    """Return what quantises experts too, for what a user passed as `quantization_config`.

    Raises:
        ValueError: for a method that can only quantise `nn.Linear` layers, or an unknown one.
    """
    chosen = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else config
    if isinstance(chosen, (AwqConfig, GPTQConfig)):
        method = getattr(chosen.quant_method, "value", chosen.quant_method)
        raise ValueError(f"quant_method={method!r} knows only nn.Linear layers, so the experts would stay. {POSSIBLE}")
    if isinstance(chosen, TorchAoConfig):
        chosen = _torchao_reaching_experts(chosen)
    if isinstance(chosen, BitsAndBytesConfig) and chosen.quant_method not in METHODS:
        chosen = DuetMoeBitsAndBytesConfig(**chosen.to_dict())
    return chosen


def _torchao_reaching_experts(config: TorchAoConfig) -> TorchAoConfig:
    """Return a copy that leaves the heads alone; a single choice becomes one for experts and linear layers alike."""
    by_name = importlib.import_module("torchao.quantization").FqnToConfig  # only who has torchao comes here
    config = copy.copy(config)
    config.modules_to_not_convert = list(dict.fromkeys([*(config.modules_to_not_convert or ()), *HEADS]))
    if not isinstance(config.quant_type, by_name):
        config.quant_type = by_name({r"re:.*_proj": config.quant_type})
    return config


def finish_quantized(model: PreTrainedModel) -> None:
    """Check a quantised model that has been loaded, and log its bytes by group.

    Raises:
        ValueError: if experts are still floats.
    """
    require_quantized_experts(model)
    if model.hf_quantizer.quantization_config.quant_method == QuantizationMethod.TORCHAO:
        model.set_experts_implementation("eager")  # the faster ones need operators that torchao's tensors lack
    logger.warning(f"{type(model).__name__} is quantised; bytes by group:\n{footprint_table(model)}")


def require_quantized_experts(model: PreTrainedModel) -> None:
    """Refuse a model whose experts are still floats.

    Raises:
        ValueError: naming the first such weight and what to do.
    """
    for name, module in model.named_modules():
        for projection in PROJECTIONS if _is_experts(module) else ():
            weight = getattr(module, projection)
            if type(weight) is nn.Parameter and weight.is_floating_point():
                dtype = str(weight.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name}.{projection} stayed in {dtype}, and experts are most of this model: the method does not "
                    "reach them, or a skip list (llm_int8_skip_modules, modules_to_not_convert) or an offloading "
                    f"device_map names them. {POSSIBLE}"
                )


def _is_experts(module: nn.Module) -> bool:
    # by shape: a checkpoint's own copy of moe.py has another class of the same name
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in PROJECTIONS)


class _Quantize(ConversionOps):
    """Packs the weights of experts while a checkpoint is read; `linears` does the others."""

    def __init__(self, config: BitsAndBytesConfig, linears: ConversionOps):
        self.config = config
        self.linears = linears

    def convert(
        self,
        input_dict: dict,
        full_layer_name: str | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> dict[str, torch.Tensor]:
        name, value = next(iter(input_dict.items()))
        module, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(module, PackedExperts):
            return self.linears.convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        weight = value[0] if isinstance(value, list) else value
        return {name + suffix: tensor for suffix, tensor in pack(weight, self.config).items()}


class _ReachesExperts(HfQuantizer):
    """What both quantisers add to those of transformers."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: dict | str | None = None, **kwargs: object
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        for name, module in list(model.named_modules()):
            # On CPUs with AVX512_BF16, bitsandbytes 0.50 repacks weights in the first evaluation: what is saved then
            # is wrong, no gradient passes any more, and widths that 32 does not divide fail.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
            names = (name, *(f"{name}.{projection}" for projection in PROJECTIONS))
            if _is_experts(module) and all(should_convert_module(n, self.modules_to_not_convert) for n in names):
                self._require_whole_blocks(name, module)
                with torch.device("meta"):
                    model.set_submodule(name, PackedExperts(module, self.quantization_config))
        require_quantized_experts(model)

    def _require_whole_blocks(self, name: str, experts: nn.Module) -> None:
        for projection in PROJECTIONS if self.quantization_config.load_in_4bit else ():
            if width := getattr(experts, projection).shape[-1] % BLOCK:
                raise ValueError(
                    f"{name}.{projection} has rows of {getattr(experts, projection).shape[-1]} weights, {width} more "
                    f"than whole blocks of {BLOCK}: 4 bits need hidden_size and intermediate_size to be multiples of "
                    f"{BLOCK}. Use load_in_8bit=True."
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES  # so that the library's guards for it hold
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: object) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, PackedExperts):
            return name in PROJECTIONS
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config, super().get_quantize_ops())

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name once the model has been saved
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                with torch.device("meta"):
                    experts = DuetMoeExperts(model.config)
                for projection in PROJECTIONS:
                    setattr(experts, projection, nn.Parameter(module.unpacked(projection, dtype)))
                model.set_submodule(name, experts)
        return super()._dequantize(model, dtype)


class DuetMoe4BitQuantizer(_ReachesExperts, Bnb4BitHfQuantizer):
    """4 bits (nf4 or fp4) for experts, attention and shared experts."""


class DuetMoe8BitQuantizer(_ReachesExperts, Bnb8BitHfQuantizer):
    """8 bits for experts (rounded by row) and for attention and shared experts (LLM.int8)."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        # bitsandbytes logs its cast of bf16 inputs again for every layer and every token
        python_logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
        return super()._process_model_after_weight_loading(model, **kwargs)


def _is_no_cast(record: python_logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg


for _method, _quantizer in zip(METHODS, (DuetMoe4BitQuantizer, DuetMoe8BitQuantizer), strict=True):
    # Not `register_quantizer`: a checkpoint's own copy of this file may be imported beside the package's.
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_method, DuetMoeBitsAndBytesConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(_method, _quantizer)
