"""Duet-MoE passes the tests that transformers has for every model of its own."""

import unittest

import pytest
import torch
import upstream
from transformers.models.auto import modeling_auto

if not upstream.FOLDER.is_dir():
    pytest.skip("transformers' tests are not here: python tests/conformance/upstream.py", allow_module_level=True)
upstream.load()

from upstream_tests import (  # noqa: E402
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_memory_cleanup_mixin,
    test_modeling_common,
    test_tensor_parallel_mixin,
    test_training_mixin,
)
from upstream_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from upstream_tests.test_configuration_common import ConfigTester  # noqa: E402

from duet_moe import DuetMoeConfig, DuetMoeForCausalLM, DuetMoeModel  # noqa: E402

# The distributed tests run for a list of models of transformers' own; None means for every model.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

# Where the tests look what a class is: a trunk without a loss, or a model with one.
modeling_auto.MODEL_MAPPING_NAMES["duet_moe"] = "DuetMoeModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["duet_moe"] = "DuetMoeForCausalLM"


class DuetMoeModelTester:
    """A tiny configuration and its inputs, as the mixins ask for them."""

    config_class = DuetMoeConfig
    base_model_class = DuetMoeModel
    causal_lm_class = DuetMoeForCausalLM
    batch_size = 3
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2

    def get_config(self) -> DuetMoeConfig:
        return DuetMoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            sliding_window=64,  # with less, Mixtral's own tests fail too: they count cached tokens
            head_mix=0.5,  # both heads speak, so that both are to have gradients
            plan_size=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DuetMoeConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(2, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class DuetMoeTest(
    test_memory_cleanup_mixin.MemoryCleanupMixin,
    test_modeling_common.ModelTesterMixin,
    test_training_mixin.TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    GenerationTesterMixin,
    unittest.TestCase,
):
    run_under_no_grad = False
    all_model_classes = (DuetMoeModel, DuetMoeForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # it looks for a year in a licence header
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = DuetMoeModelTester()
        super().setUp()

    def test_config(self) -> None:
        ConfigTester(self, config_class=DuetMoeConfig, hidden_size=32, num_attention_heads=2).run_common_tests()


TIED = "each head owns its output matrix: the configuration refuses tied embeddings"
REFUSED = {
    "test_ep_forward_3": TIED,
    "test_ep_forward_4": TIED,
    "test_ep_forward_5": TIED,
    "test_tp_forward_1": TIED,
    "test_fsdp2_plan_vs_ddp_1_tied": TIED,
    "test_fsdp2_sharding_structure_1_tied": TIED,
}
for name, reason in REFUSED.items():
    setattr(DuetMoeTest, name, unittest.skip(reason)(getattr(DuetMoeTest, name)))
