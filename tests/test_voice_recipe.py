"""Recipes of voices are read whole or refused with what is allowed."""

from pathlib import Path

import pytest

from duet_moe.finetune.voice_recipe import NAMES, VoiceRecipe, read_voice_recipe


def test_every_recipe_of_the_package_can_be_read() -> None:
    recipes = {name: read_voice_recipe(name) for name in NAMES}
    assert recipes["quick"].epochs < recipes["standard"].epochs < recipes["careful"].epochs
    assert all("unembed" not in recipe.layers for recipe in recipes.values())  # TRL could not train such a voice on


def test_a_file_of_ones_own_wins_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rank: 4\nlayers: [unembed]\nmethod: dora\n")
    recipe = read_voice_recipe(tmp_path / "mine.yaml")
    assert (recipe.rank, recipe.method, recipe.target_modules) == (4, "dora", r"diversity_head\.(unembed)")
    assert recipe.lr == VoiceRecipe().lr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: qlora", "method is 'qlora'; choose one of"),
        ("layers: [coherence_head]", "choose some of"),
        ("layers: []", "choose some of"),
        ("rank: 0", "rank is 0; it must be above 0"),
        ("dropout: 1.0", "dropout is 1.0"),
        ("epoch: 3", "may have only the settings"),
        ("- rank", "may have only the settings"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_voice_recipe(tmp_path / "bad.yaml")


def test_an_unknown_name_lists_those_that_there_are() -> None:
    with pytest.raises(FileNotFoundError, match="quick.*standard.*careful"):
        read_voice_recipe("thorough")
