"""The Space's parts: what a panel renders, what settings mean, how runs end and fail."""

import pytest

gr = pytest.importorskip("gradio", reason="the Space needs the `space` extra")

from fake_writer import CREATIVE, FACTUAL, FakeWriter  # noqa: E402

from duet_moe.configuration.modes import BUILT_IN_MODES, NotInThisVersionError  # noqa: E402
from duet_moe.modeling.evidence import Text, TokenEvidence  # noqa: E402
from duet_moe.space.panel import Panel, disagreement_level, render_text, render_text_status  # noqa: E402
from duet_moe.space.runs import MAX_PROMPT_CHARACTERS, compare_steps, paced, readable_errors  # noqa: E402
from duet_moe.space.settings import Settings, SettingsForm, parse_number  # noqa: E402


def text_of(*tokens: tuple[str, float], **fields: object) -> Text:
    evidence = tuple(TokenEvidence(token, -1.0, -1.0, bits, "both") for token, bits in tokens)
    known = dict(
        text="".join(token for token, _ in tokens), mode="creative", prompt="p", seed=5, tokens=(1,) * len(tokens)
    )
    known |= dict(evidence=evidence, time_to_first_token=0.256, tokens_per_second=41.6, finish_reason="end", notes=())
    return Text(**(known | fields))


# Panel


def test_every_token_is_marked_by_its_level_and_spaces_stay_unmarked() -> None:
    shown = render_text(text_of(("One", 0.0), (" two", 0.1), (" three", 0.3), ("\n\n", 0.9), ("four", 1.0)))
    assert [f'class="w d{level}"' in shown for level in range(4)] == [True] * 4
    assert (
        '</span> <span class="w d1" title="differ a little (0.10 bit); chosen by both heads alike">two</span>' in shown
    )
    assert "</span>\n\n<span" in shown


@pytest.mark.parametrize(
    ("bits", "level"), [(-1e-9, 0), (0.0, 0), (0.049, 0), (0.05, 1), (0.2, 2), (0.5, 3), (1.0, 3)]
)
def test_levels_start_at_their_bounds(bits: float, level: int) -> None:
    assert disagreement_level(bits) == level


def test_text_is_escaped_for_html_and_for_the_template_language() -> None:
    hostile = "<script>alert('x')</script> {{value}} ${1+1} `&`"
    for shown in (render_text(text_of((hostile, 0.9))), render_text(text_of(("other", 0.0), text=hostile))):
        assert not any(sign in shown.replace('<p class="text">', "") for sign in ("<script", "{", "}", "$", "`"))
        assert "&lt;script&gt;" in shown


def test_text_stays_plain_where_the_evidence_does_not_spell_it() -> None:
    assert render_text(text_of(("Lis", 0.9), ("\ufffd", 0.9), text="Lisé")) == '<p class="text">Lisé</p>'
    assert render_text(text_of(("Lis", 0.0), text="Lis\ufffd")).endswith(">Lis</span>\ufffd</p>")


def test_status_names_speed_seed_reason_notes_and_disagreement_in_words() -> None:
    status = render_text_status(text_of(("a", 0.0), ("b", 0.6), finish_reason="length", notes=("prompt cut",)))
    for part in ("Reached the length limit", "42 tokens/s", "first token 0.26 s", "seed 5", "prompt cut"):
        assert part in status
    assert "heads differ on 1 of 2 tokens" in status


def test_a_panel_stopped_before_its_first_token_is_empty_again_and_a_finished_text_stays_finished() -> None:
    with gr.Blocks():
        panel = Panel("left", "factual")
    assert panel.stopped(None, "hybrid") == panel.empty("hybrid")
    finished, running = text_of(("Done", 0.0)), text_of(("Not", 0.0), finish_reason="running")
    assert panel.stopped(finished, "factual") == panel.show(finished)
    assert "<strong>Stopped</strong>" in panel.stopped(running, "factual")[2]


# Settings


def test_settings_left_empty_keep_the_modes_as_they_are() -> None:
    assert Settings().modes(BUILT_IN_MODES) == (BUILT_IN_MODES["factual"], BUILT_IN_MODES["creative"])


def test_sampling_and_mix_never_touch_the_factual_side() -> None:
    settings = Settings(temperature=1.5, top_p=0.9, min_p=0.1, head_mix=0.7, num_experts_per_tok=6)
    factual, creative = settings.modes(BUILT_IN_MODES)
    assert (factual.head_mix, factual.temperature, factual.do_sample, factual.num_experts_per_tok) == (0, 1, False, 6)
    assert (creative.head_mix, creative.temperature, creative.top_p, creative.min_p) == (0.7, 1.5, 0.9, 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "Temperature 0 cannot be used: give a number from 0.05 to 2"),
        ({"top_p": float("nan")}, "Top-p nan"),
        ({"num_experts_per_tok": 9}, "Experts per token 9 cannot be used: give a whole number from 2 to 8"),
        ({"num_experts_per_tok": 4.5}, "whole number"),
        ({"max_new_tokens": None}, "Max new tokens None"),
        ({"seed": -1}, "Seed -1"),
        ({"min_p": "0.1"}, "Min-p '0.1'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ("poetic", "creative", "'poetic' is not known: choose one of factual"),
        ("hybrid", "hybrid", "two different modes"),
    ],
)
def test_modes_that_cannot_be_compared_are_refused(left: str, right: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(left, right).modes(BUILT_IN_MODES)


def test_form_reads_numbers_as_people_type_them() -> None:
    settings = SettingsForm.read("hybrid", "creative", 32.0, " 0,7 ", "0.9", "", None, "4", "11")
    assert settings == Settings("hybrid", "creative", 32, temperature=0.7, top_p=0.9, num_experts_per_tok=4, seed=11)
    with pytest.raises(ValueError, match="Seed 'seven' is not a whole number"):
        parse_number("seed", "seven")


# Runs


@pytest.mark.parametrize("prompt", ["", " \n\t", "x" * (MAX_PROMPT_CHARACTERS + 1)])
def test_prompts_that_are_empty_or_too_long_never_reach_the_writer(prompt: str) -> None:
    writer = FakeWriter()
    with pytest.raises(ValueError, match="The prompt (is empty: type|has 20,001 characters: shorten)"):
        next(compare_steps(writer, prompt, Settings()))
    assert writer.asked == []


@pytest.mark.parametrize("prompt, chosen", [("Where is Lisbon?", FACTUAL), ("Sing of Lisbon.", CREATIVE)])
def test_auto_shows_the_mode_that_it_chose_also_beside_that_mode(prompt: str, chosen: str) -> None:
    writer = FakeWriter()
    *_, (left, right) = compare_steps(writer, prompt, Settings("auto", "factual", temperature=0.5))
    assert (left.text, right.text) == (chosen, FACTUAL)
    asked = writer.asked[0]["modes"][0]
    assert asked.name == writer.route(prompt).mode and asked.temperature == (0.5 if asked.do_sample else 1.0)
    with pytest.raises(ValueError, match="Both panels are set to auto"):
        next(compare_steps(writer, prompt, Settings("auto", "auto")))


def test_closing_a_run_closes_the_writers_stream() -> None:
    writer = FakeWriter()
    steps = compare_steps(writer, "Hello", Settings())
    next(steps)
    assert not writer.closed.is_set()
    steps.close()
    assert writer.closed.is_set() and writer.steps == 1


def test_pacing_keeps_the_first_and_the_last_step() -> None:
    assert list(paced(iter(range(9)), seconds=1000)) == [0, 8]
    assert list(paced(iter([0]), seconds=1000)) == [0]
    assert list(paced(iter(range(3)), seconds=0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("mode '<b>' is unknown"), "mode '&lt;b&gt;' is unknown"),
        (NotInThisVersionError("guardrails=", "Go without."), "not in this version"),
        (ZeroDivisionError("secret detail"), "stopped unexpectedly. Press Write to try again"),
    ],
)
def test_errors_become_toasts_without_trace_or_markup(error: Exception, shown: str) -> None:
    with pytest.raises(gr.Error) as caught, readable_errors():
        raise error
    assert shown in caught.value.message and "secret" not in caught.value.message and not caught.value.print_exception
