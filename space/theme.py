"""The Space's look: system fonts only, so that it needs no network; warm paper by day, warm black by night.

`style.css` uses the theme's variables and adds what Gradio has no name for: panels, words, legend.
"""

from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("style.css")
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")

# Name -> (light, dark).
COLOURS: dict[str, tuple[str, str]] = {
    "body_background_fill": ("#faf9f6", "#161513"),
    "body_text_color": ("#1f1d1a", "#ece8e1"),
    "body_text_color_subdued": ("#625d55", "#a9a298"),
    "background_fill_primary": ("#ffffff", "#1e1d1a"),
    "background_fill_secondary": ("#f3f1ec", "#26241f"),
    "block_background_fill": ("#faf9f6", "#161513"),
    "block_border_color": ("#e2ded5", "#38352f"),
    "block_info_text_color": ("#625d55", "#a9a298"),
    "block_label_text_color": ("#1f1d1a", "#ece8e1"),
    "block_title_text_color": ("#1f1d1a", "#ece8e1"),
    "border_color_primary": ("#e2ded5", "#38352f"),
    "input_background_fill": ("#ffffff", "#1e1d1a"),
    "input_border_color": ("#8c867b", "#6f695f"),
    "input_border_color_focus": ("#27477a", "#9db9e8"),
    "input_placeholder_color": ("#6e685f", "#9c958a"),
    "button_primary_background_fill": ("#27477a", "#9db9e8"),
    "button_primary_background_fill_hover": ("#1d365e", "#b9cef1"),
    "button_primary_text_color": ("#ffffff", "#10203a"),
    "button_primary_border_color": ("#27477a", "#9db9e8"),
    "button_secondary_background_fill": ("#ffffff", "#26241f"),
    "button_secondary_background_fill_hover": ("#f3f1ec", "#312e28"),
    "button_secondary_text_color": ("#1f1d1a", "#ece8e1"),
    "button_secondary_border_color": ("#c9c3b7", "#4a463e"),
    "button_cancel_background_fill": ("#ffffff", "#26241f"),
    "button_cancel_background_fill_hover": ("#fbeae6", "#3a2520"),
    "button_cancel_text_color": ("#98301a", "#f0a08c"),
    "button_cancel_border_color": ("#c98a7b", "#7c4a3d"),
    "checkbox_background_color_selected": ("#27477a", "#3f69ad"),
    "checkbox_border_color": ("#8c867b", "#6f695f"),
    "checkbox_border_color_selected": ("#27477a", "#9db9e8"),
    "slider_color": ("#27477a", "#9db9e8"),
    "table_even_background_fill": ("#ffffff", "#1e1d1a"),
    "table_odd_background_fill": ("#ffffff", "#1e1d1a"),
}


def duet_theme() -> gr.themes.Base:
    """Return the theme, light and dark."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=SANS,
        font_mono=MONO,
    )
    light = {name: colours[0] for name, colours in COLOURS.items()}
    dark = {f"{name}_dark": colours[1] for name, colours in COLOURS.items()}
    shape = {"block_border_width": "0px", "block_shadow": "none", "input_border_width": "1px", "input_shadow": "none"}
    return base.set(**light, **dark, **shape)
